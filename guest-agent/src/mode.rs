//! The mode of the agent, from its arguments.

/// The surroundings that the agent was started in: see the table in [`crate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode {
    /// The channel is on descriptors 0 and 1, and not a vsock connection of a microVM.
    pub stdio: bool,
    /// The agent makes the file systems.
    pub build_root: bool,
    /// The kernel serves this sandbox alone, although a container runtime made the file systems.
    pub own_kernel: bool,
}

/// The agent was called with arguments that it does not accept.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UsageError {
    #[error("unknown argument {0}")]
    UnknownArgument(String),
    #[error(
        "this program is the init process of a sandbox; outside a microVM it needs --stdio, with \
         the channel on descriptors 0 and 1"
    )]
    NotInit,
}

impl Mode {
    /// The mode of PID 1 in a microVM.
    const MICROVM: Mode = Mode { stdio: false, build_root: true, own_kernel: false };

    /// Reads the mode from the arguments, the first of which is the program's name.
    pub fn parse(arguments: &[&[u8]], is_init: bool) -> Result<Mode, UsageError> {
        // The kernel passes words of its command line that it does not know to init. In a microVM
        // they are not meant for the agent.
        if is_init && !arguments.contains(&b"--stdio".as_slice()) {
            return Ok(Mode::MICROVM);
        }
        let mut mode = Mode { stdio: false, build_root: false, own_kernel: false };
        for argument in arguments.iter().skip(1) {
            match *argument {
                b"--stdio" => mode.stdio = true,
                b"--build-root" => mode.build_root = true,
                b"--own-kernel" => mode.own_kernel = true,
                other => {
                    let argument = String::from_utf8_lossy(other).into_owned();
                    return Err(UsageError::UnknownArgument(argument));
                }
            }
        }
        if mode.stdio { Ok(mode) } else { Err(UsageError::NotInit) }
    }

    /// Returns whether the agent is PID 1 of a microVM.
    pub fn is_microvm(self) -> bool {
        !self.stdio
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mode_follows_from_known_arguments_only() {
        let parse =
            |arguments: &[&[u8]]| Mode::parse(&[&[b"init".as_slice()], arguments].concat(), false);
        let stdio = Mode { stdio: true, build_root: false, own_kernel: false };
        assert_eq!(parse(&[b"--stdio"]), Ok(stdio));
        assert_eq!(parse(&[b"--stdio", b"--build-root"]), Ok(Mode { build_root: true, ..stdio }));
        assert_eq!(parse(&[b"--stdio", b"--own-kernel"]), Ok(Mode { own_kernel: true, ..stdio }));
        assert_eq!(parse(&[b"--help"]), Err(UsageError::UnknownArgument("--help".into())));
    }
}

//! Arguments that several benchmarks share.

use std::ffi::OsString;
use std::path::PathBuf;

use chitin::{Builder, ECHO, Exit, Sandbox};
use serde::Serialize;

use crate::error::BenchError;
use crate::peer::{self, Peer, PeerArgs};
use crate::report::write_json;

/// Arguments of every benchmark that can measure a peer too.
#[derive(clap::Args)]
pub struct Common {
    #[command(flatten)]
    pub guest: GuestArgs,

    #[command(flatten)]
    peer: PeerArgs,

    #[command(flatten)]
    pub output: OutputArgs,
}

impl Common {
    /// Returns the peer, if one is asked for, whose guests have this many virtual CPUs.
    pub fn find_peer(&self, vcpus: u32) -> Result<Option<Peer>, BenchError> {
        Ok(self.peer.find_peer(vcpus, self.guest.memory)?)
    }
}

/// Size of the sandboxes, and the jail of their monitors.
#[derive(clap::Args)]
pub struct GuestArgs {
    /// Memory of each sandbox in MiB
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = chitin::parse_mib)]
    pub memory: u64,

    /// Do not jail the monitor: a guest that takes over its monitor then has the files, the network
    /// and the user of this process. For hosts that have no jail (`chitin doctor` gives the
    /// reason), and to measure its cost
    #[arg(long)]
    no_jail: bool,
}

impl GuestArgs {
    /// Returns a builder of such sandboxes.
    pub fn builder(&self) -> Builder {
        Sandbox::builder().memory_mib(self.memory).jail(self.jail())
    }

    /// Returns whether monitors are jailed, and prints a warning if they are not.
    pub fn jail(&self) -> bool {
        if self.no_jail {
            eprintln!(
                "chitin-bench: WARNING: --no-jail: the monitor is not jailed; a guest that takes \
                 it over has everything this user has"
            );
        }
        !self.no_jail
    }

    /// Returns the same size and jail as arguments of `chitin run`.
    pub fn to_run_args(&self) -> Vec<String> {
        let mut arguments = vec!["--memory".into(), self.memory.to_string()];
        arguments.extend(self.no_jail.then(|| "--no-jail".into()));
        arguments
    }
}

/// Files that the results are written to, in addition to the table.
#[derive(clap::Args)]
pub struct OutputArgs {
    /// Write every run and the summary as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw the phases and the distribution of times
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

impl OutputArgs {
    /// Writes the files that were asked for.
    pub fn write_files(
        &self,
        report: &impl Serialize,
        draw_plot: impl FnOnce() -> String,
    ) -> Result<(), BenchError> {
        if let Some(path) = &self.json {
            write_json(path, report)?;
        }
        if let Some(path) = &self.plot {
            std::fs::write(path, draw_plot())
                .map_err(BenchError::io(format!("write {}", path.display())))?;
        }
        Ok(())
    }
}

/// The command that runs in the sandboxes.
#[derive(clap::Args, Clone)]
pub struct Workload {
    /// Command to run instead of an echo of seven bytes; it must print something
    #[arg(value_name = "CMD", trailing_var_arg = true)]
    pub argv: Vec<OsString>,
}

impl Workload {
    /// Returns the command for a sandbox.
    pub fn to_command(&self, sandbox: &Sandbox) -> chitin::Command {
        match self.argv.split_first() {
            Some((program, arguments)) => sandbox.command(program).args(arguments),
            None => sandbox.command(ECHO).arg("chitin"),
        }
    }

    /// Returns the command for the guest of a peer.
    pub fn to_peer_command(&self) -> Vec<u8> {
        peer::encode_argv(&self.to_argv())
    }

    /// Returns the command for a program of the host.
    pub fn to_argv(&self) -> Vec<OsString> {
        match self.argv.is_empty() {
            true => vec![ECHO.into(), "chitin".into()],
            false => self.argv.clone(),
        }
    }

    /// Returns an error if the command failed or printed nothing.
    pub fn check_exit(&self, exit: Exit, has_printed: bool) -> Result<(), BenchError> {
        match (exit, has_printed) {
            (Exit::Code(0), true) => Ok(()),
            (Exit::Code(0), false) => Err(BenchError::NoOutput),
            (exit, _) => Err(BenchError::CommandFailed { exit }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workload_defaults_to_an_echo() {
        let echo = Workload { argv: Vec::new() };
        assert_eq!(echo.to_peer_command(), [ECHO.as_bytes(), b"\0chitin\0"].concat());
        let other = Workload { argv: vec!["true".into()] };
        assert_eq!(other.to_peer_command(), b"true\0");
    }
}

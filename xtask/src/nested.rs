//! `cargo xtask nested`: runs a command on an emulated machine with a usable KVM.
//!
//! ```text
//!  xtask ── spawns ──▶ qemu (software CPU with AMD SVM) ── boots ──▶ Debian's kernel ── PID 1 ──▶ CMD
//!    │                   │ 9p: the outer machine's / read-only, target/nested-out and --out written through
//!    └── 5 socket pairs ─┘ virtio-serial: control, stdin, stdout, stderr; the console
//! ```
//!
//! QEMU's software CPU implements AMD's virtualization with nested paging, so that Debian's kvm-amd works in it on any
//! machine, also one without KVM. Only the AMD half of KVM is exercised this way.
//!
//! CMD finds the outer machine's files at the same paths, in the same working directory. What it writes vanishes, except
//! below `target/nested-out` and the `--out` directories. Its stdin, stdout and stderr are byte-exact, its exit code is
//! ours; 124 means that `--timeout` or `--silence` ended it, 125 that the emulated machine failed.
//!
//! With `--icount` the emulated clock advances 2 ns per executed instruction and does not depend on the host's speed:
//! the same command takes the same time twice. Waiting for a file of the outer machine would add host time to that, so
//! what a measured command touches is copied into memory first: the artifacts, the release binaries, the command itself
//! and the C library. Name more with `--preload`.

use std::collections::{BTreeSet, VecDeque};
use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use chitin_nested_init::{
    CONTROL_PORT, Launch, MAX_LAUNCH_LEN, ROOT_TAG, Report, STDERR_PORT, STDIN_PORT, STDOUT_PORT,
    share_tag,
};

use crate::process::describe_start_failure;
use crate::{duration, workspace};

mod host;
mod initrd;
mod qemu;

/// The emulated machine boots in about 5 s; under load of other work, and with one deterministic CPU, in several times
/// that. A boot that takes longer is stuck.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// Exit code of a command ended by the limit, as of coreutils' timeout.
const TIMED_OUT: u8 = 124;
/// Exit code when nobody reads our output any more: 128 + SIGPIPE.
const BROKEN_PIPE: u8 = 141;
/// Everything that QEMU can emulate.
const CPU: &str = "max";
/// The same without AVX: where there is AVX, the C library copies by `rep movsb`, of which the deterministic clock counts every
/// byte.
const CPU_ICOUNT: &str = "max,-avx,-avx2,-f16c,-vaes,-vpclmulqdq";
/// The emulated machine's own mitigations and address randomization would only slow the emulation down and blur figures;
/// those of the guests in it are their own business and stay on. The initializers left out take a quarter of the
/// boot: tracing events, BPF types, built-in certificates, a noise source.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet mitigations=off nokaslr norandmaps \
    initcall_blacklist=trace_eval_init,init_kprobe_trace,bpf_tcp_ca_kfunc_init,bpf_dummy_struct_ops_init,\
    load_system_certificate_list,jent_mod_init";
/// How much of the console is kept for the case that something fails.
const CONSOLE_LIMIT: usize = 256 << 10;

/// Run a command on an emulated machine that has a usable /dev/kvm
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Deterministic time: 2 ns per executed instruction, one CPU
    #[arg(long, conflicts_with = "cpus")]
    icount: bool,
    /// End the command after this long, host time (500ms, 90s, 10m, 1h)
    #[arg(long, value_name = "DUR", default_value = "10m", value_parser = duration::parse)]
    timeout: Duration,
    /// End the command when it has written nothing for this long, host time
    #[arg(long, value_name = "DUR", value_parser = duration::parse)]
    silence: Option<Duration>,
    /// Memory of the emulated machine
    #[arg(long, value_name = "MIB", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(512..=65536))]
    memory: u32,
    /// CPUs of the emulated machine. With more than one, an instruction that one CPU patches while another executes it can
    /// fault now and then, which ends the machine: Linux patches itself, KVM at each start of a guest
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    cpus: u8,
    /// Set a variable for the command; PATH, HOME, TERM, CHITIN_* and RUST_* are passed on anyway
    #[arg(long = "env", value_name = "NAME=VALUE")]
    env: Vec<OsString>,
    /// A directory whose contents are written through, beside target/nested-out; created if missing
    #[arg(long = "out", value_name = "DIR")]
    out: Vec<PathBuf>,
    /// A file, or directory of files, to copy into the emulated machine's memory before the command starts
    #[arg(long = "preload", value_name = "PATH")]
    preload: Vec<PathBuf>,
    /// Show the emulated machine's console and how long it took to start
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

/// Builds what the machine is made of, if it is not in the cache.
pub fn prepare() -> Result<(PathBuf, host::Host)> {
    Ok((qemu::find_or_build()?, host::find_or_build()?))
}

/// Boots the machine, runs the command, and returns its exit code.
pub fn run(args: &Args) -> Result<ExitCode> {
    let (program, host) = prepare()?;
    let shares = shares(&args.out)?;
    let launch = Launch {
        argv: args.command.iter().map(|word| word.as_bytes().to_vec()).collect(),
        env: environment(&args.env, args.icount)?,
        cwd: env::current_dir().context("find the working directory")?.into_os_string().into_vec(),
        shares: shares.iter().map(|share| share.as_os_str().as_bytes().to_vec()).collect(),
        preload: preload(args)?,
    };
    let code = Machine::start(&program, args, &host, &shares)?.run(&launch, args)?;
    Ok(ExitCode::from(code))
}

// ---- what the command gets ----

/// The directories written through, as absolute paths.
fn shares(out: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut shares = Vec::new();
    for dir in std::iter::once(&workspace::target_dir().join("nested-out")).chain(out) {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let dir = dir.canonicalize().with_context(|| format!("find {}", dir.display()))?;
        // QEMU splits its options at commas; doubling them is possible, but such a name is a mistake anyway.
        ensure!(
            !dir.as_os_str().as_bytes().contains(&b','),
            "{}: a comma in the name of a share",
            dir.display()
        );
        if !shares.contains(&dir) {
            shares.push(dir);
        }
    }
    Ok(shares)
}

fn environment(extra: &[OsString], icount: bool) -> Result<Vec<Vec<u8>>> {
    let passed = |name: &[u8]| {
        [&b"PATH"[..], b"HOME", b"TERM", b"LANG", b"LC_ALL", b"NO_COLOR"].contains(&name)
            || [&b"CHITIN_"[..], b"RUST_", b"NEXTEST"].iter().any(|prefix| name.starts_with(prefix))
    };
    let outer = env::vars_os().filter(|(name, _)| passed(name.as_bytes()));
    let mut list: Vec<Vec<u8>> =
        outer.map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat()).collect();
    // So that a program can tell where it runs, and whether its clock is the deterministic one.
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

/// What to copy into memory: regular files, and the symbolic links on the way to them (9p asks the outer machine again
/// each time a link is followed). No path leads through a link.
fn preload(args: &Args) -> Result<Vec<Vec<u8>>> {
    let mut found = BTreeSet::new();
    for path in &args.preload {
        ensure!(path.exists(), "--preload {}: no such file or directory", path.display());
        add_files(path, &mut found).with_context(|| format!("--preload {}", path.display()))?;
    }
    if args.icount {
        let program = Path::new(&args.command[0]);
        let program = match program.components().count() {
            1 if !program.exists() => {
                crate::process::find_on_path(&program.to_string_lossy()).unwrap_or_default()
            }
            _ => program.to_owned(),
        };
        let libraries = ["libc.so.6", "libm.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"];
        let libraries = libraries.map(|name| Path::new("/lib/x86_64-linux-gnu").join(name));
        let system =
            ["/etc/ld.so.cache", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/bin/sh"];
        let system = system.into_iter().chain(["/lib64/ld-linux-x86-64.so.2"]).map(PathBuf::from);
        let ours = [workspace::artifacts_dir(), workspace::target_dir().join("release")];
        for path in ours.into_iter().chain([program]).chain(libraries).chain(system) {
            // Any of these may be absent; the command will say so if it needed it.
            if path.exists() {
                add_files(&path, &mut found)?;
            }
        }
    }
    Ok(found.into_iter().map(|path| path.into_os_string().into_vec()).collect())
}

/// Adds a file, or the files directly in a directory.
fn add_files(path: &Path, found: &mut BTreeSet<PathBuf>) -> Result<()> {
    let path = std::path::absolute(path)?;
    if path.is_file() {
        return add_with_links(&path, found);
    }
    for item in fs::read_dir(&path).with_context(|| format!("list {}", path.display()))? {
        let item = item?.path();
        // Cargo's own notes are of no use to a measured command.
        let skip =
            item.extension().is_some_and(|extension| extension == "d" || extension == "rlib");
        if !skip && item.is_file() {
            add_with_links(&item, found)?;
        }
    }
    Ok(())
}

/// Adds a file and every symbolic link met on the way from the root to it.
fn add_with_links(path: &Path, found: &mut BTreeSet<PathBuf>) -> Result<()> {
    let mut rest: VecDeque<OsString> =
        path.components().map(|part| part.as_os_str().to_owned()).collect();
    let mut at = PathBuf::new();
    // The kernel follows at most 40 links.
    let mut links = 0;
    while let Some(part) = rest.pop_front() {
        if part == ".." {
            at.pop();
            continue;
        }
        let next = at.join(part);
        if next.is_symlink() {
            links += 1;
            ensure!(links <= 40, "{}: too many symbolic links", path.display());
            let target = fs::read_link(&next)
                .with_context(|| format!("read the link {}", next.display()))?;
            found.insert(next);
            // An absolute target replaces what we have, as `join` does.
            for part in target.components().rev().filter(|part| *part != Component::CurDir) {
                rest.push_front(part.as_os_str().to_owned());
            }
        } else {
            at = next;
        }
    }
    found.insert(at);
    Ok(())
}

// ---- the machine ----

/// What reaches the thread that waits for the end.
enum Event {
    Report(Report),
    /// So many bytes of stdout (0) or stderr (1) were passed on in all.
    Output(usize, u64),
    /// Our own output has no reader any more.
    BrokenPipe,
    /// QEMU closed the control port: it has ended.
    Gone,
}

/// A running QEMU; dropping it kills it.
struct Machine {
    qemu: Child,
    control: UnixStream,
    streams: Option<[UnixStream; 3]>,
    console: Arc<Mutex<VecDeque<u8>>>,
    started: Instant,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // There is nothing in it to save: output has arrived, and writes to the shares are not cached.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Machine {
    fn start(program: &Path, args: &Args, host: &host::Host, shares: &[PathBuf]) -> Result<Self> {
        let mut ours = Vec::new();
        let mut theirs: Vec<OwnedFd> = Vec::new();
        for _ in 0..5 {
            let (our_end, their_end) = UnixStream::pair().context("create a socket pair")?;
            ours.push(our_end);
            theirs.push(their_end.into());
        }
        let fds: Vec<RawFd> = theirs.iter().map(AsRawFd::as_raw_fd).collect();
        let mut qemu = Command::new(program);
        qemu.args(qemu_arguments(args, host, shares, &fds));
        qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let parent = rustix::process::getpid();
        // SAFETY: the closure runs between fork and exec and makes system calls only: no allocation, no locks.
        unsafe {
            qemu.pre_exec(move || {
                for fd in &theirs {
                    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
                }
                // QEMU ends with us, however we end. If we ended before this call, nothing would tell it.
                rustix::process::set_parent_process_death_signal(Some(
                    rustix::process::Signal::KILL,
                ))?;
                if rustix::process::getppid() != Some(parent) {
                    return Err(io::Error::from(ErrorKind::BrokenPipe));
                }
                Ok(())
            });
        }
        let started = Instant::now();
        let mut qemu_child = qemu.spawn().with_context(|| describe_start_failure(&qemu))?;
        // With it go our copies of the child's ends: a port then ends when QEMU does.
        drop(qemu);
        let [control, stdin, stdout, stderr, console_socket] = <[UnixStream; 5]>::try_from(ours)
            .map_err(|_| anyhow::anyhow!("five socket pairs were made"))?;
        let console = Arc::new(Mutex::new(VecDeque::new()));
        let mut complaints: Vec<Box<dyn Read + Send>> = vec![Box::new(console_socket)];
        if let Some(stderr) = qemu_child.stderr.take() {
            complaints.push(Box::new(stderr));
        }
        for source in complaints {
            let (console, verbose) = (console.clone(), args.verbose);
            thread::spawn(move || keep_tail(source, &console, verbose));
        }
        Ok(Self {
            qemu: qemu_child,
            control,
            streams: Some([stdin, stdout, stderr]),
            console,
            started,
        })
    }

    fn run(mut self, launch: &Launch, args: &Args) -> Result<u8> {
        let bytes = launch.encode();
        let len = u32::try_from(bytes.len()).ok().filter(|len| *len <= MAX_LAUNCH_LEN);
        let len = len.with_context(|| {
            format!("arguments and environment of {} bytes are too long", bytes.len())
        })?;
        // Waits in the socket until PID 1 opens the port.
        let sent = self
            .control
            .write_all(&len.to_le_bytes())
            .and_then(|()| self.control.write_all(&bytes));

        let (events, receiver) = mpsc::channel();
        let reader = self.control.try_clone().context("duplicate a socket")?;
        let reports = events.clone();
        thread::spawn(move || read_reports(reader, &reports));
        let [stdin, stdout, stderr] = self.streams.take().context("a machine runs once")?;
        let (out_events, err_events) = (events.clone(), events);
        thread::spawn(move || pass_output(0, stdout, io::stdout(), &out_events));
        thread::spawn(move || pass_output(1, stderr, io::stderr(), &err_events));
        let eof = self.control.try_clone().context("duplicate a socket")?;
        thread::spawn(move || send_input(stdin, eof));
        if sent.is_err() {
            bail!(self.failure("QEMU ended at once"));
        }

        let mut deadline = Instant::now() + BOOT_LIMIT;
        let mut heard = Instant::now();
        let mut progress = Progress::default();
        loop {
            let until = match args.silence {
                Some(silence) if progress.running && progress.exit.is_none() => {
                    heard.checked_add(silence).map_or(deadline, |silent| silent.min(deadline))
                }
                _ => deadline,
            };
            match receiver.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(Event::Report(Report::Started)) => {
                    if args.verbose {
                        eprintln!(
                            "nested: started after {:.1} s",
                            self.started.elapsed().as_secs_f64()
                        );
                    }
                    progress.running = true;
                    deadline = Instant::now()
                        .checked_add(args.timeout)
                        .context("--timeout is too long")?;
                    heard = Instant::now();
                }
                Ok(Event::Report(Report::Failed { code: 125, message })) => {
                    bail!(self.failure(&message))
                }
                Ok(Event::Report(Report::Failed { code, message })) => {
                    eprintln!("xtask: {message}");
                    return Ok(code);
                }
                Ok(Event::Report(Report::Exited { code, stdout, stderr })) => {
                    progress.exit = Some((code, [stdout, stderr]));
                    // All that is left is on its way.
                    deadline = Instant::now() + Duration::from_secs(30);
                }
                Ok(Event::Output(stream, total)) => {
                    progress.passed[stream] = total;
                    heard = Instant::now();
                }
                Ok(Event::BrokenPipe) => return Ok(BROKEN_PIPE),
                Ok(Event::Gone) | Err(RecvTimeoutError::Disconnected) => {
                    bail!(self.failure("the emulated machine ended by itself"))
                }
                Err(RecvTimeoutError::Timeout) if progress.exit.is_some() => {
                    bail!(self.failure("the last output of the command did not arrive within 30 s"))
                }
                Err(RecvTimeoutError::Timeout) if progress.running => {
                    match args.silence {
                        Some(silence) if Instant::now() < deadline => {
                            eprintln!(
                                "xtask: the command wrote nothing for {silence:?} and was ended (--silence)"
                            );
                        }
                        _ => eprintln!(
                            "xtask: the command was ended after {:?} (--timeout)",
                            args.timeout
                        ),
                    }
                    return Ok(TIMED_OUT);
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!(self.failure(&format!(
                        "the emulated machine did not start within {BOOT_LIMIT:?}"
                    )))
                }
            }
            if let Some(code) = progress.code() {
                return Ok(code);
            }
        }
    }

    /// An error message that ends with what the machine said last.
    fn failure(&self, what: &str) -> String {
        // What QEMU complained about may still be on its way to the thread that reads it.
        thread::sleep(Duration::from_millis(100));
        let console =
            self.console.lock().map(|mut tail| tail.make_contiguous().to_vec()).unwrap_or_default();
        let log = workspace::target_dir().join("nested-console.log");
        let kept = fs::write(&log, &console).is_ok();
        let place = if kept { format!(" (all of it: {})", log.display()) } else { String::new() };
        format!(
            "{what}; its console said last{place}:\n{}",
            crate::process::last_lines(&console, 20)
        )
    }
}

/// How far the command is.
#[derive(Debug, Default)]
struct Progress {
    running: bool,
    passed: [u64; 2],
    /// Exit code, and how much output there was in all.
    exit: Option<(u8, [u64; 2])>,
}

impl Progress {
    /// The exit code, once the command has ended and all its output was passed on.
    fn code(&self) -> Option<u8> {
        let (code, announced) = self.exit?;
        (self.passed[0] >= announced[0] && self.passed[1] >= announced[1]).then_some(code)
    }
}

fn qemu_arguments(
    args: &Args,
    host: &host::Host,
    shares: &[PathBuf],
    fds: &[RawFd],
) -> Vec<OsString> {
    let mut list: Vec<OsString> = Vec::new();
    let mut add = |words: &[&str]| list.extend(words.iter().map(OsString::from));
    for firmware in qemu::FIRMWARE {
        add(&["-L", firmware]);
    }
    add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35"]);
    add(&["-cpu", if args.icount { CPU_ICOUNT } else { CPU }]);
    add(&["-m", &args.memory.to_string()]);
    if args.icount {
        // shift=1: 2 ns per instruction; sleep=off: an idle CPU goes on to its next timer instead of waiting for it. The
        // seed makes RDRAND, and with it every random choice of the machine, the same each time.
        add(&[
            "-accel",
            "tcg,thread=single",
            "-icount",
            "shift=1,sleep=off",
            "-smp",
            "1",
            "-rtc",
            "clock=vm",
        ]);
        add(&["-seed", "1"]);
    } else {
        let threads = if args.cpus == 1 { "single" } else { "multi" };
        add(&["-accel", &format!("tcg,thread={threads}"), "-smp", &args.cpus.to_string()]);
    }
    add(&["-kernel", &host.kernel.to_string_lossy(), "-initrd", &host.initrd.to_string_lossy()]);
    add(&["-append", COMMAND_LINE]);
    for (name, fd) in ["control", "stdin", "stdout", "stderr", "console"].iter().zip(fds) {
        add(&["-chardev", &format!("socket,id={name},fd={fd}")]);
    }
    add(&["-serial", "chardev:console", "-device", "virtio-serial-pci,max_ports=8"]);
    for (name, port) in [CONTROL_PORT, STDIN_PORT, STDOUT_PORT, STDERR_PORT].iter().enumerate() {
        let chardev = ["control", "stdin", "stdout", "stderr"][name];
        add(&["-device", &format!("virtserialport,chardev={chardev},name={port},nr={}", name + 1)]);
    }
    let mut share = |tag: &str, path: &Path, mode: &str| {
        let mut fsdev = OsString::from(format!(
            "local,id={tag},security_model=none,multidevs=remap{mode},path="
        ));
        fsdev.push(path);
        list.extend(["-fsdev".into(), fsdev]);
        list.extend([
            "-device".into(),
            format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}").into(),
        ]);
    };
    share(ROOT_TAG, Path::new("/"), ",readonly=on");
    for (index, path) in shares.iter().enumerate() {
        share(&share_tag(index), path, "");
    }
    list
}

fn keep_tail(mut source: Box<dyn Read + Send>, tail: &Mutex<VecDeque<u8>>, verbose: bool) {
    let mut buffer = [0; 4096];
    while let Ok(len @ 1..) = source.read(&mut buffer) {
        if verbose {
            let _ = io::stderr().write_all(&buffer[..len]);
        }
        let Ok(mut tail) = tail.lock() else { return };
        tail.extend(&buffer[..len]);
        let excess = tail.len().saturating_sub(CONSOLE_LIMIT);
        tail.drain(..excess);
    }
}

fn read_reports(control: UnixStream, events: &Sender<Event>) {
    let lines = io::BufRead::lines(io::BufReader::new(control));
    for report in lines.map_while(Result::ok).filter_map(|line| line.parse().ok()) {
        if events.send(Event::Report(report)).is_err() {
            return;
        }
    }
    let _ = events.send(Event::Gone);
}

fn pass_output(stream: usize, mut from: UnixStream, mut to: impl Write, events: &Sender<Event>) {
    let mut buffer = vec![0; 64 << 10];
    let mut total = 0;
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..len]).and_then(|()| to.flush()).is_err() {
            let _ = events.send(Event::BrokenPipe);
            return;
        }
        total += len as u64;
        if events.send(Event::Output(stream, total)).is_err() {
            return;
        }
    }
}

fn send_input(mut port: UnixStream, mut control: UnixStream) {
    let mut buffer = vec![0; 64 << 10];
    let mut total = 0u64;
    let mut stdin = io::stdin().lock();
    loop {
        match stdin.read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // A stdin that cannot be read is one that has ended.
            Ok(0) | Err(_) => break,
            Ok(len) if port.write_all(&buffer[..len]).is_err() => return,
            Ok(len) => total += len as u64,
        }
    }
    let _ = control.write_all(format!("eof {total}\n").as_bytes());
    // The port itself stays open: a closed one would look to the guest like a host that has gone.
    std::mem::forget(port);
}

#[cfg(test)]
#[path = "nested_test.rs"]
mod tests;

//! `chitin-vmm`: one process per microVM, started by `chitin`.

#![no_main]

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use chitin_vmm::control::{Control, ControlError, Message};
use chitin_vmm::heap::Heap;
use chitin_vmm::jail::{self, Fate, JailError, Needs, Side};
use chitin_vmm::{
    Event, Monitor, MonitorBuilder, MonitorError, VmResources, VmSpec, one_line, probe,
};

const HELP: &str = "\
Runs one microVM. `chitin run` starts this program; it is rarely started by hand.

Usage: chitin-vmm              take a specification and a channel from standard input (a control socket)
       chitin-vmm SPEC.json    run without a channel; events are lines of JSON on standard output
       chitin-vmm --probe      say whether this host can run microVMs, as JSON
       chitin-vmm --jail       say what of the jail this host can do, as JSON

Options:
  -h, --help       print this
  -V, --version    print the version

Examples:
  echo '{\"kernel\": \"vmlinux\", \"root_image\": \"root.img\", \"memory_mib\": 128, \"console\": true}' >spec.json
  chitin-vmm spec.json
  chitin-vmm --probe
";

#[global_allocator]
static HEAP: Heap = Heap::new();

const SUCCESS: c_int = 0;
/// Something was wrong with the microVM or the host.
const FAILED: c_int = 1;
/// Something was wrong with the command line.
const USAGE: c_int = 2;

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error("read specification {path}")]
    ReadSpec { path: String, source: std::io::Error },
    #[error("specification {path}")]
    ParseSpec { path: String, source: serde_json::Error },
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error("{0}")]
    Killed(String),
    #[error("{operation}")]
    Host { operation: &'static str, source: std::io::Error },
}

/// The entry point, called by the C library. Without the one of Rust's standard library, which prepares for what this
/// program does not do (messages about stack overflows, on every thread), and takes 2 % of the time it takes to restore a guest.
///
/// # Safety
/// `argv` has `argc` strings, as C has it.
#[unsafe(no_mangle)]
unsafe extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    // SAFETY: a number, and what to do about it. Writing to a channel whose other end is gone is an error, not the end.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    // Nothing of ours is open yet: what is there was left to us by mistake.
    // SAFETY: numbers only; nobody here has an owner of these.
    unsafe { libc::close_range(3, c_uint::MAX, 0) };
    let count = usize::try_from(argc).unwrap_or(0);
    let args: Vec<_> = (1..count)
        .map(|at| {
            // SAFETY: the caller's promise.
            let arg = unsafe { CStr::from_ptr(*argv.add(at)) };
            arg.to_string_lossy()
        })
        .collect();
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    let code = match args.as_slice() {
        [] => controlled(),
        ["-h" | "--help"] => print(HELP),
        ["-V" | "--version"] => print(concat!("chitin-vmm ", env!("CARGO_PKG_VERSION"), "\n")),
        ["--probe"] => {
            let verdict = probe::run();
            let json = serde_json::to_string(&verdict).unwrap_or_default();
            print(&format!("{json}\n"));
            if verdict.usable { SUCCESS } else { FAILED }
        }
        ["--jail"] => surveyed(),
        [option, ..] if option.starts_with('-') => usage(&format!("unknown option `{option}`")),
        [path] => standalone(path),
        _ => usage("more than one specification"),
    };
    let _ = std::io::stdout().flush();
    code
}

fn print(text: &str) -> c_int {
    // A reader that is gone has seen enough.
    let _ = std::io::stdout().write_all(text.as_bytes());
    SUCCESS
}

fn usage(problem: &str) -> c_int {
    eprintln!("chitin-vmm: {problem}: see `chitin-vmm --help`");
    USAGE
}

/// Says what a jail on this host is like.
fn surveyed() -> c_int {
    match signals() {
        Ok(signals) => {
            let survey = jail::survey(&signals);
            print(&format!("{}\n", serde_json::to_string(&survey).unwrap_or_default()));
            if survey.usable { SUCCESS } else { FAILED }
        }
        Err(error) => usage(&one_line(&error)),
    }
}

/// Runs what the host asks for over the control socket.
fn controlled() -> c_int {
    let control = match Control::from_stdin() {
        Ok(control) => Rc::new(control),
        Err(error) => return usage(&error.to_string()),
    };
    let emit = {
        let control = Rc::clone(&control);
        move |event| {
            // A host that is gone is noticed by the socket's closing.
            let _ = control.send(&event);
        }
    };
    let received = control.receive().map_err(Error::from);
    let result = received.and_then(|(spec, channel, files)| {
        let resources = VmResources::open(&spec, files)?;
        let builder = Monitor::builder().channel(channel).control(Rc::clone(&control));
        run(spec, resources, builder, Some(&control), emit.clone())
    });
    report(result, emit)
}

/// Runs a specification from a file, without a channel.
fn standalone(path: &str) -> c_int {
    let emit = |event: Message| {
        if let Message::Event(Event::Failed { error }) = &event {
            eprintln!("chitin-vmm: {error}");
        }
        let json = serde_json::to_string(&event).unwrap_or_default();
        print(&format!("{json}\n"));
    };
    let result = read_spec(Path::new(path)).and_then(|spec| {
        let resources = VmResources::open(&spec, None)?;
        run(spec, resources, Monitor::builder(), None, emit)
    });
    report(result, emit)
}

fn read_spec(path: &Path) -> Result<VmSpec, Error> {
    let name = path.display().to_string();
    let json =
        std::fs::read(path).map_err(|source| Error::ReadSpec { path: name.clone(), source })?;
    serde_json::from_slice(&json).map_err(|source| Error::ParseSpec { path: name, source })
}

/// What has become of this process.
enum Done {
    /// It was the monitor, and says this last.
    Monitor(Message),
    /// It was the keeper, and the monitor has said everything.
    Keeper(c_int),
}

fn run(
    spec: VmSpec,
    mut resources: VmResources,
    builder: MonitorBuilder,
    control: Option<&Control>,
    mut emit: impl FnMut(Message) + 'static,
) -> Result<Done, Error> {
    let inmate = match spec.jail.then(|| jail::divide(&spec)).transpose()? {
        None => None,
        Some(Side::Inmate(inmate)) => Some(inmate),
        Some(Side::Keeper(keeper)) => {
            // What it does not have nobody can get from it.
            drop((resources, builder));
            return match keeper.watch(&signals()?, control.map(AsRawFd::as_raw_fd)) {
                Fate::Exited(code) => Ok(Done::Keeper(code)),
                Fate::Unwanted => Ok(Done::Keeper(SUCCESS)),
                Fate::Killed(words) => Err(Error::Killed(words)),
            };
        }
    };
    resources.open_pagemap().map_err(Error::from)?;
    let jail =
        inmate.map(|inmate| inmate.close(Needs::of(&spec, control.is_some()))).transpose()?;
    if jail.is_none() {
        // What is left without one.
        jail::forbid_dumps().map_err(host("become undumpable"))?;
    }
    let monitor = builder
        .spec(spec)
        .resources(resources)
        .filters(jail.is_some())
        .stop_on(signals()?)
        .on_event(move |mut event| {
            if let Message::Event(Event::Entered { jail: told, .. }) = &mut event {
                told.clone_from(&jail);
            }
            emit(event);
        })
        .build()?;
    Ok(Done::Monitor(monitor.run()?.into_event()))
}

fn report(result: Result<Done, Error>, mut emit: impl FnMut(Message)) -> c_int {
    match result {
        Ok(Done::Keeper(code)) => code,
        Ok(Done::Monitor(last)) => {
            emit(last);
            SUCCESS
        }
        Err(error) => {
            emit(Event::Failed { error: one_line(&error) }.into());
            FAILED
        }
    }
}

/// A descriptor that becomes readable when this process is asked to end. From here on the signals do nothing else, in this
/// thread and those it starts.
fn signals() -> Result<OwnedFd, Error> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `set` is initialized by the first call; the others only read and change it.
    let fd = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
        libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(host("create a signalfd")(std::io::Error::last_os_error()));
    }
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn host(operation: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Host { operation, source }
}

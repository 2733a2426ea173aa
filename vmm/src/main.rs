//! `chitin-vmm`: one process per microVM, started by `chitin`.
//!
//! ```text
//!  arguments ─▶ specification and files ─▶ fork ─┬─ supervisor ─▶ waits ─▶ exit code of the child
//!                                                ├─ child ─▶ enters the jail ─▶ monitor
//!                                                └─ (no jail) ────────────────▶ monitor
//!  monitor ─▶ event `entered` … ─▶ last event: `ended`, `failed` or the result of a template
//! ```

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

use chitin_text::error_chain;
use chitin_vmm::control::{ControlError, ControlSocket, ReceivedSpec};
use chitin_vmm::jail::{
    self, ChildAccess, ChildExit, ForkResult, Jail, JailError, KilledChild, Supervisor,
};
use chitin_vmm::signals::TerminationSignals;
use chitin_vmm::{
    Event, FailureCode, HostError, Monitor, MonitorBuilder, MonitorError, VmResources, VmSpec,
    probe,
};
use serde::Serialize;

const HELP: &str = "\
Runs one microVM. `chitin run` starts this program; it is rarely started by hand.

Usage: chitin-vmm              receive a specification and a channel from a control socket, which is
                               standard input
       chitin-vmm SPEC.json    run without a channel; print events as lines of JSON
       chitin-vmm --probe      report as JSON whether this host can run microVMs
       chitin-vmm --jail       report as JSON which parts of a jail this host supports

Options:
  -h, --help       print this help
  -V, --version    print the version

Examples:
  echo '{\"kernel\": \"vmlinux\", \"root_image\": \"root.img\", \"memory_mib\": 128,
         \"console\": true}' >spec.json
  chitin-vmm spec.json
  chitin-vmm --probe
";

/// The exit code for an invalid command line. A failure of the host or the microVM is 1.
const USAGE: u8 = 2;

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error("read specification {path}")]
    ReadSpec { path: String, source: io::Error },
    #[error("parse specification {path}")]
    ParseSpec { path: String, source: serde_json::Error },
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error(transparent)]
    Killed(#[from] KilledChild),
}

impl Error {
    /// Classifies the error for programs.
    fn code(&self) -> FailureCode {
        match self {
            Self::Control(error) => error.code(),
            Self::Monitor(error) => error.code(),
            Self::ReadSpec { .. } | Self::ParseSpec { .. } => FailureCode::Spec,
            Self::Jail(_) => FailureCode::Jail,
            Self::Killed(_) => FailureCode::Killed,
        }
    }
}

fn main() -> ExitCode {
    close_inherited_files();
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let args: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
    let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
    match args.as_slice() {
        [] => run_controlled(),
        ["-h" | "--help"] => print_text(HELP),
        ["-V" | "--version"] => print_text(concat!("chitin-vmm ", env!("CARGO_PKG_VERSION"), "\n")),
        ["--probe"] => {
            let support = probe::probe_kvm();
            print_json(&support);
            exit_code(support.usable)
        }
        ["--jail"] => report_jail_support(),
        [option, ..] if option.starts_with('-') => {
            fail_usage(&format!("unknown option `{option}`"))
        }
        [path] => run_standalone(Path::new(path)),
        _ => fail_usage("more than one specification"),
    }
}

/// Closes descriptors that the parent process left open by mistake.
fn close_inherited_files() {
    // SAFETY: this process has opened nothing yet, so no value owns a descriptor other than those
    // of the standard streams, which stay open.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
}

fn exit_code(succeeded: bool) -> ExitCode {
    if succeeded { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Prints to standard output. A reader that has closed it needs no more.
fn print_text(text: &str) -> ExitCode {
    let mut stdout = io::stdout();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    ExitCode::SUCCESS
}

/// Prints a line of JSON.
fn print_json(value: &impl Serialize) {
    print_text(&format!("{}\n", serde_json::to_string(value).unwrap_or_default()));
}

fn fail_usage(problem: &str) -> ExitCode {
    eprintln!("chitin-vmm: {problem}: see `chitin-vmm --help`");
    ExitCode::from(USAGE)
}

fn report_jail_support() -> ExitCode {
    match block_signals() {
        Ok(signals) => {
            let support = jail::probe_jail(&signals);
            print_json(&support);
            exit_code(support.usable)
        }
        Err(error) => fail_usage(&error_chain(&error)),
    }
}

/// Runs the microVM that the host requests over the control socket.
fn run_controlled() -> ExitCode {
    let control = match ControlSocket::from_stdin() {
        Ok(control) => Rc::new(control),
        Err(error) => return fail_usage(&error_chain(&error)),
    };
    let emit = {
        let control = Rc::clone(&control);
        move |event| {
            // The event loop notices a host that has closed the socket.
            let _ = control.send(&event);
        }
    };
    let received = control.receive_spec().map_err(Error::from);
    let result = received.and_then(|ReceivedSpec { spec, channel, template }| {
        let resources = VmResources::open(&spec, template)?;
        let builder = Monitor::builder().channel(channel).control(Rc::clone(&control));
        run_process(spec, resources, builder, Some(&control), emit.clone())
    });
    report_outcome(result, emit)
}

/// Runs the microVM of a specification in a file, without a channel.
fn run_standalone(path: &Path) -> ExitCode {
    let emit = |event: Event| {
        if let Event::Failed { error, .. } = &event {
            eprintln!("chitin-vmm: {error}");
        }
        print_json(&event);
    };
    let result = read_spec(path).and_then(|spec| {
        let resources = VmResources::open(&spec, None)?;
        run_process(spec, resources, Monitor::builder(), None, emit)
    });
    report_outcome(result, emit)
}

fn read_spec(path: &Path) -> Result<VmSpec, Error> {
    let name = path.display().to_string();
    let json =
        std::fs::read(path).map_err(|source| Error::ReadSpec { path: name.clone(), source })?;
    serde_json::from_slice(&json).map_err(|source| Error::ParseSpec { path: name, source })
}

/// The role that this process had, with its result.
enum Outcome {
    /// The monitor, which still has to report this event.
    Monitor(Event),
    /// The supervisor; the monitor has reported every event.
    Supervisor(ExitCode),
}

/// Runs the microVM in a jail if the specification asks for one. With a jail, this process becomes
/// the supervisor, and a child the monitor.
fn run_process(
    spec: VmSpec,
    mut resources: VmResources,
    builder: MonitorBuilder,
    control: Option<&ControlSocket>,
    emit: impl FnMut(Event) + 'static,
) -> Result<Outcome, Error> {
    if !spec.jail {
        resources.open_pagemap()?;
        jail::forbid_dumps()
            .map_err(HostError::during("forbid core dumps"))
            .map_err(MonitorError::from)?;
        return run_monitor(spec, resources, builder, None, emit);
    }
    match jail::fork_into_namespaces(&spec)? {
        ForkResult::Supervisor(supervisor) => {
            // The supervisor needs none of the files, so that no process can get them from it.
            drop((resources, builder));
            supervise_child(supervisor, control)
        }
        ForkResult::Child(child) => {
            resources.open_pagemap()?;
            let jail = child.enter_jail(ChildAccess::for_spec(&spec, control.is_some()))?;
            run_monitor(spec, resources, builder, Some(jail), emit)
        }
    }
}

fn supervise_child(
    supervisor: Supervisor,
    control: Option<&ControlSocket>,
) -> Result<Outcome, Error> {
    match supervisor.wait_for_child(&block_signals()?, control.map(AsFd::as_fd)) {
        ChildExit::Exited(code) => {
            Ok(Outcome::Supervisor(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))))
        }
        ChildExit::ControlClosed => Ok(Outcome::Supervisor(ExitCode::SUCCESS)),
        ChildExit::Killed(killed) => Err(killed.into()),
    }
}

/// Runs the microVM to its end, in this process. Its threads are filtered if it is in a jail.
fn run_monitor(
    spec: VmSpec,
    resources: VmResources,
    builder: MonitorBuilder,
    jail: Option<Jail>,
    mut emit: impl FnMut(Event) + 'static,
) -> Result<Outcome, Error> {
    let monitor = builder
        .spec(spec)
        .resources(resources)
        .filters(jail.is_some())
        .stop_on(block_signals()?.into())
        .on_event(move |mut event| {
            if let Event::Entered { jail: reported, .. } = &mut event {
                reported.clone_from(&jail);
            }
            emit(event);
        })
        .build()?;
    Ok(Outcome::Monitor(monitor.run()?.into_event()))
}

/// Reports the last event, and returns the exit code.
fn report_outcome(result: Result<Outcome, Error>, mut emit: impl FnMut(Event)) -> ExitCode {
    match result {
        Ok(Outcome::Supervisor(code)) => code,
        Ok(Outcome::Monitor(last)) => {
            emit(last);
            ExitCode::SUCCESS
        }
        Err(error) => {
            emit(Event::Failed { code: error.code(), error: error_chain(&error) });
            ExitCode::FAILURE
        }
    }
}

fn block_signals() -> Result<TerminationSignals, MonitorError> {
    Ok(TerminationSignals::block().map_err(HostError::during("create a signalfd"))?)
}

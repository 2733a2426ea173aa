//! A template from its snapshot to a recorded copy, by jailed monitors with filters.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsFd;

use chitin_vmm::control::EndReason;
use chitin_vmm::{Event, FailureCode, Request, VmSpec};

use crate::is_root;
use crate::isolation::mapped_files;
use crate::monitor::{Monitor, SLEEP};

const BINDING: &str = "memory:1 image:2";

/// The files of a template.
struct Template {
    memory: tempfile::NamedTempFile,
    state: tempfile::NamedTempFile,
}

impl Template {
    /// Snapshots a sleeping guest.
    fn build() -> Template {
        let new_file = || tempfile::NamedTempFile::new().unwrap();
        let template = Template { memory: new_file(), state: new_file() };
        let mut monitor = Monitor::start_with(
            |spec| {
                spec.template = true;
                spec.vcpus = 2;
            },
            |_| {},
        );
        let snapshot = Request::Snapshot { binding: BINDING.into() };
        let files = [template.memory.as_file().as_fd(), template.state.as_file().as_fd()];
        monitor.send_request(&snapshot, &[files[0], files[1], key().as_fd()]);
        let event = monitor.receive_event();
        let Event::Saved { memory_bytes, state_bytes } = event else { panic!("{event:?}") };
        // Kernel, boot parameters and tables, but not the memory that the guest has not touched.
        assert!((4096..1 << 20).contains(&memory_bytes), "{memory_bytes}");
        assert_eq!(template.state.as_file().metadata().unwrap().len(), state_bytes);
        assert!(monitor.supervisor.wait().unwrap().success());
        template
    }

    /// Restores the template in a prepared monitor. Returns `None` if this KVM cannot restore: one
    /// that emulates may list registers and refuse to set them.
    fn restore(&self, change: impl FnOnce(&mut VmSpec)) -> Option<Monitor> {
        let change = |spec: &mut VmSpec| {
            spec.restore = true;
            spec.prepared = true;
            spec.vcpus = 2;
            spec.binding = BINDING.into();
            change(spec);
        };
        let memory = File::open(self.memory.path()).unwrap();
        let state = File::open(self.state.path()).unwrap();
        let key = key();
        let files = [memory.as_fd(), state.as_fd(), key.as_fd()];
        let mut monitor = Monitor::launch_with_files(&SLEEP, change, |_| {}, &files);
        match monitor.receive_event() {
            Event::Prepared => Some(monitor),
            Event::Failed { code: FailureCode::Kvm, error } => {
                eprintln!("not restored: {error}");
                None
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A file with the key of the template, to be read once.
fn key() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[7; 32]).unwrap();
    file.rewind().unwrap();
    file
}

/// Expects that the monitor refuses a request as untimely, under its own name.
fn expect_refused(monitor: &mut Monitor, request: &str) {
    match monitor.receive_event() {
        Event::Failed { code: FailureCode::Control, error } => {
            assert!(error.contains(&format!("`{request}`")), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

/// Returns the last event of a restored guest, whose entry may be reported before.
fn receive_end(monitor: &mut Monitor) -> Event {
    match monitor.receive_event() {
        Event::Entered { .. } => monitor.receive_event(),
        end => end,
    }
}

/// Lets a restored guest run, and stops it.
fn run_and_stop(mut monitor: Monitor) {
    monitor.send_go();
    monitor.terminate();
    let end = receive_end(&mut monitor);
    assert!(matches!(end, Event::Ended { reason: EndReason::Stopped, .. }), "{end:?}");
    assert!(monitor.supervisor.wait().unwrap().success());
}

#[test]
fn snapshot_is_restored_by_a_prepared_monitor() {
    if let Some(monitor) = Template::build().restore(|_| {}) {
        run_and_stop(monitor);
    }
}

#[test]
fn recorded_template_can_be_restored() {
    let mut template = Template::build();
    let Some(mut monitor) = template.restore(|spec| spec.record = true) else { return };
    monitor.send_go();
    let state = tempfile::NamedTempFile::new().unwrap();
    monitor.send_request(&Request::Record {}, &[state.as_file().as_fd(), key().as_fd()]);
    let end = receive_end(&mut monitor);
    assert!(matches!(end, Event::Recorded { .. }), "{end:?}");
    template.state = state;
    run_and_stop(template.restore(|_| {}).unwrap());
}

#[test]
fn private_copy_maps_no_file_of_the_template() {
    let template = Template::build();
    let name = template.memory.path().file_name().unwrap().to_str().unwrap().to_owned();
    let is_mapped = |private| {
        let monitor = template.restore(|spec| spec.private_memory = private)?;
        let mapped = mapped_files(&monitor).iter().any(|path| path.contains(&name));
        run_and_stop(monitor);
        Some(mapped)
    };
    if is_root() && is_mapped(false).is_some_and(|mapped| mapped) {
        assert_eq!(is_mapped(true), Some(false));
    }
}

#[test]
fn untimely_request_is_refused_under_its_name() {
    let mut monitor = Monitor::start();
    monitor.send_request(&Request::Record {}, &[key().as_fd(), key().as_fd()]);
    expect_refused(&mut monitor, "record");
    if let Some(mut monitor) = Template::build().restore(|_| {}) {
        monitor.send_request(&Request::Record {}, &[key().as_fd(), key().as_fd()]);
        expect_refused(&mut monitor, "record");
    }
}

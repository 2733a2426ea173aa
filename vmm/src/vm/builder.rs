//! The builder of a monitor.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use super::error::MonitorError;
use super::event_loop::HostInterface;
use super::resources::{GuestSource, RecordingFiles, VmResources};
use super::stopper::Stopper;
use super::{Monitor, boot, restore};
use crate::control::{ControlSocket, Event, TemplateFiles};
use crate::spec::VmSpec;

/// Collects the parts of a microVM. [`Monitor::builder`] makes one.
#[derive(Default)]
pub struct MonitorBuilder {
    spec: Option<VmSpec>,
    channel: Option<UnixStream>,
    template: Option<TemplateFiles>,
    resources: Option<VmResources>,
    filters: bool,
    control: Option<Rc<ControlSocket>>,
    stop_on: Vec<OwnedFd>,
    on_event: Option<Box<dyn FnMut(Event)>>,
}

impl MonitorBuilder {
    /// Sets the specification. Without one, [`build`](Self::build) finds no kernel.
    pub fn spec(mut self, spec: VmSpec) -> Self {
        self.spec = Some(spec);
        self
    }

    /// Sets the host's byte stream, to be joined to the guest's one vsock connection. Without one,
    /// every connection is refused. When its other end is closed, the guest is stopped.
    pub fn channel(mut self, channel: impl Into<Option<UnixStream>>) -> Self {
        self.channel = channel.into();
        self
    }

    /// Sets the files of a saved guest, for a specification that restores one.
    pub fn template(mut self, files: impl Into<Option<TemplateFiles>>) -> Self {
        self.template = files.into();
        self
    }

    /// Sets the open files of the microVM. Without them, [`build`](Self::build) opens what the
    /// specification names.
    pub fn resources(mut self, resources: VmResources) -> Self {
        self.resources = Some(resources);
        self
    }

    /// Filters the system calls of all vCPU threads and, permanently, of the thread that calls
    /// [`Monitor::run`]: for a program that has nothing else to do, and has called
    /// [`seccomp::prepare_process`](crate::seccomp::prepare_process).
    pub fn filters(mut self, filters: bool) -> Self {
        self.filters = filters;
        self
    }

    /// Sets the socket of the host's requests. When the host closes its end, the guest is stopped.
    pub fn control(mut self, control: Rc<ControlSocket>) -> Self {
        self.control = Some(control);
        self
    }

    /// Stops the guest when this descriptor becomes readable, or its other end is closed. May be
    /// called several times.
    pub fn stop_on(mut self, fd: OwnedFd) -> Self {
        self.stop_on.push(fd);
        self
    }

    /// Calls `f` with the events of the guest but the last, which [`Monitor::run`] returns.
    pub fn on_event(mut self, f: impl FnMut(Event) + 'static) -> Self {
        self.on_event = Some(Box::new(f));
        self
    }

    /// Makes the microVM: everything up to its first instruction.
    ///
    /// # Errors
    /// The first resource that is missing or unusable, with its remedy.
    pub fn build(self) -> Result<Monitor, MonitorError> {
        let spec = self.spec.unwrap_or_else(|| VmSpec::new("", ""));
        let mut resources = match self.resources {
            Some(resources) => resources,
            None => VmResources::open(&spec, self.template)?,
        };
        resources.open_pagemap()?;

        let VmResources { source, image, recording, kvm } = resources;
        let (microvm, restored) = match source {
            GuestSource::Kernel(kernel) => (boot::boot(spec, &kernel, image, kvm)?, None),
            GuestSource::Template(files) => {
                let recorder = match recording {
                    RecordingFiles::Ready(recorder) => Some(recorder),
                    _ => None,
                };
                let (microvm, restored) = restore::restore(spec, files, image, recorder, kvm)?;
                (microvm, Some(restored))
            }
        };
        if let Some(channel) = self.channel {
            microvm.attach_channel(channel)?;
        }
        let host = HostInterface {
            control: self.control,
            stop_on: self.stop_on,
            stopper: Stopper::new()?,
            on_event: self.on_event.unwrap_or_else(|| Box::new(|_| {})),
        };
        Ok(Monitor { microvm, restored, host, filters: self.filters })
    }
}

#[cfg(test)]
#[path = "builder_test.rs"]
mod tests;

//! The open files of a microVM.

use std::fs::File;
use std::path::Path;

use kvm_ioctls::Kvm;

use super::error::MonitorError;
use crate::control::TemplateFiles;
use crate::kvm::{self, KvmError};
use crate::memory::recorder::{Recorder, ReopenedFiles};
use crate::spec::{SpecError, VmSpec};

/// The open files of a microVM: a process that has them needs no path any more.
pub struct VmResources {
    pub(super) source: GuestSource,
    pub(super) image: File,
    pub(super) recording: RecordingFiles,
    /// An error is kept until the files have been checked: theirs is reported first.
    pub(super) kvm: Result<Kvm, KvmError>,
}

/// The source of a guest.
pub(super) enum GuestSource {
    /// A kernel to boot.
    Kernel(File),
    /// A guest to restore.
    Template(TemplateFiles),
}

/// The files of a recording, which are opened in two steps.
pub(super) enum RecordingFiles {
    /// The specification requests no recording.
    None,
    /// The files of the guest were opened a second time.
    Reopened(ReopenedFiles),
    /// The page map of this process is open as well.
    Ready(Recorder),
}

impl VmResources {
    /// Opens the files that the specification names, and `/dev/kvm`.
    ///
    /// # Errors
    /// The specification is invalid, or the first file that cannot be opened.
    pub fn open(spec: &VmSpec, template: Option<TemplateFiles>) -> Result<Self, MonitorError> {
        spec.validate()?;
        let source = match template {
            None if !spec.restore => GuestSource::Kernel(open_kernel(&spec.kernel)?),
            Some(files) if spec.restore => GuestSource::Template(files),
            _ => return Err(SpecError::TemplateFiles.into()),
        };
        let image = open_image(&spec.root_image)?;
        let recording = match &source {
            GuestSource::Template(files) if spec.record => {
                RecordingFiles::Reopened(ReopenedFiles::open(&files.memory, &image)?)
            }
            _ => RecordingFiles::None,
        };
        Ok(Self { source, image, recording, kvm: kvm::open_kvm() })
    }

    /// Opens the page map of this process, if the guest is to be recorded. Call it in the process
    /// that runs the guest, before that is made undumpable and while it has a `/proc`; once is
    /// enough.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn open_pagemap(&mut self) -> Result<(), MonitorError> {
        self.recording = match std::mem::replace(&mut self.recording, RecordingFiles::None) {
            RecordingFiles::Reopened(files) => RecordingFiles::Ready(Recorder::new(files)?),
            other => other,
        };
        Ok(())
    }
}

fn open_kernel(path: &Path) -> Result<File, MonitorError> {
    File::open(path).map_err(|source| MonitorError::OpenKernel { path: path.to_owned(), source })
}

fn open_image(path: &Path) -> Result<File, MonitorError> {
    File::open(path).map_err(|source| MonitorError::OpenImage { path: path.to_owned(), source })
}

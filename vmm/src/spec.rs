//! The specification of a microVM: one type, from which JSON, command line and documentation
//! derive.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::memory::FileSharing;

/// The most vCPUs of one microVM. Agent workloads are a script and its helpers; each vCPU is one
/// more host thread that a hostile guest can keep busy.
pub const MAX_VCPUS: u8 = 8;

/// The least guest memory, in MiB: below it the kernel and a Python interpreter do not fit
/// together.
pub const MIN_MEMORY_MIB: u32 = 64;

/// The most guest memory, in MiB. Guest memory is reserved, not committed; the bound keeps page
/// tables and the address space of the host process small.
pub const MAX_MEMORY_MIB: u32 = 16 * 1024;

/// The most bytes of JSON accepted as a specification. Two paths of `PATH_MAX` (4 KiB, each byte at
/// most six in JSON) and three numbers fit.
pub const MAX_SPEC_BYTES: usize = 64 * 1024;

/// The most bytes of [`VmSpec::binding`]: a few digests. Every byte is authenticated at each
/// restore.
pub const MAX_BINDING_BYTES: u16 = 256;

/// The specification of one microVM.
///
/// Unknown fields are refused, so that a misspelled limit is never silently ignored.
///
/// ```
/// use chitin_vmm::VmSpec;
///
/// let json = r#"{"kernel": "vmlinux", "root_image": "root.img"}"#;
/// let spec: VmSpec = serde_json::from_str(json).unwrap();
/// assert_eq!((spec.vcpus, spec.memory_mib, spec.console), (1, 256, false));
/// spec.validate().unwrap();
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// The guest kernel: an uncompressed x86-64 ELF `vmlinux`. Not needed, and not opened, to
    /// restore.
    #[serde(default)]
    pub kernel: PathBuf,
    /// The root file system: an uncompressed EROFS image, mapped read-only; its length is a
    /// multiple of 2 MiB.
    pub root_image: PathBuf,
    /// The number of vCPUs, 1 to [`MAX_VCPUS`].
    #[serde(default = "default_vcpus")]
    pub vcpus: u8,
    /// Guest memory in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    #[serde(default = "default_memory_mib")]
    pub memory_mib: u32,
    /// If set, the guest has a serial console, written to the monitor's standard error. Off by
    /// default, because it is one more device for a guest to attack, and a slow one.
    #[serde(default)]
    pub console: bool,
    /// If set, the guest is to become a template: after it has closed its connection it may request
    /// a second one, which is left unanswered, and then be saved.
    #[serde(default)]
    pub template: bool,
    /// If set, a saved guest is restored instead of booting a kernel.
    #[serde(default)]
    pub restore: bool,
    /// The identity of the files that a saved guest belongs to; at most [`MAX_BINDING_BYTES`]. A
    /// guest is restored only if it equals the binding that the guest was saved with.
    #[serde(default)]
    pub binding: String,
    /// If set, the monitor makes everything ready and then waits for the channel, which comes
    /// later.
    #[serde(default)]
    pub prepared: bool,
    /// If set, the pages that a restored guest uses are recorded, so that they can be prepared for
    /// it next time. Slow.
    #[serde(default)]
    pub record: bool,
    /// If set, the guest shares no page with another process: kernel, root image and the memory of
    /// a template are copied instead of mapped. Costs their size in memory, and the time to copy
    /// them.
    #[serde(default)]
    pub private_memory: bool,
    /// If set, the program `chitin-vmm` closes a [jail](crate::jail) around itself before it enters
    /// the guest. A [`Monitor`](crate::Monitor) in another program does not: that is up to that
    /// program.
    #[serde(default = "default_jail")]
    pub jail: bool,
}

fn default_vcpus() -> u8 {
    1
}

fn default_memory_mib() -> u32 {
    256
}

fn default_jail() -> bool {
    true
}

/// The specification is invalid.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[expect(missing_docs, reason = "the message of a variant explains its fields")]
pub enum SpecError {
    /// The number of vCPUs is out of range.
    #[error("{vcpus} vCPUs: a microVM has 1 to {MAX_VCPUS}")]
    Vcpus { vcpus: u8 },
    /// The memory size is out of range.
    #[error("{memory_mib} MiB of memory: a microVM has {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB")]
    Memory { memory_mib: u32 },
    /// A path is empty.
    #[error("`{field}` is empty: give the path of a file")]
    EmptyPath { field: &'static str },
    /// The binding is too long.
    #[error("`binding` has {bytes} bytes: the limit is {MAX_BINDING_BYTES}")]
    Binding { bytes: usize },
    /// A template has a console. The state of a serial port is not saved, because no template has a
    /// use for it.
    #[error("`console` cannot be used with `template` or `restore`: a template has no console")]
    ConsoleInTemplate,
    /// A guest that boots is to be recorded.
    #[error("`record` needs `restore`: only a restored guest is recorded")]
    RecordWithoutRestore,
    /// A guest with private memory is to be recorded. Only pages of files can be told apart.
    #[error("`record` cannot be used with `private_memory`: only mapped pages are recorded")]
    RecordPrivate,
    /// A guest that boots has a binding.
    #[error("`binding` needs `restore`: a guest gets its binding when it is saved")]
    BindingWithoutRestore,
    /// Template files were given without `restore`, or the other way round.
    #[error("the files of a template and `restore` need each other")]
    TemplateFiles,
}

impl VmSpec {
    /// Returns a specification with one vCPU, 256 MiB of memory, a jail and no console.
    pub fn new(kernel: impl Into<PathBuf>, root_image: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            root_image: root_image.into(),
            vcpus: default_vcpus(),
            memory_mib: default_memory_mib(),
            console: false,
            template: false,
            restore: false,
            binding: String::new(),
            prepared: false,
            record: false,
            private_memory: false,
            jail: default_jail(),
        }
    }

    /// Checks everything that needs no file to be opened.
    ///
    /// # Errors
    /// The first field that is invalid.
    pub fn validate(&self) -> Result<(), SpecError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(SpecError::Vcpus { vcpus: self.vcpus });
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&self.memory_mib) {
            return Err(SpecError::Memory { memory_mib: self.memory_mib });
        }
        if !self.restore && self.kernel.as_os_str().is_empty() {
            return Err(SpecError::EmptyPath { field: "kernel" });
        }
        if self.root_image.as_os_str().is_empty() {
            return Err(SpecError::EmptyPath { field: "root_image" });
        }
        let bytes = self.binding.len();
        if bytes > usize::from(MAX_BINDING_BYTES) {
            return Err(SpecError::Binding { bytes });
        }
        if self.console && (self.template || self.restore) {
            return Err(SpecError::ConsoleInTemplate);
        }
        if self.record && !self.restore {
            return Err(SpecError::RecordWithoutRestore);
        }
        if self.record && self.private_memory {
            return Err(SpecError::RecordPrivate);
        }
        if bytes > 0 && !self.restore {
            return Err(SpecError::BindingWithoutRestore);
        }
        Ok(())
    }

    /// Returns whether the guest shares the pages of files.
    pub fn file_sharing(&self) -> FileSharing {
        if self.private_memory { FileSharing::Private } else { FileSharing::Shared }
    }

    /// Returns the guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }
}

#[cfg(test)]
#[path = "spec_test.rs"]
mod tests;

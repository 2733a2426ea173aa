//! What a caller asks of a monitor: one type, from which JSON, command line and documentation derive.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The largest number of vCPUs of one microVM. Agent workloads are a script and its helpers; each vCPU is one more host
/// thread that a hostile guest can keep busy.
pub const MAX_VCPUS: u8 = 8;

/// The least guest memory, in MiB: below it the kernel and a Python interpreter do not fit together.
pub const MIN_MEMORY_MIB: u32 = 64;

/// The most guest memory, in MiB. Guest memory is reserved, not committed; the bound keeps page tables and the address
/// space of the host process small.
pub const MAX_MEMORY_MIB: u32 = 16 * 1024;

/// The most bytes of JSON accepted as a specification. Two paths of `PATH_MAX` (4 KiB, each byte at most six in JSON) and
/// three numbers fit.
pub const MAX_SPEC_BYTES: usize = 64 * 1024;

/// The most bytes of [`VmSpec::binding`]: a few digests. Every byte is authenticated at each restore.
pub const MAX_BINDING_BYTES: u16 = 256;

/// One microVM, as asked for.
///
/// Unknown fields are refused, so that a misspelled limit is never silently ignored.
///
/// ```
/// use chitin_vmm::VmSpec;
///
/// let spec: VmSpec = serde_json::from_str(r#"{"kernel": "vmlinux", "root_image": "root.img"}"#).unwrap();
/// assert_eq!((spec.vcpus, spec.memory_mib, spec.console), (1, 256, false));
/// spec.validate().unwrap();
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// The guest kernel: an uncompressed x86-64 ELF `vmlinux`. Not needed, and not opened, to restore.
    #[serde(default)]
    pub kernel: PathBuf,
    /// The root file system: an uncompressed EROFS image, mapped read-only; its length is a multiple of 2 MiB.
    pub root_image: PathBuf,
    /// Virtual CPUs, 1 to [`MAX_VCPUS`].
    #[serde(default = "default_vcpus")]
    pub vcpus: u8,
    /// Guest memory in MiB, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    #[serde(default = "default_memory_mib")]
    pub memory_mib: u32,
    /// Whether the guest has a serial console, written to the monitor's standard error. Off, because it is one more
    /// device for a guest to attack, and a slow one.
    #[serde(default)]
    pub console: bool,
    /// Whether this guest is to become a template: after it has closed its connection it may ask for a second one, which
    /// is left unanswered, and then be saved.
    #[serde(default)]
    pub template: bool,
    /// Whether to restore a guest that was saved, instead of booting a kernel.
    #[serde(default)]
    pub restore: bool,
    /// What the files of a saved guest are identified by; at most [`MAX_BINDING_BYTES`]. A guest is only restored where it
    /// is what it was when it was saved.
    #[serde(default)]
    pub binding: String,
    /// Whether to get everything ready and then wait for the channel, which comes later.
    #[serde(default)]
    pub prepared: bool,
    /// Whether to find out which pages a restored guest uses, so that they can be prepared for it next time. Slow.
    #[serde(default)]
    pub record: bool,
    /// Whether the program `chitin-vmm` closes a [jail](crate::jail) around itself before it enters the guest. A
    /// [`Monitor`](crate::Monitor) in another program does not: it is that program's own affair.
    #[serde(default = "yes")]
    pub jail: bool,
}

fn yes() -> bool {
    true
}

fn default_vcpus() -> u8 {
    1
}

fn default_memory_mib() -> u32 {
    256
}

/// A specification that asks for something a microVM cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// The number of vCPUs is out of range.
    #[error("{vcpus} vCPUs asked for: a microVM has 1 to {MAX_VCPUS}")]
    Vcpus {
        /// What was asked for.
        vcpus: u8,
    },
    /// The memory size is out of range.
    #[error(
        "{memory_mib} MiB of memory asked for: a microVM has {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB"
    )]
    Memory {
        /// What was asked for, in MiB.
        memory_mib: u32,
    },
    /// A path is empty.
    #[error("`{field}` is empty: give the path of a file")]
    EmptyPath {
        /// The field of [`VmSpec`].
        field: &'static str,
    },
    /// Two fields that exclude each other, or one without the other it needs.
    #[error("{0}")]
    Together(&'static str),
    /// The binding is too long.
    #[error("a binding of {bytes} bytes: at most {MAX_BINDING_BYTES} are taken")]
    Binding {
        /// Its length.
        bytes: usize,
    },
}

impl VmSpec {
    /// A specification with one vCPU, 256 MiB of memory, a jail and no console.
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
            jail: true,
        }
    }

    /// Checks every bound that needs no file to be opened.
    ///
    /// # Errors
    /// The first field that is out of range, as a sentence with the allowed range.
    pub fn validate(&self) -> Result<(), SpecError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(SpecError::Vcpus { vcpus: self.vcpus });
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&self.memory_mib) {
            return Err(SpecError::Memory { memory_mib: self.memory_mib });
        }
        for (field, path) in [("kernel", &self.kernel), ("root_image", &self.root_image)] {
            let needed = field != "kernel" || !self.restore;
            if needed && path.as_os_str().is_empty() {
                return Err(SpecError::EmptyPath { field });
            }
        }
        let bytes = self.binding.len();
        if bytes > usize::from(MAX_BINDING_BYTES) {
            return Err(SpecError::Binding { bytes });
        }
        // The state of a serial port is not kept: nothing that is made into a template has a use for one.
        for (wrong, why) in [
            (self.console && (self.template || self.restore), "a template has no console"),
            (self.record && !self.restore, "`record` is for a guest that is restored"),
            (bytes > 0 && !self.restore, "`binding` is for a guest that is restored"),
        ] {
            if wrong {
                return Err(SpecError::Together(why));
            }
        }
        Ok(())
    }

    /// Guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec::new("vmlinux", "root.img")
    }

    #[test]
    fn bounds_are_inclusive() {
        for vcpus in [1, MAX_VCPUS] {
            VmSpec { vcpus, ..spec() }.validate().unwrap();
        }
        for memory_mib in [MIN_MEMORY_MIB, MAX_MEMORY_MIB] {
            VmSpec { memory_mib, ..spec() }.validate().unwrap();
        }
    }

    #[test]
    fn out_of_range_is_named() {
        for vcpus in [0, MAX_VCPUS + 1, u8::MAX] {
            assert_eq!(VmSpec { vcpus, ..spec() }.validate(), Err(SpecError::Vcpus { vcpus }));
        }
        for memory_mib in [0, MIN_MEMORY_MIB - 1, MAX_MEMORY_MIB + 1, 10 << 20] {
            assert_eq!(
                VmSpec { memory_mib, ..spec() }.validate(),
                Err(SpecError::Memory { memory_mib })
            );
        }
        let spec = VmSpec::new("", "root.img");
        assert_eq!(spec.validate(), Err(SpecError::EmptyPath { field: "kernel" }));
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let restore = VmSpec { restore: true, ..VmSpec::new("", "root.img") };
        restore.validate().unwrap();
        for wrong in [
            VmSpec { console: true, template: true, ..spec() },
            VmSpec { console: true, ..restore.clone() },
            VmSpec { record: true, ..spec() },
            VmSpec { binding: "x".into(), ..spec() },
        ] {
            assert!(matches!(wrong.validate(), Err(SpecError::Together(_))), "{wrong:?}");
        }
        let binding = "x".repeat(257);
        assert_eq!(
            VmSpec { binding, ..restore }.validate(),
            Err(SpecError::Binding { bytes: 257 })
        );
    }

    #[test]
    fn unknown_fields_are_refused() {
        let json = r#"{"kernel": "k", "root_image": "r", "memory": 1}"#;
        assert!(
            serde_json::from_str::<VmSpec>(json)
                .unwrap_err()
                .to_string()
                .contains("unknown field `memory`")
        );
    }

    #[test]
    fn json_round_trip() {
        let spec = VmSpec { vcpus: 8, memory_mib: 64, console: true, ..spec() };
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<VmSpec>(&json).unwrap(), spec);
    }
}

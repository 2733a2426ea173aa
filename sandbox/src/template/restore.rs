//! Conditions under which a saved guest may be restored: its root image and its policy.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use chitin_policy::{Policy, PolicyError};
use chitin_vmm::VmSpec;

use super::manifest::Manifest;

/// Describes the root image that a guest has mapped. A saved guest knows its pages, so it is
/// restored only where the same image is found.
pub(crate) fn describe_binding(root_image: &Path) -> io::Result<String> {
    let image = fs::metadata(root_image)?;
    Ok(format!(
        "chitin {}; root image of {} bytes, device {}, inode {}, written {}.{:09}, changed {}.{:09}",
        env!("CARGO_PKG_VERSION"),
        image.len(),
        image.dev(),
        image.ino(),
        image.mtime(),
        image.mtime_nsec(),
        image.ctime(),
        image.ctime_nsec()
    ))
}

/// Turns a VM specification into that of a restored guest. Returns the binding of its files.
pub(crate) fn bind_to_root_image(vm: &mut VmSpec, root_image: &Path) -> io::Result<String> {
    vm.restore = true;
    vm.kernel = PathBuf::new();
    vm.binding = describe_binding(root_image)?;
    Ok(vm.binding.clone())
}

/// Checks that a template may be copied under a policy, and returns whether it has the policy's
/// files already. Processes that its warm-up left running are confined by the policy that it was
/// built under: that must be this policy, or none.
pub(crate) fn check_policy(
    manifest: &Manifest,
    policy: Option<&Policy>,
) -> Result<bool, PolicyError> {
    if let Some(policy) = policy {
        let limits = &policy.limits;
        let (vcpus, memory_mib) = (manifest.vcpus.into(), manifest.memory_mib.into());
        policy.tighten("the template's vcpus", Some(vcpus), limits.vcpus)?;
        policy.tighten("the template's memory_mib", Some(memory_mib), limits.memory_mib)?;
    }
    let mismatch = |built: &str| PolicyError::Template {
        template: manifest.name.clone(),
        built: built.into(),
    };
    match (&manifest.policy, policy.map(|policy| &policy.digest)) {
        (None, _) => Ok(false),
        (Some(built), Some(current)) if built == current => Ok(true),
        (Some(_), Some(_)) => Err(mismatch("another policy, or another version of this one")),
        (Some(_), None) => Err(mismatch("a policy, which --policy has to name")),
    }
}

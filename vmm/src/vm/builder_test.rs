use std::io::{Seek, Write};
use std::path::Path;

use chitin_text::error_chain;

use super::*;
use crate::image::ImageError;
use crate::kernel::KernelError;
use crate::spec::SpecError;

fn build_error(spec: VmSpec) -> MonitorError {
    Monitor::builder().spec(spec).build().err().unwrap()
}

fn file(contents: &[u8], length: u64) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(contents).unwrap();
    file.as_file().set_len(length).unwrap();
    file.rewind().unwrap();
    file
}

/// A kernel that passes every check: one byte at 1 MiB, and the entry point there.
fn kernel() -> tempfile::NamedTempFile {
    let mut elf = vec![0; 128];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    for (at, value) in
        [(18, 62u64), (24, 1 << 20), (32, 64), (64, 1), (88, 1 << 20), (96, 1), (104, 1)]
    {
        elf[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    (elf[54], elf[56]) = (56, 1);
    file(&elf, 128)
}

#[test]
fn unusable_file_is_named_in_one_line() {
    let good = kernel();
    let text = file(b"#!/bin/sh\n", 4096);
    let missing = Path::new("/nonexistent");
    type Expected = fn(&MonitorError) -> bool;
    let cases: [(&Path, &Path, &Path, Expected); 4] = [
        (missing, text.path(), missing, |error| matches!(error, MonitorError::OpenKernel { .. })),
        (good.path(), missing, missing, |error| matches!(error, MonitorError::OpenImage { .. })),
        (text.path(), text.path(), text.path(), |error| {
            matches!(error, MonitorError::Kernel { source: KernelError::NotElf { .. }, .. })
        }),
        (good.path(), text.path(), text.path(), |error| {
            matches!(error, MonitorError::Image { source: ImageError::NotErofs, .. })
        }),
    ];
    for (kernel, image, named, expected) in cases {
        let error = build_error(VmSpec::new(kernel, image));
        assert!(expected(&error), "{error:?}");
        let line = error_chain(&error);
        assert!(line.contains(&named.display().to_string()) && !line.contains('\n'), "{line}");
    }
}

#[test]
fn invalid_spec_is_refused_before_files_are_opened() {
    let spec = VmSpec { vcpus: 200, ..VmSpec::new("/nonexistent", "/nonexistent") };
    let error = build_error(spec);
    assert!(matches!(error, MonitorError::Spec(SpecError::Vcpus { vcpus: 200 })), "{error:?}");
    let error = build_error(VmSpec::new("", ""));
    let empty = SpecError::EmptyPath { field: "kernel" };
    assert!(matches!(&error, MonitorError::Spec(source) if *source == empty), "{error:?}");
}

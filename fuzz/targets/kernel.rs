//! The loader of guest kernels: the input as an ELF file.
#![no_main]

use std::fs::File;
use std::io::Write;

use chitin_vmm::arch::x86_64::layout::{HIGH_START, ram_ranges};
use chitin_vmm::kernel::KernelImage;
use chitin_vmm::memory;
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;

const RAM_BYTES: u64 = 64 << 20;

fuzz_target!(|data: &[u8]| {
    // The first byte extends the file by so many pages, so that segments of many pages need little
    // input.
    let Some((pages, data)) = data.split_first() else { return };
    let mut file: File = tempfile::tempfile_in("/dev/shm").expect("a file");
    file.write_all(data).expect("write a file");
    file.set_len(data.len() as u64 + u64::from(*pages) * 4096).expect("extend a file");
    if let Ok(kernel) = KernelImage::read_headers(&file, HIGH_START, GuestAddress(RAM_BYTES)) {
        let ram = memory::create_ram(&ram_ranges(RAM_BYTES)).expect("memory");
        let mapped = kernel.map_segments(&file, &ram, memory::FileSharing::Shared);
        mapped.expect("a kernel with valid headers can be mapped");
        assert!((HIGH_START..GuestAddress(RAM_BYTES)).contains(&kernel.entry()));
    }
});

//! Programs for a guest without a kernel: a few forms of x86-64 instructions, and the ELF file that the monitor's loader
//! takes.
//!
//! A program starts in 64-bit mode with the lowest GiB mapped to itself; the first thing it does is to map the devices
//! as well. Nothing here uses interrupts, a stack or SSE, so that it runs on any `/dev/kvm`, also on one that only emulates.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use chitin_vmm::arch::x86_64::layout;

/// Where code starts: the lowest address that the loader allows.
const CODE: u64 = layout::HIGH_START.0;
/// A page directory for the GiB that the devices are in.
const DEVICE_TABLE: u64 = 0x3f_f000;
/// And one for the GiB that the root image is in.
const IMAGE_TABLE: u64 = 0x3f_e000;
/// The end of what a program can have in memory from the start; all of it is one segment.
pub const IMAGE_END: u64 = 0x200_0000;
/// The end of the guest's memory: the least that a microVM has.
pub const RAM_END: u64 = 64 << 20;

const ELF_BYTES: u64 = 4096;
const PRESENT_WRITABLE_LARGE: u64 = 0b1000_0011;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// The size of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// One byte.
    W8,
    /// Two.
    W16,
    /// Four.
    W32,
    /// Eight.
    W64,
}

/// A program as it is written, one instruction after the other.
///
/// `RAX` holds addresses, `RCX` values, `RBX` what was loaded; `R12` to `R15` count loops, by depth.
#[derive(Default)]
pub struct Program {
    code: Vec<u8>,
    data: BTreeMap<u64, Vec<u8>>,
    depth: u8,
}

/// The most loops in one another.
const LOOP_REGISTERS: u8 = 4;

impl Program {
    /// A program that has mapped the devices and the root image.
    pub fn new() -> Self {
        let mut this = Self::default();
        let tables = [
            (DEVICE_TABLE, layout::DEVICE_HOLE.0),
            (IMAGE_TABLE, layout::image_address(RAM_END).0),
        ];
        for (table, start) in tables {
            let pages = (0..512)
                .map(|page: u64| (start + page * LARGE_PAGE_BYTES) | PRESENT_WRITABLE_LARGE);
            this.data(table, pages.flat_map(u64::to_le_bytes).collect::<Vec<u8>>());
            // In the table that the monitor made, which has the first GiB only.
            let entry = layout::PAGE_TABLES.0 + 4096 + (start >> 30) * 8;
            this.store(Width::W64, entry, table | 0b11);
        }
        this
    }

    /// Puts bytes into memory before the program runs.
    pub fn data(&mut self, address: u64, bytes: impl Into<Vec<u8>>) {
        let bytes = bytes.into();
        assert!(
            address >= CODE && address + bytes.len() as u64 <= IMAGE_END,
            "data at {address:#x}"
        );
        self.data.insert(address, bytes);
    }

    /// Writes a value.
    pub fn store(&mut self, width: Width, address: u64, value: u64) {
        self.address(address);
        self.value(value);
        self.code.extend_from_slice(match width {
            Width::W8 => &[0x88, 0x08],
            Width::W16 => &[0x66, 0x89, 0x08],
            Width::W32 => &[0x89, 0x08],
            Width::W64 => &[0x48, 0x89, 0x08],
        });
    }

    /// Reads a value, which is in `RBX` then.
    pub fn load(&mut self, width: Width, address: u64) {
        self.address(address);
        self.code.extend_from_slice(match width {
            Width::W8 => &[0x0f, 0xb6, 0x18],
            Width::W16 => &[0x0f, 0xb7, 0x18],
            Width::W32 => &[0x8b, 0x18],
            Width::W64 => &[0x48, 0x8b, 0x18],
        });
    }

    /// Adds to the 16 bits at an address.
    pub fn add16(&mut self, address: u64, value: u16) {
        self.address(address);
        self.code.extend_from_slice(&[0x66, 0x81, 0x00]);
        self.code.extend_from_slice(&value.to_le_bytes());
    }

    /// Writes the counter of the innermost loop, 32 bits of it, which goes down to one.
    pub fn store_counter(&mut self, address: u64) {
        self.address(address);
        let register = self.loop_register(self.depth.checked_sub(1).expect("in a loop"));
        self.code.extend_from_slice(&[0x44, 0x89, register << 3]);
    }

    /// Waits while the 16 bits at an address have this value.
    pub fn wait_while(&mut self, address: u64, value: u16) {
        let start = self.code.len();
        self.load(Width::W16, address);
        self.compare(value.into());
        self.jump(&[0x0f, 0x84], start);
    }

    /// Waits until the 16 bits at an address have this value.
    pub fn wait_until(&mut self, address: u64, value: u16) {
        let start = self.code.len();
        self.load(Width::W16, address);
        self.compare(value.into());
        self.jump(&[0x0f, 0x85], start);
    }

    /// Waits until the 16 bits at two addresses are the same.
    pub fn wait_equal(&mut self, one: u64, other: u64) {
        let start = self.code.len();
        self.load(Width::W16, one);
        // mov rdx, rbx
        self.code.extend_from_slice(&[0x48, 0x89, 0xda]);
        self.load(Width::W16, other);
        // cmp rbx, rdx
        self.code.extend_from_slice(&[0x48, 0x39, 0xd3]);
        self.jump(&[0x0f, 0x85], start);
    }

    /// Waits until the bits of `mask` of the 32 at an address are what `value` says.
    pub fn wait_for(&mut self, address: u64, mask: u32, value: u32) {
        let start = self.code.len();
        self.load(Width::W32, address);
        self.mask(mask.into());
        self.compare(value.into());
        self.jump(&[0x0f, 0x85], start);
    }

    /// Ends the guest, with `complaint` as its last words, unless what is read is `value`.
    pub fn expect(&mut self, width: Width, address: u64, value: u64, complaint: &str) {
        self.load(width, address);
        self.compare(value);
        self.unless_equal(complaint);
    }

    /// The same, for some of 32 bits.
    pub fn expect_bits(&mut self, address: u64, mask: u32, value: u32, complaint: &str) {
        self.load(Width::W32, address);
        self.mask(mask.into());
        self.compare(value.into());
        self.unless_equal(complaint);
    }

    /// Does something again and again.
    pub fn repeat(&mut self, times: u64, body: impl FnOnce(&mut Self)) {
        let register = self.loop_register(self.depth);
        self.depth += 1;
        self.code.extend_from_slice(&[0x49, 0xb8 | register]);
        self.code.extend_from_slice(&times.to_le_bytes());
        let start = self.code.len();
        body(self);
        self.code.extend_from_slice(&[0x49, 0xff, 0xc8 | register]);
        self.jump(&[0x0f, 0x85], start);
        self.depth -= 1;
    }

    /// Does something for ever.
    pub fn forever(&mut self, body: impl FnOnce(&mut Self)) {
        let start = self.code.len();
        body(self);
        self.jump(&[0xe9], start);
    }

    /// Reads 8, 16 and 32 bits from a port, then writes as many to it.
    pub fn port(&mut self, port: u16) {
        self.code.push(0xba);
        self.code.extend_from_slice(&u32::from(port).to_le_bytes());
        // in al, in ax, in eax, and the same out.
        for form in [&[0xec][..], &[0x66, 0xed], &[0xed], &[0xee], &[0x66, 0xef], &[0xef]] {
            self.code.extend_from_slice(form);
        }
    }

    /// Makes `words` what the monitor reports as the guest's last messages.
    pub fn say(&mut self, words: &str) {
        let mut zone = b"DBGC".to_vec();
        let length = u32::try_from(words.len()).expect("few words").to_le_bytes();
        zone.extend_from_slice(&length);
        zone.extend_from_slice(&length);
        zone.extend_from_slice(words.as_bytes());
        for (at, chunk) in (0..).step_by(8).zip(zone.chunks(8)) {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            self.store(Width::W64, layout::LOG.0 + at, u64::from_le_bytes(bytes));
        }
    }

    /// Ends the guest: an invalid instruction without a table of handlers is a triple fault.
    pub fn end(&mut self) {
        self.code.extend_from_slice(&[0x0f, 0x0b]);
    }

    /// Writes the program as an ELF file.
    ///
    /// # Errors
    /// As of the file.
    pub fn write(mut self, file: &File) -> io::Result<()> {
        self.end();
        let mut header = vec![0; 120];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &2u16.to_le_bytes());
        put(18, &62u16.to_le_bytes());
        put(24, &CODE.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(54, &56u16.to_le_bytes());
        put(56, &1u16.to_le_bytes());
        // The one segment: load, its place in the file, its address, its size in the file and in memory.
        put(64, &1u32.to_le_bytes());
        put(72, &ELF_BYTES.to_le_bytes());
        for (at, value) in [(80, CODE), (88, CODE), (96, IMAGE_END - CODE), (104, IMAGE_END - CODE)]
        {
            put(at, &value.to_le_bytes());
        }
        file.set_len(ELF_BYTES + IMAGE_END - CODE)?;
        file.write_all_at(&header, 0)?;
        assert!(
            (self.code.len() as u64) < IMAGE_TABLE - CODE,
            "a program of {} bytes",
            self.code.len()
        );
        file.write_all_at(&self.code, ELF_BYTES)?;
        for (address, bytes) in &self.data {
            file.write_all_at(bytes, ELF_BYTES + address - CODE)?;
        }
        Ok(())
    }

    fn unless_equal(&mut self, complaint: &str) {
        // The complaint is written beside the way, and jumped over.
        let mut aside = Self { depth: self.depth, ..Self::default() };
        aside.say(complaint);
        aside.end();
        self.code.extend_from_slice(&[0x0f, 0x84]);
        let length = i32::try_from(aside.code.len()).expect("a short complaint");
        self.code.extend_from_slice(&length.to_le_bytes());
        self.code.extend_from_slice(&aside.code);
    }

    /// `R12` to `R15`, as the low bits of their numbers.
    fn loop_register(&self, depth: u8) -> u8 {
        assert!(depth < LOOP_REGISTERS, "too many loops in one another");
        4 + depth
    }

    fn address(&mut self, address: u64) {
        self.code.extend_from_slice(&[0x48, 0xb8]);
        self.code.extend_from_slice(&address.to_le_bytes());
    }

    fn value(&mut self, value: u64) {
        self.code.extend_from_slice(&[0x48, 0xb9]);
        self.code.extend_from_slice(&value.to_le_bytes());
    }

    fn mask(&mut self, mask: u64) {
        self.value(mask);
        // and rbx, rcx
        self.code.extend_from_slice(&[0x48, 0x21, 0xcb]);
    }

    fn compare(&mut self, value: u64) {
        self.value(value);
        // cmp rbx, rcx
        self.code.extend_from_slice(&[0x48, 0x39, 0xcb]);
    }

    fn jump(&mut self, opcode: &[u8], to: usize) {
        self.code.extend_from_slice(opcode);
        let next = i64::try_from(self.code.len() + 4).expect("a short program");
        let distance =
            i32::try_from(i64::try_from(to).expect("a short program") - next).expect("near");
        self.code.extend_from_slice(&distance.to_le_bytes());
    }
}

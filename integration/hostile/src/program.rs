//! Programs for a guest without a kernel: an assembler for a few x86-64 instructions, and the ELF
//! file that the monitor loads.
//!
//! A program starts in 64-bit mode with the lowest GiB mapped to itself. It first maps the devices
//! as well. No program uses interrupts, a stack or SSE, so that it runs on any `/dev/kvm`, even on
//! one that only emulates.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use chitin_vmm::arch::x86_64::layout;

/// The address of the code: the lowest that the loader allows.
const CODE: u64 = layout::HIGH_START.0;
/// The page directory for the GiB with the devices.
const DEVICE_TABLE: u64 = 0x3f_f000;
/// The page directory for the GiB with the root image.
const IMAGE_TABLE: u64 = 0x3f_e000;
/// The end of the memory that a program can fill before it runs, which is one segment of the ELF
/// file.
pub const IMAGE_END: u64 = 0x200_0000;
/// The end of the guest's memory, which is the smallest that a microVM can have.
pub const RAM_END: u64 = 64 << 20;

/// The offset of the segment in the ELF file.
const SEGMENT_OFFSET: u64 = 4096;
const PRESENT_WRITABLE: u64 = 0b11;
const PRESENT_WRITABLE_LARGE: u64 = 0b1000_0011;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// `je` and `jne` with a displacement of 32 bits, and `jmp`.
const JUMP_IF_EQUAL: &[u8] = &[0x0f, 0x84];
const JUMP_UNLESS_EQUAL: &[u8] = &[0x0f, 0x85];
const JUMP: &[u8] = &[0xe9];

/// The deepest nesting of loops.
const LOOP_REGISTERS: u8 = 4;

/// The size of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 8 bits.
    W8,
    /// 16 bits.
    W16,
    /// 32 bits.
    W32,
    /// 64 bits.
    W64,
}

/// A program under construction: each method appends instructions.
///
/// `RAX` holds addresses, `RCX` values and `RBX` the value loaded last. `R12` to `R15` count loops,
/// by depth.
#[derive(Default)]
pub struct Program {
    code: Vec<u8>,
    data: BTreeMap<u64, Vec<u8>>,
    depth: u8,
}

impl Program {
    /// Begins a program, which maps the devices and the root image first.
    pub fn new() -> Self {
        let mut this = Self::default();
        let tables = [
            (DEVICE_TABLE, layout::DEVICE_HOLE.0),
            (IMAGE_TABLE, layout::image_address(RAM_END).0),
        ];
        for (table, start) in tables {
            let pages = (0..512)
                .map(|page: u64| (start + page * LARGE_PAGE_BYTES) | PRESENT_WRITABLE_LARGE);
            this.put_data(table, pages.flat_map(u64::to_le_bytes).collect::<Vec<u8>>());
            // The monitor's page directory pointer table has entries for the first GiB only.
            let entry = layout::PAGE_TABLES.0 + 4096 + (start >> 30) * 8;
            this.store(Width::W64, entry, table | PRESENT_WRITABLE);
        }
        this
    }

    /// Puts bytes into memory before the program runs.
    pub fn put_data(&mut self, address: u64, bytes: impl Into<Vec<u8>>) {
        let bytes = bytes.into();
        assert!(
            address >= CODE && address + bytes.len() as u64 <= IMAGE_END,
            "data at {address:#x}"
        );
        self.data.insert(address, bytes);
    }

    /// Writes a value.
    pub fn store(&mut self, width: Width, address: u64, value: u64) {
        self.emit_address(address);
        self.emit_value(value);
        // mov [rax], cl; mov [rax], cx; mov [rax], ecx; mov [rax], rcx
        self.emit(match width {
            Width::W8 => &[0x88, 0x08],
            Width::W16 => &[0x66, 0x89, 0x08],
            Width::W32 => &[0x89, 0x08],
            Width::W64 => &[0x48, 0x89, 0x08],
        });
    }

    /// Reads a value into `RBX`.
    pub fn load(&mut self, width: Width, address: u64) {
        self.emit_address(address);
        // movzx ebx, byte [rax]; movzx ebx, word [rax]; mov ebx, [rax]; mov rbx, [rax]
        self.emit(match width {
            Width::W8 => &[0x0f, 0xb6, 0x18],
            Width::W16 => &[0x0f, 0xb7, 0x18],
            Width::W32 => &[0x8b, 0x18],
            Width::W64 => &[0x48, 0x8b, 0x18],
        });
    }

    /// Adds to the 16 bits at an address.
    pub fn add_to_u16(&mut self, address: u64, value: u16) {
        self.emit_address(address);
        // add word [rax], value
        self.emit(&[0x66, 0x81, 0x00]);
        self.emit(&value.to_le_bytes());
    }

    /// Writes the low 32 bits of the innermost loop's counter, which counts down to one.
    pub fn store_loop_counter(&mut self, address: u64) {
        self.emit_address(address);
        let register = loop_register(self.depth.checked_sub(1).expect("in a loop"));
        // mov [rax], r12d to r15d
        self.emit(&[0x44, 0x89, register << 3]);
    }

    /// Waits while the 16 bits at an address have this value.
    pub fn wait_while(&mut self, address: u64, value: u16) {
        let start = self.code.len();
        self.load(Width::W16, address);
        self.emit_compare(value.into());
        self.emit_jump(JUMP_IF_EQUAL, start);
    }

    /// Waits until the 16 bits at an address have this value.
    pub fn wait_until(&mut self, address: u64, value: u16) {
        let start = self.code.len();
        self.load(Width::W16, address);
        self.emit_compare(value.into());
        self.emit_jump(JUMP_UNLESS_EQUAL, start);
    }

    /// Waits until the 16 bits at two addresses are the same.
    pub fn wait_until_same(&mut self, one: u64, other: u64) {
        let start = self.code.len();
        self.load(Width::W16, one);
        // mov rdx, rbx
        self.emit(&[0x48, 0x89, 0xda]);
        self.load(Width::W16, other);
        // cmp rbx, rdx
        self.emit(&[0x48, 0x39, 0xd3]);
        self.emit_jump(JUMP_UNLESS_EQUAL, start);
    }

    /// Waits until the bits of `mask`, in the 32 bits at an address, equal `value`.
    pub fn wait_for_bits(&mut self, address: u64, mask: u32, value: u32) {
        let start = self.code.len();
        self.load(Width::W32, address);
        self.emit_mask(mask.into());
        self.emit_compare(value.into());
        self.emit_jump(JUMP_UNLESS_EQUAL, start);
    }

    /// Ends the guest with `complaint` as its log, unless the value at an address is `value`.
    pub fn expect(&mut self, width: Width, address: u64, value: u64, complaint: &str) {
        self.load(width, address);
        self.emit_compare(value);
        self.end_unless_equal(complaint);
    }

    /// Ends the guest with `complaint` as its log, unless the bits of `mask`, in the 32 bits at an
    /// address, equal `value`.
    pub fn expect_bits(&mut self, address: u64, mask: u32, value: u32, complaint: &str) {
        self.load(Width::W32, address);
        self.emit_mask(mask.into());
        self.emit_compare(value.into());
        self.end_unless_equal(complaint);
    }

    /// Runs `body` so many times.
    pub fn repeat(&mut self, times: u64, body: impl FnOnce(&mut Self)) {
        let register = loop_register(self.depth);
        self.depth += 1;
        // mov r12 to r15, times
        self.emit(&[0x49, 0xb8 | register]);
        self.emit(&times.to_le_bytes());
        let start = self.code.len();
        body(self);
        // dec r12 to r15
        self.emit(&[0x49, 0xff, 0xc8 | register]);
        self.emit_jump(JUMP_UNLESS_EQUAL, start);
        self.depth -= 1;
    }

    /// Runs `body` for ever.
    pub fn repeat_forever(&mut self, body: impl FnOnce(&mut Self)) {
        let start = self.code.len();
        body(self);
        self.emit_jump(JUMP, start);
    }

    /// Reads 8, 16 and 32 bits from an I/O port, then writes them back.
    pub fn access_port(&mut self, port: u16) {
        // mov edx, port
        self.emit(&[0xba]);
        self.emit(&u32::from(port).to_le_bytes());
        // in al, dx; in ax, dx; in eax, dx; out dx, al; out dx, ax; out dx, eax
        for instruction in [&[0xec][..], &[0x66, 0xed], &[0xed], &[0xee], &[0x66, 0xef], &[0xef]] {
            self.emit(instruction);
        }
    }

    /// Makes `words` the log that the monitor reports, in the format of the kernel's ramoops.
    pub fn write_log(&mut self, words: &str) {
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

    /// Ends the guest with a triple fault: an invalid instruction without an interrupt table.
    pub fn end_guest(&mut self) {
        // ud2
        self.emit(&[0x0f, 0x0b]);
    }

    /// Writes the program as an ELF file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_elf(mut self, file: &File) -> io::Result<()> {
        self.end_guest();
        assert!(
            (self.code.len() as u64) < IMAGE_TABLE - CODE,
            "a program of {} bytes",
            self.code.len()
        );
        file.set_len(SEGMENT_OFFSET + IMAGE_END - CODE)?;
        file.write_all_at(&elf_header(), 0)?;
        file.write_all_at(&self.code, SEGMENT_OFFSET)?;
        for (address, bytes) in &self.data {
            file.write_all_at(bytes, SEGMENT_OFFSET + address - CODE)?;
        }
        Ok(())
    }

    fn end_unless_equal(&mut self, complaint: &str) {
        // The code for the complaint is jumped over if the values are equal.
        let mut failure = Self { depth: self.depth, ..Self::default() };
        failure.write_log(complaint);
        failure.end_guest();
        self.emit(JUMP_IF_EQUAL);
        let length = i32::try_from(failure.code.len()).expect("a short complaint");
        self.emit(&length.to_le_bytes());
        self.emit(&failure.code);
    }

    fn emit(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn emit_address(&mut self, address: u64) {
        // mov rax, address
        self.emit(&[0x48, 0xb8]);
        self.emit(&address.to_le_bytes());
    }

    fn emit_value(&mut self, value: u64) {
        // mov rcx, value
        self.emit(&[0x48, 0xb9]);
        self.emit(&value.to_le_bytes());
    }

    fn emit_mask(&mut self, mask: u64) {
        self.emit_value(mask);
        // and rbx, rcx
        self.emit(&[0x48, 0x21, 0xcb]);
    }

    fn emit_compare(&mut self, value: u64) {
        self.emit_value(value);
        // cmp rbx, rcx
        self.emit(&[0x48, 0x39, 0xcb]);
    }

    fn emit_jump(&mut self, opcode: &[u8], to: usize) {
        self.emit(opcode);
        let next = i64::try_from(self.code.len() + 4).expect("a short program");
        let distance =
            i32::try_from(i64::try_from(to).expect("a short program") - next).expect("near");
        self.emit(&distance.to_le_bytes());
    }
}

/// Returns the low three bits of the number of `R12` to `R15`.
fn loop_register(depth: u8) -> u8 {
    assert!(depth < LOOP_REGISTERS, "loops are nested too deeply");
    4 + depth
}

/// Makes an ELF header with one program header.
fn elf_header() -> Vec<u8> {
    let mut header = vec![0; 120];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    // Class, byte order and version; type (executable) and machine (x86-64); entry; offset, size
    // and number of program headers.
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(24, &CODE.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    // The one segment: type (load), offset, addresses, and sizes in the file and in memory.
    put(64, &1u32.to_le_bytes());
    put(72, &SEGMENT_OFFSET.to_le_bytes());
    for (at, value) in [(80, CODE), (88, CODE), (96, IMAGE_END - CODE), (104, IMAGE_END - CODE)] {
        put(at, &value.to_le_bytes());
    }
    header
}

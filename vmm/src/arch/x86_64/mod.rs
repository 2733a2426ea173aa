//! x86-64: where things are in guest memory, and how a guest finds them.
//!
//! The guest is entered in 64-bit mode at the kernel's ELF entry point, as the Linux 64-bit boot protocol says
//! (`Documentation/arch/x86/boot.rst`): identity-mapped page tables, flat segments, interrupts off, `RSI` at the boot
//! parameters. There is no firmware; processors and the I/O APIC are found through an Intel MP table.

pub mod boot;
pub mod cmdline;
pub mod cpuid;
pub mod layout;
pub mod mptable;
pub mod registers;
pub mod state;

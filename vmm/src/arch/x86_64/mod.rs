//! x86-64: the layout of guest memory, and the state in which a guest is entered.
//!
//! The guest is entered in 64-bit mode at the kernel's ELF entry point, as the Linux 64-bit boot
//! protocol requires (`Documentation/arch/x86/boot.rst`): identity-mapped page tables, flat
//! segments, interrupts off, `RSI` at the boot parameters. There is no firmware; the kernel finds
//! processors and the I/O APIC through an Intel MP table.

pub mod boot;
pub mod cmdline;
pub mod cpuid;
mod features;
pub mod layout;
pub mod mptable;
pub mod registers;

//! The parts that depend on the processor architecture.

#[cfg(not(target_arch = "x86_64"))]
compile_error!(
    "chitin-vmm runs on x86-64 only: boot protocol, CPUID and MP table are written for it"
);

pub mod x86_64;

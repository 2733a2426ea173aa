//! How large a sandbox is, and whether its monitor is jailed: for whatever starts one that a policy may shape too.

use chitin::Builder;

use crate::jail::NoJail;

/// Numbers and the jail.
#[derive(clap::Args)]
pub struct Machine {
    /// Virtual CPUs, 1 to 8; without it the policy's, or 1
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,

    /// Memory in MiB, 64 to 16384, files the workload writes included; without it the policy's, or 256
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,

    #[command(flatten)]
    pub jail: NoJail,
}

impl Machine {
    /// Asks for what was given, and leaves the rest to the policy.
    pub fn shape(&self, mut builder: Builder) -> Builder {
        if let Some(cpus) = self.cpus {
            builder = builder.vcpus(cpus);
        }
        if let Some(memory) = self.memory {
            builder = builder.memory_mib(memory);
        }
        builder.jail(self.jail.announced())
    }
}

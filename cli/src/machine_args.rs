//! Options about the size of a sandbox and the jail of its monitor.

use chitin::{Builder, parse_mib};

use crate::jail_args::JailArgs;

/// Options of commands that start a sandbox, which a policy may size too.
#[derive(clap::Args)]
pub struct MachineArgs {
    /// Virtual CPUs, 1 to 8 [default: those of the policy, or 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,

    /// Memory in MiB or with a unit, 64M to 16G; files that the workload writes count too [default:
    /// that of the policy, or 256]
    #[arg(long, value_name = "SIZE", value_parser = parse_mib)]
    memory: Option<u64>,

    /// Share no page of memory with other sandboxes: copy the kernel, the root image and the memory
    /// of a template. For tenants that attack each other; takes the size of the image in memory
    #[arg(long)]
    pub private_memory: bool,

    #[command(flatten)]
    pub jail: JailArgs,
}

impl MachineArgs {
    /// Applies the options that were given; the policy decides about the others.
    pub fn apply_to(&self, mut builder: Builder) -> Builder {
        if let Some(cpus) = self.cpus {
            builder = builder.vcpus(cpus);
        }
        if let Some(memory) = self.memory {
            builder = builder.memory_mib(memory);
        }
        builder.private_memory(self.private_memory).jail(self.jail.warn_if_unjailed())
    }
}

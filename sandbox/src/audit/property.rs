//! What is promised, tier by tier: data.

use chitin_spec::Boundary;

/// Which attacks one property is put to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Property {
    /// Its name, in tables and JSON.
    pub name: &'static str,
    /// What holds, as a sentence about the workload.
    pub claim: &'static str,
    /// The function of `probes.py` that attacks it.
    pub(super) probe: &'static str,
    /// What else an attack needs.
    pub(super) setting: Setting,
    /// The tiers that do not promise it, with the reason.
    pub(super) exempt: &'static [(Boundary, &'static str)],
}

/// What surrounds an attack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Setting {
    /// Nothing.
    Alone,
    /// It may take the sandbox with it: it gets one of its own, and the first one has to answer afterwards.
    Destructive,
}

const fn alone(name: &'static str, probe: &'static str, claim: &'static str) -> Property {
    Property { name, claim, probe, setting: Setting::Alone, exempt: &[] }
}

const fn destructive(name: &'static str, probe: &'static str, claim: &'static str) -> Property {
    Property { setting: Setting::Destructive, ..alone(name, probe, claim) }
}

const SHARED_KERNEL: &str = "it runs on the host's own kernel";

/// Every property, in the order of the table.
pub const PROPERTIES: [Property; 19] = [
    alone("host files", "host_files", "It cannot read a file of the host."),
    alone("host processes", "processes", "It cannot see a process of the host."),
    alone(
        "network",
        "network",
        "It reaches no address, of the host or beyond, and has no interface but the loopback.",
    ),
    alone(
        "metadata service",
        "metadata",
        "It does not reach 169.254.169.254, where clouds hand out credentials.",
    ),
    alone(
        "other sandboxes",
        "neighbours",
        "It does not reach a sandbox beside it: by port, socket, file or shared memory.",
    ),
    alone("credentials", "credentials", "It cannot find a credential of another sandbox."),
    alone(
        "capabilities",
        "capabilities",
        "It has no capability but to bind low ports, and gains none.",
    ),
    alone("mounts", "mounts", "It can mount and unmount nothing, nor change its root."),
    alone(
        "kernel modules",
        "modules",
        "It can load neither modules nor kernels, nor open physical memory.",
    ),
    alone("agent", "agent", "It can neither trace, read nor kill the agent."),
    Property {
        exempt: &[(
            Boundary::Gvisor,
            "its kernel shows them to everybody, and there is nothing secret in them",
        )],
        ..alone(
            "agent's outlines",
            "outlines",
            "It cannot see what the agent has mapped or opened, nor its environment.",
        )
    },
    alone("vsock", "vsock", "It can open no vsock: the channel is the agent's."),
    alone("root file system", "root", "It can write nothing but its scratch directories."),
    alone(
        "kernel interfaces",
        "kernel_files",
        "It can change nothing through /proc and /sys, and read no kernel memory there.",
    ),
    alone(
        "system calls",
        "syscalls",
        "It can make no system call that attacks start with: bpf, io_uring, userfaultfd, perf, keys.",
    ),
    Property {
        exempt: &[(Boundary::Namespaces, SHARED_KERNEL)],
        ..alone("host kernel", "host_kernel", "It does not learn which kernel the host runs.")
    },
    destructive("memory", "memory", "When it takes all memory it can get, nobody else notices."),
    destructive("tasks", "pids", "When it forks without end, nobody else notices."),
    destructive("disk", "disk", "When it writes without end, nobody else notices."),
];

impl Property {
    /// Why this wall does not promise it; `None`: it does.
    pub fn exemption(&self, wall: Boundary) -> Option<&'static str> {
        self.exempt.iter().find(|(exempt, _)| *exempt == wall).map(|(_, reason)| *reason)
    }
}

/// `docs/tiers.md`: every property and who promises it.
pub fn document() -> String {
    use std::fmt::Write as _;
    let mut text = String::from(
        "# What each tier promises\n\n\
         Written by `chitin audit --document`. `chitin audit --tier ironclaw|nanoclaw|nemoclaw|all` attacks each property from inside a\n\
         sandbox and says what held. The tier `ironclaw` is a microVM; `nanoclaw` is gVisor, or a container where that is missing, and\n\
         then it says so; `nemoclaw` is a container.\n\n",
    );
    let _ = writeln!(
        text,
        "| property | the workload | {} |",
        Boundary::ALL.map(Boundary::name).join(" | ")
    );
    let _ = writeln!(text, "|---|---|{}", "---|".repeat(Boundary::ALL.len()));
    for property in &PROPERTIES {
        let promise = |wall| match property.exemption(wall) {
            None => "held".to_owned(),
            Some(reason) => format!("no: {reason}"),
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} |",
            property.name,
            property.claim,
            Boundary::ALL.map(promise).join(" | ")
        );
    }
    text
}

//! The mutations: for each property that `chitin audit` attacks, a sandbox without what protects it.

use serde_json::{Value, json};

/// The runtime whose containers are mutated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// A container on the host's kernel.
    Crun,
    /// gVisor.
    Runsc,
}

impl Runtime {
    /// Returns the name of the program.
    pub fn name(self) -> &'static str {
        match self {
            Self::Crun => "crun",
            Self::Runsc => "runsc",
        }
    }
}

/// Objects of the host that a mutation hands to its containers.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Surroundings {
    /// A directory that every user may enter, with the audit's file of the host in it.
    pub temp_dir: String,
    /// A file with a line of text that everyone may read and write.
    pub file: String,
    /// A file with the text of the host's `/proc/version`.
    pub version: String,
    /// A network namespace with one interface, which leads nowhere and has the address of the
    /// metadata service, at which a server listens.
    pub network: String,
    /// The agent with a patch.
    pub agent: Option<String>,
}

/// A mutation.
pub struct Mutation {
    /// The name on the command line.
    pub name: &'static str,
    /// The property that must be reported as broken.
    pub property: &'static str,
    /// The containers that are mutated.
    pub runtime: Runtime,
    /// A patch of the agent, in `integration/audit-mutations`.
    pub patch: Option<&'static str>,
    /// The change of a container's `config.json`.
    pub edit: fn(&mut Value, &Surroundings),
}

const fn edited(
    name: &'static str,
    property: &'static str,
    edit: fn(&mut Value, &Surroundings),
) -> Mutation {
    Mutation { name, property, runtime: Runtime::Crun, patch: None, edit }
}

const fn patched(
    name: &'static str,
    property: &'static str,
    patch: &'static str,
    edit: fn(&mut Value, &Surroundings),
) -> Mutation {
    Mutation { name, property, runtime: Runtime::Crun, patch: Some(patch), edit }
}

/// The mutations, in the order of the properties.
pub const MUTATIONS: [Mutation; 21] = [
    edited("host-directory-mounted", "host files", |config, host| {
        mount(config, "bind", &host.temp_dir, "/mnt", &["rbind", "ro"]);
    }),
    edited("host-proc-mounted", "host processes", |config, _| mount_host_proc(config)),
    edited("network-interface", "network", share_network),
    edited("metadata-service-reachable", "metadata service", share_network),
    edited("network-shared", "other sandboxes", share_network),
    edited("user-range-shared", "credentials", |config, _| {
        mount_host_proc(config);
        for mapping in ["uidMappings", "gidMappings"] {
            config["linux"][mapping] =
                json!([{"containerID": 0, "hostID": 0x3fff_0000_u32, "size": 65_536}]);
        }
    }),
    patched("privileges-kept", "capabilities", "privileges-kept", |_, _| {}),
    Mutation {
        runtime: Runtime::Runsc,
        ..patched("namespaces-in-gvisor", "namespaces", "namespaces-allowed", |_, _| {})
    },
    patched("namespaces-in-container", "namespaces", "namespaces-allowed", |config, _| {
        allow_system_calls(config);
    }),
    patched("mounts-allowed", "mounts", "privileges-kept", |config, _| {
        allow_system_calls(config);
        add_capability(config, "CAP_SYS_ADMIN");
    }),
    edited("memory-device", "kernel modules", |config, host| {
        mount(config, "bind", &host.file, "/dev/mem", &["bind"]);
    }),
    patched("agent-dumpable", "agent", "privileges-kept", |_, _| {}),
    patched("agent-mappings-readable", "agent's mappings", "privileges-kept", |_, _| {}),
    patched("vsock-allowed", "vsock", "vsock-allowed", |_, _| {}),
    edited("etc-writable", "root file system", |config, _| {
        mount(config, "tmpfs", "tmpfs", "/etc", &["mode=0777"]);
    }),
    edited("kernel-log-readable", "kernel interfaces", |config, host| {
        mount(config, "bind", &host.file, "/dev/kmsg", &["bind"]);
    }),
    patched("system-calls-allowed", "system calls", "system-calls-allowed", |config, _| {
        allow_system_calls(config);
    }),
    Mutation {
        runtime: Runtime::Runsc,
        ..edited("host-version-shown", "host kernel", |config, host| {
            mount(config, "bind", &host.version, "/proc/version", &["bind", "ro"]);
        })
    },
    edited("memory-unlimited", "memory", |config, _| remove_memory_limit(config)),
    edited("tasks-unlimited", "tasks", |config, _| {
        // Not without any limit: that would end other programs of this host.
        config["linux"]["resources"]["pids"]["limit"] = json!(20_000);
    }),
    edited("disk-unlimited", "disk", |config, _| {
        remove_memory_limit(config);
        let mounts = config["mounts"].as_array_mut();
        for mount in mounts.into_iter().flatten().filter(|mount| mount["type"] == "tmpfs") {
            if let Some(options) = mount["options"].as_array_mut() {
                options.retain(|option| !option.as_str().is_some_and(|o| o.starts_with("size=")));
            }
        }
    }),
];

fn mount(config: &mut Value, kind: &str, source: &str, destination: &str, options: &[&str]) {
    if let Some(mounts) = config["mounts"].as_array_mut() {
        mounts.push(json!({
            "destination": destination, "type": kind, "source": source, "options": options,
        }));
    }
}

fn mount_host_proc(config: &mut Value) {
    let mounts = config["mounts"].as_array_mut();
    for mount in mounts.into_iter().flatten().filter(|mount| mount["destination"] == "/proc") {
        *mount = json!({
            "destination": "/proc", "type": "bind", "source": "/proc", "options": ["rbind"],
        });
    }
    // A container of its own process namespace cannot use the names of another's.
    remove_namespace(config, "pid");
}

fn share_network(config: &mut Value, host: &Surroundings) {
    remove_namespace(config, "network");
    if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "network", "path": host.network}));
    }
}

fn remove_namespace(config: &mut Value, kind: &str) {
    if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
        namespaces.retain(|namespace| namespace["type"] != kind);
    }
}

/// Removes the runtime's filter. That of the agent remains.
fn allow_system_calls(config: &mut Value) {
    if let Some(linux) = config["linux"].as_object_mut() {
        linux.remove("seccomp");
    }
}

fn add_capability(config: &mut Value, capability: &str) {
    for set in ["bounding", "effective", "permitted"] {
        if let Some(set) = config["process"]["capabilities"][set].as_array_mut() {
            set.push(json!(capability));
        }
    }
}

fn remove_memory_limit(config: &mut Value) {
    if let Some(resources) = config["linux"]["resources"].as_object_mut() {
        resources.remove("memory");
    }
}

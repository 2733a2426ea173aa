//! An OCI bundle: the description of one container for a runtime (OCI runtime specification,
//! "Filesystem Bundle").

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

use super::engine::Engine;
use super::private_dir::open_private_dir;
use super::root_mount::RootMount;
use super::user_range::{USERS, UserRange};
use crate::container::{
    CAPABILITIES, CREDENTIAL_BYTES, CREDENTIALS, HOST_NAME, Limits, Owner, random_name,
    read_only_mount_bytes, scratch_mounts,
};

const BUNDLES: &str = "/run/chitin/bundles";

/// The file of a bundle that names the process of its runtime.
const RUNTIME: &str = "runtime";

/// The content of a container.
#[derive(Debug)]
pub(super) struct Content<'a> {
    /// The unpacked image.
    pub root: &'a Path,
    pub limits: Limits,
    /// Mount points that the agent can write below and the workload cannot.
    pub mount_points: &'a [PathBuf],
    /// Command of PID 1.
    pub argv: &'a [String],
}

/// The directory of a bundle. Dropping it removes the directory.
#[derive(Debug)]
pub(crate) struct Bundle {
    path: PathBuf,
    name: String,
    root: Option<RootMount>,
    users: Option<UserRange>,
    /// Held as long as the bundle has an owner.
    _lock: File,
}

impl Bundle {
    pub fn create(engine: &Engine, content: &Content<'_>) -> io::Result<Bundle> {
        let name = random_name().map_err(io::Error::other)?;
        open_private_dir(Path::new(BUNDLES), 0o700)?;
        // The lock comes before the name, so that no process takes the bundle for an abandoned one.
        let draft = Path::new(BUNDLES).join(format!(".{name}"));
        fs::create_dir(&draft)?;
        let lock = File::create_new(draft.join("lock"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        let full_name = format!("{}-{name}", engine.name);
        let path = Path::new(BUNDLES).join(&full_name);
        fs::rename(&draft, &path)?;
        let mut bundle = Bundle { path, name, root: None, users: None, _lock: lock };
        let users = UserRange::reserve(&bundle.name)?;
        let first_user = users.first();
        bundle.users = Some(users);
        let Content { root, mount_points, .. } = content;
        let root = RootMount::create(&full_name, engine, root, first_user, mount_points)?;
        let config = runtime_config(engine, &bundle.name, content, first_user, &root)?;
        bundle.root = Some(root);
        let spec: Spec = serde_json::from_value(config)?;
        spec.save(bundle.path.join("config.json")).map_err(io::Error::other)?;
        Ok(bundle)
    }

    /// Records the process of the runtime, so that a later start can end it if it hangs.
    pub fn record_runtime(&self, runtime: &Owner) -> io::Result<()> {
        fs::write(self.path.join(RUNTIME), runtime.to_string())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the container's users, which must be reserved as long as the container.
    pub fn take_users(&mut self) -> Option<UserRange> {
        self.users.take()
    }

    /// Returns true if the container has a private root, which must last as long as the container.
    pub fn has_tree(&self) -> bool {
        self.root.as_ref().is_some_and(|root| root.tree().is_some())
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        // The root goes first: an abandoned root is found by its bundle.
        self.root = None;
        // The next start removes leftovers.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Returns the process of a bundle's runtime if it is still running.
fn running_runtime(bundle: &Path) -> Option<Owner> {
    let owner = Owner::parse(&fs::read_to_string(bundle.join(RUNTIME)).ok()?)?;
    (!owner.has_ended()).then_some(owner)
}

/// Removes the bundles and containers of processes that died during a start.
pub(crate) async fn remove_abandoned() {
    let Ok(entries) = fs::read_dir(BUNDLES) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(lock) = File::open(path.join("lock")) else { continue };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let name = entry.file_name();
        if let Some(runtime) = running_runtime(&path) {
            runtime.kill_group();
        }
        if let Some((engine, name)) = name.to_str().and_then(|name| name.split_once('-'))
            && let Some(engine) = Engine::find(engine)
        {
            // There may be no container of that name.
            engine.delete(name).await;
        }
        RootMount::remove(&name);
        let _ = fs::remove_dir_all(&path);
    }
}

/// Returns the content of `config.json`.
fn runtime_config(
    engine: &Engine,
    name: &str,
    &Content { limits, argv, .. }: &Content<'_>,
    first_user: u32,
    root: &RootMount,
) -> io::Result<Value> {
    let tree = root.tree();
    // In gVisor's kernel this capability has no power over the host. Only the agent has it, to
    // mount a cgroup.
    let sys_admin = engine.has_own_kernel().then_some("SYS_ADMIN");
    let capabilities: Vec<String> = CAPABILITIES
        .into_iter()
        .chain(sys_admin)
        .map(|capability| format!("CAP_{capability}"))
        .collect();
    let no_access = ["nosuid", "nodev", "noexec"];
    let image_mounts =
        tree.iter().flat_map(|tree| &tree.image_mounts).map(|(source, destination)| {
            json!({"destination": destination, "type": "bind", "source": source,
               "options": ["bind", "ro", "nosuid", "nodev"]})
        });
    let mut mounts: Vec<Value> = image_mounts.collect();
    mounts.extend([
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": no_access}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
               "options": ["nosuid", "strictatime", "mode=0755", "size=64k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
               "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620",
                           "gid=5"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs",
               "options": ["nosuid", "nodev", "noexec", "ro"]}),
    ]);
    let tmpfs = |path: &Path, mode: &str, owner: u32, bytes: u64| {
        let options = [
            "nosuid".to_owned(),
            "nodev".to_owned(),
            format!("mode={mode}"),
            format!("uid={owner}"),
            format!("gid={owner}"),
            format!("size={bytes}"),
        ];
        json!({"destination": path, "type": "tmpfs", "source": "tmpfs", "options": options})
    };
    for scratch in scratch_mounts(limits) {
        mounts.push(tmpfs(scratch.path.as_ref(), scratch.mode, scratch.owner, scratch.bytes));
    }
    let mut credentials = tmpfs(CREDENTIALS.as_ref(), "0755", 0, CREDENTIAL_BYTES);
    if let Some(options) = credentials["options"].as_array_mut() {
        options.push("noexec".into());
    }
    mounts.push(credentials);
    for mount_point in tree.iter().flat_map(|tree| &tree.mount_points) {
        let count = tree.map_or(0, |tree| tree.mount_points.len());
        mounts.push(tmpfs(mount_point, "0755", 0, read_only_mount_bytes(limits, count)));
    }
    let mut namespaces = vec!["pid", "mount", "network", "ipc", "uts", "user"];
    let mut memory = json!({"limit": limits.memory});
    if fs::read_to_string("/proc/swaps").is_ok_and(|swaps| swaps.lines().count() > 1) {
        memory["swap"] = limits.memory.into();
    }
    // The users of a container are neither the host's nor another container's. Those of gVisor are
    // its kernel and the process that opens files for it.
    let range = json!([{"containerID": 0, "hostID": first_user, "size": USERS}]);
    let mut linux = json!({
        "uidMappings": range,
        "gidMappings": range,
        "cgroupsPath": format!("/chitin/{name}"),
        "resources": {
            "memory": memory,
            "pids": {"limit": engine.host_tasks(limits.tasks)},
            "cpu": {"quota": u64::from(limits.vcpus) * 100_000, "period": 100_000},
        },
        "maskedPaths": MASKED,
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
    });
    // The filter that gVisor gives its own kernel is narrower than this one.
    if !engine.has_own_kernel() {
        namespaces.push("cgroup");
        linux["seccomp"] = seccomp_filter();
    }
    linux["namespaces"] = namespaces.into_iter().map(|kind| json!({"type": kind})).collect();
    Ok(json!({
        "ociVersion": "1.0.2",
        "hostname": HOST_NAME,
        "root": {"path": root.path(), "readonly": true},
        "mounts": mounts,
        "linux": linux,
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": argv,
            "env": ["PATH=/usr/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
            },
        },
    }))
}

/// Files of the host that a sandbox must not read: memory, keys, timers, firmware.
const MASKED: [&str; 10] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/scsi",
    "/proc/sched_debug",
    "/proc/sysrq-trigger",
    "/proc/timer_list",
    "/sys/firmware",
];

/// Returns the filter of a container that shares the host's kernel: the calls that neither the
/// agent nor a workload needs. The agent adds its own filter.
fn seccomp_filter() -> Value {
    // Namespaces, mounts, modules, and the calls that have been the most frequent entry points of
    // attacks on the kernel.
    let refused = vec![
        "add_key",
        "bpf",
        "delete_module",
        "finit_module",
        "fsconfig",
        "fsmount",
        "fsopen",
        "fspick",
        "init_module",
        "io_uring_enter",
        "io_uring_register",
        "io_uring_setup",
        "kcmp",
        "kexec_file_load",
        "kexec_load",
        "keyctl",
        "lookup_dcookie",
        "mount",
        "mount_setattr",
        "move_mount",
        "move_pages",
        "name_to_handle_at",
        "open_by_handle_at",
        "open_tree",
        "perf_event_open",
        "pivot_root",
        "quotactl",
        "reboot",
        "request_key",
        "setns",
        "swapoff",
        "swapon",
        "syslog",
        "umount",
        "umount2",
        "userfaultfd",
        "vhangup",
    ];
    // CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
    let new_namespaces: u64 = 0x7E02_0000;
    let has_flag = |bits: u64| {
        let op = "SCMP_CMP_MASKED_EQ";
        json!([{"index": 0, "value": bits, "valueTwo": bits, "op": op}])
    };
    let mut rules = vec![
        json!({"names": refused, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}),
        // Its flags are in memory, where no filter sees them. C libraries fall back to clone.
        json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}),
    ];
    for bit in 0..u64::BITS {
        let flag = new_namespaces & (1 << bit);
        if flag != 0 {
            rules.push(json!({"names": ["clone", "unshare"], "action": "SCMP_ACT_ERRNO",
                              "errnoRet": 1, "args": has_flag(flag)}));
        }
    }
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": rules,
    })
}

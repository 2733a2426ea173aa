//! An OCI bundle: what a runtime is told about one container.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

use super::engine::Engine;
use super::tree::Tree;
use crate::container::{CAPABILITIES, HOST_NAME, Limits, Owner, new_name, place_bytes, scratch};

const BUNDLES: &str = "/run/chitin/bundles";

/// In a bundle, the file that names the process that runs it.
const RUNTIME: &str = "runtime";

/// What a container is made of.
#[derive(Debug)]
pub(super) struct Content<'a> {
    /// The image, unpacked.
    pub root: &'a Path,
    pub limits: Limits,
    /// Directories that the agent can write to, and the workload cannot.
    pub places: &'a [PathBuf],
    /// What runs in it.
    pub argv: &'a [String],
}

/// A bundle's directory. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct Bundle {
    path: PathBuf,
    name: String,
    tree: Option<Tree>,
    /// As long as it is held the bundle has an owner.
    _lock: File,
}

impl Bundle {
    pub fn create(engine: &Engine, content: &Content<'_>) -> io::Result<Bundle> {
        let name = new_name().map_err(io::Error::other)?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(BUNDLES)?;
        // It gets its name when it has its lock, so that nobody takes it for one without an owner.
        let draft = Path::new(BUNDLES).join(format!(".{name}"));
        fs::create_dir(&draft)?;
        let lock = File::create(draft.join("lock"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        let full_name = format!("{}-{name}", engine.name);
        let path = Path::new(BUNDLES).join(&full_name);
        fs::rename(&draft, &path)?;
        let mut bundle = Bundle { path, name, tree: None, _lock: lock };
        if !content.places.is_empty() {
            bundle.tree = Some(Tree::create(&full_name, content.root, content.places)?);
        }
        let config = config(engine, &bundle.name, content, bundle.tree.as_ref())?;
        let spec: Spec = serde_json::from_value(config)?;
        spec.save(bundle.path.join("config.json")).map_err(io::Error::other)?;
        Ok(bundle)
    }

    /// Notes which process runs it, so that it can be ended if it hangs and nobody is there.
    pub fn note(&self, runtime: &Owner) -> io::Result<()> {
        fs::write(self.path.join(RUNTIME), runtime.to_string())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the container's root is of its own, and has to stay as long as it.
    pub fn has_tree(&self) -> bool {
        self.tree.is_some()
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        // First, because a bundle is what leads a sweep to it.
        self.tree = None;
        // What is left is swept by the next start.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The process that runs a bundle, if it still does.
fn runtime(bundle: &Path) -> Option<Owner> {
    let owner = Owner::parse(&fs::read_to_string(bundle.join(RUNTIME)).ok()?)?;
    (!owner.has_ended()).then_some(owner)
}

/// Removes what those have left who died while they started a container.
pub(crate) async fn sweep() {
    let Ok(entries) = fs::read_dir(BUNDLES) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(lock) = File::open(path.join("lock")) else { continue };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let name = entry.file_name();
        if let Some(runtime) = runtime(&path) {
            runtime.kill();
        }
        if let Some((engine, name)) = name.to_str().and_then(|name| name.split_once('-'))
            && let Some(engine) = Engine::named(engine)
        {
            // There may be none of that name.
            engine.delete(name).await;
        }
        Tree::remove(&name);
        let _ = fs::remove_dir_all(&path);
    }
}

/// Users of a container are none of the host's, nor of another container's: each gets one of 16,384 ranges that no
/// distribution hands out.
fn user_range() -> io::Result<u64> {
    let mut random = [0; 2];
    getrandom::fill(&mut random)?;
    Ok(0x4000_0000 + u64::from(u16::from_ne_bytes(random) & 0x3fff) * USERS)
}

/// Users in one.
const USERS: u64 = 65_536;

fn config(
    engine: &Engine,
    name: &str,
    &Content { root, limits, argv, .. }: &Content<'_>,
    tree: Option<&Tree>,
) -> io::Result<Value> {
    // In gVisor's kernel it is a right over nothing of the host's, and the agent's alone: with it the agent mounts a cgroup.
    let own = engine.has_own_kernel().then_some("SYS_ADMIN");
    let capabilities: Vec<String> =
        CAPABILITIES.into_iter().chain(own).map(|capability| format!("CAP_{capability}")).collect();
    let closed = ["nosuid", "nodev", "noexec"];
    let borrowed = tree.iter().flat_map(|tree| &tree.borrowed).map(|(source, destination)| {
        json!({"destination": destination, "type": "bind", "source": source, "options": ["bind", "ro", "nosuid", "nodev"]})
    });
    let mut mounts: Vec<Value> = borrowed.collect();
    mounts.extend([
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": closed}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
               "options": ["nosuid", "strictatime", "mode=0755", "size=64k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
               "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "nodev", "noexec", "ro"]}),
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
    for scratch in scratch(limits) {
        mounts.push(tmpfs(scratch.path.as_ref(), scratch.mode, scratch.owner, scratch.bytes));
    }
    for place in tree.iter().flat_map(|tree| &tree.places) {
        let places = tree.map_or(0, |tree| tree.places.len());
        mounts.push(tmpfs(place, "0755", 0, place_bytes(limits, places)));
    }
    let mut namespaces = vec!["pid", "mount", "network", "ipc", "uts"];
    let mut memory = json!({"limit": limits.memory});
    if fs::read_to_string("/proc/swaps").is_ok_and(|swaps| swaps.lines().count() > 1) {
        memory["swap"] = limits.memory.into();
    }
    let mut linux = json!({
        "cgroupsPath": format!("/chitin/{name}"),
        "resources": {
            "memory": memory,
            "pids": {"limit": engine.host_tasks(limits.tasks)},
            "cpu": {"quota": u64::from(limits.vcpus) * 100_000, "period": 100_000},
        },
        "maskedPaths": MASKED,
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
    });
    // gVisor's kernel is no user of the host's, and its own filter is narrower than this one.
    if !engine.has_own_kernel() {
        namespaces.extend(["user", "cgroup"]);
        let range = json!([{"containerID": 0, "hostID": user_range()?, "size": USERS}]);
        linux["uidMappings"] = range.clone();
        linux["gidMappings"] = range;
        linux["seccomp"] = seccomp();
    }
    linux["namespaces"] = namespaces.into_iter().map(|kind| json!({"type": kind})).collect();
    Ok(json!({
        "ociVersion": "1.0.2",
        "hostname": HOST_NAME,
        "root": {"path": tree.map_or(root, Tree::path), "readonly": true},
        "mounts": mounts,
        "linux": linux,
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": argv,
            "env": ["PATH=/usr/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        },
    }))
}

/// Of the host, and not for a sandbox to read: its memory, its keys, its timers, its firmware.
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

/// What neither the agent nor a workload needs of a kernel that is the host's. The agent's own filter comes on top of it.
fn seccomp() -> Value {
    // Namespaces, mounts, modules, and the calls that have most often been ways into the kernel.
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
    let has = |bits: u64| json!([{"index": 0, "value": bits, "valueTwo": bits, "op": "SCMP_CMP_MASKED_EQ"}]);
    let mut rules = vec![
        json!({"names": refused, "action": "SCMP_ACT_ERRNO", "errnoRet": 1}),
        // Its flags are in memory, where no filter sees them; C libraries go on with clone.
        json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}),
    ];
    for bit in 0..u64::BITS {
        let flag = new_namespaces & (1 << bit);
        if flag != 0 {
            rules.push(json!({"names": ["clone", "unshare"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": has(flag)}));
        }
    }
    json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": rules})
}

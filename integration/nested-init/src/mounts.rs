//! The file systems of the emulated host: the outer machine's tree under an overlay.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown, symlink};
use std::path::{Path, PathBuf};

use chitin_nested_init::{Launch, ROOT_TAG, share_tag};
use rustix::fs::CWD;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{chdir, chroot};

use crate::failure::{During, Result};

/// The size of reads of the 9p client: one request then carries a megabyte instead of a page.
const MSIZE: u32 = 1 << 20;

fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> Result<()> {
    let options = CString::new(options).during(|| format!("mount {target}"))?;
    mount(source, target, kind, flags, options.as_c_str())
        .during(|| format!("mount {kind} on {target}"))
}

fn create_dir(path: &str) -> Result<()> {
    fs::create_dir_all(path).during(|| format!("create {path}"))
}

/// Mounts `/dev`, `/proc` and `/sys`.
pub fn mount_kernel_file_systems() -> Result<()> {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        create_dir(target)?;
        mount_at(kind, target, kind, MountFlags::empty(), "")?;
    }
    Ok(())
}

/// Loads `/modules/*`, whose names sort in the order of dependencies.
pub fn load_modules() -> Result<()> {
    let entries = fs::read_dir("/modules").during(|| "list /modules".into())?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        let step = || format!("load {}", path.display());
        let module = File::open(&path).during(step)?;
        rustix::system::finit_module(&module, c"", 0).during(step)?;
    }
    Ok(())
}

/// Makes the outer machine's tree the root. Its files are visible; writes are discarded, except
/// below the shares.
pub fn enter_outer_tree(launch: &Launch) -> Result<()> {
    mount_layers(launch)?;
    for dir in ["/dev", "/proc", "/sys"] {
        let target = format!("/outer{dir}");
        create_dir(&target)?;
        mount_move(dir, target.as_str()).during(|| format!("move {dir}"))?;
    }
    mount_temporary_file_systems(Path::new(OsStr::from_bytes(&launch.cwd)))?;
    mount_shares(launch)?;
    // Every user may use KVM: every user may become root of this machine anyway.
    if Path::new("/outer/dev/kvm").exists() {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions("/outer/dev/kvm", fs::Permissions::from_mode(0o666))
            .during(|| "set the mode of /dev/kvm".into())?;
    }
    let step = || "make the outer tree the root".to_owned();
    chdir("/outer").during(step)?;
    mount_move("/outer", "/").during(step)?;
    chroot(".").during(step)?;
    chdir("/").during(step)
}

/// Mounts the outer tree on `/outer`, under an overlay in memory that has the preloaded files.
fn mount_layers(launch: &Launch) -> Result<()> {
    for dir in ["/lower", "/scratch", "/outer"] {
        create_dir(dir)?;
    }
    // "loose": the tree does not change meanwhile, so nothing is queried twice.
    let options = format!("trans=virtio,version=9p2000.L,msize={MSIZE},cache=loose");
    mount_at(ROOT_TAG, "/lower", "9p", MountFlags::RDONLY, &options)?;
    mount_at("tmpfs", "/scratch", "tmpfs", MountFlags::empty(), "size=75%,mode=0755")?;
    create_dir("/scratch/upper")?;
    create_dir("/scratch/work")?;
    for path in &launch.preload {
        let path = Path::new(OsStr::from_bytes(path));
        preload_file(path).during(|| format!("copy {} into memory", path.display()))?;
    }
    let layers = "lowerdir=/lower,upperdir=/scratch/upper,workdir=/scratch/work,xino=off";
    mount_at("overlay", "/outer", "overlay", MountFlags::empty(), layers)
}

fn mount_temporary_file_systems(cwd: &Path) -> Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    for (target, options) in
        [("/tmp", "mode=1777"), ("/run", "mode=0755"), ("/var/tmp", "mode=1777")]
    {
        // The command needs its directory; its writes there are discarded as well.
        if !cwd.starts_with(target) {
            let target = format!("/outer{target}");
            create_dir(&target)?;
            mount_at("tmpfs", &target, "tmpfs", flags, options)?;
        }
    }
    create_dir("/outer/dev/shm")?;
    mount_at("tmpfs", "/outer/dev/shm", "tmpfs", flags, "mode=1777")?;
    create_dir("/outer/dev/pts")?;
    let terminals = "ptmxmode=0666,mode=0620,gid=5";
    mount_at("devpts", "/outer/dev/pts", "devpts", MountFlags::empty(), terminals)?;
    mount_at("cgroup2", "/outer/sys/fs/cgroup", "cgroup2", MountFlags::empty(), "")
}

fn mount_shares(launch: &Launch) -> Result<()> {
    for (index, share) in launch.shares.iter().enumerate() {
        let target = format!("/outer{}", OsStr::from_bytes(share).to_string_lossy());
        create_dir(&target)?;
        // Without a cache every write has reached the outer machine when it returns: the host can
        // end this machine at any time. "mmap" caches only writable mappings, which SQLite and
        // linkers use.
        let options = format!("trans=virtio,version=9p2000.L,msize={MSIZE},cache=mmap");
        mount_at(&share_tag(index), &target, "9p", MountFlags::empty(), &options)?;
    }
    Ok(())
}

/// Copies one regular file or symbolic link of the outer tree into the upper layer, below
/// directories like the outer ones.
fn preload_file(path: &Path) -> io::Result<()> {
    let relative = path.strip_prefix("/").map_err(io::Error::other)?;
    let (lower, upper) = (Path::new("/lower"), Path::new("/scratch/upper"));
    let mut dir = PathBuf::new();
    for component in relative.parent().unwrap_or(Path::new("")).components() {
        dir.push(component);
        let target = upper.join(&dir);
        if !target.exists() {
            let like = fs::metadata(lower.join(&dir))?;
            fs::DirBuilder::new().mode(like.mode() & 0o7777).create(&target)?;
            chown(&target, Some(like.uid()), Some(like.gid()))?;
        }
    }
    let (from, to) = (lower.join(relative), upper.join(relative));
    let like = fs::symlink_metadata(&from)?;
    if like.is_symlink() {
        return symlink(fs::read_link(&from)?, &to);
    }
    fs::copy(&from, &to)?;
    chown(&to, Some(like.uid()), Some(like.gid()))?;
    fs::set_permissions(&to, like.permissions())?;
    // Build tools compare times.
    let time =
        |seconds, nanoseconds| rustix::fs::Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = rustix::fs::Timestamps {
        last_access: time(like.atime(), like.atime_nsec()),
        last_modification: time(like.mtime(), like.mtime_nsec()),
    };
    Ok(rustix::fs::utimensat(CWD, &to, &times, rustix::fs::AtFlags::empty())?)
}

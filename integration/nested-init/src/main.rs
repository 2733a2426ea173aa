//! PID 1 of the emulated KVM host.
//!
//! It is the whole user space of the initrd: loads the modules beside it, makes the outer machine's tree its root (9p,
//! read-only, under an overlay whose writes vanish), runs the one command of the [`Launch`] message, and reports how
//! that ended. The host then ends the machine. Anything that goes wrong before the command runs is a
//! [`Report::Failed`] and a line on the console.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use chitin_nested_init::{
    CONTROL_PORT, Launch, MAX_LAUNCH_LEN, NOT_EXECUTABLE, NOT_FOUND, ROOT_TAG, Report, STDERR_PORT,
    STDIN_PORT, STDOUT_PORT, share_tag,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::CWD;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{Resource, Rlimit, WaitOptions, chdir, chroot, setrlimit, wait};

/// The 9p client asks for reads of this size: one request then carries a megabyte instead of a page.
const MSIZE: u32 = 1 << 20;

/// An error that says what was being done, and the exit code it ends with.
struct Failure {
    code: u8,
    message: String,
}

type Result<T> = std::result::Result<T, Failure>;

/// Turns an error of the emulated host itself into a [`Failure`].
trait During<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: std::fmt::Display> During<T> for std::result::Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Failure { code: 125, message: format!("{}: {error}", what()) })
    }
}

fn main() {
    let outcome =
        kernel_file_systems().and_then(|()| load_modules()).and_then(|()| open_port(CONTROL_PORT));
    let mut control = match outcome {
        Ok(control) => control,
        // Without a control port the console is all there is; the kernel panics when PID 1 ends, which ends QEMU.
        Err(failure) => {
            eprintln!("nested-init: {}", failure.message);
            return;
        }
    };
    let report = match serve(&mut control) {
        Ok(report) => report,
        Err(Failure { code, message }) => {
            eprintln!("nested-init: {message}");
            Report::Failed { code, message }
        }
    };
    rustix::fs::sync();
    if writeln!(control, "{report}").is_err() {
        return;
    }
    // The host has everything and ends the machine. If it is gone instead, end it ourselves.
    thread::sleep(Duration::from_secs(30));
}

fn serve(control: &mut File) -> Result<Report> {
    let launch = read_launch(control)?;
    let (stdin, stdout, stderr) =
        (open_port(STDIN_PORT)?, open_port(STDOUT_PORT)?, open_port(STDERR_PORT)?);
    enter_outer_tree(&launch)?;
    loopback_up().during(|| "bring the loopback interface up".into())?;
    let nofile = Rlimit { current: Some(1024), maximum: Some(1 << 20) };
    setrlimit(Resource::Nofile, nofile).during(|| "raise the limit of open files".into())?;

    let mut child = start(&launch)?;
    let child_stdin: Option<OwnedFd> = child.stdin.take().map(Into::into);
    let (done_reader, done) = io::pipe().during(|| "create a pipe".into())?;
    let done_for_stderr = done_reader.try_clone().during(|| "duplicate a pipe".into())?;
    let out =
        child.stdout.take().map(|pipe| thread::spawn(move || pump(pipe, stdout, done_reader)));
    let err =
        child.stderr.take().map(|pipe| thread::spawn(move || pump(pipe, stderr, done_for_stderr)));
    writeln!(control, "{}", Report::Started).during(|| "write to the control port".into())?;
    let reader = control.try_clone().during(|| "duplicate the control port".into())?;
    thread::spawn(move || feed(reader, stdin, child_stdin));

    let code = wait_for(&child)?;
    drop(done);
    let count = |thread: Option<thread::JoinHandle<u64>>| {
        thread.and_then(|thread| thread.join().ok()).unwrap_or(0)
    };
    Ok(Report::Exited { code, stdout: count(out), stderr: count(err) })
}

fn read_launch(control: &mut File) -> Result<Launch> {
    let mut len = [0; 4];
    control.read_exact(&mut len).during(|| "read the launch message".into())?;
    let len = u32::from_le_bytes(len);
    if len > MAX_LAUNCH_LEN {
        return Err(Failure {
            code: 125,
            message: format!("a launch message of {len} bytes is too long"),
        });
    }
    let mut bytes = Vec::new();
    control
        .take(u64::from(len))
        .read_to_end_exact(&mut bytes, len)
        .during(|| "read the launch message".into())?;
    Launch::decode(&bytes).during(|| "read the launch message".into())
}

/// A port never reports end of file while the host is there, so reading stops at a length, not at an end.
trait ReadExactly {
    fn read_to_end_exact(self, bytes: &mut Vec<u8>, len: u32) -> io::Result<()>;
}

impl<R: Read> ReadExactly for R {
    fn read_to_end_exact(mut self, bytes: &mut Vec<u8>, len: u32) -> io::Result<()> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        bytes.resize(len, 0);
        self.read_exact(bytes)
    }
}

// ---- file systems ----

fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> Result<()> {
    let options = std::ffi::CString::new(options).during(|| format!("mount {target}"))?;
    mount(source, target, kind, flags, options.as_c_str())
        .during(|| format!("mount {kind} on {target}"))
}

fn make_dir(path: &str) -> Result<()> {
    fs::create_dir_all(path).during(|| format!("create {path}"))
}

fn kernel_file_systems() -> Result<()> {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        make_dir(target)?;
        mount_at(kind, target, kind, MountFlags::empty(), "")?;
    }
    Ok(())
}

/// Loads `/modules/*`, whose names sort in dependency order.
fn load_modules() -> Result<()> {
    let entries = fs::read_dir("/modules").during(|| "list /modules".into())?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        let what = || format!("load {}", path.display());
        let module = File::open(&path).during(what)?;
        rustix::system::finit_module(&module, c"", 0).during(what)?;
    }
    Ok(())
}

/// Opens the virtio-serial port of that name. Ports appear some time after the device.
fn open_port(name: &str) -> Result<File> {
    for _ in 0..1000 {
        if let Some(node) = find_port(name) {
            let path = Path::new("/dev").join(node);
            return OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .during(|| format!("open port {name}"));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Err(Failure { code: 125, message: format!("no virtio port {name} appeared within 5 s") })
}

fn find_port(name: &str) -> Option<std::ffi::OsString> {
    fs::read_dir("/sys/class/virtio-ports").ok()?.flatten().find_map(|entry| {
        let found = fs::read_to_string(entry.path().join("name")).ok()?;
        (found.trim_end() == name).then(|| entry.file_name())
    })
}

/// Makes the outer machine's tree our root: what it holds is seen, what is written vanishes, but for the shares.
fn enter_outer_tree(launch: &Launch) -> Result<()> {
    for dir in ["/lower", "/scratch", "/outer"] {
        make_dir(dir)?;
    }
    // "loose": the tree does not change while we look, so nothing is asked twice.
    let options = format!("trans=virtio,version=9p2000.L,msize={MSIZE},cache=loose");
    mount_at(ROOT_TAG, "/lower", "9p", MountFlags::RDONLY, &options)?;
    mount_at("tmpfs", "/scratch", "tmpfs", MountFlags::empty(), "size=75%,mode=0755")?;
    make_dir("/scratch/upper")?;
    make_dir("/scratch/work")?;
    for path in &launch.preload {
        let path = Path::new(OsStr::from_bytes(path));
        preload(path).during(|| format!("copy {} into memory", path.display()))?;
    }
    let layers = "lowerdir=/lower,upperdir=/scratch/upper,workdir=/scratch/work,xino=off";
    mount_at("overlay", "/outer", "overlay", MountFlags::empty(), layers)?;

    for dir in ["/dev", "/proc", "/sys"] {
        let target = format!("/outer{dir}");
        make_dir(&target)?;
        mount_move(dir, target.as_str()).during(|| format!("move {dir}"))?;
    }
    let cwd = Path::new(OsStr::from_bytes(&launch.cwd));
    for (target, options) in
        [("/tmp", "mode=1777"), ("/run", "mode=0755"), ("/var/tmp", "mode=1777")]
    {
        if cwd.starts_with(target) {
            // The command is to find its directory; what it writes there vanishes all the same.
            continue;
        }
        let target = format!("/outer{target}");
        make_dir(&target)?;
        mount_at("tmpfs", &target, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, options)?;
    }
    make_dir("/outer/dev/shm")?;
    mount_at(
        "tmpfs",
        "/outer/dev/shm",
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        "mode=1777",
    )?;
    make_dir("/outer/dev/pts")?;
    mount_at(
        "devpts",
        "/outer/dev/pts",
        "devpts",
        MountFlags::empty(),
        "ptmxmode=0666,mode=0620,gid=5",
    )?;
    mount_at("cgroup2", "/outer/sys/fs/cgroup", "cgroup2", MountFlags::empty(), "")?;
    for (index, share) in launch.shares.iter().enumerate() {
        let target = PathBuf::from(format!("/outer{}", OsStr::from_bytes(share).to_string_lossy()));
        fs::create_dir_all(&target).during(|| format!("create {}", target.display()))?;
        // Without a cache every write has reached the outer machine when it returns: nothing is lost when it ends us.
        // "mmap" caches only what is mapped writable, which SQLite and linkers do.
        let options = format!("trans=virtio,version=9p2000.L,msize={MSIZE},cache=mmap");
        mount_at(
            &share_tag(index),
            &target.to_string_lossy(),
            "9p",
            MountFlags::empty(),
            &options,
        )?;
    }
    // Everybody may use KVM, as everybody may become root of this machine.
    if Path::new("/outer/dev/kvm").exists() {
        fs::set_permissions("/outer/dev/kvm", fs::Permissions::from_mode(0o666))
            .during(|| "open /dev/kvm to all".into())?;
    }

    chdir("/outer").during(|| "enter the outer tree".into())?;
    mount_move("/outer", "/").during(|| "make the outer tree the root".into())?;
    chroot(".").during(|| "make the outer tree the root".into())?;
    chdir("/").during(|| "make the outer tree the root".into())
}

/// Copies one regular file or symbolic link of the outer tree into the upper layer, under directories like the outer ones.
fn preload(path: &Path) -> io::Result<()> {
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
    // Build tools compare times; keep them.
    let time =
        |seconds, nanoseconds| rustix::fs::Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = rustix::fs::Timestamps {
        last_access: time(like.atime(), like.atime_nsec()),
        last_modification: time(like.mtime(), like.mtime_nsec()),
    };
    Ok(rustix::fs::utimensat(CWD, &to, &times, rustix::fs::AtFlags::empty())?)
}

/// `ip link set lo up`.
fn loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: ifreq is plain old data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes()) {
        *to = from.cast_signed();
    }
    let up = libc::IFF_UP | libc::IFF_RUNNING;
    request.ifr_ifru.ifru_flags = i16::try_from(up).map_err(io::Error::other)?;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which `request` is and which outlives the call.
    let result = unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::SIOCSIFFLAGS as _,
            std::ptr::from_ref(&request),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

// ---- the command ----

fn start(launch: &Launch) -> Result<Child> {
    let cwd = Path::new(OsStr::from_bytes(&launch.cwd));
    if !cwd.is_dir() {
        let message = format!("{} is no directory on the emulated machine", cwd.display());
        return Err(Failure { code: 125, message });
    }
    let program = OsStr::from_bytes(&launch.argv[0]);
    let mut command = Command::new(program);
    command.args(launch.argv[1..].iter().map(|argument| OsStr::from_bytes(argument)));
    command.current_dir(cwd).env_clear();
    for variable in &launch.env {
        if let Some(at) = variable.iter().position(|&byte| byte == b'=') {
            command.env(OsStr::from_bytes(&variable[..at]), OsStr::from_bytes(&variable[at + 1..]));
        }
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    command.spawn().map_err(|error| Failure {
        code: if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE },
        message: format!("{}: {error}", program.display()),
    })
}

/// Reaps everything, as PID 1 must, until the command itself ends.
fn wait_for(child: &Child) -> Result<u8> {
    loop {
        let ended = match wait(WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.during(|| "wait for the command".into())?,
        };
        let Some((pid, status)) = ended else { continue };
        if u32::try_from(pid.as_raw_nonzero().get()).ok() != Some(child.id()) {
            continue;
        }
        let code = status.exit_status().or(status.terminating_signal().map(|signal| 128 + signal));
        return Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX));
    }
}

/// Copies output to its port until the pipe ends, or until it is empty and the command has ended (`done` hangs up): a
/// background process that still holds the pipe does not keep us. Returns the bytes copied.
fn pump(mut pipe: impl Read + AsFd, mut port: File, done: impl AsFd) -> u64 {
    // A port takes at most 32 KiB per write.
    let mut buffer = vec![0; 32 << 10];
    let mut total = 0;
    loop {
        let mut fds = [PollFd::new(&pipe, PollFlags::IN), PollFd::new(&done, PollFlags::IN)];
        if poll(&mut fds, None).is_err() {
            continue;
        }
        if fds[0].revents().is_empty() {
            return total;
        }
        match pipe.read(&mut buffer) {
            Ok(0) | Err(_) => return total,
            Ok(len) if port.write_all(&buffer[..len]).is_err() => return total,
            Ok(len) => total += len as u64,
        }
    }
}

/// Copies the stdin port to the command until the control port announces the end. Ends the machine when the host has
/// gone.
fn feed(mut control: File, mut stdin: File, sink: Option<OwnedFd>) {
    let mut sink = sink.map(File::from);
    let mut buffer = vec![0; 32 << 10];
    let (mut line, mut end, mut total) = (Vec::new(), None, 0u64);
    loop {
        if end == Some(total) {
            sink = None;
        }
        let mut fds = [PollFd::new(&control, PollFlags::IN), PollFd::new(&stdin, PollFlags::IN)];
        if poll(&mut fds, None).is_err() {
            continue;
        }
        let [control_events, stdin_events] = [fds[0].revents(), fds[1].revents()];
        if control_events.contains(PollFlags::IN) {
            let mut byte = [0];
            if matches!(control.read(&mut byte), Ok(1)) {
                if byte[0] == b'\n' {
                    let text = String::from_utf8_lossy(&line).into_owned();
                    end = text.strip_prefix("eof ").and_then(|count| count.parse().ok()).or(end);
                    line.clear();
                } else if line.len() < 64 {
                    line.push(byte[0]);
                }
                continue;
            }
        }
        if control_events.contains(PollFlags::HUP) {
            let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
            return;
        }
        if stdin_events.contains(PollFlags::IN) {
            let Ok(len) = stdin.read(&mut buffer) else { continue };
            total += len as u64;
            // A command that closed its stdin, or ended, must not stop the host from sending.
            if sink.as_mut().is_some_and(|sink| sink.write_all(&buffer[..len]).is_err()) {
                sink = None;
            }
        }
    }
}

//! A monitor in its jail, seen from outside: a guest of two instructions runs in it, on any `/dev/kvm`.
//!
//! To be run as a user who may open `/dev/kvm`; what only root can try is tried where root runs this.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use chitin_vmm::control::Message;
use chitin_vmm::jail::{IDENTITIES, Survey};
use chitin_vmm::{Event, VmSpec};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const MONITOR: &str = env!("CARGO_BIN_EXE_chitin-vmm");

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(20);

struct Socket(OwnedFd);

impl ScmSocket for Socket {
    fn socket_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// A monitor with a guest that waits for ever, and everything to talk to it.
struct Monitor {
    keeper: Child,
    control: Option<Socket>,
    /// The other end of the guest's channel.
    _channel: OwnedFd,
    _files: tempfile::TempDir,
}

fn pair(kind: i32) -> (OwnedFd, OwnedFd) {
    let mut fds = [-1; 2];
    // SAFETY: the array has room for two descriptors.
    assert_eq!(
        unsafe { libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) },
        0
    );
    // SAFETY: just made, and nobody else knows them.
    fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).into()
}

/// `hlt`, and again: with the interrupt controllers in KVM the vCPU sleeps there.
const SLEEP: [u8; 3] = [0xf4, 0xeb, 0xfd];

/// A guest of these instructions.
fn kernel(code: &[u8]) -> Vec<u8> {
    let mut elf = vec![0u8; 0x2000];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let fields = [
        (18, 62u64),
        (24, 1 << 20),
        (32, 64),
        (64, 1),
        (72, 0x1000),
        (88, 1 << 20),
        (96, 4096),
        (104, 4096),
    ];
    for (at, value) in fields {
        elf[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    (elf[54], elf[56]) = (56, 1);
    elf[0x1000..][..code.len()].copy_from_slice(code);
    elf
}

/// As much of an EROFS as a monitor looks at.
fn image() -> Vec<u8> {
    let mut image = vec![0u8; 2 << 20];
    image[1024..1028].copy_from_slice(&0xe0f5_e1e2u32.to_le_bytes());
    image[1024 + 12] = 12;
    image
}

impl Monitor {
    /// Starts one, and waits until its guest runs.
    fn start(change: impl FnOnce(&mut VmSpec), prepare: impl FnOnce(&mut Command)) -> Monitor {
        let mut monitor = Monitor::launch(&SLEEP, change, prepare);
        match monitor.event() {
            Message::Event(Event::Entered { .. }) => monitor,
            other => panic!("{other:?}"),
        }
    }

    fn launch(
        code: &[u8],
        change: impl FnOnce(&mut VmSpec),
        prepare: impl FnOnce(&mut Command),
    ) -> Monitor {
        let files = tempfile::tempdir().unwrap();
        let path = |name: &str, contents: &[u8]| {
            let path = files.path().join(name);
            fs::write(&path, contents).unwrap();
            path
        };
        let mut spec = VmSpec::new(path("kernel", &kernel(code)), path("image", &image()));
        spec.memory_mib = 64;
        change(&mut spec);
        let (control, theirs) = pair(libc::SOCK_SEQPACKET);
        let (channel, far) = pair(libc::SOCK_STREAM);
        let mut command = Command::new(MONITOR);
        command.stdin(theirs).stdout(Stdio::null()).stderr(Stdio::null());
        prepare(&mut command);
        let keeper = command.spawn().unwrap();
        let control = Socket(control);
        let json = serde_json::to_vec(&spec).unwrap();
        control.send_with_fds(&[json.as_slice()], &[far.as_raw_fd()]).unwrap();
        Monitor { keeper, control: Some(control), _channel: channel, _files: files }
    }

    fn event(&mut self) -> Message {
        let mut packet = vec![0; 1 << 16];
        let length = self.control.as_ref().unwrap().recv_with_fd(&mut packet).unwrap().0;
        assert_ne!(length, 0, "the monitor ended without a word");
        serde_json::from_slice(&packet[..length]).unwrap()
    }

    /// The process in the jail.
    fn inmate(&self) -> u32 {
        let children = format!("/proc/{0}/task/{0}/children", self.keeper.id());
        let text = fs::read_to_string(children).unwrap();
        text.trim().parse().unwrap_or_else(|_| panic!("not one child: {text:?}"))
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.control = None;
        let _ = self.keeper.wait();
    }
}

fn proc(pid: u32, name: &str) -> PathBuf {
    Path::new("/proc").join(pid.to_string()).join(name)
}

fn status(pid: u32) -> impl Fn(&str) -> String {
    let text = fs::read_to_string(proc(pid, "status")).unwrap();
    move |field| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{field}:")));
        line.unwrap_or_else(|| panic!("no {field}"))
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    }
}

fn is_root() -> bool {
    // SAFETY: no arguments.
    unsafe { libc::geteuid() == 0 }
}

fn plain(_: &mut VmSpec) {}
fn same(_: &mut Command) {}

/// Waits until a process is gone, or a zombie.
fn gone(pid: u32) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let stat = fs::read_to_string(proc(pid, "stat")).unwrap_or_default();
        let state = stat.rsplit_once(')').map_or("", |(_, rest)| rest.trim_start());
        if state.is_empty() || state.starts_with(['Z', 'X']) {
            return;
        }
        assert!(Instant::now() < deadline, "process {pid} is still there: {stat}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn it_has_no_capability_no_group_and_no_way_to_get_one() {
    let monitor = Monitor::start(plain, same);
    let status = status(monitor.inmate());
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(set), "0000000000000000", "{set}");
    }
    assert_eq!(status("NoNewPrivs"), "1");
    // The keeper may end it, and no more.
    let keeper = self::status(monitor.keeper.id());
    assert_eq!(keeper("CapEff"), if is_root() { "0000000000000020" } else { "0000000000000000" });
    if is_root() {
        assert_eq!(status("Groups"), "");
    }
}

#[test]
fn its_namespaces_are_its_own() {
    let monitors = [Monitor::start(plain, same), Monitor::start(plain, same)];
    let [one, other] = monitors.each_ref().map(Monitor::inmate);
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        let of = |pid: u32| fs::metadata(proc(pid, "ns").join(kind)).map(|meta| meta.ino());
        // Unless we are root an inmate's are hidden from us, and that is as good.
        if is_root() {
            let (one, other, ours) =
                (of(one).unwrap(), of(other).unwrap(), of(std::process::id()).unwrap());
            assert!(one != other && one != ours && other != ours, "{kind}");
        } else {
            assert!(of(one).is_err(), "{kind}");
        }
    }
    assert_eq!(status(one)("NSpid"), format!("{one} 1"), "the first process of its own world");
}

#[test]
fn two_monitors_of_root_are_two_users_and_those_of_a_user_are_that_user() {
    let monitors = [Monitor::start(plain, same), Monitor::start(plain, same)];
    let uids = monitors.each_ref().map(|monitor| {
        let status = status(monitor.inmate());
        // SAFETY: no arguments.
        let uid =
            if is_root() { IDENTITIES + monitor.keeper.id() } else { unsafe { libc::geteuid() } };
        let all = [uid; 4].map(|uid| uid.to_string()).join(" ");
        assert_eq!(status("Uid"), all);
        assert!(!is_root() || status("Gid") == all);
        uid
    });
    assert_eq!(uids[0] != uids[1], is_root());
}

#[test]
fn its_root_is_empty_and_stays_so() {
    let monitor = Monitor::start(plain, same);
    let root = proc(monitor.inmate(), "root");
    if !is_root() {
        fs::read_dir(root).unwrap_err();
        return;
    }
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    let error = File::create(root.join("x")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    let mounts = fs::read_to_string(proc(monitor.inmate(), "mountinfo")).unwrap();
    let [mount] = mounts.lines().collect::<Vec<_>>()[..] else { panic!("not one mount: {mounts}") };
    let fields: Vec<&str> = mount.split(' ').collect();
    assert_eq!((fields[3], fields[4]), ("/", "/"));
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        assert!(fields[5].split(',').any(|found| found == option), "no {option} in {mount}");
    }
    assert!(mount.contains(" - tmpfs "), "{mount}");
    assert_eq!(fs::read_link(proc(monitor.inmate(), "cwd")).unwrap(), Path::new("/"));
}

/// What every descriptor of a process is, as far as it is shown to us.
fn open(pid: u32) -> Vec<String> {
    let Ok(fds) = fs::read_dir(proc(pid, "fd")) else { return Vec::new() };
    fds.filter_map(|fd| Some(fs::read_link(fd.ok()?.path()).ok()?.to_string_lossy().into_owned()))
        .collect()
}

#[test]
fn what_was_left_open_is_closed_and_what_is_open_has_no_path() {
    let secret = tempfile::NamedTempFile::new().unwrap();
    let directory = File::open("/").unwrap();
    let leaked = [secret.as_file().as_raw_fd(), directory.as_raw_fd()];
    let monitor = Monitor::start(plain, |command| {
        // SAFETY: dup(2) is safe after a fork.
        unsafe {
            command.pre_exec(move || {
                // Without the flag that closes them.
                for fd in leaked {
                    libc::dup(fd);
                }
                Ok(())
            })
        };
    });
    for pid in [monitor.keeper.id(), monitor.inmate()] {
        let open = open(pid);
        assert_ne!(is_root(), open.is_empty());
        for fd in &open {
            // The image is a regular file that can only be read, and there is nothing to open it again with.
            let harmless = ["socket:", "pipe:", "anon_inode:", "/dev/null"]
                .iter()
                .any(|kind| fd.starts_with(kind));
            assert!(harmless || fd.ends_with("/image"), "{fd} in {open:?}");
        }
    }
}

#[test]
fn it_leaves_no_core_and_shows_nobody_its_memory() {
    let monitor = Monitor::start(plain, same);
    let inmate = monitor.inmate();
    let limits = fs::read_to_string(proc(inmate, "limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().take(2).map(|value| value.parse().unwrap()).collect::<Vec<u64>>()
    };
    assert_eq!(limit("Max core file size"), [0, 0]);
    assert_eq!(limit("Max file size"), [0, 0]);
    assert_eq!(limit("Max open files"), [64, 64]);
    assert_eq!(limit("Max locked memory"), [0, 0]);
    // Somebody else's, so its files are root's: it is undumpable.
    assert_eq!(fs::metadata(proc(inmate, "maps")).unwrap().uid(), 0);
    if is_root() {
        // The guest's memory is marked on top of that.
        let maps = fs::read_to_string(proc(inmate, "smaps")).unwrap();
        let (mut size, mut marked) = (0, 0);
        for line in maps.lines() {
            if let Some(kib) = line.strip_prefix("Size:") {
                size = kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
            }
            if line
                .strip_prefix("VmFlags:")
                .is_some_and(|flags| flags.split(' ').any(|flag| flag == "dd"))
            {
                marked += size;
            }
        }
        assert!(marked >= 64 << 10, "{marked} KiB are marked");
    }
}

#[test]
fn without_a_jail_there_is_none() {
    let monitor = Monitor::start(|spec| spec.jail = false, same);
    let status = status(monitor.keeper.id());
    assert_eq!(status("NSpid"), monitor.keeper.id().to_string());
    let children = fs::read_to_string(proc(
        monitor.keeper.id(),
        &format!("task/{}/children", monitor.keeper.id()),
    ));
    assert_eq!(children.unwrap(), "");
}

#[test]
fn it_ends_with_whoever_wanted_it_and_with_its_keeper() {
    let mut monitor = Monitor::start(plain, same);
    let inmate = monitor.inmate();
    monitor.control = None;
    assert!(monitor.keeper.wait().unwrap().success());
    // The keeper has waited for it.
    assert!(!proc(inmate, "stat").exists());

    let mut monitor = Monitor::start(plain, same);
    let inmate = monitor.inmate();
    monitor.keeper.kill().unwrap();
    monitor.keeper.wait().unwrap();
    gone(inmate);
}

#[test]
fn a_monitor_that_is_killed_is_told_of() {
    let mut monitor = Monitor::start(plain, same);
    let inmate = libc::pid_t::try_from(monitor.inmate()).unwrap();
    // SAFETY: a process of ours.
    unsafe { libc::kill(inmate, libc::SIGKILL) };
    match monitor.event() {
        Message::Event(Event::Failed { error }) => {
            assert!(error.contains("was killed (signal 9)"), "{error}")
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(monitor.keeper.wait().unwrap().code(), Some(1));
}

#[test]
fn a_signal_is_passed_on_and_ends_the_guest_in_good_order() {
    let mut monitor = Monitor::start(plain, same);
    let keeper = libc::pid_t::try_from(monitor.keeper.id()).unwrap();
    // SAFETY: a process of ours.
    unsafe { libc::kill(keeper, libc::SIGTERM) };
    let event = monitor.event();
    assert!(matches!(event, Message::Event(Event::Ended { .. })), "{event:?}");
    assert!(monitor.keeper.wait().unwrap().success());
}

#[test]
fn a_host_without_namespaces_is_refused_with_the_remedy() {
    // In a user namespace of its own, so that the setting is nobody else's.
    let forbid = "echo 0 >/proc/sys/user/max_user_namespaces && exec \"$0\" --jail";
    let output =
        Command::new("unshare").args(["-Ur", "sh", "-c", forbid, MONITOR]).output().unwrap();
    let survey: Survey =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    assert!(!survey.usable && survey.jail.is_none(), "{survey:?}");
    let reason = survey.reason.unwrap();
    assert!(
        reason.contains("user.max_user_namespaces") && reason.contains("--no-jail"),
        "{reason}"
    );
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn what_this_host_can_do_is_found_out_by_trying() {
    let output = Command::new(MONITOR).arg("--jail").output().unwrap();
    let survey: Survey = serde_json::from_slice(&output.stdout).unwrap();
    assert!(survey.usable && survey.reason.is_none(), "{survey:?}");
    assert_eq!(survey.jail.unwrap().uid.is_some(), is_root());
}

/// Has a guest ask for what no thread may do (`vmm/src/vm/seccomp_test_port.rs`); what is said of it.
fn tried(letter: u8, jail: bool) -> Option<String> {
    // mov edx, 0x7e0; mov al, letter; out dx, al; and sleep.
    let code = [&[0xba, 0xe0, 0x07, 0, 0, 0xb0, letter, 0xee], &SLEEP[..]].concat();
    let mut monitor = Monitor::launch(&code, |spec| spec.jail = jail, same);
    let until = Instant::now() + if jail { LIMIT } else { Duration::from_secs(1) };
    while Instant::now() < until {
        let mut poll = libc::pollfd {
            fd: monitor.control.as_ref().unwrap().0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid entry.
        if unsafe { libc::poll(&raw mut poll, 1, 100) } == 1 {
            match monitor.event() {
                Message::Event(Event::Entered { .. }) => {}
                Message::Event(Event::Failed { error }) => {
                    assert_eq!(monitor.keeper.wait().unwrap().code(), Some(1));
                    return Some(error);
                }
                other => panic!("{other:?}"),
            }
        }
    }
    None
}

#[test]
fn each_thread_is_ended_by_a_call_that_is_not_its_own_and_the_call_is_named() {
    for (letter, call) in [
        (b'S', "socket, number 41"),
        (b'O', "openat, number 257"),
        (b'E', "execve, number 59"),
        (b'X', "mmap, number 9"),
        (b'P', "mprotect, number 10"),
        (b'K', "ioctl, number 16"),
        (b'T', "ioctl, number 16"),
        (b'R', "kill, number 62"),
    ] {
        for (letter, thread) in
            [(letter, "vCPU thread"), (letter.to_ascii_lowercase(), "VMM thread")]
        {
            let error =
                tried(letter, true).unwrap_or_else(|| panic!("{call} of {thread} was let through"));
            let words = format!(
                "its filter forbids, and was ended; it said: {thread}: forbidden system call {call}"
            );
            assert!(error.contains(&words), "{error}");
        }
    }
}

#[test]
fn without_a_jail_it_is_let_through() {
    // That the test above sees filters, and not what happens anyway.
    for letter in [b'S', b's'] {
        assert_eq!(tried(letter, false), None);
    }
}

#[test]
fn every_thread_has_a_filter() {
    let monitor = Monitor::start(|spec| spec.vcpus = 3, same);
    let tasks = fs::read_dir(proc(monitor.inmate(), "task")).unwrap();
    let filtered: Vec<_> = tasks
        .map(|task| {
            fs::read_to_string(task.unwrap().path().join("status")).unwrap().contains("Seccomp:\t2")
        })
        .collect();
    assert!(filtered.len() >= 4 && filtered.iter().all(|filtered| *filtered), "{filtered:?}");
}

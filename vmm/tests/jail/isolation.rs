//! Isolation of the jailed process: rights, namespaces, files, memory.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use chitin_vmm::jail::{BASE_UID, Jail, JailSupport, JailUser, Protection};
use chitin_vmm::{EndReason, Event};
use rustix::process::Pid;
use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};

use crate::is_root;
use crate::monitor::{MONITOR, Monitor, proc_file, read_status};

#[test]
fn jailed_monitor_has_no_capabilities_or_groups() {
    let monitor = Monitor::start();
    let status = read_status(monitor.child_pid());
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(set), "0000000000000000", "{set}");
    }
    assert_eq!(status("NoNewPrivs"), "1");
    // The supervisor of root's monitor keeps the right to end its child, and no other.
    let supervisor = read_status(monitor.supervisor.id());
    let kept = if is_root() { "0000000000000020" } else { "0000000000000000" };
    assert_eq!(supervisor("CapEff"), kept);
    if is_root() {
        assert_eq!(status("Groups"), "");
    }
}

#[test]
fn each_monitor_has_separate_namespaces() {
    let monitors = [Monitor::start(), Monitor::start()];
    let [one, other] = monitors.each_ref().map(Monitor::child_pid);
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        let inode = |pid: u32| fs::metadata(proc_file(pid, "ns").join(kind)).map(|meta| meta.ino());
        // Only root may look at the namespaces of a child, which is isolation as well.
        if is_root() {
            let host = inode(std::process::id()).unwrap();
            let (one, other) = (inode(one).unwrap(), inode(other).unwrap());
            assert!(one != other && one != host && other != host, "{kind}");
        } else {
            assert!(inode(one).is_err(), "{kind}");
        }
    }
    let pids = read_status(one)("NSpid");
    assert_eq!(pids, format!("{one} 1"), "the child is the first process of its namespace");
}

#[test]
fn monitors_of_root_run_as_distinct_users() {
    let monitors = [Monitor::start(), Monitor::start()];
    let uids = monitors.each_ref().map(|monitor| {
        let status = read_status(monitor.child_pid());
        let uid = if is_root() {
            BASE_UID + monitor.supervisor.id()
        } else {
            rustix::process::geteuid().as_raw()
        };
        let all = [uid; 4].map(|uid| uid.to_string()).join(" ");
        assert_eq!(status("Uid"), all);
        assert!(!is_root() || status("Gid") == all);
        uid
    });
    assert_eq!(uids[0] != uids[1], is_root());
}

#[test]
fn root_directory_is_empty_and_read_only() {
    let monitor = Monitor::start();
    let root = proc_file(monitor.child_pid(), "root");
    if !is_root() {
        fs::read_dir(root).unwrap_err();
        return;
    }
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    let error = File::create(root.join("x")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    let mounts = fs::read_to_string(proc_file(monitor.child_pid(), "mountinfo")).unwrap();
    let [mount] = mounts.lines().collect::<Vec<_>>()[..] else { panic!("not one mount: {mounts}") };
    let fields: Vec<&str> = mount.split(' ').collect();
    assert_eq!((fields[3], fields[4]), ("/", "/"));
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        assert!(fields[5].split(',').any(|found| found == option), "no {option} in {mount}");
    }
    assert!(mount.contains(" - tmpfs "), "{mount}");
    assert_eq!(fs::read_link(proc_file(monitor.child_pid(), "cwd")).unwrap(), Path::new("/"));
}

/// Returns the targets of a process's descriptors; none if this user may not see them.
fn read_descriptors(pid: u32) -> Vec<String> {
    let Ok(fds) = fs::read_dir(proc_file(pid, "fd")) else { return Vec::new() };
    fds.filter_map(|fd| Some(fs::read_link(fd.ok()?.path()).ok()?.to_string_lossy().into_owned()))
        .collect()
}

#[test]
fn inherited_files_are_closed_and_none_has_a_path() {
    let secret = tempfile::NamedTempFile::new().unwrap();
    let directory = File::open("/").unwrap();
    let leaked = [secret.as_file().as_raw_fd(), directory.as_raw_fd()];
    let leak = |command: &mut Command| {
        // SAFETY: dup(2) may be called between fork and exec. The copies lack the flag that would
        // close them at exec.
        unsafe {
            command.pre_exec(move || {
                for fd in leaked {
                    libc::dup(fd);
                }
                Ok(())
            });
        }
    };
    let monitor = Monitor::start_with(|_| {}, leak);
    for pid in [monitor.supervisor.id(), monitor.child_pid()] {
        let open = read_descriptors(pid);
        assert_ne!(is_root(), open.is_empty());
        for fd in &open {
            // The image is a regular file that can only be read, and has no path inside the jail.
            let harmless = ["socket:", "pipe:", "anon_inode:", "/dev/null"]
                .iter()
                .any(|kind| fd.starts_with(kind));
            assert!(harmless || fd.ends_with("/image"), "{fd} in {open:?}");
        }
    }
}

#[test]
fn monitor_memory_is_undumpable_and_unreadable() {
    let monitor = Monitor::start();
    let child = monitor.child_pid();
    let limits = fs::read_to_string(proc_file(child, "limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().take(2).map(|value| value.parse().unwrap()).collect::<Vec<u64>>()
    };
    assert_eq!(limit("Max core file size"), [0, 0]);
    assert_eq!(limit("Max file size"), [0, 0]);
    assert_eq!(limit("Max open files"), [64, 64]);
    assert_eq!(limit("Max locked memory"), [0, 0]);
    // The files of an undumpable process belong to root, whoever runs it.
    assert_eq!(fs::metadata(proc_file(child, "maps")).unwrap().uid(), 0);
    if is_root() {
        // In addition, the guest's memory is excluded from dumps.
        let maps = fs::read_to_string(proc_file(child, "smaps")).unwrap();
        let (mut size, mut excluded) = (0, 0);
        for line in maps.lines() {
            if let Some(kib) = line.strip_prefix("Size:") {
                size = kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
            }
            if line
                .strip_prefix("VmFlags:")
                .is_some_and(|flags| flags.split(' ').any(|flag| flag == "dd"))
            {
                excluded += size;
            }
        }
        assert!(excluded >= 64 << 10, "{excluded} KiB are excluded");
    }
}

/// Starts a monitor and returns it with the jail that it reports.
fn start_reporting() -> (Monitor, Jail) {
    let mut monitor = Monitor::launch(&crate::monitor::SLEEP, |_| {}, |_| {});
    match monitor.receive_event() {
        Event::Entered { jail: Some(jail), .. } => (monitor, jail),
        other => panic!("{other:?}"),
    }
}

#[test]
fn speculation_is_restricted_as_reported() {
    let (monitor, jail) = start_reporting();
    let tasks = fs::read_dir(proc_file(monitor.child_pid(), "task")).unwrap();
    let mut threads = 0;
    for task in tasks {
        let thread: u32 = task.unwrap().file_name().to_str().unwrap().parse().unwrap();
        let status = read_status(thread);
        let speculation = jail.speculation;
        for (field, protection) in [
            ("Speculation_Store_Bypass", speculation.store_bypass),
            ("SpeculationIndirectBranch", speculation.indirect_branch),
        ] {
            let found = status(field);
            let expected: &[&str] = match protection {
                Protection::On => &[
                    "thread force mitigated",
                    "globally mitigated",
                    "conditional force disabled",
                    "always disabled",
                ],
                Protection::NotNeeded => &["not vulnerable", "unsupported", "not affected"],
                Protection::Unavailable => &["vulnerable", "always enabled", "unknown"],
            };
            assert!(expected.contains(&found.as_str()), "{field}: {found}, not {expected:?}");
        }
        threads += 1;
    }
    // The VMM thread and that of the vCPU.
    assert!(threads >= 2);
}

#[test]
fn monitors_share_no_core_as_reported() {
    let monitors = [start_reporting(), start_reporting()];
    let cookies = monitors.each_ref().map(|(monitor, jail)| {
        let pid = i32::try_from(monitor.child_pid()).ok().and_then(Pid::from_raw);
        let cookie = core_scheduling_cookie(pid.unwrap(), CoreSchedulingScope::Thread);
        match jail.speculation.core_scheduling {
            // Only root may read it.
            Protection::On if is_root() => Some(cookie.unwrap()),
            Protection::On => None,
            _ => {
                cookie.unwrap_err();
                None
            }
        }
    });
    if let [Some(one), Some(other)] = cookies {
        assert!(one != other && one != 0 && other != 0);
    }
}

#[test]
fn jail_without_a_dedicated_user_reports_it() {
    let (_monitor, jail) = start_reporting();
    assert_eq!(jail.user == JailUser::Dedicated, jail.uid.is_some());
    assert_eq!(jail.user == JailUser::Caller, !is_root());
    if !is_root() {
        return;
    }
    // Root of a user namespace that has one user of the host, as in many containers.
    let output = Command::new("unshare").args(["-Ur", MONITOR, "--jail"]).output().unwrap();
    let support: JailSupport =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    let jail = support.jail.unwrap();
    assert_eq!((jail.user, jail.uid), (JailUser::Root, None));
    assert!(jail.without.iter().any(|part| part.starts_with("a dedicated user")), "{jail:?}");
}

/// Returns the files of which a process has pages mapped, and the libraries of the program not.
pub fn mapped_files(monitor: &Monitor) -> Vec<String> {
    let maps = fs::read_to_string(proc_file(monitor.child_pid(), "maps")).unwrap();
    let paths = maps.lines().filter_map(|line| line.split_once('/').map(|(_, path)| path));
    let own = |path: &&str| {
        !path.ends_with("chitin-vmm") && !path.contains(".so") && !path.starts_with("[")
    };
    let mut files: Vec<_> = paths.filter(own).map(str::to_owned).collect();
    files.dedup();
    files
}

#[test]
fn private_memory_maps_no_file() {
    if !is_root() {
        return;
    }
    let has = |files: &[String], name: &str| files.iter().any(|path| path.ends_with(name));
    let shared = mapped_files(&Monitor::start());
    assert!(has(&shared, "/image") && has(&shared, "/kernel"), "{shared:?}");
    let private = mapped_files(&Monitor::start_with(|spec| spec.private_memory = true, |_| {}));
    assert!(!private.iter().any(|path| path.starts_with("tmp")), "{private:?}");
    assert!(!has(&private, "/image") && !has(&private, "/kernel"), "{private:?}");
}

#[test]
fn guest_has_no_performance_counters() {
    // xor ecx, ecx; rdpmc; then sleep. Without a counter 0 that is a fault, and a guest without
    // interrupt handlers resets.
    let code = [&b"\x31\xc9\x0f\x33"[..], &crate::monitor::SLEEP].concat();
    let mut monitor = Monitor::launch(&code, |_| {}, |_| {});
    let entered = monitor.receive_event();
    assert!(matches!(entered, Event::Entered { .. }), "{entered:?}");
    assert!(monitor.has_event_within(std::time::Duration::from_secs(5)), "the guest goes on");
    let ended = monitor.receive_event();
    assert!(matches!(ended, Event::Ended { reason: EndReason::Reset, .. }), "{ended:?}");
}

#[test]
fn unjailed_monitor_is_a_single_host_process() {
    let monitor = Monitor::start_with(|spec| spec.jail = false, |_| {});
    let pid = monitor.supervisor.id();
    assert_eq!(read_status(pid)("NSpid"), pid.to_string());
    let children = fs::read_to_string(proc_file(pid, &format!("task/{pid}/children")));
    assert_eq!(children.unwrap(), "");
}

#[test]
fn missing_namespaces_are_reported_with_remedy() {
    // The limit applies to a new user namespace, so that no other process is affected.
    let forbid = "echo 0 >/proc/sys/user/max_user_namespaces && exec \"$0\" --jail";
    let output =
        Command::new("unshare").args(["-Ur", "sh", "-c", forbid, MONITOR]).output().unwrap();
    let support: JailSupport =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    assert!(!support.usable && support.jail.is_none(), "{support:?}");
    let reason = support.reason.unwrap();
    for remedy in ["user.max_user_namespaces", "--no-jail"] {
        assert!(reason.contains(remedy), "{reason}");
    }
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn limits_of_the_caller_are_named_and_not_the_jail() {
    // Enough descriptors for a jail, but fewer than a monitor may have.
    for (files, usable) in [("32", true), ("16", true), ("10", false), ("7", false)] {
        let script = format!("ulimit -n {files} && exec \"$0\" --jail");
        let output = Command::new("bash").args(["-c", &script, MONITOR]).output().unwrap();
        let support: JailSupport =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        assert_eq!(support.usable, usable, "{files}: {support:?}");
        let reason = support.reason.unwrap_or_default();
        let named = format!("the limit of open files is {files}: raise it with `ulimit -n`");
        assert_eq!(reason.contains(&named), !usable, "{reason}");
        assert!(!reason.contains("AppArmor") && !reason.contains("--no-jail"), "{reason}");
    }
}

#[test]
fn jail_support_is_found_by_setting_one_up() {
    let output = Command::new(MONITOR).arg("--jail").output().unwrap();
    let support: JailSupport = serde_json::from_slice(&output.stdout).unwrap();
    assert!(support.usable && support.reason.is_none(), "{support:?}");
    assert_eq!(support.jail.unwrap().uid.is_some(), is_root());
}

//! The jail of the monitor as `chitin` uses it. Its inside is tested in `vmm/tests/jail/`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use chitin_integration::{
    Chitin, Running, binary_path, chitin, run, run_sh, workspace_dir, write_file,
};
use rustix::process::{Pid, Signal, kill_process};

/// A UID that is unused on every host of these tests.
const USER: &str = "12345";

/// Reads a field of `/proc/PID/status`.
fn read_status(process: &Path, field: &str) -> String {
    let text = fs::read_to_string(process.join("status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{field}:")));
    line.unwrap_or_else(|| panic!("no {field} in {text}"))
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// Returns the processes of `chitin`, the supervisor and the jailed monitor.
fn run_processes(running: &Running) -> [PathBuf; 3] {
    let mut processes = running.list_processes();
    processes.sort_by_key(|process| read_status(process, "Pid").parse::<u32>().unwrap());
    let processes: [PathBuf; 3] = processes.try_into().unwrap();
    let [cli, supervisor, monitor] = &processes;
    assert_eq!(read_status(supervisor, "PPid"), read_status(cli, "Pid"));
    assert_eq!(read_status(monitor, "PPid"), read_status(supervisor, "Pid"));
    assert_eq!(read_status(monitor, "NSpid").split(' ').count(), 2, "in a PID namespace");
    processes
}

fn kill_by_path(process: &Path, signal: Signal) {
    let pid = read_status(process, "Pid").parse().ok().and_then(Pid::from_raw).unwrap();
    kill_process(pid, signal).unwrap();
}

#[test]
fn killing_any_process_ends_the_others() {
    for victim in 0..3 {
        let mut running = run_sh("echo up; sleep 600").spawn();
        assert_eq!(running.read_line(), "up");
        let processes = run_processes(&running);
        kill_by_path(&processes[victim], Signal::KILL);
        let code = running.wait();
        assert_eq!(code, if victim == 0 { 137 } else { 125 }, "victim {victim}");
        running.assert_no_process_left();
    }
}

#[test]
fn killed_monitor_is_reported() {
    let mut running = run_sh("echo up; sleep 600").spawn();
    assert_eq!(running.read_line(), "up");
    let [_, _, monitor] = run_processes(&running);
    kill_by_path(&monitor, Signal::KILL);
    assert_eq!(running.wait(), 125);
    let stderr = running.read_stderr();
    assert!(stderr.contains("killed (signal 9)"), "{stderr}");
}

#[test]
fn template_copy_runs_in_same_jail() {
    let dir = tempfile::tempdir().unwrap();
    let chitin = |args: &str| chitin(args).env("CHITIN_TEMPLATES", dir.path());
    chitin("template build t --memory 128").outcome().assert_success();
    let mut running = chitin("run --template t -- sh -c").arg("echo up; sleep 600").spawn();
    assert_eq!(running.read_line(), "up");
    let [_, _, monitor] = run_processes(&running);
    assert_eq!(read_status(&monitor, "CapEff"), "0000000000000000");
    assert_eq!(fs::read_dir(monitor.join("root")).unwrap().count(), 0);
    kill_by_path(&monitor, Signal::KILL);
    running.wait();
    running.assert_no_process_left();
}

#[test]
fn jail_is_shown_in_report_and_doctor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    let report = || serde_json::from_slice::<serde_json::Value>(&fs::read(&path).unwrap()).unwrap();

    let outcome = chitin("run --report").arg(&path).args(["--", "true"]).outcome();
    assert_eq!((outcome.assert_success(), outcome.stderr.as_str()), ("", ""));
    assert_eq!(report()["jail"]["on"], true);
    assert!(report()["jail"]["uid"].as_u64().unwrap() >= 0x7000_0000, "{}", report()["jail"]);
    assert_eq!(report()["jail"]["user"], "dedicated");
    for name in ["core_scheduling", "store_bypass", "indirect_branch"] {
        let state = report()["jail"]["speculation"][name].clone();
        assert!(["on", "not_needed", "unavailable"].iter().any(|known| state == *known), "{state}");
    }

    let outcome = chitin("run --no-jail --report").arg(&path).args(["--", "true"]).outcome();
    outcome.assert_success();
    assert!(outcome.stderr.starts_with("chitin: WARNING: --no-jail: "), "{outcome:?}");
    assert_eq!(report()["jail"], serde_json::json!({ "on": false }));

    let doctor = chitin("doctor --json").outcome();
    let found: serde_json::Value = serde_json::from_str(doctor.assert_success()).unwrap();
    assert!(found["jail"]["without"].is_array(), "{found}");
    assert!(chitin("doctor").outcome().assert_success().contains("ok jail "));
}

#[test]
fn limits_of_the_shell_are_named_and_not_the_jail() {
    let limited = |limit: &str| {
        let script = format!("ulimit {limit} && exec \"$0\" \"$@\"");
        let words = ["bash", "-c", &script].map(OsStr::new);
        chitin("run -- echo hello").run_through(&words).outcome()
    };
    for (limit, must_fail) in [("-n 32", false), ("-n 14", true)] {
        let outcome = limited(limit);
        if must_fail || outcome.code != 0 {
            outcome.assert_refused("raise it with `ulimit -n`");
        }
        for innocent in ["AppArmor", "--no-jail"] {
            assert!(!outcome.stderr.contains(innocent), "{outcome:?}");
        }
    }
}

/// Returns the pages of files that a monitor maps, apart from program and libraries.
fn mapped_files(monitor: &Path) -> String {
    let maps = fs::read_to_string(monitor.join("maps")).unwrap();
    let own =
        |line: &&str| line.contains('/') && !line.contains("chitin-vmm") && !line.contains(".so");
    maps.lines().filter(own).collect::<Vec<_>>().join("\n")
}

#[test]
fn private_memory_shares_no_file_page() {
    let dir = tempfile::tempdir().unwrap();
    let chitin = |args: &str| chitin(args).env("CHITIN_TEMPLATES", dir.path());
    chitin("template build t --memory 128").outcome().assert_success();
    let script = "python3 -c 'print(6 * 7)'; sleep 600";
    for (args, files) in [
        ("run", &["vmlinux", "root.img"] as &[&str]),
        ("run --template t", &["memory", "root.img"]),
    ] {
        for private in [false, true] {
            let option = if private { "--private-memory" } else { "" };
            let mut running = chitin(&format!("{args} {option} -- sh -c")).arg(script).spawn();
            assert_eq!(running.read_line(), "42");
            let [_, _, monitor] = run_processes(&running);
            let mapped = mapped_files(&monitor);
            for file in files {
                assert_eq!(mapped.contains(file), !private, "{args} {file}: {mapped}");
            }
            kill_by_path(&monitor, Signal::KILL);
            running.wait();
            running.assert_no_process_left();
        }
    }
}

#[test]
fn root_without_other_users_is_warned() {
    // Root of a user namespace that has one user of the host, as in many containers.
    let words = ["unshare", "-Ur"].map(std::ffi::OsStr::new);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    let run = chitin("run --report").arg(&path).args(["--", "true"]).run_through(&words);
    let outcome = run.outcome();
    outcome.assert_success();
    assert!(outcome.stderr.starts_with("chitin: WARNING: the jail has no dedicated user"));
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(report["jail"]["user"], "root");
    assert!(report["jail"]["without"].to_string().contains("a dedicated user"), "{report}");
    let doctor = chitin("doctor").run_through(&words).outcome();
    assert!(doctor.assert_success().contains("works: root, "), "{doctor:?}");
}

#[test]
fn without_jail_monitor_is_one_process() {
    let mut running = chitin("run --no-jail -- sh -c").arg("echo up; sleep 600").spawn();
    assert_eq!(running.read_line(), "up");
    assert_eq!(running.list_processes().len(), 2, "chitin and its monitor");
    kill_process(Pid::from_child(&running.child), Signal::KILL).unwrap();
    running.wait();
    running.assert_no_process_left();
}

#[test]
fn missing_namespaces_are_reported_with_remedy() {
    // The limit applies to a separate user namespace, so that other tests are not affected.
    let limited = |args: &str| {
        let forbid = "echo 0 >/proc/sys/user/max_user_namespaces && exec \"$0\" \"$@\"";
        let unshare = ["unshare", "-Ur", "sh", "-c", forbid].map(OsStr::new);
        chitin(args).run_through(&unshare).outcome()
    };
    let refused = limited("run -- echo hello");
    refused.assert_refused("user.max_user_namespaces");
    assert!(refused.stderr.contains("--no-jail"), "{refused:?}");
    assert_eq!(limited("run --no-jail -- echo hello").assert_success(), "hello");
    let doctor = limited("doctor");
    assert_eq!(doctor.code, 1);
    assert!(doctor.stdout_text().contains("NO jail "), "{doctor:?}");
}

/// The binaries and artifacts in a directory that an unprivileged user can read.
struct ReadableInstall(tempfile::TempDir);

impl ReadableInstall {
    fn create() -> ReadableInstall {
        let dir = tempfile::tempdir().unwrap();
        let open =
            |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        open(dir.path());
        let artifacts = workspace_dir().join("target/artifacts");
        let files = [
            artifacts.join("vmlinux"),
            artifacts.join("root.img"),
            binary_path("chitin"),
            binary_path("chitin-vmm"),
        ];
        for file in files {
            let copy = dir.path().join(file.file_name().unwrap());
            fs::copy(file, &copy).unwrap();
            open(&copy);
        }
        ReadableInstall(dir)
    }

    /// Makes a `chitin` run as that user, with these files.
    fn as_user(&self, mut chitin: Chitin) -> Chitin {
        let command = chitin.command();
        let args: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let dir = command.get_current_dir().unwrap().to_owned();
        // The user owns the directory of the run.
        std::os::unix::fs::chown(&dir, USER.parse().ok(), USER.parse().ok()).unwrap();
        let mut setpriv = setpriv_to_user();
        setpriv.arg(self.0.path().join("chitin")).args(args).current_dir(dir);
        *command = setpriv;
        chitin.env("CHITIN_ARTIFACTS", self.0.path())
    }
}

/// Returns the command that runs another one as that user, without capabilities.
fn setpriv_to_user() -> Command {
    let mut command = Command::new("setpriv");
    command.args([&format!("--reuid={USER}"), &format!("--regid={USER}"), "--clear-groups"]);
    command.args(["--bounding-set=-all", "--inh-caps=-all"]);
    command
}

#[test]
fn unprivileged_user_gets_same_jail() {
    let install = ReadableInstall::create();
    let mut running = install.as_user(run_sh("echo up; sleep 600")).spawn();
    assert_eq!(running.read_line(), "up");
    let [_, supervisor, monitor] = run_processes(&running);
    assert_eq!(read_status(&monitor, "Uid"), [USER; 4].join(" "));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(read_status(&monitor, set), "0000000000000000", "{set}");
    }
    assert_eq!(read_status(&monitor, "NoNewPrivs"), "1");
    assert_eq!(fs::read_dir(monitor.join("root")).unwrap().count(), 0);
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        let of = |process: &Path| fs::read_link(process.join("ns").join(kind)).unwrap();
        assert_ne!(of(&monitor), of(&supervisor), "{kind}");
    }
    // A process of the same user cannot inspect the monitor, and can inspect a dumpable process.
    let can_inspect = |process: &str| {
        let script =
            format!("head -c 1 /proc/{process}/environ >/dev/null && : 3<>/proc/{process}/mem");
        setpriv_to_user().args(["sh", "-c", &script]).output().unwrap().status.success()
    };
    assert!(can_inspect("self"));
    for process in [&supervisor, &monitor] {
        assert!(!can_inspect(&read_status(process, "Pid")), "{process:?}");
    }
    kill_by_path(&monitor, Signal::KILL);
    assert_eq!(running.wait(), 125);
    running.assert_no_process_left();

    let outcome = install.as_user(run("sh -c").arg("echo out; exit 3")).outcome();
    assert_eq!((outcome.code, outcome.stdout_text()), (3, "out"), "{outcome:?}");
}

#[test]
fn inherited_descriptors_do_not_reach_monitor() {
    let dir = tempfile::tempdir().unwrap();
    let secret = write_file(dir.path(), "secret", "x").unwrap();
    let shell = ["sh", "-c", "exec 8<\"$0\" 9</; exec \"$@\"", &secret].map(OsStr::new);
    let mut running = run_sh("echo up; sleep 600").run_through(&shell).spawn();
    assert_eq!(running.read_line(), "up");
    let [cli, supervisor, monitor] = run_processes(&running);
    let open = |process: &Path| {
        let fds = fs::read_dir(process.join("fd")).unwrap();
        fds.map(|fd| fs::read_link(fd.unwrap().path()).unwrap()).collect::<Vec<_>>()
    };
    assert!(open(&cli).contains(&secret.clone().into()), "chitin inherits the descriptor");
    for process in [&supervisor, &monitor] {
        for fd in open(process) {
            assert!(fd != Path::new("/") && fd != Path::new(&secret), "{process:?} has {fd:?}");
        }
    }
    kill_by_path(&cli, Signal::KILL);
    running.wait();
    running.assert_no_process_left();
}

#[test]
fn monitor_cgroup_sets_limits_and_is_removed() {
    // Root gets a cgroup in the emulated host, and on every host with cgroup v2 only.
    let groups = || {
        let entries = fs::read_dir("/sys/fs/cgroup/chitin").unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("vm-")).collect::<Vec<_>>()
    };
    let mut running = chitin("run --memory 128 -- sh -c").arg("echo up; sleep 600").spawn();
    assert_eq!(running.read_line(), "up");
    let [_, supervisor, monitor] = run_processes(&running);
    let name = format!("vm-{}", read_status(&supervisor, "Pid"));
    let group = Path::new("/sys/fs/cgroup/chitin").join(&name);
    let read = |file: &str| fs::read_to_string(group.join(file)).unwrap().trim().to_owned();
    assert_eq!(
        fs::read_to_string(monitor.join("cgroup")).unwrap().trim(),
        format!("0::/chitin/{name}")
    );
    assert_eq!(read("memory.max"), ((128 + 2 + 64) << 20).to_string());
    assert_eq!((read("cpu.max").as_str(), read("pids.max").as_str()), ("200000 100000", "3"));
    assert_eq!(read("cgroup.procs").lines().count(), 1, "the supervisor is in the cgroup");
    kill_by_path(&monitor, Signal::KILL);
    running.wait();
    running.assert_no_process_left();
    assert!(!groups().contains(&name));

    // A killed supervisor cannot remove the cgroup; the next one does.
    let mut running = run_sh("echo up; sleep 600").spawn();
    assert_eq!(running.read_line(), "up");
    let [_, supervisor, _] = run_processes(&running);
    let name = format!("vm-{}", read_status(&supervisor, "Pid"));
    kill_by_path(&supervisor, Signal::KILL);
    running.wait();
    running.assert_no_process_left();
    assert!(groups().contains(&name), "the killed supervisor left its cgroup");
    let (outcome, report) = chitin("run").outcome_with_json("--report", &["--", "true"]);
    outcome.assert_success();
    assert!(!groups().contains(&name));
    assert!(
        report["jail"]["cgroup"].as_str().unwrap().starts_with("/sys/fs/cgroup/chitin/vm-"),
        "{report}"
    );
    assert_eq!(report["jail"]["without"], serde_json::json!([]));
}

/// A cgroup delegated to that user, with a child cgroup to start from, as systemd creates them.
/// Dropping it removes both.
struct DelegatedCgroup(PathBuf);

impl DelegatedCgroup {
    fn create() -> DelegatedCgroup {
        let top = Path::new("/sys/fs/cgroup");
        let delegated = DelegatedCgroup(top.join(format!("user-{}", std::process::id())));
        let enable = |dir: &Path| {
            fs::write(dir.join("cgroup.subtree_control"), "+cpu +memory +pids").unwrap()
        };
        enable(top);
        fs::create_dir(&delegated.0).unwrap();
        enable(&delegated.0);
        fs::create_dir(delegated.shell()).unwrap();
        for dir in [&delegated.0, &delegated.shell()] {
            for file in ["", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
                std::os::unix::fs::chown(dir.join(file), USER.parse().ok(), USER.parse().ok())
                    .unwrap();
            }
        }
        delegated
    }

    /// Returns the child cgroup of the user's processes.
    fn shell(&self) -> PathBuf {
        self.0.join("shell")
    }

    /// Lists the other child cgroups.
    fn list_others(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.is_dir() && *path != self.shell()).collect()
    }
}

impl Drop for DelegatedCgroup {
    fn drop(&mut self) {
        for path in [self.shell(), self.0.clone()] {
            let _ = fs::remove_dir(path);
        }
    }
}

/// Makes a `chitin` start in that cgroup.
fn start_in_cgroup(group: &Path, chitin: Chitin) -> Chitin {
    let enter = ["sh", "-c", "echo $$ >\"$0\"/cgroup.procs && exec \"$@\""].map(OsStr::new);
    chitin.run_through(&[&enter[..], &[group.as_os_str()]].concat())
}

/// Starts a run of that user in a cgroup, which writes a report when its input ends.
fn start_reporting(install: &ReadableInstall, group: &Path) -> Running {
    let run = chitin("run --memory 128 --report report.json -- sh -c").arg("echo up; cat");
    let mut running = start_in_cgroup(group, install.as_user(run)).spawn();
    assert_eq!(running.read_line(), "up");
    running
}

/// Ends such a run, and returns the report's part about the jail.
fn end_reporting(mut running: Running) -> serde_json::Value {
    drop(running.child.stdin.take());
    assert_eq!(running.wait(), 0);
    running.assert_no_process_left();
    let report = fs::read(running.dir().join("report.json")).unwrap();
    serde_json::from_slice::<serde_json::Value>(&report).unwrap()["jail"].clone()
}

#[test]
fn delegated_cgroup_sets_limits_its_lack_is_reported() {
    let install = ReadableInstall::create();
    let delegated = DelegatedCgroup::create();

    let running = start_reporting(&install, &delegated.shell());
    let [cli, supervisor, monitor] = run_processes(&running);
    assert_eq!(read_status(&monitor, "Uid"), [USER; 4].join(" "));
    let group = delegated.0.join(format!("vm-{}", read_status(&supervisor, "Pid")));
    assert_eq!(delegated.list_others(), std::slice::from_ref(&group));
    let read = |file: &str| fs::read_to_string(group.join(file)).unwrap().trim().to_owned();
    assert_eq!(read("memory.max"), ((128 + 2 + 64) << 20).to_string());
    assert_eq!((read("cpu.max").as_str(), read("pids.max").as_str()), ("200000 100000", "3"));
    assert_eq!(read("memory.swap.max"), "0");
    // The monitor alone is charged to the cgroup.
    assert_eq!(read("cgroup.procs"), read_status(&monitor, "Pid"));
    assert!(read("memory.current").parse::<u64>().unwrap() > 4 << 20);
    for outside in [&cli, &supervisor] {
        let path = fs::read_to_string(outside.join("cgroup")).unwrap();
        assert!(path.trim().ends_with("/shell"), "{path}");
    }
    let jail = end_reporting(running);
    assert_eq!(jail["cgroup"], group.to_str().unwrap(), "{jail}");
    assert_eq!(jail["without"], serde_json::json!([]));
    assert_eq!(delegated.list_others(), Vec::<PathBuf>::new());

    // A cgroup that belongs to root.
    let kept = Path::new("/sys/fs/cgroup").join(format!("kept-{}", std::process::id()));
    fs::create_dir(&kept).unwrap();
    let running = start_reporting(&install, &kept);
    let [_, _, monitor] = run_processes(&running);
    assert_eq!(
        fs::read_to_string(monitor.join("cgroup")).unwrap().trim().rsplit('/').next(),
        kept.file_name().and_then(OsStr::to_str)
    );
    let jail = end_reporting(running);
    fs::remove_dir(&kept).unwrap();
    assert_eq!(jail["cgroup"], serde_json::Value::Null);
    let without = jail["without"][0].as_str().unwrap();
    assert!(
        without.starts_with("limits of a control group (") && without.contains("Permission denied"),
        "{jail}"
    );
}

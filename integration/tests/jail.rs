//! The jail around the monitor, as `chitin` uses it. What the inside of one is like is tested in `vmm/tests/jail.rs`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use chitin_integration::{Running, binary, chitin, run, sh, workspace};
use rustix::process::{Pid, Signal, kill_process};

/// Nobody's number on any host of ours.
const USER: &str = "12345";

/// A field of `/proc/PID/status`.
fn status(process: &Path, field: &str) -> String {
    let text = fs::read_to_string(process.join("status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{field}:")));
    line.unwrap_or_else(|| panic!("no {field} in {text}"))
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// `chitin`, its keeper and its inmate.
fn family(running: &Running) -> [PathBuf; 3] {
    let mut processes = running.processes();
    processes.sort_by_key(|process| status(process, "Pid").parse::<u32>().unwrap());
    let family: [PathBuf; 3] = processes.try_into().unwrap();
    let [cli, keeper, inmate] = &family;
    assert_eq!(status(keeper, "PPid"), status(cli, "Pid"));
    assert_eq!(status(inmate, "PPid"), status(keeper, "Pid"));
    assert_eq!(status(inmate, "NSpid").split(' ').count(), 2, "in a jail");
    family
}

fn kill(process: &Path, signal: Signal) {
    let pid = status(process, "Pid").parse().ok().and_then(Pid::from_raw).unwrap();
    kill_process(pid, signal).unwrap();
}

#[test]
fn whoever_is_killed_takes_the_rest_with_them() {
    for victim in 0..3 {
        let mut running = sh("echo up; sleep 600").spawn();
        assert_eq!(running.line(), "up");
        let family = family(&running);
        kill(&family[victim], Signal::KILL);
        let code = running.wait();
        assert_eq!(code, if victim == 0 { 137 } else { 125 }, "victim {victim}");
        running.assert_nothing_left();
    }
}

#[test]
fn a_monitor_that_was_killed_is_told_of() {
    let mut running = sh("echo up; sleep 600").spawn();
    assert_eq!(running.line(), "up");
    let [_, _, inmate] = family(&running);
    kill(&inmate, Signal::KILL);
    assert_eq!(running.wait(), 125);
    let mut stderr = String::new();
    std::io::Read::read_to_string(running.child.stderr.as_mut().unwrap(), &mut stderr).unwrap();
    assert!(stderr.contains("killed (signal 9)"), "{stderr}");
}

#[test]
fn with_a_copy_of_a_template_it_is_no_different() {
    let dir = tempfile::tempdir().unwrap();
    let with = |args: &str| chitin(args).env("CHITIN_TEMPLATES", dir.path());
    with("template build t --memory 128").outcome().ok();
    let mut running = with("run --template t -- sh -c").arg("echo up; sleep 600").spawn();
    assert_eq!(running.line(), "up");
    let [_, _, inmate] = family(&running);
    assert_eq!(status(&inmate, "CapEff"), "0000000000000000");
    assert_eq!(fs::read_dir(inmate.join("root")).unwrap().count(), 0);
    kill(&inmate, Signal::KILL);
    running.wait();
    running.assert_nothing_left();
}

#[test]
fn the_report_and_the_doctor_tell_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    let report = || serde_json::from_slice::<serde_json::Value>(&fs::read(&path).unwrap()).unwrap();

    let outcome = chitin("run --report").arg(&path).args(["--", "true"]).outcome();
    assert_eq!((outcome.ok(), outcome.stderr.as_str()), ("", ""));
    assert_eq!(report()["jail"]["on"], true);
    assert!(report()["jail"]["uid"].as_u64().unwrap() >= 0x7000_0000, "{}", report()["jail"]);

    let outcome = chitin("run --no-jail --report").arg(&path).args(["--", "true"]).outcome();
    outcome.ok();
    assert!(outcome.stderr.starts_with("chitin: WARNING: --no-jail: "), "{outcome:?}");
    assert_eq!(report()["jail"], serde_json::json!({ "on": false }));

    let doctor = chitin("doctor --json").outcome();
    let found: serde_json::Value = serde_json::from_str(doctor.ok()).unwrap();
    assert!(found["jail"]["without"].is_array(), "{found}");
    assert!(chitin("doctor").outcome().ok().contains("ok jail "));
}

#[test]
fn without_a_jail_the_monitor_is_one_process_of_this_world() {
    let mut running = chitin("run --no-jail -- sh -c").arg("echo up; sleep 600").spawn();
    assert_eq!(running.line(), "up");
    assert_eq!(running.processes().len(), 2, "chitin and its monitor");
    kill_process(Pid::from_child(&running.child), Signal::KILL).unwrap();
    running.wait();
    running.assert_nothing_left();
}

#[test]
fn a_host_that_has_no_namespaces_is_refused_and_told_what_to_do() {
    // The limit is that of a user namespace of its own, so that nobody else notices.
    let limited = |args: &str| {
        let mut chitin = chitin(args);
        let forbid = "echo 0 >/proc/sys/user/max_user_namespaces && exec \"$0\" \"$@\"";
        let command = chitin.command();
        let args: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let dir = command.get_current_dir().unwrap().to_owned();
        let mut unshare = Command::new("unshare");
        unshare
            .args(["-Ur", "sh", "-c", forbid])
            .arg(command.get_program())
            .args(args)
            .current_dir(dir);
        *command = unshare;
        chitin.outcome()
    };
    let refused = limited("run -- echo hello");
    refused.refused("user.max_user_namespaces");
    assert!(refused.stderr.contains("--no-jail"), "{refused:?}");
    assert_eq!(limited("run --no-jail -- echo hello").ok(), "hello");
    let doctor = limited("doctor");
    assert_eq!(doctor.code, 1);
    assert!(doctor.text().contains("NO jail "), "{doctor:?}");
}

/// Everything `chitin` needs, where a user without rights can read it.
struct Place(tempfile::TempDir);

impl Place {
    fn make() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let open =
            |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        open(dir.path());
        let artifacts = workspace().join("target/artifacts");
        let files = [
            artifacts.join("vmlinux"),
            artifacts.join("root.img"),
            binary("chitin"),
            binary("chitin-vmm"),
        ];
        for file in files {
            let copy = dir.path().join(file.file_name().unwrap());
            fs::copy(file, &copy).unwrap();
            open(&copy);
        }
        Place(dir)
    }

    /// Makes a `chitin` one of that user.
    fn as_user(&self, mut chitin: chitin_integration::Chitin) -> chitin_integration::Chitin {
        let command = chitin.command();
        let args: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let dir = command.get_current_dir().unwrap().to_owned();
        // The directory of the run is that user's.
        std::os::unix::fs::chown(&dir, USER.parse().ok(), USER.parse().ok()).unwrap();
        let mut setpriv = user();
        setpriv.arg(self.0.path().join("chitin")).args(args).current_dir(dir);
        *command = setpriv;
        chitin.env("CHITIN_ARTIFACTS", self.0.path())
    }
}

/// Runs something as that user.
fn user() -> Command {
    let mut command = Command::new("setpriv");
    command.args([&format!("--reuid={USER}"), &format!("--regid={USER}"), "--clear-groups"]);
    command.args(["--bounding-set=-all", "--inh-caps=-all"]);
    command
}

#[test]
fn a_user_without_rights_has_the_same_jail() {
    let place = Place::make();
    let mut running = place.as_user(sh("echo up; sleep 600")).spawn();
    assert_eq!(running.line(), "up");
    let [_, keeper, inmate] = family(&running);
    assert_eq!(status(&inmate, "Uid"), [USER; 4].join(" "));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(&inmate, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(&inmate, "NoNewPrivs"), "1");
    assert_eq!(fs::read_dir(inmate.join("root")).unwrap().count(), 0);
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        let of = |process: &Path| fs::read_link(process.join("ns").join(kind)).unwrap();
        assert_ne!(of(&inmate), of(&keeper), "{kind}");
    }
    // A sibling of the same user cannot look into it, and can into a process that does not mind.
    let look = |process: &str| {
        let script =
            format!("head -c 1 /proc/{process}/environ >/dev/null && : 3<>/proc/{process}/mem");
        user().args(["sh", "-c", &script]).output().unwrap().status.success()
    };
    assert!(look("self"));
    for process in [&keeper, &inmate] {
        assert!(!look(&status(process, "Pid")), "{process:?}");
    }
    kill(&inmate, Signal::KILL);
    assert_eq!(running.wait(), 125);
    running.assert_nothing_left();

    let outcome = place.as_user(run("sh -c").arg("echo out; exit 3")).outcome();
    assert_eq!((outcome.code, outcome.text()), (3, "out"), "{outcome:?}");
}

#[test]
fn what_the_host_left_open_does_not_reach_the_monitor() {
    let dir = tempfile::tempdir().unwrap();
    let secret = chitin_integration::file(dir.path(), "secret", "x").unwrap();
    let mut chitin = sh("echo up; sleep 600");
    let command = chitin.command();
    let args: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let cwd = command.get_current_dir().unwrap().to_owned();
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec 8<\"$0\" 9</; exec \"$@\"", &secret]);
    shell.arg(command.get_program()).args(args).current_dir(cwd);
    *command = shell;
    let mut running = chitin.spawn();
    assert_eq!(running.line(), "up");
    let [cli, keeper, inmate] = family(&running);
    let open = |process: &Path| {
        let fds = fs::read_dir(process.join("fd")).unwrap();
        fds.map(|fd| fs::read_link(fd.unwrap().path()).unwrap()).collect::<Vec<_>>()
    };
    assert!(open(&cli).contains(&secret.clone().into()), "the test leaves it open");
    for process in [&keeper, &inmate] {
        for fd in open(process) {
            assert!(fd != Path::new("/") && fd != Path::new(&secret), "{process:?} has {fd:?}");
        }
    }
    kill(&cli, Signal::KILL);
    running.wait();
    running.assert_nothing_left();
}

#[test]
fn a_control_group_limits_it_and_goes_with_it() {
    // In the emulated host, and on any whose control groups are all of version 2, root gets one.
    let groups = || {
        let entries = fs::read_dir("/sys/fs/cgroup/chitin").unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("vm-")).collect::<Vec<_>>()
    };
    let mut running = chitin("run --memory 128 -- sh -c").arg("echo up; sleep 600").spawn();
    assert_eq!(running.line(), "up");
    let [_, keeper, inmate] = family(&running);
    let name = format!("vm-{}", status(&keeper, "Pid"));
    let group = Path::new("/sys/fs/cgroup/chitin").join(&name);
    let read = |file: &str| fs::read_to_string(group.join(file)).unwrap().trim().to_owned();
    assert_eq!(
        fs::read_to_string(inmate.join("cgroup")).unwrap().trim(),
        format!("0::/chitin/{name}")
    );
    assert_eq!(read("memory.max"), ((128 + 2 + 64) << 20).to_string());
    assert_eq!((read("cpu.max").as_str(), read("pids.max").as_str()), ("200000 100000", "3"));
    assert_eq!(read("cgroup.procs").lines().count(), 1, "the keeper is not in it");
    kill(&inmate, Signal::KILL);
    running.wait();
    running.assert_nothing_left();
    assert!(!groups().contains(&name));

    // A keeper that is killed cannot; the next one does it.
    let mut running = sh("echo up; sleep 600").spawn();
    assert_eq!(running.line(), "up");
    let [_, keeper, _] = family(&running);
    let name = format!("vm-{}", status(&keeper, "Pid"));
    kill(&keeper, Signal::KILL);
    running.wait();
    running.assert_nothing_left();
    assert!(groups().contains(&name), "the test has made one that is left");
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report.json");
    chitin("run --report").arg(&report).args(["--", "true"]).outcome().ok();
    assert!(!groups().contains(&name));
    let report: serde_json::Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    assert!(
        report["jail"]["cgroup"].as_str().unwrap().starts_with("/sys/fs/cgroup/chitin/vm-"),
        "{report}"
    );
    assert_eq!(report["jail"]["without"], serde_json::json!([]));
}

/// A control group that was handed to that user, with one in it to start from, as systemd does for each user. Dropping it
/// removes it.
struct Delegated(PathBuf);

impl Delegated {
    fn make() -> Delegated {
        let top = Path::new("/sys/fs/cgroup");
        let delegated = Delegated(top.join(format!("user-{}", std::process::id())));
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

    /// Where the user's processes are.
    fn shell(&self) -> PathBuf {
        self.0.join("shell")
    }

    fn groups(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.is_dir() && *path != self.shell()).collect()
    }
}

impl Drop for Delegated {
    fn drop(&mut self) {
        for path in [self.shell(), self.0.clone()] {
            let _ = fs::remove_dir(path);
        }
    }
}

/// Starts it in that group.
fn within(group: &Path, chitin: chitin_integration::Chitin) -> chitin_integration::Chitin {
    let enter = ["sh", "-c", "echo $$ >\"$0\"/cgroup.procs && exec \"$@\""].map(OsStr::new);
    chitin.by(&[&enter[..], &[group.as_os_str()]].concat())
}

#[test]
fn a_user_with_a_group_of_its_own_gets_limits_and_one_without_is_told() {
    let place = Place::make();
    let delegated = Delegated::make();
    let start = |group: &Path| {
        let run = chitin("run --memory 128 --report report.json -- sh -c").arg("echo up; cat");
        let mut running = within(group, place.as_user(run)).spawn();
        assert_eq!(running.line(), "up");
        running
    };
    let end = |mut running: Running| {
        drop(running.child.stdin.take());
        assert_eq!(running.wait(), 0);
        running.assert_nothing_left();
        let report = fs::read(running.dir().join("report.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&report).unwrap()["jail"].clone()
    };

    let running = start(&delegated.shell());
    let [cli, keeper, inmate] = family(&running);
    assert_eq!(status(&inmate, "Uid"), [USER; 4].join(" "));
    let group = delegated.0.join(format!("vm-{}", status(&keeper, "Pid")));
    assert_eq!(delegated.groups(), std::slice::from_ref(&group));
    let read = |file: &str| fs::read_to_string(group.join(file)).unwrap().trim().to_owned();
    assert_eq!(read("memory.max"), ((128 + 2 + 64) << 20).to_string());
    assert_eq!((read("cpu.max").as_str(), read("pids.max").as_str()), ("200000 100000", "3"));
    assert_eq!(read("memory.swap.max"), "0");
    // It is counted there, and nobody else is.
    assert_eq!(read("cgroup.procs"), status(&inmate, "Pid"));
    assert!(read("memory.current").parse::<u64>().unwrap() > 4 << 20);
    for outside in [&cli, &keeper] {
        let path = fs::read_to_string(outside.join("cgroup")).unwrap();
        assert!(path.trim().ends_with("/shell"), "{path}");
    }
    let jail = end(running);
    assert_eq!(jail["cgroup"], group.to_str().unwrap(), "{jail}");
    assert_eq!(jail["without"], serde_json::json!([]));
    assert_eq!(delegated.groups(), Vec::<PathBuf>::new());

    // One that root keeps for itself.
    let kept = Path::new("/sys/fs/cgroup").join(format!("kept-{}", std::process::id()));
    fs::create_dir(&kept).unwrap();
    let running = start(&kept);
    let [_, _, inmate] = family(&running);
    assert_eq!(
        fs::read_to_string(inmate.join("cgroup")).unwrap().trim().rsplit('/').next(),
        kept.file_name().and_then(OsStr::to_str)
    );
    let jail = end(running);
    fs::remove_dir(&kept).unwrap();
    assert_eq!(jail["cgroup"], serde_json::Value::Null);
    let without = jail["without"][0].as_str().unwrap();
    assert!(
        without.starts_with("limits of a control group (") && without.contains("Permission denied"),
        "{jail}"
    );
}

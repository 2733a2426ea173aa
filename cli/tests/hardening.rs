//! The process of the command line keeps its memory, which holds secrets, to itself.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A user without rights, where root runs the tests: root may read any process.
const NOBODY: u32 = 65534;

struct KilledAtEnd(Child);

impl Drop for KilledAtEnd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

fn command_as_user(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

/// Starts `chitin` where that user can execute it. It waits for a policy.
fn start_waiting(dir: &Path) -> KilledAtEnd {
    fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
    let (program, policy) = (dir.join("chitin"), dir.join("policy.yaml"));
    fs::copy(env!("CARGO_BIN_EXE_chitin"), &program).unwrap();
    assert!(Command::new("mkfifo").args(["-m", "666"]).arg(&policy).status().unwrap().success());
    let child = command_as_user(&program)
        .args(["policy", "check"])
        .arg(&policy)
        .env("TOKEN", "canary-in-the-environment")
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let child = KilledAtEnd(child);
    let deadline = Instant::now() + Duration::from_secs(20);
    let stat = format!("/proc/{}/stat", child.0.id());
    // Until it sleeps in the open of the pipe.
    while !fs::read_to_string(&stat).unwrap().contains(") S ") {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn process_is_undumpable_and_unreadable() {
    let dir = tempfile::tempdir().unwrap();
    let chitin = start_waiting(dir.path());
    let proc = format!("/proc/{}", chitin.0.id());
    // The files of an undumpable process belong to root, whoever runs it.
    for file in ["mem", "environ", "maps"] {
        assert_eq!(fs::metadata(format!("{proc}/{file}")).unwrap().uid(), 0, "{file}");
        let read = command_as_user("head").args(["-c1"]).arg(format!("{proc}/{file}")).output();
        let read = read.unwrap();
        assert!(!read.status.success() && read.stdout.is_empty(), "{file}: {read:?}");
    }
    let limits = fs::read_to_string(format!("{proc}/limits")).unwrap();
    let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().take(2).collect::<Vec<_>>(), ["0", "0"]);
}

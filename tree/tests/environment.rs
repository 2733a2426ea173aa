//! Full and read-only file systems, missing permissions, many files, deep trees.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use chitin_tree::{Error, SendOptions, receive, send};
use common::{Tree, describe_tree, host, names, received, sent};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use rustix::process::geteuid;
use tempfile::tempdir;

/// A tmpfs of 1 MiB, unmounted on drop.
struct SmallTmpfs<'a>(&'a Path);

impl<'a> SmallTmpfs<'a> {
    fn mount(at: &'a Path) -> Option<SmallTmpfs<'a>> {
        match mount("tmpfs", at, "tmpfs", MountFlags::empty(), Some(c"size=1m")) {
            Ok(()) => Some(SmallTmpfs(at)),
            Err(error @ (Errno::PERM | Errno::ACCESS)) => {
                eprintln!(
                    "skipped: mounting a small file system needs root and CAP_SYS_ADMIN: {error}"
                );
                None
            }
            Err(error) => panic!("mount: {error}"),
        }
    }
}

impl Drop for SmallTmpfs<'_> {
    fn drop(&mut self) {
        let _ = unmount(self.0, UnmountFlags::DETACH);
    }
}

/// Returns the path of an error of the file system, which must have this number.
fn failed_path(error: &Error, errno: Errno) -> &Path {
    match error {
        Error::Filesystem { path, source, .. }
            if source.raw_os_error() == Some(errno.raw_os_error()) =>
        {
            path
        }
        other => panic!("{other}: {other:?}"),
    }
}

#[test]
fn full_file_system_keeps_old_file() {
    let dir = tempdir().unwrap();
    let Some(small) = SmallTmpfs::mount(dir.path()) else { return };
    fs::write(small.0.join("a"), "old").unwrap();
    let large = vec![1; 2 << 20];
    let error = received(&Tree::new().file("", &large), &small.0.join("a")).unwrap_err();
    assert_eq!(failed_path(&error, Errno::NOSPC), small.0.join("a"));
    assert_eq!(error.to_string(), format!("write {}", small.0.join("a").display()));
    assert_eq!(fs::read(small.0.join("a")).unwrap(), b"old");
    assert_eq!(names(small.0), ["a"]);

    let tree = Tree::new().directory("").file("b", "fits").file("c", &large).end();
    let error = received(&tree, &small.0.join("d")).unwrap_err();
    assert_eq!(failed_path(&error, Errno::NOSPC), small.0.join("d/c"));
    assert_eq!(names(&small.0.join("d")), ["b"]);
}

#[test]
fn read_only_file_system_is_reported_with_path() {
    let dir = tempdir().unwrap();
    let Some(small) = SmallTmpfs::mount(dir.path()) else { return };
    fs::create_dir(small.0.join("d")).unwrap();
    mount_remount(small.0, MountFlags::RDONLY, "").unwrap();
    for (tree, at) in [
        (Tree::new().file("", "x"), "a"),
        (Tree::new().directory("").end(), "a"),
        (Tree::new().directory("").file("f", "").end(), "d"),
    ] {
        let error = received(&tree, &small.0.join(at)).unwrap_err();
        assert!(failed_path(&error, Errno::ROFS).starts_with(small.0.join(at)));
        assert!(error.to_string().starts_with("create "), "{error}");
    }
    // A tree without new entries succeeds.
    received(&Tree::new().directory("").end(), &small.0.join("d")).unwrap();
}

/// Runs the named test as the user nobody. Returns true in the run without root.
fn run_as_nobody(test: &str) -> bool {
    const NOBODY: u32 = 65534;
    if !geteuid().is_root() {
        return true;
    }
    // The user nobody has no access to the directory of the test binary.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let program = dir.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let mut command = Command::new(program);
    command.args(["--exact", test, "--nocapture"]).current_dir("/").uid(NOBODY).gid(NOBODY);
    match command.status() {
        Ok(status) => assert!(status.success(), "{test} failed as nobody"),
        Err(error) => eprintln!("skipped: cannot become nobody: {error}"),
    }
    false
}

#[test]
fn permission_error_names_the_file() {
    if !run_as_nobody("permission_error_names_the_file") {
        return;
    }
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mode =
        |name: &str, mode| fs::set_permissions(path(name), Permissions::from_mode(mode)).unwrap();
    fs::create_dir_all(path("from/sub")).unwrap();
    fs::write(path("from/sub/secret"), "x").unwrap();
    mode("from/sub/secret", 0o000);
    let error = send(path("from"), std::io::sink(), &SendOptions::host()).unwrap_err();
    assert_eq!(failed_path(&error, Errno::ACCESS), path("from/sub/secret"));
    assert_eq!(error.to_string(), format!("open {}", path("from/sub/secret").display()));
    mode("from/sub/secret", 0o400);
    mode("from/sub", 0o311);
    let error = send(path("from"), std::io::sink(), &SendOptions::host()).unwrap_err();
    assert_eq!(failed_path(&error, Errno::ACCESS), path("from/sub"));
    mode("from/sub", 0o755);

    // Modes that lock out the receiver itself are set last.
    let tree = Tree::new()
        .directory_mode("", 0o555)
        .file("a", "x")
        .directory_mode("none", 0o000)
        .file("b", "y")
        .end()
        .end();
    received(&tree, &path("to")).unwrap();
    assert_eq!(path("to/none").metadata().unwrap().permissions().mode() & 0o777, 0);
    mode("to/none", 0o700);
    assert_eq!(fs::read(path("to/none/b")).unwrap(), b"y");

    // The destination may be entered and written to, but not listed.
    fs::create_dir(path("blind")).unwrap();
    mode("blind", 0o300);
    received(&Tree::new().directory("").file("a", "x").end(), &path("blind")).unwrap();
    // The destination may not be written to.
    let error = received(&Tree::new().directory("").file("c", "x").end(), &path("to")).unwrap_err();
    assert_eq!(failed_path(&error, Errno::ACCESS), path("to/c"));
    let error = receive(sent(&path("to/a")).as_slice(), "/chitin-test", &host()).unwrap_err();
    failed_path(&error, Errno::ACCESS);
    mode("to", 0o755);
    mode("blind", 0o700);
}

#[test]
fn many_small_files_copy_in_linear_time() {
    const DIRECTORIES: usize = 10;
    const FILES: usize = 500;
    let dir = tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    for i in 0..DIRECTORIES {
        let sub = from.join(format!("{i}"));
        fs::create_dir_all(&sub).unwrap();
        for j in 0..FILES {
            fs::write(sub.join(format!("file {j}")), format!("{i} {j}")).unwrap();
        }
        symlink("file 0", sub.join("link")).unwrap();
    }
    let begun = Instant::now();
    let bytes = sent(&from);
    let sending = begun.elapsed();
    let summary = receive(bytes.as_slice(), &to, &host()).unwrap();
    eprintln!(
        "{} files: sent in {sending:?}, received in {:?}",
        summary.files,
        begun.elapsed() - sending
    );
    assert_eq!(summary.files, (DIRECTORIES * FILES) as u64);
    // The limit is hundreds of times the usual duration: it detects a quadratic algorithm, not a
    // slow disk.
    assert!(begun.elapsed().as_secs() < 100, "{:?}", begun.elapsed());
    assert_eq!(describe_tree(&from), describe_tree(&to));
}

#[test]
fn deepest_tree_fits_small_stack() {
    let dir = tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::create_dir_all(from.join("d/".repeat(127))).unwrap();
    let small = std::thread::Builder::new().stack_size(128 << 10);
    let copied = small.spawn(move || {
        let bytes = sent(&from);
        receive(bytes.as_slice(), &to, &host()).unwrap()
    });
    assert_eq!(copied.unwrap().join().unwrap().directories, 128);
}

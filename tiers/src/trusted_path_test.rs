use std::fs::{File, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};

use super::*;

/// A user that owns nothing.
const STRANGER: u32 = 54_321;

fn owners() -> Vec<u32> {
    vec![rustix::process::geteuid().as_raw()]
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn create_file(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    File::create(&path).unwrap();
    set_mode(&path, 0o644);
    path
}

/// Checks a file that belongs to another user: one that root gave away, or this user's own if only
/// root's files are trusted.
fn check_file_of_stranger(path: &Path) -> Result<(), UntrustedPath> {
    match chown(path, Some(STRANGER), None) {
        Ok(()) => check_trusted_path(path, Path::new(""), &owners()),
        Err(_) => check_trusted_path(path, Path::new(""), &[]),
    }
}

#[test]
fn own_file_in_own_directory_is_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let file = create_file(dir.path(), "file");
    check_trusted_path(&file, Path::new(""), &owners()).unwrap();
    check_trusted_path(Path::new("/bin/sh"), Path::new(""), &[]).unwrap();
}

#[test]
fn file_that_others_can_write_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = create_file(dir.path(), "file");
    set_mode(&file, 0o666);
    let error = check_trusted_path(&file, Path::new(""), &owners()).unwrap_err();
    assert!(matches!(error.reason, UntrustedReason::Mode { mode: 0o666 }));
    assert_eq!(error.path, file);
}

#[test]
fn directory_that_others_can_write_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("open")).unwrap();
    fs::create_dir(dir.path().join("open/own")).unwrap();
    let file = create_file(&dir.path().join("open/own"), "file");
    set_mode(&dir.path().join("open"), 0o777);
    let error = check_trusted_path(&file, Path::new(""), &owners()).unwrap_err();
    assert!(matches!(error.reason, UntrustedReason::Mode { mode: 0o777 }));
    assert_eq!(error.path, dir.path().join("open"));
    // As in /tmp, where users cannot replace the files of others.
    set_mode(&dir.path().join("open"), 0o1777);
    check_trusted_path(&file, Path::new(""), &owners()).unwrap();
}

#[test]
fn file_of_another_user_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = create_file(dir.path(), "file");
    let error = check_file_of_stranger(&file).unwrap_err();
    assert!(matches!(error.reason, UntrustedReason::Owner { .. }));
}

#[test]
fn trusted_owner_is_named_by_the_caller() {
    let dir = tempfile::tempdir().unwrap();
    let file = create_file(dir.path(), "file");
    let owner = match chown(&file, Some(STRANGER), None) {
        Ok(()) => STRANGER,
        Err(_) => owners()[0],
    };
    check_trusted_path(&file, Path::new(""), &[owner, owners()[0]]).unwrap();
}

#[test]
fn link_into_open_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["open", "own"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    create_file(&dir.path().join("open"), "file");
    let link = dir.path().join("own/link");
    symlink("../open/file", &link).unwrap();
    check_trusted_path(&link, Path::new(""), &owners()).unwrap();
    // Also as one of several links, and back to a closed directory.
    set_mode(&dir.path().join("open"), 0o777);
    create_file(&dir.path().join("own"), "file");
    symlink("../own/file", dir.path().join("open/second")).unwrap();
    symlink("../open/second", dir.path().join("own/first")).unwrap();
    for link in [link, dir.path().join("own/first")] {
        let error = check_trusted_path(&link, Path::new(""), &owners()).unwrap_err();
        assert!(matches!(error.reason, UntrustedReason::Mode { .. }), "{error}");
    }
}

#[test]
fn endless_links_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("link");
    symlink("link", &link).unwrap();
    let error = check_trusted_path(&link, Path::new(""), &owners()).unwrap_err();
    assert!(matches!(error.reason, UntrustedReason::Links));
}

#[test]
fn missing_file_is_reported_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none");
    let error = check_trusted_path(&path, Path::new(""), &owners()).unwrap_err();
    assert!(matches!(error.reason, UntrustedReason::Inspect(_)));
    assert_eq!(error.path, path);
}

#[test]
fn group_of_one_user_may_write() {
    let users = "root:x:0:0::/:\nann:x:1000:1000::/:\nbob:x:1001:1001::/:\neve:x:1002:100::/:\n";
    let groups = "root:x:0:\nann:x:1000:\nbob:x:1001:bob,eve\nusers:x:100:\nadm:x:4:ann\n";
    let is_private = |group, user| is_private_group(users, groups, group, user);
    assert!(is_private(1000, 1000));
    assert!(is_private(0, 0));
    // Another member; a shared group; another user's group; unknown ids.
    for (group, user) in [(1001, 1001), (100, 1002), (4, 1000), (1000, 1001), (7, 7), (1000, 7)] {
        assert!(!is_private(group, user), "{group} {user}");
    }
    let shared = format!("{users}mal:x:1003:1000::/:\n");
    assert!(!is_private_group(&shared, groups, 1000, 1000));
}

#[test]
fn directories_down_to_the_base_may_belong_to_anybody() {
    let dir = tempfile::tempdir().unwrap();
    let (base, own) = (dir.path().join("base"), dir.path().join("base/own"));
    fs::create_dir_all(&own).unwrap();
    let file = create_file(&own, "file");
    // Only root can give a directory away; a user trusts nobody's in place of it.
    let given = chown(&base, Some(STRANGER), None).is_ok();
    let owners = if given { owners() } else { vec![] };
    assert!(check_trusted_path(&file, Path::new(""), &owners).is_err());
    if given {
        check_trusted_path(&file, &base, &owners).unwrap();
    }
    set_mode(&base, 0o777);
    let error = check_trusted_path(&file, &base, &owners).unwrap_err();
    assert!(!given || error.path == base);
}

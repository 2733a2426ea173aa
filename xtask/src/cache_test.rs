use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use super::*;

fn key() -> Key {
    Key::new("thing", 1).with_text("version", "1.2")
}

#[test]
fn key_depends_on_every_input_and_its_name() {
    let base = key().into_hex();
    assert_eq!(base, key().into_hex());
    assert_eq!(base.len(), 16);
    for other in [
        Key::new("thing", 2).with_text("version", "1.2"),
        Key::new("other", 1).with_text("version", "1.2"),
        Key::new("thing", 1).with_text("version", "1.3"),
        Key::new("thing", 1).with_text("compiler", "1.2"),
        // The same bytes, split differently.
        Key::new("thing", 1).with_text("versio", "n1.2"),
        key().with_text("", ""),
    ] {
        assert_ne!(base, other.into_hex());
    }
}

#[test]
fn entry_is_built_once_and_read_only() {
    let root = tempfile::tempdir().unwrap();
    let build = |dir: &Path| Ok(fs::write(dir.join("f"), "x")?);
    let first = find_or_build_in(root.path(), "thing", key(), build).unwrap();
    assert_eq!(fs::metadata(first.join("f")).unwrap().mode() & 0o222, 0);
    let second = find_or_build_in(root.path(), "thing", key(), |_| panic!("built twice")).unwrap();
    assert_eq!(first, second);
}

#[test]
fn failed_build_leaves_nothing_and_can_repeat() {
    let root = tempfile::tempdir().unwrap();
    let failed = find_or_build_in(root.path(), "thing", key(), |dir| {
        fs::write(dir.join("half"), "")?;
        anyhow::bail!("compiler on fire")
    });
    assert_eq!(failed.unwrap_err().to_string(), "compiler on fire");
    let names: Vec<_> =
        fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["thing.lock"]);
    let entry =
        find_or_build_in(root.path(), "thing", key(), |dir| Ok(fs::write(dir.join("f"), "x")?))
            .unwrap();
    assert!(!entry.join("half").exists());
}

#[test]
fn leftovers_of_a_killed_builder_are_removed() {
    let root = tempfile::tempdir().unwrap();
    let partial = root.path().join(format!("thing-{}.partial", key().into_hex()));
    fs::create_dir_all(partial.join("deep")).unwrap();
    let entry =
        find_or_build_in(root.path(), "thing", key(), |dir| Ok(fs::write(dir.join("f"), "x")?))
            .unwrap();
    assert!(!entry.join("deep").exists() && !partial.exists());
}

#[test]
fn concurrent_builders_build_one_entry() {
    let root = tempfile::tempdir().unwrap();
    let builds = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                find_or_build_in(root.path(), "thing", key(), |_| {
                    builds.fetch_add(1, Ordering::SeqCst);
                    thread::sleep(Duration::from_millis(50));
                    Ok(())
                })
                .unwrap()
            });
        }
    });
    assert_eq!(builds.load(Ordering::SeqCst), 1);
}

#[test]
fn published_file_follows_a_new_entry() {
    let root = tempfile::tempdir().unwrap();
    let (old, new, dir) =
        (root.path().join("old"), root.path().join("new"), root.path().join("artifacts"));
    fs::write(&old, "old").unwrap();
    fs::write(&new, "new").unwrap();
    let target = publish_file_in(&dir, &old, "thing").unwrap();
    assert_eq!(fs::metadata(&target).unwrap().ino(), fs::metadata(&old).unwrap().ino());
    publish_file_in(&dir, &old, "thing").unwrap();
    publish_file_in(&dir, &new, "thing").unwrap();
    assert_eq!(fs::read_to_string(&target).unwrap(), "new");
    assert_eq!(fs::read_to_string(&old).unwrap(), "old");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
}

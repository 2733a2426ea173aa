use std::fs;

use super::*;

pub(in crate::template) fn create_templates() -> (tempfile::TempDir, Templates) {
    let dir = tempfile::tempdir().unwrap();
    let templates = Templates::at(dir.path().join("templates"));
    let templates = templates.with_key_dir(dir.path().join("keys"));
    (dir, templates)
}

pub(in crate::template) fn build_template(templates: &Templates, name: &str) -> Manifest {
    let draft = templates.create_draft(name).unwrap();
    let files = draft.create_files().unwrap();
    (&files.memory).write_all(b"memory").unwrap();
    (&files.state).write_all(&[7; 100]).unwrap();
    draft.open_files().unwrap();
    (&draft.create_new_state().unwrap()).write_all(&[8; 100]).unwrap();
    let manifest = Manifest {
        name: name.into(),
        chitin: "0".into(),
        created: 1,
        vcpus: 1,
        memory_mib: 64,
        warm_up: None,
        policy: None,
        memory_bytes: 0,
        binding: "root image".into(),
    };
    draft.publish(manifest).unwrap()
}

fn list_entries(templates: &Templates) -> Vec<String> {
    let entries = fs::read_dir(&templates.dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn dropped_draft_is_removed() {
    let (_dir, templates) = create_templates();
    let draft = templates.create_draft("x").unwrap();
    draft.create_files().unwrap();
    drop(draft);
    assert!(list_entries(&templates).is_empty());
}

#[test]
fn draft_of_a_killed_build_is_removed() {
    let (_dir, templates) = create_templates();
    let alive = templates.create_draft("alive").unwrap();
    alive.create_files().unwrap();
    let killed = templates.create_draft("killed").unwrap();
    killed.create_files().unwrap();
    // The kernel ends the lock of a process that it kills.
    flock(killed.dir.fd(), FlockOperation::Unlock).unwrap();
    std::mem::forget(killed);
    // Hidden directories that are not drafts stay.
    fs::create_dir(templates.dir.join(".git")).unwrap();
    fs::create_dir(templates.dir.join(".cache.1")).unwrap();
    fs::write(templates.dir.join(".cache.1/file"), "").unwrap();
    templates.list().unwrap();
    let mut left = list_entries(&templates);
    left.sort();
    let mut expected = [".cache.1", ".git", &alive.draft_name];
    expected.sort_unstable();
    assert_eq!(left, expected);
    assert!(templates.dir.join(&alive.draft_name).join("memory").exists());
}

use super::*;

fn templates() -> (tempfile::TempDir, Templates) {
    let dir = tempfile::tempdir().unwrap();
    let templates = Templates { dir: dir.path().join("templates") };
    (dir, templates)
}

fn build(templates: &Templates, name: &str) -> Manifest {
    let draft = templates.draft(name).unwrap();
    let files = draft.files().unwrap();
    (&files.memory).write_all(b"memory").unwrap();
    (&files.state).write_all(&[7; 100]).unwrap();
    draft.saved().unwrap();
    (&draft.new_state().unwrap()).write_all(&[8; 100]).unwrap();
    let manifest = Manifest {
        name: name.into(),
        chitin: "0".into(),
        created: 1,
        vcpus: 1,
        memory_mib: 64,
        warm_up: None,
        policy: None,
        memory_bytes: 0,
    };
    draft.publish(manifest).unwrap()
}

#[test]
fn they_are_listed_inspected_replaced_and_removed() {
    let (_dir, templates) = templates();
    assert_eq!(templates.list().unwrap(), []);
    let (b, a) = (build(&templates, "b"), build(&templates, "a.1"));
    assert_eq!(templates.list().unwrap(), [a, b.clone()]);
    assert_eq!(templates.inspect("b").unwrap(), b);
    build(&templates, "b");
    templates.open("b").unwrap();
    templates.remove("b").unwrap();
    assert!(matches!(templates.inspect("b"), Err(TemplateError::Missing { .. })));
    assert!(matches!(templates.remove("b"), Err(TemplateError::Missing { .. })));
}

#[test]
fn a_draft_that_is_dropped_leaves_nothing() {
    let (_dir, templates) = templates();
    let draft = templates.draft("x").unwrap();
    draft.files().unwrap();
    drop(draft);
    let left: Vec<_> =
        fs::read_dir(&templates.dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["key"]);
}

#[test]
fn names_are_file_names_and_no_paths() {
    for bad in ["", ".", "..", "../x", "a/b", ".hidden", "-x", "key", "a b", "ä", &"x".repeat(65)]
    {
        assert!(matches!(check_name(bad), Err(TemplateError::Name(_))), "{bad}");
    }
    for good in ["a", "py3.11", "A_b-c"] {
        check_name(good).unwrap();
    }
}

#[test]
fn memory_that_was_touched_is_refused() {
    let (_dir, templates) = templates();
    let touch: [fn(&Path); 4] = [
        |dir| fs::write(dir.join("memory"), "MEMORY").unwrap(),
        |dir| {
            fs::copy(dir.join("memory"), dir.join("copy")).unwrap();
            fs::rename(dir.join("copy"), dir.join("memory")).unwrap();
        },
        |dir| {
            fs::remove_file(dir.join("state")).unwrap();
            fs::write(dir.join("state"), [9; 100]).unwrap();
        },
        |dir| fs::write(dir.parent().unwrap().join("key"), [1; 32]).unwrap(),
    ];
    for touch in touch {
        build(&templates, "t");
        templates.open("t").unwrap();
        let dir = templates.dir.join("t");
        for file in ["memory", "state"] {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(dir.join(file), fs::Permissions::from_mode(0o600)).unwrap();
        }
        touch(&dir);
        assert!(matches!(templates.open("t"), Err(TemplateError::Seal(_))));
    }
}

use super::*;

fn create_templates() -> (tempfile::TempDir, Templates) {
    let dir = tempfile::tempdir().unwrap();
    let templates = Templates { dir: dir.path().join("templates") };
    (dir, templates)
}

fn build_template(templates: &Templates, name: &str) -> Manifest {
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
    };
    draft.publish(manifest).unwrap()
}

#[test]
fn templates_are_listed_replaced_and_removed() {
    let (_dir, templates) = create_templates();
    assert_eq!(templates.list().unwrap(), []);
    let (b, a) = (build_template(&templates, "b"), build_template(&templates, "a.1"));
    assert_eq!(templates.list().unwrap(), [a, b.clone()]);
    assert_eq!(templates.inspect("b").unwrap(), b);
    build_template(&templates, "b");
    templates.open("b").unwrap();
    templates.remove("b").unwrap();
    assert!(matches!(templates.inspect("b"), Err(TemplateError::Missing { .. })));
    assert!(matches!(templates.remove("b"), Err(TemplateError::Missing { .. })));
}

#[test]
fn dropped_draft_is_removed() {
    let (_dir, templates) = create_templates();
    let draft = templates.create_draft("x").unwrap();
    draft.create_files().unwrap();
    drop(draft);
    let left: Vec<_> =
        fs::read_dir(&templates.dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["key"]);
}

#[test]
fn template_name_is_a_file_name() {
    for bad in ["", ".", "..", "../x", "a/b", ".hidden", "-x", "key", "a b", "ä", &"x".repeat(65)]
    {
        assert!(matches!(check_template_name(bad), Err(TemplateError::Name { .. })), "{bad}");
    }
    for good in ["a", "py3.11", "A_b-c"] {
        check_template_name(good).unwrap();
    }
}

#[test]
fn changed_memory_file_is_refused() {
    let (_dir, templates) = create_templates();
    let changes: [fn(&Path); 4] = [
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
    for change in changes {
        build_template(&templates, "t");
        templates.open("t").unwrap();
        let dir = templates.dir.join("t");
        for file in ["memory", "state"] {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(dir.join(file), fs::Permissions::from_mode(0o600)).unwrap();
        }
        change(&dir);
        assert!(matches!(templates.open("t"), Err(TemplateError::Seal(_))));
    }
}

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};

use serde_json::Value;

use super::super::draft::tests::{build_template, create_templates};
use super::*;
use crate::template::Distrust;

/// Writes a file that may be read-only, with the mode it had.
fn overwrite(path: &Path, bytes: &[u8]) {
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o400)).unwrap();
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
fn templates_are_listed_replaced_and_removed() {
    let (_dir, templates) = create_templates();
    assert!(templates.list().unwrap().templates.is_empty());
    let (b, a) = (build_template(&templates, "b"), build_template(&templates, "a.1"));
    let list = templates.list().unwrap();
    assert_eq!(list.templates, [a, b.clone()]);
    assert!(list.rejected.is_empty(), "{list:?}");
    assert_eq!(templates.inspect("b").unwrap(), b);
    build_template(&templates, "b");
    templates.open("b").unwrap();
    templates.remove("b").unwrap();
    assert!(matches!(templates.inspect("b"), Err(TemplateError::Missing { .. })));
    assert!(matches!(templates.remove("b"), Err(TemplateError::Missing { .. })));
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
fn changed_file_is_refused() {
    let (_dir, templates) = create_templates();
    let changes: [fn(&Path); 4] = [
        |dir| {
            set_mode(&dir.join("memory"), 0o600);
            fs::write(dir.join("memory"), "MEMORY").unwrap();
        },
        |dir| {
            fs::copy(dir.join("memory"), dir.join("copy")).unwrap();
            fs::rename(dir.join("copy"), dir.join("memory")).unwrap();
        },
        |dir| overwrite(&dir.join("state"), &[9; 100]),
        |dir| {
            let key = dir.parent().unwrap().parent().unwrap().join("keys/templates.key");
            set_mode(&key, 0o600);
            fs::write(key, [1; 32]).unwrap();
        },
    ];
    for change in changes {
        build_template(&templates, "t");
        templates.open("t").unwrap();
        change(&templates.dir.join("t"));
        assert!(matches!(templates.open("t"), Err(TemplateError::Seal(_))));
    }
}

/// Calls `edit` with a copy of the document for each of its values, which it replaces.
fn for_each_edit(document: &Value, edit: &mut dyn FnMut(&str, &Value)) {
    fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
        if !at.is_empty() {
            found.push(at.to_owned());
        }
        match value {
            Value::Object(map) => {
                map.iter().for_each(|(key, value)| pointers(value, &format!("{at}/{key}"), found));
            }
            Value::Array(list) => list
                .iter()
                .enumerate()
                .for_each(|(index, value)| pointers(value, &format!("{at}/{index}"), found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    pointers(document, "", &mut found);
    for at in found {
        let mut edited = document.clone();
        let value = edited.pointer_mut(&at).unwrap();
        *value = match &*value {
            Value::Null => Value::from("digest-of-a-policy"),
            Value::Number(number) => Value::from(number.as_i64().unwrap() + 1),
            Value::String(text) => Value::from(format!("{text}x")),
            _ => Value::Null,
        };
        edit(&at, &edited);
    }
}

#[test]
fn each_edited_value_of_a_manifest_is_refused() {
    let (_dir, templates) = create_templates();
    build_template(&templates, "t");
    let path = templates.dir.join("t/template.json");
    let original = fs::read(&path).unwrap();
    let document: Value = serde_json::from_slice(&original).unwrap();
    let mut edits = 0;
    for_each_edit(&document, &mut |at, edited| {
        overwrite(&path, &serde_json::to_vec_pretty(edited).unwrap());
        assert!(matches!(templates.open("t"), Err(TemplateError::Seal(_))), "{at}");
        assert!(matches!(templates.inspect("t"), Err(TemplateError::Seal(_))), "{at}");
        edits += 1;
    });
    // All fields of the manifest, and those that identify its files.
    assert!(edits >= 18, "{edits}");
    for bytes in [b"".as_slice(), b"{}", &original[..original.len() - 1]] {
        overwrite(&path, bytes);
        assert!(matches!(templates.open("t"), Err(TemplateError::Seal(_))));
    }
    overwrite(&path, &original);
    templates.open("t").unwrap();
}

#[test]
fn template_under_another_name_is_refused() {
    let (_dir, templates) = create_templates();
    build_template(&templates, "a");
    fs::rename(templates.dir.join("a"), templates.dir.join("b")).unwrap();
    assert!(matches!(templates.open("b"), Err(TemplateError::Seal(_))));
}

#[test]
fn template_of_an_earlier_version_is_outdated() {
    let (_dir, templates) = create_templates();
    build_template(&templates, "t");
    overwrite(&templates.dir.join("t/seal"), &[7; 32]);
    fs::write(templates.dir.join("key"), [1; 32]).unwrap();
    assert!(matches!(templates.open("t"), Err(TemplateError::Outdated(_))));
    assert!(matches!(templates.list().unwrap().rejected[..], [(_, TemplateError::Outdated(_))]));
    build_template(&templates, "t");
    templates.open("t").unwrap();
}

#[test]
fn template_with_its_own_key_is_refused() {
    let (_dir, victim) = create_templates();
    let (_attacker_dir, attacker) = create_templates();
    build_template(&victim, "t");
    build_template(&attacker, "t");
    fs::remove_dir_all(victim.dir.join("t")).unwrap();
    fs::rename(attacker.dir.join("t"), victim.dir.join("t")).unwrap();
    fs::write(victim.dir.join("key"), [0; 32]).unwrap();
    assert!(matches!(victim.open("t"), Err(TemplateError::Seal(_))));
}

#[test]
fn files_that_others_can_change_are_refused() {
    let (_dir, templates) = create_templates();
    build_template(&templates, "t");
    let paths = [
        "",
        "t",
        "t/template.json",
        "t/seal",
        "t/state",
        "t/memory",
        "../keys",
        "../keys/templates.key",
    ];
    for path in paths {
        let path = templates.dir.join(path);
        let original = fs::metadata(&path).unwrap().permissions();
        for mode in [0o720, 0o702] {
            set_mode(&path, mode);
            let refused = templates.open("t").unwrap_err();
            assert!(
                matches!(refused, TemplateError::Untrusted { reason: Distrust::Mode { .. }, .. }),
                "{path:?} {mode:o}: {refused}"
            );
        }
        fs::set_permissions(&path, original).unwrap();
    }
    set_mode(&templates.dir.join("../keys/templates.key"), 0o640);
    assert!(matches!(
        templates.open("t").unwrap_err(),
        TemplateError::Untrusted { reason: Distrust::Readable { .. }, .. }
    ));
    set_mode(&templates.dir.join("../keys/templates.key"), 0o600);
    // A change of the mode is a change of the memory file as well.
    assert!(matches!(templates.open("t"), Err(TemplateError::Seal(_))));
}

#[test]
fn files_of_another_user_are_refused() {
    let (_dir, templates) = create_templates();
    build_template(&templates, "t");
    if !rustix::process::geteuid().is_root() {
        return;
    }
    for path in ["t/template.json", "t/seal", "t/state", "t/memory", "t", "", "../keys"] {
        let path = templates.dir.join(path);
        std::os::unix::fs::chown(&path, Some(1234), None).unwrap();
        let refused = templates.open("t").unwrap_err();
        assert!(
            matches!(
                refused,
                TemplateError::Untrusted { reason: Distrust::Owner { owner: 1234 }, .. }
            ),
            "{path:?}: {refused}"
        );
        std::os::unix::fs::chown(&path, Some(0), None).unwrap();
    }
}

#[test]
fn links_are_not_followed() {
    let (_dir, templates) = create_templates();
    build_template(&templates, "t");
    let elsewhere = templates.dir.parent().unwrap().join("elsewhere");
    for path in ["t/memory", "t/state", "t/template.json", "t/seal", "t", "../keys", ""] {
        let path = templates.dir.join(path);
        let path = std::path::absolute(path).unwrap();
        let path = PathBuf::from(path.to_str().unwrap().trim_end_matches('/'));
        fs::rename(&path, &elsewhere).unwrap();
        symlink(&elsewhere, &path).unwrap();
        let refused = templates.open("t").unwrap_err();
        assert!(
            matches!(refused, TemplateError::Untrusted { reason: Distrust::Link, .. }),
            "{path:?}: {refused}"
        );
        fs::remove_file(&path).unwrap();
        fs::rename(&elsewhere, &path).unwrap();
    }
}

#[test]
fn pipe_in_place_of_a_file_is_refused() {
    let (_dir, templates) = create_templates();
    build_template(&templates, "t");
    let path = templates.dir.join("t/template.json");
    fs::remove_file(&path).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    assert!(matches!(
        templates.open("t").unwrap_err(),
        TemplateError::Untrusted { reason: Distrust::Kind, .. }
    ));
}

#[test]
fn key_and_templates_are_apart() {
    let dir = tempfile::tempdir().unwrap();
    for key_dir in ["", "templates", "templates/keys"] {
        let templates =
            Templates::at(dir.path().join("templates")).with_key_dir(dir.path().join(key_dir));
        let refused = templates.create_draft("t").unwrap_err();
        assert!(matches!(refused, TemplateError::KeyAmongTemplates { .. }), "{refused}");
    }
}

#[test]
fn key_is_private_and_created_once() {
    let (dir, templates) = create_templates();
    let keys: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| *read_key(&mut templates.open_key().unwrap()).unwrap()))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(keys.iter().all(|key| *key == keys[0] && *key != [0; 32]));
    let mode = |path: &str| fs::metadata(dir.path().join(path)).unwrap().permissions().mode();
    assert_eq!(mode("keys") & 0o777, 0o700);
    assert_eq!(mode("keys/templates.key") & 0o777, 0o600);
    assert_eq!(fs::read_dir(dir.path().join("keys")).unwrap().count(), 1);
}

#[test]
fn foreign_directory_is_named_and_never_removed() {
    let (_dir, templates) = create_templates();
    build_template(&templates, "t");
    let foreign = templates.dir.join("photos");
    fs::create_dir_all(foreign.join("2026")).unwrap();
    fs::write(foreign.join("cat.jpg"), "meow").unwrap();
    let list = templates.list().unwrap();
    assert_eq!(list.templates.len(), 1);
    assert!(
        matches!(&list.rejected[..], [(name, TemplateError::Foreign { .. })] if name == "photos")
    );
    assert!(matches!(templates.remove("photos"), Err(TemplateError::Foreign { .. })));
    assert!(matches!(templates.create_draft("photos"), Err(TemplateError::Foreign { .. })));
    assert_eq!(fs::read(foreign.join("cat.jpg")).unwrap(), b"meow");
    // A template to which something was added is not removed either.
    fs::write(templates.dir.join("t/notes.txt"), "mine").unwrap();
    assert!(matches!(templates.remove("t"), Err(TemplateError::Foreign { .. })));
    assert!(templates.dir.join("t/memory").exists());
}

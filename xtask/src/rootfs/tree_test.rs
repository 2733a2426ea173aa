use super::*;

fn write(tree: &Path, path: &str, content: &str) {
    let path = tree.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn list_tree(tree: &Path) -> Vec<String> {
    fn walk(tree: &Path, below: &str, found: &mut Vec<String>) {
        for name in sorted_names(&tree.join(below)).unwrap() {
            let path = if below.is_empty() { name } else { format!("{below}/{name}") };
            if fs::symlink_metadata(tree.join(&path)).unwrap().is_dir() {
                walk(tree, &path, found);
            }
            found.push(path);
        }
    }
    let mut found = Vec::new();
    walk(tree, "", &mut found);
    found
}

fn rule(paths: &[&str], keep: &[&str]) -> Prune {
    let owned = |list: &[&str]| list.iter().map(|path| (*path).to_owned()).collect();
    Prune { paths: owned(paths), keep: owned(keep), why: "a test".into() }
}

#[test]
fn write_through_a_link_is_refused() {
    let (tree, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    symlink(outside.path(), tree.path().join("etc")).unwrap();
    assert!(resolve_inside(tree.path(), "etc/passwd").is_err());
    assert!(resolve_inside(tree.path(), "../passwd").is_err());
    let link = Link { path: "etc/localtime".into(), target: "/x".into() };
    assert!(replace_link(tree.path(), &link).is_err());

    let overlay = tempfile::tempdir().unwrap();
    write(overlay.path(), "etc/passwd", "root");
    assert!(copy_over(overlay.path(), tree.path()).is_err());
    assert!(list_tree(outside.path()).is_empty());
}

#[test]
fn link_to_a_file_is_replaced_not_followed() {
    let (tree, overlay) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(tree.path(), "target", "untouched");
    symlink("target", tree.path().join("name")).unwrap();
    write(overlay.path(), "name", "new");
    copy_over(overlay.path(), tree.path()).unwrap();
    assert_eq!(fs::read_to_string(tree.path().join("target")).unwrap(), "untouched");
    assert_eq!(fs::read_to_string(tree.path().join("name")).unwrap(), "new");

    replace_link(tree.path(), &Link { path: "name".into(), target: "elsewhere".into() }).unwrap();
    assert_eq!(fs::read_link(tree.path().join("name")).unwrap(), Path::new("elsewhere"));
}

#[test]
fn usr_is_merged() {
    let tree = tempfile::tempdir().unwrap();
    write(tree.path(), "bin/dash", "");
    write(tree.path(), "usr/bin/env", "");
    write(tree.path(), "lib/x86_64-linux-gnu/libc.so.6", "");
    write(tree.path(), "usr/lib/x86_64-linux-gnu/libz.so.1", "");
    merge_usr(tree.path()).unwrap();
    let expected = [
        "bin",
        "lib",
        "lib64",
        "sbin",
        "usr/bin/dash",
        "usr/bin/env",
        "usr/bin",
        "usr/lib/x86_64-linux-gnu/libc.so.6",
        "usr/lib/x86_64-linux-gnu/libz.so.1",
        "usr/lib/x86_64-linux-gnu",
        "usr/lib",
        "usr/lib64",
        "usr/sbin",
        "usr",
    ];
    assert_eq!(list_tree(tree.path()), expected);
    assert_eq!(fs::read_link(tree.path().join("lib64")).unwrap(), Path::new("usr/lib64"));
}

#[test]
fn usr_with_the_same_file_twice_is_refused() {
    let tree = tempfile::tempdir().unwrap();
    write(tree.path(), "bin/dash", "one");
    write(tree.path(), "usr/bin/dash", "other");
    assert!(
        format!("{:#}", merge_usr(tree.path()).expect_err("a conflict"))
            .contains("is in two packages")
    );
}

#[test]
fn prune_removes_keeps_and_returns_stale_rules() {
    let tree = tempfile::tempdir().unwrap();
    for path in
        ["doc/dash/copyright", "doc/dash/NEWS", "doc/sed/examples/a", "man/man1/sed.1", "bin/sed"]
    {
        write(tree.path(), path, "");
    }
    symlink("/etc", tree.path().join("man/outside")).unwrap();
    let rules = [rule(&["doc/*/**/*"], &["doc/*/copyright"]), rule(&["man", "info"], &[])];
    assert_eq!(prune_paths(tree.path(), &rules).unwrap(), ["info"]);
    let left =
        ["bin/sed", "bin", "doc/dash/copyright", "doc/dash", "doc/sed/examples", "doc/sed", "doc"];
    assert_eq!(list_tree(tree.path()), left);
    assert!(Path::new("/etc").exists());
}

#[test]
fn modes_are_independent_of_the_builder() {
    let tree = tempfile::tempdir().unwrap();
    let mode = |path: &str| {
        fs::symlink_metadata(tree.path().join(path)).unwrap().permissions().mode() & 0o7777
    };
    for (path, mode) in [("a/program", 0o4711), ("a/text", 0o600), ("a/group", 0o2775)] {
        write(tree.path(), path, "");
        set_mode(&tree.path().join(path), mode).unwrap();
    }
    fs::create_dir(tree.path().join("tmp")).unwrap();
    let tmp = Directory { path: "tmp".into(), mode: "1777".into(), owner: 0 };
    set_modes(tree.path(), &[tmp]).unwrap();
    let found = ["a", "a/program", "a/text", "a/group", "tmp"].map(mode);
    assert_eq!(found, [0o755, 0o755, 0o644, 0o755, 0o1777]);
}

#[test]
fn hash_covers_names_contents_kinds_and_modes() {
    let hash = |change: &dyn Fn(&Path)| {
        let tree = tempfile::tempdir().unwrap();
        write(tree.path(), "a/b", "content");
        change(tree.path());
        let mut hash = Sha256::new();
        hash_tree(tree.path(), &mut hash).unwrap();
        hash.finalize()
    };
    let plain = hash(&|_| {});
    assert_eq!(plain, hash(&|_| {}));
    assert_ne!(plain, hash(&|tree| write(tree, "a/b", "other")));
    assert_ne!(plain, hash(&|tree| fs::rename(tree.join("a/b"), tree.join("a/c")).unwrap()));
    assert_ne!(plain, hash(&|tree| set_mode(&tree.join("a/b"), 0o755).unwrap()));
    assert_ne!(plain, hash(&|tree| fs::create_dir(tree.join("a/c")).unwrap()));
    let linked = hash(&|tree| {
        fs::remove_file(tree.join("a/b")).unwrap();
        symlink("content", tree.join("a/b")).unwrap();
    });
    assert_ne!(plain, linked);
}

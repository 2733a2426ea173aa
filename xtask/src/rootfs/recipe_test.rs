use super::*;

const MINIMAL: &str = r#"
suite = "bookworm"
architecture = "amd64"
uuid = "6d1f4c0a-2c57-4a3e-9d0e-0c8171a90001"
timestamp = 1
max_mib = 1
[[package]]
name = "dash"
why = "a shell"
"#;

fn error_of(addition: &str) -> String {
    format!("{:#}", Recipe::parse(&format!("{MINIMAL}{addition}")).expect_err("must not parse"))
}

#[test]
fn committed_recipe_is_valid() {
    let path = crate::workspace::root_dir().join("rootfs/recipe.toml");
    let recipe = Recipe::parse(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert!(recipe.requested().is_sorted());
    let work = recipe.directory.iter().find(|directory| directory.path == "work").unwrap();
    assert_eq!((work.owner, work.mode_bits().unwrap()), (1000, 0o755));
}

#[test]
fn package_and_prune_need_a_reason() {
    assert!(error_of("[[package]]\nname = \"sed\"\nwhy = \" \"").contains("sed has no reason"));
    assert!(
        error_of("[[prune]]\npaths = [\"usr/share/man\"]\nwhy = \"\"").contains("has no reason")
    );
}

#[test]
fn unknown_field_or_name_is_an_error() {
    assert!(error_of("[[packages]]\nname = \"sed\"").contains("packages"));
    assert!(error_of("[[package]]\nname = \"--force\"\nwhy = \"x\"").contains("not the name"));
    assert!(error_of("[[package]]\nname = \"a/b\"\nwhy = \"x\"").contains("not the name"));
}

#[test]
fn path_outside_the_image_is_refused() {
    for path in
        ["/etc", "../etc", "usr/../../etc", "usr//share", "usr/", "./usr", "usr/./share", ""]
    {
        assert!(check_path(path).is_err(), "{path:?}");
        assert!(
            error_of(&format!("[[directory]]\npath = \"{path}\""))
                .contains("below the image's root"),
            "{path:?}"
        );
    }
    assert!(check_path("usr/share/x..y").is_ok());
}

#[test]
fn mode_is_octal_without_set_id_bits() {
    assert!(error_of("[[directory]]\npath = \"tmp\"\nmode = \"0999\"").contains("not octal"));
    assert!(error_of("[[directory]]\npath = \"tmp\"\nmode = \"4755\"").contains("set-id"));
}

#[test]
fn pattern_matches_names_and_depths() {
    for (pattern, path, expected) in [
        ("usr/share/man", "usr/share/man", true),
        ("usr/share/man", "usr/share/man/man1", false),
        ("usr/share/man", "usr/share/manual", false),
        ("usr/*/man", "usr/share/man", true),
        ("usr/*", "usr/share/man", false),
        ("**/_test*.so", "usr/lib/_testcapi.so", true),
        ("**/_test*.so", "_test.so", true),
        ("**/_test*.so", "usr/lib/_test.py", false),
        ("doc/*/**/*", "doc/dash", false),
        ("doc/*/**/*", "doc/dash/NEWS", true),
        ("doc/*/**/*", "doc/dash/examples/a", true),
        ("a*b*c", "abbc", true),
        ("a*b*c", "acb", false),
        ("*", "été", true),
        ("é*", "été", true),
        ("", "usr", false),
    ] {
        assert_eq!(matches_path(pattern, path), expected, "{pattern:?} {path:?}");
    }
}

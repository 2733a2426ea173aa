use super::*;

#[test]
fn options_are_told_from_comments() {
    let text = "# why\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_S=\"a=b\"\n\
                # CONFIG_C is not set by us\n# a CONFIG_D=y\n";
    let options = parse_config(text);
    let expected = [("CONFIG_A", "y"), ("CONFIG_B", "n"), ("CONFIG_S", "\"a=b\"")];
    assert_eq!(options, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
}

#[test]
fn every_option_is_checked() {
    let wanted = parse_config(
        "CONFIG_A=y\nCONFIG_N=8\n# CONFIG_OFF is not set\n\
         # CONFIG_FORCED is not set\nCONFIG_GONE=y\n",
    );
    let got = parse_config("CONFIG_A=y\nCONFIG_N=16\nCONFIG_FORCED=y\nCONFIG_OTHER=y\n");
    let broken = list_mismatches(&wanted, &got);
    assert_eq!(
        broken,
        [
            "  CONFIG_FORCED: is y instead of n",
            "  CONFIG_GONE: is n instead of y",
            "  CONFIG_N: is 16 instead of 8"
        ]
    );
}

#[test]
fn fragments_are_joined_without_comments() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("20-b.config"), "# reason\n# CONFIG_B is not set\n").unwrap();
    fs::write(dir.path().join("10-a.config"), "# reason\nCONFIG_A=y\n").unwrap();
    fs::write(dir.path().join("README.md"), "CONFIG_C=y\n").unwrap();
    let fragments = read_fragments(dir.path()).unwrap();
    assert_eq!(fragments.text, "CONFIG_A=y\n# CONFIG_B is not set\n");
    assert_eq!(fragments.options.len(), 2);
}

#[test]
fn option_set_twice_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("10-a.config"), "CONFIG_A=y\n").unwrap();
    fs::write(dir.path().join("20-b.config"), "# CONFIG_A is not set\n").unwrap();
    let error = read_fragments(dir.path()).err().unwrap().to_string();
    assert!(error.ends_with("20-b.config: CONFIG_A is set twice"), "{error}");
}

#[test]
fn committed_fragments_are_well_formed() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernel-config");
    let fragments = read_fragments(&dir).unwrap();
    assert_eq!(fragments.options.get("CONFIG_MODULES").map(String::as_str), Some("n"));
}

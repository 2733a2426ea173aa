use super::may_escape;

#[test]
fn inner_link_does_not_escape() {
    for (depth, target) in [
        (0, "a"),
        (0, "a/b/c"),
        (0, "./a//b/"),
        (0, "."),
        (0, "..."),
        (0, "..a"),
        (1, ".."),
        (1, "../b"),
        (2, "../../b"),
        (2, "./.././../b"),
    ] {
        assert!(!may_escape(depth, target.as_bytes()), "{target} at {depth}");
    }
}

#[test]
fn outer_link_escapes() {
    for (depth, target) in [
        (0, "/"),
        (0, "/etc/passwd"),
        (9, "//etc"),
        (0, ".."),
        (0, "./.."),
        (0, "../root/a"),
        (1, "../.."),
        (1, "../../a"),
        // With a/up -> .. this is the parent of the root, although it looks like the root.
        (0, "a/b/up/../.."),
        (1, "a/.."),
    ] {
        assert!(may_escape(depth, target.as_bytes()), "{target} at {depth}");
    }
}

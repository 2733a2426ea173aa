use super::escapes;

#[test]
fn links_inside_the_tree_stay() {
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
        assert!(!escapes(depth, target.as_bytes()), "{target} at {depth}");
    }
}

#[test]
fn links_that_may_lead_out_are_found() {
    for (depth, target) in [
        (0, "/"),
        (0, "/etc/passwd"),
        (9, "//etc"),
        (0, ".."),
        (0, "./.."),
        (0, "../root/a"),
        (1, "../.."),
        (1, "../../a"),
        // With a/up -> .. this is the root's parent, though it looks like the root.
        (0, "a/b/up/../.."),
        (1, "a/.."),
    ] {
        assert!(escapes(depth, target.as_bytes()), "{target} at {depth}");
    }
}

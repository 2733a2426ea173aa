use super::*;

fn pin(name: &str, version: &str) -> Pin {
    Pin { name: name.into(), version: version.into(), sha256: "0123456789abcdef".repeat(4) }
}

fn lock(pins: &[Pin]) -> Lock {
    Lock { requested: vec!["dash".into()], pins: pins.to_vec() }
}

#[test]
fn written_lock_parses_to_itself() {
    let lock = lock(&[
        pin("dash", "0.5.12-2"),
        pin("libattr1", "1:2.5.1-4"),
        pin("libgmp10", "2:6.2.1+dfsg1-1.1~x"),
    ]);
    assert_eq!(Lock::parse(&lock.to_string()).unwrap(), lock);
}

#[test]
fn committed_lock_matches_the_recipe() {
    let rootfs = crate::workspace::root_dir().join("rootfs");
    let recipe =
        Recipe::parse(&std::fs::read_to_string(rootfs.join("recipe.toml")).unwrap()).unwrap();
    let lock =
        Lock::parse(&std::fs::read_to_string(rootfs.join("packages.lock")).unwrap()).unwrap();
    lock.check_against(&recipe).unwrap();
    assert!(lock.pins.iter().any(|pin| pin.name == "libc6"));
}

#[test]
fn invalid_lock_is_refused() {
    let sha256 = "0123456789abcdef".repeat(4);
    let short = &sha256[1..];
    for (line, reason) in [
        ("dash".to_owned(), "is not `name version sha256`"),
        (format!("dash 0.5 {sha256} more"), "is not `name version sha256`"),
        (format!("dash 0.5 {short}"), "not a SHA-256"),
        (format!("dash 0.5 {}", sha256.to_uppercase()), "not a SHA-256"),
        (format!("--dash 0.5 {sha256}"), "not the name"),
        (format!("../dash 0.5 {sha256}"), "not the name"),
        (format!("dash ../5 {sha256}"), "is not a version"),
        (format!("dash -5 {sha256}"), "is not a version"),
        (format!("sed 1 {sha256}\ndash 1 {sha256}"), "not sorted"),
        (format!("dash 1 {sha256}\ndash 2 {sha256}"), "is listed twice"),
    ] {
        let error = format!("{:#}", Lock::parse(&format!("{HEADER}\n{line}\n")).expect_err(&line));
        assert!(error.contains(reason), "{line}: {error}");
    }
    assert!(Lock::parse("").is_err());
    assert!(Lock::parse("# Chitin root image packages, version 2\n").is_err());
}

#[test]
fn changes_are_listed_by_name() {
    let old = lock(&[pin("bash", "5"), pin("dash", "1"), pin("sed", "4")]);
    let new = lock(&[pin("dash", "2"), pin("sed", "4"), pin("tar", "1")]);
    assert_eq!(old.list_changes(&new), ["bash 5 is gone", "dash 1 → 2", "tar 1 is new"]);
    assert_eq!(old.list_changes(&old), [""; 0]);
}

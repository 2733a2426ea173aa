use clap::Parser;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn parse(words: &[&str]) -> Result<Args, clap::Error> {
    Cli::try_parse_from(std::iter::once(&"nested").chain(words)).map(|cli| cli.args)
}

#[test]
fn everything_behind_the_command_is_its_own() {
    let args = parse(&["--icount", "--timeout", "90s", "--", "sh", "--timeout", "-c"]).unwrap();
    assert!(args.icount);
    assert_eq!(args.timeout, Duration::from_secs(90));
    assert_eq!(args.command, ["sh", "--timeout", "-c"]);
    assert_eq!(parse(&["sh", "--icount"]).unwrap().command, ["sh", "--icount"]);
}

#[test]
fn defaults() {
    let args = parse(&["true"]).unwrap();
    assert_eq!((args.memory, args.cpus, args.timeout), (4096, 1, Duration::from_secs(600)));
}

#[test]
fn nonsense_is_refused() {
    for words in [
        &["--"][..],
        &["--memory", "0", "true"],
        &["--cpus", "99", "true"],
        &["--timeout", "soon", "true"],
        &["--icount", "--cpus", "2", "true"],
    ] {
        assert!(parse(words).is_err(), "{words:?}");
    }
}

#[test]
fn exit_waits_for_announced_output() {
    let mut progress = Progress { exit: Some((7, [10, 2])), ..Progress::default() };
    assert_eq!(progress.code(), None);
    progress.passed = [10, 0];
    assert_eq!(progress.code(), None);
    progress.passed = [10, 2];
    assert_eq!(progress.code(), Some(7));
    assert_eq!(Progress { passed: [1, 1], ..Progress::default() }.code(), None);
}

#[test]
fn variables_need_a_value() {
    assert!(environment(&["A=1".into()], false).unwrap().contains(&b"A=1".to_vec()));
    assert!(environment(&["A".into()], false).is_err());
    assert!(environment(&[], true).unwrap().contains(&b"CHITIN_NESTED=icount".to_vec()));
}

#[test]
fn deterministic_clock_has_one_cpu_and_a_seed() {
    let host = host::Host { kernel: "/k".into(), initrd: "/i".into() };
    let line = |words: &[&str]| {
        let list =
            qemu_arguments(&parse(words).unwrap(), &host, &["/out".into()], &[3, 4, 5, 6, 7]);
        list.join(std::ffi::OsStr::new(" ")).into_string().unwrap()
    };
    let icount = line(&["--icount", "true"]);
    assert!(
        icount.contains("tcg,thread=single -icount shift=1,sleep=off -smp 1")
            && icount.contains("-seed 1")
    );
    let plain = line(&["--cpus", "3", "true"]);
    assert!(plain.contains("thread=multi -smp 3") && !plain.contains("-icount"));
    assert!(plain.contains("readonly=on,path=/ ") && plain.contains("multidevs=remap,path=/out "));
}

#[test]
fn links_on_the_way_are_preloaded() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    fs::create_dir_all(root.join("usr/bin")).unwrap();
    fs::write(root.join("usr/bin/dash"), "").unwrap();
    std::os::unix::fs::symlink("usr/bin", root.join("bin")).unwrap();
    std::os::unix::fs::symlink("./dash", root.join("usr/bin/ash")).unwrap();
    std::os::unix::fs::symlink(root.join("bin/../bin/ash"), root.join("usr/bin/sh")).unwrap();
    let mut found = BTreeSet::new();
    add_files(&root.join("bin/sh"), &mut found).unwrap();
    let expected = ["bin", "usr/bin/ash", "usr/bin/dash", "usr/bin/sh"].map(|name| root.join(name));
    assert_eq!(found, expected.into());
}

#[test]
fn a_loop_of_links_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("loop", dir.path().join("loop")).unwrap();
    assert!(add_with_links(&dir.path().join("loop"), &mut BTreeSet::new()).is_err());
}

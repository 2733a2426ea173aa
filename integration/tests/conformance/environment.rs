//! What a workload is started with.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use chitin_integration::{On, unix_time};

on_every_tier!(
    the_environment_is_what_was_asked_for,
    odd_values_arrive_as_they_are,
    arguments_arrive_as_they_are,
    the_workload_starts_where_it_is_told,
    signals_and_masks_are_as_after_a_login,
    the_clock_is_right_and_entropy_is_there,
    every_sandbox_has_the_same_name,
    python_comes_with_its_batteries,
    processes_have_their_own_proc,
);

fn the_environment_is_what_was_asked_for(on: On) {
    let outcome = on
        .with("--env A=1 --env B=x=y --env FROM_HOST -- env")
        .env("FROM_HOST", "h")
        .env("NOT_ASKED_FOR", "n")
        .outcome();
    let mut environment: Vec<&str> = outcome.ok().lines().collect();
    environment.sort_unstable();
    let expected = [
        "A=1",
        "B=x=y",
        "FROM_HOST=h",
        "HOME=/work",
        "LANG=C.UTF-8",
        "PATH=/usr/local/bin:/usr/bin:/bin",
        "TMPDIR=/tmp",
        "USER=agent",
    ];
    assert_eq!(environment, expected);
}

fn odd_values_arrive_as_they_are(on: On) {
    let values =
        [b"".to_vec(), b"a\nb\t".to_vec(), b"\xff\xfe".to_vec(), "ß=ü".into(), vec![b'x'; 60_000]];
    let mut chitin = on.with("");
    let mut expected = Vec::new();
    for (number, value) in values.into_iter().enumerate() {
        let pair = [format!("ODD{number}=").into_bytes(), value].concat();
        expected.extend([pair.clone(), vec![0]].concat());
        chitin = chitin.arg("--env").arg(OsString::from_vec(pair));
    }
    let program = "import os, sys
for key in sorted(k for k in os.environb if k.startswith(b'ODD')):
    sys.stdout.buffer.write(key + b'=' + os.environb[key] + b'\\0')";
    let outcome = chitin.args(["--", "python3", "-c", program]).outcome();
    assert!(outcome.stdout == expected, "{}", outcome.stderr);
}

fn arguments_arrive_as_they_are(on: On) {
    let odd = [
        b"".to_vec(),
        b"--".to_vec(),
        b"-x y".to_vec(),
        b"a\nb".to_vec(),
        b"\xff*$HOME".to_vec(),
        vec![b'y'; 100_000],
    ];
    let program = "import os, sys
for word in sys.argv[1:]: sys.stdout.buffer.write(os.fsencode(word) + b'\\0')";
    let outcome = on.python(program).args(odd.iter().cloned().map(OsString::from_vec)).outcome();
    let expected: Vec<u8> = odd.into_iter().flat_map(|word| [word, vec![0]].concat()).collect();
    assert!(outcome.stdout == expected, "{}", outcome.stderr);
}

fn the_workload_starts_where_it_is_told(on: On) {
    assert_eq!(on.run("pwd").outcome().ok(), "/work");
    assert_eq!(on.with("--workdir /tmp -- pwd").outcome().ok(), "/tmp");
    let nowhere = on.with("--workdir /nowhere -- pwd").outcome();
    assert_eq!(nowhere.code, 125);
    assert!(nowhere.stderr.contains("/nowhere"), "{nowhere:?}");
}

fn signals_and_masks_are_as_after_a_login(on: On) {
    let program = "import os, signal
print(oct(os.umask(0)), sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
# Python itself ignores these two.
own = {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT}
print([s.name for s in signal.valid_signals() - own if signal.getsignal(s) == signal.SIG_IGN])
print(sorted(int(fd) for fd in os.listdir('/proc/self/fd'))[:3], os.getpid() != 1, os.getpgrp() == os.getpid())";
    assert_eq!(on.python(program).outcome().ok(), "0o22 []\n[]\n[0, 1, 2] True True");
}

fn the_clock_is_right_and_entropy_is_there(on: On) {
    let before = unix_time();
    let seen: u64 = on.run("date +%s").outcome().ok().parse().expect("a number");
    let after = unix_time();
    assert!((before - 1..=after + 1).contains(&seen), "{before} {seen} {after}");
    let random = || on.sh("head -c 16 /dev/urandom | od -An -tx1").outcome().ok().to_owned();
    assert_ne!(random(), random());
}

fn every_sandbox_has_the_same_name(on: On) {
    assert_eq!(on.run("uname -n").outcome().ok(), "chitin");
}

fn python_comes_with_its_batteries(on: On) {
    let program =
        "import json, os, ssl, sqlite3, ctypes, hashlib, zoneinfo, subprocess, multiprocessing, uuid
print(len(os.listdir(ssl.get_default_verify_paths().capath)) > 100,
      subprocess.check_output(['sh', '-c', 'echo sub'], text=True).strip(),
      multiprocessing.Pool(2).map(abs, [-2]))";
    assert_eq!(on.python(program).outcome().ok(), "True sub [2]");
}

fn processes_have_their_own_proc(on: On) {
    // Until it has become what it is to be.
    let script = "sleep 600 & until tr '\\0' ' ' < /proc/$!/cmdline | grep -q '^sleep 600'; do :; done; \
                  test -d /proc/$$ && echo self";
    assert_eq!(on.sh(script).outcome().ok(), "self");
}

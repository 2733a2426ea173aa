//! The environment of a workload: variables, arguments, directory, signals, clock and programs.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use chitin_integration::{TierKind, TierUnderTest, unix_time};

on_every_tier!(
    environment_has_only_requested_variables,
    unusual_variables_arrive_unchanged,
    arguments_arrive_unchanged,
    workdir_option_sets_working_directory,
    signals_and_umask_have_login_defaults,
    clock_is_correct_and_entropy_available,
    hostname_is_the_same_in_every_sandbox,
    localhost_and_host_name_are_served,
    machine_numbers_differ_as_documented,
    python_standard_library_is_complete,
    proc_shows_processes_of_workload,
);

fn environment_has_only_requested_variables(tier: TierUnderTest) {
    let outcome = tier
        .run_with("--env A=1 --env B=x=y --env FROM_HOST -- env")
        .env("FROM_HOST", "h")
        .env("NOT_ASKED_FOR", "n")
        .outcome();
    let mut environment: Vec<&str> = outcome.assert_success().lines().collect();
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

fn unusual_variables_arrive_unchanged(tier: TierUnderTest) {
    let values =
        [b"".to_vec(), b"a\nb\t".to_vec(), b"\xff\xfe".to_vec(), "ß=ü".into(), vec![b'x'; 60_000]];
    let mut chitin = tier.run_with("");
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

fn arguments_arrive_unchanged(tier: TierUnderTest) {
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
    let outcome =
        tier.run_python(program).args(odd.iter().cloned().map(OsString::from_vec)).outcome();
    let expected: Vec<u8> = odd.into_iter().flat_map(|word| [word, vec![0]].concat()).collect();
    assert!(outcome.stdout == expected, "{}", outcome.stderr);
}

fn workdir_option_sets_working_directory(tier: TierUnderTest) {
    assert_eq!(tier.run("pwd").outcome().assert_success(), "/work");
    assert_eq!(tier.run_with("--workdir /tmp -- pwd").outcome().assert_success(), "/tmp");
    // A relative path is below /work, as that of a copy is.
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("d")).unwrap();
    let copy = format!("{}:d", dir.path().join("d").display());
    let run = tier.run_with("--workdir d --copy-in").args([&copy, "--", "pwd"]);
    assert_eq!(run.outcome().assert_success(), "/work/d");
    let nowhere = tier.run_with("--workdir /nowhere -- pwd").outcome();
    assert_eq!(nowhere.code, 125);
    assert!(nowhere.stderr.contains("/nowhere"), "{nowhere:?}");
}

fn signals_and_umask_have_login_defaults(tier: TierUnderTest) {
    let program = "import os, signal
print(oct(os.umask(0)), sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
# Python itself changes the handlers of these three.
own = {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT}
print([s.name for s in signal.valid_signals() - own if signal.getsignal(s) == signal.SIG_IGN])
print(sorted(int(fd) for fd in os.listdir('/proc/self/fd'))[:3],
      os.getpid() != 1, os.getpgrp() == os.getpid())";
    assert_eq!(
        tier.run_python(program).outcome().assert_success(),
        "0o22 []\n[]\n[0, 1, 2] True True"
    );
}

fn clock_is_correct_and_entropy_available(tier: TierUnderTest) {
    let before = unix_time();
    let seen: u64 = tier.run("date +%s").outcome().assert_success().parse().expect("a number");
    let after = unix_time();
    assert!((before - 1..=after + 1).contains(&seen), "{before} {seen} {after}");
    let random = || {
        tier.run_sh("head -c 16 /dev/urandom | od -An -tx1").outcome().assert_success().to_owned()
    };
    assert_ne!(random(), random());
}

fn hostname_is_the_same_in_every_sandbox(tier: TierUnderTest) {
    assert_eq!(tier.run("uname -n").outcome().assert_success(), "chitin");
}

fn python_standard_library_is_complete(tier: TierUnderTest) {
    let program = "import json, os, ssl, sqlite3, ctypes, hashlib, zoneinfo, uuid
import subprocess, multiprocessing
print(len(os.listdir(ssl.get_default_verify_paths().capath)) > 100,
      subprocess.check_output(['sh', '-c', 'echo sub'], text=True).strip(),
      multiprocessing.Pool(2).map(abs, [-2]))";
    assert_eq!(tier.run_python(program).outcome().assert_success(), "True sub [2]");
}

fn proc_shows_processes_of_workload(tier: TierUnderTest) {
    // The child has the shell's command line until it executes `sleep`.
    let script = "sleep 600 & \
                  until tr '\\0' ' ' < /proc/$!/cmdline | grep -q '^sleep 600'; do :; done; \
                  test -d /proc/$$ && echo self";
    assert_eq!(tier.run_sh(script).outcome().assert_success(), "self");
}

fn localhost_and_host_name_are_served(tier: TierUnderTest) {
    let program = "import asyncio, socket
async def serve():
    server = await asyncio.start_server(lambda *_: None, 'localhost', 8000)
    return [s.getsockname()[0] for s in server.sockets]
print(asyncio.run(serve()), socket.gethostbyname(socket.gethostname()))";
    let outcome = tier.run_python(program).outcome();
    assert_eq!(outcome.assert_success(), "['127.0.0.1'] 127.0.0.1");
}

fn machine_numbers_differ_as_documented(tier: TierUnderTest) {
    let program = "import os
memory = int(open('/proc/meminfo').readline().split()[1])
uptime = float(open('/proc/uptime').read().split()[0])
print(os.cpu_count(), memory <= 262144, uptime < 600, os.path.exists('/dev/mqueue'))";
    let outcome = tier.run_with("--cpus 1 --memory 256 -- python3 -c").arg(program).outcome();
    let host_cpus = std::thread::available_parallelism().expect("count CPUs");
    let expected = match tier.kind {
        TierKind::Ironclaw => "1 True True False".to_owned(),
        TierKind::Nanoclaw => format!("{host_cpus} True True False"),
        // The host of the daemon, which has been running for longer.
        TierKind::Nemoclaw => format!("{host_cpus} False False True"),
    };
    assert_eq!(outcome.assert_success(), expected);
}

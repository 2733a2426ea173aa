//! Each field of a policy, seen from inside: kept on every tier, or refused there with a reason.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::thread;

use chitin::TierKind;
use chitin_integration::{On, Outcome, file, workspace};
use serde_json::Value;

on_every_tier!(
    a_restricted_workload_has_lost_what_it_does_not_need,
    without_a_policy_the_same_can_be_read,
    python_node_and_go_run_under_default_deny,
    files_that_are_read_are_copies_and_their_neighbours_are_not_there,
    files_that_are_read_lie_wherever_the_image_has_nothing,
    files_that_are_written_are_written_back_on_success,
    processes_have_an_end,
    memory_has_an_end,
    the_disk_has_an_end,
    time_has_an_end,
    more_than_the_policy_allows_is_refused,
    credentials_come_as_the_policy_says_and_the_report_names_it,
    a_policy_says_what_may_be_connected_to,
    what_is_not_listed_is_not_connected_to,
    a_tier_that_the_policy_does_not_list_is_refused,
    a_check_says_beforehand_what_a_run_will_say,
);

/// Whether the kernel below can keep a policy of files: gVisor's has no Landlock, and a run is refused there.
fn confines_files(on: On) -> bool {
    let tried = on.policy("sandbox: {profile: restricted}\n").sh("true").outcome();
    if tried.code != 0 {
        assert_eq!(on.tier, TierKind::Nanoclaw, "{tried:?}");
        tried.refused("Landlock");
    }
    tried.code == 0
}

fn a_restricted_workload_has_lost_what_it_does_not_need(on: On) {
    if !confines_files(on) {
        return;
    }
    let policy = on.policy("sandbox: {profile: restricted}\nresources: {timeout: 10m}\n");
    let seen = policy.python(
        "
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*a):
    ctypes.set_errno(0)
    r = libc.syscall(*[ctypes.c_long(x) for x in a])
    return errno.errorcode.get(ctypes.get_errno(), '?') if r < 0 else 'ok'
def tried(f, *a):
    try: f(*a)
    except OSError as e: return errno.errorcode[e.errno]
    return 'ok'
status = dict(line.split(':\t', 1) for line in open('/proc/self/status').read().splitlines() if ':\t' in line)
print('caps', *[status[k] for k in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')])
print('new privileges', status['NoNewPrivs'], 'uid', os.getuid(), os.getgroups())
print('write', *[tried(open, p, 'w') for p in ('/x', '/etc/x', '/usr/bin/x')])
print('scratch', *[tried(open, p + '/x', 'w') for p in ('/work', '/tmp', '/var/tmp', '/dev/shm')])
print('list', *[tried(os.listdir, p) for p in ('/', '/var', '/mnt', '/root')], *[tried(os.listdir, p) for p in ('/usr', '/etc')])
print('vsock', call(41, 40, 1, 0), 'packet', call(41, 17, 3, 0), 'unix', call(41, 1, 1, 0))
print('calls', *[call(n, 0, 0, 0, 0, 0, 0) for n in (101, 165, 155, 161, 272, 308, 175, 169, 321, 425, 250, 103)])
",
    );
    let eperm = ["EPERM"; 12].join(" ");
    let expected = format!(
        "caps 0000000000000400 0000000000000400 0000000000000400 0000000000000400 0000000000000400
new privileges 1 uid 1000 []
write EROFS EROFS EROFS
scratch ok ok ok ok
list EACCES EACCES EACCES EACCES ok ok
vsock EAFNOSUPPORT packet EAFNOSUPPORT unix ok
calls {eperm}"
    );
    assert_eq!(seen.outcome().ok(), expected);
}

fn without_a_policy_the_same_can_be_read(on: On) {
    // What the case above denies is there and is readable: it is the policy that takes it away.
    let program = "import os; print(os.listdir('/') != [], os.listdir('/var') != [])";
    assert_eq!(on.policy("plugin: x\n").python(program).outcome().ok(), "True True");
}

fn python_node_and_go_run_under_default_deny(on: On) {
    let programs = workspace().join("target/programs");
    assert!(programs.join("node").exists(), "no target/programs: `cargo xtask test` fetches them");
    // Room for Node itself, which is 150 MB, and lies in memory like every file.
    let profile = if confines_files(on) { "restricted" } else { "default" };
    let policy = on.policy(&format!(
        "sandbox: {{profile: {profile}, syscall_filter: default_deny}}\n\
         resources: {{memory_mib: 1024, disk_mib: 400, timeout: 10m}}\n"
    ));
    let link = |name: &str| fs::canonicalize(programs.join(name)).unwrap().display().to_string();
    let script = "
set -e
python3 -c 'import asyncio, multiprocessing, subprocess, threading
print(asyncio.run(asyncio.sleep(0, 1)), multiprocessing.Pool(2).map(abs, [-2]), subprocess.getoutput(\"echo 3\"))'
./node -e '
const { Worker } = require(\"worker_threads\"), fs = require(\"fs\");
console.log(require(\"child_process\").execSync(\"echo child\").toString().trim());
fs.writeFileSync(\"a.ts\", \"const x: number = 6 * 7; console.log(x)\");
require(\"crypto\").pbkdf2(\"a\", \"b\", 1, 4, \"sha256\", (e, key) => console.log(key.length));
const server = require(\"http\").createServer((q, s) => s.end(\"served\")).listen(0, \"127.0.0.1\", () =>
  fetch(`http://127.0.0.1:${server.address().port}`).then(r => r.text()).then(text => {
    console.log(text); server.close();
    new Worker(\"console.log(1)\", { eval: true }).on(\"exit\", code => { console.log(\"worker\", code); process.exit(0); });
  }));'
./esbuild a.ts --minify";
    let outcome = policy
        .run()
        .arg("--copy-in")
        .arg(format!("{}:node", link("node")))
        .arg("--copy-in")
        .arg(format!("{}:esbuild", link("esbuild")))
        .args(["--", "sh", "-c", script])
        .outcome();
    let lines: Vec<&str> = outcome.ok().lines().collect();
    assert_eq!(lines[..2], ["1 [2] 3", "child"], "{outcome:?}");
    for line in ["4", "served", "worker 0", "const x=42;console.log(42);"] {
        assert!(lines.contains(&line), "no {line} in {outcome:?}");
    }
}

fn files_that_are_read_are_copies_and_their_neighbours_are_not_there(on: On) {
    let policy = on.policy("");
    let dir = policy.dir.path();
    file(dir, "config", "settings").unwrap();
    file(dir, "other", "not listed").unwrap();
    let text = format!(
        "runtime: {}
sandbox: {{filesystem: [{{access: read-only, path: /shared/config, source: {}/config}}]}}
",
        on.tier,
        dir.display(),
    );
    fs::write(&policy.path, text).unwrap();
    let script =
        "cat /shared/config; echo; ls /shared; cat /shared/other; ls /; echo x >/shared/config";
    let outcome = policy.sh(script).outcome();
    if !confines_files(on) {
        outcome.refused("Landlock");
        return;
    }
    assert_eq!(outcome.text(), "settings", "{outcome:?}");
    let said: Vec<&str> =
        outcome.stderr.lines().filter_map(|line| line.rsplit(": ").next()).collect();
    // Its directory is not listed, only it is; its neighbour is not there; nor is the root listed.
    let denied = "Permission denied";
    // In a container it lies in a tmpfs of its own, and Landlock alone keeps it from being written.
    let written = if on.tier == TierKind::Ironclaw { "Read-only file system" } else { denied };
    assert_eq!(said, [denied, "No such file or directory", denied, written], "{outcome:?}");
    assert_eq!(fs::read_to_string(dir.join("config")).unwrap(), "settings");
}

fn files_that_are_read_lie_wherever_the_image_has_nothing(on: On) {
    let policy = on.policy("");
    let dir = policy.dir.path();
    file(dir, "config", "settings").unwrap();
    fs::create_dir(dir.join("data")).unwrap();
    file(dir, "data/one", "1").unwrap();
    let run = |places: &[(&str, &str)], script: &str| {
        let files = places.iter().map(|(path, source)| {
            format!("{{access: read-only, path: {path}, source: {}/{source}}}", dir.display())
        });
        let files = files.collect::<Vec<_>>().join(", ");
        fs::write(
            &policy.path,
            format!("runtime: {}\nsandbox: {{filesystem: [{files}]}}\n", on.tier),
        )
        .unwrap();
        policy.sh(script).outcome()
    };
    // In a directory that is there, in one that is not, and in an empty one.
    let outcome = run(
        &[("/etc/app/deep/config", "config"), ("/data", "data"), ("/mnt/config", "config")],
        "cat /etc/app/deep/config /data/one /mnt/config /etc/passwd",
    );
    if !confines_files(on) {
        outcome.refused("Landlock");
        return;
    }
    // What the image has is still there beside it.
    assert!(outcome.ok().starts_with("settings1settingsroot:x:0:0"), "{outcome:?}");

    let beside = run(&[("/etc/app.config", "config")], "cat /etc/app.config");
    match on.tier {
        TierKind::Ironclaw => assert_eq!(beside.ok(), "settings"),
        _ => beside.refused(
            "/etc belongs to the image and is read-only: choose a directory that the image",
        ),
    }
}

fn files_that_are_written_are_written_back_on_success(on: On) {
    let confines = confines_files(on);
    let policy = on.policy("");
    let dir = policy.dir.path();
    fs::create_dir(dir.join("state")).unwrap();
    file(dir, "state/count", "1").unwrap();
    let text = format!(
        "runtime: {}
sandbox: {{filesystem: [{{access: read-write, path: /work/state, source: {}/state}}]}}
",
        on.tier,
        dir.display(),
    );
    fs::write(&policy.path, text).unwrap();
    let script =
        "cat /work/state/count; echo 2 >/work/state/count; echo new >/work/state/new; exit $CODE";
    let run = |code: &str| {
        policy.run().args(["--env", &format!("CODE={code}"), "--", "sh", "-c", script]).outcome()
    };
    let failed = run("3");
    if !confines {
        failed.refused("Landlock");
        return;
    }
    assert_eq!((failed.code, failed.text()), (3, "1"), "{failed:?}");
    assert_eq!(fs::read_to_string(dir.join("state/count")).unwrap(), "1");
    assert!(!dir.join("state/new").exists());

    run("0").ok();
    assert_eq!(fs::read_to_string(dir.join("state/count")).unwrap(), "2\n");
    assert_eq!(fs::read_to_string(dir.join("state/new")).unwrap(), "new\n");
}

fn processes_have_an_end(on: On) {
    let policy = on.policy("resources: {pids: 20}\n");
    let outcome = policy
        .python(
            "
import os, errno
n = 0
try:
    while n < 1000:
        if os.fork() == 0:
            os.read(os.pipe()[0], 1)
        n += 1
    print(n, 'without end', flush=True)
except OSError as e:
    print(n, errno.errorcode[e.errno], flush=True)
os.kill(0, 9)
",
        )
        .outcome();
    assert_eq!(outcome.code, 137, "{outcome:?}");
    let count = outcome.text().strip_suffix(" EAGAIN").and_then(|count| count.parse::<u32>().ok());
    let count = count.unwrap_or_else(|| panic!("{outcome:?}"));
    match on.tier {
        // Twenty, of which this one is the first.
        TierKind::Ironclaw | TierKind::Nanoclaw => assert_eq!(count, 19),
        // The agent's own count as well, and are allowed for.
        TierKind::Nemoclaw => assert!((19..=28).contains(&count), "{count}"),
    }
}

fn memory_has_an_end(on: On) {
    let policy = on.policy("resources: {memory_mib: 128}\n");
    let take = "x = b'x' * (200 << 20); print(len(x))";
    assert_ne!(policy.python(take).outcome().code, 0);
    assert_eq!(policy.python("x = b'x' * (30 << 20); print(len(x) >> 20)").outcome().ok(), "30");
}

fn the_disk_has_an_end(on: On) {
    let policy = on.policy("resources: {disk_mib: 16}\n");
    let script = "for d in /work /tmp /dev/shm; do head -c 17M /dev/zero > $d/f || echo $d ends; done; \
                  cat /work/f /tmp/f /dev/shm/f | wc -c; rm /work/f; head -c 4M /dev/zero > /work/f && echo four";
    let outcome = policy.sh(script).outcome();
    let lines: Vec<&str> = outcome.ok().lines().collect();
    let written: u64 = lines[lines.len() - 2].parse().unwrap();
    assert!(written <= 16 << 20, "{outcome:?}");
    assert_eq!(lines.last(), Some(&"four"));
    assert!(outcome.stderr.contains("No space left on device"), "{outcome:?}");
}

fn time_has_an_end(on: On) {
    let policy = on.policy("resources: {timeout: 25s}\n");
    let outcome = policy.sh("echo started; sleep 600").outcome();
    assert_eq!((outcome.code, outcome.text()), (124, "started"), "{outcome:?}");
}

fn more_than_the_policy_allows_is_refused(on: On) {
    let policy = on.policy("resources: {vcpus: 2, memory_mib: 256, timeout: 1m}\n");
    for (option, value, words) in [
        ("--cpus", "3", "vcpus 3 is more than the 2"),
        ("--memory", "257", "memory_mib 257 is more than the 256"),
        ("--timeout", "61s", "1m 1s is more than the 1m"),
        ("--secret", "A=env:HOME", "does not list it"),
        ("--allow", "evil.example:443", "the policy"),
    ] {
        policy.run().args([option, value, "--", "true"]).outcome().refused(words);
    }
}

fn credentials_come_as_the_policy_says_and_the_report_names_it(on: On) {
    let policy = on.policy(
        "plugin: web_scraper
secrets:
  - {name: TOKEN, source: 'env:HOST_TOKEN'}
  - {name: KEY, source: 'exec:echo key', delivery: env}
",
    );
    let report = policy.dir.path().join("r.json");
    let outcome = policy
        .run()
        .env("HOST_TOKEN", "s3cret")
        .arg("--report")
        .arg(&report)
        .args(["--", "sh", "-c", "cat $TOKEN_FILE; echo; echo $KEY; env | grep -c TOKEN="])
        .outcome();
    assert_eq!(outcome.text(), "s3cret\nkey\n0", "{outcome:?}");
    let report: Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    let governed = &report["policy"];
    assert_eq!(
        (&governed["plugin"], &governed["profile"]),
        (&"web_scraper".into(), &"default".into())
    );
    assert_eq!(governed["file"], policy.path.as_str());
    assert_eq!(governed["digest"].as_str().map(str::len), Some(64));
}

fn a_policy_says_what_may_be_connected_to(on: On) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let held =
        thread::spawn(move || listener.accept().map(|(mut stream, _)| stream.write_all(b"hello")));
    let policy = on.policy(&format!(
        "sandbox: {{network: {{allowed_egress: ['localhost:{port}', '*.example.com:443']}}}}\n"
    ));
    let program = format!(
        "import socket
print(socket.create_connection(('localhost', {port})).recv(5).decode())
try:
    socket.create_connection(('other.example', 443))
except socket.gaierror:
    print('none')"
    );
    let outcome: Outcome =
        policy.run().args(["--allow-private", "--", "python3", "-c"]).arg(program).outcome();
    assert_eq!(outcome.ok(), "hello\nnone");
    held.join().unwrap().unwrap().unwrap();
    policy.run().args(["--allow", "a.example.com:443", "--", "true"]).outcome().ok();
}

fn what_is_not_listed_is_not_connected_to(on: On) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let policy = on.policy("sandbox: {network: {allowed_egress: ['api.example.com:443']}}\n");
    let program = format!(
        "import socket
for host, port in ('localhost', {port}), ('127.0.0.1', {port}), ('192.0.2.1', 443), ('example.com', 443):
    try:
        socket.create_connection((host, port), timeout=5)
        print(host, 'connected')
    except OSError: print(host, 'refused')"
    );
    let outcome = policy.python(&program).outcome();
    assert_eq!(
        outcome.ok(),
        "localhost refused\n127.0.0.1 refused\n192.0.2.1 refused\nexample.com refused"
    );
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "somebody has connected to the host's loopback");
}

fn a_tier_that_the_policy_does_not_list_is_refused(on: On) {
    let policy = on.policy("plugin: x\n");
    for other in [TierKind::Ironclaw, TierKind::Nanoclaw, TierKind::Nemoclaw] {
        if other != on.tier {
            let words = format!("does not accept the tier {other}");
            policy
                .run()
                .args(["--fallback", &other.to_string(), "--", "true"])
                .outcome()
                .refused(&words);
        }
    }
}

fn a_check_says_beforehand_what_a_run_will_say(on: On) {
    let check = |text: &str| {
        let policy = on.policy(text);
        on.bare("policy check").arg(&policy.path).outcome()
    };
    let fine = check("plugin: x\n");
    assert!(fine.ok().contains(&format!("On {}, all of it is enforced:", on.tier)), "{fine:?}");
    let egress = check("sandbox: {network: {allowed_egress: ['api.example.com:443']}}\n");
    assert!(egress.ok().contains("a broker on this host dials the listed endpoints"), "{egress:?}");
}

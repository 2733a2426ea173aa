//! Each field of a policy: enforced on every tier, or refused there with a reason.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::thread;

use chitin::TierKind;
use chitin_integration::{Outcome, TierUnderTest, program_copy, write_file};
use serde_json::Value;

on_every_tier!(
    restricted_profile_removes_privileges,
    root_is_readable_without_restricted_profile,
    python_node_and_go_run_under_default_deny,
    read_only_file_is_copied_without_siblings,
    read_only_file_may_use_any_unused_path,
    read_write_files_are_written_back_on_success,
    policy_limits_processes,
    policy_limits_memory,
    policy_limits_disk,
    policy_limits_time,
    options_exceeding_policy_are_rejected,
    policy_delivers_secrets_and_is_in_report,
    host_use_of_policy_requires_consent,
    endpoint_listed_in_policy_is_reachable,
    endpoint_missing_from_policy_is_unreachable,
    tier_missing_from_policy_is_rejected,
    policy_check_predicts_run,
);

/// Returns true if the kernel enforces a policy of files. gVisor's has no Landlock, so that runs
/// are refused there.
fn confines_files(tier: TierUnderTest) -> bool {
    let tried = tier.write_policy("sandbox: {profile: restricted}\n").run_sh("true").outcome();
    if tried.code != 0 {
        assert_eq!(tier.kind, TierKind::Nanoclaw, "{tried:?}");
        tried.assert_refused("Landlock");
    }
    tried.code == 0
}

fn restricted_profile_removes_privileges(tier: TierUnderTest) {
    if !confines_files(tier) {
        return;
    }
    let policy = tier.write_policy("sandbox: {profile: restricted}\nresources: {timeout: 10m}\n");
    let seen = policy.run_python(
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
lines = open('/proc/self/status').read().splitlines()
status = dict(line.split(':\t', 1) for line in lines if ':\t' in line)
print('caps', *[status[k] for k in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb')])
print('new privileges', status['NoNewPrivs'], 'uid', os.getuid(), os.getgroups())
print('write', *[tried(open, p, 'w') for p in ('/x', '/etc/x', '/usr/bin/x')])
print('scratch', *[tried(open, p + '/x', 'w') for p in ('/work', '/tmp', '/var/tmp', '/dev/shm')])
print('list', *[tried(os.listdir, p) for p in ('/', '/var', '/mnt', '/root', '/usr', '/etc')])
print('vsock', call(41, 40, 1, 0), 'packet', call(41, 17, 3, 0), 'unix', call(41, 1, 1, 0))
numbers = 101, 165, 155, 161, 272, 308, 175, 169, 321, 425, 250, 103
print('calls', *[call(n, 0, 0, 0, 0, 0, 0) for n in numbers])
",
    );
    let (caps, eperm) = (["0000000000000400"; 5].join(" "), ["EPERM"; 12].join(" "));
    let expected = format!(
        "caps {caps}
new privileges 1 uid 1000 []
write EROFS EROFS EROFS
scratch ok ok ok ok
list EACCES EACCES EACCES EACCES ok ok
vsock EAFNOSUPPORT packet EAFNOSUPPORT unix ok
calls {eperm}"
    );
    assert_eq!(seen.outcome().assert_success(), expected);
}

fn root_is_readable_without_restricted_profile(tier: TierUnderTest) {
    // The directories of the case above are readable; only the policy denies them.
    let program = "import os; print(os.listdir('/') != [], os.listdir('/var') != [])";
    assert_eq!(
        tier.write_policy("plugin: x\n").run_python(program).outcome().assert_success(),
        "True True"
    );
}

fn python_node_and_go_run_under_default_deny(tier: TierUnderTest) {
    // Node takes 150 MB of the disk, which is memory.
    let profile = if confines_files(tier) { "restricted" } else { "default" };
    let policy = tier.write_policy(&format!(
        "sandbox: {{profile: {profile}, syscall_filter: default_deny}}\n\
         resources: {{memory_mib: 1024, disk_mib: 400, timeout: 10m}}\n"
    ));
    let outcome = policy
        .run()
        .args(["--copy-in", &program_copy("node"), "--copy-in", &program_copy("esbuild")])
        .args(["--", "sh", "-c", PROGRAMS])
        .outcome();
    let lines: Vec<&str> = outcome.assert_success().lines().collect();
    assert_eq!(lines[..2], ["1 [2] 3", "child"], "{outcome:?}");
    for line in ["4", "served", "worker 0", "const x=42;console.log(42);"] {
        assert!(lines.contains(&line), "no {line} in {outcome:?}");
    }
}

/// Runs Python, Node and esbuild, with threads, processes, sockets and files.
const PROGRAMS: &str = "
set -e
python3 -c 'import asyncio, multiprocessing, subprocess, threading
print(asyncio.run(asyncio.sleep(0, 1)), multiprocessing.Pool(2).map(abs, [-2]),
      subprocess.getoutput(\"echo 3\"))'
./node -e '
const { Worker } = require(\"worker_threads\"), fs = require(\"fs\");
console.log(require(\"child_process\").execSync(\"echo child\").toString().trim());
fs.writeFileSync(\"a.ts\", \"const x: number = 6 * 7; console.log(x)\");
require(\"crypto\").pbkdf2(\"a\", \"b\", 1, 4, \"sha256\", (e, key) => console.log(key.length));
const server = require(\"http\").createServer((q, s) => s.end(\"served\"));
server.listen(0, \"127.0.0.1\", () =>
  fetch(`http://127.0.0.1:${server.address().port}`).then(r => r.text()).then(text => {
    console.log(text); server.close();
    new Worker(\"console.log(1)\", { eval: true }).on(\"exit\", code => {
      console.log(\"worker\", code); process.exit(0);
    });
  }));'
./esbuild a.ts --minify";

fn read_only_file_is_copied_without_siblings(tier: TierUnderTest) {
    let policy = tier.write_policy("");
    let dir = policy.dir.path();
    write_file(dir, "config", "settings").unwrap();
    write_file(dir, "other", "not listed").unwrap();
    policy.rewrite(&format!(
        "sandbox:\n  filesystem:\n  \
         - {{access: read-only, path: /shared/config, source: {}/config}}\n",
        dir.display(),
    ));
    let script =
        "cat /shared/config; echo; ls /shared; cat /shared/other; ls /; echo x >/shared/config";
    let outcome = policy.run_sh(script).outcome();
    if !confines_files(tier) {
        outcome.assert_refused("Landlock");
        return;
    }
    assert_eq!(outcome.stdout_text(), "settings", "{outcome:?}");
    let errors: Vec<&str> =
        outcome.stderr.lines().filter_map(|line| line.rsplit(": ").next()).collect();
    // The policy lists the file, not its directory or the root, and its sibling is not copied.
    let denied = "Permission denied";
    // In a container the file is in a separate tmpfs, where Landlock alone denies writes.
    let written = if tier.kind == TierKind::Ironclaw { "Read-only file system" } else { denied };
    assert_eq!(errors, [denied, "No such file or directory", denied, written], "{outcome:?}");
    assert_eq!(fs::read_to_string(dir.join("config")).unwrap(), "settings");
}

fn read_only_file_may_use_any_unused_path(tier: TierUnderTest) {
    let policy = tier.write_policy("");
    let dir = policy.dir.path();
    write_file(dir, "config", "settings").unwrap();
    fs::create_dir(dir.join("data")).unwrap();
    write_file(dir, "data/one", "1").unwrap();
    let run = |files: &[(&str, &str)], script: &str| {
        let files = files.iter().map(|(path, source)| {
            format!("{{access: read-only, path: {path}, source: {}/{source}}}", dir.display())
        });
        let files = files.collect::<Vec<_>>().join(", ");
        policy.rewrite(&format!("sandbox: {{filesystem: [{files}]}}\n"));
        policy.run_sh(script).outcome()
    };
    // In a new directory of an existing one, in a new directory, and in an empty one.
    let outcome = run(
        &[("/etc/app/deep/config", "config"), ("/data", "data"), ("/mnt/config", "config")],
        "cat /etc/app/deep/config /data/one /mnt/config /etc/passwd",
    );
    if !confines_files(tier) {
        outcome.assert_refused("Landlock");
        return;
    }
    // The image's own files are still present.
    assert!(outcome.assert_success().starts_with("settings1settingsroot:x:0:0"), "{outcome:?}");

    let beside = run(&[("/etc/app.config", "config")], "cat /etc/app.config");
    match tier.kind {
        TierKind::Ironclaw => assert_eq!(beside.assert_success(), "settings"),
        _ => beside.assert_refused("/etc belongs to the image"),
    }
}

fn read_write_files_are_written_back_on_success(tier: TierUnderTest) {
    let confines = confines_files(tier);
    let policy = tier.write_policy("");
    let dir = policy.dir.path();
    fs::create_dir(dir.join("state")).unwrap();
    write_file(dir, "state/count", "1").unwrap();
    policy.rewrite(&format!(
        "sandbox: {{filesystem: [{{access: read-write, path: /work/state, source: {}/state}}]}}\n",
        dir.display(),
    ));
    let script =
        "cat /work/state/count; echo 2 >/work/state/count; echo new >/work/state/new; exit $CODE";
    let run = |code: &str| {
        policy.run().args(["--env", &format!("CODE={code}"), "--", "sh", "-c", script]).outcome()
    };
    let failed = run("3");
    if !confines {
        failed.assert_refused("Landlock");
        return;
    }
    assert_eq!((failed.code, failed.stdout_text()), (3, "1"), "{failed:?}");
    assert_eq!(fs::read_to_string(dir.join("state/count")).unwrap(), "1");
    assert!(!dir.join("state/new").exists());

    run("0").assert_success();
    assert_eq!(fs::read_to_string(dir.join("state/count")).unwrap(), "2\n");
    assert_eq!(fs::read_to_string(dir.join("state/new")).unwrap(), "new\n");
}

fn policy_limits_processes(tier: TierUnderTest) {
    let policy = tier.write_policy("resources: {pids: 20}\n");
    let outcome = policy
        .run_python(
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
    let count =
        outcome.stdout_text().strip_suffix(" EAGAIN").and_then(|count| count.parse::<u32>().ok());
    let count = count.unwrap_or_else(|| panic!("{outcome:?}"));
    match tier.kind {
        // The limit of twenty includes the first process.
        TierKind::Ironclaw | TierKind::Nanoclaw => assert_eq!(count, 19),
        // The cgroup counts the agent's processes too, with a surplus of eight.
        TierKind::Nemoclaw => assert!((19..=28).contains(&count), "{count}"),
    }
}

fn policy_limits_memory(tier: TierUnderTest) {
    let policy = tier.write_policy("resources: {memory_mib: 128}\n");
    let take = "x = b'x' * (200 << 20); print(len(x))";
    assert_ne!(policy.run_python(take).outcome().code, 0);
    assert_eq!(
        policy.run_python("x = b'x' * (30 << 20); print(len(x) >> 20)").outcome().assert_success(),
        "30"
    );
}

fn policy_limits_disk(tier: TierUnderTest) {
    let policy = tier.write_policy("resources: {disk_mib: 16}\n");
    let script = "for d in /work /tmp /dev/shm; do \
                    head -c 17M /dev/zero > $d/f || echo $d is full; done; \
                  cat /work/f /tmp/f /dev/shm/f | wc -c; rm /work/f; \
                  head -c 4M /dev/zero > /work/f && echo four";
    let outcome = policy.run_sh(script).outcome();
    let lines: Vec<&str> = outcome.assert_success().lines().collect();
    let written: u64 = lines[lines.len() - 2].parse().unwrap();
    assert!(written <= 16 << 20, "{outcome:?}");
    assert_eq!(lines.last(), Some(&"four"));
    assert!(outcome.stderr.contains("No space left on device"), "{outcome:?}");
}

fn policy_limits_time(tier: TierUnderTest) {
    let policy = tier.write_policy("resources: {timeout: 25s}\n");
    let outcome = policy.run_sh("echo started; sleep 600").outcome();
    assert_eq!((outcome.code, outcome.stdout_text()), (124, "started"), "{outcome:?}");
}

fn options_exceeding_policy_are_rejected(tier: TierUnderTest) {
    let policy = tier.write_policy("resources: {vcpus: 2, memory_mib: 256, timeout: 1m}\n");
    for (option, value, words) in [
        ("--cpus", "3", "vcpus 3 is more than the 2"),
        ("--memory", "257", "memory_mib 257 is more than the 256"),
        ("--timeout", "61s", "1m 1s is more than the 1m"),
        ("--secret", "A=env:HOME", "secret A: the policy"),
        ("--allow", "evil.example:443", "evil.example:443: the policy"),
    ] {
        let run = policy.run().args([option, value]);
        let (outcome, report) = run.outcome_with_json("--report", &["--", "true"]);
        outcome.assert_refused(words);
        assert_eq!(report["cause"], "policy", "{report}");
    }
    policy.rewrite("resources: {vcpus: 99}\n");
    let (outcome, report) = policy.run().outcome_with_json("--report", &["--", "true"]);
    outcome.assert_refused("use 1 to 8");
    assert_eq!(report["cause"], "policy", "{report}");
}

fn policy_delivers_secrets_and_is_in_report(tier: TierUnderTest) {
    let policy = tier.write_policy(
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
    assert_eq!(outcome.stdout_text(), "s3cret\nkey\n0", "{outcome:?}");
    let report: Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    let governed = &report["policy"];
    assert_eq!(
        (&governed["plugin"], &governed["profile"]),
        (&"web_scraper".into(), &"default".into())
    );
    assert_eq!(governed["file"], policy.path.as_str());
    assert_eq!(governed["digest"].as_str().map(str::len), Some(64));
}

fn host_use_of_policy_requires_consent(tier: TierUnderTest) {
    let policy = tier.write_policy("");
    let marker = policy.dir.path().join("ran");
    let command = format!("touch {}; echo v", marker.display());
    policy.rewrite(&format!("secrets: [{{name: KEY, source: 'exec:{command}'}}]\n"));
    let args = ["--", "sh", "-c", "cat $KEY_FILE"];
    for consent in ["env,file,write,vault,image", "exec:echo v"] {
        let run = policy.run_without_consent().args(["--policy-may", consent]);
        let (outcome, report) = run.outcome_with_json("--report", &args);
        outcome.assert_refused("--policy-may exec");
        assert_eq!(report["cause"], "policy", "{report}");
    }
    policy.run_without_consent().args(args).outcome().assert_refused(&command);
    assert!(!marker.exists());

    let exact = format!("exec:{command}");
    for consent in ["exec", "all", &exact] {
        let run = policy.run_without_consent().args(["--policy-may", consent]).args(args);
        assert_eq!(run.outcome().assert_success(), "v");
        fs::remove_file(&marker).unwrap();
    }
    // A credential that the caller names as well is the caller's own.
    let own = policy.run_without_consent().arg("--secret").arg(format!("KEY={exact}"));
    assert_eq!(own.args(args).outcome().assert_success(), "v");
}

fn endpoint_listed_in_policy_is_reachable(tier: TierUnderTest) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let held =
        thread::spawn(move || listener.accept().map(|(mut stream, _)| stream.write_all(b"hello")));
    let policy = tier.write_policy(&format!(
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
    assert_eq!(outcome.assert_success(), "hello\nnone");
    held.join().unwrap().unwrap().unwrap();
    policy.run().args(["--allow", "a.example.com:443", "--", "true"]).outcome().assert_success();
}

fn endpoint_missing_from_policy_is_unreachable(tier: TierUnderTest) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let policy =
        tier.write_policy("sandbox: {network: {allowed_egress: ['api.example.com:443']}}\n");
    let program = format!(
        "import socket
ends = ('localhost', {port}), ('127.0.0.1', {port}), ('192.0.2.1', 443), ('example.com', 443)
for host, port in ends:
    try:
        socket.create_connection((host, port), timeout=5)
        print(host, 'connected')
    except OSError: print(host, 'refused')"
    );
    let outcome = policy.run_python(&program).outcome();
    assert_eq!(
        outcome.assert_success(),
        "localhost refused\n127.0.0.1 refused\n192.0.2.1 refused\nexample.com refused"
    );
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "the sandbox connected to the host's loopback");
}

fn tier_missing_from_policy_is_rejected(tier: TierUnderTest) {
    let policy = tier.write_policy("plugin: x\n");
    for other in [TierKind::Ironclaw, TierKind::Nanoclaw, TierKind::Nemoclaw] {
        if other != tier.kind {
            let words = format!("the tier {other}");
            policy
                .run()
                .args(["--fallback", &other.to_string(), "--", "true"])
                .outcome()
                .assert_refused(&words);
        }
    }
}

fn policy_check_predicts_run(tier: TierUnderTest) {
    let check = |text: &str| {
        let policy = tier.write_policy(text);
        tier.chitin("policy check").arg(&policy.path).outcome()
    };
    let fine = check("plugin: x\n");
    assert!(
        fine.assert_success().contains(&format!("On {}, all of it is enforced:", tier.kind)),
        "{fine:?}"
    );
    let egress = check("sandbox: {network: {allowed_egress: ['api.example.com:443']}}\n");
    assert!(
        egress.assert_success().contains("a broker on this host dials the listed endpoints"),
        "{egress:?}"
    );
}

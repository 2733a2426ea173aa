//! What a policy says is so: each field seen from inside, or refused.

use std::fs;
use std::io::Write;
use std::path::Path;

use chitin::{Exit, Sandbox};
use chitin_integration::{Chitin, builder, chitin, file, workspace};
use serde_json::Value;
use tempfile::TempDir;

/// A policy file, in a directory that lives as long as it.
struct Policy {
    dir: TempDir,
    path: String,
}

fn policy(text: &str) -> Policy {
    let dir = tempfile::tempdir().expect("create a directory");
    let path = file(dir.path(), "p.yaml", text).expect("write a policy");
    Policy { dir, path }
}

impl Policy {
    fn run(&self) -> Chitin {
        chitin("run --policy").arg(&self.path)
    }

    fn sh(&self, script: &str) -> Chitin {
        self.run().args(["--", "sh", "-c", script])
    }

    fn python(&self, program: &str) -> Chitin {
        self.run().args(["--", "python3", "-c", program])
    }
}

const RESTRICTED: &str = "sandbox: {profile: restricted}\nresources: {timeout: 10m}\n";

#[test]
fn a_restricted_workload_has_lost_what_it_does_not_need() {
    let policy = policy(RESTRICTED);
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
print('write', *[tried(open, p, 'w') for p in ('/x', '/etc/x', '/usr/bin/x', '/proc/sys/kernel/hostname')])
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
write EROFS EROFS EROFS EACCES
scratch ok ok ok ok
list EACCES EACCES EACCES EACCES ok ok
vsock EAFNOSUPPORT packet EAFNOSUPPORT unix ok
calls {eperm}"
    );
    assert_eq!(seen.outcome().ok(), expected);
}

#[test]
fn without_a_policy_the_same_can_be_read() {
    // What the test above denies is there and is readable: it is the policy that takes it away.
    let default = policy("plugin: x\n");
    assert_eq!(default.sh("ls / >/dev/null && ls /var >/dev/null && echo listed").outcome().ok(), "listed");
}

#[test]
fn python_node_and_go_run_under_default_deny() {
    let programs = workspace().join("target/programs");
    assert!(programs.join("node").exists(), "no target/programs: `cargo xtask test` fetches them");
    // Room for Node itself, which is 150 MB, and lies in memory like every file.
    let policy = policy(
        "sandbox: {profile: restricted, syscall_filter: default_deny}\n\
         resources: {memory_mib: 1024, disk_mib: 400, timeout: 10m}\n",
    );
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

#[test]
fn processes_have_an_end() {
    let policy = policy("resources: {pids: 20}\n");
    let count = policy
        .python(
            "
import os, errno
n = 0
try:
    while True:
        if os.fork() == 0:
            os.read(os.pipe()[0], 1)
        n += 1
except OSError as e:
    print(n, errno.errorcode[e.errno], flush=True)
os.kill(0, 9)
",
        )
        .outcome();
    // Twenty, of which this one is the first.
    assert_eq!((count.code, count.text()), (137, "19 EAGAIN"), "{count:?}");
}

#[test]
fn memory_and_cpus_have_an_end() {
    let policy = policy("resources: {memory_mib: 128, vcpus: 2}\n");
    let outcome =
        policy.sh("nproc; grep MemTotal /proc/meminfo; exec python3 -c 'x = b\"x\" * (200 << 20)'").outcome();
    assert!(outcome.code != 0, "{outcome:?}");
    let lines: Vec<&str> = outcome.text().lines().collect();
    assert_eq!(lines[0], "2");
    let total: u64 = lines[1].split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((64 << 10..128 << 10).contains(&total), "{total} KiB");
    // Less may be asked for.
    let outcome = policy
        .run()
        .args(["--cpus", "1", "--memory", "96", "--", "sh", "-c"])
        .arg("nproc; grep MemTotal /proc/meminfo")
        .outcome();
    let lines: Vec<&str> = outcome.ok().lines().collect();
    let total: u64 = lines[1].split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(lines[0] == "1" && total < 96 << 10, "{outcome:?}");
}

#[test]
fn the_disk_has_an_end() {
    let policy = policy("resources: {disk_mib: 8}\n");
    let outcome = policy
        .sh("head -c 7M /dev/zero >/work/a && echo seven; head -c 2M /dev/zero >/tmp/b || echo full")
        .outcome();
    assert_eq!(outcome.ok(), "seven\nfull");
    assert!(outcome.stderr.contains("No space left on device"), "{outcome:?}");
}

#[test]
fn time_has_an_end() {
    let policy = policy("resources: {timeout: 25s}\n");
    let outcome = policy.sh("echo started; sleep 600").outcome();
    assert_eq!((outcome.code, outcome.text()), (124, "started"), "{outcome:?}");
}

#[test]
fn more_than_the_policy_allows_is_refused() {
    let policy = policy("resources: {vcpus: 2, memory_mib: 256, timeout: 1m}\n");
    for (option, value, words) in [
        ("--cpus", "3", "vcpus 3 is more than the 2"),
        ("--memory", "257", "memory_mib 257 is more than the 256"),
        ("--timeout", "61s", "1m 1s is more than the 1m"),
        ("--secret", "A=env:HOME", "does not list it"),
    ] {
        policy.run().args([option, value, "--", "true"]).outcome().refused(words);
    }
}

#[test]
fn files_are_copies_and_written_back_on_success() {
    let policy = policy("");
    let dir = policy.dir.path();
    fs::create_dir(dir.join("shared")).unwrap();
    file(dir, "shared/config", "settings").unwrap();
    file(dir, "shared/other", "not listed").unwrap();
    fs::create_dir(dir.join("state")).unwrap();
    file(dir, "state/count", "1").unwrap();
    let host = dir.display();
    let text = format!(
        "sandbox:
  filesystem:
    - {{access: read-only, path: /shared/config, source: {host}/shared/config}}
    - {{access: read-write, path: /work/state, source: {host}/state}}
"
    );
    fs::write(&policy.path, text).unwrap();
    let script = "cat /shared/config; echo; ls /shared; cat /shared/other; ls /; echo x >/shared/config; cat /work/state/count; \
                  echo 2 >/work/state/count; echo new >/work/state/new; exit $CODE";
    let run = |code: &str| {
        policy.run().args(["--env", &format!("CODE={code}"), "--", "sh", "-c", script]).outcome()
    };
    let failed = run("3");
    assert_eq!(failed.code, 3, "{failed:?}");
    assert_eq!(failed.text(), "settings\n1", "{failed:?}");
    let said: Vec<&str> = failed.stderr.lines().filter_map(|line| line.rsplit(": ").next()).collect();
    // Its directory is not listed, only it is; its neighbour is not there; nor is the root listed.
    let denied = "Permission denied";
    assert_eq!(said, [denied, "No such file or directory", denied, "Read-only file system"], "{failed:?}");
    assert_eq!(fs::read_to_string(dir.join("state/count")).unwrap(), "1");
    assert!(!dir.join("state/new").exists());

    assert_eq!(run("0").code, 0);
    assert_eq!(fs::read_to_string(dir.join("state/count")).unwrap(), "2\n");
    assert_eq!(fs::read_to_string(dir.join("state/new")).unwrap(), "new\n");
    assert_eq!(fs::read_to_string(dir.join("shared/config")).unwrap(), "settings");
}

#[test]
fn credentials_come_as_the_policy_says_and_the_report_names_it() {
    let policy = policy(
        "plugin: web_scraper
sandbox: {filesystem: []}
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
    assert_eq!((&governed["plugin"], &governed["profile"]), (&"web_scraper".into(), &"default".into()));
    assert_eq!(governed["file"], policy.path.as_str());
    assert_eq!(governed["digest"].as_str().map(str::len), Some(64));
}

#[test]
fn what_cannot_be_kept_is_refused() {
    let refused = |text: &str, words: &str| policy(text).sh("true").outcome().refused(words);
    // Both shapes of the design: understood, and refused for what nothing does yet.
    refused(
        "runtime: ironclaw\nhardening:\n  strip_agent_capabilities: true\n  readonly_root_filesystem: true\n  \
         credential_source: vault://openclaw/creds\n",
        "cannot be kept on ironclaw: hardening.credential_source",
    );
    refused("secrets: [{name: A, source: 'vault://kv/a#b'}]\n", "vaults are not asked yet");
    refused("runtime: ironclaw\nresorces: {}\n", "p.yaml, line 2, column 1: there is no key `resorces`");
    refused(
        "sandbox: {filesystem: [{access: read-only, path: /in, source: /nonexistent}]}\n",
        "/nonexistent",
    );
    refused("image: /nonexistent.img\n", "/nonexistent.img");
    chitin("run --policy /nonexistent.yaml -- true").outcome().refused("read the policy /nonexistent.yaml");
}

#[test]
fn a_policy_says_what_may_be_connected_to() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let held =
        std::thread::spawn(move || listener.accept().map(|(mut stream, _)| stream.write_all(b"hello")));
    let text = format!(
        "sandbox: {{profile: restricted-net, network: {{allowed_egress: ['localhost:{port}', '*.example.com:443']}}}}\n"
    );
    let script = format!(
        "import socket
print(socket.create_connection(('localhost', {port})).recv(5).decode())
try:
    socket.create_connection(('other.example', 443))
except socket.gaierror:
    print('none')"
    );
    let file = policy(&text);
    let run = |options: &str| chitin(&format!("run {options} --policy")).arg(&file.path);
    let outcome = run("--allow-private").args(["--", "python3", "-c"]).arg(&script).outcome();
    assert_eq!(outcome.ok(), "hello\nnone");
    held.join().unwrap().unwrap().unwrap();
    let words = "--allow evil.example:443: the policy";
    run("--allow evil.example:443").args(["--", "true"]).outcome().refused(words);
    run("--allow a.example.com:443").args(["--", "true"]).outcome().ok();
}

#[test]
fn a_check_says_beforehand_what_a_run_will_say() {
    let check = |text: &str| {
        let policy = policy(text);
        chitin("policy check").arg(&policy.path).outcome()
    };
    let fine = check(RESTRICTED);
    assert!(fine.ok().contains("On ironclaw all of it is kept:"), "{fine:?}");
    let refused = check("secrets: [{name: A, source: 'vault://kv/a#b'}]\n");
    assert!(refused.ok().contains("On ironclaw a run is REFUSED:"), "{refused:?}");
    assert!(refused.ok().contains("REFUSED: "), "{refused:?}");
    let egress = check("sandbox: {network: {allowed_egress: ['api.example.com:443']}}\n");
    assert!(egress.ok().contains("a broker on this host dials what is listed"), "{egress:?}");
    check("sandbox:\n  profile: paranoid\n")
        .refused("p.yaml, line 2, column 12: `paranoid` is none of restricted,");
    let schema = chitin("policy schema").outcome();
    let schema: Value = serde_json::from_str(schema.ok()).expect("JSON");
    assert_eq!(schema["title"], "Chitin policy");
}

#[test]
fn a_template_keeps_the_policy_it_was_built_under() {
    let restricted = policy(RESTRICTED);
    let other = policy("plugin: other\n");
    let templates = tempfile::tempdir().unwrap();
    let with = |chitin: Chitin| chitin.env("CHITIN_TEMPLATES", templates.path());
    let build = |name: &str, policy: Option<&Path>| {
        let mut build = chitin("template build").arg(name);
        if let Some(policy) = policy {
            build = build.arg("--policy").arg(policy);
        }
        with(build).outcome().ok();
    };
    let probe = ["--", "sh", "-c", "ls / >/dev/null 2>&1 || echo confined"];
    build("mine", Some(Path::new(&restricted.path)));
    let copy =
        |policy: &Policy, name: &str| with(policy.run().args(["--template", name]).args(probe)).outcome();
    assert_eq!(copy(&restricted, "mine").ok(), "confined");
    copy(&other, "mine").refused("another policy");
    with(chitin("run --template mine -- true")).outcome().refused("--policy");
    // One without a policy can be confined as long as nothing runs in it.
    build("plain", None);
    assert_eq!(copy(&restricted, "plain").ok(), "confined");
}

/// Whether the root of a sandbox, which is no part of the system, can be listed.
async fn confined(sandbox: &Sandbox) -> bool {
    let listed = sandbox.command("ls").arg("/").output().await.expect("run ls");
    listed.exit != Exit::Code(0)
}

#[tokio::test]
async fn pools_and_forks_keep_the_policy() {
    let builder = || builder().policy(chitin::Policy::parse(RESTRICTED, "p.yaml").expect("a policy"));
    let pool = builder().pool(1).await.unwrap();
    pool.filled().await.unwrap();
    // One that waited, and one that is started because none waits any more.
    for _ in 0..2 {
        assert!(confined(&pool.start().await.unwrap()).await);
    }
    drop(pool);
    let mut sandbox = builder().forkable(true).start().await.unwrap();
    let copies = sandbox.fork(1).await.unwrap();
    assert!(confined(&sandbox).await && confined(&copies[0]).await);
}

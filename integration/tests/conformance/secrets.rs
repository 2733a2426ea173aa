//! Credentials delivered in memory or in the environment, and leased ones.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use chitin_integration::{TierUnderTest, canary, read_json_lines, sandbox_builder, write_file};

on_every_tier!(
    secret_is_readable_at_path_in_its_variable,
    secret_path_is_open_to_child_processes,
    secret_is_only_in_its_memory_file,
    secret_is_read_only_and_invisible_on_host,
    secret_is_in_environment_only_on_request,
    secret_is_not_in_report,
    secret_value_is_not_in_the_log,
    secret_delivery_is_audited_without_value,
    failing_secret_source_prevents_start,
    interrupt_revokes_lease_at_any_time,
    leased_secret_rotates_in_place_until_revoked,
    revoked_secret_is_gone_from_running_command,
);

const CANARY: &str = "canary-8d1f02c97b";

fn secret_is_readable_at_path_in_its_variable(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let path = write_file(dir.path(), "token", format!("{CANARY}\n")).unwrap();
    for source in ["env:TOKEN_HERE".to_owned(), format!("file:{path}"), format!("exec:cat {path}")]
    {
        let outcome = tier
            .run_with("--secret")
            .arg(format!("API_TOKEN={source}"))
            .args(["--", "sh", "-c", "cat $API_TOKEN_FILE; echo; cat $API_TOKEN_FILE"])
            .env("TOKEN_HERE", CANARY)
            .outcome();
        assert_eq!(outcome.assert_success(), format!("{CANARY}\n{CANARY}"), "{source}");
    }
}

fn secret_path_is_open_to_child_processes(tier: TierUnderTest) {
    // Python closes all other descriptors in a child.
    let script = "
import os, subprocess
subprocess.run('cat $T_FILE', shell=True, check=True)
path = os.environ['T_FILE']
print('', path, [line.split()[2] for line in open('/proc/mounts')
                 if line.split()[1] == os.path.dirname(path)])
for change in (lambda: open(path, 'w'), lambda: os.chmod(path, 0o777), lambda: os.unlink(path),
               lambda: open(path + 'x', 'w')):
    try: change(); print('changed')
    except OSError: pass
";
    let outcome = tier
        .run_with("--secret T=env:TOKEN -- python3 -uc")
        .arg(script)
        .env("TOKEN", CANARY)
        .outcome();
    let expected = format!("{CANARY} /run/credentials/T ['tmpfs']");
    assert_eq!(outcome.assert_success(), expected);
}

fn secret_is_only_in_its_memory_file(tier: TierUnderTest) {
    // The pattern does not match itself, because it is on the searched command lines too.
    let script = "p='canary-8d1f[0]2c97b'; \
                  cat /proc/cmdline /proc/[0-9]*/cmdline /proc/self/environ /proc/1/environ \
                    2>/dev/null | tr '\\0' '\\n' | grep -c $p; env | grep -c $p; \
                  find / /work /tmp /run /dev/shm -xdev -type f 2>/dev/null | \
                    xargs -d '\\n' grep -ls $p; \
                  printf '%s:' $API_TOKEN_FILE; grep -c $p $API_TOKEN_FILE";
    let outcome = tier
        .run_with("--secret API_TOKEN=env:API_TOKEN -- sh -c")
        .arg(script)
        .env("API_TOKEN", CANARY)
        .outcome();
    let [lines, environment, file] = outcome.assert_success().split('\n').collect::<Vec<_>>()[..]
    else {
        panic!("found in a file: {outcome:?}")
    };
    assert_eq!((lines, environment), ("0", "0"));
    // The pattern matches in the secret's file.
    assert_eq!(file, "/run/credentials/API_TOKEN:1");
}

fn secret_is_read_only_and_invisible_on_host(tier: TierUnderTest) {
    let script = "echo x > $API_TOKEN_FILE; echo $?; cat $API_TOKEN_FILE; echo; echo up; sleep 600";
    // The value is unique, because the test of another tier may run concurrently.
    let value = format!("{CANARY}-{}", std::process::id());
    let mut running = tier
        .run_with("--secret API_TOKEN=env:API_TOKEN -- sh -c")
        .arg(script)
        .env("API_TOKEN", &value)
        .spawn();
    assert_ne!(running.read_line(), "0");
    assert_eq!(running.read_line(), value);
    assert_eq!(running.read_line(), "up");
    canary::assert_unwritten(&running, &value);
    running.child.kill().unwrap();
    running.wait();
    running.assert_no_process_left();
    canary::assert_gone(&running, &value);
}

fn secret_is_in_environment_only_on_request(tier: TierUnderTest) {
    let args = "--secret API_TOKEN=env:API_TOKEN --secret-env API_TOKEN -- sh -c";
    let outcome = tier
        .run_with(args)
        .arg("echo $API_TOKEN; echo ${API_TOKEN_FILE-unset}")
        .env("API_TOKEN", CANARY)
        .outcome();
    assert_eq!(outcome.assert_success(), format!("{CANARY}\nunset"));
    tier.run_with("--secret-env API_TOKEN -- true")
        .outcome()
        .assert_usage_error("--secret API_TOKEN=SRC");
}

fn secret_is_not_in_report(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report.json");
    let outcome = tier
        .run_with("--secret API_TOKEN=env:API_TOKEN --report")
        .arg(&report)
        .args(["--", "sh", "-c", "cat $API_TOKEN_FILE >/dev/null"])
        .env("API_TOKEN", CANARY)
        .outcome();
    outcome.assert_success();
    canary::assert_no_file_contains(&[dir.path()], CANARY);
    let text = fs::read_to_string(report).unwrap();
    assert!(!text.contains(CANARY) && text.contains("exit_code"), "{text}");
}

fn secret_value_is_not_in_the_log(tier: TierUnderTest) {
    let options = "-vvv --secret A=env:TOKEN --secret B=env:TOKEN --secret-env B";
    let proxied = "--secret C=env:TOKEN@api.example.com";
    let run = tier.run_with(&format!("{options} {proxied} -- sh -c")).arg("cat $A_FILE");
    let outcome = run.env("TOKEN", CANARY).outcome();
    assert_eq!(outcome.assert_success(), CANARY);
    assert!(!outcome.stderr.contains(CANARY), "{}", outcome.stderr);
    for words in ["launch{", "exec{program=\"sh\"", "credential delivered name=\"B\""] {
        assert!(outcome.stderr.contains(words), "no `{words}` in: {}", outcome.stderr);
    }
}

fn secret_delivery_is_audited_without_value(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let audit = dir.path().join("audit");
    let options = "--secret A=env:TOKEN --secret B=env:TOKEN --secret-env B --audit";
    tier.run_with(options)
        .arg(&audit)
        .args(["--", "true"])
        .env("TOKEN", CANARY)
        .outcome()
        .assert_success();
    let lines = read_audit(&audit);
    let deliveries: Vec<_> = lines
        .iter()
        .map(|line| (&line["credentials"][0], &line["delivery"], &line["verdict"]))
        .collect();
    let delivered = Value::from("delivered");
    assert_eq!(
        deliveries,
        [(&"A".into(), &"memory".into(), &delivered), (&"B".into(), &"env".into(), &delivered)]
    );
    tier.run_with(options)
        .args(["/dev/full", "--", "true"])
        .env("TOKEN", CANARY)
        .outcome()
        .assert_refused("audit");
}

fn failing_secret_source_prevents_start(tier: TierUnderTest) {
    tier.run_with("--secret T=env:CHITIN_NO_SUCH -- true")
        .outcome()
        .assert_refused("CHITIN_NO_SUCH");
    tier.run_with("--secret T=file:/nonexistent -- true").outcome().assert_refused("/nonexistent");
    tier.run_with("--secret")
        .arg("T=exec:exit 4")
        .args(["--", "true"])
        .outcome()
        .assert_refused("`exit 4`");
    tier.run_with("--secret T=vault -- true").outcome().assert_usage_error("env:VAR");
    // A host that is not one never turns into a delivery in memory.
    for host in ["10.0.0.1", "https://h", "h:99999", "", "*.com", "bad"] {
        let secret = format!("--secret T=env:HOME@{host} -- true");
        tier.run_with(&secret).outcome().assert_usage_error(&format!("`@{host}`: "));
    }
    let twice = tier.run_with("--secret T=env:HOME --secret T=env:PATH -- true").outcome();
    twice.assert_refused("secret T: ");
    tier.run_with("--secret 1T=env:HOME -- true").outcome().assert_usage_error("`1T`");
}

/// Reads the audit log, and asserts that it does not contain the value.
fn read_audit(audit: &Path) -> Vec<Value> {
    canary::assert_no_file_contains(&[audit], CANARY);
    read_json_lines(audit).unwrap()
}

/// Starts a Vault server that issues credentials by `issue` and revokes them. Returns its address,
/// and a receiver of the method and path of each request.
fn start_vault(
    issue: impl Fn() -> (&'static str, String) + Send + 'static,
) -> (String, Receiver<String>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (sender, requests) = channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = BufReader::new(stream.unwrap());
            let (mut head, mut line) = (String::new(), String::new());
            while stream.read_line(&mut line).unwrap_or(0) > 2 {
                head.push_str(&line.to_ascii_lowercase());
                line.clear();
            }
            let length =
                head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
            let mut body = vec![0; length.unwrap_or(0)];
            let _ = stream.read_exact(&mut body);
            let request = head.split(' ').take(2).collect::<Vec<_>>().join(" ");
            let (status, body) = match request.as_str() {
                "get /v1/db/creds/app" => issue(),
                "put /v1/sys/leases/revoke" => ("200 OK", "{}".to_owned()),
                _ => ("404 Not Found", "{}".to_owned()),
            };
            let length = body.len();
            let response = format!(
                "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
            );
            let _ = stream.get_mut().write_all(response.as_bytes());
            let _ = sender.send(request);
        }
    });
    (address, requests)
}

fn lease_json(seconds: u32, renewable: bool, value: &str) -> String {
    let data = format!(r#"{{"p":"{value}"}}"#);
    format!(
        r#"{{"lease_id":"l","lease_duration":{seconds},"renewable":{renewable},"data":{data}}}"#
    )
}

fn interrupt_revokes_lease_at_any_time(tier: TierUnderTest) {
    let (address, requests) = start_vault(|| ("200 OK", lease_json(600, true, CANARY)));
    let wait_for = |request: &str| {
        let next = || requests.recv_timeout(Duration::from_secs(60));
        while next().unwrap_or_else(|_| panic!("no {request}")) != request {}
    };
    // During the read of another source, twice during the boot, and during the workload.
    for (more, pause) in
        [(Some("B=exec:exec sleep 60"), Some(0)), (None, Some(0)), (None, Some(150)), (None, None)]
    {
        let mut running = tier
            .run_with("--secret A=vault://db/creds/app#p")
            .args(more.into_iter().flat_map(|secret| ["--secret", secret]))
            .args(["--", "sh", "-c", "echo up; exec sleep 600"])
            .env("VAULT_ADDR", &address)
            .env("VAULT_TOKEN", "t")
            .spawn();
        wait_for("get /v1/db/creds/app");
        match pause {
            Some(pause) => thread::sleep(Duration::from_millis(pause)),
            None => assert_eq!(running.read_line(), "up"),
        }
        running.send_signal(Signal::INT);
        let code = running.wait();
        assert_eq!(code, 130, "{more:?} {pause:?}");
        wait_for("put /v1/sys/leases/revoke");
        running.assert_no_process_left();
    }
}

/// Prints each new value until it is empty, and then its length in another process.
const PRINT_VALUES: &str = "
import os, subprocess, time
last = None
while last != '':
    now = open(os.environ['A_FILE']).read()
    if now != last:
        print(now, flush=True)
    last = now
    time.sleep(0.05)
command = ['sh', '-c', 'wc -c < $A_FILE']
length = subprocess.run(command, close_fds=False, stdout=subprocess.PIPE, text=True).stdout
print(length.strip(), flush=True)
";

fn leased_secret_rotates_in_place_until_revoked(tier: TierUnderTest) {
    let (count, denied) = (AtomicU32::new(0), Arc::new(AtomicBool::new(false)));
    let denies = denied.clone();
    let (address, _requests) = start_vault(move || match denies.load(Ordering::Relaxed) {
        true => ("403 Forbidden", "{}".to_owned()),
        false => {
            let number = count.fetch_add(1, Ordering::Relaxed);
            ("200 OK", lease_json(4, false, &format!("{CANARY}-{number:06}")))
        }
    });
    let dir = tempfile::tempdir().unwrap();
    let audit = dir.path().join("audit");
    let mut running = tier
        .run_with("--secret A=vault://db/creds/app#p --audit")
        .arg(&audit)
        .args(["--", "python3", "-c", PRINT_VALUES])
        .env("VAULT_ADDR", &address)
        .env("VAULT_TOKEN", "t")
        .spawn();
    let (first, second) = (running.read_line(), running.read_line());
    assert!(
        first.starts_with(CANARY) && second.starts_with(CANARY) && first < second,
        "{first} {second}"
    );
    denied.store(true, Ordering::Relaxed);
    let mut last = second;
    while !last.is_empty() {
        assert!(last.starts_with(CANARY), "{last}");
        last = running.read_line();
    }
    assert_eq!(running.read_line(), "0");
    let stderr = running.read_stderr();
    assert_eq!(running.wait(), 0, "{stderr}");
    assert!(stderr.contains("renew vault://db/creds/app"), "{stderr}");
    assert!(!stderr.contains(CANARY), "{stderr}");
    running.assert_no_process_left();

    let lines = read_audit(&audit);
    let (last, before) = lines.split_last().unwrap();
    assert!(
        before.len() >= 2 && before.iter().all(|line| line["verdict"] == "delivered"),
        "{lines:?}"
    );
    assert_eq!(
        (&last["verdict"], &last["credentials"][0]),
        (&"revoked".into(), &"A".into()),
        "{lines:?}"
    );
    assert!(lines.iter().all(|line| line["delivery"] == "memory"), "{lines:?}");
}

fn revoked_secret_is_gone_from_running_command(tier: TierUnderTest) {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt};

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let path = write_file(dir.path(), "token", CANARY).unwrap();
        let source = || chitin::SecretSource::File((&path).into());
        let in_environment = chitin::SecretSpec {
            name: "B".into(),
            source: source(),
            delivery: chitin::Delivery::Env,
        };
        let sandbox = sandbox_builder()
            .tier(tier.kind)
            .secret("A", source())
            .secret_spec(in_environment)
            .start()
            .await
            .unwrap();
        let script = "while read line; do wc -c < $A_FILE; done";
        let mut process = sandbox.command("sh").args(["-c", script]).piped_stdin().spawn().unwrap();
        let (mut stdin, stdout) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        let mut lines = tokio::io::BufReader::new(stdout).lines();
        let mut ask = async || {
            stdin.write_all(b"\n").await.unwrap();
            lines.next_line().await.unwrap().unwrap().trim().to_owned()
        };
        assert_eq!(ask().await, CANARY.len().to_string());
        for name in ["A", "B"] {
            sandbox.revoke(name).await.unwrap();
        }
        let error = sandbox.revoke("C").await.unwrap_err();
        assert!(matches!(error, chitin::Error::UnknownCredential { name } if name == "C"));
        assert_eq!(ask().await, "0");
        let later = sandbox
            .command("sh")
            .args(["-c", "echo ${A_FILE-none} ${B-none}"])
            .output()
            .await
            .unwrap();
        assert_eq!(later.stdout, b"none none\n");
        sandbox.stop().await.unwrap();
    });
}

//! A credential reaches the workload and nothing else.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use chitin_integration::{On, builder, canary, file};

on_every_tier!(
    a_secret_is_read_from_the_file_its_variable_names,
    it_is_in_no_file_no_environment_and_no_command_line,
    it_cannot_be_changed_and_other_commands_of_the_host_do_not_show_it,
    in_the_environment_only_when_asked_for,
    it_is_not_in_the_report,
    secret_value_is_not_in_the_log,
    each_delivery_is_written_down_without_the_value,
    a_source_that_fails_stops_the_run_before_it_starts,
    an_interrupt_gives_back_what_was_issued_whenever_it_comes,
    one_that_was_issued_is_followed_by_others_in_place_and_taken_back_when_there_are_none,
    one_is_taken_back_from_whoever_has_it,
);

const CANARY: &str = "canary-8d1f02c97b";

fn a_secret_is_read_from_the_file_its_variable_names(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "token", format!("{CANARY}\n")).unwrap();
    for source in ["env:TOKEN_HERE".to_owned(), format!("file:{path}"), format!("exec:cat {path}")]
    {
        let outcome = on
            .with("--secret")
            .arg(format!("API_TOKEN={source}"))
            .args(["--", "sh", "-c", "cat $API_TOKEN_FILE; echo; cat $API_TOKEN_FILE"])
            .env("TOKEN_HERE", CANARY)
            .outcome();
        assert_eq!(outcome.ok(), format!("{CANARY}\n{CANARY}"), "{source}");
    }
}

fn it_is_in_no_file_no_environment_and_no_command_line(on: On) {
    // The pattern matches the value and not itself, because it is on the command lines that are searched.
    let script = "p='canary-8d1f[0]2c97b'; \
                  cat /proc/cmdline /proc/[0-9]*/cmdline /proc/self/environ /proc/1/environ 2>/dev/null | tr '\\0' '\\n' | grep -c $p; env | grep -c $p; \
                  find / /work /tmp /run /dev/shm -xdev -type f 2>/dev/null | xargs -d '\\n' grep -ls $p; \
                  printf '%s:' $API_TOKEN_FILE; grep -c $p $API_TOKEN_FILE";
    let outcome = on
        .with("--secret API_TOKEN=env:API_TOKEN -- sh -c")
        .arg(script)
        .env("API_TOKEN", CANARY)
        .outcome();
    let [lines, environment, file] = outcome.ok().split('\n').collect::<Vec<_>>()[..] else {
        panic!("found in a file: {outcome:?}")
    };
    assert_eq!((lines, environment), ("0", "0"));
    // That the pattern would have found it.
    assert!(file.starts_with("/proc/self/fd/") && file.ends_with(":1"), "{file}");
}

fn it_cannot_be_changed_and_other_commands_of_the_host_do_not_show_it(on: On) {
    let script = "echo x > $API_TOKEN_FILE; echo $?; cat $API_TOKEN_FILE; echo; echo up; sleep 600";
    // Another tier's may be in memory at the same time.
    let value = format!("{CANARY}-{}", std::process::id());
    let mut running = on
        .with("--secret API_TOKEN=env:API_TOKEN -- sh -c")
        .arg(script)
        .env("API_TOKEN", &value)
        .spawn();
    assert_ne!(running.line(), "0");
    assert_eq!(running.line(), value);
    assert_eq!(running.line(), "up");
    canary::assert_unwritten(&running, &value);
    running.child.kill().unwrap();
    running.wait();
    running.assert_nothing_left();
    canary::assert_gone(&running, &value);
}

fn in_the_environment_only_when_asked_for(on: On) {
    let args = "--secret API_TOKEN=env:API_TOKEN --secret-env API_TOKEN -- sh -c";
    let outcome = on
        .with(args)
        .arg("echo $API_TOKEN; echo ${API_TOKEN_FILE-unset}")
        .env("API_TOKEN", CANARY)
        .outcome();
    assert_eq!(outcome.ok(), format!("{CANARY}\nunset"));
    on.with("--secret-env API_TOKEN -- true")
        .outcome()
        .refused("there is no --secret API_TOKEN=SRC");
}

fn it_is_not_in_the_report(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let report = dir.path().join("report.json");
    let outcome = on
        .with("--secret API_TOKEN=env:API_TOKEN --report")
        .arg(&report)
        .args(["--", "sh", "-c", "cat $API_TOKEN_FILE >/dev/null"])
        .env("API_TOKEN", CANARY)
        .outcome();
    outcome.ok();
    canary::assert_no_file_holds(&[dir.path()], CANARY);
    let text = fs::read_to_string(report).unwrap();
    assert!(!text.contains(CANARY) && text.contains("exit_code"), "{text}");
}

fn secret_value_is_not_in_the_log(on: On) {
    let options = "-vvv --secret A=env:TOKEN --secret B=env:TOKEN --secret-env B";
    let proxied = "--secret C=env:TOKEN@api.example.com";
    let run = on.with(&format!("{options} {proxied} -- sh -c")).arg("cat $A_FILE");
    let outcome = run.env("TOKEN", CANARY).outcome();
    assert_eq!(outcome.ok(), CANARY);
    assert!(!outcome.stderr.contains(CANARY), "{}", outcome.stderr);
    for words in ["launch{", "exec{program=\"sh\"", "credential delivered name=\"B\""] {
        assert!(outcome.stderr.contains(words), "no `{words}` in: {}", outcome.stderr);
    }
}

fn each_delivery_is_written_down_without_the_value(on: On) {
    let dir = tempfile::tempdir().unwrap();
    let audit = dir.path().join("audit");
    let options = "--secret A=env:TOKEN --secret B=env:TOKEN --secret-env B --audit";
    on.with(options).arg(&audit).args(["--", "true"]).env("TOKEN", CANARY).outcome().ok();
    let text = fs::read_to_string(&audit).unwrap();
    assert!(!text.contains(CANARY), "{text}");
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told: Vec<_> = lines
        .iter()
        .map(|line| (&line["credentials"][0], &line["delivery"], &line["verdict"]))
        .collect();
    let delivered = serde_json::Value::from("delivered");
    assert_eq!(
        told,
        [(&"A".into(), &"memory".into(), &delivered), (&"B".into(), &"env".into(), &delivered)]
    );
    on.with(options)
        .args(["/dev/full", "--", "true"])
        .env("TOKEN", CANARY)
        .outcome()
        .refused("write the audit");
}

fn a_source_that_fails_stops_the_run_before_it_starts(on: On) {
    on.with("--secret T=env:CHITIN_NO_SUCH -- true").outcome().refused("CHITIN_NO_SUCH is not set");
    on.with("--secret T=file:/nonexistent -- true").outcome().refused("read /nonexistent");
    on.with("--secret")
        .arg("T=exec:exit 4")
        .args(["--", "true"])
        .outcome()
        .refused("`exit 4` failed");
    on.with("--secret T=vault -- true").outcome().refused("env:VAR, file:PATH, exec:CMD");
    on.with("--secret 1T=env:HOME -- true").outcome().refused("environment variable");
}

/// A double of a vault whose engine issues a credential, as `issue` says it, and takes it back. Its address, and the requests as
/// they come.
fn vault(
    issue: impl Fn() -> (&'static str, String) + Send + 'static,
) -> (String, Receiver<String>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (said, asked) = channel();
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
            let what = head.split(' ').take(2).collect::<Vec<_>>().join(" ");
            let (status, answer) = match what.as_str() {
                "get /v1/db/creds/app" => issue(),
                "put /v1/sys/leases/revoke" => ("200 OK", "{}".to_owned()),
                _ => ("404 Not Found", "{}".to_owned()),
            };
            let length = answer.len();
            let reply = format!(
                "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{answer}"
            );
            let _ = stream.get_mut().write_all(reply.as_bytes());
            let _ = said.send(what);
        }
    });
    (address, asked)
}

fn lease(seconds: u32, renewable: bool, value: &str) -> String {
    format!(
        r#"{{"lease_id":"l","lease_duration":{seconds},"renewable":{renewable},"data":{{"p":"{value}"}}}}"#
    )
}

fn an_interrupt_gives_back_what_was_issued_whenever_it_comes(on: On) {
    let (address, asked) = vault(|| ("200 OK", lease(600, true, CANARY)));
    let wait_for = |what: &str| {
        while asked.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|_| panic!("no {what}"))
            != what
        {}
    };
    // While another source is asked; while it boots; while the workload runs.
    for (more, pause) in
        [(Some("B=exec:exec sleep 60"), Some(0)), (None, Some(0)), (None, Some(150)), (None, None)]
    {
        let mut running = on
            .with("--secret A=vault://db/creds/app#p")
            .args(more.into_iter().flat_map(|secret| ["--secret", secret]))
            .args(["--", "sh", "-c", "echo up; exec sleep 600"])
            .env("VAULT_ADDR", &address)
            .env("VAULT_TOKEN", "t")
            .spawn();
        wait_for("get /v1/db/creds/app");
        match pause {
            Some(pause) => thread::sleep(Duration::from_millis(pause)),
            None => assert_eq!(running.line(), "up"),
        }
        running.signal(Signal::INT);
        let code = running.wait();
        assert_eq!(code, 130, "{more:?} {pause:?}");
        wait_for("put /v1/sys/leases/revoke");
        running.assert_nothing_left();
    }
}

fn one_that_was_issued_is_followed_by_others_in_place_and_taken_back_when_there_are_none(on: On) {
    let (count, over) = (AtomicU32::new(0), Arc::new(AtomicBool::new(false)));
    let ends = over.clone();
    let (address, _asked) = vault(move || match ends.load(Ordering::Relaxed) {
        true => ("403 Forbidden", "{}".to_owned()),
        false => {
            let number = count.fetch_add(1, Ordering::Relaxed);
            ("200 OK", lease(4, false, &format!("{CANARY}-{number:06}")))
        }
    });
    // Says what it finds whenever that is another; then what another process finds.
    let program = "
import os, subprocess, time
last = None
while last != '':
    now = open(os.environ['A_FILE']).read()
    if now != last:
        print(now, flush=True)
    last = now
    time.sleep(0.05)
print(subprocess.run(['sh', '-c', 'wc -c < $A_FILE'], close_fds=False, stdout=subprocess.PIPE, text=True).stdout.strip(), flush=True)
";
    let dir = tempfile::tempdir().unwrap();
    let audit = dir.path().join("audit");
    let mut running = on
        .with("--secret A=vault://db/creds/app#p --audit")
        .arg(&audit)
        .args(["--", "python3", "-c", program])
        .env("VAULT_ADDR", &address)
        .env("VAULT_TOKEN", "t")
        .spawn();
    let (first, second) = (running.line(), running.line());
    assert!(
        first.starts_with(CANARY) && second.starts_with(CANARY) && first < second,
        "{first} {second}"
    );
    over.store(true, Ordering::Relaxed);
    let mut last = second;
    while !last.is_empty() {
        assert!(last.starts_with(CANARY), "{last}");
        last = running.line();
    }
    assert_eq!(running.line(), "0");
    let mut stderr = String::new();
    running.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(running.wait(), 0, "{stderr}");
    assert!(stderr.contains("renew vault://db/creds/app, which is good for "), "{stderr}");
    assert!(!stderr.contains(CANARY), "{stderr}");
    running.assert_nothing_left();

    let text = fs::read_to_string(&audit).unwrap();
    assert!(!text.contains(CANARY), "{text}");
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (last, before) = lines.split_last().unwrap();
    assert!(
        before.len() >= 2 && before.iter().all(|line| line["verdict"] == "delivered"),
        "{text}"
    );
    assert_eq!(
        (&last["verdict"], &last["credentials"][0]),
        (&"revoked".into(), &"A".into()),
        "{text}"
    );
    assert!(lines.iter().all(|line| line["delivery"] == "memory"), "{text}");
}

fn one_is_taken_back_from_whoever_has_it(on: On) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        use tokio::io::{AsyncBufReadExt, AsyncWriteExt};

        let dir = tempfile::tempdir().unwrap();
        let path = file(dir.path(), "token", CANARY).unwrap();
        let source = || chitin::SecretSource::File((&path).into());
        let in_environment = chitin::SecretSpec {
            name: "B".into(),
            source: source(),
            delivery: chitin::Delivery::Env,
        };
        let sandbox = builder()
            .tier(on.tier)
            .secret("A", source())
            .secret_spec(in_environment)
            .start()
            .await
            .unwrap();
        let script = "while read line; do wc -c < $A_FILE; done";
        let mut holds = sandbox.command("sh").args(["-c", script]).piped_stdin().spawn().unwrap();
        let (mut stdin, stdout) = (holds.stdin.take().unwrap(), holds.stdout.take().unwrap());
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

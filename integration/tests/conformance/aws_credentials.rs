//! AWS's own SDK, as it is published, finds keys in a sandbox where it looks for them in a cloud.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

use chitin_integration::{Chitin, On, canary, file, workspace};
use serde_json::Value;

on_every_tier!(
    boto3_finds_keys_that_are_followed_by_others,
    a_policy_may_say_so,
    what_is_no_pair_of_keys_stops_the_run_before_it_starts,
);

const CANARY: &str = "canary-c0ffee41/7+d";

fn keys(id: &str) -> String {
    format!(
        r#"{{"AccessKeyId":"{id}","SecretAccessKey":"{CANARY}","SessionToken":"token-of-{id}"}}"#
    )
}

/// Copies the SDK in.
fn with_sdk(chitin: Chitin) -> Chitin {
    let python = fs::canonicalize(workspace().join("target/programs/python"));
    let python = python.expect("no target/programs/python: `cargo xtask test` fetches it");
    chitin.args(["--copy-in", &format!("{}:python", python.display())])
}

fn lines(audit: &Path) -> Vec<Value> {
    let text = fs::read_to_string(audit).unwrap();
    assert!(!text.contains(CANARY) && !text.contains("token-of"), "{text}");
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Each session looks for itself, and says which of its ways has led to what.
const FIND: &str = "
import os, sys, urllib.request, urllib.error
sys.path.insert(0, '/work/python')
import boto3
def find():
    found = boto3.Session().get_credentials()
    keys = found.get_frozen_credentials()
    return found.method, keys.access_key, keys.token, len(keys.secret_key)
print(*find(), flush=True)
";

fn boto3_finds_keys_that_are_followed_by_others(on: On) {
    let dir = tempfile::tempdir().unwrap();
    // Another tier's may be in memory at the same time.
    let [one, two] = [1, 2].map(|number| format!("ASIA{number}{}", std::process::id()));
    let source = file(dir.path(), "keys.json", keys(&one)).unwrap();
    let audit = dir.path().join("audit");
    let script = format!(
        "{FIND}
sys.stdin.readline()
print(*find(), flush=True)
def ask(method, path, **headers):
    place = os.environ['AWS_EC2_METADATA_SERVICE_ENDPOINT'] + path
    request = urllib.request.Request(place, headers={{k.replace('_', '-'): v for k, v in headers.items()}}, method=method)
    try:
        return urllib.request.urlopen(request).read().decode()
    except urllib.error.HTTPError as e:
        return e.code
full = os.environ.pop('AWS_CONTAINER_CREDENTIALS_FULL_URI')
token = os.environ.pop('AWS_CONTAINER_AUTHORIZATION_TOKEN')
print(*find(), flush=True)
print(ask('GET', '/credentials/AWS'), ask('GET', '/credentials/AWS', Authorization=token[:-1]), ask('GET', '/latest/meta-data/iam/security-credentials/AWS'), flush=True)
print(sum('canary' in line for line in os.environ.values()), flush=True)
sys.stdin.read()
"
    );
    let chitin =
        on.with(&format!("--secret AWS=file:{source} --secret-endpoint AWS --audit")).arg(&audit);
    let mut running = with_sdk(chitin).args(["--", "python3", "-c"]).arg(script).spawn();
    let length = CANARY.len();
    assert_eq!(running.line(), format!("container-role {one} token-of-{one} {length}"));
    // The source is not asked twice within a second.
    thread::sleep(Duration::from_millis(1100));
    fs::write(&source, keys(&two)).unwrap();
    running.child.stdin.as_mut().unwrap().write_all(b"go on\n").unwrap();
    assert_eq!(running.line(), format!("container-role {two} token-of-{two} {length}"));
    assert_eq!(running.line(), format!("iam-role {two} token-of-{two} {length}"));
    assert_eq!(running.line(), "401 401 401");
    assert_eq!(running.line(), "0");
    canary::assert_unwritten(&running, &format!("token-of-{two}"));
    running.child.stdin.take();
    assert_eq!(running.wait(), 0);
    running.assert_nothing_left();
    canary::assert_gone(&running, &format!("token-of-{two}"));

    let mut lines = lines(&audit);
    let first = lines.remove(0);
    assert_eq!((&first["credentials"][0], &first["delivery"]), (&"AWS".into(), &"endpoint".into()));
    let told = |line: &Value| {
        (
            line["verdict"].as_str().unwrap().to_owned(),
            line["credentials"][0].as_str().map(str::to_owned),
        )
    };
    let told: Vec<_> = lines.iter().map(told).collect();
    let given = ("allowed".to_owned(), Some("AWS".to_owned()));
    let refused = ("refused".to_owned(), None);
    assert_eq!(told, [vec![given; 3], vec![refused; 3]].concat(), "{lines:?}");
    assert!(
        lines.iter().all(|line| line["host"] == "localhost" && line["port"] == 9911),
        "{lines:?}"
    );
}

fn a_policy_may_say_so(on: On) {
    let policy =
        on.policy("secrets:\n  - {name: AWS, source: 'env:KEYS_HERE', delivery: endpoint}\n");
    let outcome = with_sdk(policy.run())
        .args(["--", "python3", "-c", FIND])
        .env("KEYS_HERE", keys("ASIA1"))
        .outcome();
    assert_eq!(
        outcome.ok(),
        format!("container-role ASIA1 token-of-ASIA1 {}", CANARY.len()),
        "{outcome:?}"
    );
}

fn what_is_no_pair_of_keys_stops_the_run_before_it_starts(on: On) {
    let refused = |options: &str, words: &str| {
        let outcome = on.with(&format!("{options} -- true")).env("KEYS_HERE", CANARY).outcome();
        assert!(!outcome.stderr.contains(CANARY), "{outcome:?}");
        outcome.refused(words);
    };
    refused("--secret AWS=env:KEYS_HERE --secret-endpoint AWS", "secret AWS: not a JSON object");
    refused(
        "--secret AWS=file:/nonexistent --secret-endpoint AWS",
        "secret AWS: read /nonexistent",
    );
    refused("--secret-endpoint AWS", "--secret-endpoint AWS: there is no --secret AWS=SRC");
    refused(
        "--secret AWS=env:KEYS_HERE --secret-env AWS --secret-endpoint AWS",
        "already delivers AWS",
    );
    refused(
        "--secret AWS=env:KEYS_HERE@api.example.com --secret-endpoint AWS",
        "already delivers AWS",
    );
    refused(
        "--allow localhost:9911 --secret AWS=env:KEYS_HERE --secret-endpoint AWS",
        "secret AWS: localhost:9911 is its endpoint in the sandbox",
    );
}

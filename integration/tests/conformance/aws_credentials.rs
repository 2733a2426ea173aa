//! The published AWS SDK finds keys in a sandbox at the endpoints that it queries in a cloud.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

use chitin_integration::{
    Chitin, TierUnderTest, canary, program_copy, read_json_lines, write_file,
};
use serde_json::Value;

on_every_tier!(
    boto3_finds_rotated_keys,
    policy_can_request_endpoint_delivery,
    invalid_aws_keys_prevent_start,
);

const CANARY: &str = "canary-c0ffee41/7+d";

fn keys_json(id: &str) -> String {
    format!(
        r#"{{"AccessKeyId":"{id}","SecretAccessKey":"{CANARY}","SessionToken":"token-of-{id}"}}"#
    )
}

/// Copies the SDK into the sandbox.
fn with_sdk(chitin: Chitin) -> Chitin {
    chitin.args(["--copy-in", &program_copy("python")])
}

/// Reads the audit log, and asserts that it does not contain keys.
fn read_audit(audit: &Path) -> Vec<Value> {
    canary::assert_no_file_contains(&[audit], CANARY);
    canary::assert_no_file_contains(&[audit], "token-of");
    read_json_lines(audit).unwrap()
}

/// Defines `find`, which searches in a new session, and prints the method and the keys.
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

fn boto3_finds_rotated_keys(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    // The ids are unique, because the test of another tier may run concurrently.
    let [one, two] = [1, 2].map(|number| format!("ASIA{number}{}", std::process::id()));
    let source = write_file(dir.path(), "keys.json", keys_json(&one)).unwrap();
    let audit = dir.path().join("audit");
    let chitin = tier
        .run_with(&format!("--secret AWS=file:{source} --secret-endpoint AWS --audit"))
        .arg(&audit);
    let script = rotation_script();
    let mut running = with_sdk(chitin).args(["--", "python3", "-c"]).arg(script).spawn();
    let length = CANARY.len();
    assert_eq!(running.read_line(), format!("container-role {one} token-of-{one} {length}"));
    // The source is read at most once a second.
    thread::sleep(Duration::from_millis(1100));
    fs::write(&source, keys_json(&two)).unwrap();
    running.child.stdin.as_mut().unwrap().write_all(b"go on\n").unwrap();
    assert_eq!(running.read_line(), format!("container-role {two} token-of-{two} {length}"));
    assert_eq!(running.read_line(), format!("iam-role {two} token-of-{two} {length}"));
    assert_eq!(running.read_line(), "401 401 401");
    assert_eq!(running.read_line(), "0");
    canary::assert_unwritten(&running, &format!("token-of-{two}"));
    running.child.stdin.take();
    assert_eq!(running.wait(), 0);
    running.assert_no_process_left();
    canary::assert_gone(&running, &format!("token-of-{two}"));

    let mut lines = read_audit(&audit);
    let first = lines.remove(0);
    assert_eq!((&first["credentials"][0], &first["delivery"]), (&"AWS".into(), &"endpoint".into()));
    let verdict = |line: &Value| {
        (
            line["verdict"].as_str().unwrap().to_owned(),
            line["credentials"][0].as_str().map(str::to_owned),
        )
    };
    let verdicts: Vec<_> = lines.iter().map(verdict).collect();
    let allowed = ("allowed".to_owned(), Some("AWS".to_owned()));
    let refused = ("refused".to_owned(), None);
    assert_eq!(verdicts, [vec![allowed; 3], vec![refused; 3]].concat(), "{lines:?}");
    assert!(
        lines.iter().all(|line| line["host"] == "localhost" && line["port"] == 9911),
        "{lines:?}"
    );
}

/// Returns a script that finds keys, waits for a line, finds keys by both methods of the SDK, and
/// sends three requests without the token.
fn rotation_script() -> String {
    format!(
        "{FIND}
sys.stdin.readline()
print(*find(), flush=True)
def ask(method, path, **headers):
    place = os.environ['AWS_EC2_METADATA_SERVICE_ENDPOINT'] + path
    headers = {{k.replace('_', '-'): v for k, v in headers.items()}}
    request = urllib.request.Request(place, headers=headers, method=method)
    try:
        return urllib.request.urlopen(request).read().decode()
    except urllib.error.HTTPError as e:
        return e.code
full = os.environ.pop('AWS_CONTAINER_CREDENTIALS_FULL_URI')
token = os.environ.pop('AWS_CONTAINER_AUTHORIZATION_TOKEN')
print(*find(), flush=True)
print(ask('GET', '/credentials/AWS'), ask('GET', '/credentials/AWS', Authorization=token[:-1]),
      ask('GET', '/latest/meta-data/iam/security-credentials/AWS'), flush=True)
print(sum('canary' in line for line in os.environ.values()), flush=True)
sys.stdin.read()
"
    )
}

fn policy_can_request_endpoint_delivery(tier: TierUnderTest) {
    let policy = tier
        .write_policy("secrets:\n  - {name: AWS, source: 'env:KEYS_HERE', delivery: endpoint}\n");
    let outcome = with_sdk(policy.run())
        .args(["--", "python3", "-c", FIND])
        .env("KEYS_HERE", keys_json("ASIA1"))
        .outcome();
    assert_eq!(
        outcome.assert_success(),
        format!("container-role ASIA1 token-of-ASIA1 {}", CANARY.len()),
        "{outcome:?}"
    );
}

fn invalid_aws_keys_prevent_start(tier: TierUnderTest) {
    let run = |options: &str| {
        let outcome =
            tier.run_with(&format!("{options} -- true")).env("KEYS_HERE", CANARY).outcome();
        assert!(!outcome.stderr.contains(CANARY), "{outcome:?}");
        outcome
    };
    let refused = |options: &str, words: &str| run(options).assert_refused(words);
    let misused = |options: &str, words: &str| run(options).assert_usage_error(words);
    refused("--secret AWS=env:KEYS_HERE --secret-endpoint AWS", "JSON object");
    refused("--secret AWS=file:/nonexistent --secret-endpoint AWS", "/nonexistent");
    misused("--secret-endpoint AWS", "--secret AWS=SRC");
    misused(
        "--secret AWS=env:KEYS_HERE --secret-env AWS --secret-endpoint AWS",
        "--secret-endpoint AWS: another option",
    );
    misused(
        "--secret AWS=env:KEYS_HERE@api.example.com --secret-endpoint AWS",
        "--secret-endpoint AWS: another option",
    );
    refused(
        "--allow localhost:9911 --secret AWS=env:KEYS_HERE --secret-endpoint AWS",
        "secret AWS: localhost:9911",
    );
}

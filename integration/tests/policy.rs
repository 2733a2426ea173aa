//! Policies of microVMs, templates, pools and forks. Each field is tested in `conformance`.

use std::path::Path;

use chitin::{Exit, Sandbox, TierKind};
use chitin_integration::{Chitin, Policy, TierUnderTest, chitin, sandbox_builder};
use serde_json::Value;

fn write_policy(text: &str) -> Policy {
    TierUnderTest::new(TierKind::Ironclaw).write_policy(text)
}

const RESTRICTED: &str = "sandbox: {profile: restricted}\nresources: {timeout: 10m}\n";

#[test]
fn policy_limits_memory_and_cpus() {
    let policy = write_policy("resources: {memory_mib: 128, vcpus: 2}\n");
    let outcome = policy
        .run_sh("nproc; grep MemTotal /proc/meminfo; exec python3 -c 'x = b\"x\" * (200 << 20)'")
        .outcome();
    assert!(outcome.code != 0, "{outcome:?}");
    let lines: Vec<&str> = outcome.stdout_text().lines().collect();
    assert_eq!(lines[0], "2");
    let total: u64 = lines[1].split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((64 << 10..128 << 10).contains(&total), "{total} KiB");
    // Options may lower the limits.
    let outcome = policy
        .run()
        .args(["--cpus", "1", "--memory", "96", "--", "sh", "-c"])
        .arg("nproc; grep MemTotal /proc/meminfo")
        .outcome();
    let lines: Vec<&str> = outcome.assert_success().lines().collect();
    let total: u64 = lines[1].split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(lines[0] == "1" && total < 96 << 10, "{outcome:?}");
}

#[test]
fn unenforceable_policy_is_rejected() {
    let refused = |text: &str, words: &str| {
        let policy = write_policy(text);
        let mut run = policy.run_sh("true");
        run.command().env_remove("VAULT_ADDR");
        run.outcome().assert_refused(words);
    };
    refused(
        "hardening:\n  strip_agent_capabilities: true\n  readonly_root_filesystem: true\n  \
         credential_source: vault://openclaw/creds\n",
        "VAULT_ADDR",
    );
    refused("secrets: [{name: A, source: 'vault://kv/a#b'}]\n", "VAULT_ADDR");
    refused("resorces: {}\n", "p.yaml, line 2, column 1: unknown key `resorces`");
    refused(
        "sandbox: {filesystem: [{access: read-only, path: /in, source: /nonexistent}]}\n",
        "/nonexistent",
    );
    refused("image: /nonexistent.img\n", "/nonexistent.img");
    chitin("run --policy /nonexistent.yaml -- true").outcome().assert_refused("/nonexistent.yaml");
}

#[test]
fn policy_check_predicts_run() {
    let check = |text: &str| {
        let policy = write_policy(text);
        chitin("policy check").arg(&policy.path).outcome()
    };
    let fine = check(RESTRICTED);
    assert!(fine.assert_success().contains("On ironclaw, all of it is enforced:"), "{fine:?}");
    let secret = check("secrets: [{name: A, source: 'vault://kv/a#b'}]\n");
    assert!(secret.assert_success().contains("A from vault://kv/a#b"), "{secret:?}");
    let egress = check("sandbox: {network: {allowed_egress: ['api.example.com:443']}}\n");
    assert!(
        egress.assert_success().contains("a broker on this host dials the listed endpoints"),
        "{egress:?}"
    );
    check("sandbox:\n  profile: paranoid\n")
        .assert_refused("p.yaml, line 3, column 12: unknown value `paranoid`");
    let schema = chitin("policy schema").outcome();
    let schema: Value = serde_json::from_str(schema.assert_success()).expect("JSON");
    assert_eq!(schema["title"], "Chitin policy");
}

#[test]
fn template_requires_policy_it_was_built_with() {
    let restricted = write_policy(RESTRICTED);
    let other = write_policy("plugin: other\n");
    let templates = tempfile::tempdir().unwrap();
    let with_templates = |chitin: Chitin| chitin.env("CHITIN_TEMPLATES", templates.path());
    let build = |name: &str, policy: Option<&Path>| {
        let mut build = chitin("template build").arg(name);
        if let Some(policy) = policy {
            build = build.arg("--policy").arg(policy);
        }
        with_templates(build).outcome().assert_success();
    };
    let probe = ["--", "sh", "-c", "ls / >/dev/null 2>&1 || echo confined"];
    build("mine", Some(Path::new(&restricted.path)));
    let copy = |policy: &Policy, name: &str| {
        with_templates(policy.run().args(["--template", name]).args(probe)).outcome()
    };
    assert_eq!(copy(&restricted, "mine").assert_success(), "confined");
    copy(&other, "mine").assert_refused("another policy");
    with_templates(chitin("run --template mine -- true")).outcome().assert_refused("--policy");
    // A template built without a policy is confined before its copy runs a command.
    build("plain", None);
    assert_eq!(copy(&restricted, "plain").assert_success(), "confined");
}

/// Returns true if the sandbox cannot list its root directory.
async fn is_confined(sandbox: &Sandbox) -> bool {
    let listed = sandbox.command("ls").arg("/").output().await.expect("run ls");
    listed.exit != Exit::Code(0)
}

#[tokio::test]
async fn pools_and_forks_enforce_policy() {
    let policy = chitin::Policy::parse(RESTRICTED, "p.yaml").expect("a policy");
    let builder = || sandbox_builder().policy(policy.clone());
    let pool = builder().pool(1).await.unwrap();
    pool.wait_until_full().await.unwrap();
    // An idle sandbox, and one that is started because the pool is empty.
    for _ in 0..2 {
        assert!(is_confined(&pool.start().await.unwrap()).await);
    }
    drop(pool);
    let mut sandbox = builder().forkable(true).start().await.unwrap();
    let copies = sandbox.fork(1).await.unwrap();
    assert!(is_confined(&sandbox).await && is_confined(&copies[0]).await);
}

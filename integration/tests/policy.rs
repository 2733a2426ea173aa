//! What a policy says of a microVM; its fields, one by one and on every tier, are in `conformance`.

use std::path::Path;

use chitin::{Exit, Sandbox, TierKind};
use chitin_integration::{Chitin, On, Policy, builder, chitin};
use serde_json::Value;

fn policy(text: &str) -> Policy {
    On { tier: TierKind::Ironclaw }.policy(text)
}

const RESTRICTED: &str = "sandbox: {profile: restricted}\nresources: {timeout: 10m}\n";

#[test]
fn memory_and_cpus_have_an_end() {
    let policy = policy("resources: {memory_mib: 128, vcpus: 2}\n");
    let outcome = policy
        .sh("nproc; grep MemTotal /proc/meminfo; exec python3 -c 'x = b\"x\" * (200 << 20)'")
        .outcome();
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
fn what_cannot_be_kept_is_refused() {
    let refused = |text: &str, words: &str| {
        let policy = policy(text);
        let mut run = policy.sh("true");
        run.command().env_remove("VAULT_ADDR");
        run.outcome().refused(words);
    };
    refused(
        "hardening:\n  strip_agent_capabilities: true\n  readonly_root_filesystem: true\n  \
         credential_source: vault://openclaw/creds\n",
        "VAULT_ADDR is not set",
    );
    refused("secrets: [{name: A, source: 'vault://kv/a#b'}]\n", "VAULT_ADDR is not set");
    refused("resorces: {}\n", "p.yaml, line 2, column 1: unknown key `resorces`");
    refused(
        "sandbox: {filesystem: [{access: read-only, path: /in, source: /nonexistent}]}\n",
        "/nonexistent",
    );
    refused("image: /nonexistent.img\n", "/nonexistent.img");
    chitin("run --policy /nonexistent.yaml -- true")
        .outcome()
        .refused("read the policy /nonexistent.yaml");
}

#[test]
fn a_check_says_beforehand_what_a_run_will_say() {
    let check = |text: &str| {
        let policy = policy(text);
        chitin("policy check").arg(&policy.path).outcome()
    };
    let fine = check(RESTRICTED);
    assert!(fine.ok().contains("On ironclaw, all of it is enforced:"), "{fine:?}");
    let secret = check("secrets: [{name: A, source: 'vault://kv/a#b'}]\n");
    assert!(secret.ok().contains("A from vault://kv/a#b, as a file in memory"), "{secret:?}");
    let egress = check("sandbox: {network: {allowed_egress: ['api.example.com:443']}}\n");
    assert!(egress.ok().contains("a broker on this host dials the listed endpoints"), "{egress:?}");
    check("sandbox:\n  profile: paranoid\n").refused(
        "p.yaml, line 3, column 12: unknown value `paranoid`, expected one of restricted,",
    );
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
    let copy = |policy: &Policy, name: &str| {
        with(policy.run().args(["--template", name]).args(probe)).outcome()
    };
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
    let builder =
        || builder().policy(chitin::Policy::parse(RESTRICTED, "p.yaml").expect("a policy"));
    let pool = builder().pool(1).await.unwrap();
    pool.wait_until_full().await.unwrap();
    // One that waited, and one that is started because none waits any more.
    for _ in 0..2 {
        assert!(confined(&pool.start().await.unwrap()).await);
    }
    drop(pool);
    let mut sandbox = builder().forkable(true).start().await.unwrap();
    let copies = sandbox.fork(1).await.unwrap();
    assert!(confined(&sandbox).await && confined(&copies[0]).await);
}

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::*;

/// The two manifests of the design, unchanged.
const FIRST: &str = "\
runtime: ironclaw
hardening:
  strip_agent_capabilities: true      # all dropped but net bind
  readonly_root_filesystem: true
  credential_source: vault://openclaw/creds
";

const SECOND: &str = "\
plugin: \"web_scraper\"
sandbox:
  profile: \"restricted-net\"
  filesystem:
    - access: \"read-only\"
      path: \"/shared/config.yaml\"
  network:
    allowed_egress:
      - \"api.example.com:443\"
  syscall_filter: \"default_deny\"
";

fn parse(text: &str) -> Policy {
    Policy::parse(text, "p.yaml").unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// Asserts that a text is refused at this line and column, with a message that contains `words`.
#[track_caller]
fn refused(text: &str, location: (usize, usize), words: &str) {
    match Policy::parse(text, "p.yaml") {
        Err(PolicyError::Invalid { location: Location { line, column }, message, .. }) => {
            assert!(message.contains(words), "no `{words}` in `{message}`");
            assert_eq!((line, column), location, "{message}");
        }
        other => panic!("{other:?}\n{text}"),
    }
}

#[test]
fn manifest_with_hardening_is_read() {
    let policy = parse(FIRST);
    assert_eq!((policy.runtime, policy.profile), (TierKind::Ironclaw, Profile::Default));
    let source = VaultSource { mount: "openclaw".into(), path: "creds".into(), field: None };
    assert_eq!(policy.credential_source, Some(source));
    policy.check_tier(TierKind::Ironclaw).unwrap();
    assert!(policy.explain().contains("vault://openclaw/creds"));
}

#[test]
fn manifest_with_plugin_rules_is_read() {
    let policy = parse(SECOND);
    assert_eq!(policy.plugin.as_deref(), Some("web_scraper"));
    assert_eq!((policy.runtime, policy.profile), (TierKind::Ironclaw, Profile::RestrictedNet));
    assert_eq!(policy.syscalls, SyscallFilter::DefaultDeny);
    let path = PathBuf::from("/shared/config.yaml");
    assert_eq!(
        policy.files,
        [CopiedFile { access: Access::ReadOnly, path: path.clone(), source: path }]
    );
    assert!(policy.files_confined);
    assert_eq!(
        policy.egress,
        [Endpoint { host: "api.example.com".into(), wildcard: false, port: 443 }]
    );
    policy.check_tier(TierKind::Ironclaw).unwrap();
    let reach = |endpoint: &str| policy.may_reach(&endpoint.parse().unwrap());
    assert!(reach("api.example.com:443"));
    for more in
        ["api.example.com:80", "example.com:443", "*.example.com:443", "a.api.example.com:443"]
    {
        assert!(!reach(more), "{more}");
    }
    let wide = parse("sandbox: {network: {allowed_egress: ['*.example.com:443']}}");
    let reach = |endpoint: &str| wide.may_reach(&endpoint.parse().unwrap());
    assert!(
        reach("a.example.com:443") && reach("*.a.example.com:443") && reach("*.example.com:443")
    );
    assert!(
        !reach("example.com:443") && !reach("badexample.com:443") && !reach("a.example.com:80")
    );
}

#[test]
fn manifest_with_every_key_is_read() {
    let policy = parse(
        "
plugin: everything
runtime: nanoclaw
fallback: [nemoclaw, ironclaw]
image: /srv/images/big.img
hardening: {strip_agent_capabilities: true}
sandbox:
  profile: trusted
  syscall_filter: default_deny
  filesystem:
    - {access: read-write, path: /work/out, source: /srv/out}
    - {access: read-only, path: /data/a b, source: /srv/in}
  network: {allowed_egress: ['*.Example.com:8443']}
resources: {vcpus: 8, memory_mib: 512, timeout: 1m 30s, pids: 100, disk_mib: 256}
secrets:
  - {name: TOKEN, source: 'env:HOST_TOKEN'}
  - {name: KEY, source: 'file:/etc/key', delivery: env}
  - {name: DB, source: 'vault://kv/db/main#password'}
",
    );
    assert_eq!(
        (policy.runtime, policy.fallback.as_slice()),
        (TierKind::Nanoclaw, &[TierKind::Nemoclaw, TierKind::Ironclaw][..])
    );
    assert_eq!(policy.image, Some("/srv/images/big.img".into()));
    assert_eq!(policy.files[0].access, Access::ReadWrite);
    assert_eq!(policy.files[1].path, Path::new("/data/a b"));
    assert_eq!(policy.egress[0].to_string(), "*.example.com:8443");
    let timeout = Some(Duration::from_secs(90));
    let limits = Limits { vcpus: 8, memory_mib: 512, timeout, pids: 100, disk_mib: Some(256) };
    assert_eq!(policy.limits, limits);
    assert_eq!(policy.secrets.len(), 3);
    assert_eq!(policy.secrets[2].source, "vault://kv/db/main#password".parse().unwrap());
    let words = policy.explain();
    for part in [
        "/work/out",
        "/data/a b",
        "*.example.com:8443",
        "HOST_TOKEN",
        "/etc/key",
        "1m 30s",
        "nemoclaw and ironclaw",
    ] {
        assert!(words.contains(part), "no {part} in {words}");
    }
}

#[test]
fn profile_supplies_absent_keys() {
    for spec in &PROFILES {
        let policy = parse(&format!("sandbox: {{profile: {}}}", spec.profile));
        assert_eq!(policy.profile.spec().profile, spec.profile);
        assert_eq!((policy.limits, policy.syscalls), (spec.resources, spec.syscalls));
        assert_eq!(policy.files_confined, spec.files_confined);
        // The table, the file and the schema use the same names.
        assert!(Policy::schema().contains(&format!("\"{}\"", spec.profile.name())));
    }
    // A list of files, even an empty one, confines under any profile.
    assert!(parse("sandbox: {filesystem: []}").files_confined);
    assert!(!parse("plugin: x").files_confined);
    // The profile's disk limit shrinks with a smaller memory.
    let small = parse("sandbox: {profile: restricted}\nresources: {memory_mib: 64}");
    assert_eq!(small.limits.disk_mib, Some(32));
    let units = parse("resources: {memory_mib: 1G, disk_mib: 128M}");
    assert_eq!((units.limits.memory_mib, units.limits.disk_mib), (1024, Some(128)));
}

#[test]
fn file_cannot_loosen_its_profile() {
    refused(
        "sandbox:\n  profile: restricted\n  syscall_filter: default_allow\n",
        (3, 19),
        "requires default_deny",
    );
    refused(
        "sandbox:\n  profile: restricted\n  network:\n    allowed_egress: ['a.b:1']\n",
        (4, 21),
        "restricted-net",
    );
    let env =
        "sandbox: {profile: restricted}\nsecrets:\n  - {name: A, source: 'env:A', delivery: env}\n";
    refused(env, (3, 42), "out of the environment");
    parse("sandbox: {profile: restricted, network: {allowed_egress: []}}");
}

#[test]
fn unknown_keys_are_refused_with_location() {
    refused("runtime: ironclaw\nhardning: {}\n", (2, 1), "unknown key `hardning`");
    refused("resources:\n  memory_mb: 1\n", (2, 3), "vcpus, memory_mib, timeout, pids, disk_mib");
    refused(
        "sandbox:\n  filesystem:\n    - access: read-only\n      path: /a\n      mode: 7\n",
        (5, 7),
        "`mode`",
    );
    refused("runtime: docker\n", (1, 10), "ironclaw, nanoclaw, nemoclaw");
    refused(
        "sandbox: {profile: paranoid}\n",
        (1, 20),
        "restricted, restricted-net, default, trusted",
    );
    refused("sandbox: {syscall_filter: none}\n", (1, 27), "default_allow, default_deny");
    refused("<<: {runtime: ironclaw}\n", (1, 1), "unknown key `<<`");
}

#[test]
fn duplicate_keys_are_refused() {
    refused(
        "runtime: ironclaw\nplugin: a\nruntime: nemoclaw\n",
        (3, 1),
        "duplicate key `runtime`, first in line 1",
    );
    refused("resources: {pids: 1, pids: 2}\n", (1, 22), "duplicate key");
    refused("? [a]\n: 1\n", (1, 3), "a key must be a string");
    refused("1: 2\n", (1, 1), "a key must be a string");
    refused("fallback: [nanoclaw, nanoclaw]\n", (1, 22), "listed twice");
    refused("runtime: nanoclaw\nfallback: [nanoclaw]\n", (2, 12), "listed twice");
    refused(
        "secrets:\n- {name: A, source: 'env:A'}\n- {name: A, source: 'env:B'}\n",
        (3, 10),
        "listed twice",
    );
}

#[test]
fn wrong_types_are_refused() {
    refused("resources: {pids: \"12\"}\n", (1, 19), "expected an integer, found the string `12`");
    refused("resources: {pids: 1.5}\n", (1, 19), "an integer");
    refused("resources: {pids: 0x10}\n", (1, 19), "an integer");
    refused("resources: {vcpus: 9}\n", (1, 20), "1 to 8");
    refused("resources: {vcpus: -1}\n", (1, 20), "1 to 8");
    refused("resources: {memory_mib: 99999999999999999999}\n", (1, 25), "an integer");
    refused("resources: {memory_mib: 1.5G}\n", (1, 25), "512M or 1G");
    refused("resources: {memory_mib: 99G}\n", (1, 25), "use 64 to 16384");
    refused("resources: {memory_mib: '512'}\n", (1, 25), "found the string `512`");
    refused("resources: {timeout: 90}\n", (1, 22), "found the number 90");
    refused("resources: {timeout: 0s}\n", (1, 22), "zero");
    refused("resources: {timeout: soon}\n", (1, 22), "90s");
    refused("resources: [1]\n", (1, 12), "found a list");
    refused("resources:\n", (1, 10), "found no value");
    refused("plugin: 7\n", (1, 9), "found the number 7");
    refused("plugin: [a]\n", (1, 9), "found a list");
    refused("fallback: nanoclaw\n", (1, 11), "found the string");
    refused("runtime: {}\n", (1, 10), "ironclaw, nanoclaw, nemoclaw");
    refused(
        "hardening: {strip_agent_capabilities: yes}\n",
        (1, 39),
        "expected `true`, found the string `yes`",
    );
    refused("hardening: {readonly_root_filesystem: false}\n", (1, 39), "cannot be switched off");
    refused("sandbox: {filesystem: [{access: read-only}]}\n", (1, 24), "the key `path` is missing");
    refused("just text\n", (1, 1), "found the string");
    refused("- a\n", (1, 1), "found a list");
}

#[test]
fn paths_must_be_in_normal_form() {
    let rule =
        |path: &str| format!("sandbox:\n  filesystem:\n  - access: read-only\n    path: {path}\n");
    for (path, words) in [
        ("etc/passwd", "relative"),
        ("./a", "relative"),
        ("/a/../b", "`..`"),
        ("/..", "`..`"),
        ("/a/./b", "normal form"),
        ("/a//b", "normal form"),
        ("/a/", "normal form"),
        ("/", "normal form"),
        ("\"/a\\0b\"", "NUL"),
        ("\"/a\\nb\"", "control character"),
        ("/proc/self", "belongs to the kernel"),
        ("/sys", "belongs to the kernel"),
        ("/dev/shm/x", "belongs to the kernel"),
        ("/work/in", "outside"),
        ("/tmp", "outside"),
    ] {
        refused(&rule(path), (4, 11), words);
    }
    let write = |path: &str| rule(path).replace("read-only", "read-write");
    for path in ["/data", "/work", "/tmp", "/var/tmp/x", "/workshop/x"] {
        refused(&write(path), (4, 11), "below /work or /tmp");
    }
    parse(&write("/work/a"));
    parse(&rule("/workshop/x"));
    refused(
        &format!("{}  - access: read-only\n    path: /a/b/c\n", rule("/a/b")),
        (6, 11),
        "contain each other",
    );
    refused("image: root.img\n", (1, 8), "relative");
    refused("secrets: [{name: A, source: 'file:key'}]\n", (1, 29), "relative");
}

#[test]
fn invalid_endpoints_are_refused() {
    let list =
        |endpoint: &str| format!("sandbox: {{network: {{allowed_egress: ['{endpoint}']}}}}\n");
    for bad in [
        "example.com",
        "example.com:0",
        "example.com:65536",
        "example.com:https",
        ":443",
        "*:443",
        "*.com:443",
        "a..b:1",
        "-a.b:1",
        "a b:1",
        "http://a.b:1",
        "10.0.0.1:80",
        "[::1]:80",
        "169.254.169.254:80",
        "a.*.b:1",
        &format!("{}:1", "a".repeat(64)),
        &format!("{}b:1", "a.".repeat(127)),
    ] {
        refused(&list(bad), (1, 38), "is not HOST:PORT");
    }
    for good in ["a:1", "api.example.com:443", "*.example.com:65535", "my_host-1.x:80"] {
        parse(&list(good));
    }
}

#[test]
fn invalid_credential_sources_are_refused() {
    let secret = |source: &str| format!("secrets:\n- name: A\n  source: {source}\n");
    refused(&secret("'vault://'"), (3, 11), "vault://MOUNT/PATH");
    refused(&secret("'vault://mount'"), (3, 11), "vault://MOUNT/PATH");
    refused(&secret("'vault://mount/a/../b'"), (3, 11), "vault://MOUNT/PATH");
    refused(&secret("'vault://mount/a#'"), (3, 11), "vault://MOUNT/PATH");
    refused(&secret("'vault://mount/a%2e%2e/b?x'"), (3, 11), "vault://MOUNT/PATH");
    refused(&secret("'env:'"), (3, 11), "unknown source");
    refused(&secret("'env:A@api.test'"), (3, 11), "in the key `hosts`");
    // A text that may be a pasted value is not repeated.
    let error = Policy::parse(&secret("sk-live-4711"), "p.yaml").unwrap_err().to_string();
    assert!(!error.contains("4711"), "{error}");
    refused("secrets: [{name: 1A, source: 'env:A'}]\n", (1, 18), "environment variable");
    refused("hardening: {credential_source: 'env:A'}\n", (1, 32), "vault://MOUNT/PATH");
}

#[test]
fn ambiguous_yaml_is_refused() {
    refused("plugin: &a x\n", (1, 12), "anchors are not allowed");
    refused("plugin: x\nruntime: *a\n", (2, 10), "aliases are not allowed");
    refused("resources: &r {}\n", (1, 15), "anchors are not allowed");
    refused("plugin: !!str x\n", (1, 9), "tags are not allowed");
    refused("sandbox: !include other.yaml\n", (1, 10), "tags are not allowed");
    refused("runtime: ironclaw\n---\nruntime: nemoclaw\n", (2, 1), "second document");
    refused("%YAML 1.1\n---\nruntime: ironclaw\n", (1, 1), "directive");
    refused("", (1, 1), "empty");
    refused("# only a comment\n", (1, 1), "empty");
    refused("~\n", (1, 1), "empty");
    refused("plugin: [a\n", (1, 9), "unclosed");
    refused("plugin: 'a\n", (2, 1), "");
    refused("plugin: a\n\truntime: ironclaw\n", (1, 9), "tab");
}

#[test]
fn parser_survives_every_mutation() {
    let text = format!(
        "{FIRST}{}",
        SECOND.replace("sandbox:", "secrets: [{name: A, source: 'env:B'}]\nsandbox:")
    );
    parse(&text);
    for at in 0..text.len() {
        let _ = Policy::parse(&text[..at], "p.yaml");
        for character in "&*!{}[]:,-#|>'\"%@`~?\t\n\r\0\u{feff}\u{85}é0 ".chars() {
            let changed = format!("{}{character}{}", &text[..at], &text[at + 1..]);
            let added = format!("{}{character}{}", &text[..at], &text[at..]);
            for text in [changed, added] {
                if let Err(error) = Policy::parse(&text, "p.yaml") {
                    let line = error.to_string();
                    assert!(!line.contains('\n'), "more than one line: {line}");
                }
            }
        }
    }
}

#[test]
fn characters_that_change_the_layout_are_refused() {
    for c in ["\u{202e}", "\u{2066}", "\u{200f}", "\u{61c}", "\u{2028}"] {
        let text = format!("secrets:\n  - {{name: A, source: \"exec:true {c} x\"}}\n");
        let refused = Policy::parse(&text, "p.yaml");
        assert!(matches!(refused, Err(PolicyError::Invalid { .. })), "{}", c.escape_unicode());
    }
    parse("plugin: \"päckchen 🦀\"\n");
}

#[test]
fn expansion_and_depth_bombs_are_refused() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..9 {
        let aliases = vec![format!("*a{}", level - 1); 9].join(", ");
        bomb.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
    }
    refused(&bomb, (1, 9), "anchors are not allowed");
    for deep in ["[".repeat(30_000), "{a: ".repeat(10_000), "- ".repeat(30_000), "a:\n ".repeat(20)]
    {
        let error = Policy::parse(&deep, "p.yaml").unwrap_err();
        assert!(matches!(error, PolicyError::Invalid { .. }), "{error:?}");
    }
    let many = format!("sandbox: {{network: {{allowed_egress: [{}]}}}}", "'a.b:1', ".repeat(65));
    refused(&many, (1, 37), "at most 64");
    let long = format!("plugin: {}\n", "x".repeat(60_000));
    refused(&long, (1, 9), "128 characters");
}

#[test]
fn oversized_and_non_utf8_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.yaml");
    assert!(matches!(Policy::load(&path), Err(PolicyError::Read { .. })));
    assert!(matches!(Policy::load(dir.path()), Err(PolicyError::Read { .. })));
    std::fs::write(&path, format!("plugin: a\n#{}", "x".repeat(64 * 1024))).unwrap();
    assert!(matches!(Policy::load(&path), Err(PolicyError::TooLarge { .. })));
    // An endless file is refused too.
    assert!(matches!(Policy::load("/dev/zero"), Err(PolicyError::TooLarge { .. })));
    std::fs::write(&path, b"plugin: a\xff\n").unwrap();
    assert!(matches!(Policy::load(&path), Err(PolicyError::NotUtf8 { at: 9, .. })));
    std::fs::write(&path, FIRST).unwrap();
    let policy = Policy::load(&path).unwrap();
    assert_eq!(policy.origin, path.display().to_string());
    assert_eq!(policy.digest, parse(FIRST).digest);
    assert_eq!(policy.digest.len(), 64);
    assert_ne!(policy.digest, parse(SECOND).digest);
}

#[test]
fn first_able_tier_is_chosen() {
    assert_eq!(
        parse("runtime: ironclaw\nfallback: [nemoclaw]").tier().unwrap(),
        TierKind::Ironclaw
    );
    let order: Vec<TierKind> = parse("runtime: nemoclaw\nfallback: [ironclaw]").tiers().collect();
    assert_eq!(order, [TierKind::Nemoclaw, TierKind::Ironclaw]);
    assert_eq!(
        parse("runtime: nanoclaw\nfallback: [nemoclaw]").tier().unwrap(),
        TierKind::Nanoclaw
    );
}

#[test]
fn disk_limit_must_fit_memory() {
    refused("resources:\n  memory_mib: 128\n  disk_mib: 65\n", (3, 13), "half of its 128 MiB");
    refused("resources: {disk_mib: 200}\n", (1, 23), "half of its 256 MiB");
}

#[test]
fn requests_can_lower_limits_only() {
    let policy = parse("resources: {vcpus: 2, timeout: 10s}");
    assert_eq!(policy.tighten("cpus", None, policy.limits.vcpus).unwrap(), 2);
    assert_eq!(policy.tighten("cpus", Some(1), policy.limits.vcpus).unwrap(), 1);
    let error = policy.tighten("--cpus", Some(3), policy.limits.vcpus).unwrap_err().to_string();
    assert!(error.contains("--cpus 3 is more than the 2"), "{error}");
    let time = |seconds| policy.tighten_timeout(Some(Duration::from_secs(seconds)));
    assert_eq!(policy.tighten_timeout(None).unwrap(), Some(Duration::from_secs(10)));
    assert_eq!(time(5).unwrap(), Some(Duration::from_secs(5)));
    let error = time(11).unwrap_err().to_string();
    assert!(error.contains("11s is more than the 10s"), "{error}");
    let unlimited = parse("plugin: x");
    assert_eq!(unlimited.tighten_timeout(None).unwrap(), None);
}

#[test]
fn schema_has_no_null() {
    assert!(!Policy::schema().contains("\"null\""), "{}", Policy::schema());
}

#[test]
fn committed_schema_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/policy.schema.json");
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == Policy::schema(),
        "docs/policy.schema.json is outdated: run `chitin policy schema > docs/policy.schema.json`"
    );
}

#[test]
fn documented_profiles_match_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/policy.md");
    let text = std::fs::read_to_string(path).unwrap();
    for ProfileSpec {
        profile,
        purpose,
        syscalls,
        files_confined,
        egress,
        env_secrets,
        resources,
    } in &PROFILES
    {
        let files = if *files_confined { "denied" } else { "readable" };
        let egress = if *egress { "as listed" } else { "refused" };
        let env = if *env_secrets { "allowed" } else { "refused" };
        let Limits { vcpus, memory_mib, timeout, pids, disk_mib } = resources;
        let time = timeout
            .map_or("unlimited".into(), |limit| humantime::format_duration(limit).to_string());
        let disk = disk_mib.map_or("half of the memory".into(), |disk| format!("{disk} MiB"));
        let line = format!(
            "| `{profile}` | {purpose} | `{}` | {files} | {egress} | {env} | {vcpus} | {memory_mib} \
             | {disk} | {pids} | {time} |",
            syscalls.name()
        );
        assert!(text.contains(&line), "docs/policy.md lacks the line\n{line}");
    }
}

#[test]
fn documented_policies_parse() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/policy.md");
    let text = std::fs::read_to_string(path).unwrap();
    let blocks: Vec<&str> =
        text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(blocks.contains(&FIRST) && blocks.contains(&SECOND));
    for block in blocks {
        parse(block);
    }
}

#[test]
fn proxied_credentials_need_permitted_hosts() {
    let policy = |secret: &str| {
        format!(
            "sandbox: {{network: {{allowed_egress: ['*.example.com:443']}}}}\n\
             secrets: [{{name: A, source: 'env:A', {secret}}}]\n"
        )
    };
    let kept = parse(&policy(
        "hosts: ['api.example.com:443'], replaced_in: [body, 'header:X-Key'], \
         path_prefix: /v1/, methods: [GET, POST]",
    ));
    let scope = chitin_spec::ProxyScope {
        hosts: vec!["api.example.com:443".parse().unwrap()],
        query: false,
        body: true,
        headers: vec!["x-key".parse().unwrap()],
        path_prefix: Some("/v1/".parse().unwrap()),
        methods: vec!["GET".parse().unwrap(), "POST".parse().unwrap()],
    };
    assert_eq!(kept.secrets[0].delivery, chitin_spec::Delivery::Proxy(scope));
    assert!(
        kept.explain().contains(
            "replaces in headers that carry keys, the header x-key and the body of GET and POST \
             requests to api.example.com:443, at or below /v1/"
        ),
        "{}",
        kept.explain()
    );
    let refused = |secret: &str, words: &str| {
        let error = Policy::parse(&policy(secret), "p.yaml").unwrap_err().to_string();
        assert!(error.starts_with("p.yaml, line 2,") && error.contains(words), "{error}");
    };
    refused(
        "hosts: ['api.example.org:443']",
        "api.example.org:443 is not covered by `allowed_egress`",
    );
    refused("hosts: ['api.example.com:8443']", "is not covered");
    refused("hosts: []", "must not be empty");
    refused("delivery: proxy", "`proxy` needs `hosts`");
    refused("hosts: ['a.example.com:443'], delivery: endpoint", "remove one of the two keys");
    refused("hosts: ['a.example.com:443'], delivery: memory", "remove one of the two keys");
    refused("hosts: ['a.example.com:443'], delivery: env", "remove one of the two keys");
    refused("hosts: ['a.example.com:443'], replaced_in: [path]", "path");
    // An earlier version replaced it in every header.
    refused("hosts: ['a.example.com:443'], replaced_in: [header]", "write `header:NAME`");
    refused("hosts: ['a.example.com:443'], replaced_in: ['header:Host']", "describes the message");
    refused("hosts: ['a.example.com:443'], replaced_in: ['header:a b']", "not the name");
    refused("hosts: ['a.example.com:443'], path_prefix: v1", "begins with /");
    refused("hosts: ['a.example.com:443'], methods: [get]", "in capital letters");
    refused("hosts: ['a.example.com:443'], methods: []", "must not be empty");
    refused("replaced_in: ['header:X-Key']", "needs `hosts`");
    refused("methods: [GET]", "needs `hosts`");
    refused(
        "delivery: endpoint}, {name: B, source: 'env:B', delivery: endpoint",
        "only one secret can use `endpoint`, and A does",
    );
}

#[test]
fn private_memory_is_refused_on_container_tiers() {
    let policy = parse("hardening: {private_memory: true}\nfallback: [nanoclaw]\n");
    assert!(policy.private_memory);
    policy.check_tier(TierKind::Ironclaw).unwrap();
    for tier in [TierKind::Nanoclaw, TierKind::Nemoclaw] {
        let refused = policy.check_tier(tier).unwrap_err();
        assert!(matches!(refused, PolicyError::Refused { field: "hardening.private_memory", .. }));
    }
    let policy = parse("hardening: {private_memory: false}\n");
    assert!(!policy.private_memory);
    policy.check_tier(TierKind::Nemoclaw).unwrap();
}

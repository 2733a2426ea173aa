use chitin_spec::TierKind::{Ironclaw, Nanoclaw, Nemoclaw};

use super::*;

fn tiers_of(builder: Builder) -> Vec<TierKind> {
    builder.validate().unwrap().tiers
}

fn policy(text: &str) -> Policy {
    Policy::parse(text, "p.yaml").unwrap()
}

#[test]
fn tiers_without_policy_are_those_asked_for() {
    assert_eq!(tiers_of(Builder::new()), [Ironclaw]);
    assert_eq!(tiers_of(Builder::new().fallback([Nanoclaw])), [Ironclaw, Nanoclaw]);
    let twice = Builder::new().tier(Nemoclaw).fallback([Nanoclaw, Nemoclaw]);
    assert_eq!(tiers_of(twice), [Nemoclaw, Nanoclaw]);
}

#[test]
fn tiers_under_policy_are_listed_by_it() {
    let text = "runtime: ironclaw\nfallback: [nanoclaw]\nsandbox: {profile: restricted}\n";
    let listed = || Builder::new().policy(policy(text));
    assert_eq!(tiers_of(listed()), [Ironclaw, Nanoclaw]);
    assert_eq!(tiers_of(listed().tier(Nanoclaw)), [Nanoclaw]);
    let error = listed().tier(Nemoclaw).validate().unwrap_err();
    assert!(matches!(error, Error::Policy(PolicyError::Tier { tier: Nemoclaw, .. })), "{error}");
}

#[tokio::test]
async fn pool_and_template_require_a_microvm() {
    let container = || Builder::new().tier(Nanoclaw);
    assert!(matches!(container().pool(1).await, Err(Error::MicrovmRequired)));
    let built = container().build_template("t", &WarmUpSpec::default()).await;
    assert!(matches!(built, Err(Error::MicrovmRequired)));
    let forkable = container().forkable(true).validate().unwrap();
    assert!(matches!(forkable.container_launch_spec(), Err(Error::MicrovmRequired)));
}

#[test]
fn number_beyond_its_field_is_out_of_range() {
    for builder in [Builder::new().vcpus(300), Builder::new().memory_mib(1 << 40)] {
        assert!(matches!(builder.validate(), Err(Error::Spec(_))));
    }
}

#[tokio::test]
async fn template_with_a_credential_is_refused() {
    let builder = Builder::new().secret("TOKEN", SecretSource::Env("TOKEN".into()));
    let built = builder.build_template("t", &WarmUpSpec::default()).await;
    assert!(matches!(built, Err(Error::SecretInTemplate { name }) if name == "TOKEN"));
}

#[test]
fn policy_using_host_is_refused_without_consent() {
    let text = "sandbox: {filesystem: [{access: read-only, path: /data/a, source: /srv/a}]}\n";
    let builder = || Builder::new().policy(policy(text));
    let error = builder().validate().unwrap_err();
    assert!(matches!(error, Error::Policy(PolicyError::Consent { .. })), "{error}");
    for consent in ["file", "file:/srv/a", "all"] {
        assert!(builder().policy_may([consent.parse().unwrap()]).validate().is_ok(), "{consent}");
    }
    let other = builder().policy_may(["file:/srv/b".parse().unwrap()]).validate();
    assert!(matches!(other, Err(Error::Policy(PolicyError::Consent { .. }))));
}

#[test]
fn private_memory_needs_a_microvm() {
    let builder = || Sandbox::builder().private_memory(true);
    let spec = builder().tier(TierKind::Ironclaw).fallback([TierKind::Nanoclaw]).validate();
    let spec = spec.unwrap();
    assert_eq!(spec.tiers, [TierKind::Ironclaw]);
    assert!(spec.vm.private_memory);
    let of_policy = Builder::new().policy(policy("hardening: {private_memory: true}\n"));
    assert!(of_policy.validate().unwrap().vm.private_memory);
    let refused = builder().tier(TierKind::Nanoclaw).validate();
    assert!(matches!(refused, Err(Error::PrivateMemory)));
}

#[test]
fn credentials_have_distinct_names() {
    let source = |name: &str| SecretSource::Env(name.into());
    let builder = || Builder::new().secret("A", source("X")).secret("B", source("X"));
    assert!(builder().validate().is_ok());
    let error = builder().secret("A", source("Y")).validate().unwrap_err();
    assert!(matches!(error, Error::DuplicateCredential { ref name } if name == "A"), "{error}");
}

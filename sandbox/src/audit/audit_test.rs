use super::*;

fn attack(succeeded: bool) -> Attack {
    Attack { tried: "x".into(), succeeded, seen: "y".into() }
}

#[test]
fn one_success_or_no_attack_breaks_a_property() {
    let property = &PROPERTIES[0];
    let verdict = |attacks| judge_property(property, Boundary::Kvm, attacks).verdict;
    assert_eq!(verdict(vec![attack(false), attack(false)]), Verdict::Held);
    assert_eq!(verdict(vec![attack(false), attack(true)]), Verdict::Broken);
    assert_eq!(verdict(vec![]), Verdict::Broken);
    let kernel = PROPERTIES.iter().find(|property| property.name == "host kernel").unwrap();
    let finding = judge_property(kernel, Boundary::Namespaces, vec![]);
    assert_eq!(finding.verdict, Verdict::NotPromised);
}

#[test]
fn each_property_has_a_probe_and_a_unique_name() {
    let mut names: Vec<_> = PROPERTIES.iter().map(|property| property.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), PROPERTIES.len());
    for property in &PROPERTIES {
        assert!(PROBES.contains(&format!("\ndef {}():", property.probe)), "{}", property.probe);
    }
}

/// Successful attacks are detected: without a sandbox most of them succeed.
#[test]
fn probes_succeed_outside_of_a_sandbox() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let context = json!({
        "host_file": file.path(),
        "host_process": "probes",
        "host_listeners": [],
        "host_kernel": rustix::system::uname().release().to_string_lossy(),
    });
    for probe in ["host_files", "host_processes", "host_kernel"] {
        let output = std::process::Command::new("python3")
            .args(["-c", PROBES, probe])
            .env("CHITIN_AUDIT", context.to_string())
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let attacks: Vec<(String, bool, String)> = serde_json::from_str(&text).unwrap();
        assert!(attacks.iter().any(|(_, succeeded, _)| *succeeded), "{probe}: {text}");
    }
}

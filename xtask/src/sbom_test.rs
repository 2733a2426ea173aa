use super::*;

fn strings<'a>(values: &'a Value, key: &str) -> Vec<&'a str> {
    let values = values.as_array().unwrap();
    values.iter().map(|value| value[key].as_str().unwrap()).collect()
}

fn find<'a>(components: &'a Value, name: &str) -> &'a Value {
    let mut components = components.as_array().unwrap().iter();
    components.find(|component| component["name"] == name).unwrap_or_else(|| panic!("no {name}"))
}

#[test]
fn sbom_has_the_shape_of_cyclonedx() {
    let text = render_sbom().unwrap();
    let sbom: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&sbom["bomFormat"], &sbom["specVersion"]), (&"CycloneDX".into(), &"1.6".into()));
    assert_eq!(sbom["version"], 1);
    let serial: Vec<_> = sbom["serialNumber"].as_str().unwrap().split(['-', ':']).collect();
    assert_eq!(serial[..2], ["urn", "uuid"]);
    assert!(serial[2..].iter().map(|part| part.len()).eq([8, 4, 4, 4, 12]));
    let mut references: Vec<_> = strings(&sbom["components"], "bom-ref");
    references.push(sbom["metadata"]["component"]["bom-ref"].as_str().unwrap());
    let known: BTreeSet<_> = references.iter().copied().collect();
    assert_eq!(known.len(), references.len(), "each reference is unique");
    for component in sbom["components"].as_array().unwrap() {
        let purl = component["purl"].as_str().unwrap();
        assert!(["library", "operating-system"].contains(&component["type"].as_str().unwrap()));
        assert!(purl.starts_with("pkg:cargo/") || purl.starts_with("pkg:deb/debian/"), "{purl}");
        for hash in component["hashes"].as_array().into_iter().flatten() {
            let content = hash["content"].as_str().unwrap();
            assert_eq!((&hash["alg"], content.len()), (&"SHA-256".into(), 64), "{purl}");
            assert!(content.bytes().all(|byte| byte.is_ascii_hexdigit()), "{purl}");
        }
        if purl.starts_with("pkg:cargo/") {
            assert!(!component["licenses"][0]["expression"].as_str().unwrap().contains('/'));
        }
    }
    for dependency in sbom["dependencies"].as_array().unwrap() {
        assert!(known.contains(dependency["ref"].as_str().unwrap()), "{dependency}");
        for needed in dependency["dependsOn"].as_array().unwrap() {
            assert!(known.contains(needed.as_str().unwrap()), "{dependency}");
        }
    }
}

#[test]
fn sbom_lists_what_is_shipped_and_no_more() {
    let sbom: Value = serde_json::from_str(&render_sbom().unwrap()).unwrap();
    let components = &sbom["components"];
    let names = strings(components, "name");
    // The library of the TLS proxy, an agent's own crate, the kernel, a package of the image.
    for name in ["rustls", "chitin-agent", "chitin-protocol", "linux", "libc6"] {
        assert!(names.contains(&name), "{name}");
    }
    // Tools, tests and the dependencies of tests only.
    for name in ["xtask", "chitin-integration", "indicatif", "chitin-fuzz"] {
        assert!(!names.contains(&name), "{name}");
    }
    let own = find(components, "chitin-vmm");
    assert!(own.get("hashes").is_none() && own["licenses"][0]["expression"] == "Apache-2.0");
    assert!(find(components, "libc")["hashes"][0]["content"].is_string());
    let (_, pins) = rootfs::read_pins().unwrap();
    let packages = strings(components, "purl");
    let packages = packages.iter().filter(|purl| purl.contains("arch=amd64"));
    assert_eq!(packages.count(), pins.len());
}

#[test]
fn sbom_is_deterministic() {
    let text = render_sbom().unwrap();
    assert_eq!(text, render_sbom().unwrap());
    assert!(!text.contains("timestamp"));
    assert!(!text.contains(workspace::root_dir().to_str().unwrap()));
    assert_ne!(make_serial_number("a"), make_serial_number("b"));
}

#[test]
fn package_url_is_encoded() {
    assert_eq!(encode_purl("1:2.0+b1~deb12"), "1:2.0%2Bb1~deb12");
    assert_eq!(encode_purl("libstdc++6"), "libstdc%2B%2B6");
}

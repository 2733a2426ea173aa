//! `cargo xtask sbom`: the software bill of materials of what is shipped, as CycloneDX JSON.
//!
//! ```text
//!   cargo metadata, Cargo.lock ── crates of the host's binaries and of the image's programs ─┐
//!   kernel source, kernel-config/ ── guest kernel ───────────────────────────────────────────┼─▶ JSON
//!   rootfs/packages.lock ── Debian packages of the root image ───────────────────────────────┘
//! ```
//!
//! The same tree gives the same bytes: there is no time in it, and its serial number is a digest.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::process::{capture_output, new_command};
use crate::rootfs::{self, Pin};
use crate::{kernel, workspace};

/// The packages of the binaries that run on the host.
const HOST_PACKAGES: [&str; 2] = ["chitin-cli", "chitin-vmm"];

/// The platform of every binary. Crates for other platforms are not part of them.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";

const SPEC_VERSION: &str = "1.6";

/// Write the bill of materials of what is shipped, target/sbom.cdx.json
#[derive(Debug, clap::Args)]
pub struct Args {
    /// File to write
    #[arg(long, value_name = "PATH")]
    output: Option<PathBuf>,
}

/// Writes the bill of materials.
pub fn run(args: &Args) -> Result<ExitCode> {
    let output = args.output.clone();
    let output = output.unwrap_or_else(|| workspace::target_dir().join("sbom.cdx.json"));
    fs::write(&output, render_sbom()?).with_context(|| format!("write {}", output.display()))?;
    println!("{}", output.display());
    Ok(ExitCode::SUCCESS)
}

fn render_sbom() -> Result<String> {
    let crates = Crates::read()?;
    let shipped = crates.find_shipped()?;
    let mut components = crates.list_components(&shipped)?;
    let mut dependencies = crates.list_dependencies(&shipped);
    let (release, pins) = rootfs::read_pins()?;
    let packages: Vec<_> = pins.iter().map(|pin| describe_package(pin, &release)).collect();
    let kernel = describe_kernel()?;
    let image = rootfs::PROGRAMS.map(|(package, _)| package);
    let mut parts: BTreeSet<String> =
        crates.roots()?.into_iter().map(|at| crates.refer(at)).collect();
    parts.extend(packages.iter().chain([&kernel]).map(reference_of));
    components.extend(packages);
    components.push(kernel);
    dependencies.push(json!({ "ref": "chitin", "dependsOn": parts }));
    let content = json!({
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": "chitin",
                "name": "chitin",
                "version": crates.version_of("chitin-cli")?,
                "licenses": [{ "expression": "Apache-2.0" }],
            },
            "properties": [
                { "name": "chitin:host-packages", "value": HOST_PACKAGES.join(" ") },
                { "name": "chitin:image-packages", "value": image.join(" ") },
            ],
        },
        "components": components,
        "dependencies": dependencies,
    });
    let mut sbom = json!({
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": make_serial_number(&content.to_string()),
        "version": 1,
    });
    for (key, value) in content.as_object().into_iter().flatten() {
        sbom[key] = value.clone();
    }
    Ok(serde_json::to_string_pretty(&sbom)? + "\n")
}

fn reference_of(component: &Value) -> String {
    component["bom-ref"].as_str().unwrap_or_default().to_owned()
}

/// Returns a UUID of version 8, whose bits are the writer's choice (RFC 9562).
fn make_serial_number(content: &str) -> String {
    let digest = format!("{:x}", Sha256::digest(content));
    let [a, b, c, d, e] =
        [&digest[..8], &digest[8..12], &digest[13..16], &digest[17..20], &digest[20..32]];
    format!("urn:uuid:{a}-{b}-8{c}-8{d}-{e}")
}

/// The part of `cargo metadata` that is used.
#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<CratePackage>,
    resolve: Resolve,
}

#[derive(Debug, Deserialize)]
struct CratePackage {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
struct Node {
    id: String,
    deps: Vec<NodeDependency>,
}

#[derive(Debug, Deserialize)]
struct NodeDependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

#[derive(Debug, Deserialize)]
struct DependencyKind {
    /// `None` for what is linked, otherwise `dev` or `build`.
    kind: Option<String>,
}

/// The part of `Cargo.lock` that is used.
#[derive(Debug, Deserialize)]
struct CargoLock {
    package: Vec<LockedPackage>,
}

#[derive(Debug, Deserialize)]
struct LockedPackage {
    name: String,
    version: String,
    checksum: Option<String>,
}

/// The crates of the workspace and of its dependencies.
struct Crates {
    /// By id.
    packages: BTreeMap<String, CratePackage>,
    /// The ids that each is linked with.
    linked: BTreeMap<String, BTreeSet<String>>,
    /// SHA-256 by name and version.
    checksums: BTreeMap<(String, String), String>,
}

impl Crates {
    fn read() -> Result<Crates> {
        let arguments =
            ["metadata", "--format-version", "1", "--locked", "--filter-platform", PLATFORM];
        let mut cargo = new_command("cargo", arguments);
        let metadata: Metadata =
            serde_json::from_str(&capture_output(cargo.current_dir(workspace::root_dir()))?)?;
        let path = workspace::root_dir().join("Cargo.lock");
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let lock: CargoLock = toml::from_str(&text)?;
        let is_linked = |dependency: &&NodeDependency| {
            dependency.dep_kinds.iter().any(|kind| kind.kind.as_deref() != Some("dev"))
        };
        let links = |node: Node| {
            let linked = node.deps.iter().filter(is_linked);
            (node.id.clone(), linked.map(|dependency| dependency.pkg.clone()).collect())
        };
        let checksum = |package: LockedPackage| {
            package.checksum.map(|checksum| ((package.name, package.version), checksum))
        };
        let packages = metadata.packages.into_iter();
        Ok(Crates {
            packages: packages.map(|package| (package.id.clone(), package)).collect(),
            linked: metadata.resolve.nodes.into_iter().map(links).collect(),
            checksums: lock.package.into_iter().filter_map(checksum).collect(),
        })
    }

    /// Returns a package of the workspace.
    fn find(&self, name: &str) -> Result<&CratePackage> {
        let mut own = self.packages.values().filter(|package| package.source.is_none());
        own.find(|package| package.name == name).with_context(|| format!("no package {name}"))
    }

    fn version_of(&self, name: &str) -> Result<&str> {
        Ok(&self.find(name)?.version)
    }

    /// Returns the ids of the packages whose binaries are shipped.
    fn roots(&self) -> Result<Vec<&str>> {
        let image = rootfs::PROGRAMS.map(|(package, _)| package);
        let names = HOST_PACKAGES.into_iter().chain(image);
        names.map(|name| Ok(self.find(name)?.id.as_str())).collect()
    }

    /// Returns the ids of the roots and of all that they need, linked or to be built. Tests are not
    /// shipped.
    fn find_shipped(&self) -> Result<BTreeSet<&str>> {
        let mut shipped = BTreeSet::new();
        let mut pending = self.roots()?;
        while let Some(id) = pending.pop() {
            if shipped.insert(id) {
                pending.extend(self.linked.get(id).into_iter().flatten().map(String::as_str));
            }
        }
        Ok(shipped)
    }

    /// Returns the reference of a crate, its package URL.
    fn refer(&self, id: &str) -> String {
        self.packages.get(id).map_or_else(String::new, |package| {
            format!("pkg:cargo/{}@{}", package.name, encode_purl(&package.version))
        })
    }

    fn list_components(&self, shipped: &BTreeSet<&str>) -> Result<Vec<Value>> {
        let mut components = Vec::new();
        for id in shipped {
            let package = self.packages.get(*id).with_context(|| format!("no package {id}"))?;
            let CratePackage { name, version, license, source, .. } = package;
            let license = license.as_ref().with_context(|| format!("{name} has no licence"))?;
            let mut component = json!({
                "type": "library",
                "bom-ref": self.refer(id),
                "name": name,
                "version": version,
                "purl": self.refer(id),
                // A slash is an older form of `OR`.
                "licenses": [{ "expression": license.replace('/', " OR ").replace("  ", " ") }],
            });
            if source.is_some() {
                let checksum = self.checksums.get(&(name.clone(), version.clone()));
                let checksum = checksum.with_context(|| format!("no checksum of {name}"))?;
                component["hashes"] = json!([{ "alg": "SHA-256", "content": checksum }]);
            }
            components.push(component);
        }
        Ok(components)
    }

    fn list_dependencies(&self, shipped: &BTreeSet<&str>) -> Vec<Value> {
        let needs = |id: &str| -> BTreeSet<String> {
            let linked = self.linked.get(id).into_iter().flatten();
            linked.map(|other| self.refer(other)).collect()
        };
        let entries = shipped.iter();
        entries.map(|id| json!({ "ref": self.refer(id), "dependsOn": needs(id) })).collect()
    }
}

fn describe_package(pin: &Pin, release: &str) -> Value {
    let Pin { name, version, sha256 } = pin;
    let purl = format!(
        "pkg:deb/debian/{}@{}?arch=amd64&distro={}",
        encode_purl(name),
        encode_purl(version),
        encode_purl(release),
    );
    json!({
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
        "hashes": [{ "alg": "SHA-256", "content": sha256 }],
    })
}

/// Describes the guest kernel by its source, its configuration and its patches.
fn describe_kernel() -> Result<Value> {
    let mut files = workspace::list_patches("kernel-config/patches")?;
    let dir = workspace::root_dir().join("kernel-config");
    for entry in fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
        files.push(entry?.path());
    }
    files.retain(|path| path.is_file());
    files.sort();
    let mut properties = Vec::new();
    for path in files {
        let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let name = path.strip_prefix(workspace::root_dir()).unwrap_or(&path).display().to_string();
        let value = format!("SHA-256 {:x}", Sha256::digest(content));
        properties.push(json!({ "name": format!("chitin:{name}"), "value": value }));
    }
    let version = kernel::SOURCE_VERSION;
    let purl = format!("pkg:deb/debian/{}@{}?arch=all", kernel::SOURCE, encode_purl(version));
    Ok(json!({
        "type": "operating-system",
        "bom-ref": purl,
        "name": "linux",
        "version": version,
        "purl": purl,
        "licenses": [{ "expression": "GPL-2.0-only WITH Linux-syscall-note" }],
        "properties": properties,
    }))
}

/// Encodes a part of a package URL: only letters, digits, `.`, `-`, `_`, `~` and `:` stay.
fn encode_purl(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'-' | b'_' | b'~' | b':' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}

#[cfg(test)]
#[path = "sbom_test.rs"]
mod tests;

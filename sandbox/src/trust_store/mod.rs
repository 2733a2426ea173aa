//! Makes the programs of one sandbox trust the CA of its proxy.

mod jks;

use std::fs::{self, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use chitin_broker::proxy::Proxy;
use chitin_vmm::HostError;
use rustix::io::Errno;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::copy::{copy_in, copy_out};
use crate::error::Error;
use crate::session::Session;
use jks::encode_keystore;

/// The CA bundle of Debian and its derivatives. OpenSSL, Go and curl read it.
const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// The largest bundle that is read: ten times the size of Debian's.
const MAX_BUNDLE: u64 = 4 * 1024 * 1024;

/// Java's CA keystore on Debian.
const KEYSTORE: &str = "/etc/ssl/certs/java/cacerts";

/// Variables for programs that bring a CA list and ignore the system's.
const VARIABLES: [&str; 10] = [
    // OpenSSL and Python's ssl; Go; rustls if it uses the system's list.
    "SSL_CERT_FILE",
    // Python's requests and packages built on it; pip.
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "CURL_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
    "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO",
    "DENO_CERT",
    // gRPC.
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
];

/// Options that every JVM reads. It reports them on standard error.
const JAVA_OPTIONS: &str = "JAVA_TOOL_OPTIONS";

/// The paths of the bundle and the keystore in a sandbox.
struct TrustStorePaths {
    bundle: &'static str,
    keystore: &'static str,
    java_options: &'static str,
}

/// Paths that no workload can write to.
const SYSTEM: TrustStorePaths = TrustStorePaths {
    bundle: BUNDLE,
    keystore: KEYSTORE,
    java_options: "-Djavax.net.ssl.trustStore=/etc/ssl/certs/java/cacerts",
};

/// Paths for sandboxes whose root is read-only for the agent as well, such as containers. A
/// workload that changes these files deceives only itself.
const SCRATCH: TrustStorePaths = TrustStorePaths {
    bundle: "/tmp/.chitin/ca-certificates.crt",
    keystore: "/tmp/.chitin/cacerts",
    java_options: "-Djavax.net.ssl.trustStore=/tmp/.chitin/cacerts",
};

/// Adds the CA of the proxy to the sandbox's CA files, and points every command at them.
pub(crate) async fn install_ca(session: &Session, proxy: &Proxy) -> Result<(), Error> {
    let failed = HostError::during("add the CA to the sandbox's CA files");
    let dir = tempfile::tempdir().map_err(failed)?;
    let mut bundle = copy_bundle_out(session, &dir.path().join("bundle"), failed).await?;
    if !bundle.is_empty() && !bundle.ends_with(b"\n") {
        bundle.push(b'\n');
    }
    bundle.extend_from_slice(proxy.certificate().as_bytes());
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&bundle).flatten().collect();
    let (joined, keystore) = (dir.path().join("joined"), dir.path().join("keystore"));
    for (path, content) in [(&joined, &bundle), (&keystore, &encode_keystore(&certificates))] {
        fs::write(path, content).map_err(failed)?;
        fs::set_permissions(path, Permissions::from_mode(0o444)).map_err(failed)?;
    }
    let paths = match copy_in(session, &joined, Path::new(SYSTEM.bundle)).await {
        Ok(_) => SYSTEM,
        Err(Error::Guest(failure)) if failure.errno == Errno::ROFS.raw_os_error() => {
            copy_in(session, &joined, Path::new(SCRATCH.bundle)).await?;
            SCRATCH
        }
        Err(error) => return Err(error),
    };
    copy_in(session, &keystore, Path::new(paths.keystore)).await?;
    let bundle_variables = VARIABLES.map(|name| (name, paths.bundle));
    let variables = bundle_variables.into_iter().chain([(JAVA_OPTIONS, paths.java_options)]);
    // Set once: a second call for the same sandbox would set the same.
    let _ = session.extra_environment.set(variables.collect());
    Ok(())
}

/// Copies the image's CA bundle out and reads it. Empty if the image has none.
async fn copy_bundle_out(
    session: &Session,
    target: &Path,
    failed: impl Fn(io::Error) -> HostError,
) -> Result<Vec<u8>, Error> {
    match copy_out(session, Path::new(BUNDLE), target).await {
        Ok(_) => Ok(read_bundle(target).map_err(failed)?),
        Err(Error::Guest(failure)) if failure.errno == Errno::NOENT.raw_os_error() => {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

fn read_bundle(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_BUNDLE + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > MAX_BUNDLE {
        true => Err(io::Error::other("the image's CA bundle is larger than 4 MiB")),
        false => Ok(bytes),
    }
}

//! Has programs in a sandbox trust its authority, and nobody outside of it.

mod jks;

use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use chitin_broker::proxy::Proxy;
use rustix::io::Errno;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::session::Session;
use crate::{Error, copy};

/// Where Debian and its relatives keep all certificates that are trusted; OpenSSL, Go and curl look there.
const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Ten times what there is.
const MAX_BUNDLE: u64 = 4 * 1024 * 1024;

/// Beside it, the same for Java, where Debian's looks for it.
const KEYSTORE: &str = "/etc/ssl/certs/java/cacerts";

/// For programs that bring their own list of authorities, and would not look there.
const VARIABLES: [&str; 10] = [
    // OpenSSL, and with it Python's ssl; Go; rustls where it asks the system.
    "SSL_CERT_FILE",
    // Python's requests and what is built on it; pip.
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

/// Every JVM reads it, and says so on standard error.
const JAVA: &str = "JAVA_TOOL_OPTIONS";

/// Where the two lie.
struct Place {
    bundle: &'static str,
    keystore: &'static str,
    java: &'static str,
}

/// Where no workload can write.
const SYSTEM: Place = Place {
    bundle: BUNDLE,
    keystore: KEYSTORE,
    java: "-Djavax.net.ssl.trustStore=/etc/ssl/certs/java/cacerts",
};

/// Where the root is read-only for everybody, as in containers. A workload that changes it fools itself.
const SCRATCH: Place = Place {
    bundle: "/tmp/.chitin/ca-certificates.crt",
    keystore: "/tmp/.chitin/cacerts",
    java: "-Djavax.net.ssl.trustStore=/tmp/.chitin/cacerts",
};

/// Adds the authority to what the sandbox's programs trust, and has every command use it.
pub(crate) async fn trust(session: &Session, proxy: &Proxy) -> Result<(), Error> {
    let failed =
        |source| Error::Host { what: "add the sandbox's authority to its certificates", source };
    let dir = tempfile::tempdir().map_err(failed)?;
    let path = dir.path().join("bundle");
    let mut bundle = match copy::copy_out(session, Path::new(BUNDLE), &path).await {
        Ok(_) => read(&path).map_err(failed)?,
        // An image may have none.
        Err(Error::Guest(failure)) if failure.errno == Errno::NOENT.raw_os_error() => Vec::new(),
        Err(error) => return Err(error),
    };
    if !bundle.is_empty() && !bundle.ends_with(b"\n") {
        bundle.push(b'\n');
    }
    bundle.extend_from_slice(proxy.certificate().as_bytes());
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&bundle).flatten().collect();
    let (joined, keystore) = (dir.path().join("joined"), dir.path().join("keystore"));
    for (path, content) in [(&joined, &bundle), (&keystore, &jks::keystore(&certificates))] {
        fs::write(path, content).map_err(failed)?;
        fs::set_permissions(path, Permissions::from_mode(0o444)).map_err(failed)?;
    }
    let place = match copy::copy_in(session, &joined, Path::new(SYSTEM.bundle)).await {
        Ok(_) => SYSTEM,
        Err(Error::Guest(failure)) if failure.errno == Errno::ROFS.raw_os_error() => {
            copy::copy_in(session, &joined, Path::new(SCRATCH.bundle)).await?;
            SCRATCH
        }
        Err(error) => return Err(error),
    };
    copy::copy_in(session, &keystore, Path::new(place.keystore)).await?;
    let variables =
        VARIABLES.map(|name| (name, place.bundle)).into_iter().chain([(JAVA, place.java)]);
    // A second time, for a sandbox that is the same, changes nothing.
    let _ = session.environment.set(variables.collect());
    Ok(())
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_BUNDLE + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > MAX_BUNDLE {
        true => Err(std::io::Error::other("the image's bundle of certificates is over 4 MiB")),
        false => Ok(bytes),
    }
}

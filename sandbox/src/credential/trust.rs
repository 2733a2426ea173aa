//! Has programs in a sandbox trust its authority, and nobody outside of it.

use std::fs;
use std::io::Read;
use std::path::Path;

use super::proxy::Proxy;
use crate::inner::Inner;
use crate::{Error, copy};

/// Where Debian and its relatives keep all certificates that are trusted; OpenSSL, Go and curl look there.
const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Ten times what there is.
const MAX_BUNDLE: u64 = 4 * 1024 * 1024;

/// For programs that bring their own list of authorities, and would not look there.
const VARIABLES: [(&str, &str); 10] = [
    // OpenSSL, and with it Python's ssl; Go; rustls where it asks the system.
    ("SSL_CERT_FILE", BUNDLE),
    // Python's requests and what is built on it; pip.
    ("REQUESTS_CA_BUNDLE", BUNDLE),
    ("PIP_CERT", BUNDLE),
    ("CURL_CA_BUNDLE", BUNDLE),
    ("NODE_EXTRA_CA_CERTS", BUNDLE),
    ("GIT_SSL_CAINFO", BUNDLE),
    ("AWS_CA_BUNDLE", BUNDLE),
    ("CARGO_HTTP_CAINFO", BUNDLE),
    ("DENO_CERT", BUNDLE),
    // gRPC.
    ("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", BUNDLE),
];

/// Adds the authority to the sandbox's bundle, which lies where no workload can write, and has every command use it.
pub(crate) async fn trust(inner: &Inner, proxy: &Proxy) -> Result<(), Error> {
    let failed = |source| Error::Host { what: "add the sandbox's authority to its certificates", source };
    let dir = tempfile::tempdir().map_err(failed)?;
    let path = dir.path().join("bundle");
    let mut bundle = match copy::copy_out(inner, Path::new(BUNDLE), &path).await {
        Ok(_) => read(&path).map_err(failed)?,
        // An image may have none.
        Err(Error::Guest(failure)) if failure.errno == rustix::io::Errno::NOENT.raw_os_error() => Vec::new(),
        Err(error) => return Err(error),
    };
    if !bundle.is_empty() && !bundle.ends_with(b"\n") {
        bundle.push(b'\n');
    }
    bundle.extend_from_slice(proxy.certificate().as_bytes());
    let joined = dir.path().join("joined");
    fs::write(&joined, bundle).map_err(failed)?;
    fs::set_permissions(&joined, std::os::unix::fs::PermissionsExt::from_mode(0o444)).map_err(failed)?;
    copy::copy_in(inner, &joined, Path::new(BUNDLE)).await?;
    // A second time, for a sandbox that is the same, changes nothing.
    let _ = inner.environment.set(VARIABLES.into());
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

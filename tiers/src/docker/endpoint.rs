//! The address of the daemon, found as Docker's own client finds it: `DOCKER_HOST`, then the context
//! of `DOCKER_CONTEXT` or of `docker context use`, then the first existing socket.
//!
//! An address that cannot be used as it is meant is an error. In particular, no connection is made
//! in plain text where TLS was asked for, and none to another host at all: over it go the
//! credentials of the sandbox, and whoever changes it is root on that host.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

/// Permits a connection in plain text to another host.
pub(super) const PLAINTEXT: &str = "CHITIN_DOCKER_PLAINTEXT";

/// Maximum bytes of a file of Docker's client.
const MAX_CONFIG: u64 = 1 << 20;

/// The address of a daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum DaemonEndpoint {
    /// A Unix socket.
    Socket(PathBuf),
    /// `HOST:PORT`, in plain text.
    Plaintext(String),
    /// `HOST:PORT`, over TLS.
    Tls(String, TlsFiles),
}

/// The directory of `ca.pem`, `cert.pem` and `key.pem`. Without a directory, the certificate
/// authorities of this host are trusted, and the client has no certificate.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct TlsFiles(pub Option<PathBuf>);

/// The reason why an address is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum EndpointError {
    #[error("{0}: Chitin does not run ssh")]
    Ssh(String),
    #[error("{0} is an address for a daemon, and not for its clients")]
    Fd(String),
    #[error("{0} is a named pipe of Windows")]
    NamedPipe(String),
    #[error("{0}: unknown kind of address")]
    UnknownScheme(String),
    #[error("{0}: not HOST:PORT")]
    Authority(String),
    #[error("{0}: the daemon of another host would be used in plain text")]
    Plaintext(String),
    #[error("{0}: TLS without verification of the daemon is not supported")]
    Unverified(String),
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: not a file of Docker's client", path.display())]
    Config { path: PathBuf, source: serde_json::Error },
    #[error("the Docker context {0} does not exist")]
    NoContext(String),
    #[error("the Docker context {0} has no endpoint of a Docker daemon")]
    NoEndpoint(String),
}

impl EndpointError {
    /// Returns the remedy.
    pub fn remedy(&self) -> String {
        match self {
            EndpointError::Ssh(_) => "forward the socket, for example with `ssh -NL \
                                      /run/user/1000/remote.sock:/run/docker.sock HOST`, and set \
                                      DOCKER_HOST=unix:///run/user/1000/remote.sock"
                .into(),
            EndpointError::Fd(_)
            | EndpointError::NamedPipe(_)
            | EndpointError::UnknownScheme(_)
            | EndpointError::Authority(_) => {
                "set DOCKER_HOST to unix:///PATH, to tcp://127.0.0.1:PORT, or to tcp://HOST:PORT \
                 with DOCKER_TLS_VERIFY=1"
                    .into()
            }
            EndpointError::Plaintext(_) => format!(
                "set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH; {PLAINTEXT}=1 permits plain text \
                 on a network that you trust"
            ),
            EndpointError::Unverified(_) => {
                "set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH, or create the context without \
                 skip-tls-verify"
                    .into()
            }
            EndpointError::Read { .. } | EndpointError::Config { .. } => {
                "repair the file, or set DOCKER_HOST".into()
            }
            EndpointError::NoContext(_) | EndpointError::NoEndpoint(_) => {
                "`docker context ls` lists the contexts; DOCKER_HOST overrides them".into()
            }
        }
    }
}

impl fmt::Display for DaemonEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DaemonEndpoint::Socket(path) => write!(f, "unix://{}", path.display()),
            DaemonEndpoint::Plaintext(authority) => write!(f, "tcp://{authority}"),
            DaemonEndpoint::Tls(authority, _) => write!(f, "https://{authority}"),
        }
    }
}

/// The variables of the environment that select a daemon.
#[derive(Debug, Clone, Default)]
pub(super) struct ClientEnvironment {
    /// `DOCKER_HOST`.
    pub host: Option<String>,
    /// `DOCKER_CONTEXT`.
    pub context: Option<String>,
    /// `DOCKER_TLS_VERIFY` is set to anything.
    pub tls_verify: bool,
    /// `DOCKER_TLS` is set to anything: TLS without verification.
    pub tls: bool,
    /// `DOCKER_CERT_PATH`.
    pub cert_path: Option<PathBuf>,
    /// `DOCKER_CONFIG`, or `~/.docker`.
    pub config_dir: Option<PathBuf>,
    /// `XDG_RUNTIME_DIR`.
    pub runtime_dir: Option<PathBuf>,
    /// [`PLAINTEXT`] is `1`.
    pub plaintext: bool,
}

impl ClientEnvironment {
    /// Returns that of this process. As in Docker's client, an empty variable is none.
    pub fn of_process() -> ClientEnvironment {
        let text = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let path = |name: &str| {
            std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
        };
        ClientEnvironment {
            host: text("DOCKER_HOST"),
            context: text("DOCKER_CONTEXT"),
            tls_verify: text("DOCKER_TLS_VERIFY").is_some(),
            tls: text("DOCKER_TLS").is_some(),
            cert_path: path("DOCKER_CERT_PATH"),
            config_dir: path("DOCKER_CONFIG").or_else(|| Some(path("HOME")?.join(".docker"))),
            runtime_dir: path("XDG_RUNTIME_DIR"),
            plaintext: text(PLAINTEXT).as_deref() == Some("1"),
        }
    }

    /// Returns the address of the daemon.
    pub fn find_daemon(&self) -> Result<DaemonEndpoint, EndpointError> {
        if let Some(host) = &self.host {
            return self.parse_host(host, &self.tls_of_environment());
        }
        match self.selected_context()? {
            Some(context) => self.read_context(&context),
            None => Ok(DaemonEndpoint::Socket(self.find_socket())),
        }
    }

    fn tls_of_environment(&self) -> TlsRequest {
        let files = match (&self.cert_path, &self.config_dir) {
            (Some(path), _) => TlsFiles(Some(path.clone())),
            (None, Some(dir)) if self.tls_verify && dir.join("ca.pem").exists() => {
                TlsFiles(Some(dir.clone()))
            }
            (None, _) => TlsFiles(None),
        };
        match (self.tls_verify, self.tls) {
            (true, _) => TlsRequest::Verified(files),
            (false, true) => TlsRequest::Unverified,
            (false, false) => TlsRequest::None(files),
        }
    }

    /// Returns the first existing socket, or the usual one.
    fn find_socket(&self) -> PathBuf {
        let runtime_dir = self.runtime_dir.clone().unwrap_or_default();
        let sockets = [
            PathBuf::from("/run/docker.sock"),
            PathBuf::from("/var/run/docker.sock"),
            runtime_dir.join("docker.sock"),
            runtime_dir.join("podman/podman.sock"),
            PathBuf::from("/run/podman/podman.sock"),
        ];
        let found = sockets.iter().find(|path| path.is_absolute() && path.exists());
        found.unwrap_or(&sockets[1]).clone()
    }

    fn selected_context(&self) -> Result<Option<String>, EndpointError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Config {
            #[serde(default)]
            current_context: String,
        }
        let context = match (&self.context, &self.config_dir) {
            (Some(context), _) => context.clone(),
            (None, Some(dir)) => match read_json::<Config>(&dir.join("config.json"))? {
                Some(config) => config.current_context,
                None => return Ok(None),
            },
            (None, None) => return Ok(None),
        };
        // This name means the usual address.
        Ok(Some(context).filter(|context| !context.is_empty() && context != "default"))
    }

    fn read_context(&self, name: &str) -> Result<DaemonEndpoint, EndpointError> {
        #[derive(Deserialize)]
        struct Meta {
            #[serde(rename = "Endpoints")]
            endpoints: Endpoints,
        }
        #[derive(Deserialize)]
        struct Endpoints {
            docker: Option<Endpoint>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Endpoint {
            #[serde(default)]
            host: String,
            #[serde(default, rename = "SkipTLSVerify")]
            skip_tls_verify: bool,
        }
        let missing = || EndpointError::NoContext(name.into());
        let contexts = self.config_dir.as_ref().ok_or_else(missing)?.join("contexts");
        let id = format!("{:x}", Sha256::digest(name));
        let meta = contexts.join("meta").join(&id).join("meta.json");
        let meta = read_json::<Meta>(&meta)?.ok_or_else(missing)?;
        let endpoint = meta.endpoints.docker.filter(|endpoint| !endpoint.host.is_empty());
        let endpoint = endpoint.ok_or_else(|| EndpointError::NoEndpoint(name.into()))?;
        let files = contexts.join("tls").join(&id).join("docker");
        let tls = match (endpoint.skip_tls_verify, files.is_dir()) {
            (true, _) => TlsRequest::Unverified,
            (false, true) => TlsRequest::Verified(TlsFiles(Some(files))),
            (false, false) => TlsRequest::None(TlsFiles(None)),
        };
        self.parse_host(&endpoint.host, &tls)
    }

    fn parse_host(&self, host: &str, tls: &TlsRequest) -> Result<DaemonEndpoint, EndpointError> {
        let text = || host.to_owned();
        if host.starts_with('/') {
            return Ok(DaemonEndpoint::Socket(host.into()));
        }
        let (scheme, rest) =
            host.split_once("://").ok_or_else(|| EndpointError::UnknownScheme(text()))?;
        match (scheme, tls) {
            ("unix", _) if rest.starts_with('/') => Ok(DaemonEndpoint::Socket(rest.into())),
            ("ssh", _) => Err(EndpointError::Ssh(text())),
            ("fd", _) => Err(EndpointError::Fd(text())),
            ("npipe", _) => Err(EndpointError::NamedPipe(text())),
            ("tcp" | "https", TlsRequest::Unverified) => Err(EndpointError::Unverified(text())),
            ("tcp" | "https", TlsRequest::Verified(files)) | ("https", TlsRequest::None(files)) => {
                Ok(DaemonEndpoint::Tls(parse_authority(host, rest, 2376)?, files.clone()))
            }
            ("http", TlsRequest::Verified(_) | TlsRequest::Unverified) => {
                Err(EndpointError::Plaintext(text()))
            }
            ("tcp" | "http", _) => {
                let authority = parse_authority(host, rest, 2375)?;
                match self.plaintext || is_loopback(&authority) {
                    true => Ok(DaemonEndpoint::Plaintext(authority)),
                    false => Err(EndpointError::Plaintext(text())),
                }
            }
            _ => Err(EndpointError::UnknownScheme(text())),
        }
    }
}

/// The protection that was asked for, for an address that does not tell.
enum TlsRequest {
    Verified(TlsFiles),
    Unverified,
    /// None, with the files for an address that does tell.
    None(TlsFiles),
}

/// Returns `HOST:PORT`, with the default port if there is none.
fn parse_authority(address: &str, rest: &str, port: u16) -> Result<String, EndpointError> {
    let failed = || EndpointError::Authority(address.into());
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match rest.rsplit_once(':') {
        Some((host, digits)) if !digits.contains(']') => {
            (host, digits.parse::<u16>().map_err(|_| failed())?)
        }
        _ => (rest, port),
    };
    let is_name = |name: &str| {
        !name.is_empty()
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
    };
    let is_v6 = || {
        let inner = host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']'));
        inner.is_some_and(|inner| inner.parse::<std::net::Ipv6Addr>().is_ok())
    };
    if port == 0 || !(is_name(host) || is_v6()) {
        return Err(failed());
    }
    Ok(format!("{host}:{port}"))
}

/// Returns true if the address of the host is loopback, or its name says so.
fn is_loopback(authority: &str) -> bool {
    let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Reads a file of Docker's client; `None` if it does not exist.
fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, EndpointError> {
    use std::io::Read;
    let failed = |source| EndpointError::Read { path: path.into(), source };
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    let mut text = Vec::new();
    file.take(MAX_CONFIG).read_to_end(&mut text).map_err(failed)?;
    let parsed = serde_json::from_slice(&text);
    parsed.map(Some).map_err(|source| EndpointError::Config { path: path.into(), source })
}

#[cfg(test)]
#[path = "endpoint_test.rs"]
mod tests;

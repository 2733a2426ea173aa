use std::fs;

use super::*;

fn find(host: &str, set: impl FnOnce(&mut ClientEnvironment)) -> Result<DaemonEndpoint, String> {
    let mut environment =
        ClientEnvironment { host: Some(host.into()), ..ClientEnvironment::default() };
    set(&mut environment);
    environment.find_daemon().map_err(|error| {
        let variant = format!("{error:?}");
        variant.split(['(', ' ']).next().unwrap_or_default().to_owned()
    })
}

#[test]
fn every_form_of_docker_host_is_used_or_refused() {
    let plain = |authority: &str| Ok(DaemonEndpoint::Plaintext(authority.into()));
    let refused = |variant: &str| Err(variant.to_owned());
    let socket = |path: &str| Ok(DaemonEndpoint::Socket(path.into()));
    let tls = |authority: &str| Ok(DaemonEndpoint::Tls(authority.into(), TlsFiles(None)));
    for (host, expected) in [
        ("unix:///run/a.sock", socket("/run/a.sock")),
        ("/run/a.sock", socket("/run/a.sock")),
        ("unix://run/a.sock", refused("UnknownScheme")),
        ("tcp://127.0.0.1:2375", plain("127.0.0.1:2375")),
        ("tcp://127.9.9.9", plain("127.9.9.9:2375")),
        ("tcp://localhost:99/", plain("localhost:99")),
        ("tcp://[::1]:99", plain("[::1]:99")),
        ("tcp://[::1]", plain("[::1]:2375")),
        ("http://127.0.0.1:1", plain("127.0.0.1:1")),
        ("tcp://build.example:2375", refused("Plaintext")),
        ("tcp://10.0.0.1:2375", refused("Plaintext")),
        ("http://build.example", refused("Plaintext")),
        ("tcp://127.0.0.1.example:2375", refused("Plaintext")),
        ("https://build.example", tls("build.example:2376")),
        ("https://127.0.0.1:9", tls("127.0.0.1:9")),
        ("ssh://me@build.example", refused("Ssh")),
        ("fd://", refused("Fd")),
        ("npipe:////./pipe/docker_engine", refused("NamedPipe")),
        ("ftp://a", refused("UnknownScheme")),
        ("build.example:2375", refused("UnknownScheme")),
        ("tcp://", refused("Authority")),
        ("tcp://a:99999", refused("Authority")),
        ("tcp://a:0", refused("Authority")),
        ("tcp://me@127.0.0.1:1", refused("Authority")),
        ("tcp://127.0.0.1:1/base", refused("Authority")),
    ] {
        assert_eq!(find(host, |_| {}), expected, "{host}");
    }
}

#[test]
fn requested_tls_is_never_dropped() {
    let verify = |host: &str| find(host, |environment| environment.tls_verify = true);
    let tls = |authority: &str| Ok(DaemonEndpoint::Tls(authority.into(), TlsFiles(None)));
    assert_eq!(verify("tcp://127.0.0.1:1"), tls("127.0.0.1:1"));
    assert_eq!(verify("tcp://build.example"), tls("build.example:2376"));
    assert_eq!(verify("http://127.0.0.1:1"), Err("Plaintext".into()));
    let unverified = |host: &str| find(host, |environment| environment.tls = true);
    assert_eq!(unverified("tcp://127.0.0.1:1"), Err("Unverified".into()));
    assert_eq!(unverified("https://build.example"), Err("Unverified".into()));
    let files = TlsFiles(Some("/certs".into()));
    let with_path = |environment: &mut ClientEnvironment| {
        environment.tls_verify = true;
        environment.cert_path = Some("/certs".into());
    };
    assert_eq!(find("tcp://a:1", with_path), Ok(DaemonEndpoint::Tls("a:1".into(), files)));
    let permitted = find("tcp://build.example:1", |environment| environment.plaintext = true);
    assert_eq!(permitted, Ok(DaemonEndpoint::Plaintext("build.example:1".into())));
}

/// Writes a context as `docker context create` does.
fn write_context(config: &Path, name: &str, meta: &str) -> PathBuf {
    let id = format!("{:x}", Sha256::digest(name));
    let dir = config.join("contexts/meta").join(&id);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("meta.json"), meta).unwrap();
    config.join("contexts/tls").join(id).join("docker")
}

#[test]
fn contexts_of_the_docker_client_are_honoured() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path();
    let local = r#"{"Name":"l","Endpoints":{"docker":{"Host":"unix:///run/l.sock"}}}"#;
    write_context(config, "local", local);
    let remote =
        r#"{"Name":"r","Endpoints":{"docker":{"Host":"tcp://r:1","SkipTLSVerify":false}}}"#;
    let files = write_context(config, "remote", remote);
    fs::create_dir_all(&files).unwrap();
    write_context(config, "plain", &remote.replace("\"r\"", "\"p\""));
    write_context(config, "unverified", &remote.replace("false", "true"));
    write_context(config, "none", r#"{"Name":"n","Endpoints":{}}"#);
    write_context(config, "damaged", "{");
    let find = |context: &str| {
        let context = Some(context.to_owned());
        let config_dir = Some(config.to_owned());
        ClientEnvironment { context, config_dir, ..ClientEnvironment::default() }.find_daemon()
    };
    let socket = DaemonEndpoint::Socket("/run/l.sock".into());
    assert_eq!(find("local").unwrap(), socket);
    let tls = DaemonEndpoint::Tls("r:1".into(), TlsFiles(Some(files)));
    assert_eq!(find("remote").unwrap(), tls);
    assert!(matches!(find("plain"), Err(EndpointError::Plaintext(_))));
    assert!(matches!(find("unverified"), Err(EndpointError::Unverified(_))));
    assert!(matches!(find("none"), Err(EndpointError::NoEndpoint(_))));
    assert!(matches!(find("damaged"), Err(EndpointError::Config { .. })));
    assert!(matches!(find("missing"), Err(EndpointError::NoContext(_))));
    assert!(matches!(find("default"), Ok(DaemonEndpoint::Socket(_))));

    fs::write(config.join("config.json"), r#"{"auths":{},"currentContext":"local"}"#).unwrap();
    let environment =
        ClientEnvironment { config_dir: Some(config.to_owned()), ..ClientEnvironment::default() };
    assert_eq!(environment.find_daemon().unwrap(), socket);
    let host = Some("unix:///run/h.sock".into());
    let overridden = ClientEnvironment { host, ..environment }.find_daemon().unwrap();
    assert_eq!(overridden, DaemonEndpoint::Socket("/run/h.sock".into()));
}

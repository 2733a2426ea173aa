//! The default image at work: virtual environments, clones and packages, from servers on the
//! loopback interface of this host.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chitin_integration::{TierUnderTest, on_every_tier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::start_server;

on_every_tier!(
    virtual_environment_needs_no_network,
    git_clones_through_allowed_endpoint,
    pip_installs_through_allowed_endpoint,
    allowed_name_resolves_with_address_configuration,
);

/// Returns the certificate for `localhost` and its key. The key serves tests only.
fn localhost_pem() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/egress/localhost.pem")
}

/// Serves the files of a directory by HTTPS, and returns the port.
fn serve_directory(directory: &Path) -> u16 {
    let pem = fs::read(localhost_pem()).unwrap();
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem).flatten().collect();
    let key = PrivateKeyDer::from_pem_slice(&pem).unwrap();
    let config = ServerConfig::builder().with_no_client_auth();
    let config = Arc::new(config.with_single_cert(certificates, key).unwrap());
    let directory = directory.to_owned();
    start_server(move |stream| {
        let connection = ServerConnection::new(config.clone()).unwrap();
        // A client that gives up is its own test's failure.
        let _ = serve_file(StreamOwned::new(connection, stream), &directory);
    })
}

/// Answers one request with a file, the index of a directory, or 404.
fn serve_file(
    stream: StreamOwned<ServerConnection, TcpStream>,
    directory: &Path,
) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut request = String::new();
    stream.read_line(&mut request)?;
    let mut header = String::new();
    while stream.read_line(&mut header)? > 2 {
        header.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or("/").split('?').next().unwrap_or("/");
    let mut file = directory.join(path.trim_start_matches('/'));
    if file.is_dir() {
        file = file.join("index.html");
    }
    let (status, body) = match fs::read(&file) {
        Ok(body) => ("200 OK", body),
        Err(_) => ("404 Not Found", Vec::new()),
    };
    let kind = if file.extension() == Some("html".as_ref()) { "text/html" } else { "text/plain" };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n"
    );
    let stream = stream.get_mut();
    stream.write_all(head.as_bytes())?;
    stream.write_all(&body)?;
    stream.conn.send_close_notify();
    stream.flush()
}

fn virtual_environment_needs_no_network(tier: TierUnderTest) {
    let script = "python3 -m venv /work/v && /work/v/bin/pip --version && . /work/v/bin/activate && \
                  python -c 'import sys; print(sys.prefix)'";
    let outcome = tier.run_sh(script).outcome();
    let text = outcome.assert_success();
    assert!(text.starts_with("pip ") && text.ends_with("\n/work/v"), "{text}");
    assert!(text.contains("/work/v/lib/python3.11/"), "{text}");
}

/// Runs a script with the certificate at `/work/ca.pem` and this port of `localhost` allowed.
fn run_with_server(tier: TierUnderTest, port: u16, script: &str) -> String {
    let options = format!("--allow-private --allow localhost:{port}");
    let outcome = tier
        .run_with(&options)
        .arg(format!("--copy-in={}:/work/ca.pem", localhost_pem().display()))
        .args(["--", "sh", "-ec", script])
        .outcome();
    outcome.assert_success().to_owned()
}

fn git_clones_through_allowed_endpoint(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    let script = "git init -q -b main source && cd source && echo content > file && git add file && \
                  git -c user.name=a -c user.email=a@b.c commit -q -m first && cd .. && \
                  git clone -q --bare source repo.git && git -C repo.git update-server-info";
    // In a sandbox as well, so that this host needs no git.
    let outcome = tier
        .run_with("--copy-out")
        .arg(format!("/work/repo.git:{}", dir.path().join("repo.git").display()))
        .args(["--", "sh", "-ec", script])
        .outcome();
    outcome.assert_success();
    let port = serve_directory(dir.path());
    let script = format!(
        "git -c http.sslCAInfo=/work/ca.pem clone -q https://localhost:{port}/repo.git copy
cat copy/file; cd copy; git log --format=%s; echo more >> file
git config user.name a; git config user.email a@b.c; git commit -qam second; git log --oneline | wc -l
git config --get remote.origin.url
git -c http.sslCAInfo=/work/ca.pem fetch && GIT_SSL_CAINFO=/work/ca.pem git fetch && ! git fetch 2>&1"
    );
    let text = run_with_server(tier, port, &script);
    let lines: Vec<&str> = text.lines().collect();
    let url = format!("https://localhost:{port}/repo.git");
    assert_eq!(lines[..4], ["content", "first", "2", url.as_str()]);
    // The certificate is not trusted without the option.
    assert!(lines[4].contains("certificate"), "{text}");
}

/// Writes a package of one module as a wheel (PEP 427) and its index (PEP 503).
fn write_package_index(tier: TierUnderTest, directory: &Path) {
    let script = "
import sys, zipfile, hashlib, os
name = 'tiny_greeting-1.0-py3-none-any.whl'
files = {
    'tiny_greeting.py': 'def greet(): return \"installed\"\\n',
    'tiny_greeting-1.0.dist-info/METADATA': 'Metadata-Version: 2.1\\nName: tiny-greeting\\nVersion: 1.0\\n',
    'tiny_greeting-1.0.dist-info/WHEEL':
        'Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n',
}
record = 'tiny_greeting-1.0.dist-info/RECORD'
files[record] = ''.join(f'{path},,\\n' for path in [*files, record])
os.makedirs('index/tiny-greeting')
with zipfile.ZipFile('index/' + name, 'w') as wheel:
    for path, text in files.items(): wheel.writestr(path, text)
digest = hashlib.sha256(open('index/' + name, 'rb').read()).hexdigest()
open('index/tiny-greeting/index.html', 'w').write(f'<a href=\"../{name}#sha256={digest}\">{name}</a>')
";
    let outcome = tier
        .run_with("--copy-out")
        .arg(format!("/work/index:{}", directory.join("index").display()))
        .args(["--", "python3", "-c", script])
        .outcome();
    outcome.assert_success();
}

fn pip_installs_through_allowed_endpoint(tier: TierUnderTest) {
    let dir = tempfile::tempdir().unwrap();
    write_package_index(tier, dir.path());
    let port = serve_directory(dir.path());
    let options = format!("-q --cert /work/ca.pem --index-url https://localhost:{port}/index/");
    let script = format!(
        "export PIP_DISABLE_PIP_VERSION_CHECK=1
pip install {options} tiny-greeting
python3 -c 'import tiny_greeting; print(tiny_greeting.greet(), tiny_greeting.__file__)'
python3 -m venv v; v/bin/pip install {options} tiny-greeting
v/bin/python -c 'import tiny_greeting; print(tiny_greeting.greet(), tiny_greeting.__file__)'"
    );
    assert_eq!(
        run_with_server(tier, port, &script),
        "installed /work/.local/lib/python3.11/site-packages/tiny_greeting.py\n\
         installed /work/v/lib/python3.11/site-packages/tiny_greeting.py"
    );
}

fn allowed_name_resolves_with_address_configuration(tier: TierUnderTest) {
    let script = "import socket
found = socket.getaddrinfo('a.example.com', 443, socket.AF_INET, socket.SOCK_STREAM, 0,
                           socket.AI_ADDRCONFIG)
print(found[0][4][0])";
    let outcome = tier.run_with("--allow a.example.com:443 -- python3 -c").arg(script).outcome();
    assert_eq!(outcome.assert_success(), "127.64.0.1");
}

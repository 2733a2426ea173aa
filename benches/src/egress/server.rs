use std::fmt::Display;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use crate::error::BenchError;

/// A server that answers `GET /N` with N bytes over TLS and, at another port, each byte with one.
pub struct Server {
    pub tls_port: u16,
    pub plain_port: u16,
    /// Its certificate, as PEM.
    pub certificate: String,
}

impl Server {
    /// Starts the server on free ports of 127.0.0.1, with a new certificate.
    pub fn start() -> Result<Server, BenchError> {
        let key = rcgen::generate_simple_self_signed(["localhost".to_owned()])
            .map_err(|error| server_error(&error))?;
        let private =
            PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.signing_key.serialize_der()));
        let config =
            ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .map_err(|error| server_error(&error))?
                .with_no_client_auth()
                .with_single_cert(vec![key.cert.der().clone()], private)
                .map_err(|error| server_error(&error))?;
        let config = Arc::new(config);
        let tls_port = listen(move |socket| serve_https(&config, socket))?;
        let plain_port = listen(|mut socket| {
            let mut byte = [0];
            socket.read_exact(&mut byte)?;
            socket.write_all(&byte)
        })?;
        Ok(Server { tls_port, plain_port, certificate: key.cert.pem() })
    }
}

fn server_error(error: &dyn Display) -> BenchError {
    BenchError::io("create an HTTPS server")(io::Error::other(error.to_string()))
}

/// Listens on a free port, with one thread for each connection.
fn listen(
    serve: impl Fn(TcpStream) -> io::Result<()> + Clone + Send + 'static,
) -> Result<u16, BenchError> {
    let failed = || BenchError::io("listen on 127.0.0.1");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed())?;
    let port = listener.local_addr().map_err(failed())?.port();
    thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let serve = serve.clone();
            // The client sees errors and reports them.
            thread::spawn(move || socket.set_nodelay(true).and_then(|()| serve(socket)));
        }
    });
    Ok(port)
}

fn serve_https(config: &Arc<ServerConfig>, socket: TcpStream) -> io::Result<()> {
    let connection = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, socket);
    let (mut request, mut piece) = (Vec::new(), [0; 4096]);
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut piece)? {
            0 => return Ok(()),
            count => request.extend_from_slice(&piece[..count]),
        }
    }
    let text = String::from_utf8_lossy(&request);
    let length = text.strip_prefix("GET /").and_then(|rest| rest.split(' ').next()?.parse().ok());
    let mut left: u64 = length.unwrap_or(0);
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {left}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    let piece = vec![b'x'; 64 * 1024];
    while left > 0 {
        let count = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        stream.write_all(&piece[..count])?;
        left -= count as u64;
    }
    stream.conn.send_close_notify();
    stream.flush()
}

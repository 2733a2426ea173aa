use std::os::unix::fs::PermissionsExt;

use clap::Parser;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::connection::GuestConnection;
use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    peer: PeerArgs,
}

fn parse_args(words: &[&str]) -> Result<Line, clap::Error> {
    Line::try_parse_from(["bench"].iter().chain(words))
}

#[test]
fn peer_other_than_firecracker_is_rejected() {
    for wrong in ["firecracker", "firecracker=", "qemu=/bin/true", "/bin/true"] {
        assert_eq!(wrong.parse::<PeerProgram>(), Err(ParsePeerError), "{wrong}");
        assert!(parse_args(&["--peer", wrong]).is_err(), "{wrong}");
    }
    assert!(parse_args(&["--peer-kernel", "vmlinux"]).is_err());
    assert!(parse_args(&["--peer-root", "pmem"]).is_err());
    assert!(parse_args(&["--peer", "firecracker=x", "--peer-root", "nvme"]).is_err());
    assert!(parse_args(&[]).unwrap().peer.find_peer(1, 128).unwrap().is_none());
}

#[test]
fn missing_peer_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("firecracker");
    let peer = |path: &Path| {
        parse_args(&["--peer", &format!("firecracker={}", path.display())]).unwrap().peer
    };
    let error = peer(&path).find_peer(1, 128).err().unwrap();
    assert!(matches!(error, PeerError::Missing { object: PeerFile::Program, .. }), "{error}");
    std::fs::write(&path, "#!/bin/sh\necho something 1.0\n").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let error = peer(&path).find_peer(1, 128).err().unwrap();
    assert!(matches!(error, PeerError::Version { .. }), "{error}");
    std::fs::write(&path, "#!/bin/sh\necho Firecracker v0\n").unwrap();
    let args = PeerArgs { peer_kernel: Some(dir.path().join("none")), ..peer(&path) };
    let error = args.find_peer(1, 128).err().unwrap();
    assert!(matches!(error, PeerError::Missing { object: PeerFile::Kernel, .. }), "{error}");
}

#[test]
fn argv_is_encoded_with_nul_terminators() {
    assert_eq!(encode_argv(&["a b".into(), "".into()]), b"a b\0\0");
}

/// Runs the host's end, and what a guest does with its end.
fn run_both<T>(
    host: impl AsyncFnOnce(DuplexStream) -> T,
    guest: impl AsyncFnOnce(DuplexStream),
) -> T {
    let (ours, theirs) = tokio::io::duplex(64);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async { tokio::join!(host(ours), guest(theirs)).0 })
}

#[test]
fn command_output_and_exit_code_are_separated() {
    for (sent, printed, code) in [("hone\ntwo\n\0\x03", true, 3), ("h\0\0", false, 0)] {
        let ran = run_both(
            async |stream| {
                GuestConnection::accept(stream).await.unwrap().run(b"true\0").await.unwrap()
            },
            async |mut stream| {
                stream.write_all(sent.as_bytes()).await.unwrap();
                let mut request = [0; 10];
                stream.read_exact(&mut request).await.unwrap();
                assert_eq!(request, *b"x\x05\0\0\0true\0");
            },
        );
        assert_eq!((ran.has_printed, ran.code), (printed, code));
        assert!(ran.output <= ran.exit);
    }
}

#[test]
fn truncated_or_foreign_answer_is_an_error() {
    for sent in ["hone\n", "h\0", "", "x"] {
        let ran = run_both(
            async |stream| match GuestConnection::accept(stream).await {
                Ok(mut connection) => connection.run(b"true\0").await.map(drop),
                Err(error) => Err(error),
            },
            async |mut stream| {
                stream.write_all(sent.as_bytes()).await.unwrap();
                if sent.starts_with('h') {
                    let _ = stream.read(&mut [0; 10]).await;
                }
            },
        );
        assert!(ran.is_err(), "{sent}");
    }
}

#[test]
fn restored_guest_is_dialed_by_port() {
    for (answer, accepted) in [("OK 7\nh", true), ("no\nh", false), ("OK 7\n", false), ("", false)]
    {
        let connected = run_both(
            async |stream| GuestConnection::dial(stream).await.is_ok(),
            async |mut stream| {
                let mut line = [0; 13];
                stream.read_exact(&mut line).await.unwrap();
                assert_eq!(line, *b"CONNECT 1024\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            },
        );
        assert_eq!(connected, accepted, "{answer:?}");
    }
}

#[test]
fn api_answer_has_status_and_body() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let answer = |text: &'static str| runtime.block_on(firecracker::read_answer(text.as_bytes()));
    assert_eq!(
        answer("HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n").unwrap(),
        (204, String::new())
    );
    let text = "HTTP/1.1 400 Bad\r\nContent-length: 3\r\n\r\nno!more";
    assert_eq!(answer(text).unwrap(), (400, "no!".into()));
    assert!(answer("").is_err());
    assert!(answer("HTTP/1.1 400 Bad\r\nContent-Length: 9\r\n\r\nno!").is_err());
}

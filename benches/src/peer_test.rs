use std::os::unix::fs::PermissionsExt;

use clap::Parser;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::guest::Conversation;
use super::*;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    peer: PeerArgs,
}

fn parse(words: &[&str]) -> Result<Line, clap::Error> {
    Line::try_parse_from(["bench"].iter().chain(words))
}

#[test]
fn a_peer_is_firecracker_and_names_a_program() {
    for wrong in ["firecracker", "firecracker=", "qemu=/bin/true", "/bin/true"] {
        let error = parse(&["--peer", wrong]).err().unwrap().to_string();
        assert!(error.contains("firecracker=BIN"), "{error}");
    }
    assert!(parse(&["--peer-kernel", "vmlinux"]).is_err());
    assert!(parse(&["--peer-root", "pmem"]).is_err());
    assert!(parse(&["--peer", "firecracker=x", "--peer-root", "nvme"]).is_err());
    assert!(parse(&[]).unwrap().peer.peer(1, 128).unwrap().is_none());
}

#[test]
fn what_is_missing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("firecracker");
    let peer =
        |path: &Path| parse(&["--peer", &format!("firecracker={}", path.display())]).unwrap().peer;
    let error = peer(&path).peer(1, 128).err().unwrap();
    assert!(matches!(error, PeerError::Missing { what: "program", .. }), "{error}");
    std::fs::write(&path, "#!/bin/sh\necho something 1.0\n").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let error = peer(&path).peer(1, 128).err().unwrap();
    assert!(matches!(error, PeerError::Version { .. }), "{error}");
    std::fs::write(&path, "#!/bin/sh\necho Firecracker v0\n").unwrap();
    let args = PeerArgs { peer_kernel: Some(dir.path().join("none")), ..peer(&path) };
    let error = args.peer(1, 128).err().unwrap();
    assert!(matches!(error, PeerError::Missing { what: "guest kernel", .. }), "{error}");
}

#[test]
fn commands_are_words_that_end() {
    assert_eq!(words(&["a b".into(), "".into()]), b"a b\0\0");
    assert_eq!(words(&[]), [ECHO.as_bytes(), b"\0chitin\0"].concat());
}

/// Runs the host's end, and what a guest does with its own.
fn talk<T>(host: impl AsyncFnOnce(DuplexStream) -> T, guest: impl AsyncFnOnce(DuplexStream)) -> T {
    let (ours, theirs) = tokio::io::duplex(64);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async { tokio::join!(host(ours), guest(theirs)).0 })
}

#[test]
fn a_command_is_told_from_its_output_and_its_end() {
    for (sent, printed, code) in [("hone\ntwo\n\0\x03", true, 3), ("h\0\0", false, 0)] {
        let ran = talk(
            async |stream| Conversation::begin(stream).await.unwrap().run(b"true\0").await.unwrap(),
            async |mut stream| {
                stream.write_all(sent.as_bytes()).await.unwrap();
                let mut request = [0; 10];
                stream.read_exact(&mut request).await.unwrap();
                assert_eq!(request, *b"x\x05\0\0\0true\0");
            },
        );
        assert_eq!((ran.printed, ran.code), (printed, code));
        assert!(ran.output <= ran.exit);
    }
    // A guest that ends in the middle is an error, and so is one that says something else first.
    for sent in ["hone\n", "h\0", "", "x"] {
        let ran = talk(
            async |stream| match Conversation::begin(stream).await {
                Ok(mut conversation) => conversation.run(b"true\0").await.map(drop),
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
fn a_restored_guest_is_asked_for_by_its_port() {
    for (answer, there) in [("OK 7\nh", true), ("no\nh", false), ("OK 7\n", false), ("", false)] {
        let connected = talk(
            async |stream| Conversation::connect(stream).await.is_ok(),
            async |mut stream| {
                let mut line = [0; 13];
                stream.read_exact(&mut line).await.unwrap();
                assert_eq!(line, *b"CONNECT 1024\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            },
        );
        assert_eq!(connected, there, "{answer:?}");
    }
}

#[test]
fn an_answer_has_a_status_and_a_body() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let answer = |text: &'static str| runtime.block_on(firecracker::answer(text.as_bytes()));
    assert_eq!(
        answer("HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n").unwrap(),
        (204, String::new())
    );
    let text = "HTTP/1.1 400 Bad\r\nContent-length: 3\r\n\r\nno!more";
    assert_eq!(answer(text).unwrap(), (400, "no!".into()));
    assert!(answer("").is_err());
    assert!(answer("HTTP/1.1 400 Bad\r\nContent-Length: 9\r\n\r\nno!").is_err());
}

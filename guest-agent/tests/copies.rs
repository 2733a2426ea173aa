//! Copies of file trees into and out of the sandbox.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use chitin_protocol::{Direction, Exit, Failure, ToGuest};
use chitin_tree::{ReceiveOptions, SendOptions};
use support::Agent;

fn put(agent: &mut Agent, source: &Path, target: &str) -> Result<(), Failure> {
    let mut tree = Vec::new();
    chitin_tree::send(source, &mut tree, &SendOptions::host()).unwrap();
    put_bytes(agent, &tree, target.as_bytes())
}

fn put_bytes(agent: &mut Agent, tree: &[u8], target: &[u8]) -> Result<(), Failure> {
    let stream = agent.connection.open_stream(Direction::Send).unwrap();
    let request = agent.next_id();
    let put = ToGuest::Put { request, path: target.to_vec(), stream };
    agent.connection.send_message(&put).unwrap();
    let mut rest = tree;
    while !rest.is_empty() && agent.connection.is_sending(stream) {
        rest = &rest[agent.connection.send_data(stream, rest)..];
        assert!(agent.exchange_once());
    }
    agent.connection.end_stream(stream);
    agent.wait_until(|agent| agent.done.contains_key(&request));
    agent.done.remove(&request).unwrap()
}

fn get(agent: &mut Agent, source: &str) -> (Vec<u8>, Result<(), Failure>) {
    let stream = agent.connection.open_stream(Direction::Receive).unwrap();
    let request = agent.next_id();
    let get = ToGuest::Get { request, path: source.as_bytes().to_vec(), stream };
    agent.connection.send_message(&get).unwrap();
    agent.wait_until(|agent| agent.done.contains_key(&request));
    assert!(agent.ended.contains(&stream), "Done follows the end of the stream");
    (agent.output.remove(&stream).unwrap_or_default(), agent.done.remove(&request).unwrap())
}

#[test]
fn tree_round_trips_through_the_spawn_sandbox() {
    let outside = tempfile::tempdir().unwrap();
    let source = outside.path().join("source");
    std::fs::create_dir_all(source.join("empty/nested")).unwrap();
    std::fs::write(source.join("large"), vec![7; 3_000_000]).unwrap();
    std::fs::write(source.join("run.sh"), "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(source.join("run.sh"), PermissionsExt::from_mode(0o750)).unwrap();
    symlink("run.sh", source.join("link")).unwrap();

    let inside = tempfile::tempdir().unwrap();
    let target = inside.path().join("made/on/the/way");
    let mut agent = Agent::spawn_ready();
    put(&mut agent, &source, target.to_str().unwrap()).unwrap();
    assert_eq!(std::fs::metadata(target.join("large")).unwrap().len(), 3_000_000);
    assert_eq!(std::fs::metadata(target.join("run.sh")).unwrap().mode() & 0o7777, 0o750);
    assert_eq!(std::fs::read_link(target.join("link")).unwrap(), Path::new("run.sh"));
    if support::needs_root("the owner of what is copied in") {
        let made = std::fs::metadata(inside.path().join("made")).unwrap();
        assert_eq!((made.uid(), made.mode() & 0o7777), (0, 0o755));
        for name in ["", "large", "empty/nested"] {
            let metadata = std::fs::metadata(target.join(name)).unwrap();
            assert_eq!((metadata.uid(), metadata.gid()), (1000, 1000), "{name}");
        }
    }

    let (tree, result) = get(&mut agent, target.to_str().unwrap());
    result.unwrap();
    let back = outside.path().join("back");
    chitin_tree::receive(tree.as_slice(), &back, &ReceiveOptions::host(1 << 30, 1000)).unwrap();
    assert_eq!(std::fs::read(back.join("large")).unwrap(), vec![7; 3_000_000]);
    assert!(back.join("empty/nested").is_dir());
}

#[test]
fn forbidden_copy_path_is_refused_by_name() {
    let outside = tempfile::tempdir().unwrap();
    let file = outside.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let link = outside.path().join("link");
    symlink(outside.path(), &link).unwrap();
    let mut agent = Agent::spawn_ready();
    let through = link.join("file");
    for path in ["relative", "/tmp/../etc", "/proc/self/environ", "/sys/x", "/dev/null", ""] {
        let failure = put(&mut agent, &file, path).unwrap_err();
        assert!(failure.operation.contains(path), "{failure}");
        let (tree, result) = get(&mut agent, path);
        assert!(tree.is_empty());
        assert!(result.unwrap_err().operation.contains(path));
    }
    let through = through.to_str().unwrap();
    assert!(put(&mut agent, &file, through).unwrap_err().operation.contains("symbolic link"));
    assert!(get(&mut agent, through).1.unwrap_err().operation.contains("symbolic link"));
    put_bytes(&mut agent, b"\x01", b"/tmp/a\0b").unwrap_err();
    let (_, result) = get(&mut agent, "/no/such/file");
    assert_eq!(result.unwrap_err().errno, 2);
    // Sockets are not files.
    let socket = outside.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let (_, result) = get(&mut agent, socket.to_str().unwrap());
    assert!(result.unwrap_err().to_string().contains("socket"));
}

#[test]
fn truncated_or_invalid_tree_fails_its_copy_only() {
    let outside = tempfile::tempdir().unwrap();
    let file = outside.path().join("file");
    std::fs::write(&file, vec![1; 500_000]).unwrap();
    let mut tree = Vec::new();
    chitin_tree::send(&file, &mut tree, &SendOptions::host()).unwrap();
    let target = outside.path().join("target");
    let mut agent = Agent::spawn_ready();
    for bad in [&b""[..], b"garbage that is not a tree", &tree[..100], &tree[..tree.len() - 1]] {
        put_bytes(&mut agent, bad, target.as_os_str().as_bytes()).unwrap_err();
        assert!(!target.exists());
    }
    // Endless garbage is refused while it arrives.
    put_bytes(&mut agent, &vec![0xff; 4 << 20], target.as_os_str().as_bytes()).unwrap_err();
    // Bytes after a complete tree are ignored.
    let more = [&tree[..], &[0; 100_000]].concat();
    put_bytes(&mut agent, &more, target.as_os_str().as_bytes()).unwrap();
    assert_eq!(std::fs::metadata(&target).unwrap().len(), 500_000);
    let running = agent.run_command(&["true"]);
    assert_eq!(agent.wait_for_exit(running), Exit::Code(0));
}

#[test]
fn reset_stream_cancels_the_copy() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("file"), vec![1; 4_000_000]).unwrap();
    let mut agent = Agent::spawn_ready();

    let stream = agent.connection.open_stream(Direction::Receive).unwrap();
    let request = agent.next_id();
    let path = outside.path().as_os_str().as_bytes().to_vec();
    agent.withhold.push(stream);
    agent.connection.send_message(&ToGuest::Get { request, path, stream }).unwrap();
    agent.wait_until(|agent| agent.output.contains_key(&stream));
    agent.connection.reset_stream(stream);
    agent.wait_until(|agent| agent.done.contains_key(&request));
    assert!(agent.done[&request].is_err());

    let stream = agent.connection.open_stream(Direction::Send).unwrap();
    let request = agent.next_id();
    let path = outside.path().join("other").as_os_str().as_bytes().to_vec();
    agent.connection.send_message(&ToGuest::Put { request, path, stream }).unwrap();
    agent.connection.reset_stream(stream);
    agent.wait_until(|agent| agent.done.contains_key(&request));
    assert!(agent.done[&request].is_err());
}

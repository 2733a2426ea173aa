//! The file systems of a microVM, which the agent makes in namespaces of this machine, with this
//! machine's root as the image. Needs root, and util-linux's `unshare`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use chitin_protocol::{Direction, Exit, ToGuest};
use support::{Agent, spawn_sandbox};

#[test]
fn only_scratch_directories_are_writable() {
    let Some(mut agent) = spawn_sandbox() else { return };
    let running = agent.run_shell(
        "for d in / /etc /usr/bin /run /mnt /dev /proc /sys /sys/fs/cgroup /root; do \
           (: > $d/.chitin) 2>/dev/null && echo writable: $d; done; \
         for d in /work /tmp /var/tmp /dev/shm; do \
           echo x > $d/.chitin && cat $d/.chitin && rm $d/.chitin || echo not writable: $d; done",
    );
    assert_eq!(agent.wait_for_output(running), "x\nx\nx\nx\n");

    // The same holds for a workload that is root.
    let mut start = agent.plain_start(&[
        "sh",
        "-c",
        "touch /x /etc/x /dev/x; mount -o remount,rw /; umount /proc; true",
    ]);
    (start.uid, start.gid) = (0, 0);
    let running = agent.start_process(start);
    assert_eq!(agent.wait_for_exit(running), Exit::Code(0));
    let text = agent.take_text(running.stderr);
    assert_eq!(text.matches("Read-only file system").count(), 3, "{text}");
    assert!(
        text.matches("permission denied").count() + text.matches("must be superuser").count() >= 2,
        "{text}"
    );
}

#[test]
fn devices_mounts_and_host_name_are_as_documented() {
    let Some(mut agent) = spawn_sandbox() else { return };
    let running =
        agent.run_shell("cd /dev; echo *; stat -c '%n %t:%T %a' full null random tty urandom zero");
    assert_eq!(
        agent.wait_for_output(running),
        "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero\n\
         full 1:7 666\nnull 1:3 666\nrandom 1:8 666\ntty 5:0 666\nurandom 1:9 666\nzero 1:5 666\n"
    );
    let running =
        agent.run_shell("cut -d' ' -f2,3 /proc/mounts; hostname; cat /sys/class/net/lo/flags");
    let text = agent.wait_for_output(running);
    let targets: Vec<&str> = text.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(
        targets,
        [
            "/",
            "/work",
            "/tmp",
            "/var/tmp",
            "/dev/shm",
            "/proc",
            "/sys",
            "/sys/fs/cgroup",
            "/dev/pts",
            "chitin",
            "0x9"
        ],
        "{text}"
    );
    // The loopback interface is up, and a terminal can be opened.
    let probe = "import os, pty, socket; l = socket.create_server(('127.64.1.2', 80)); \
                 socket.create_connection(('127.64.1.2', 80)); \
                 m, s = pty.openpty(); print(os.ttyname(s))";
    let running = agent.run_command(&["python3", "-c", probe]);
    assert_eq!(agent.wait_for_output(running), "/dev/pts/0\n");
}

#[test]
fn workload_cannot_kill_pid_1() {
    let Some(mut agent) = spawn_sandbox() else { return };
    for uid in [1000, 0] {
        let script =
            "for s in 1 2 3 6 9 11 15 17 19; do kill -$s 1; done 2>/dev/null; kill -9 -1; sleep 50";
        let mut start = agent.plain_start(&["sh", "-c", script]);
        (start.uid, start.gid) = (uid, uid);
        let running = agent.start_process(start);
        // SIGTERM reaches the agent in this namespace only, where it stops a container.
        if uid == 0 {
            assert_eq!(agent.wait_for_end().0, Some(0));
            return;
        }
        // kill(-1) does not reach the shell itself.
        agent.wait_until(|agent| !agent.output.contains_key(&running.stdout));
        let other = agent.run_shell("sleep 0.1; echo alive");
        let exit = agent.wait_for_exit(other);
        assert!(matches!(exit, Exit::Code(0) | Exit::Signal(9)), "{exit:?}");
        agent.send_signal(running, 9);
        assert_eq!(agent.wait_for_exit(running), Exit::Signal(9));
    }
}

#[test]
fn copies_reach_any_path_and_follow_no_link() {
    let Some(mut agent) = spawn_sandbox() else { return };
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "copied\n").unwrap();
    let mut tree = Vec::new();
    chitin_tree::send(file.path(), &mut tree, &chitin_tree::SendOptions::host()).unwrap();
    let put = |agent: &mut Agent, path: &str| {
        let stream = agent.connection.open_stream(Direction::Send).unwrap();
        let request = agent.next_id();
        let put = ToGuest::Put { request, path: path.into(), stream };
        agent.connection.send_message(&put).unwrap();
        agent.connection.send_data(stream, &tree);
        agent.connection.end_stream(stream);
        agent.wait_until(|agent| agent.done.contains_key(&request));
        agent.done.remove(&request).unwrap()
    };
    let paths =
        ["/etc/chitin-test/file", "/opt/new/file", "/work/in/file", "/tmp/file", "/newdir/file"];
    for path in paths {
        put(&mut agent, path).unwrap();
    }
    let running = agent.run_command(&[&["cat"], &paths[..]].concat());
    assert_eq!(agent.wait_for_output(running), "copied\n".repeat(paths.len()));
    let running =
        agent.run_shell("stat -c '%u %a' /opt/new /opt/new/file /work/in; echo y > /work/in/other");
    assert_eq!(agent.wait_for_output(running), "0 755\n1000 600\n1000 755\n");
    for path in paths.iter().filter(|path| !path.starts_with("/tmp")) {
        assert!(!std::path::Path::new(path).exists(), "{path} is on this machine");
    }

    // A workload that puts symbolic links on the path.
    let running = agent.run_shell(
        "ln -s /etc /work/out; ln -s /etc/passwd /tmp/passwd; mkdir /tmp/d; ln -s .. /tmp/d/up",
    );
    assert_eq!(agent.wait_for_output(running), "");
    for path in ["/work/out/file", "/tmp/d/up/file"] {
        assert_eq!(put(&mut agent, path).unwrap_err().errno, 40, "{path}");
    }
    // Replaces the link, not its target.
    put(&mut agent, "/tmp/passwd").unwrap();
    let running = agent.run_shell("cat /tmp/passwd; head -c 4 /etc/passwd");
    assert_eq!(agent.wait_for_output(running), "copied\nroot");
}

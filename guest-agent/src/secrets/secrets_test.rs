use std::os::unix::fs::FileExt;

use chitin_protocol::SecretBytes;
use rustix::fs::SealFlags;
use rustix::mm::{MapFlags, ProtFlags};

use super::memfd::FIRST_FD;
use super::*;

fn secret(name: &str, value: &[u8], delivery: Delivery) -> Secret {
    Secret { request: 1, name: name.into(), value: SecretBytes::new(value.to_vec()), delivery }
}

fn environment(secrets: &Secrets) -> Vec<String> {
    secrets.environment().map(|entry| String::from_utf8(entry.to_vec()).unwrap()).collect()
}

#[test]
fn secret_name_is_an_environment_variable_name() {
    for good in ["A", "_", "API_TOKEN", "a1", &"x".repeat(MAX_NAME_LEN)] {
        assert!(is_valid_name(good), "{good}");
    }
    for bad in ["", "1A", "A-B", "A=B", "A B", "Ä", "A\0", &"x".repeat(MAX_NAME_LEN + 1)] {
        assert!(!is_valid_name(bad), "{bad}");
    }
}

#[test]
fn later_secret_replaces_earlier_within_the_limit() {
    let mut secrets = Secrets::default();
    secrets.insert(&secret("A", b"1", Delivery::Env)).unwrap();
    secrets.insert(&secret("A", b"2", Delivery::Env)).unwrap();
    assert_eq!(environment(&secrets), ["A=2"]);
    assert!(secrets.sets_variable(b"A") && !secrets.sets_variable(b"A_FILE"));

    secrets.insert(&secret("A", b"3", Delivery::Memory)).unwrap();
    let fd = secrets.memfds().next().unwrap().as_raw_fd();
    assert!(fd >= FIRST_FD);
    assert_eq!(environment(&secrets), [format!("A_FILE=/proc/self/fd/{fd}")]);
    assert!(!secrets.sets_variable(b"A") && secrets.sets_variable(b"A_FILE"));

    for number in 1..MAX_SECRETS {
        secrets.insert(&secret(&format!("N{number}"), b"", Delivery::Env)).unwrap();
    }
    assert!(secrets.insert(&secret("ONE_MORE", b"", Delivery::Env)).is_err());
    assert!(secrets.insert(&secret("A", b"4", Delivery::Env)).is_ok());
}

#[test]
fn undeliverable_secret_is_refused() {
    let mut secrets = Secrets::default();
    assert!(secrets.insert(&secret("A", b"a\0b", Delivery::Env)).is_err());
    assert!(secrets.insert(&secret("A", b"a\0b", Delivery::Memory)).is_ok());
    assert!(secrets.insert(&secret("B", &[0; MAX_SECRET + 1], Delivery::Memory)).is_err());
    assert!(secrets.insert(&secret("B", &[1; MAX_SECRET], Delivery::Memory)).is_ok());
}

#[test]
fn inherited_memfd_follows_rotation_and_revocation() {
    let mut secrets = Secrets::default();
    assert!(secrets.was_always_empty());
    secrets.insert(&secret("A", b"the first value", Delivery::Memory)).unwrap();
    let memfd = secrets.memfds().next().unwrap();
    // The path that a child opens.
    let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    let inherited = std::fs::File::open(&path).unwrap();
    let seen = || {
        let mut bytes = [0; 100];
        let count = inherited.read_at(&mut bytes, 0).unwrap();
        String::from_utf8(bytes[..count].to_vec()).unwrap()
    };
    assert_eq!(rustix::io::write(memfd, b"x"), Err(Errno::PERM));
    assert_eq!(rustix::fs::fcntl_add_seals(memfd, SealFlags::WRITE), Err(Errno::PERM));
    // SAFETY: a mapping that the kernel chooses a place for changes no memory of this process, and
    // this one is refused.
    let mapped = unsafe {
        rustix::mm::mmap(std::ptr::null_mut(), 1, ProtFlags::WRITE, MapFlags::SHARED, memfd, 0)
    };
    assert_eq!(mapped, Err(Errno::PERM));
    assert_eq!(seen(), "the first value");

    for next in ["short", "", "one that is longer than the first value was"] {
        secrets.insert(&secret("A", next.as_bytes(), Delivery::Memory)).unwrap();
        assert_eq!(seen(), next);
    }
    secrets.revoke("B").unwrap();
    secrets.revoke("A").unwrap();
    assert_eq!(seen(), "");
    assert!(
        environment(&secrets).is_empty()
            && secrets.memfds().next().is_none()
            && !secrets.sets_variable(b"A_FILE")
    );
    assert!(!secrets.was_always_empty());
    // Bytes that were cut off are zero when the memfd grows again.
    secrets.insert(&secret("A", b"\0", Delivery::Memory)).unwrap();
    rustix::fs::ftruncate(secrets.memfds().next().unwrap(), 50).unwrap();
    assert_eq!(seen(), "\0".repeat(50));
    secrets.insert(&secret("A", b"again", Delivery::Memory)).unwrap();
    assert_eq!(
        secrets.memfds().next().unwrap().as_raw_fd().to_string(),
        path.rsplit('/').next().unwrap()
    );
    assert!(seen().starts_with("again"));

    secrets.insert(&secret("E", b"1", Delivery::Env)).unwrap();
    secrets.revoke("E").unwrap();
    assert!(!secrets.sets_variable(b"E") && secrets.sets_variable(b"A_FILE"));
    // Another delivery clears the memfd, and so does the end of the agent.
    secrets.insert(&secret("A", b"1", Delivery::Env)).unwrap();
    assert_eq!(seen(), "");
}

//! The host users of a container: a range of ids that no other container has, nor a user of the
//! host.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

use rustix::fs::{FlockOperation, Mode, OFlags, flock};

use super::engine::container_cgroups;
use super::private_dir::open_private_dir;

/// Users of one range.
pub(super) const USERS: u32 = 65_536;

/// The first user of the first range. No distribution assigns these.
const FIRST: u32 = 0x4000_0000;

/// Ranges. The last one ends where the users of microVMs begin.
const RANGES: u32 = (chitin_vmm::jail::BASE_UID - FIRST) / USERS;

const _: () = assert!(crate::archive::IMAGE_ID < FIRST);

/// A file for each range that is or was in use; its lock says which.
const LOCKS: &str = "/run/chitin/users";

/// Users that administrators assign to user namespaces (subuid(5)).
const ASSIGNED: [&str; 2] = ["/etc/subuid", "/etc/subgid"];

/// A range of host users, which no other container gets as long as this exists.
#[derive(Debug)]
pub(super) struct UserRange {
    first: u32,
    _lock: File,
}

impl UserRange {
    /// Reserves the first range that is free.
    pub fn reserve(container: &str) -> io::Result<UserRange> {
        let assigned = ASSIGNED.map(|path| fs::read_to_string(path).unwrap_or_default()).concat();
        UserRange::reserve_in(Path::new(LOCKS), container, &parse_assigned(&assigned))
    }

    fn reserve_in(locks: &Path, container: &str, assigned: &[(u64, u64)]) -> io::Result<UserRange> {
        let locks = open_private_dir(locks, 0o700)?;
        for index in 0..RANGES {
            let first = FIRST + index * USERS;
            if overlaps(assigned, first) {
                continue;
            }
            let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let name = index.to_string();
            let lock = rustix::fs::openat(&locks, name, flags, Mode::RUSR | Mode::WUSR)?;
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            let mut lock = File::from(lock);
            if last_user_is_running(&mut lock)? {
                continue;
            }
            lock.set_len(0)?;
            lock.rewind()?;
            lock.write_all(container.as_bytes())?;
            return Ok(UserRange { first, _lock: lock });
        }
        Err(io::Error::other("every range of users is in use"))
    }

    /// Returns the first user.
    pub fn first(&self) -> u32 {
        self.first
    }
}

/// Returns true if the container that had the range last has not ended: one whose `chitin` was
/// killed has released the lock already.
fn last_user_is_running(lock: &mut File) -> io::Result<bool> {
    let mut container = String::new();
    lock.take(256).read_to_string(&mut container)?;
    Ok(!container.is_empty() && container_cgroups(&container).next().is_some())
}

/// Returns the first and the last user of each line `NAME:FIRST:COUNT`.
fn parse_assigned(text: &str) -> Vec<(u64, u64)> {
    let parse = |line: &str| {
        let mut fields = line.split(':').skip(1);
        let (first, count): (u64, u64) =
            (fields.next()?.trim().parse().ok()?, fields.next()?.trim().parse().ok()?);
        (count > 0).then(|| (first, first.saturating_add(count - 1)))
    };
    text.lines().filter_map(parse).collect()
}

fn overlaps(assigned: &[(u64, u64)], first: u32) -> bool {
    let (first, last) = (u64::from(first), u64::from(first) + u64::from(USERS) - 1);
    assigned.iter().any(|&(start, end)| start <= last && first <= end)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::thread;

    use super::*;

    #[test]
    fn concurrent_containers_get_distinct_ranges() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = |_| UserRange::reserve_in(dir.path(), "chitin-none", &[]).unwrap();
        let ranges: Vec<UserRange> = thread::scope(|scope| {
            let threads: Vec<_> =
                (0..64).map(|index| scope.spawn(move || reserve(index))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let firsts: BTreeSet<u32> = ranges.iter().map(UserRange::first).collect();
        assert_eq!(firsts.len(), 64);
        assert!(firsts.iter().all(|first| first % USERS == 0));
        drop(ranges);
        assert_eq!(reserve(0).first(), FIRST);
    }

    #[test]
    fn assigned_users_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!("a:{}:1\nb:100000:65536\nbad\n", FIRST + USERS - 1);
        let assigned = parse_assigned(&text);
        assert_eq!(assigned.len(), 2);
        let range = UserRange::reserve_in(dir.path(), "chitin-none", &assigned).unwrap();
        assert_eq!(range.first(), FIRST + USERS);
    }
}

//! Paths that no other user can replace: every directory on the way, each link, and the file.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// The most links that are followed, as in Linux.
const MAX_LINKS: usize = 40;

const STICKY: u32 = 0o1000;
const GROUP_MAY_WRITE: u32 = 0o020;
const OTHERS_MAY_WRITE: u32 = 0o002;

/// A file or directory that another user can replace.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", path.display())]
pub struct UntrustedPath {
    /// The file, directory or link on the way.
    pub path: PathBuf,
    /// Cause.
    pub reason: UntrustedReason,
}

/// The reason why a path is not trusted.
#[derive(Debug, thiserror::Error)]
pub enum UntrustedReason {
    /// It belongs to another user.
    #[error("it belongs to user {owner}, who is neither root nor this user")]
    Owner {
        /// The user id of its owner.
        owner: u32,
    },
    /// Other users can write to it.
    #[error("its mode {mode:04o} lets other users change it, `chmod go-w` ends that")]
    Mode {
        /// Its permissions.
        mode: u32,
    },
    /// There are too many links.
    #[error("it is one of more than {MAX_LINKS} links")]
    Links,
    /// It cannot be inspected.
    #[error("it cannot be inspected: {0}")]
    Inspect(io::Error),
}

/// Checks that only root and the users of `owners` can change what an absolute path leads to.
///
/// Links are followed one by one, and each place on the way is checked. A directory in which
/// everybody may create files is accepted with the sticky bit, which protects the files of others.
/// The directory `base` and those above it may belong to anybody.
pub(crate) fn check_trusted_path(
    path: &Path,
    base: &Path,
    owners: &[u32],
) -> Result<(), UntrustedPath> {
    check_places(path, base, owners, Some(&mut PrivateGroups::default()))
}

/// Checks as [`check_trusted_path`] that only root and this user can change what an absolute path
/// leads to. No group may write, not even one that has this user only.
pub(crate) fn check_closed_path(path: &Path) -> Result<(), UntrustedPath> {
    check_places(path, Path::new(""), &[rustix::process::geteuid().as_raw()], None)
}

/// Checks each place on the way to a path. Groups may write to none without `groups`.
fn check_places(
    path: &Path,
    base: &Path,
    owners: &[u32],
    mut groups: Option<&mut PrivateGroups>,
) -> Result<(), UntrustedPath> {
    let mut pending = list_parts(path);
    let mut place = PathBuf::from("/");
    let mut links = 0;
    loop {
        let metadata = fs::symlink_metadata(&place)
            .map_err(|error| untrusted(&place, UntrustedReason::Inspect(error)))?;
        let owner = metadata.uid();
        if owner != 0 && !owners.contains(&owner) && !base.starts_with(&place) {
            return Err(untrusted(&place, UntrustedReason::Owner { owner }));
        }
        check_mode(&place, &metadata, groups.as_deref_mut())?;
        if metadata.is_symlink() {
            links += 1;
            if links > MAX_LINKS {
                return Err(untrusted(&place, UntrustedReason::Links));
            }
            let target = fs::read_link(&place)
                .map_err(|error| untrusted(&place, UntrustedReason::Inspect(error)))?;
            place.pop();
            pending.extend(list_parts(&target));
        }
        match pending.pop() {
            None => return Ok(()),
            Some(Part::Root) => place = PathBuf::from("/"),
            Some(Part::Up) => drop(place.pop()),
            Some(Part::Name(name)) => place.push(name),
        }
    }
}

enum Part {
    Root,
    Up,
    Name(OsString),
}

/// Returns the parts of a path, the last one first.
fn list_parts(path: &Path) -> Vec<Part> {
    let parts = path.components().rev().filter_map(|component| match component {
        Component::RootDir => Some(Part::Root),
        Component::ParentDir => Some(Part::Up),
        Component::Normal(name) => Some(Part::Name(name.to_owned())),
        Component::CurDir | Component::Prefix(_) => None,
    });
    parts.collect()
}

fn check_mode(
    place: &Path,
    metadata: &Metadata,
    groups: Option<&mut PrivateGroups>,
) -> Result<(), UntrustedPath> {
    let mode = metadata.mode() & 0o7777;
    let protected = metadata.is_symlink() || metadata.is_dir() && mode & STICKY != 0;
    let is_private =
        |groups: &mut PrivateGroups| groups.has_only_member(metadata.gid(), metadata.uid());
    let group_writes = mode & GROUP_MAY_WRITE != 0 && !groups.is_some_and(is_private);
    if !protected && (group_writes || mode & OTHERS_MAY_WRITE != 0) {
        return Err(untrusted(place, UntrustedReason::Mode { mode }));
    }
    Ok(())
}

/// The groups that have one user only. Distributions that give each user such a group also set a
/// umask that lets the group write.
#[derive(Default)]
struct PrivateGroups {
    known: HashMap<(u32, u32), bool>,
}

impl PrivateGroups {
    fn has_only_member(&mut self, group: u32, user: u32) -> bool {
        *self.known.entry((group, user)).or_insert_with(|| {
            let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
            let groups = fs::read_to_string("/etc/group").unwrap_or_default();
            is_private_group(&users, &groups, group, user)
        })
    }
}

/// Returns whether a group has the name of a user, is the user's, and lists no other user. A group
/// or user that these files do not have comes from a directory service: then nothing is known.
fn is_private_group(users: &str, groups: &str, group: u32, user: u32) -> bool {
    let (user, group) = (user.to_string(), group.to_string());
    let mut name = None;
    for line in users.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        let [login, _, uid, gid, ..] = fields[..] else { continue };
        match (uid == user, gid == group) {
            (true, true) => name = Some(login),
            (false, true) => return false,
            (_, false) => {}
        }
    }
    let Some(name) = name else { return false };
    let mut lines = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
    lines.any(|fields| match fields[..] {
        [group_name, _, gid, members] => {
            let mut members = members.split(',').filter(|member| !member.is_empty());
            gid == group && group_name == name && members.all(|member| member == name)
        }
        _ => false,
    })
}

fn untrusted(path: &Path, reason: UntrustedReason) -> UntrustedPath {
    UntrustedPath { path: path.to_owned(), reason }
}

#[cfg(test)]
#[path = "trusted_path_test.rs"]
mod tests;

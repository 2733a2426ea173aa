use std::fs;
use std::io::{Seek, Write};
use std::os::unix::fs::{MetadataExt, symlink};

use tar::{Builder, EntryType, Header};

use super::*;
use crate::archive::{MAX_DEPTH, MAX_NAME_BYTES};

/// An archive under construction.
struct Archive(Builder<File>);

impl Archive {
    fn new() -> Archive {
        Archive(Builder::new(tempfile::tempfile().unwrap()))
    }

    /// Adds an entry whose name and target are written as they are.
    fn add(mut self, kind: EntryType, name: &str, target: &str, data: &[u8]) -> Archive {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(0o6755);
        header.set_uid(0);
        header.set_gid(0);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..name.len()].copy_from_slice(name.as_bytes());
        gnu.linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn add_pax(self, records: &[(&str, &[u8])]) -> Archive {
        let mut this = self;
        this.0.append_pax_extensions(records.iter().copied()).unwrap();
        this
    }

    fn finish(self) -> File {
        let mut file = self.0.into_inner().unwrap();
        file.rewind().unwrap();
        file
    }

    fn unpack(self, target: &Path) -> Result<(), ArchiveError> {
        unpack(self.finish(), target, None)
    }
}

#[test]
fn set_id_bits_and_owners_are_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("root");
    let archive = Archive::new()
        .add(EntryType::Directory, "./", "", b"")
        .add_pax(&[("SCHILY.xattr.security.capability", b"\x01\0\0\x02"), ("uid", b"1000")])
        .add(EntryType::Regular, "./usr/bin/sh", "", b"#!/x\n")
        .add(EntryType::Link, "./usr/bin/ash", "./usr/bin/sh", b"")
        .add(EntryType::Symlink, "./bin", "usr/bin", b"");
    let owner = rustix::process::geteuid().is_root().then_some(IMAGE_ID);
    unpack(archive.finish(), &target, owner).unwrap();
    let expected = owner.unwrap_or_else(|| rustix::process::geteuid().as_raw());
    for name in ["", "usr", "usr/bin", "usr/bin/sh", "bin"] {
        let metadata = fs::symlink_metadata(target.join(name)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (expected, expected), "{name}");
        if !metadata.is_symlink() {
            assert_eq!(metadata.mode() & 0o7777, 0o755, "{name}");
        }
    }
    let file = target.join("usr/bin/sh");
    let mut value = [0u8; 32];
    let attribute = rustix::fs::getxattr(&file, "security.capability", &mut value[..]);
    assert_eq!(attribute, Err(Errno::NODATA));
    assert_eq!(fs::metadata(&file).unwrap().nlink(), 2);
    assert_eq!(fs::read_link(target.join("bin")).unwrap(), Path::new("usr/bin"));
}

#[test]
fn entries_behind_links_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("victim"), "precious").unwrap();
    let out = outside.to_str().unwrap();
    let attacks: [&[(EntryType, &str, &str)]; 6] = [
        &[(EntryType::Symlink, "a", out), (EntryType::Regular, "a/victim", "")],
        &[(EntryType::Symlink, "a", out), (EntryType::Directory, "a/new", "")],
        &[(EntryType::Symlink, "a", out), (EntryType::Directory, "a", "")],
        &[(EntryType::Symlink, "a", "b"), (EntryType::Regular, "a", "")],
        &[(EntryType::Symlink, "a", out), (EntryType::Link, "b", "a/victim")],
        &[(EntryType::Symlink, "a", out), (EntryType::Link, "b", "a")],
    ];
    for (index, attack) in attacks.iter().enumerate() {
        let mut archive = Archive::new();
        for (kind, name, target) in *attack {
            archive = archive.add(*kind, name, target, b"");
        }
        let outcome = archive.unpack(&dir.path().join(format!("root{index}")));
        assert!(matches!(outcome, Err(ArchiveError::Create { .. })), "{attack:?}: {outcome:?}");
    }
    assert_eq!(fs::read(outside.join("victim")).unwrap(), b"precious");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

#[test]
fn names_out_of_the_root_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let deep = "a/".repeat(MAX_DEPTH + 1);
    let long = "a/".repeat(MAX_NAME_BYTES / 2 + 1);
    for name in ["../x", "/etc/x", "a/../../x", "", &deep, &long] {
        let archive = Archive::new().add_pax(&[("path", name.as_bytes())]).add(
            EntryType::Regular,
            "x",
            "",
            b"",
        );
        let outcome = archive.unpack(&dir.path().join("root"));
        assert!(matches!(outcome, Err(ArchiveError::Name { .. })), "{name}: {outcome:?}");
        fs::remove_dir_all(dir.path().join("root")).unwrap();
    }
    let archive = Archive::new().add(EntryType::Link, "x", "../../etc/passwd", b"");
    let outcome = archive.unpack(&dir.path().join("root"));
    assert!(matches!(outcome, Err(ArchiveError::Name { .. })), "{outcome:?}");
}

#[test]
fn devices_and_sparse_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for kind in [EntryType::Char, EntryType::Block, EntryType::Fifo, EntryType::GNUSparse] {
        let outcome = Archive::new().add(kind, "dev/x", "", b"").unpack(&dir.path().join("root"));
        assert!(matches!(outcome, Err(ArchiveError::Kind { .. })), "{kind:?}: {outcome:?}");
        fs::remove_dir_all(dir.path().join("root")).unwrap();
    }
}

#[test]
fn oversized_headers_and_contents_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("root");
    let large = vec![b'a'; 65 << 10];
    for kind in [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader] {
        let outcome = Archive::new().add(kind, "x", "", &large).unpack(&target);
        assert!(matches!(outcome, Err(ArchiveError::Header)), "{kind:?}: {outcome:?}");
        fs::remove_dir_all(&target).unwrap();
    }
    for record in [("size", &b"7"[..]), ("GNU.sparse.realsize", b"99999999999")] {
        let archive = Archive::new().add_pax(&[record]).add(EntryType::Regular, "x", "", b"");
        let outcome = archive.unpack(&target);
        assert!(matches!(outcome, Err(ArchiveError::Header)), "{record:?}: {outcome:?}");
        fs::remove_dir_all(&target).unwrap();
    }
    let mut header = Header::new_gnu();
    header.set_path("x").unwrap();
    header.set_size(9 << 30);
    header.set_cksum();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.rewind().unwrap();
    let outcome = unpack(file, &target, None);
    assert!(matches!(outcome, Err(ArchiveError::TooLarge)), "{outcome:?}");
}

#[test]
fn truncated_archive_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = Archive::new().add(EntryType::Regular, "x", "", &[b'a'; 4096]).finish();
    file.set_len(512 + 100).unwrap();
    let outcome = unpack(file, &dir.path().join("root"), None);
    let error = io::ErrorKind::UnexpectedEof;
    match outcome {
        Err(ArchiveError::Create { source, .. }) if source.kind() == error => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn existing_target_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let victim = dir.path().join("victim");
    fs::create_dir(&victim).unwrap();
    symlink(&victim, dir.path().join("root")).unwrap();
    let archive = Archive::new().add(EntryType::Regular, "x", "", b"x");
    let outcome = archive.unpack(&dir.path().join("root"));
    assert!(matches!(outcome, Err(ArchiveError::Create { .. })), "{outcome:?}");
    assert_eq!(fs::read_dir(&victim).unwrap().count(), 0);
}

//! The archive format of an initrd ("newc" cpio), and the dependencies of a kernel module.

/// An initrd under construction.
#[derive(Default)]
pub struct Initrd {
    bytes: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;

impl Initrd {
    /// Adds a directory; parents come first.
    pub fn add_directory(&mut self, path: &str) {
        self.add_entry(path, DIRECTORY | 0o755, &[], (0, 0));
    }

    /// Adds a regular file.
    pub fn add_file(&mut self, path: &str, mode: u32, contents: &[u8]) {
        self.add_entry(path, REGULAR | mode, contents, (0, 0));
    }

    /// Adds `/dev/console`, without which PID 1 has no standard error.
    pub fn add_console(&mut self) {
        self.add_entry("dev/console", CHARACTER | 0o600, &[], (5, 1));
    }

    /// Returns the finished archive. It is not compressed: the kernel would decompress it on an
    /// emulated CPU.
    pub fn finish(mut self) -> Vec<u8> {
        self.add_entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    fn add_entry(&mut self, path: &str, mode: u32, contents: &[u8], (major, minor): (u32, u32)) {
        self.entries += 1;
        let len = u32::try_from(contents.len()).expect("a file of an initrd is below 4 GiB");
        let name_len = u32::try_from(path.len() + 1).expect("a path is short");
        // Inode, mode, uid, gid, links, mtime, size, major and minor number of the device and of
        // the node, length of the name with its NUL, checksum (unused).
        let fields = [self.entries, mode, 0, 0, 1, 0, len, 0, 0, major, minor, name_len, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad_to_word();
        self.bytes.extend_from_slice(contents);
        self.pad_to_word();
    }

    fn pad_to_word(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Returns the modules that a module needs, from its `depends=` entry.
pub fn parse_dependencies(module: &[u8]) -> Vec<String> {
    const TAG: &[u8] = b"\0depends=";
    let Some(at) = module.windows(TAG.len()).position(|window| window == TAG) else {
        return Vec::new();
    };
    let value = module[at + TAG.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(value);
    text.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_has_aligned_entries_and_a_trailer() {
        let mut initrd = Initrd::default();
        initrd.add_directory("dev");
        initrd.add_file("init", 0o755, b"12345");
        let bytes = initrd.finish();
        assert_eq!(bytes.len() % 4, 0);
        // A header is 110 bytes; "dev\0" pads to 116, "init\0" to 116, its contents to 8.
        assert_eq!(&bytes[116..122], b"070701");
        assert_eq!(&bytes[232..237], b"12345");
        assert_eq!(&bytes[240..246], b"070701");
        assert!(bytes.windows(11).any(|window| window == b"TRAILER!!!\0"));
    }

    #[test]
    fn dependencies_are_read_from_the_metadata() {
        assert_eq!(
            parse_dependencies(b"\x7fELF\0license=GPL\0depends=kvm,ccp\0retpoline=Y\0"),
            ["kvm", "ccp"]
        );
        assert!(parse_dependencies(b"\0depends=\0").is_empty());
        assert!(parse_dependencies(b"no metadata").is_empty());
    }
}

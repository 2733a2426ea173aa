//! Memory of a process from `/proc/PID/smaps`, see proc_pid_smaps(5).
//!
//! The mappings of a monitor are of two kinds: those of its guest (RAM and root image), which it
//! keeps out of core dumps (`dd` among the `VmFlags`), and its private ones.

use std::path::Path;
use std::{fs, io};

/// Memory of one monitor, in bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Guest memory of this sandbox alone.
    pub guest: u64,
    /// Guest memory that is shared with other sandboxes.
    pub shared: u64,
    /// Everything else that is resident.
    pub monitor: u64,
    /// The proportional set size: shared pages count by their share.
    pub proportional: u64,
}

/// One mapping of a process.
pub struct Mapping<'a> {
    /// The path of its file; empty if it has none.
    pub path: &'a str,
    /// Its length.
    pub bytes: u64,
    /// It is left out of core dumps.
    pub dont_dump: bool,
}

/// Returns the processes that a process has started.
pub fn find_children(parent: u32) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{parent}/task"))? {
        // The directory of a thread that has ended meanwhile has no list of children.
        let list = fs::read_to_string(task?.path().join("children")).unwrap_or_default();
        found.extend(list.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(found)
}

/// Returns the memory of a monitor and of all processes that it has started.
///
/// A supervisor maps no guest memory that its child does not map too, so `shared` is the largest
/// of them and not their sum.
pub fn read_memory_use(
    pid: u32,
    is_guests: &dyn Fn(&Mapping<'_>) -> bool,
) -> io::Result<MemoryUse> {
    let smaps = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("smaps"))?;
    let mut sum = parse_smaps(&smaps, is_guests);
    for child in find_children(pid)? {
        let more = read_memory_use(child, is_guests)?;
        sum.guest += more.guest;
        sum.shared = sum.shared.max(more.shared);
        sum.monitor += more.monitor;
        sum.proportional += more.proportional;
    }
    Ok(sum)
}

/// Adds up the fields of `/proc/PID/smaps`, which are in KiB.
fn parse_smaps(smaps: &str, is_guests: &dyn Fn(&Mapping<'_>) -> bool) -> MemoryUse {
    let mut sum = MemoryUse::default();
    let (mut path, mut size, mut private, mut resident, mut proportional) = ("", 0, 0, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap_or_default();
        let bytes = || words.next().and_then(|count| count.parse::<u64>().ok()).unwrap_or(0) * 1024;
        match name {
            "Size:" => size = { bytes }(),
            "Rss:" => resident = { bytes }(),
            "Pss:" => proportional = { bytes }(),
            // Pages that were written to belong to this guest alone, even where no other process
            // maps the rest of the file.
            "Anonymous:" => private = { bytes }(),
            // The last field of a mapping.
            "VmFlags:" => {
                let dont_dump = line.split_whitespace().any(|flag| flag == "dd");
                if is_guests(&Mapping { path, bytes: size, dont_dump }) {
                    sum.guest += private;
                    sum.shared += resident - private.min(resident);
                } else {
                    sum.monitor += resident;
                }
                sum.proportional += proportional;
                (private, resident, proportional) = (0, 0, 0);
            }
            // Address range, rights, offset, device, inode, and the path.
            range if range.contains('-') => path = words.nth(4).unwrap_or_default(),
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dontdump_mappings_count_as_guest_memory() {
        let smaps = "\
7f0000000000-7f0008000000 rw-p 00000000 00:00 0 
Size:             131072 kB
Rss:                 100 kB
Pss:                  90 kB
Pss_Dirty:            60 kB
Anonymous:            60 kB
VmFlags: rd wr mr mw me dd nr nh 
7f0010000000-7f0010001000 r-xp 00000000 fe:00 12 /usr/bin/chitin-vmm
Size:                  4 kB
Rss:                   4 kB
Pss:                   2 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me 
";
        let kib = |count: u64| count * 1024;
        let by_flag =
            MemoryUse { guest: kib(60), shared: kib(40), monitor: kib(4), proportional: kib(92) };
        assert_eq!(parse_smaps(smaps, &|mapping| mapping.dont_dump), by_flag);
        assert_eq!(parse_smaps(smaps, &|mapping| mapping.bytes == 128 << 20), by_flag);
        let by_path =
            MemoryUse { guest: 0, shared: kib(4), monitor: kib(100), proportional: kib(92) };
        assert_eq!(parse_smaps(smaps, &|mapping| mapping.path == "/usr/bin/chitin-vmm"), by_path);
    }
}

//! The search for a secret value in memory, command lines, environments and files.
//!
//! A search without a result proves nothing unless it can find something. Each search therefore
//! gets a control text, which is in the memory where the value would be, and fails without it.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::{Running, docker};

/// The bytes that are read and compared at a time.
const PIECE: u64 = 1 << 20;

/// The page size of every host that these tests run on.
const PAGE: u64 = 4096;

/// Programs of a daemon or runtime, which serve a sandbox without being its descendants.
const HELPERS: [&str; 7] =
    ["dockerd", "containerd", "containerd-shim", "runsc", "runc", "crun", "conmon"];

/// Returns true if the bytes contain the needle.
pub fn contains_bytes(bytes: &[u8], needle: &[u8]) -> bool {
    // The search looks for the byte in the middle of the needle, which is rarer than first letters
    // of words. It goes page by page: most pages lack that byte, and the standard library, which
    // is optimized unlike a test, rejects them quickly.
    let middle = needle.len() / 2;
    (0..bytes.len()).step_by(4096).any(|start| {
        let page = &bytes[start..bytes.len().min(start + 4096)];
        let mut from = if page.contains(&needle[middle]) { 0 } else { page.len() };
        while let Some(offset) = page[from..].iter().position(|byte| *byte == needle[middle]) {
            let at = start + from + offset;
            from += offset + 1;
            if at >= middle && bytes[at - middle..].starts_with(needle) {
                return true;
            }
        }
        false
    })
}

/// The result of a search.
#[derive(Debug, Default)]
pub struct Search {
    /// The places of the value: a part of a process, or a file.
    pub found: Vec<String>,
    /// Set if the memory searched contains the control text.
    pub control: bool,
    /// The bytes of memory searched.
    pub bytes: u64,
}

/// Searches a run, except the memory of `chitin` itself, which has the value: memory of the guest
/// or of the sandbox's processes, command lines, environments, and the files of its directory, of
/// the container tiers and of a Docker daemon.
///
/// `control` is a text in the sandbox's memory.
pub fn search_run(running: &Running, canary: &str, control: &str) -> Search {
    let mut search = Search::default();
    for process in related_processes(running) {
        search.add_process(&process, canary.as_bytes(), control.as_bytes());
    }
    for dir in written_dirs(running) {
        search.add_files(&dir, canary.as_bytes());
    }
    search
}

/// Asserts that a search finds `control` in the sandbox's memory and does not find the value.
#[track_caller]
pub fn assert_absent(running: &Running, canary: &str, control: &str) {
    let Search { found, control, bytes } = search_run(running, canary, control);
    assert!(found.is_empty(), "the value is in {found:?}");
    assert!(control && bytes > 1 << 20, "the control text was not found in {bytes} bytes");
}

/// Asserts that a value is on no command line, in no file, and in no environment except that of
/// `chitin`. It may be in memory.
#[track_caller]
pub fn assert_unwritten(running: &Running, canary: &str) {
    let mut search = Search::default();
    for process in related_processes(running) {
        search.add_lines(&process, canary.as_bytes());
    }
    for dir in written_dirs(running) {
        search.add_files(&dir, canary.as_bytes());
    }
    assert!(search.found.is_empty(), "the value is in {:?}", search.found);
}

/// Asserts that, after the end of a run, no file and no process that served it contains a value.
/// The memory of a Docker daemon is excepted: it forwards the input of its containers and does not
/// wipe it.
#[track_caller]
pub fn assert_gone(running: &Running, canary: &str) {
    let Search { mut found, .. } = search_run(running, canary, canary);
    found.retain(|place| !(place.starts_with("memory of ") && place.contains("dockerd")));
    assert!(found.is_empty(), "the value is in {found:?}");
}

/// Asserts that a value is in no file below these directories.
#[track_caller]
pub fn assert_no_file_contains(dirs: &[&Path], canary: &str) {
    let mut search = Search::default();
    for dir in dirs {
        search.add_files(dir, canary.as_bytes());
    }
    assert!(search.found.is_empty(), "the value is in {:?}", search.found);
}

/// Lists the processes of a run and of concurrent runs, which must not have its values either.
fn related_processes(running: &Running) -> Vec<PathBuf> {
    let own = running.list_processes();
    let namespace = |process: &Path| fs::read_link(process.join("ns/pid")).ok();
    let ours = namespace(Path::new("/proc/self"));
    let entries = fs::read_dir("/proc").expect("list processes").flatten();
    let all = entries.map(|entry| entry.path()).filter(|path| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
    });
    let related = |process: &PathBuf| {
        let helps = exe_path(process).file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            HELPERS.iter().any(|helper| name == *helper || name.starts_with("containerd-shim"))
        });
        own.contains(process)
            || helps
            || namespace(process).is_some_and(|other| ours.as_ref() != Some(&other))
    };
    all.filter(related).collect()
}

/// Returns the directories that a run and its tier write to.
fn written_dirs(running: &Running) -> Vec<PathBuf> {
    let mut dirs = vec![running.dir().to_owned(), "/run/chitin".into()];
    if std::env::var_os("DOCKER_HOST").is_some()
        && let Some(dir) = Path::new(docker::host().trim_start_matches("unix://")).parent()
    {
        // The daemon's log, and the configuration, state and log of each container; not its layers.
        dirs.extend(["log", "data/containers", "exec"].map(|name| dir.join(name)));
    }
    dirs
}

fn exe_path(process: &Path) -> PathBuf {
    fs::read_link(process.join("exe")).unwrap_or_default()
}

impl Search {
    /// Searches command line and environment, which all processes of the user can read.
    fn add_lines(&mut self, process: &Path, canary: &[u8]) {
        for name in ["cmdline", "environ"] {
            let bytes = fs::read(process.join(name)).unwrap_or_default();
            // The caller of `chitin` set the variable. `chitin` must not pass it on.
            let allowed = name == "environ" && exe_path(process).ends_with("chitin");
            if !allowed && contains_bytes(&bytes, canary) {
                self.add_found(name, process);
            }
        }
    }

    fn add_found(&mut self, part: &str, process: &Path) {
        let exe = exe_path(process);
        self.found.push(format!("{part} of {} ({})", process.display(), exe.display()));
    }

    fn add_process(&mut self, process: &Path, canary: &[u8], control: &[u8]) {
        self.add_lines(process, canary);
        if exe_path(process).ends_with("chitin") {
            return;
        }
        let (mut leaked, mut seen, mut read) = (false, false, 0);
        let mut inspect = |bytes: &[u8]| {
            leaked |= contains_bytes(bytes, canary);
            seen |= contains_bytes(bytes, control);
            read += bytes.len() as u64;
        };
        // The memory of a process that ends meanwhile cannot be read.
        let _ = read_mappings(process, &mut inspect);
        let _ = read_memory_files(process, &mut inspect);
        if leaked {
            self.add_found("memory", process);
        }
        self.control |= seen;
        self.bytes += read;
    }

    fn add_files(&mut self, path: &Path, canary: &[u8]) {
        let Ok(metadata) = path.symlink_metadata() else { return };
        if metadata.is_dir() {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                self.add_files(&entry.path(), canary);
            }
        } else if metadata.is_file()
            && fs::read(path).is_ok_and(|bytes| contains_bytes(&bytes, canary))
        {
            self.found.push(path.display().to_string());
        }
    }
}

/// Reads all readable, present memory of a process. A monitor's includes that of its guest.
fn read_mappings(process: &Path, inspect: &mut impl FnMut(&[u8])) -> std::io::Result<()> {
    let maps = fs::read_to_string(process.join("maps"))?;
    let (memory, pagemap) =
        (File::open(process.join("mem"))?, File::open(process.join("pagemap"))?);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else { continue };
        let bounds = range
            .split_once('-')
            .map(|(start, end)| (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)));
        let Some((Ok(start), Ok(end))) = bounds else { continue };
        if !rights.starts_with('r') {
            continue;
        }
        let mut at = start;
        while at < end {
            let length = (end - at).min(PIECE);
            read_present_pages(&memory, &pagemap, at, length, inspect);
            at += length;
        }
    }
    Ok(())
}

/// Reads the present pages of a range, adjacent ones in one piece. Other pages are not touched,
/// because a read would allocate them.
fn read_present_pages(
    memory: &File,
    pagemap: &File,
    start: u64,
    length: u64,
    inspect: &mut impl FnMut(&[u8]),
) {
    let pages = usize::try_from(length / PAGE).unwrap_or(0);
    let mut entries = vec![0; pages * 8];
    if pagemap.read_exact_at(&mut entries, start / PAGE * 8).is_err() {
        return;
    }
    // Bits 63 and 62: the page is in memory, or swapped out.
    let present: Vec<bool> = entries.chunks_exact(8).map(|entry| entry[7] & 0xc0 != 0).collect();
    let mut page = 0;
    while page < pages {
        let count = present[page..].iter().take_while(|present| **present).count();
        if count > 0 {
            // The piece starts a page early, so that a value across two pieces is complete in one.
            let from = start + page as u64 * PAGE;
            let before = if page == 0 { PAGE.min(from) } else { 0 };
            let mut bytes = vec![0; count * 4096 + usize::try_from(before).unwrap_or(0)];
            let whole = memory.read_exact_at(&mut bytes, from - before).is_ok();
            let part = &mut bytes[usize::try_from(before).unwrap_or(0)..];
            if whole {
                inspect(&bytes);
            } else if memory.read_exact_at(part, from).is_ok() {
                inspect(part);
            }
        }
        page += count.max(1);
    }
}

/// Reads the memory files that a process has open, which need not be mapped: gVisor has the memory
/// of its sandbox in one.
fn read_memory_files(process: &Path, inspect: &mut impl FnMut(&[u8])) -> std::io::Result<()> {
    for entry in fs::read_dir(process.join("fd"))?.flatten() {
        let link = fs::read_link(entry.path()).unwrap_or_default();
        if !link.to_string_lossy().starts_with("/memfd:") {
            continue;
        }
        let Ok(mut file) = File::open(entry.path()) else { continue };
        let mut at = 0;
        // Holes are skipped. The seek fails after the last data.
        while let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
            let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data)).unwrap_or(data);
            if hole <= data {
                break;
            }
            let mut from = data;
            while from < hole {
                file.seek(SeekFrom::Start(from))?;
                let mut bytes = Vec::new();
                (&file).take((hole - from).min(PIECE)).read_to_end(&mut bytes)?;
                if bytes.is_empty() {
                    break;
                }
                inspect(&bytes);
                // A value across two pieces is complete in the next one.
                from += if from + PIECE < hole { PIECE - PAGE } else { hole - from };
            }
            at = hole;
        }
    }
    Ok(())
}

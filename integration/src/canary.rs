//! The search for a value that must not be where it is not meant to be: in memory, on command lines, in environments, in files.
//!
//! A search that finds nothing proves nothing unless it would have found something. So each is told of a second text that is
//! where the value would be, and fails if it does not find that.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::{Running, docker};

/// Read at once, and compared in one piece.
const PIECE: u64 = 1 << 20;

/// Of a page on every host these tests run on.
const PAGE: u64 = 4096;

/// Programs that act for a sandbox without being of its family: a daemon's, a runtime's.
const HELPERS: [&str; 7] =
    ["dockerd", "containerd", "containerd-shim", "runsc", "runc", "crun", "conmon"];

/// Whether the needle is in there.
pub fn holds(bytes: &[u8], needle: &[u8]) -> bool {
    // By a byte in its middle, which is rarer than how words begin. Page by page: most have not even that one, and the standard
    // library, which is optimized where a test is not, sees it quickly.
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

/// What was found where.
#[derive(Debug, Default)]
pub struct Search {
    /// Where the value was: a process with what of it, or a file.
    pub found: Vec<String>,
    /// Whether the memory that was searched has held the other text.
    pub control: bool,
    /// Bytes of memory that were looked at.
    pub bytes: u64,
}

/// Searches everything of a run but `chitin` itself, which holds the value: memory of the guest or of the sandbox's processes, command
/// lines, environments, and the files of its directory, of the container tiers and of a Docker daemon.
///
/// `control` is a text that is in the sandbox's memory.
pub fn search(running: &Running, canary: &str, control: &str) -> Search {
    let mut search = Search::default();
    for process in processes(running) {
        search.process(&process, canary.as_bytes(), control.as_bytes());
    }
    for dir in places(running) {
        search.files(&dir, canary.as_bytes());
    }
    search
}

/// Asserts that a value is nowhere, by a search that has found `control` in the sandbox's memory.
#[track_caller]
pub fn assert_absent(running: &Running, canary: &str, control: &str) {
    let Search { found, control, bytes } = search(running, canary, control);
    assert!(found.is_empty(), "the value is in {found:?}");
    assert!(control && bytes > 1 << 20, "the search of {bytes} bytes has not found what is there");
}

/// Asserts that a value is on no command line, in no environment but that of `chitin`, and in no file, but may be in memory.
#[track_caller]
pub fn assert_unwritten(running: &Running, canary: &str) {
    let mut search = Search::default();
    for process in processes(running) {
        search.lines(&process, canary.as_bytes());
    }
    for dir in places(running) {
        search.files(&dir, canary.as_bytes());
    }
    assert!(search.found.is_empty(), "the value is in {:?}", search.found);
}

/// Asserts that nothing that outlives a run, which has ended, holds a value: no file, and no process that acted for it. But for a
/// Docker daemon, which hands on what goes to its containers and does not wipe it.
#[track_caller]
pub fn assert_gone(running: &Running, canary: &str) {
    let Search { mut found, .. } = search(running, canary, canary);
    found.retain(|place| !(place.starts_with("memory of ") && place.contains("dockerd")));
    assert!(found.is_empty(), "the value is in {found:?}");
}

/// Asserts that a value is in no file below these directories.
#[track_caller]
pub fn assert_no_file_holds(dirs: &[&Path], canary: &str) {
    let mut search = Search::default();
    for dir in dirs {
        search.files(dir, canary.as_bytes());
    }
    assert!(search.found.is_empty(), "the value is in {:?}", search.found);
}

/// All processes of a run; those of other runs at the same time, which have nothing of this one's, as well.
fn processes(running: &Running) -> Vec<PathBuf> {
    let own = running.processes();
    let namespace = |process: &Path| fs::read_link(process.join("ns/pid")).ok();
    let ours = namespace(Path::new("/proc/self"));
    let entries = fs::read_dir("/proc").expect("list processes").flatten();
    let all = entries.map(|entry| entry.path()).filter(|path| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
    });
    let related = |process: &PathBuf| {
        let helps = exe(process).file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            HELPERS.iter().any(|helper| name == *helper || name.starts_with("containerd-shim"))
        });
        own.contains(process)
            || helps
            || namespace(process).is_some_and(|other| ours.as_ref() != Some(&other))
    };
    all.filter(related).collect()
}

/// Where a run and its tier write.
fn places(running: &Running) -> Vec<PathBuf> {
    let mut places = vec![running.dir().to_owned(), "/run/chitin".into()];
    if std::env::var_os("DOCKER_HOST").is_some()
        && let Some(dir) = Path::new(docker::host().trim_start_matches("unix://")).parent()
    {
        // Its log, and of each container the configuration, the state and the log; not its layers.
        places.extend(["log", "data/containers", "exec"].map(|name| dir.join(name)));
    }
    places
}

fn exe(process: &Path) -> PathBuf {
    fs::read_link(process.join("exe")).unwrap_or_default()
}

impl Search {
    /// The two lists that everybody of the same user can read.
    fn lines(&mut self, process: &Path, canary: &[u8]) {
        for name in ["cmdline", "environ"] {
            let bytes = fs::read(process.join(name)).unwrap_or_default();
            // The variable was given to `chitin` by whoever called it; it must not pass it on.
            if holds(&bytes, canary) && !(name == "environ" && exe(process).ends_with("chitin")) {
                self.found.push(format!(
                    "{name} of {} ({})",
                    process.display(),
                    exe(process).display()
                ));
            }
        }
    }

    fn process(&mut self, process: &Path, canary: &[u8], control: &[u8]) {
        self.lines(process, canary);
        if exe(process).ends_with("chitin") {
            return;
        }
        let (mut leaked, mut seen, mut read) = (false, false, 0);
        let mut look = |bytes: &[u8]| {
            leaked |= holds(bytes, canary);
            seen |= holds(bytes, control);
            read += bytes.len() as u64;
        };
        // A process that ends meanwhile has no memory any more.
        let _ = mapped(process, &mut look);
        let _ = in_memory_files(process, &mut look);
        if leaked {
            self.found.push(format!(
                "memory of {} ({})",
                process.display(),
                exe(process).display()
            ));
        }
        self.control |= seen;
        self.bytes += read;
    }

    fn files(&mut self, path: &Path, canary: &[u8]) {
        let Ok(metadata) = path.symlink_metadata() else { return };
        if metadata.is_dir() {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                self.files(&entry.path(), canary);
            }
        } else if metadata.is_file() && fs::read(path).is_ok_and(|bytes| holds(&bytes, canary)) {
            self.found.push(path.display().to_string());
        }
    }
}

/// All memory of a process that is there and can be read: of a monitor, that of its guest.
fn mapped(process: &Path, look: &mut impl FnMut(&[u8])) -> std::io::Result<()> {
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
            pieces(&memory, &pagemap, at, length, look);
            at += length;
        }
    }
    Ok(())
}

/// The pages of a range that are there, neighbours in one piece. Others are not touched: that would make them be there.
fn pieces(memory: &File, pagemap: &File, start: u64, length: u64, look: &mut impl FnMut(&[u8])) {
    let pages = usize::try_from(length / PAGE).unwrap_or(0);
    let mut entries = vec![0; pages * 8];
    if pagemap.read_exact_at(&mut entries, start / PAGE * 8).is_err() {
        return;
    }
    // In memory, or swapped out.
    let there: Vec<bool> = entries.chunks_exact(8).map(|entry| entry[7] & 0xc0 != 0).collect();
    let mut page = 0;
    while page < pages {
        let count = there[page..].iter().take_while(|there| **there).count();
        if count > 0 {
            // With a little of what comes before, so that what straddles two pieces is in one of them whole.
            let from = start + page as u64 * PAGE;
            let before = if page == 0 { PAGE.min(from) } else { 0 };
            let mut bytes = vec![0; count * 4096 + usize::try_from(before).unwrap_or(0)];
            let whole = memory.read_exact_at(&mut bytes, from - before).is_ok();
            let part = &mut bytes[usize::try_from(before).unwrap_or(0)..];
            if whole {
                look(&bytes);
            } else if memory.read_exact_at(part, from).is_ok() {
                look(part);
            }
        }
        page += count.max(1);
    }
}

/// Files in memory that a process holds open, which need not be mapped: gVisor keeps the memory of its sandbox in one.
fn in_memory_files(process: &Path, look: &mut impl FnMut(&[u8])) -> std::io::Result<()> {
    for entry in fs::read_dir(process.join("fd"))?.flatten() {
        let link = fs::read_link(entry.path()).unwrap_or_default();
        if !link.to_string_lossy().starts_with("/memfd:") {
            continue;
        }
        let Ok(mut file) = File::open(entry.path()) else { continue };
        let mut at = 0;
        // Holes are left out; past the last data there is none.
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
                look(&bytes);
                // What straddles two pieces is in the next one whole.
                from += if from + PIECE < hole { PIECE - PAGE } else { hole - from };
            }
            at = hole;
        }
    }
    Ok(())
}

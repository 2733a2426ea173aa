//! What the container tiers have in common: the agent is PID 1, the channel its standard input and output, the root the same
//! read-only one that microVMs have, as an archive.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{Artifacts, Error, LaunchSpec, ReadOnlyPath, Unavailable};

/// What every container runs.
pub(crate) const AGENT: [&str; 2] = ["/init", "--stdio"];

pub(crate) const HOST_NAME: &str = "chitin";

/// What the agent needs, and the workload loses before it starts: to become another user and leave nothing in the bounding
/// set, to end that user's processes, to copy files in and out for it, and to hand net bind on.
pub(crate) const CAPABILITIES: [&str; 8] =
    ["SETUID", "SETGID", "SETPCAP", "KILL", "CHOWN", "FOWNER", "DAC_OVERRIDE", "NET_BIND_SERVICE"];

/// In a container the agent is there within a second. Longer than a loaded, emulated machine takes, shorter than a person's
/// patience.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(60);

/// The agent ends with its channel, and the container with the agent, in milliseconds.
pub(crate) const STOP_LIMIT: Duration = Duration::from_secs(10);

/// What a container may use of this host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub vcpus: u8,
    /// Bytes.
    pub memory: u64,
    /// Processes and threads of agent and workload together.
    pub tasks: u32,
    /// Bytes that may be written, if less than the memory allows.
    pub disk: Option<u64>,
}

impl Limits {
    pub fn of(plan: &LaunchSpec) -> Limits {
        let memory = plan.spec.memory_bytes();
        // The agent is one, and its copying another.
        let tasks = plan.tasks.saturating_add(AGENT_TASKS);
        Limits { vcpus: plan.spec.vcpus, memory, tasks, disk: plan.disk_bytes }
    }
}

/// The agent itself, and the most of its copy jobs.
const AGENT_TASKS: u32 = 8;

/// What can be written: each a tmpfs.
pub(crate) struct Scratch {
    pub path: &'static str,
    pub mode: &'static str,
    pub owner: u32,
    pub bytes: u64,
}

/// Their pages count as the sandbox's memory. Together they leave a fifth of it, so that a workload that fills them is told
/// ENOSPC, and not killed; or they have what it may write at all, if that is less.
pub(crate) fn scratch(limits: Limits) -> [Scratch; 3] {
    let bytes = writable(limits);
    [
        Scratch { path: "/work", mode: "0755", owner: 1000, bytes: bytes / 8 * 5 },
        Scratch { path: "/tmp", mode: "1777", owner: 0, bytes: bytes / 4 },
        Scratch { path: "/dev/shm", mode: "1777", owner: 0, bytes: bytes / 8 },
    ]
}

fn writable(limits: Limits) -> u64 {
    limits.disk.unwrap_or(u64::MAX).min(limits.memory / 5 * 4)
}

/// The bytes of each [place](RootArchive::places). Together they have the fifth that [`scratch`] leaves, and no workload
/// writes to them.
pub(crate) fn place_bytes(limits: Limits, places: usize) -> u64 {
    writable(limits) / 4 / u64::try_from(places.max(1)).unwrap_or(u64::MAX)
}

/// The root as an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RootArchive {
    pub path: PathBuf,
    /// Its SHA-256, in hexadecimal.
    pub digest: String,
}

impl RootArchive {
    /// The one beside the root image.
    pub fn of(artifacts: &Artifacts) -> Result<RootArchive, Unavailable> {
        #[derive(Deserialize)]
        struct Manifest {
            tar_sha256: String,
        }
        let path = artifacts.root_image.with_extension("tar");
        let missing =
            |reason| Unavailable { reason, remedy: "build it with `cargo xtask rootfs`".into() };
        if !path.is_file() {
            return Err(missing(format!("no archive of the root at {}", path.display())));
        }
        let manifest = artifacts.root_image.with_extension("json");
        let read = std::fs::read(&manifest).map_err(|error| error.to_string());
        let digest = read.and_then(|json| {
            serde_json::from_slice::<Manifest>(&json).map_err(|error| error.to_string())
        });
        match digest {
            Ok(Manifest { tar_sha256: digest }) if is_digest(&digest) => {
                Ok(RootArchive { path, digest })
            }
            Ok(_) => Err(missing(format!("no SHA-256 in {}", manifest.display()))),
            Err(error) => Err(missing(format!("{}: {error}", manifest.display()))),
        }
    }
}

impl RootArchive {
    /// That it is what the manifest says.
    pub fn check(&self) -> Result<(), String> {
        let failed = |error: io::Error| format!("{}: {error}", self.path.display());
        let mut hash = Sha256::new();
        io::copy(&mut File::open(&self.path).map_err(failed)?, &mut hash).map_err(failed)?;
        self.is(&format!("{:x}", hash.finalize()))
    }

    /// That its digest is this one.
    pub fn is(&self, found: &str) -> Result<(), String> {
        match found == self.digest {
            true => Ok(()),
            false => Err(format!(
                "{} is not what root.json says: its SHA-256 is {found}",
                self.path.display()
            )),
        }
    }
}

impl RootArchive {
    /// Directories that are to be mounted, so that the agent can put these into a root that is read-only for it too: the
    /// topmost that the image does not have, or has empty. What the image has is hidden by none.
    pub fn places(&self, wanted: &[ReadOnlyPath]) -> Result<Vec<PathBuf>, Error> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let failed = |source| Error::Host { what: "read the archive of the root", source };
        let content = File::open(&self.path).and_then(content).map_err(failed)?;
        let mut places = Vec::new();
        for fixed in wanted {
            let place = place(&content, fixed)?;
            if !places.contains(&place) {
                places.push(place);
            }
        }
        Ok(places)
    }
}

/// What can be found at a path of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Empty,
    Filled,
    /// A file or a link.
    Other,
}

/// Every path of an archive, without the slash at its beginning.
fn content(archive: File) -> io::Result<BTreeMap<PathBuf, Entry>> {
    let mut content = BTreeMap::new();
    for entry in tar::Archive::new(archive).entries_with_seek()? {
        let entry = entry?;
        let plain = |part: &Component| matches!(part, Component::Normal(_));
        let path: PathBuf = entry.path()?.components().filter(plain).collect();
        let directory = entry.header().entry_type().is_dir();
        for above in path.ancestors().skip(1) {
            content.insert(above.to_owned(), Entry::Filled);
        }
        content.entry(path).or_insert(if directory { Entry::Empty } else { Entry::Other });
    }
    Ok(content)
}

fn place(
    content: &BTreeMap<PathBuf, Entry>,
    ReadOnlyPath { path, directory }: &ReadOnlyPath,
) -> Result<PathBuf, Error> {
    let refused = |reason| Err(Error::Place { path: path.clone(), reason });
    let inner: PathBuf = path.components().skip(1).collect();
    let mut place = PathBuf::new();
    for part in inner.components() {
        place.push(part);
        match content.get(&place) {
            Some(Entry::Filled) => {}
            Some(Entry::Other) => {
                return refused(format!("the image has something else at /{}", place.display()));
            }
            None | Some(Entry::Empty) if place != inner || *directory => {
                return Ok(Path::new("/").join(place));
            }
            None | Some(Entry::Empty) => break,
        }
    }
    let full = inner.parent().unwrap_or(Path::new("")).display();
    refused(format!(
        "/{full} belongs to the image and is read-only: choose a directory that the image does not have"
    ))
}

/// It becomes a directory's and an image's name.
fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// A name that no other container has.
pub(crate) fn new_name() -> Result<String, Error> {
    let mut random = [0; 8];
    getrandom::fill(&mut random)
        .map_err(|error| Error::Host { what: "get random bytes", source: error.into() })?;
    Ok(format!("chitin-{:016x}", u64::from_ne_bytes(random)))
}

/// The end of what the agent and its runtime have to say. Untrusted text.
#[derive(Debug, Clone, Default)]
pub(crate) struct Log(Arc<Mutex<VecDeque<u8>>>);

impl Log {
    /// Some hundred lines.
    const KEPT: usize = 16 * 1024;

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        // Bytes are whole at every moment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn push(&self, bytes: &[u8]) {
        let mut kept = self.lock();
        kept.extend(bytes);
        let surplus = kept.len().saturating_sub(Log::KEPT);
        kept.drain(..surplus);
    }

    pub fn text(&self) -> String {
        let bytes: Vec<u8> = self.lock().iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The last line that says something.
    pub fn last_line(&self) -> Option<String> {
        let text = self.text();
        text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
    }
}

/// A process by which a container is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owner {
    /// The boot and the namespace in which its number means something.
    place: String,
    pid: u32,
    /// Clock ticks since that boot: with it a number that was given again is another process.
    started: u64,
}

impl Owner {
    pub fn this() -> Owner {
        Owner::of(std::process::id())
    }

    pub fn of(pid: u32) -> Owner {
        Owner { place: Owner::here(), pid, started: started(pid).unwrap_or(0) }
    }

    fn here() -> String {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        format!("{}/{}", boot.trim(), namespace.display())
    }

    pub fn parse(text: &str) -> Option<Owner> {
        let mut words = text.split(' ');
        let (place, pid, started) = (words.next()?, words.next()?, words.next()?);
        Some(Owner { place: place.into(), pid: pid.parse().ok()?, started: started.parse().ok()? })
    }

    /// Known to have ended. Of another machine's processes nothing is known.
    pub fn has_ended(&self) -> bool {
        self.place == Owner::here() && started(self.pid) != Some(self.started)
    }

    /// Kills it, and whatever is in its process group, which it leads.
    pub fn kill(&self) {
        if let Some(pid) = self.pid.try_into().ok().and_then(Pid::from_raw)
            && self.place == Owner::here()
            && !self.has_ended()
        {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.place, self.pid, self.started)
    }
}

/// When a process was started; none if there is no such process.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Behind the name, which may hold anything; it is the 22nd of all fields.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_keeps_its_end() {
        let log = Log::default();
        log.push(&vec![b'x'; 3 * Log::KEPT]);
        log.push(b"\nwhy\n\n");
        assert_eq!(log.text().len(), Log::KEPT);
        assert_eq!(log.last_line().as_deref(), Some("why"));
        assert_eq!(Log::default().last_line(), None);
    }

    #[test]
    fn a_place_is_a_directory_that_the_image_does_not_have_or_has_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.tar");
        let mut tar = tar::Builder::new(File::create(&path).unwrap());
        for name in ["./", "./mnt/", "./etc/", "./usr/", "./usr/share/"] {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Directory);
            header.set_size(0);
            tar.append_data(&mut header, name, io::empty()).unwrap();
        }
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        tar.append_data(&mut header, "./etc/passwd", "root\n".as_bytes()).unwrap();
        tar.into_inner().unwrap();
        let archive = RootArchive { path, digest: String::new() };
        let places = |wanted: &[(&str, bool)]| {
            let wanted: Vec<ReadOnlyPath> = wanted
                .iter()
                .map(|(path, directory)| ReadOnlyPath { path: path.into(), directory: *directory })
                .collect();
            archive.places(&wanted).map_err(|error| error.to_string())
        };
        let paths = |list: &[&str]| Ok(list.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(places(&[("/shared/a/b", false), ("/shared/c", true)]), paths(&["/shared"]));
        assert_eq!(places(&[("/mnt/a", false), ("/data", true)]), paths(&["/mnt", "/data"]));
        assert_eq!(places(&[("/etc/app/a", false)]), paths(&["/etc/app"]));
        assert_eq!(places(&[("/usr/share/a", false)]), paths(&["/usr/share"]));
        for (path, directory, why) in [
            ("/config", false, "/ belongs to the image"),
            ("/etc/config", false, "/etc belongs to the image"),
            ("/etc", true, "/ belongs to the image"),
            ("/etc/passwd/a", false, "something else at /etc/passwd"),
        ] {
            let refused = places(&[(path, directory)]).unwrap_err();
            assert!(refused.contains(path) && refused.contains(why), "{refused}");
        }
    }

    #[test]
    fn scratch_leaves_memory_for_processes() {
        let memory = 256 << 20;
        let all = |disk| {
            let limits = Limits { vcpus: 1, memory, tasks: 1, disk };
            scratch(limits).iter().map(|scratch| scratch.bytes).sum::<u64>()
        };
        assert!(all(None) <= memory / 5 * 4);
        let limits = Limits { vcpus: 1, memory, tasks: 1, disk: None };
        assert!(all(None) + 3 * place_bytes(limits, 3) <= memory);
        assert_eq!(all(Some(64 << 20)), 64 << 20);
    }

    #[test]
    fn only_a_digest_becomes_a_name() {
        assert!(is_digest(&"0f".repeat(32)));
        for bad in ["", "0f", &"0F".repeat(32), &"..".repeat(32), &"0f".repeat(33)] {
            assert!(!is_digest(bad), "{bad}");
        }
    }

    #[test]
    fn an_owner_is_known_to_have_ended_only_where_its_number_means_something() {
        let own = Owner::this();
        assert_eq!(Owner::parse(&own.to_string()), Some(own.clone()));
        assert!(!own.has_ended());
        let before = Owner { started: own.started.wrapping_sub(1), ..own.clone() };
        assert!(before.has_ended(), "its number was given again");
        assert!(!Owner { place: "another boot".into(), ..before }.has_ended());
        for bad in ["", "0.1.0", "place 1", "place x 1"] {
            assert_eq!(Owner::parse(bad), None, "{bad}");
        }
    }
}

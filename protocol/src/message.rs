//! Control messages, one enum a direction, so that a message going the wrong way cannot be expressed.
//!
//! The encoding is postcard's: enum variants by position, integers as varints, sequences with a length.
//! Positions are wire surface: add at the end, never reorder. `tests/wire.rs` freezes them.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

use crate::StreamId;

/// Largest secret in bytes: the value with its message fits a control frame, and a memfd of it one 64 KiB pipe.
pub const MAX_SECRET: usize = 64 * 1024;

/// The least entropy of a [`Reseed`] in bytes: the size of the kernel generator's key.
pub const MIN_ENTROPY: usize = 32;

/// The most endpoints of one sandbox: each distinct port costs the agent a listener, each name a comparison per lookup.
pub const MAX_ENDPOINTS: usize = 256;

/// Host → guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// Start a process. Answered by [`ToHost::Exited`] with the same `process`, sooner or later.
    Start(Start),
    /// Send a signal to a process and all its descendants that kept its process group. Unknown ids are ignored: the process may just have ended.
    Signal {
        /// The process, as named in its `Start`.
        process: u32,
        /// Linux signal number.
        signal: u8,
    },
    /// Hand over a credential, in place of a former one of its name. Answered by [`ToHost::Done`]; every later `Start` has it,
    /// and processes that inherited the former one in memory find this one in its place.
    Secret(Secret),
    /// Create `path` from the tree the host sends on `stream`. Answered by [`ToHost::Done`].
    Put {
        /// Names the answer.
        request: u32,
        /// Absolute path in the sandbox that the root of the tree becomes.
        path: Vec<u8>,
        /// Carries the tree, host → guest.
        stream: StreamId,
    },
    /// Send what is at `path` as a tree on `stream`. Answered by [`ToHost::Done`] after the stream has ended.
    Get {
        /// Names the answer.
        request: u32,
        /// Absolute path in the sandbox.
        path: Vec<u8>,
        /// Carries the tree, guest → host.
        stream: StreamId,
    },
    /// Make the sandbox ready to be saved as a template. The agent freezes every process, answers with
    /// [`ToHost::Done`], closes the channel and connects again; the state that is saved is the one in which that
    /// connection is not answered yet. Refused while the sandbox holds credentials, or has held any, or copies are under way.
    Freeze {
        /// Names the answer.
        request: u32,
    },
    /// Become a sandbox of one's own: the first message on a channel opened after [`ToGuest::Freeze`], and allowed only
    /// there. Frozen processes run on only after it has been obeyed. Answered by [`ToHost::Done`].
    Reseed(Reseed),
    /// Hold every process that is started from now on to this, for good. Answered by [`ToHost::Done`]. Refused a second time,
    /// while processes run, and where any part of it cannot be done.
    Confine(Confine),
    /// Make these endpoints reachable: answer their names, take connections to them. Answered by [`ToHost::Done`], once it
    /// is so. Refused while it is so already; a freeze ends it.
    Egress {
        /// Names the answer.
        request: u32,
        /// What may be dialled, at most [`MAX_ENDPOINTS`]. The host checks each dial again.
        endpoints: Vec<Endpoint>,
    },
    /// Connect `stream` with the server that listens on this port of the sandbox's loopback address. Answered by
    /// [`ToHost::Done`]; on failure the stream is reset as well.
    Connect {
        /// Names the answer.
        request: u32,
        /// TCP port of 127.0.0.1.
        port: u16,
        /// Carries the connection, both ways.
        stream: StreamId,
    },
    /// Take a credential back. Answered by [`ToHost::Done`], also if there is none of that name: no later `Start` has it, and
    /// what was delivered in memory is overwritten and emptied, also where it was inherited. A [`ToGuest::Secret`] of its
    /// name gives it anew.
    Revoke {
        /// Names the answer.
        request: u32,
        /// As in [`Secret`].
        name: String,
    },
}

/// What a policy leaves of a process's rights, beyond what no process has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confine {
    /// Names the answer.
    pub request: u32,
    /// Which system calls there are.
    pub system_calls: SystemCalls,
    /// What may be opened beside the system and the scratch directories; `None`: everything.
    pub files: Option<Vec<FileRule>>,
    /// Processes and threads at once, where the agent has a cgroup, of a microVM or of gVisor; `None`: the agent's own limit.
    pub max_tasks: Option<u32>,
    /// Bytes that may be written, where the agent has made the file system; `None`: its own limit.
    pub max_disk: Option<u64>,
}

/// A choice of system calls. `docs/policy.md` has the lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SystemCalls {
    /// All but those that no workload needs.
    DefaultAllow,
    /// Those that workloads need, and no others.
    DefaultDeny,
}

/// A file, or a directory and all below it, that may be opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRule {
    /// Absolute path in the sandbox. It exists.
    pub path: Vec<u8>,
    /// Whether it may also be written.
    pub writable: bool,
}

/// What makes one restored sandbox differ from the next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reseed {
    /// Names the answer.
    pub request: u32,
    /// At least [`MIN_ENTROPY`] bytes from the host's generator, for the guest kernel's.
    pub entropy: SecretBytes,
    /// The time, nanoseconds since 1970 UTC.
    pub unix_ns: u64,
    /// Who this sandbox is: random, unique. Its host name and boot id are made of it.
    pub instance: [u8; 16],
}

/// Guest → host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// The first message: the agent is up. Both times are `CLOCK_BOOTTIME` of the guest in nanoseconds.
    Ready {
        /// When the agent's first instruction ran.
        started_ns: u64,
        /// When this message was made.
        ready_ns: u64,
    },
    /// A process has ended. What it wrote last may still be on its way: stdout and stderr have ends of their own, so
    /// that a host that does not read them learns of this all the same.
    Exited {
        /// The process, as named in its `Start`.
        process: u32,
        /// How it ended.
        exit: Exit,
        /// What it and its waited-for children used.
        usage: Usage,
    },
    /// Answer to a request.
    Done {
        /// The request's name.
        request: u32,
        /// `Err` says what failed and on what.
        result: Result<(), Failure>,
    },
    /// A process has connected to an endpoint: connect `stream` with it. There is no answer: the stream carries what the
    /// endpoint says, and is reset if it cannot be had. Nothing but the endpoint is to be believed of it.
    Dial {
        /// A name in lower case, without a final dot.
        host: String,
        /// TCP port.
        port: u16,
        /// Carries the connection, both ways.
        stream: StreamId,
    },
    /// A process has asked for a name that may not be dialled, for the first time.
    Denied {
        /// The name in lower case, without a final dot. Untrusted text.
        host: String,
    },
}

/// What may be dialled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// A name in lower case, without a final dot.
    pub host: String,
    /// Whether every name below it is meant, and not it.
    pub wildcard: bool,
    /// TCP port.
    pub port: u16,
}

impl Endpoint {
    /// Whether a name, in lower case and without a final dot, is meant by it.
    pub fn names(&self, host: &str) -> bool {
        match self.wildcard {
            false => host == self.host,
            true => {
                // Not the domain itself, nor another one that ends alike.
                host.strip_suffix(&self.host)
                    .is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
            }
        }
    }
}

/// A process to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The host's name for it; not a pid. Names are not reused.
    pub process: u32,
    /// Program and arguments; the program is looked up in the `PATH` of `env` if it has no slash.
    pub argv: Vec<Vec<u8>>,
    /// The whole environment, secrets excepted: nothing is inherited from the agent.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Working directory.
    pub cwd: Vec<u8>,
    /// User id.
    pub uid: u32,
    /// Group id; there are no supplementary groups.
    pub gid: u32,
    /// Carries standard input, host → guest. `/dev/null` if absent.
    pub stdin: Option<StreamId>,
    /// Carries standard output, guest → host.
    pub stdout: StreamId,
    /// Carries standard error, guest → host.
    pub stderr: StreamId,
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// It exited with a code.
    Code(u8),
    /// A signal ended it.
    Signal(u8),
    /// It never ran.
    NotStarted {
        /// Why, as a class.
        error: StartError,
        /// Why, in words: what failed and on what.
        failure: Failure,
    },
}

/// Why a process could not be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartError {
    /// There is no such program (a shell's 127).
    NotFound,
    /// It is there and cannot be executed (a shell's 126).
    NotExecutable,
    /// Anything else: working directory, memory, a limit.
    Other,
}

/// What a process used, from `wait4(2)`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// CPU time in user mode, microseconds.
    pub user_us: u64,
    /// CPU time in the kernel, microseconds.
    pub system_us: u64,
    /// Largest resident set, KiB, as its kernel counts it: Linux in steps of 32 pages, and without what a microVM maps of its image, so
    /// that a small program may have 0.
    pub max_rss_kib: u64,
}

/// Something failed inside the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{what}: {}", std::io::Error::from_raw_os_error(*errno))]
pub struct Failure {
    /// Operation and object, e.g. `create /work/data`.
    pub what: String,
    /// Linux errno.
    pub errno: i32,
}

/// A credential on its way into the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret {
    /// Names the answer.
    pub request: u32,
    /// An environment variable's name: `[A-Za-z_][A-Za-z0-9_]*`, at most 128 bytes.
    pub name: String,
    /// The value, at most [`MAX_SECRET`] bytes.
    pub value: SecretBytes,
    /// How the workload gets it.
    pub delivery: Delivery,
}

/// How a workload gets a credential that enters the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Delivery {
    /// A memfd that the workload cannot write, inherited; `NAME_FILE=/proc/self/fd/N` says which.
    Memory,
    /// The environment variable `NAME`.
    Env,
}

/// Bytes that are wiped when dropped and never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretBytes(Vec<u8>);

impl SecretBytes {
    /// Takes the bytes over. Give it the only copy.
    pub fn new(bytes: Vec<u8>) -> SecretBytes {
        SecretBytes(bytes)
    }

    /// The value itself. Every caller is a place where it can leak.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for SecretBytes {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBytes({} bytes)", self.0.len())
    }
}

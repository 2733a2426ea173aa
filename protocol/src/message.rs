//! Control messages: one enum for each direction, so that a message in the wrong direction cannot
//! be expressed.
//!
//! The encoding is postcard's: enum variants by position, integers as varints, sequences with a
//! length. Positions are part of the wire format: add variants and fields at the end, never
//! reorder. `tests/wire.rs` freezes them.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

use crate::{ProcessId, RequestId, StreamId};

/// The maximum size of a secret in bytes.
///
/// Its message then fits a control frame, and the files of all secrets of a sandbox fit 4 MiB.
pub const MAX_SECRET: usize = 64 * 1024;

/// The minimum entropy of a [`Reseed`] in bytes: the key size of the kernel's random generator.
pub const MIN_ENTROPY: usize = 32;

/// The maximum number of endpoints of one sandbox.
///
/// Each distinct port costs the agent a listener, and each name a comparison per DNS query.
pub const MAX_ENDPOINTS: usize = 256;

/// A message from the host to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// Starts a process. The agent answers with [`ToHost::Exited`] and the same `process` when the
    /// process ends, or when it cannot be started.
    Start(Start),
    /// Sends a signal to a process and to all its descendants in the same process group.
    ///
    /// Unknown ids are ignored, because the process may have ended while the message was on its
    /// way.
    Signal {
        /// The id given in [`Start`].
        process: ProcessId,
        /// The Linux signal number.
        signal: u8,
    },
    /// Delivers a credential, and replaces an earlier one of the same name.
    ///
    /// Every later [`Start`] receives it. Processes that inherited the earlier value in memory see
    /// the new value in its place. Answered by [`ToHost::Done`].
    Secret(Secret),
    /// Creates `path` from the tree that the host sends on `stream`. Answered by [`ToHost::Done`].
    Put {
        /// The id of this request.
        request: RequestId,
        /// The absolute path in the sandbox that becomes the root of the tree.
        path: Vec<u8>,
        /// Carries the tree from host to guest.
        stream: StreamId,
    },
    /// Requests the file or directory at `path` as a tree on `stream`. Answered by [`ToHost::Done`]
    /// after the stream has ended.
    Get {
        /// The id of this request.
        request: RequestId,
        /// The absolute path in the sandbox.
        path: Vec<u8>,
        /// Carries the tree from guest to host.
        stream: StreamId,
    },
    /// Prepares the sandbox to be saved as a template.
    ///
    /// The agent freezes every process, answers with [`ToHost::Done`], closes the channel and
    /// connects again. The host saves the sandbox before it accepts that connection. The agent
    /// refuses while the sandbox holds credentials, or has ever held one, or while copies are
    /// running.
    Freeze {
        /// The id of this request.
        request: RequestId,
    },
    /// Gives a restored copy its own identity, entropy and time.
    ///
    /// This is the first message on a channel that was opened after [`ToGuest::Freeze`], and
    /// allowed only there. Frozen processes continue only after it has been handled. Answered by
    /// [`ToHost::Done`].
    Reseed(Reseed),
    /// Restricts every process that is started from now on, permanently.
    ///
    /// The agent refuses a second restriction, a restriction while processes run, and one of which
    /// any part cannot be enforced. Answered by [`ToHost::Done`].
    Confine(Confine),
    /// Makes endpoints reachable: the agent answers DNS queries for their names and accepts
    /// connections to them.
    ///
    /// Answered by [`ToHost::Done`] once both are in place. Refused while egress is enabled. A
    /// freeze disables it.
    Egress {
        /// The id of this request.
        request: RequestId,
        /// The reachable endpoints, at most [`MAX_ENDPOINTS`]. The host checks every dial again.
        endpoints: Vec<Endpoint>,
    },
    /// Connects `stream` with the server that listens on a port of the sandbox's loopback address.
    ///
    /// Answered by [`ToHost::Done`]. On failure, the stream is reset as well.
    Connect {
        /// The id of this request.
        request: RequestId,
        /// The TCP port on 127.0.0.1.
        port: u16,
        /// Carries the connection in both directions.
        stream: StreamId,
    },
    /// Revokes a credential.
    ///
    /// No later [`Start`] receives it. A credential that was delivered in memory is overwritten and
    /// truncated, also in processes that inherited it. A later [`ToGuest::Secret`] of the same name
    /// delivers it again. Answered by [`ToHost::Done`], also if no credential has that name.
    Revoke {
        /// The id of this request.
        request: RequestId,
        /// The name given in [`Secret`].
        name: String,
    },
}

/// The restrictions of a policy, in addition to those that apply to every process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confine {
    /// The id of this request.
    pub request: RequestId,
    /// The allowed system calls.
    pub system_calls: SystemCalls,
    /// The paths that may be opened in addition to the system and the scratch directories.
    /// `None` allows all.
    pub files: Option<Vec<FileRule>>,
    /// The maximum number of processes and threads, if the agent has a cgroup, which it has in a
    /// microVM and on gVisor. `None` keeps the agent's own limit.
    pub max_tasks: Option<u32>,
    /// The maximum number of bytes written, if the agent created the file system. `None` keeps the
    /// agent's own limit.
    pub max_disk: Option<u64>,
}

/// A set of system calls. `docs/policy.md` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SystemCalls {
    /// All system calls, except those that no workload needs.
    DefaultAllow,
    /// Only the system calls that workloads need.
    DefaultDeny,
}

/// A file, or a directory and everything below it, that may be opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRule {
    /// The absolute path in the sandbox. It must exist.
    pub path: Vec<u8>,
    /// True if it may be opened for writing too.
    pub writable: bool,
}

/// The values that distinguish one restored sandbox from another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reseed {
    /// The id of this request.
    pub request: RequestId,
    /// At least [`MIN_ENTROPY`] bytes from the host's generator, for the guest kernel's.
    pub entropy: SecretBytes,
    /// The current time in nanoseconds since 1970-01-01 UTC.
    pub unix_ns: u64,
    /// A random, unique id of this sandbox. The agent derives host name and boot id from it.
    pub instance: [u8; 16],
}

/// A message from the guest to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// Reports that the agent is ready. This is its first message. Both times are `CLOCK_BOOTTIME`
    /// of the guest in nanoseconds.
    Ready {
        /// The time of the agent's first instruction.
        started_ns: u64,
        /// The time at which this message was created.
        ready_ns: u64,
    },
    /// Reports that a process has ended.
    ///
    /// The last output may still be on its way. Standard output and standard error end separately,
    /// so that a host which does not read them receives this message all the same.
    Exited {
        /// The id given in [`Start`].
        process: ProcessId,
        /// The exit status.
        exit: Exit,
        /// The resources used by the process and the children it waited for.
        usage: Usage,
    },
    /// Answers a request.
    Done {
        /// The id of the request.
        request: RequestId,
        /// The operation that failed and its object, or nothing.
        result: Result<(), Failure>,
    },
    /// Requests a connection from `stream` to an endpoint that a process has connected to.
    ///
    /// This message has no answer: the host connects the stream, or resets it if the endpoint is
    /// denied or unreachable. The host trusts nothing in this message beyond the choice of
    /// endpoint.
    Dial {
        /// A name in lower case, without a final dot.
        host: String,
        /// The TCP port.
        port: u16,
        /// Carries the connection in both directions.
        stream: StreamId,
    },
    /// Reports the first DNS query for a name that may not be dialled.
    Denied {
        /// The name in lower case, without a final dot. This is untrusted text.
        host: String,
    },
}

/// An endpoint that a process may connect to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// A name in lower case, without a final dot.
    pub host: String,
    /// True if the endpoint is every name below `host`, and not `host` itself.
    pub wildcard: bool,
    /// The TCP port.
    pub port: u16,
}

impl Endpoint {
    /// Returns true if `host`, in lower case and without a final dot, is a name of this endpoint.
    pub fn matches_host(&self, host: &str) -> bool {
        match self.wildcard {
            false => host == self.host,
            true => {
                // Neither the domain itself nor an unrelated name with the same ending matches.
                host.strip_suffix(&self.host)
                    .is_some_and(|rest| rest.len() > 1 && rest.ends_with('.'))
            }
        }
    }
}

/// A process to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The id of the process on this channel.
    pub process: ProcessId,
    /// The program and its arguments. A program without a slash is looked up in the `PATH` of
    /// `env`.
    pub argv: Vec<Vec<u8>>,
    /// The whole environment except the secrets. The process inherits nothing from the agent.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// The working directory.
    pub cwd: Vec<u8>,
    /// The user id.
    pub uid: u32,
    /// The group id. The process has no supplementary groups.
    pub gid: u32,
    /// Carries standard input from host to guest. `None` means `/dev/null`.
    pub stdin: Option<StreamId>,
    /// Carries standard output from guest to host.
    pub stdout: StreamId,
    /// Carries standard error from guest to host.
    pub stderr: StreamId,
}

/// The exit status of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// The process exited with this code.
    Code(u8),
    /// The process was terminated by this signal.
    Signal(u8),
    /// The process was not started.
    NotStarted {
        /// The class of the error.
        error: StartError,
        /// The operation that failed and its object.
        failure: Failure,
    },
}

/// The class of an error that prevented a process from starting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartError {
    /// The program does not exist (127 in a shell).
    NotFound,
    /// The program exists and cannot be executed (126 in a shell).
    NotExecutable,
    /// Any other cause: the working directory, memory, a limit.
    Other,
}

/// The resources that a process used, from `wait4(2)`, and the limits that it ran into.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// The CPU time in user mode, in microseconds.
    pub user_us: u64,
    /// The CPU time in the kernel, in microseconds.
    pub system_us: u64,
    /// The maximum resident set size in KiB, as the guest's kernel counts it.
    ///
    /// Linux counts in steps of 32 pages and without the pages that a microVM maps from its root
    /// image, so that a small program may report 0.
    pub max_rss_kib: u64,
    /// The limits of the sandbox that were reached meanwhile.
    pub reached: ReachedLimits,
}

/// The limits of a sandbox that were reached while a process ran, by that process or any other.
///
/// Only what the kernel has reported is in here: a limit that cannot be observed stays unset.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReachedLimits {
    /// The number of processes that the kernel killed because the sandbox had no memory left.
    pub oom_kills: u32,
    /// The number of times that a process or thread was refused because there were too many.
    pub refused_tasks: u32,
    /// True if a writable file system was full when the process ended.
    pub disk_full: bool,
}

impl ReachedLimits {
    /// Returns true if any limit was reached.
    pub fn any(self) -> bool {
        self != ReachedLimits::default()
    }

    /// Combines the observations of two observers of the same limits.
    pub fn merge(self, other: ReachedLimits) -> ReachedLimits {
        ReachedLimits {
            oom_kills: self.oom_kills.max(other.oom_kills),
            refused_tasks: self.refused_tasks.max(other.refused_tasks),
            disk_full: self.disk_full || other.disk_full,
        }
    }
}

/// A failed operation inside the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{operation}: {}", std::io::Error::from_raw_os_error(*errno))]
pub struct Failure {
    /// The operation and its object, for example `create /work/data`.
    pub operation: String,
    /// The Linux error number.
    pub errno: i32,
}

/// A credential to deliver into the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret {
    /// The id of this request.
    pub request: RequestId,
    /// The name of an environment variable: `[A-Za-z_][A-Za-z0-9_]*`, at most 128 bytes.
    pub name: String,
    /// The value, at most [`MAX_SECRET`] bytes.
    pub value: SecretBytes,
    /// The form in which the workload receives it.
    pub delivery: Delivery,
}

/// The form in which a workload receives a credential that enters the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Delivery {
    /// A file in memory that the workload cannot change. `NAME_FILE` is its path.
    Memory,
    /// The environment variable `NAME`.
    Env,
}

/// Bytes that are zeroed when dropped and never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SecretBytes(Vec<u8>);

impl SecretBytes {
    /// Takes ownership of the bytes. The caller must not keep another copy.
    pub fn new(bytes: Vec<u8>) -> SecretBytes {
        SecretBytes(bytes)
    }

    /// Returns the value. Every caller is a place where it can leak.
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

//! Copies of file trees into and out of the sandbox. Each is a job with a thread, which may wait
//! for a file system, at one end of a pipe, the other end of which the event loop pumps.
//!
//! ```text
//!   requested ──▶ running ──(thread done; copy out: its stream ended)──▶ Done sent, forgotten
//! ```

mod worker;

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use chitin_protocol::{Failure, Fault, StreamId, ToHost, Unexpected};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;

use crate::cgroup::Cgroups;
use crate::error::{SystemError, make_failure};
use crate::io::transport::Transport;
use crate::log_line;
use worker::{Outcome, Workers};

/// The most jobs at the same time. Each holds a descriptor for each level of its tree, at most 128,
/// and a thread with its buffers.
const MAX_JOBS: usize = 8;

/// The direction of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyDirection {
    /// From the host into the sandbox.
    In,
    /// From the sandbox to the host.
    Out,
}

struct Job {
    direction: CopyDirection,
    stream: StreamId,
    /// Set once the thread is done.
    outcome: Option<Outcome>,
}

/// A copy that the host has requested.
pub struct CopyRequest<'a> {
    pub id: u32,
    pub direction: CopyDirection,
    pub path: &'a [u8],
    pub stream: StreamId,
}

/// All copies that have not been answered yet, by request id.
pub struct CopyJobs {
    workers: Arc<Workers>,
    running: BTreeMap<u32, Job>,
}

impl CopyJobs {
    /// `root` is the root file system that copies see, if it is not the one of the workload.
    pub fn new(root: Option<OwnedFd>) -> Result<CopyJobs, SystemError> {
        Ok(CopyJobs { workers: Arc::new(Workers::new(root)?), running: BTreeMap::new() })
    }

    /// Returns the descriptor that is readable when a job has finished.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.workers.wake_fd()
    }

    /// Resets the descriptor that signals finished jobs.
    pub fn clear_wake(&self) {
        self.workers.clear_wake();
    }

    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// Starts a copy. A failure is reported as its outcome.
    pub fn start(
        &mut self,
        request: &CopyRequest<'_>,
        transport: &mut Transport,
        cgroups: &Cgroups,
    ) -> Result<(), Fault> {
        if self.running.contains_key(&request.id) {
            return Err(Unexpected::RequestIdInUse(request.id).into());
        }
        if let Err(failure) = self.try_start(request, transport) {
            let CopyRequest { id, direction, stream, .. } = *request;
            let job = Job { direction, stream, outcome: None };
            finish_job(id, &job, Err(failure), transport, cgroups);
        }
        Ok(())
    }

    fn try_start(
        &mut self,
        request: &CopyRequest<'_>,
        transport: &mut Transport,
    ) -> Result<(), Failure> {
        let CopyRequest { id, direction, path, stream } = *request;
        let refused = |errno| make_failure("create a pipe to copy", path, errno);
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(refused)?;
        let job_end = match direction {
            CopyDirection::In => {
                transport.pump_to_pipe(stream, writer).map_err(refused)?;
                reader
            }
            CopyDirection::Out => {
                transport.pump_from_pipe(stream, reader).map_err(refused)?;
                writer
            }
        };
        let path = worker::check_path(path)?;
        if self.running.len() >= MAX_JOBS {
            let operation = "start more than 8 copies at a time:";
            return Err(make_failure(operation, path.as_os_str().as_bytes(), Errno::AGAIN));
        }
        worker::spawn_worker(&self.workers, id, direction, path, job_end)?;
        self.running.insert(id, Job { direction, stream, outcome: None });
        Ok(())
    }

    /// Answers the copies that have finished. A copy to the host has finished only when its stream
    /// has ended too.
    pub fn report_finished(&mut self, transport: &mut Transport, cgroups: &Cgroups) {
        for (id, outcome) in self.workers.take_outcomes() {
            if let Some(job) = self.running.get_mut(&id) {
                job.outcome = Some(outcome);
            }
        }
        let has_finished = |job: &Job| {
            job.outcome.is_some()
                && (job.direction == CopyDirection::In || !transport.has_pump(job.stream))
        };
        let finished: Vec<u32> =
            self.running.iter().filter(|(_, job)| has_finished(job)).map(|(id, _)| *id).collect();
        for id in finished {
            if let Some(mut job) = self.running.remove(&id)
                && let Some(outcome) = job.outcome.take()
            {
                finish_job(id, &job, outcome, transport, cgroups);
            }
        }
    }
}

/// Ends the stream of a copy and answers its request.
fn finish_job(id: u32, job: &Job, outcome: Outcome, transport: &mut Transport, cgroups: &Cgroups) {
    transport.drop_pump(job.stream);
    // Files that were copied in take memory that is not charged to the workload.
    if let (CopyDirection::In, Some(cgroup)) = (job.direction, &cgroups.v2)
        && let Err(error) = cgroup.update_memory_limit()
    {
        log_line(error);
    }
    match job.direction {
        // The host's data after the tree is ignored, and so is its end.
        CopyDirection::In if outcome.is_ok() => {}
        CopyDirection::In => transport.connection.reset_stream(job.stream),
        CopyDirection::Out => transport.connection.end_stream(job.stream),
    }
    transport.send(&ToHost::Done { request: id, result: outcome });
}

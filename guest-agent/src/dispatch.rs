//! Dispatches the host's messages: a handler for each, if the stage of the sandbox allows it.

use chitin_protocol::{Confine, Direction, Failure, StreamId, ToGuest, ToHost};
use rustix::io::Errno;

use crate::copy_jobs::{CopyDirection, CopyRequest};
use crate::error::{Error, make_failure};
use crate::event_loop::Agent;
use crate::io::socket_pump::{SocketPump, make_connect_failure};
use crate::processes::LaunchContext;
use crate::{egress, root_fs};

impl Agent {
    /// Handles one message. An error is a protocol violation, which ends the sandbox; any other
    /// failure is the answer to the request.
    pub fn handle_message(&mut self, message: ToGuest) -> Result<(), Error> {
        self.identity.check_message(&message)?;
        match message {
            ToGuest::Start(start) => {
                let context = LaunchContext {
                    secrets: &self.secrets,
                    lockdown: &self.lockdown,
                    cgroups: &self.cgroups,
                    limit_watch: &self.limit_watch,
                };
                self.processes.start(&start, &mut self.transport, &context)?;
            }
            ToGuest::Signal { process, signal } => self.processes.signal(process, signal),
            ToGuest::Secret(secret) => {
                let result = self.secrets.insert(&secret);
                self.answer(secret.request, result);
            }
            ToGuest::Revoke { request, name } => {
                let result = self.secrets.revoke(&name);
                self.answer(request, result);
            }
            ToGuest::Put { request, path, stream } => {
                self.transport.connection.accept_stream(stream, Direction::Receive)?;
                let direction = CopyDirection::In;
                self.start_copy(&CopyRequest { id: request, direction, path: &path, stream })?;
            }
            ToGuest::Get { request, path, stream } => {
                self.transport.connection.accept_stream(stream, Direction::Send)?;
                let direction = CopyDirection::Out;
                self.start_copy(&CopyRequest { id: request, direction, path: &path, stream })?;
            }
            ToGuest::Freeze { request } => {
                let result = self.freeze();
                self.answer(request, result);
            }
            ToGuest::Confine(confine) => {
                let result = self.confine(&confine);
                self.answer(confine.request, result);
            }
            ToGuest::Reseed(reseed) => {
                let result = self.identity.reseed(&reseed, &self.cgroups);
                self.answer(reseed.request, result);
            }
            ToGuest::Egress { request, endpoints } => {
                let result = self.egress.open(&self.transport.poll, endpoints);
                self.answer(request, result);
            }
            ToGuest::Connect { request, port, stream } => {
                self.transport.connection.accept_stream(stream, Direction::Both)?;
                self.connect(request, port, stream);
            }
        }
        Ok(())
    }

    fn answer(&mut self, request: u32, result: Result<(), Failure>) {
        self.transport.send(&ToHost::Done { request, result });
    }

    fn start_copy(&mut self, request: &CopyRequest<'_>) -> Result<(), Error> {
        Ok(self.copies.start(request, &mut self.transport, &self.cgroups)?)
    }

    /// Makes the sandbox ready to be saved. The agent reconnects once the answer has been written.
    fn freeze(&mut self) -> Result<(), Failure> {
        let refused = |operation, errno| Err(make_failure(operation, b"", errno));
        if !self.secrets.was_always_empty() {
            return refused(
                "freeze a sandbox that holds credentials, or has held any",
                Errno::PERM,
            );
        }
        if !self.copies.is_empty() {
            return refused("freeze a sandbox while files are copied", Errno::BUSY);
        }
        self.identity.freeze(&self.cgroups)
    }

    /// Applies a policy to all later processes.
    fn confine(&mut self, confine: &Confine) -> Result<(), Failure> {
        let refused = |operation, errno| Err(make_failure(operation, b"", errno));
        // The host sends it again to a copy of a sandbox that was confined before it was saved.
        if self.lockdown.enforces(confine) {
            return Ok(());
        }
        if self.lockdown.is_confined() {
            return refused("confine a sandbox twice", Errno::ALREADY);
        }
        // The policy would not apply to running processes. In a copy of a template they may be what
        // the warm-up has left.
        if !self.processes.is_empty() || self.cgroups.may_be_populated() {
            return refused("confine a sandbox in which processes run", Errno::BUSY);
        }
        if let Some(tasks) = confine.max_tasks {
            self.cgroups.limit_tasks(tasks)?;
        }
        match (confine.max_disk, &self.scratch_disk) {
            (Some(bytes), Some(disk)) => root_fs::limit_disk(disk, bytes).map_err(|errno| {
                let operation = format!("limit writable disk space to {bytes} bytes");
                make_failure(&operation, b"", errno)
            })?,
            (Some(_), None) => {
                let operation = "limit the disk space of a file system that the agent has not made";
                return refused(operation, Errno::OPNOTSUPP);
            }
            (None, _) => {}
        }
        if confine.files.is_some() {
            // Rules for files apply to the file systems that are mounted when they are made.
            self.secrets.prepare_directory()?;
        }
        self.lockdown.confine(confine)
    }

    /// Connects a stream to a server in the sandbox. The pump answers the request once the
    /// connection is established or has failed.
    fn connect(&mut self, request: u32, port: u16, stream: StreamId) {
        let pumped = egress::connect_to_port(port)
            .and_then(|socket| SocketPump::new_connecting(socket, request, port))
            .and_then(|pump| self.transport.pump_socket(stream, pump));
        if let Err(errno) = pumped {
            self.transport.connection.reset_stream(stream);
            self.answer(request, Err(make_connect_failure(port, errno)));
        }
    }
}

//! The event loop: what the host asks for and what became of it.
//!
//! ```text
//!   a process    started ──(SIGCHLD: reaped)──▶ Exited sent, forgotten; its pumps go on until its pipes are empty
//!   a request    asked ──(done here, or by a copy job)──▶ Done sent, forgotten
//! ```
//!
//! A turn reads once from the channel, lets each pump move one frame, and writes once to the channel; turns go on
//! while anything moves, with a look at epoll in between. Memory is bounded by what the connection allows: no
//! pump reads while its output waits.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use chitin_protocol::{
    Confine, Connection, Direction, Event, Exit, Failure, Fault, Guest, MAX_DATA, Reseed, Start,
    StartError, StreamId, ToGuest, ToHost, Unexpected, Usage,
};
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fs::{Mode as FileMode, OFlags};
use rustix::io::Errno;
use rustix::net::Shutdown;
use rustix::pipe::PipeFlags;

use crate::cgroup::Cgroup;
use crate::cgroup::pids_v1::Counted;
use crate::copy_jobs::Copies;
use crate::egress::{self, Dialled, Egress};
use crate::identity::reseed::{self, BootId};
use crate::io::channel::{CONNECT_TIMEOUT, Channel, Socket};
use crate::io::pump::{Buffers, Inflow, Outflow, Pump, Step};
use crate::io::socket_pump::{Link, refused};
use crate::io::splicer::Splicer;
use crate::lockdown::Lockdown;
use crate::processes::launch::{self, Child, Streams};
use crate::secrets::Secrets;
use crate::syscall::check_result;
use crate::{Context, Mode, SystemError, boottime_ns, copy_jobs, failure, root_fs, shutdown};

/// Processes of the host's at once; what they start themselves is the cgroup's matter. Each has three of the
/// connection's 256 streams.
const MAX_PROCESSES: usize = 64;

/// Bytes of unsent output above which no connection is accepted.
const DIAL_BACKLOG: usize = 64 * 1024;

/// Events taken from epoll at once; more wait for the next turn.
const EVENTS: usize = 32;

/// Names of event sources. Those of pumps are [`PUMP`] and the stream's id.
const INPUT: u64 = 0;
const OUTPUT: u64 = 1;
const SIGNALS: u64 = 2;
const COPIES: u64 = 3;
const PUMP: u64 = 1 << 32;

/// Why the agent has nothing more to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    System(#[from] SystemError),
    #[error("the host broke the protocol: {0}")]
    Fault(#[from] Fault),
}

/// Where this sandbox is on its way to being a template's copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Running,
    /// The workload is frozen, and the host is to be told so before the channel is closed.
    Freezing,
    /// The channel is a new one, and nothing is done on it but to reseed.
    Restored,
}

struct Process {
    /// The host's name for it.
    name: u32,
    child: Child,
    stdin: Option<StreamId>,
    stdout: StreamId,
    stderr: StreamId,
    /// Once it has been reaped.
    exit: Option<(Exit, Usage)>,
}

/// The agent, from the first system call to the end of the channel.
pub struct Agent {
    poll: OwnedFd,
    channel: Channel,
    /// For the channel after a freeze.
    spare: Option<Socket>,
    /// What tells a copy apart, once it was frozen.
    boot_id: Option<BootId>,
    stage: Stage,
    readable: bool,
    writable: bool,
    signals: OwnedFd,
    connection: Connection<Guest>,
    pumps: BTreeMap<StreamId, Pump>,
    /// Which pump's turn is first.
    first: StreamId,
    processes: Vec<Process>,
    secrets: Secrets,
    copies: Copies,
    egress: Egress,
    lockdown: Lockdown,
    /// The workload's cgroup; containers have theirs from outside.
    cgroup: Option<Cgroup>,
    /// What bounds its processes in a container with a kernel of its own.
    counted: Option<Counted>,
    /// The file system that takes all writes, if the agent made it.
    scratch_disk: Option<OwnedFd>,
    buffers: Buffers,
}

impl Agent {
    /// Sets the sandbox up and says hello. `started_ns` is when this program began (`CLOCK_BOOTTIME`).
    pub fn new(mode: Mode, started_ns: u64) -> Result<Agent, Error> {
        root_fs::fill_standard_descriptors()?;
        // The connection is being made while the file systems are.
        let (channel, spare) = if mode.stdio {
            (Channel::stdio()?, None)
        } else {
            (Socket::open()?.connect()?, Some(Socket::open()?))
        };
        let view = if mode.build_root { Some(root_fs::build(!mode.stdio)?) } else { None };
        let signals = claim_signals(mode)?;
        if !mode.stdio {
            channel.connected(Some(CONNECT_TIMEOUT))?;
        }
        let connection = hello(&channel, started_ns);

        // What follows is done while the host is being told. What it asks for meanwhile waits in the channel.
        protect_self();
        if !mode.stdio {
            root_fs::set_kernel_parameters()?;
        }
        let lockdown = Lockdown::begin()?;
        let (mut root, mut cgroup, mut scratch_disk) = (None, None, None);
        if let Some(root_fs::View { root: writable, cgroup: hierarchy, scratch }) = view {
            (root, scratch_disk) = (Some(writable), Some(scratch));
            root_fs::complete()?;
            cgroup = match Cgroup::create(&hierarchy) {
                // Outside a machine of its own the hierarchy is somebody else's.
                Err(error) if mode.stdio => {
                    crate::log(error);
                    None
                }
                created => Some(created?),
            };
        }
        let counted = match mode.own_kernel.then(Counted::create).transpose() {
            // A kernel that cannot count is said to be so when a limit is asked for.
            Err(error) => {
                crate::log(error);
                None
            }
            Ok(counted) => counted,
        };
        let copies = Copies::new(root)?;
        // The channel of a container is not one that takes pages.
        let splicer = (!mode.stdio).then(Splicer::default);

        let poll = epoll::create(epoll::CreateFlags::CLOEXEC).context("create", "an epoll")?;
        watch_channel(&poll, &channel)?;
        watch(&poll, signals.as_fd(), SIGNALS, EventFlags::IN)?;
        watch(&poll, copies.wake(), COPIES, EventFlags::IN)?;

        Ok(Agent {
            poll,
            channel,
            spare,
            boot_id: None,
            stage: Stage::Running,
            readable: true,
            writable: true,
            signals,
            connection,
            pumps: BTreeMap::new(),
            first: 0,
            processes: Vec::new(),
            secrets: Secrets::default(),
            copies,
            egress: Egress::default(),
            lockdown,
            cgroup,
            counted,
            scratch_disk,
            buffers: Buffers { scratch: vec![0; MAX_DATA].into_boxed_slice(), splicer },
        })
    }

    /// Serves the channel until it is closed.
    pub fn serve(&mut self) -> Result<(), Error> {
        let mut events = Vec::with_capacity(EVENTS);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut moved = true;
        loop {
            let timeout = if moved { Some(&now) } else { None };
            events.clear();
            match epoll::wait(&self.poll, rustix::buffer::spare_capacity(&mut events), timeout) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).context("wait for", "events")?,
            }
            for event in &events {
                if self.woken(event.data.u64(), event.flags)?.is_break() {
                    return Ok(());
                }
            }
            match self.turn()? {
                Some(any) => moved = any,
                None => return Ok(()),
            }
            if self.stage == Stage::Freezing && self.is_all_written() {
                self.reconnect()?;
                moved = true;
            }
        }
    }

    /// Leaves nothing behind where the end of this process does not see to that.
    pub fn finish(mut self, init: bool) {
        if !init {
            shutdown::kill_descendants();
        }
        self.secrets = Secrets::default();
        // All else ends with the process, and somebody waits for that: under gVisor each descriptor and mapping that is given
        // back by itself takes a twentieth of a millisecond.
        std::mem::forget(self);
    }

    fn woken(&mut self, name: u64, flags: EventFlags) -> Result<ControlFlow<()>, Error> {
        let broken = flags.intersects(EventFlags::ERR | EventFlags::HUP);
        match name {
            INPUT => {
                self.readable |= broken || flags.contains(EventFlags::IN);
                self.writable |= broken || flags.contains(EventFlags::OUT);
            }
            OUTPUT => self.writable = true,
            SIGNALS => return self.take_signals(),
            COPIES => self.copies.woken(),
            name if name >= egress::EVENTS => self.egress.wake(name),
            pump => {
                let stream = StreamId::try_from(pump & !PUMP).unwrap_or(0);
                match self.pumps.get_mut(&stream) {
                    Some(Pump::Out(outflow)) => outflow.wake(),
                    Some(Pump::In(inflow)) => inflow.wake(flags.contains(EventFlags::ERR)),
                    Some(Pump::Link(link)) => link.wake(
                        broken || flags.contains(EventFlags::IN),
                        flags.contains(EventFlags::OUT),
                        flags.contains(EventFlags::ERR),
                    ),
                    // Dropped while handling an earlier event of the same batch.
                    None => {}
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Does what can be done at once. `None` when the channel has ended, else whether anything moved.
    fn turn(&mut self) -> Result<Option<bool>, Error> {
        let mut moved = false;
        if self.readable {
            match rustix::io::read(self.channel.input(), self.connection.input_buffer()) {
                Ok(0) => return Ok(None),
                Ok(count) => {
                    self.connection.commit_input(count);
                    moved = true;
                    self.take_events()?;
                }
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => moved = true,
                // However it ended, it has ended.
                Err(Errno::CONNRESET | Errno::PIPE) => return Ok(None),
                Err(errno) => return Err(errno).context("read", "the channel")?,
            }
        }
        // Before the pumps: a pipe that a finished copy has closed is not broken.
        self.announce_copies();
        moved |= self.pump();
        moved |= self.serve_egress();
        self.announce_exits();
        self.announce_copies();
        moved |= self.write()?;
        Ok(Some(moved))
    }

    fn write(&mut self) -> Result<bool, Error> {
        let mut moved = false;
        while self.writable {
            let channel = self.channel.output();
            let outcome = match &mut self.buffers.splicer {
                // Before all that was queued since.
                Some(splicer) if !splicer.is_empty() => splicer.send(channel),
                _ if self.connection.pending_output().is_empty() => break,
                _ => rustix::io::write(channel, self.connection.pending_output())
                    .inspect(|count| self.connection.consume_output(*count)),
            };
            match outcome {
                Ok(_) => moved = true,
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                // The reading side says so too, and first hands over what has arrived.
                Err(Errno::PIPE | Errno::CONNRESET) => {
                    self.writable = false;
                    self.readable = true;
                    moved = true;
                }
                Err(errno) => return Err(errno).context("write", "the channel")?,
            }
        }
        Ok(moved)
    }

    fn is_all_written(&self) -> bool {
        self.connection.pending_output().is_empty()
            && self.buffers.splicer.as_ref().is_none_or(Splicer::is_empty)
    }

    /// One step of each pump, beginning with another one each time: output room is shared, and the first one
    /// to ask gets it.
    fn pump(&mut self) -> bool {
        let mut moved = false;
        let order: Vec<StreamId> = self
            .pumps
            .range(self.first..)
            .chain(self.pumps.range(..self.first))
            .map(|(id, _)| *id)
            .collect();
        self.first = order.get(1).copied().unwrap_or(0);
        for stream in order {
            let step = match self.pumps.get_mut(&stream) {
                Some(Pump::Out(outflow)) => {
                    outflow.step(&mut self.connection, stream, &mut self.buffers)
                }
                Some(Pump::In(inflow)) => inflow.step(&mut self.connection, stream),
                Some(Pump::Link(link)) => {
                    link.step(&mut self.connection, stream, &mut self.buffers.scratch)
                }
                None => Step::Waiting,
            };
            moved |= step != Step::Waiting;
            if step == Step::Finished {
                self.pumps.remove(&stream);
            }
        }
        moved
    }

    fn take_events(&mut self) -> Result<(), Error> {
        while let Some(event) = self.connection.next_event()? {
            match event {
                Event::Established { .. } | Event::Credit { .. } => {}
                Event::Message(message) => self.take_message(message)?,
                Event::Data { stream, bytes } => {
                    let left = match self.pumps.get_mut(&stream) {
                        Some(Pump::In(inflow)) => inflow.take(bytes),
                        Some(Pump::Link(link)) => link.take(bytes),
                        // Its pump is gone and its reset on the way.
                        _ => bytes.len(),
                    };
                    self.connection.return_credit(stream, left);
                }
                Event::End { stream } => match self.pumps.get_mut(&stream) {
                    Some(Pump::In(inflow)) => inflow.end(),
                    Some(Pump::Link(link)) => link.end(),
                    _ => {}
                },
                Event::Reset { stream } => {
                    self.pumps.remove(&stream);
                }
            }
        }
        Ok(())
    }

    fn take_message(&mut self, message: ToGuest) -> Result<(), Error> {
        match (self.stage, &message) {
            (Stage::Running, ToGuest::Reseed(_)) => {
                return Err(Fault::Unexpected(Unexpected::ReseedWithoutFreeze))?;
            }
            (Stage::Running, _) | (Stage::Restored, ToGuest::Reseed(_)) => {}
            (Stage::Freezing, _) => {
                return Err(Fault::Unexpected(Unexpected::MessageAfterFreeze))?;
            }
            (Stage::Restored, _) => {
                return Err(Fault::Unexpected(Unexpected::MessageBeforeReseed))?;
            }
        }
        match message {
            ToGuest::Start(start) => self.start(&start)?,
            ToGuest::Signal { process, signal } => self.signal(process, signal),
            ToGuest::Secret(secret) => {
                let result = self.secrets.insert(&secret);
                self.send(&ToHost::Done { request: secret.request, result });
            }
            ToGuest::Revoke { request, name } => {
                let result = self.secrets.revoke(&name);
                self.send(&ToHost::Done { request, result });
            }
            ToGuest::Put { request, path, stream } => {
                self.connection.accept_stream(stream, Direction::Receive)?;
                self.copy(request, copy_jobs::Direction::In, &path, stream)?;
            }
            ToGuest::Get { request, path, stream } => {
                self.connection.accept_stream(stream, Direction::Send)?;
                self.copy(request, copy_jobs::Direction::Out, &path, stream)?;
            }
            ToGuest::Freeze { request } => {
                let result = self.freeze();
                if result.is_ok() {
                    self.stage = Stage::Freezing;
                }
                self.send(&ToHost::Done { request, result });
            }
            ToGuest::Confine(confine) => {
                let result = self.confine(&confine);
                self.send(&ToHost::Done { request: confine.request, result });
            }
            ToGuest::Reseed(seed) => {
                let result = self.become_another(&seed);
                if result.is_ok() {
                    self.stage = Stage::Running;
                }
                self.send(&ToHost::Done { request: seed.request, result });
            }
            ToGuest::Egress { request, endpoints } => {
                let result = self.egress.open(&self.poll, endpoints);
                if result.is_err() {
                    self.egress.close();
                }
                self.send(&ToHost::Done { request, result });
            }
            ToGuest::Connect { request, port, stream } => {
                self.connection.accept_stream(stream, Direction::Both)?;
                let link = egress::connect(port)
                    .and_then(|socket| Link::connecting(socket, request, port));
                if let Err(errno) = link.and_then(|link| self.link(stream, link)) {
                    self.connection.reset_stream(stream);
                    self.send(&ToHost::Done { request, result: Err(refused(port, errno)) });
                }
            }
        }
        Ok(())
    }

    fn confine(&mut self, confine: &Confine) -> Result<(), Failure> {
        let refused = |what, errno| Err(failure(what, b"", errno));
        if self.lockdown.is_confined() {
            return refused("confine a sandbox twice", Errno::ALREADY);
        }
        // What runs already would not be held to it. Of a template, that may be what its warm-up left running.
        if !self.processes.is_empty() || self.cgroup.as_ref().is_some_and(Cgroup::is_populated) {
            return refused("confine a sandbox in which processes run", Errno::BUSY);
        }
        let limited = match (confine.max_tasks, &self.cgroup, &self.counted) {
            (Some(tasks), Some(cgroup), _) => {
                cgroup.limit_tasks(tasks.into()).map_err(|error| error.errno)
            }
            (Some(tasks), None, Some(counted)) => counted.limit(tasks),
            (Some(_), None, None) => {
                return refused("limit processes without a cgroup", Errno::OPNOTSUPP);
            }
            (None, ..) => Ok(()),
        };
        limited.map_err(|errno| failure("limit the number of processes", b"", errno))?;
        match (confine.max_disk, &self.scratch_disk) {
            (Some(bytes), Some(disk)) => root_fs::limit_disk(disk, bytes).map_err(|errno| {
                failure(&format!("limit what can be written to {bytes} bytes"), b"", errno)
            })?,
            (Some(_), None) => {
                return refused(
                    "limit what can be written to another's file system",
                    Errno::OPNOTSUPP,
                );
            }
            (None, _) => {}
        }
        self.lockdown.confine(confine)
    }

    /// Moves what comes on `stream` to a socket, and what comes from the socket back.
    fn link(&mut self, stream: StreamId, link: Link) -> Result<(), Errno> {
        let name = EventData::new_u64(PUMP | u64::from(stream));
        epoll::add(
            &self.poll,
            link.socket(),
            name,
            EventFlags::IN | EventFlags::OUT | EventFlags::ET,
        )?;
        self.pumps.insert(stream, Pump::Link(link));
        Ok(())
    }

    /// Answers questions for names, and hands new connections to the host, as many as there may be.
    fn serve_egress(&mut self) -> bool {
        let (denied, mut moved) = self.egress.answer(&self.poll, &mut self.buffers.scratch);
        for message in denied {
            self.send(&message);
        }
        // A host that does not read must not be told more and more: a workload may connect as fast as it can.
        while self.connection.can_open_stream()
            && self.connection.pending_output().len() < DIAL_BACKLOG
            && let Some(Dialled { socket, host, port }) = self.egress.accept()
        {
            moved = true;
            // One that fails here is dropped, which its other side notices.
            if let Ok(link) = Link::new(socket)
                && let Some(stream) = self.connection.open_stream(Direction::Both)
            {
                self.send(&ToHost::Dial { host, port, stream });
                if let Err(errno) = self.link(stream, link) {
                    crate::log(format_args!("cannot watch a connection: {errno}"));
                    self.connection.reset_stream(stream);
                }
            }
        }
        moved
            || (self.connection.can_open_stream()
                && self.egress.is_knocked()
                && self.connection.pending_output().is_empty())
    }

    fn freeze(&mut self) -> Result<(), Failure> {
        let refused = |what, errno| Err(failure(what, b"", errno));
        if !self.secrets.has_held_none() {
            return refused(
                "freeze a sandbox that holds credentials, or has held any",
                Errno::PERM,
            );
        }
        if !self.copies.is_idle() {
            return refused("freeze a sandbox while files are copied", Errno::BUSY);
        }
        let (Some(cgroup), Some(spare)) = (&self.cgroup, &self.spare) else {
            return refused("freeze what is no microVM, or was frozen before", Errno::OPNOTSUPP);
        };
        let prepared = cgroup.freeze().and_then(|()| spare.wait_for_ever());
        prepared.map_err(|error| failure("freeze the workload", b"", error.errno))?;
        match BootId::cover() {
            Ok(boot_id) => {
                self.boot_id = Some(boot_id);
                Ok(())
            }
            Err(errno) => {
                // It goes on as it was.
                let _ = cgroup.thaw();
                refused("cover the boot id", errno)
            }
        }
    }

    /// Gives a copy what is its own, and only then lets its workload go on.
    fn become_another(&self, seed: &Reseed) -> Result<(), Failure> {
        let Some(boot_id) = &self.boot_id else {
            return Err(failure("reseed what was never frozen", b"", Errno::INVAL));
        };
        reseed::reseed(seed, boot_id)?;
        let thawed = self.cgroup.as_ref().map_or(Ok(()), Cgroup::thaw);
        thawed.map_err(|error| failure("thaw the workload", b"", error.errno))
    }

    /// Leaves the old channel and waits for the new one. The wait is where a template is made: whoever returns from it
    /// is a copy.
    fn reconnect(&mut self) -> Result<(), Error> {
        let Some(spare) = self.spare.take() else {
            return Err(Fault::Unexpected(Unexpected::SecondFreeze))?;
        };
        // What belongs to the old channel: its streams, and the names the host had given.
        self.pumps.clear();
        self.processes.clear();
        self.egress.close();
        // The host takes one connection at a time: the old one ends before the new one begins.
        rustix::net::shutdown(self.channel.input(), Shutdown::Both)
            .context("end", "the channel")?;
        self.channel = spare.connect()?;
        self.channel.connected(None)?;
        self.connection = hello(&self.channel, boottime_ns());
        watch_channel(&self.poll, &self.channel)?;
        (self.readable, self.writable) = (true, true);
        self.stage = Stage::Restored;
        Ok(())
    }

    fn copy(
        &mut self,
        request: u32,
        direction: copy_jobs::Direction,
        path: &[u8],
        stream: StreamId,
    ) -> Result<(), Error> {
        if self.copies.contains(request) {
            return Err(Fault::Unexpected(Unexpected::RequestIdInUse(request)))?;
        }
        if let Err(failure) = self.try_copy(request, direction, path, stream) {
            self.end_copy(copy_jobs::Finished {
                request,
                direction,
                stream,
                outcome: Err(failure),
            });
        }
        Ok(())
    }

    fn try_copy(
        &mut self,
        request: u32,
        direction: copy_jobs::Direction,
        path: &[u8],
        stream: StreamId,
    ) -> Result<(), Failure> {
        let refused = |errno| failure("create a pipe to copy", path, errno);
        let (output, input) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(refused)?;
        match direction {
            copy_jobs::Direction::In => {
                self.pump_in(stream, input).map_err(refused)?;
                self.copies.start(request, direction, path, stream, output)
            }
            copy_jobs::Direction::Out => {
                self.pump_out(stream, output).map_err(refused)?;
                self.copies.start(request, direction, path, stream, input)
            }
        }
    }

    fn end_copy(&mut self, copy: copy_jobs::Finished) {
        self.pumps.remove(&copy.stream);
        // What was copied in takes memory that is not the workload's yet.
        if let (copy_jobs::Direction::In, Some(cgroup)) = (copy.direction, &self.cgroup)
            && let Err(error) = cgroup.set_memory_limit()
        {
            crate::log(error);
        }
        match copy.direction {
            // What the host has sent behind the tree is ignored, and so is its end.
            copy_jobs::Direction::In if copy.outcome.is_ok() => {}
            copy_jobs::Direction::In => self.connection.reset_stream(copy.stream),
            copy_jobs::Direction::Out => self.connection.end_stream(copy.stream),
        }
        self.send(&ToHost::Done { request: copy.request, result: copy.outcome });
    }

    fn start(&mut self, start: &Start) -> Result<(), Error> {
        if self.processes.iter().any(|process| process.name == start.process) {
            return Err(Fault::Unexpected(Unexpected::ProcessIdInUse(start.process)))?;
        }
        let mut streams = vec![(start.stdout, Direction::Send), (start.stderr, Direction::Send)];
        streams.extend(start.stdin.map(|stream| (stream, Direction::Receive)));
        // Ids only grow, and a host may open the three in any order.
        streams.sort_by_key(|(stream, _)| *stream);
        for (stream, direction) in streams {
            self.connection.accept_stream(stream, direction)?;
        }
        if let Err((error, failure)) = self.try_start(start) {
            for stream in start.stdin.into_iter().chain([start.stdout, start.stderr]) {
                self.pumps.remove(&stream);
            }
            self.connection.end_stream(start.stdout);
            self.connection.end_stream(start.stderr);
            if let Some(stdin) = start.stdin {
                self.connection.reset_stream(stdin);
            }
            let exit = Exit::NotStarted { error, failure };
            self.send(&ToHost::Exited { process: start.process, exit, usage: Usage::default() });
        }
        Ok(())
    }

    fn try_start(&mut self, start: &Start) -> Result<(), (StartError, Failure)> {
        let refused = |operation: &'static str| {
            move |errno| (StartError::Other, failure(operation, b"", errno))
        };
        if self.processes.len() >= MAX_PROCESSES {
            return Err(refused("start more than 64 processes at once")(Errno::AGAIN));
        }
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(refused("create a pipe"));
        let (stdout, stdout_child) = pipe()?;
        let (stderr, stderr_child) = pipe()?;
        let stdin_child = match start.stdin {
            Some(stream) => {
                let (child, stdin) = pipe()?;
                self.pump_in(stream, stdin).map_err(refused("watch a pipe"))?;
                child
            }
            None => {
                rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, FileMode::empty())
                    .map_err(refused("open /dev/null"))?
            }
        };
        self.pump_out(start.stdout, stdout).map_err(refused("watch a pipe"))?;
        self.pump_out(start.stderr, stderr).map_err(refused("watch a pipe"))?;

        let streams = Streams { stdin: stdin_child, stdout: stdout_child, stderr: stderr_child };
        let groups = launch::Groups {
            born_into: self.cgroup.as_ref().map(Cgroup::directory),
            joined: self.counted.as_ref().map(Counted::directory),
        };
        let child = launch::launch(start, &self.secrets, &streams, &self.lockdown, groups)?;
        self.processes.push(Process {
            name: start.process,
            child,
            stdin: start.stdin,
            stdout: start.stdout,
            stderr: start.stderr,
            exit: None,
        });
        Ok(())
    }

    /// Moves what comes on `stream` into `pipe`.
    fn pump_in(&mut self, stream: StreamId, pipe: OwnedFd) -> Result<(), Errno> {
        self.watch_pipe(stream, &pipe, EventFlags::OUT)?;
        self.pumps.insert(stream, Pump::In(Inflow::new(pipe)));
        Ok(())
    }

    /// Moves what comes out of `pipe` to `stream`.
    fn pump_out(&mut self, stream: StreamId, pipe: OwnedFd) -> Result<(), Errno> {
        self.watch_pipe(stream, &pipe, EventFlags::IN)?;
        self.pumps.insert(stream, Pump::Out(Outflow::new(pipe)));
        Ok(())
    }

    /// The agent's end of a pipe becomes non-blocking; the other end, which is another's, does not.
    fn watch_pipe(
        &self,
        stream: StreamId,
        pipe: &OwnedFd,
        interest: EventFlags,
    ) -> Result<(), Errno> {
        rustix::io::ioctl_fionbio(pipe, true)?;
        let name = EventData::new_u64(PUMP | u64::from(stream));
        epoll::add(&self.poll, pipe, name, interest | EventFlags::ET)
    }

    fn signal(&mut self, name: u32, signal: u8) {
        // One that has been reaped is no more: its pid may be another's.
        let running = |process: &&Process| process.name == name && process.exit.is_none();
        let Some(process) = self.processes.iter().find(running) else { return };
        let pid = process.child.pid.as_raw_pid();
        // SAFETY: sending a signal touches no memory. The pid is that of an unreaped child, hence still its own.
        let sent = unsafe { check_result(libc::kill(-pid, signal.into())) };
        if sent == Err(Errno::SRCH) {
            // It has not come to opening its session yet.
            // SAFETY: as above.
            let _ = unsafe { libc::kill(pid, signal.into()) };
        }
    }

    fn take_signals(&mut self) -> Result<ControlFlow<()>, Error> {
        let mut record = [0; size_of::<libc::signalfd_siginfo>()];
        while let Ok(count) = rustix::io::read(&self.signals, &mut record) {
            let signal = record.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
            if count < record.len() {
                break;
            }
            if signal != libc::SIGCHLD.cast_unsigned() {
                // SIGTERM or SIGINT: a container is being stopped.
                return Ok(ControlFlow::Break(()));
            }
        }
        self.reap();
        Ok(ControlFlow::Continue(()))
    }

    /// Takes note of every child that has ended: the host's processes, and orphans that fell to PID 1.
    fn reap(&mut self) {
        loop {
            let mut status = 0;
            // SAFETY: all-zero is a valid `rusage`.
            let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
            // SAFETY: both pointers are to values of the right type that outlive the call.
            let pid = unsafe { libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut usage) };
            if pid <= 0 {
                return;
            }
            let ended = |process: &&mut Process| {
                process.exit.is_none() && process.child.pid.as_raw_pid() == pid
            };
            let Some(process) = self.processes.iter_mut().find(ended) else { continue };
            let exit = match process.child.failed_to_start() {
                Some((error, failure)) => Exit::NotStarted { error, failure },
                None if libc::WIFSIGNALED(status) => Exit::Signal(low_byte(libc::WTERMSIG(status))),
                None => Exit::Code(low_byte(libc::WEXITSTATUS(status))),
            };
            process.exit = Some((exit, usage_of(&usage)));
            for stream in [process.stdout, process.stderr] {
                if let Some(Pump::Out(outflow)) = self.pumps.get_mut(&stream) {
                    outflow.drain();
                }
            }
            if let Some(stdin) = process.stdin {
                self.pumps.remove(&stdin);
                self.connection.reset_stream(stdin);
            }
        }
    }

    fn announce_copies(&mut self) {
        let pumps = &self.pumps;
        for copy in self.copies.take_finished(|stream| pumps.contains_key(&stream)) {
            self.end_copy(copy);
        }
    }

    fn announce_exits(&mut self) {
        let ended: Vec<Process> =
            self.processes.extract_if(.., |process| process.exit.is_some()).collect();
        for process in ended {
            if let Some((exit, usage)) = process.exit {
                self.send(&ToHost::Exited { process: process.name, exit, usage });
            }
        }
    }

    fn send(&mut self, message: &ToHost) {
        // Nothing of ours comes near the limit: see `failure`.
        if let Err(error) = self.connection.send_message(message) {
            crate::log(error);
        }
    }
}

/// A new connection, on which this side has spoken. What the channel does not take at once follows in the loop.
fn hello(channel: &Channel, started_ns: u64) -> Connection<Guest> {
    let mut connection = Connection::new();
    let ready = ToHost::Ready { started_ns, ready_ns: boottime_ns() };
    if let Err(error) = connection.send_message(&ready) {
        crate::log(error);
    }
    if let Ok(count) = rustix::io::write(channel.output(), connection.pending_output()) {
        connection.consume_output(count);
    }
    connection
}

fn watch(
    poll: &OwnedFd,
    fd: BorrowedFd<'_>,
    name: u64,
    flags: EventFlags,
) -> Result<(), SystemError> {
    epoll::add(poll, fd, EventData::new_u64(name), flags).context("watch", "a descriptor")
}

fn watch_channel(poll: &OwnedFd, channel: &Channel) -> Result<(), SystemError> {
    let (input, output) = (EventFlags::IN | EventFlags::ET, EventFlags::OUT | EventFlags::ET);
    if channel.is_one() {
        return watch(poll, channel.input(), INPUT, input | output);
    }
    watch(poll, channel.input(), INPUT, input)?;
    watch(poll, channel.output(), OUTPUT, output)
}

/// Blocks the signals that the agent reads from the descriptor returned, and sees to the others.
fn claim_signals(mode: Mode) -> Result<OwnedFd, SystemError> {
    if mode.stdio && !mode.own_kernel {
        // What the starter of a container ignores, its workload should not; and an ignored SIGCHLD would make
        // children vanish unseen. A kernel of the sandbox's own has nothing to hand on.
        for signal in 1..=LAST_SIGNAL {
            default_disposition(signal);
        }
    }
    // SAFETY: all-zero is a valid, empty `sigset_t`; the calls fill it and read it, and it outlives them. The
    // descriptor returned is new and nobody else's.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        if mode.stdio {
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            libc::sigaddset(&raw mut set, libc::SIGINT);
        }
        let blocked = libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
        check_result(blocked).context("block", "signals")?;
        // A pipe without readers is an error of that pipe, not the end of PID 1.
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        check_result(fd).context("open", "a signalfd")?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// `_NSIG` of the kernel.
const LAST_SIGNAL: i32 = 64;

/// The C library's function refuses the signals it uses itself, and those are inherited like any other.
fn default_disposition(signal: i32) {
    // The kernel's `struct sigaction`: handler, flags, restorer, mask; a default handler is 0.
    let action = [0_u64; 4];
    // SAFETY: the kernel reads 32 bytes, of which the last 8 are the mask, as the last argument says. No code of
    // this process becomes a handler. SIGKILL and SIGSTOP are refused, which is no harm.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            &raw const action,
            std::ptr::null_mut::<u64>(),
            8,
        )
    };
}

/// What can fail here is a matter of rights that an agent in a container may lack; it is safe without.
fn protect_self() {
    // No process of the workload's user may look into it, also not in the moment between fork and exec.
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    // Orphans come here also where this is not PID 1.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    let _ = launch::write_score(c"-1000");
    // Copies hold a descriptor for each level of a tree.
    let mut files = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    files.current = files.maximum;
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, files);
}

fn low_byte(value: i32) -> u8 {
    value.to_le_bytes()[0]
}

fn usage_of(usage: &libc::rusage) -> Usage {
    let micros = |time: libc::timeval| {
        u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000
            + u64::try_from(time.tv_usec).unwrap_or(0)
    };
    Usage {
        user_us: micros(usage.ru_utime),
        system_us: micros(usage.ru_stime),
        max_rss_kib: u64::try_from(usage.ru_maxrss).unwrap_or(0),
    }
}

//! The agent and its event loop: one thread, one epoll.
//!
//! A turn reads once from the channel, lets each pump move one frame, and writes to the channel
//! what it takes. While anything moves, turns follow each other, with a look at epoll in between.
//! Then the loop waits for an event.

use std::ops::ControlFlow;
use std::os::fd::OwnedFd;

use crate::cgroup::Cgroups;
use crate::copy_jobs::CopyJobs;
use crate::egress::Egress;
use crate::error::Error;
use crate::identity::Identity;
use crate::io::poll::{EventFlags, Events, Token};
use crate::io::transport::Transport;
use crate::limit_watch::LimitWatch;
use crate::lockdown::Lockdown;
use crate::processes::Processes;
use crate::secrets::Secrets;
use crate::shutdown;
use crate::signals::SignalFd;

/// The agent, until its channel ends.
pub struct Agent {
    pub transport: Transport,
    pub signals: SignalFd,
    pub identity: Identity,
    pub processes: Processes,
    pub secrets: Secrets,
    pub copies: CopyJobs,
    pub egress: Egress,
    pub lockdown: Lockdown,
    pub cgroups: Cgroups,
    /// The file system that takes everything that is written, if the agent has made it.
    pub scratch_disk: Option<OwnedFd>,
    pub limit_watch: LimitWatch,
}

impl Agent {
    /// Serves the channel until it ends.
    pub fn serve(&mut self) -> Result<(), Error> {
        let mut events = Events::new();
        let mut moved = true;
        loop {
            self.transport.poll.wait(&mut events, !moved)?;
            for (token, flags) in events.iter() {
                if self.handle_event(token, flags).is_break() {
                    return Ok(());
                }
            }
            match self.run_turn()? {
                ControlFlow::Continue(any) => moved = any,
                ControlFlow::Break(()) => return Ok(()),
            }
            if self.identity.must_reconnect(&self.transport) {
                self.reconnect()?;
                moved = true;
            }
        }
    }

    /// Records an event. Breaks when a container is being stopped.
    fn handle_event(&mut self, token: Token, flags: EventFlags) -> ControlFlow<()> {
        match token {
            Token::ChannelInput => self.transport.wake_input(flags),
            Token::ChannelOutput => self.transport.wake_output(),
            Token::Signals => {
                if self.signals.read_stop_request() {
                    return ControlFlow::Break(());
                }
                self.processes.reap(&mut self.transport, &self.limit_watch);
            }
            Token::CopyJobs => self.copies.clear_wake(),
            Token::Pump(stream) => self.transport.wake_pump(stream, flags),
            Token::DnsUdp | Token::DnsTcp | Token::DnsClient(_) | Token::Port(_) => {
                self.egress.wake(token);
            }
        }
        ControlFlow::Continue(())
    }

    /// Does all work that needs no wait, and returns whether anything moved. Breaks when the
    /// channel has ended.
    fn run_turn(&mut self) -> Result<ControlFlow<(), bool>, Error> {
        let mut moved = match self.transport.read()? {
            ControlFlow::Continue(moved) => moved,
            ControlFlow::Break(()) => return Ok(ControlFlow::Break(())),
        };
        if moved {
            while let Some(message) = self.transport.next_message()? {
                self.handle_message(message)?;
            }
        }
        // Before the pumps, because a pipe that a finished copy has closed is not broken.
        self.copies.report_finished(&mut self.transport, &self.cgroups);
        moved |= self.transport.step_pumps();
        moved |= self.egress.serve(&mut self.transport);
        self.processes.report_exits(&mut self.transport);
        self.copies.report_finished(&mut self.transport, &self.cgroups);
        moved |= self.transport.write()?;
        Ok(ControlFlow::Continue(moved))
    }

    /// Continues on another channel after a freeze.
    fn reconnect(&mut self) -> Result<(), Error> {
        // Ids that the host has assigned end with the channel.
        self.processes.clear();
        self.egress.close();
        self.identity.reconnect(&mut self.transport)
    }

    /// Cleans up what the end of this process does not.
    pub fn finish(mut self, is_init: bool) {
        if !is_init {
            shutdown::kill_descendants();
        }
        self.secrets = Secrets::default();
        // Everything else ends with the process, which the host waits for: under gVisor it takes a
        // twentieth of a millisecond to close a descriptor or a mapping.
        std::mem::forget(self);
    }
}

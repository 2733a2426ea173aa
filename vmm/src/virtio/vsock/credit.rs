//! Flow control of one connection, in both directions. No I/O, no locks: arithmetic modulo 2³² with a hostile peer.
//!
//! Each side tells the other how large its receive buffer is (`buf_alloc`) and how much it has taken out of it so far
//! (`fwd_cnt`); a sender keeps `sent − fwd_cnt` at or below `buf_alloc`. Source: VIRTIO 1.2, section 5.10.6.3.

/// The receive buffer that the guest is told of, and the bound of what is kept for a host that does not read. Twice what
/// Linux gives to one socket by default would not make the channel faster: the guest is told of freed space long before it
/// has used it up.
pub const BUFFER_BYTES: u32 = 256 * 1024;

/// The guest is told of freed space when this much is free that it does not know of. Small enough that it never stalls
/// while the host reads; large enough that updates are rare.
const UPDATE_BYTES: u32 = BUFFER_BYTES / 4;

/// The guest sent more than its window; nothing that keeps the rules does.
#[derive(Debug, PartialEq, Eq)]
pub struct Overrun;

/// Both windows of a connection.
#[derive(Debug, Default)]
pub struct Credit {
    /// The guest's buffer and progress, as it last said.
    guest_buffer: u32,
    guest_forwarded: u32,
    /// Payload sent to the guest.
    sent: u32,
    /// Payload received from the guest, and passed on to the host.
    received: u32,
    forwarded: u32,
    /// What the guest was last told of `forwarded`.
    told: u32,
}

impl Credit {
    /// Takes note of what a header says. Every packet carries it.
    pub fn learn(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_buffer = buf_alloc;
        self.guest_forwarded = fwd_cnt;
    }

    /// How much may be sent to the guest. A guest that claims to have taken out more than was sent has no window.
    pub fn window(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(in_flight)
    }

    /// Payload was sent to the guest.
    pub fn send(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Payload came from the guest.
    ///
    /// # Errors
    /// It is more than the guest was allowed to send; nothing is changed.
    pub fn receive(&mut self, bytes: u32) -> Result<(), Overrun> {
        let held = self.received.wrapping_sub(self.forwarded);
        if bytes > BUFFER_BYTES.saturating_sub(held) {
            return Err(Overrun);
        }
        self.received = self.received.wrapping_add(bytes);
        Ok(())
    }

    /// Payload was passed on to the host.
    pub fn forward(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// `fwd_cnt` for a header that is about to be sent.
    pub fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.told
    }

    /// Whether the guest is due a packet only to learn of freed space.
    pub fn owes_update(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= UPDATE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_is_what_the_guest_has_free() {
        let mut credit = Credit::default();
        assert_eq!(credit.window(), 0);
        credit.learn(100, 0);
        credit.send(60);
        assert_eq!(credit.window(), 40);
        credit.learn(100, 50);
        assert_eq!(credit.window(), 90);
        credit.learn(5, 50);
        assert_eq!(credit.window(), 0);
    }

    #[test]
    fn lies_about_progress_close_the_window() {
        let mut credit = Credit::default();
        credit.send(10);
        credit.learn(100, 11);
        assert_eq!(credit.window(), 0);
        credit.learn(u32::MAX, 11);
        assert_eq!(credit.window(), 0);
        credit.learn(u32::MAX, 10u32.wrapping_sub(u32::MAX));
        assert_eq!(credit.window(), 0);
    }

    #[test]
    fn counters_wrap() {
        let mut credit = Credit { sent: u32::MAX, guest_forwarded: u32::MAX, ..Default::default() };
        credit.learn(100, u32::MAX);
        credit.send(60);
        assert_eq!(credit.window(), 40);
        let near = u32::MAX - 10;
        let mut credit =
            Credit { received: near, forwarded: near, told: near, ..Default::default() };
        for _ in 0..3 {
            credit.receive(BUFFER_BYTES).unwrap();
            assert_eq!(credit.receive(1), Err(Overrun));
            credit.forward(BUFFER_BYTES);
            assert!(credit.owes_update());
            credit.tell();
            assert!(!credit.owes_update());
        }
    }

    #[test]
    fn a_guest_may_fill_the_buffer_and_no_more() {
        let mut credit = Credit::default();
        credit.receive(BUFFER_BYTES - 1).unwrap();
        assert_eq!(credit.receive(2), Err(Overrun));
        assert_eq!(credit.receive(u32::MAX), Err(Overrun));
        credit.receive(1).unwrap();
        credit.forward(1);
        assert!(!credit.owes_update());
        credit.receive(1).unwrap();
    }
}

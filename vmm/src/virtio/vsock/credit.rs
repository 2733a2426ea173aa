//! Credit: the flow control of one connection, in both directions. No I/O and no locks: arithmetic
//! modulo 2³² on the numbers of a hostile guest.
//!
//! Each side announces the size of its receive buffer (`buf_alloc`) and how much it has taken out
//! of it so far (`fwd_cnt`). A sender has sent `tx_cnt` bytes so far, and keeps `tx_cnt − fwd_cnt`
//! at or below `buf_alloc`. Source: VIRTIO 1.2, section 5.10.6.3.

/// The receive buffer that the device announces, and the most that it keeps for a host that does
/// not read. A larger one would not make the channel faster: the guest learns of freed space long
/// before it has used up what it knows of.
pub const BUFFER_BYTES: u32 = 256 * 1024;

/// The guest gets a credit update when this much space is free that it does not know of. Small
/// enough that it never stalls while the host reads; large enough that updates are rare.
const UPDATE_BYTES: u32 = BUFFER_BYTES / 4;

/// The guest has sent more than its credit, which no driver does.
#[derive(Debug, PartialEq, Eq)]
pub struct CreditExceeded;

/// The credit of both sides of a connection.
#[derive(Debug, Default)]
pub struct Credit {
    /// The guest's buffer and progress, as it announced them last.
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    /// Payload sent to the guest.
    tx_cnt: u32,
    /// Payload received from the guest, and how much of it has been passed on to the host.
    rx_cnt: u32,
    fwd_cnt: u32,
    /// The `fwd_cnt` that the guest was told last.
    announced_fwd_cnt: u32,
}

impl Credit {
    /// Records what the guest announces. Every packet carries it.
    pub fn record_announcement(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_buf_alloc = buf_alloc;
        self.guest_fwd_cnt = fwd_cnt;
    }

    /// Returns how much may be sent to the guest: nothing if it claims to have taken out more than
    /// was sent.
    pub fn guest_space(&self) -> u32 {
        let in_flight = self.tx_cnt.wrapping_sub(self.guest_fwd_cnt);
        self.guest_buf_alloc.saturating_sub(in_flight)
    }

    /// Records payload sent to the guest.
    pub fn record_sent(&mut self, bytes: u32) {
        self.tx_cnt = self.tx_cnt.wrapping_add(bytes);
    }

    /// Records payload received from the guest.
    ///
    /// # Errors
    /// The guest has exceeded its credit. Nothing is recorded.
    pub fn record_received(&mut self, bytes: u32) -> Result<(), CreditExceeded> {
        let buffered = self.rx_cnt.wrapping_sub(self.fwd_cnt);
        if bytes > BUFFER_BYTES.saturating_sub(buffered) {
            return Err(CreditExceeded);
        }
        self.rx_cnt = self.rx_cnt.wrapping_add(bytes);
        Ok(())
    }

    /// Records payload passed on to the host.
    pub fn record_forwarded(&mut self, bytes: u32) {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(bytes);
    }

    /// Returns the `fwd_cnt` for a header that is about to be sent.
    pub fn announce(&mut self) -> u32 {
        self.announced_fwd_cnt = self.fwd_cnt;
        self.fwd_cnt
    }

    /// Returns whether the guest is due a packet only to learn of freed space.
    pub fn owes_update(&self) -> bool {
        self.fwd_cnt.wrapping_sub(self.announced_fwd_cnt) >= UPDATE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_space_is_announced_minus_in_flight() {
        let mut credit = Credit::default();
        assert_eq!(credit.guest_space(), 0);
        credit.record_announcement(100, 0);
        credit.record_sent(60);
        assert_eq!(credit.guest_space(), 40);
        credit.record_announcement(100, 50);
        assert_eq!(credit.guest_space(), 90);
        credit.record_announcement(5, 50);
        assert_eq!(credit.guest_space(), 0);
    }

    #[test]
    fn false_fwd_cnt_leaves_no_space() {
        let mut credit = Credit::default();
        credit.record_sent(10);
        credit.record_announcement(100, 11);
        assert_eq!(credit.guest_space(), 0);
        credit.record_announcement(u32::MAX, 11);
        assert_eq!(credit.guest_space(), 0);
        credit.record_announcement(u32::MAX, 10u32.wrapping_sub(u32::MAX));
        assert_eq!(credit.guest_space(), 0);
    }

    #[test]
    fn counters_wrap() {
        let mut credit = Credit { tx_cnt: u32::MAX, guest_fwd_cnt: u32::MAX, ..Default::default() };
        credit.record_announcement(100, u32::MAX);
        credit.record_sent(60);
        assert_eq!(credit.guest_space(), 40);
        let near = u32::MAX - 10;
        let mut credit =
            Credit { rx_cnt: near, fwd_cnt: near, announced_fwd_cnt: near, ..Default::default() };
        for _ in 0..3 {
            credit.record_received(BUFFER_BYTES).unwrap();
            assert_eq!(credit.record_received(1), Err(CreditExceeded));
            credit.record_forwarded(BUFFER_BYTES);
            assert!(credit.owes_update());
            credit.announce();
            assert!(!credit.owes_update());
        }
    }

    #[test]
    fn guest_may_fill_the_buffer_and_no_more() {
        let mut credit = Credit::default();
        credit.record_received(BUFFER_BYTES - 1).unwrap();
        assert_eq!(credit.record_received(2), Err(CreditExceeded));
        assert_eq!(credit.record_received(u32::MAX), Err(CreditExceeded));
        credit.record_received(1).unwrap();
        credit.record_forwarded(1);
        assert!(!credit.owes_update());
        credit.record_received(1).unwrap();
    }
}

//! The errors of decoding a saved state.

/// A saved state has something that its layout does not allow. If its MAC is valid, only a fault of
/// the monitor that wrote it explains that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The bytes end within a value.
    #[error("it ends too early")]
    Truncated,
    /// Bytes are left after the last value.
    #[error("it continues after its end")]
    TrailingBytes,
    /// A flag is neither 0 nor 1.
    #[error("a flag is neither set nor clear")]
    Flag,
    /// A number has more than 32 bits.
    #[error("a number is too large")]
    Number,
    /// A list has more items than it may have, or than there are bytes.
    #[error("a list is too long")]
    List,
    /// The binding is not UTF-8.
    #[error("its binding is not text")]
    Binding,
    /// The number of vCPUs or devices is not that of the guest.
    #[error("it has another number of vCPUs or devices than its guest")]
    Count,
    /// A page lies outside the memory or the root image.
    #[error("a page is outside the memory")]
    Page,
    /// A device is in a state that no driver can reach.
    #[error("a device is in a state that no driver can reach")]
    Device,
    /// A queue lies outside guest memory.
    #[error("a queue is not in guest memory")]
    Queue,
}

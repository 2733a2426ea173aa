//! The errors of a template's state.

use std::io;

use super::layout::{MAX_STATE_BYTES, VERSION};
use super::malformed::Malformed;
use super::processor::Processor;

/// The state of a template cannot be used or written.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of a variant explains its fields")]
pub enum StateError {
    /// Reading or writing failed.
    #[error("{operation} the state of a template")]
    File { operation: &'static str, source: io::Error },
    /// The key is incomplete.
    #[error("read the key of a template, which has 32 bytes")]
    Key(#[source] io::Error),
    /// The file is of another kind.
    #[error("the file is not the state of a template")]
    Magic,
    /// Another version of this program has made the template.
    #[error(
        "the template has version {found}, this monitor makes and takes version {VERSION}: build \
         it again"
    )]
    Version { found: u32 },
    /// The file is shorter or longer than its header says.
    #[error(
        "the state of the template has {found} bytes instead of {expected}: it was cut off: build \
         it again"
    )]
    Length { found: usize, expected: usize },
    /// The file is larger than any state.
    #[error("a state of more than {MAX_STATE_BYTES} bytes")]
    TooLong,
    /// The MAC is wrong.
    #[error("the template was changed, or made with another key: build it again")]
    Mac,
    /// The template was made on another processor.
    #[error(
        "the template was made on another processor or kernel ({made}), this is {here}: build it \
         again"
    )]
    Processor { made: Processor, here: Processor },
    /// The specification has another memory size.
    #[error("the template has {made_mib} MiB of memory, the specification {requested_mib}")]
    MemorySize { made_mib: u32, requested_mib: u32 },
    /// The specification has another number of vCPUs.
    #[error("the template has {made} vCPUs, the specification {requested}")]
    VcpuCount { made: u8, requested: u8 },
    /// The files that the host has bound the template to have changed.
    #[error(
        "the template belongs to other files (it is bound to `{made}`, not to `{requested}`): \
         build it again"
    )]
    Binding { made: String, requested: String },
    /// The contents are malformed.
    #[error("the state of the template is malformed")]
    Malformed(#[from] Malformed),
}

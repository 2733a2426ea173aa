//! Finds out what jail this host supports, by setting one up.

use std::io::{Read, Write};

use chitin_text::error_chain;
use serde::{Deserialize, Serialize};

use super::{ChildAccess, ForkResult, Jail, fork_into_namespaces};
use crate::signals::TerminationSignals;
use crate::spec::VmSpec;

/// The support of a host for jails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailSupport {
    /// True if a jail can be set up, so that monitors run.
    pub usable: bool,
    /// The reason why no jail can be set up, with the remedy.
    pub reason: Option<String>,
    /// The jail that monitors get on this host.
    pub jail: Option<Jail>,
}

impl JailSupport {
    fn unusable(reason: String) -> Self {
        Self { usable: false, reason: Some(reason), jail: None }
    }
}

/// Sets up a jail around a child, which then exits. Returns in the calling process only, which must
/// have one thread.
pub fn probe_jail(signals: &TerminationSignals) -> JailSupport {
    let (mut reader, mut writer) = match std::io::pipe() {
        Ok(pipe) => pipe,
        Err(error) => return JailSupport::unusable(format!("create a pipe: {error}")),
    };
    let spec = VmSpec::new("", "");
    match fork_into_namespaces(&spec) {
        Err(error) => JailSupport::unusable(error_chain(&error)),
        Ok(ForkResult::Child(child)) => {
            let support = match child.enter_jail(ChildAccess::for_spec(&spec, true)) {
                Ok(jail) => JailSupport { usable: true, reason: None, jail: Some(jail) },
                Err(error) => JailSupport::unusable(error_chain(&error)),
            };
            let json = serde_json::to_vec(&support).unwrap_or_default();
            std::process::exit(writer.write_all(&json).is_err().into());
        }
        Ok(ForkResult::Supervisor(supervisor)) => {
            drop(writer);
            let exit = supervisor.wait_for_child(signals, None);
            let mut json = Vec::new();
            let _ = reader.read_to_end(&mut json);
            serde_json::from_slice(&json).unwrap_or_else(|_| {
                JailSupport::unusable(format!("the jailed process sent no result: {exit:?}"))
            })
        }
    }
}

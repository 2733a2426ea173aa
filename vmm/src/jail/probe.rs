//! What of the jail this host can do, found out by closing one.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::child::Needs;
use super::{Jail, Side, divide};
use crate::one_line;
use crate::spec::VmSpec;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survey {
    /// Whether a jail can be closed: monitors run here.
    pub usable: bool,
    /// Why not, with the remedy.
    pub reason: Option<String>,
    /// What a jail on this host is like.
    pub jail: Option<Jail>,
}

/// Closes a jail around a child, which then ends. Returns only in the parent. To be called with one thread.
///
/// `signals` is what a keeper listens to.
pub fn survey(signals: &OwnedFd) -> Survey {
    let unusable = |reason: String| Survey { usable: false, reason: Some(reason), jail: None };
    let (mut reader, mut writer) = match std::io::pipe() {
        Ok(pipe) => pipe,
        Err(error) => return unusable(format!("make a pipe: {error}")),
    };
    let spec = VmSpec::new("", "");
    match divide(&spec) {
        Err(error) => unusable(one_line(&error)),
        Ok(Side::Inmate(inmate)) => {
            let result = inmate.close(Needs::of(&spec, true));
            let found = match result {
                Ok(jail) => Survey { usable: true, reason: None, jail: Some(jail) },
                Err(error) => unusable(one_line(&error)),
            };
            let json = serde_json::to_vec(&found).unwrap_or_default();
            std::process::exit(writer.write_all(&json).is_err().into());
        }
        Ok(Side::Keeper(keeper)) => {
            drop(writer);
            let fate = keeper.watch(signals, None);
            let mut json = Vec::new();
            let _ = reader.read_to_end(&mut json);
            serde_json::from_slice(&json)
                .unwrap_or_else(|_| unusable(format!("the trial ended without a result: {fate:?}")))
        }
    }
}

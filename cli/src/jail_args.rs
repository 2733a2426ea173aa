//! The option `--no-jail`, and warnings about a jail that lacks a part.

use chitin::{Jail, JailUser};

use crate::output::notice;

/// Options about the jail of the monitor.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct JailArgs {
    /// Do not jail the monitor: a guest that takes over its monitor then has your files, your
    /// network and your user. For hosts that have no jail (`chitin doctor` gives the reason), and
    /// for debugging
    #[arg(long)]
    no_jail: bool,
}

impl JailArgs {
    /// Returns whether the monitor is jailed.
    pub fn is_jailed(self) -> bool {
        !self.no_jail
    }

    /// Prints a warning if the monitor is not jailed, and returns whether it is.
    pub fn warn_if_unjailed(self) -> bool {
        if self.no_jail {
            notice!(
                "chitin: WARNING: --no-jail: the monitor is not jailed; a guest that takes it over \
                 has everything this user has"
            );
        }
        self.is_jailed()
    }
}

/// Prints a warning if the jail has no user of its own and root started it.
pub fn warn_if_root(jail: Option<&Jail>) {
    if jail.is_some_and(|jail| jail.user == JailUser::Root) {
        notice!(
            "chitin: WARNING: the jail has no dedicated user, because root has no other user ids \
             here (in a container: map 1879048192 to 1883242496 as well); a guest that takes over \
             its monitor is root in an empty root"
        );
    }
}

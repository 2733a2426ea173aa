//! `--no-jail`, wherever a monitor is started.

/// Turns the jail off.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct NoJail {
    /// Do not jail the monitor: a guest that takes it over has your files, your network and your user. For hosts that cannot
    /// (`chitin doctor` says why), and to look for faults
    #[arg(long)]
    no_jail: bool,
}

impl NoJail {
    /// Whether there is to be a jail.
    pub fn wanted(self) -> bool {
        !self.no_jail
    }

    /// The same, said aloud if there is to be none.
    pub fn announced(self) -> bool {
        if self.no_jail {
            eprintln!(
                "chitin: WARNING: --no-jail: the monitor is not jailed; a guest that takes it over has everything this user has"
            );
        }
        self.wanted()
    }
}

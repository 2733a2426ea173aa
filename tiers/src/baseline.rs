//! The same container without Chitin in it: a command instead of the agent, by the program that the tier is made of. What a
//! benchmark measures beside a sandbox.

use tokio::process::Command;

use super::nanoclaw::{self, Nanoclaw};
use super::nemoclaw::Nemoclaw;
use crate::policy::Runtime;
use crate::sandbox::Plan;
use crate::{Artifacts, Error};

/// A command that runs in a container by itself.
#[derive(Debug)]
pub struct Bare(Kind);

#[derive(Debug)]
enum Kind {
    Runtime(Box<nanoclaw::Bare>),
    Docker(Vec<String>),
}

impl Bare {
    pub(crate) async fn of(
        tier: Runtime,
        artifacts: &Artifacts,
        plan: &Plan,
        argv: &[String],
    ) -> Result<Option<Bare>, Error> {
        Ok(match tier {
            Runtime::Ironclaw => None,
            Runtime::Nanoclaw => {
                let bare = Nanoclaw::new(artifacts).bare(plan, argv).await?;
                Some(Bare(Kind::Runtime(Box::new(bare))))
            }
            Runtime::Nemoclaw => {
                Some(Bare(Kind::Docker(Nemoclaw::new(artifacts).bare(plan, argv).await?)))
            }
        })
    }

    /// To be run once at a time: `runsc run`, or `docker run`, whose output is the command's.
    pub fn command(&self) -> Command {
        match &self.0 {
            Kind::Runtime(bare) => bare.command(),
            Kind::Docker(words) => {
                let mut command = Command::new("docker");
                command.args(words);
                command
            }
        }
    }
}

//! The same container without Chitin in it: a command instead of the agent, by the program that the tier is made of. What a
//! benchmark measures beside a sandbox.

use chitin_spec::TierKind;
use tokio::process::Command;
use tokio_util::task::TaskTracker;

use crate::docker::DockerTier;
use crate::oci::{self, OciTier};
use crate::{Artifacts, Error, LaunchSpec};

/// A command that runs in a container by itself.
#[derive(Debug)]
pub struct BaselineContainer(Kind);

#[derive(Debug)]
enum Kind {
    Runtime(Box<oci::Baseline>),
    Docker(Vec<String>),
}

impl BaselineContainer {
    /// One of that tier, with this command in it; none of a microVM.
    ///
    /// # Errors
    /// The tier cannot be had here.
    pub async fn create(
        tier: TierKind,
        artifacts: &Artifacts,
        plan: &LaunchSpec,
        argv: &[String],
        cleanup: &TaskTracker,
    ) -> Result<Option<BaselineContainer>, Error> {
        Ok(match tier {
            TierKind::Ironclaw => None,
            TierKind::Nanoclaw => {
                let bare = OciTier::new(artifacts, cleanup).baseline(plan, argv).await?;
                Some(BaselineContainer(Kind::Runtime(Box::new(bare))))
            }
            TierKind::Nemoclaw => Some(BaselineContainer(Kind::Docker(
                DockerTier::new(artifacts, cleanup).baseline(plan, argv).await?,
            ))),
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

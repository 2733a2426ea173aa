//! A container without Chitin in it, for benchmarks: the same engine and limits, but a command
//! instead of the agent.

use chitin_spec::TierKind;
use tokio::process::Command;
use tokio_util::task::TaskTracker;

use crate::docker::DockerTier;
use crate::oci::{self, OciTier};
use crate::{Artifacts, Error, LaunchSpec};

/// A container that runs a command by itself.
#[derive(Debug)]
pub struct BaselineContainer(Engine);

#[derive(Debug)]
enum Engine {
    Runtime(Box<oci::Baseline>),
    Docker(Vec<String>),
}

impl BaselineContainer {
    /// Creates a container of a tier that runs `argv`. Returns `None` for a microVM.
    ///
    /// # Errors
    /// Fails if the tier is unavailable.
    pub async fn create(
        tier: TierKind,
        artifacts: &Artifacts,
        spec: &LaunchSpec,
        argv: &[String],
        cleanup: &TaskTracker,
    ) -> Result<Option<BaselineContainer>, Error> {
        Ok(match tier {
            TierKind::Ironclaw => None,
            TierKind::Nanoclaw => {
                let baseline = OciTier::new(artifacts, cleanup).create_baseline(spec, argv).await?;
                Some(BaselineContainer(Engine::Runtime(Box::new(baseline))))
            }
            TierKind::Nemoclaw => Some(BaselineContainer(Engine::Docker(
                DockerTier::new(artifacts, cleanup).baseline_args(spec, argv).await?,
            ))),
        })
    }

    /// Returns `runsc run` or `docker run`, whose output is the command's. Runs must not overlap.
    pub fn command(&self) -> Command {
        match &self.0 {
            Engine::Runtime(baseline) => baseline.command(),
            Engine::Docker(args) => {
                let mut command = Command::new("docker");
                command.args(args);
                command
            }
        }
    }
}

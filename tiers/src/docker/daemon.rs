//! A daemon that answers, and the containers that it creates for this process.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use bollard::Docker;
use bollard::models::ContainerCreateBody;
use bollard::query_parameters::{CreateContainerOptionsBuilder, RemoveContainerOptionsBuilder};
use chitin_text::error_chain;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connect::open_client;
use super::container::Container;
use super::endpoint::{ClientEnvironment, DaemonEndpoint};
use super::image::ImageKind;
use super::liveness::{CallError, SIGNAL_PATIENCE, call, while_answering};
use crate::container::{Limits, RootArchive, random_name, report_leftover};
use crate::error::ContainerError;
use crate::{Artifacts, Error, Unavailable};

/// Time limit of the probe. A daemon answers in milliseconds; Podman, which answers one caller after
/// the other, has taken more than five seconds with twenty.
const PROBE_LIMIT: Duration = Duration::from_secs(15);

/// Time in which a start that nobody waits for must be completed, so that it can be undone.
const ABANDON_LIMIT: Duration = Duration::from_secs(10);

/// The API of Docker 20.10, the first with private cgroup namespaces.
const OLDEST_API: (usize, usize) = (1, 41);

const REMEDY: &str = "start it (Debian: apt-get install docker.io), join the group docker, or set \
                      DOCKER_HOST to its socket";

/// The program behind the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Engine {
    Docker,
    Podman,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Engine::Docker => "Docker",
            Engine::Podman => "Podman",
        })
    }
}

/// A daemon.
#[derive(Debug, Clone)]
pub(super) struct Daemon {
    pub docker: Docker,
    pub address: DaemonEndpoint,
    pub archive: RootArchive,
    pub version: String,
    pub engine: Engine,
}

impl Daemon {
    /// Finds the daemon of this process's environment.
    pub async fn find(artifacts: &Artifacts) -> Result<Daemon, Unavailable> {
        let address = ClientEnvironment::of_process()
            .find_daemon()
            .map_err(|error| Unavailable { reason: error_chain(&error), remedy: error.remedy() })?;
        let missing = |reason| Unavailable { reason, remedy: REMEDY.into() };
        let docker = open_client(&address).map_err(|error| {
            missing(format!("no Docker daemon answers at {address}: {}", error_chain(&error)))
        })?;
        let connect = async {
            let docker = docker.negotiate_version().await?;
            let version = docker.version().await?;
            Ok::<_, bollard::errors::Error>((docker, version))
        };
        let (docker, version) = match tokio::time::timeout(PROBE_LIMIT, connect).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                return Err(missing(format!(
                    "no Docker daemon answers at {address}: {}",
                    error_chain(&error)
                )));
            }
            Err(_) => {
                return Err(missing(format!(
                    "the Docker daemon at {address} did not answer within {} s",
                    PROBE_LIMIT.as_secs()
                )));
            }
        };
        let api = docker.client_version();
        if (api.major_version, api.minor_version) < OLDEST_API {
            let (major, minor) = OLDEST_API;
            return Err(Unavailable {
                reason: format!(
                    "the Docker daemon at {address} has API {api}, and {major}.{minor} is required"
                ),
                remedy: "use Docker 20.10 or newer".into(),
            });
        }
        let archive = RootArchive::find(artifacts)?;
        let components = version.components.unwrap_or_default();
        let podman = components.iter().any(|component| component.name.starts_with("Podman"));
        let engine = if podman { Engine::Podman } else { Engine::Docker };
        let version = version.version.unwrap_or_default();
        Ok(Daemon { docker, address, archive, version, engine })
    }

    /// Returns true if root in a container is another user on the daemon's host.
    pub async fn maps_users(&self) -> bool {
        let Ok(info) = call("describe its host", self.docker.info()).await else { return false };
        let options = info.security_options.unwrap_or_default();
        options.iter().any(|option| {
            option.split(',').any(|field| matches!(field, "name=userns" | "name=rootless"))
        })
    }

    pub fn error(&self, source: ContainerError) -> Error {
        Error::Container { engine: self.engine.to_string(), source }
    }

    pub fn call_error(&self, error: &CallError) -> Error {
        self.error(ContainerError::Reported(error_chain(error)))
    }

    /// Starts a container.
    ///
    /// The daemon completes a request even if the caller no longer waits for it. Such a container
    /// is removed in the background, which `cleanup` tracks.
    pub async fn start_container(
        &self,
        image: ImageKind,
        limits: Limits,
        mount_points: &[PathBuf],
        cleanup: &TaskTracker,
    ) -> Result<(Container, UnixStream), Error> {
        let body = self.container_body(image, limits, mount_points);
        let name = random_name()?;
        let (mut sender, receiver) = oneshot::channel();
        let (daemon, token) = (self.clone(), cleanup.token());
        tokio::spawn(async move {
            let abandoned = CancellationToken::new();
            let mut creating =
                pin!(daemon.create_container(&name, image, body, limits, &abandoned));
            let started = tokio::select! {
                started = &mut creating => Some(started),
                () = sender.closed() => None,
            };
            let unwanted = match started {
                Some(started) => sender.send(started).err(),
                None => {
                    abandoned.cancel();
                    let (docker, patience) = (&daemon.docker, SIGNAL_PATIENCE);
                    let created = while_answering(docker, patience, ABANDON_LIMIT, creating).await;
                    if created.is_none() {
                        report_leftover(daemon.describe_leftover(&name));
                    }
                    created
                }
            };
            if let Some(Ok((mut container, _))) = unwanted
                && let Err(Error::Leftover { leftover }) = container.end().await
            {
                report_leftover(leftover);
            }
            drop(token);
        });
        receiver.await.unwrap_or_else(|_| Err(self.error(ContainerError::Cancelled)))
    }

    /// Describes a container that a silent daemon may have.
    pub fn describe_leftover(&self, container: &str) -> String {
        format!(
            "the container {container}, because {} at {} does not answer (later runs and `chitin \
             prune` remove it)",
            self.engine, self.address
        )
    }

    async fn create_container(
        &self,
        name: &str,
        image: ImageKind,
        body: ContainerCreateBody,
        limits: Limits,
        abandoned: &CancellationToken,
    ) -> Result<(Container, UnixStream), Error> {
        let options = CreateContainerOptionsBuilder::default().name(name).build();
        let create = || {
            let created = self.docker.create_container(Some(options.clone()), body.clone());
            call("create the container", created)
        };
        let mut created = create().await;
        if created.as_ref().is_err_and(|error| error.status() == Some(404)) {
            self.import_image(image, abandoned).await?;
            created = create().await;
        }
        let id = match created {
            Ok(created) => created.id,
            Err(error) => return Err(self.explain_refusal(error, limits).await),
        };
        let mut container = Container::new(self.clone(), id);
        match container.attach_and_start().await {
            Ok(stream) => Ok((container, stream)),
            Err(error) => {
                container.end().await?;
                Err(self.call_error(&error))
            }
        }
    }

    /// Returns the error of a container that the daemon did not create.
    async fn explain_refusal(&self, error: CallError, limits: Limits) -> Error {
        if error.status() == Some(400)
            && let Ok(info) = call("describe its host", self.docker.info()).await
            && let Some(available) = info.ncpu
            && i64::from(limits.vcpus) > available
        {
            let requested = limits.vcpus;
            return self.error(ContainerError::TooManyCpus { requested, available });
        }
        self.call_error(&error)
    }

    /// Removes a container by force, whatever its state.
    pub async fn remove_container(&self, id: &str) -> Result<(), CallError> {
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        call("remove the container", self.docker.remove_container(id, Some(options))).await
    }
}

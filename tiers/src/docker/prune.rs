//! The removal of what earlier runs left with the daemon: containers of processes that have ended,
//! and images of other roots.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bollard::models::{ContainerSummary, ContainerSummaryStateEnum, ImageSummary};
use bollard::query_parameters::{
    ListContainersOptionsBuilder, ListImagesOptionsBuilder, RemoveImageOptions,
};
use chitin_text::error_chain;

use super::LABEL;
use super::daemon::Daemon;
use super::image::IMAGE_LABEL;
use super::liveness::{CallError, call};
use crate::container::Owner;
use crate::{Error, Pruned};

/// Age after which a container that was not started is abandoned.
const STALE: Duration = Duration::from_secs(120);

/// Removes containers whose creators died before they started them.
pub(super) async fn remove_abandoned(daemon: Daemon) {
    let Ok(listed) = daemon.list_own_containers(&["created", "exited", "dead"]).await else {
        return;
    };
    for container in listed {
        let idle = container.state != Some(ContainerSummaryStateEnum::RUNNING);
        if let (true, Some(id)) =
            (idle && (is_orphan(&container) || is_stale(&container)), container.id)
        {
            let _ = daemon.remove_container(&id).await;
        }
    }
}

/// Returns true if the process that created the container is known to have ended.
fn is_orphan(container: &ContainerSummary) -> bool {
    let owner = container.labels.as_ref().and_then(|labels| Owner::parse(labels.get(LABEL)?));
    owner.is_some_and(|owner| owner.has_ended())
}

fn is_stale(container: &ContainerSummary) -> bool {
    let created = container.created.and_then(|at| u64::try_from(at).ok()).unwrap_or(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(Duration::from_secs(created)) > STALE
}

impl Daemon {
    /// Lists the containers that some process of Chitin has created, in these states or in any.
    async fn list_own_containers(
        &self,
        states: &[&str],
    ) -> Result<Vec<ContainerSummary>, CallError> {
        let mut filters = HashMap::from([("label", vec![LABEL])]);
        if !states.is_empty() {
            filters.insert("status", states.to_vec());
        }
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        call("list the containers", self.docker.list_containers(Some(options))).await
    }

    /// Removes the containers of ended processes, in whatever state, and the images of other roots
    /// that no container uses.
    pub async fn prune(&self) -> Result<Vec<Pruned>, Error> {
        let mut pruned = Vec::new();
        let listed =
            self.list_own_containers(&[]).await.map_err(|error| self.call_error(&error))?;
        for container in listed {
            let idle = container.state != Some(ContainerSummaryStateEnum::RUNNING);
            if !(is_orphan(&container) || idle && is_stale(&container)) {
                continue;
            }
            let Some(id) = container.id else { continue };
            let object = format!("container {} of {}", &id[..id.len().min(12)], self.engine);
            let removed = self.remove_container(&id).await;
            pruned.push(to_pruned(object, removed));
        }
        let filters = HashMap::from([("label", vec![IMAGE_LABEL])]);
        let options = ListImagesOptionsBuilder::default().filters(&filters).build();
        let images = call("list the images", self.docker.list_images(Some(options))).await;
        for image in images.map_err(|error| self.call_error(&error))? {
            if self.is_current(&image) {
                continue;
            }
            let name = image.repo_tags.first().unwrap_or(&image.id);
            let object = format!("image {name} of {}", self.engine);
            let removal = self.docker.remove_image(&image.id, None::<RemoveImageOptions>, None);
            match call("remove the image", removal).await {
                // A container uses it.
                Err(error) if error.status() == Some(409) => {}
                removed => pruned.push(to_pruned(object, removed.map(drop))),
            }
        }
        Ok(pruned)
    }

    /// Returns true for a named image of the present root.
    fn is_current(&self, image: &ImageSummary) -> bool {
        let named = image.repo_tags.iter().any(|tag| tag != "<none>:<none>");
        named && image.labels.get(IMAGE_LABEL) == Some(&self.archive.digest)
    }
}

fn to_pruned(object: String, removed: Result<(), CallError>) -> Pruned {
    let error = match removed {
        Ok(()) => None,
        // Another process was faster.
        Err(error) if error.status() == Some(404) => None,
        Err(error) => Some(error_chain(&error)),
    };
    Pruned { object, error }
}

//! `with-dockerd [--podman] CMD [ARG…]`: runs a command with a separate Docker daemon, or service of
//! Podman, named by `DOCKER_HOST`, and stops it afterwards.
//!
//! Exits with the code of the command, or with 1 if containers are left.

use std::env;
use std::error::Error;
use std::process::{Command, ExitCode};

use chitin_integration::{Dockerd, Podman, docker};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut words = env::args_os().skip(1).peekable();
    let podman = words.next_if(|word| word == "--podman").is_some();
    let program = words.next().ok_or("usage: with-dockerd [--podman] CMD [ARG…]")?;
    // Dropping either of them stops it.
    let (dockerd, podman) = match podman {
        true => (None, Some(Podman::start()?)),
        false => (Some(Dockerd::start()?), None),
    };
    let host = dockerd.as_ref().map(Dockerd::host).or(podman.as_ref().map(Podman::host));
    let host = host.unwrap_or_default();
    let status = Command::new(&program)
        .args(words)
        .env("DOCKER_HOST", &host)
        .status()
        .map_err(|error| format!("start {}: {error}", program.display()))?;
    let left = docker::list_containers(&host)?;
    if !left.is_empty() {
        eprintln!("with-dockerd: containers are left: {left:?}");
        return Ok(ExitCode::FAILURE);
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    Ok(ExitCode::from(code))
}

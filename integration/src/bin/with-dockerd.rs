//! `with-dockerd CMD [ARG…]`: runs a command with a separate Docker daemon, named by
//! `DOCKER_HOST`, and stops the daemon afterwards.
//!
//! Exits with the code of the command, or with 1 if containers are left.

use std::env;
use std::error::Error;
use std::process::{Command, ExitCode};

use chitin_integration::{Dockerd, docker};

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let mut words = env::args_os().skip(1);
    let program = words.next().ok_or("usage: with-dockerd CMD [ARG…]")?;
    let dockerd = Dockerd::start()?;
    let status = Command::new(&program)
        .args(words)
        .env("DOCKER_HOST", dockerd.host())
        .status()
        .map_err(|error| format!("start {}: {error}", program.display()))?;
    let left = docker::list_containers(&dockerd.host())?;
    if !left.is_empty() {
        eprintln!("with-dockerd: containers are left: {left:?}");
        return Ok(ExitCode::FAILURE);
    }
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    Ok(ExitCode::from(code))
}

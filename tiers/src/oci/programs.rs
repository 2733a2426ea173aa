//! The search for a runtime's program, which runs as root.

use std::path::{Path, PathBuf};

use super::private_dir::resolve_trusted;

/// Directories of administrators' tools, for the runtime itself too.
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Directories to search first. The `PATH` of this process is not searched: root may have inherited
/// it from a user.
const OVERRIDE: &str = "CHITIN_RUNTIME_PATH";

/// Finds a program that only root can replace.
///
/// # Errors
/// The reason against the program, for users.
pub(super) fn find_program(name: &str) -> Result<PathBuf, String> {
    let preferred = std::env::var_os(OVERRIDE).unwrap_or_default();
    let dirs = std::env::split_paths(&preferred).chain(std::env::split_paths(PATH));
    find_in(name, dirs)
}

fn find_in(name: &str, dirs: impl Iterator<Item = PathBuf>) -> Result<PathBuf, String> {
    let mut refused = None;
    for path in dirs.filter(|dir| dir.is_absolute()).map(|dir| dir.join(name)) {
        if !path.is_file() {
            continue;
        }
        match resolve_trusted(&path) {
            Ok(program) => return Ok(program),
            Err(error) => {
                refused.get_or_insert(describe_refusal(&path, &error));
            }
        }
    }
    Err(refused.unwrap_or_else(|| format!("{name} is not installed")))
}

fn describe_refusal(path: &Path, error: &std::io::Error) -> String {
    format!("{} is not run as root: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn program_that_others_can_replace_is_not_run() {
        let dir = tempfile::tempdir().unwrap();
        let (open, closed) = (dir.path().join("open"), dir.path().join("closed"));
        for bin in [&open, &closed] {
            fs::create_dir(bin).unwrap();
            fs::write(bin.join("runsc"), "").unwrap();
        }
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        let find = |dirs: &[&Path]| find_in("runsc", dirs.iter().map(|dir| dir.to_path_buf()));
        let expected = closed.join("runsc").canonicalize().unwrap();
        assert_eq!(find(&[&open, &closed]), Ok(expected.clone()));
        assert_eq!(find(&[Path::new("closed"), &closed]), Ok(expected));
        let reason = find(&[&open]).unwrap_err();
        assert!(reason.contains(open.to_str().unwrap()), "{reason}");
        assert!(find(&[dir.path()]).unwrap_err().contains("not installed"));
    }
}

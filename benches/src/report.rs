//! JSON reports.

use std::path::Path;

use serde::Serialize;

use crate::failure::Failure;

/// Writes a value as indented JSON.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Failure> {
    let failed = |source| Failure::Io { what: format!("write {}", path.display()), source };
    let mut json = serde_json::to_vec_pretty(value).map_err(|error| failed(error.into()))?;
    json.push(b'\n');
    std::fs::write(path, json).map_err(failed)
}

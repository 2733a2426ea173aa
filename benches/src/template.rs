//! A template that lives as long as one benchmark.

use std::ffi::OsString;

use chitin::{Builder, Templates, WarmUpSpec};

use crate::error::BenchError;

/// A template that is removed when this is dropped.
pub struct TemporaryTemplate {
    templates: Templates,
    pub name: String,
}

impl TemporaryTemplate {
    /// Builds a template, named after this process, whose copies run `first_command` first.
    pub async fn build(
        builder: Builder,
        script: Option<String>,
        first_command: Vec<OsString>,
    ) -> Result<TemporaryTemplate, BenchError> {
        let templates = Templates::locate().map_err(chitin::Error::from)?;
        let name = format!("bench-{}", std::process::id());
        let warm_up = WarmUpSpec { script, first_command };
        builder.build_template(&name, &warm_up).await?;
        Ok(TemporaryTemplate { templates, name })
    }
}

impl Drop for TemporaryTemplate {
    fn drop(&mut self) {
        if let Err(error) = self.templates.remove(&self.name) {
            BenchError::Sandbox(error.into()).print();
        }
    }
}

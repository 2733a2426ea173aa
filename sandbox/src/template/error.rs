use std::io;
use std::path::PathBuf;

pub use super::trusted_dir::Distrust;

/// An invalid template, or a failed operation on one.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The name is not valid as the name of a directory.
    #[error(
        "`{name}` is not a template name: letters, digits, `.`, `_` and `-`, at most {max}, the \
         first one not `.` or `-`"
    )]
    Name {
        /// The requested name.
        name: String,
        /// The largest length.
        max: usize,
    },
    /// There is no template of this name.
    #[error("there is no template `{name}` in {}: `chitin template ls` lists them", dir.display())]
    Missing {
        /// The requested name.
        name: String,
        /// The directory that was searched.
        dir: PathBuf,
    },
    /// A directory among the templates is none of them.
    #[error(
        "{} is not a template: Chitin neither uses nor removes it; move it elsewhere",
        path.display()
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
    },
    /// A file of the template cannot be used.
    #[error("{operation} {}", path.display())]
    File {
        /// The operation.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Another user could have changed a file or directory.
    #[error("{} is not trusted: {reason}", path.display())]
    Untrusted {
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        reason: Distrust,
    },
    /// `template.json` is not valid, although its seal is.
    #[error("{} is damaged: build the template again", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// A file of the template is not the one that was sealed, or the key is not the one it was
    /// sealed with.
    #[error(
        "the template `{0}` was changed, replaced or moved, or the key is another: build it again"
    )]
    Seal(String),
    /// The template was built by a version with another seal.
    #[error("the template `{0}` was built by another version of Chitin: build it again")]
    Outdated(String),
    /// The key would be stored in the directory that it protects, or the reverse.
    #[error(
        "the templates in {} and their key in {} must not contain each other: set CHITIN_TEMPLATES \
         to another directory",
        templates.display(), key.display()
    )]
    KeyAmongTemplates {
        /// The directory of the templates.
        templates: PathBuf,
        /// The directory of the key.
        key: PathBuf,
    },
    /// No directory for templates is known.
    #[error("no home directory: set CHITIN_TEMPLATES and XDG_STATE_HOME to directories")]
    NoHome,
}

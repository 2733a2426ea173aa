//! A template that is being built: a hidden directory, locked by its builder as long as it lives.
//!
//! ```text
//!   created and locked ──files──▶ written ──publish──▶ renamed to the template's name
//!            │                       └── dropped ─────▶ removed
//!            └── the builder was killed, which ends the lock ─▶ removed by a later command
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;

use chitin_tiers::GuestFiles;
use rustix::fs::{FlockOperation, Mode, RenameFlags, flock, renameat, renameat_with};
use rustix::io::Errno;

use super::key::read_key;
use super::manifest::SealedManifest;
use super::seal::seal_bytes;
use super::store::{FILES, check_template_name, identify_files, is_missing, is_template};
use super::trusted_dir::{TrustedDir, file_error};
use super::{Manifest, TemplateError, Templates};

/// The state with recorded pages, which replaces the first state.
const NEW_STATE: &str = "state.new";

/// All files that a draft may have.
const DRAFT_FILES: [&str; 5] = ["template.json", "seal", "state", "memory", NEW_STATE];

/// Files that no process changes any more.
const READ_ONLY: Mode = Mode::RUSR;

/// A template that is being built. If it is dropped before it is published, its files are removed.
#[derive(Debug)]
pub(crate) struct TemplateDraft {
    templates: Templates,
    name: String,
    parent: TrustedDir,
    draft_name: String,
    dir: TrustedDir,
    published: bool,
}

impl Templates {
    /// Creates the directory of a new template, which [`TemplateDraft::publish`] renames. Removes
    /// what killed builds have left.
    pub(crate) fn create_draft(&self, name: &str) -> Result<TemplateDraft, TemplateError> {
        check_template_name(name)?;
        let parent = TrustedDir::create(&self.dir)?;
        // Found out before the build, which takes seconds, and not after it.
        self.open_key()?;
        check_replaceable(&parent, name)?;
        remove_abandoned_drafts(&parent);
        let suffix = getrandom::u32().map_err(io::Error::from);
        let draft_name = format!(".{name}.{}", suffix.map_err(file_error("create", &self.dir))?);
        // Held from the creation of the directory until it is locked: without it, another process
        // could take the draft for an abandoned one.
        let guard = lock_drafts(&parent)?;
        let dir = parent.create_dir(&draft_name)?;
        flock(dir.fd(), FlockOperation::LockExclusive).map_err(file_error("lock", dir.path()))?;
        drop(guard);
        let (templates, name) = (self.clone(), name.into());
        Ok(TemplateDraft { templates, name, parent, draft_name, dir, published: false })
    }
}

/// Removes drafts whose builder has ended without removing them. The next command tries again what
/// cannot be removed.
pub(super) fn remove_abandoned_drafts(parent: &TrustedDir) {
    let Ok(_guard) = lock_drafts(parent) else { return };
    for name in parent.list_names().unwrap_or_default() {
        if !is_draft_name(&name) {
            continue;
        }
        let Ok(dir) = parent.open_dir(&name) else { continue };
        if flock(dir.fd(), FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = parent.remove_dir(&name, &DRAFT_FILES);
        }
    }
}

/// Locks the creation and removal of drafts until the result is dropped.
fn lock_drafts(parent: &TrustedDir) -> Result<TrustedDir, TemplateError> {
    // A lock belongs to an open file: this one is opened for it.
    let locked = TrustedDir::open(parent.path())?;
    flock(locked.fd(), FlockOperation::LockExclusive).map_err(file_error("lock", parent.path()))?;
    Ok(locked)
}

/// Returns whether this is `.NAME.NUMBER`.
fn is_draft_name(name: &str) -> bool {
    name.strip_prefix('.').and_then(|rest| rest.rsplit_once('.')).is_some_and(|(name, number)| {
        check_template_name(name).is_ok() && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

/// Checks that nothing but a template has this name.
fn check_replaceable(parent: &TrustedDir, name: &str) -> Result<(), TemplateError> {
    match parent.open_dir(name) {
        Err(error) if is_missing(&error) => Ok(()),
        Err(error) => Err(error),
        Ok(dir) if is_template(&dir)? => Ok(()),
        Ok(dir) => Err(TemplateError::Foreign { path: dir.path().to_owned() }),
    }
}

impl TemplateDraft {
    /// Creates the files that a guest is saved into.
    pub fn create_files(&self) -> Result<GuestFiles, TemplateError> {
        Ok(GuestFiles {
            memory: self.dir.create_file("memory", READ_ONLY)?,
            state: self.dir.create_file("state", READ_ONLY)?,
            key: self.templates.open_key()?,
        })
    }

    /// Opens the saved files for reading.
    pub fn open_files(&self) -> Result<GuestFiles, TemplateError> {
        Ok(GuestFiles {
            memory: self.dir.open_file("memory")?,
            state: self.dir.open_file("state")?,
            key: self.templates.open_key()?,
        })
    }

    /// Creates the file of a state with recorded pages, which replaces the first state.
    pub fn create_new_state(&self) -> Result<File, TemplateError> {
        self.dir.create_file(NEW_STATE, READ_ONLY)
    }

    /// Opens the key again: each reader reads it once.
    pub fn open_key(&self) -> Result<File, TemplateError> {
        self.templates.open_key()
    }

    /// Seals the template and gives it its name. An existing template of this name is replaced.
    pub fn publish(mut self, mut manifest: Manifest) -> Result<Manifest, TemplateError> {
        let dir = &self.dir;
        renameat(dir.fd(), NEW_STATE, dir.fd(), "state")
            .map_err(file_error("rename", &dir.join(NEW_STATE)))?;
        let (memory, state) = (dir.open_file("memory")?, dir.open_file("state")?);
        let inspect = || file_error("inspect", dir.path());
        manifest.memory_bytes = memory.metadata().map_err(inspect())?.blocks() * 512;
        let (memory, state_mac) = identify_files(&memory, &state).map_err(inspect())?;
        let sealed = SealedManifest { manifest, memory, state_mac };
        let json = serde_json::to_vec_pretty(&sealed).map_err(|source| {
            TemplateError::Manifest { path: dir.join("template.json"), source }
        })?;
        let key = read_key(&mut self.templates.open_key()?);
        let key = key.map_err(file_error("read the key of", dir.path()))?;
        let seal = seal_bytes(&*key, &json).map_err(file_error("seal", dir.path()))?;
        for (name, bytes) in [("template.json", json), ("seal", seal)] {
            let mut file = dir.create_file(name, READ_ONLY)?;
            file.write_all(&bytes).map_err(file_error("write", &dir.join(name)))?;
        }
        self.take_name()?;
        Ok(sealed.manifest)
    }

    /// Gives the draft its name. A template that has it is exchanged in one step, then removed.
    fn take_name(&mut self) -> Result<(), TemplateError> {
        let TemplateDraft { parent, draft_name, name, .. } = self;
        let rename = |flags| renameat_with(parent.fd(), &*draft_name, parent.fd(), &*name, flags);
        match rename(RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                check_replaceable(parent, name)?;
                rename(RenameFlags::EXCHANGE).map_err(file_error("replace", &parent.join(name)))?;
                parent.remove_dir(draft_name, &FILES)?;
            }
            // The file system knows plain renames only, which replace no directory with files.
            Err(Errno::INVAL) => {
                check_replaceable(parent, name)?;
                if parent.has_dir(name) {
                    parent.remove_dir(name, &FILES)?;
                }
                rename(RenameFlags::empty()).map_err(file_error("rename", self.dir.path()))?;
            }
            Err(errno) => return Err(file_error("rename", self.dir.path())(errno)),
        }
        self.published = true;
        Ok(())
    }
}

impl Drop for TemplateDraft {
    fn drop(&mut self) {
        if !self.published {
            // A failure cannot be reported here, and the draft is of no further use.
            let _ = self.parent.remove_dir(&self.draft_name, &DRAFT_FILES);
        }
    }
}

#[cfg(test)]
#[path = "draft_test.rs"]
pub(super) mod tests;

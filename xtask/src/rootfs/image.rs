//! Makes an EROFS image of a root tree.

use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::recipe::Recipe;
use crate::process::{capture_output, is_on_path, new_command};

/// virtio-pmem regions are mapped in 2 MiB sections, and the monitor can use huge pages only for whole ones.
pub const ALIGNMENT: u64 = 2 << 20;

const SUPERBLOCK_OFFSET: u64 = 1024;
const MAGIC: [u8; 4] = 0xE0F5_E1E2_u32.to_le_bytes();

/// Run under fakeroot, so that owners can be given without being root:
/// `TREE IMAGE ARCHIVE TIMESTAMP [OWNER PATH]… -- MKFS-OPTION…`. The archive has the same names, modes, owners and contents.
const SCRIPT: &str = r#"tree=$1 image=$2 archive=$3 timestamp=$4; shift 4
chown -hR 0:0 "$tree"
while [ "$1" != -- ]; do chown -h "$1:$1" "$tree/$2"; shift 2; done; shift
tar --create --file="$archive" --directory="$tree" --format=gnu --sort=name --mtime="@$timestamp" --numeric-owner .
exec mkfs.erofs "$@" "$image" "$tree""#;

/// The version of erofs-utils: another one may lay files out differently. (mkfs.erofs 1.5 cannot be asked.)
pub fn tools_version() -> Result<String> {
    let shown = capture_output(&mut new_command("fsck.erofs", ["-V"]))?;
    let version = shown.split_ascii_whitespace().nth(1);
    Ok(version.with_context(|| format!("fsck.erofs says {shown:?} and no version"))?.into())
}

/// Writes an image of `tree`, aligned and checked, and an archive of it for containers. The result depends on the tree's names, modes and contents alone.
pub fn make(tree: &Path, image: &Path, archive: &Path, recipe: &Recipe) -> Result<u64> {
    // Started by a shell, which would say it less well.
    ensure!(
        is_on_path("mkfs.erofs"),
        "mkfs.erofs is missing (cargo xtask setup installs what is missing)"
    );
    let mut command = new_command("fakeroot", ["--", "sh", "-euc", SCRIPT, "sh"]);
    command.arg(tree).arg(image).arg(archive).arg(recipe.timestamp.to_string());
    for directory in recipe.directory.iter().filter(|directory| directory.owner != 0) {
        command.arg(directory.owner.to_string()).arg(&directory.path);
    }
    command.args([
        "--",
        "--quiet",
        // Without a file's tail in its inode: DAX maps whole blocks of the image and leaves other files to the page cache.
        "-Enoinline_data,force-inode-compact",
        // The builder's file systems may carry attributes that are none of ours.
        "-x-1",
        &format!("-T{}", recipe.timestamp),
        &format!("-U{}", recipe.uuid),
    ]);
    capture_output(&mut command).context("make the image")?;
    let length = pad(image)?;
    check(image, recipe, length)?;
    Ok(length)
}

/// Zeroes up to a multiple of [`ALIGNMENT`]; returns the length.
pub fn pad(image: &Path) -> Result<u64> {
    let say = || format!("pad {}", image.display());
    let file = OpenOptions::new().write(true).open(image).with_context(say)?;
    let length = file.metadata().with_context(say)?.len().next_multiple_of(ALIGNMENT);
    file.set_len(length).with_context(say)?;
    Ok(length)
}

fn check(image: &Path, recipe: &Recipe, length: u64) -> Result<()> {
    let mut file = fs::File::open(image).with_context(|| format!("open {}", image.display()))?;
    let mut magic = [0; 4];
    file.seek(SeekFrom::Start(SUPERBLOCK_OFFSET))?;
    file.read_exact(&mut magic).with_context(|| format!("read {}", image.display()))?;
    ensure!(magic == MAGIC, "{} is not an EROFS image", image.display());
    let limit = recipe.max_mib << 20;
    ensure!(
        length <= limit,
        "the image has {} MiB, the recipe allows {}",
        length >> 20,
        recipe.max_mib
    );
    capture_output(new_command("fsck.erofs", ["--"]).arg(image)).context("check the image")?;
    Ok(())
}

#[cfg(test)]
#[path = "image_test.rs"]
mod tests;

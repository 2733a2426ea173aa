//! Builds an EROFS image of a root tree.

use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::recipe::Recipe;
use crate::process::{capture_output, is_on_path, new_command};

/// The alignment of an image: virtio-pmem regions are mapped in sections of 2 MiB, and the monitor
/// can use huge pages only for whole ones.
pub const ALIGNMENT: u64 = 2 << 20;

const SUPERBLOCK_OFFSET: u64 = 1024;
const MAGIC: [u8; 4] = 0xE0F5_E1E2_u32.to_le_bytes();

/// A shell script for fakeroot, which sets owners without root:
/// `TREE IMAGE ARCHIVE TIMESTAMP [OWNER PATH]… -- MKFS-OPTION…`. The archive has the same names,
/// modes, owners and contents as the image.
const SCRIPT: &str = r#"tree=$1 image=$2 archive=$3 timestamp=$4; shift 4
chown -hR 0:0 "$tree"
while [ "$1" != -- ]; do chown -h "$1:$1" "$tree/$2"; shift 2; done; shift
tar --create --file="$archive" --directory="$tree" --format=gnu --sort=name \
  --mtime="@$timestamp" --numeric-owner .
exec mkfs.erofs "$@" "$image" "$tree""#;

/// Returns the version of erofs-utils: another one may arrange files differently. mkfs.erofs 1.5
/// has no option for it.
pub fn query_tools_version() -> Result<String> {
    let shown = capture_output(&mut new_command("fsck.erofs", ["-V"]))?;
    let version = shown.split_ascii_whitespace().nth(1);
    Ok(version
        .with_context(|| format!("fsck.erofs -V printed {shown:?} instead of a version"))?
        .into())
}

/// Writes an image of `tree`, aligned and checked, and an archive of it for containers, and returns
/// the size of the image. The result depends on names, modes and contents of the tree alone.
pub fn build_image(tree: &Path, image: &Path, archive: &Path, recipe: &Recipe) -> Result<u64> {
    // A shell starts it, whose error would be less clear.
    ensure!(is_on_path("mkfs.erofs"), "mkfs.erofs is missing (`cargo xtask setup` installs it)");
    let mut command = new_command("fakeroot", ["--", "sh", "-euc", SCRIPT, "sh"]);
    command.arg(tree).arg(image).arg(archive).arg(recipe.timestamp.to_string());
    for directory in recipe.directory.iter().filter(|directory| directory.owner != 0) {
        command.arg(directory.owner.to_string()).arg(&directory.path);
    }
    command.args([
        "--",
        "--quiet",
        // No tails of files in inodes: DAX maps whole blocks of the image and leaves other files to
        // the page cache.
        "-Enoinline_data,force-inode-compact",
        // No extended attributes: the file system of the builder may have set some.
        "-x-1",
        &format!("-T{}", recipe.timestamp),
        &format!("-U{}", recipe.uuid),
    ]);
    capture_output(&mut command).context("build the image")?;
    let length = pad_image(image)?;
    check_image(image, recipe, length)?;
    Ok(length)
}

/// Appends zeroes up to a multiple of [`ALIGNMENT`]; returns the length.
fn pad_image(image: &Path) -> Result<u64> {
    let context = || format!("pad {}", image.display());
    let file = OpenOptions::new().write(true).open(image).with_context(context)?;
    let length = file.metadata().with_context(context)?.len().next_multiple_of(ALIGNMENT);
    file.set_len(length).with_context(context)?;
    Ok(length)
}

fn check_image(image: &Path, recipe: &Recipe, length: u64) -> Result<()> {
    let mut file = fs::File::open(image).with_context(|| format!("open {}", image.display()))?;
    let mut magic = [0; 4];
    file.seek(SeekFrom::Start(SUPERBLOCK_OFFSET))?;
    file.read_exact(&mut magic).with_context(|| format!("read {}", image.display()))?;
    ensure!(magic == MAGIC, "{} is not an EROFS image", image.display());
    let limit = recipe.max_mib << 20;
    ensure!(
        length <= limit,
        "the image has {} MiB, more than the {} of the recipe",
        length >> 20,
        recipe.max_mib
    );
    capture_output(new_command("fsck.erofs", ["--"]).arg(image)).context("check the image")?;
    Ok(())
}

#[cfg(test)]
#[path = "image_test.rs"]
mod tests;

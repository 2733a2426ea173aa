//! The root image: an EROFS file that every microVM maps.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vm_memory::MmapRegion;
use vm_memory::mmap::MmapRegionError;

use crate::memory::{self, FileSharing};

/// The unit of an image's length: guests map persistent memory in pages of this size
/// (`memremap_compat_align` of Linux on x86-64).
pub const IMAGE_UNIT: u64 = 2 << 20;

/// The largest image: a guest kernel describes each page of it with 64 bytes, out of at least 64
/// MiB of memory.
const MAX_IMAGE_BYTES: u64 = 1 << 30;

// The superblock (`fs/erofs/erofs_fs.h` of Linux).
const SUPERBLOCK_AT: u64 = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const BLOCK_BITS_AT: usize = 12;
const BLOCKS_AT: usize = 36;
/// The largest block that a guest mounts: one page.
const MAX_BLOCK_BITS: u8 = 12;

/// The file cannot be used as a root image.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message of a variant explains its fields")]
pub enum ImageError {
    /// The file has no EROFS superblock.
    #[error("not an EROFS image: build one with `cargo xtask rootfs` or `mkfs.erofs`")]
    NotErofs,
    /// The file has an invalid length.
    #[error(
        "{bytes} bytes long: a root image is a multiple of 2 MiB, up to {MAX_IMAGE_BYTES} bytes \
         (`truncate -s %2M` pads one)"
    )]
    Length { bytes: u64 },
    /// The file is shorter than its file system.
    #[error(
        "truncated: the file system has {expected} bytes, the file {bytes}: build or copy it again"
    )]
    Truncated { expected: u64, bytes: u64 },
    /// Reading failed.
    #[error("read the superblock")]
    Read(#[source] std::io::Error),
    /// Mapping failed.
    #[error("map {bytes} bytes")]
    Map { bytes: u64, source: MmapRegionError },
}

/// Checks an image and maps it, read-only: its pages in the host's page cache, or a copy of them.
///
/// # Errors
/// The first property of the file that is invalid.
pub fn map_image(file: &Arc<File>, sharing: FileSharing) -> Result<MmapRegion<()>, ImageError> {
    let bytes = file.metadata().map_err(ImageError::Read)?.len();
    let mut superblock = [0; 64];
    match file.read_exact_at(&mut superblock, SUPERBLOCK_AT) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            return Err(ImageError::NotErofs);
        }
        Err(error) => return Err(ImageError::Read(error)),
    }
    let u32_at =
        |at: usize| u32::from_le_bytes(std::array::from_fn(|index| superblock[at + index]));
    let block_bits = superblock[BLOCK_BITS_AT];
    if u32_at(0) != MAGIC || block_bits > MAX_BLOCK_BITS {
        return Err(ImageError::NotErofs);
    }
    let expected = u64::from(u32_at(BLOCKS_AT)) << block_bits;
    if expected > bytes {
        return Err(ImageError::Truncated { expected, bytes });
    }
    if !bytes.is_multiple_of(IMAGE_UNIT) || bytes > MAX_IMAGE_BYTES {
        return Err(ImageError::Length { bytes });
    }
    let length = usize::try_from(bytes).map_err(|_| ImageError::Length { bytes })?;
    match sharing {
        FileSharing::Shared => memory::map_shared_file(file, length),
        FileSharing::Private => memory::map_file_copy(file, length),
    }
    .map_err(|source| ImageError::Map { bytes, source })
}

#[cfg(test)]
mod tests {
    use vm_memory::VolatileMemory;

    use super::*;

    fn image(bytes: u64, blocks: u32, bits: u8) -> Result<MmapRegion<()>, ImageError> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        if bytes > 2048 {
            let mut superblock = [0; 64];
            superblock[..4].copy_from_slice(&MAGIC.to_le_bytes());
            superblock[BLOCK_BITS_AT] = bits;
            superblock[BLOCKS_AT..BLOCKS_AT + 4].copy_from_slice(&blocks.to_le_bytes());
            file.write_all_at(&superblock, SUPERBLOCK_AT).unwrap();
        }
        let copy = file.try_clone().unwrap();
        let shared = map_image(&Arc::new(file), FileSharing::Shared)?;
        let private = map_image(&Arc::new(copy), FileSharing::Private)?;
        let read = |region: &MmapRegion<()>| {
            let mut bytes = vec![0; region.size()];
            region.as_volatile_slice().copy_to(&mut bytes);
            bytes
        };
        assert!(read(&shared) == read(&private));
        Ok(shared)
    }

    #[test]
    fn valid_image_is_mapped_whole() {
        assert_eq!(image(IMAGE_UNIT, 512, 12).unwrap().size(), 2 << 20);
    }

    #[test]
    fn invalid_image_is_refused() {
        assert!(matches!(image(0, 0, 0), Err(ImageError::NotErofs)));
        assert!(matches!(image(1024, 0, 0), Err(ImageError::NotErofs)));
        assert!(matches!(image(IMAGE_UNIT, 1, 255), Err(ImageError::NotErofs)));
        assert!(matches!(
            image(IMAGE_UNIT, 513, 12),
            Err(ImageError::Truncated { expected: 2_101_248, .. })
        ));
        assert!(matches!(image(IMAGE_UNIT, u32::MAX, 12), Err(ImageError::Truncated { .. })));
        assert!(matches!(image(IMAGE_UNIT + 4096, 1, 12), Err(ImageError::Length { .. })));
        assert!(matches!(
            image(MAX_IMAGE_BYTES + IMAGE_UNIT, 1, 12),
            Err(ImageError::Length { .. })
        ));
    }
}

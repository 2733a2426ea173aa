//! Numbers and lists as bytes, little-endian, without names, padding or lengths that are known anyway.
//!
//! Our own rather than a general encoding: what is saved is mostly structures of the kernel's interface, which are bytes
//! of a fixed layout already, and what reads them back is code that must be short enough to be seen to be bounded.

use std::mem::MaybeUninit;

use super::Malformed;

/// A structure of the kernel's interface, or a number: plain bytes.
///
/// # Safety
/// The type has no padding, and every combination of bytes is a value of it.
pub unsafe trait Plain: Copy {}

// SAFETY: integers.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: elements follow each other without padding.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// Appends what is to be saved.
#[derive(Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// The bytes so far.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// A value of fixed size.
    pub fn plain<T: Plain>(&mut self, value: &T) {
        self.0.extend_from_slice(bytes_of(value));
    }

    /// A list of at most `max` items: how many, then each. More than that is a fault of ours, and cut off.
    pub fn list<T>(&mut self, items: &[T], max: u16, mut each: impl FnMut(&mut Self, &T)) {
        debug_assert!(items.len() <= usize::from(max));
        let count = u16::try_from(items.len()).unwrap_or(u16::MAX).min(max);
        self.plain(&count);
        for item in items.iter().take(usize::from(count)) {
            each(self, item);
        }
    }

    /// A number of which most are small: seven bits a byte, the lowest first.
    pub fn small(&mut self, mut value: u32) {
        while value >= 0x80 {
            #[expect(clippy::cast_possible_truncation, reason = "seven bits")]
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        #[expect(clippy::cast_possible_truncation, reason = "below 0x80")]
        self.0.push(value as u8);
    }

    /// A value of fixed size, most of whose 32-bit words are zero: a bit for each, then those that are not.
    pub fn sparse<T: Plain>(&mut self, value: &T) {
        self.sparse_bytes(bytes_of(value));
    }

    /// The same for a list of words of known length.
    pub fn sparse_words(&mut self, words: &[u32]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.sparse_bytes(&bytes);
    }

    fn sparse_bytes(&mut self, bytes: &[u8]) {
        let words: Vec<&[u8]> = bytes.chunks(4).collect();
        let there = |word: &&[u8]| word.iter().any(|byte| *byte != 0);
        for eight in words.chunks(8) {
            self.0
                .push(eight.iter().enumerate().map(|(at, word)| u8::from(there(word)) << at).sum());
        }
        for word in words.iter().filter(|word| there(word)) {
            self.0.extend_from_slice(word);
        }
    }
}

fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: `T` has no padding, so that all of its bytes are initialized; they are only read, while `value` lives.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// Takes it apart again. Nothing is allocated before the bytes for it are known to be there.
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Reads from the front of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (front, rest) = self.0.split_at_checked(count).ok_or(Malformed("it ends too early"))?;
        self.0 = rest;
        Ok(front)
    }

    /// A value of fixed size.
    ///
    /// # Errors
    /// There are not enough bytes.
    pub fn plain<T: Plain>(&mut self) -> Result<T, Malformed> {
        let bytes = self.bytes(size_of::<T>())?;
        // SAFETY: there are as many bytes as `T` has, each combination of which is a `T`; alignment does not matter.
        Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    /// A byte that is 0 or 1.
    ///
    /// # Errors
    /// It is something else.
    pub fn flag(&mut self) -> Result<bool, Malformed> {
        match self.plain::<u8>()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed("a flag is neither set nor clear")),
        }
    }

    /// A list of at most `max` items.
    ///
    /// # Errors
    /// There are more, or one of them is malformed.
    pub fn list<T>(
        &mut self,
        max: u16,
        mut each: impl FnMut(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Vec<T>, Malformed> {
        let count: u16 = self.plain()?;
        // Every item has at least one byte.
        if count > max || usize::from(count) > self.0.len() {
            return Err(Malformed("a list is longer than it can be"));
        }
        (0..count).map(|_| each(self)).collect()
    }

    /// A number of which most are small.
    ///
    /// # Errors
    /// It has more than 32 bits, or there are not enough bytes.
    pub fn small(&mut self) -> Result<u32, Malformed> {
        let mut value = 0u64;
        for shift in [0, 7, 14, 21, 28] {
            let byte: u8 = self.plain()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return u32::try_from(value).map_err(|_| Malformed("a number is too large"));
            }
        }
        Err(Malformed("a number is too large"))
    }

    /// A value of fixed size, most of whose words are zero.
    ///
    /// # Errors
    /// There are not enough bytes.
    pub fn sparse<T: Plain>(&mut self) -> Result<T, Malformed> {
        let count = size_of::<T>().div_ceil(4);
        let bits = self.bytes(count.div_ceil(8))?;
        let mut value = MaybeUninit::<T>::zeroed();
        // SAFETY: all bytes of `value` are initialized, and nothing else refers to them.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(value.as_mut_ptr().cast::<u8>(), size_of::<T>())
        };
        for (at, word) in bytes.chunks_mut(4).enumerate() {
            if bits.get(at / 8).is_some_and(|bits| bits >> (at % 8) & 1 != 0) {
                word.copy_from_slice(self.bytes(word.len())?);
            }
        }
        // SAFETY: every combination of bytes is a `T`, and all of them are initialized.
        Ok(unsafe { value.assume_init() })
    }

    /// The same for a list of words that is too long for the stack, each page of which costs a page fault.
    ///
    /// # Errors
    /// There are not enough bytes.
    pub fn sparse_words(&mut self, count: usize) -> Result<Vec<u32>, Malformed> {
        let bits = self.bytes(count.div_ceil(8))?;
        (0..count)
            .map(|at| match bits.get(at / 8) {
                Some(bits) if bits >> (at % 8) & 1 != 0 => self.plain(),
                _ => Ok(0),
            })
            .collect()
    }

    /// Makes sure that nothing is left.
    ///
    /// # Errors
    /// Something is.
    pub fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("it goes on after its end")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let mut words = [0u32; 20];
        (words[0], words[7], words[8], words[19]) = (1, u32::MAX, 5, 9);
        let mut writer = Writer::default();
        writer.plain(&7u8);
        writer.plain(&0x0102_0304_0506_0708u64);
        writer.list(&[1u32, 2, 3], 3, |writer, item| writer.plain(item));
        writer.sparse(&words);
        for value in [0, 0x7f, 0x80, u32::MAX] {
            writer.small(value);
        }
        let bytes = writer.into_bytes();
        assert_eq!(bytes.len(), 1 + 8 + 2 + 12 + 3 + 16 + 1 + 1 + 2 + 5);
        let mut reader = Reader::new(&bytes);
        assert_eq!(reader.plain::<u8>().unwrap(), 7);
        assert_eq!(reader.plain::<u64>().unwrap(), 0x0102_0304_0506_0708);
        assert_eq!(reader.list(3, |reader| reader.plain::<u32>()).unwrap(), [1, 2, 3]);
        assert_eq!(reader.sparse::<[u32; 20]>().unwrap(), words);
        assert_eq!(Reader::new(&bytes[23..]).sparse_words(20).unwrap(), words);
        for value in [0, 0x7f, 0x80, u32::MAX] {
            assert_eq!(reader.small().unwrap(), value);
        }
        reader.end().unwrap();
    }

    #[test]
    fn nothing_is_read_past_the_end_and_no_list_is_believed() {
        assert_eq!(Reader::new(&[1, 2, 3]).plain::<u32>(), Err(Malformed("it ends too early")));
        assert!(Reader::new(&[]).sparse::<[u32; 8]>().is_err());
        assert!(Reader::new(&[0xff; 5]).sparse::<[u32; 8]>().is_err());
        for bytes in [[0xff, 0xff, 0, 0], [3, 0, 0, 0]] {
            assert!(Reader::new(&bytes).list(1000, |reader| reader.plain::<u8>()).is_err());
        }
        assert!(Reader::new(&[0xff, 0xff, 0xff, 0xff, 0x10]).small().is_err());
        assert!(Reader::new(&[0x80; 6]).small().is_err());
        assert!(Reader::new(&[2]).flag().is_err());
        assert!(Reader::new(&[2]).end().is_err());
    }
}

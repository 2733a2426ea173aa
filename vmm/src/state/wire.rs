//! The encoding of a state: numbers, structures and lists as bytes, little-endian, without field
//! names, padding, or lengths that are known anyway.
//!
//! A general encoding would not fit: a state consists mostly of structures of the kernel's API,
//! which are bytes of a fixed layout already, and the code that reads them must be short enough to
//! be seen to be bounded. zerocopy proves at compile time that a type is plain bytes.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::malformed::Malformed;

/// The unit of sparse values.
const WORD_BYTES: usize = 4;

/// Appends values.
#[derive(Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    /// Returns the bytes so far.
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// Appends a value of fixed size.
    pub fn write_value<T: IntoBytes + Immutable>(&mut self, value: &T) {
        self.0.extend_from_slice(value.as_bytes());
    }

    /// Appends a list of at most `max` items: their number, then each. A longer list, which only a
    /// fault of the monitor explains, is cut off.
    pub fn write_list<T>(&mut self, items: &[T], max: u16, mut each: impl FnMut(&mut Self, &T)) {
        debug_assert!(items.len() <= usize::from(max));
        let count = u16::try_from(items.len()).unwrap_or(u16::MAX).min(max);
        self.write_value(&count);
        for item in items.iter().take(usize::from(count)) {
            each(self, item);
        }
    }

    /// Appends a number that is usually small: seven bits in each byte, the lowest first.
    pub fn write_varint(&mut self, mut value: u32) {
        while value >= 0x80 {
            #[expect(clippy::cast_possible_truncation, reason = "seven bits")]
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        #[expect(clippy::cast_possible_truncation, reason = "below 0x80")]
        self.0.push(value as u8);
    }

    /// Appends a value of fixed size that is mostly zero: a bit for each 32-bit word, then the
    /// words that are not zero.
    pub fn write_sparse<T: IntoBytes + Immutable>(&mut self, value: &T) {
        self.write_sparse_bytes(value.as_bytes());
    }

    /// Appends a list of words of known length that is mostly zero.
    pub fn write_sparse_words(&mut self, words: &[u32]) {
        self.write_sparse_bytes(words.as_bytes());
    }

    fn write_sparse_bytes(&mut self, bytes: &[u8]) {
        let is_set = |word: &&[u8]| word.iter().any(|byte| *byte != 0);
        let words: Vec<&[u8]> = bytes.chunks(WORD_BYTES).collect();
        for eight in words.chunks(8) {
            let bits = eight.iter().enumerate().map(|(at, word)| u8::from(is_set(word)) << at);
            self.0.push(bits.sum());
        }
        for word in words.iter().filter(|word| is_set(word)) {
            self.0.extend_from_slice(word);
        }
    }
}

/// Reads values. Nothing is allocated before its bytes are known to be there.
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Reads from the front of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Reads `count` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn read_bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (front, rest) = self.0.split_at_checked(count).ok_or(Malformed::Truncated)?;
        self.0 = rest;
        Ok(front)
    }

    /// Reads a value of fixed size.
    ///
    /// # Errors
    /// There are too few bytes.
    pub fn read_value<T: FromBytes>(&mut self) -> Result<T, Malformed> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Malformed::Truncated)?;
        self.0 = rest;
        Ok(value)
    }

    /// Reads a byte that is 0 or 1.
    ///
    /// # Errors
    /// The byte has another value.
    pub fn read_flag(&mut self) -> Result<bool, Malformed> {
        match self.read_value::<u8>()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Malformed::Flag),
        }
    }

    /// Reads a list of at most `max` items.
    ///
    /// # Errors
    /// There are more, or one of them is malformed.
    pub fn read_list<T>(
        &mut self,
        max: u16,
        mut each: impl FnMut(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Vec<T>, Malformed> {
        let count: u16 = self.read_value()?;
        // Every item has at least one byte.
        if count > max || usize::from(count) > self.0.len() {
            return Err(Malformed::List);
        }
        (0..count).map(|_| each(self)).collect()
    }

    /// Reads a number that is usually small.
    ///
    /// # Errors
    /// The number has more than 32 bits, or there are too few bytes.
    pub fn read_varint(&mut self) -> Result<u32, Malformed> {
        let mut value = 0u64;
        for shift in [0, 7, 14, 21, 28] {
            let byte: u8 = self.read_value()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return u32::try_from(value).map_err(|_| Malformed::Number);
            }
        }
        Err(Malformed::Number)
    }

    /// Reads a value of fixed size that is mostly zero.
    ///
    /// # Errors
    /// There are too few bytes.
    pub fn read_sparse<T: FromBytes + IntoBytes>(&mut self) -> Result<T, Malformed> {
        let mut value = T::new_zeroed();
        let words = value.as_mut_bytes().chunks_mut(WORD_BYTES);
        let bits = self.read_bytes(words.len().div_ceil(8))?;
        for (at, word) in words.enumerate() {
            if is_bit_set(bits, at) {
                word.copy_from_slice(self.read_bytes(word.len())?);
            }
        }
        Ok(value)
    }

    /// Reads a list of words that is mostly zero, and too long for the stack, each page of which
    /// would cost a page fault.
    ///
    /// # Errors
    /// There are too few bytes.
    pub fn read_sparse_words(&mut self, count: usize) -> Result<Vec<u32>, Malformed> {
        let bits = self.read_bytes(count.div_ceil(8))?;
        (0..count).map(|at| if is_bit_set(bits, at) { self.read_value() } else { Ok(0) }).collect()
    }

    /// Checks that no bytes are left.
    ///
    /// # Errors
    /// There are bytes left.
    pub fn finish(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed::TrailingBytes) }
    }
}

fn is_bit_set(bits: &[u8], at: usize) -> bool {
    bits.get(at / 8).is_some_and(|bits| bits >> (at % 8) & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_written() {
        let mut words = [0u32; 20];
        (words[0], words[7], words[8], words[19]) = (1, u32::MAX, 5, 9);
        let mut writer = Writer::default();
        writer.write_value(&7u8);
        writer.write_value(&0x0102_0304_0506_0708u64);
        writer.write_list(&[1u32, 2, 3], 3, |writer, item| writer.write_value(item));
        writer.write_sparse(&words);
        for value in [0, 0x7f, 0x80, u32::MAX] {
            writer.write_varint(value);
        }
        let bytes = writer.into_bytes();
        assert_eq!(bytes.len(), 1 + 8 + 2 + 12 + 3 + 16 + 1 + 1 + 2 + 5);
        let mut reader = Reader::new(&bytes);
        assert_eq!(reader.read_value::<u8>().unwrap(), 7);
        assert_eq!(reader.read_value::<u64>().unwrap(), 0x0102_0304_0506_0708);
        assert_eq!(reader.read_list(3, |reader| reader.read_value::<u32>()).unwrap(), [1, 2, 3]);
        assert_eq!(reader.read_sparse::<[u32; 20]>().unwrap(), words);
        assert_eq!(Reader::new(&bytes[23..]).read_sparse_words(20).unwrap(), words);
        for value in [0, 0x7f, 0x80, u32::MAX] {
            assert_eq!(reader.read_varint().unwrap(), value);
        }
        reader.finish().unwrap();
    }

    #[test]
    fn reads_are_bounded_by_the_bytes() {
        assert_eq!(Reader::new(&[1, 2, 3]).read_value::<u32>(), Err(Malformed::Truncated));
        assert!(Reader::new(&[]).read_sparse::<[u32; 8]>().is_err());
        assert!(Reader::new(&[0xff; 5]).read_sparse::<[u32; 8]>().is_err());
        for bytes in [[0xff, 0xff, 0, 0], [3, 0, 0, 0]] {
            let list = Reader::new(&bytes).read_list(1000, |reader| reader.read_value::<u8>());
            assert!(list.is_err());
        }
        assert!(Reader::new(&[0xff, 0xff, 0xff, 0xff, 0x10]).read_varint().is_err());
        assert!(Reader::new(&[0x80; 6]).read_varint().is_err());
        assert!(Reader::new(&[2]).read_flag().is_err());
        assert!(Reader::new(&[2]).finish().is_err());
    }
}

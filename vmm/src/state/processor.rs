//! The identity of a processor, as far as a guest can tell.

use std::fmt;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::malformed::Malformed;
use super::wire::{Reader, Writer};

/// The processor that a guest sees. A saved guest continues only where this is the same: it looked
/// once, when it booted, and relies on what it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processor {
    vendor: [u8; 12],
    /// Family, model and stepping, as leaf 1 packs them.
    signature: u32,
    /// A hash over the CPUID of the first vCPU. It is not cryptographic: it tells apart processors
    /// and kernels, which do not try to look alike.
    cpuid_hash: [u64; 2],
}

impl Processor {
    /// Returns the identity of the processor that CPUID describes.
    pub fn from_cpuid(cpuid: &CpuId) -> Self {
        let mut this = Self { vendor: [0; 12], signature: 0, cpuid_hash: [0x6368_6974_696e, 1] };
        for entry in cpuid.as_slice() {
            match entry.function {
                0 => {
                    for (bytes, register) in
                        this.vendor.chunks_mut(4).zip([entry.ebx, entry.edx, entry.ecx])
                    {
                        bytes.copy_from_slice(&register.to_le_bytes());
                    }
                }
                1 => this.signature = entry.eax,
                _ => {}
            }
            this.hash_entry(entry);
        }
        this
    }

    fn hash_entry(&mut self, entry: &kvm_cpuid_entry2) {
        let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *entry;
        for word in [function, index, flags, eax, ebx, ecx, edx] {
            let [first, second] = &mut self.cpuid_hash;
            *first = (*first ^ u64::from(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
            *second = second.wrapping_add(*first).rotate_left(17) ^ u64::from(word);
        }
    }

    /// Appends the identity.
    pub fn encode(&self, writer: &mut Writer) {
        writer.write_value(&self.vendor);
        writer.write_value(&self.signature);
        writer.write_value(&self.cpuid_hash);
    }

    /// Reads the identity.
    ///
    /// # Errors
    /// There are too few bytes.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            vendor: reader.read_value()?,
            signature: reader.read_value()?,
            cpuid_hash: reader.read_value()?,
        })
    }
}

impl fmt::Display for Processor {
    /// Writes vendor, family, model and stepping as `/proc/cpuinfo` numbers them, and a few digits
    /// that differ if the rest of CPUID does.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let field = |shift: u32, mask: u32| self.signature >> shift & mask;
        let family = field(8, 0xf) + if field(8, 0xf) == 0xf { field(20, 0xff) } else { 0 };
        let model = field(4, 0xf) + (field(16, 0xf) << 4);
        let hash = self.cpuid_hash[0] & 0xffff_ffff;
        let vendor = String::from_utf8_lossy(&self.vendor);
        write!(f, "{vendor} {family}/{model}/{} with features {hash:08x}", field(0, 0xf))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpuid() -> CpuId {
        let vendor = kvm_cpuid_entry2 {
            ebx: 0x6874_7541,
            edx: 0x6974_6e65,
            ecx: 0x444d_4163,
            ..Default::default()
        };
        let leaf = |function| kvm_cpuid_entry2 { function, eax: !0, ecx: !0, ..vendor };
        CpuId::from_entries(&[vendor, leaf(1), leaf(7), leaf(0x8000_0001)]).unwrap()
    }

    #[test]
    fn processor_depends_on_every_cpuid_leaf() {
        let processor = Processor::from_cpuid(&cpuid());
        let name = processor.to_string();
        assert!(name.starts_with("AuthenticAMD 270/255/15 with features "), "{name}");
        assert_eq!(Processor::from_cpuid(&cpuid()), processor);
        for leaf in 0..cpuid().as_slice().len() {
            let mut other = cpuid();
            other.as_mut_slice()[leaf].ecx ^= 1;
            assert_ne!(Processor::from_cpuid(&other), processor);
        }
    }

    #[test]
    fn processor_is_decoded_as_encoded() {
        let processor = Processor::from_cpuid(&cpuid());
        let mut writer = Writer::default();
        processor.encode(&mut writer);
        let bytes = writer.into_bytes();
        assert_eq!(bytes.len(), 32);
        assert_eq!(Processor::decode(&mut Reader::new(&bytes)).unwrap(), processor);
    }
}

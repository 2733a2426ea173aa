use std::io::{Seek, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;

use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_regs};

use super::machine::{ConnectionRequest, DeviceState, MAX_RUNS, PageRun, QueueState, WorkingSet};
use super::*;
use crate::arch::x86_64::state::{
    ChipState, LAPIC_WORDS, Timekeeping, VcpuState, Vectors, XSAVE_WORDS,
};
use crate::control::TemplateFiles;
use crate::{Monitor, VmSpec, error_chain};

const MEMORY_MIB: u32 = 64;
const IMAGE_BYTES: u64 = 2 << 20;

fn key(byte: u8) -> Key {
    Key([byte; 32])
}

fn processor(family: u32) -> Processor {
    let leaf = kvm_cpuid_entry2 { function: 1, eax: family << 8, ..Default::default() };
    Processor::of(&CpuId::from_entries(&[leaf]).unwrap())
}

fn header() -> Header {
    Header { processor: processor(6), memory_mib: MEMORY_MIB, vcpus: 2 }
}

fn vcpu(number: u64) -> VcpuState {
    let mut area = vec![0; XSAVE_WORDS];
    area[6] = 0x1f80;
    let mut lapic = vec![0; LAPIC_WORDS];
    lapic[8] = 1 << 24;
    VcpuState {
        tsc_khz: 3_000_000,
        activity: Default::default(),
        regs: kvm_regs { rip: 0xffff_ffff_8100_0000 + number, ..Default::default() },
        sregs: Default::default(),
        vectors: if number == 0 {
            Vectors::Xsave { area, xcr0: 7 }
        } else {
            Vectors::Fxsave(Box::default())
        },
        debug: Default::default(),
        lapic,
        msrs: vec![(0xc000_0080, 0xd01), (0x4b56_4d01, 0x1234_5001)],
        time: Timekeeping { tsc: 99, deadline: (number == 0).then_some(0) },
        events: Default::default(),
    }
}

fn machine() -> MachineState {
    let run = |first, count| PageRun { first, count };
    let queue = QueueState {
        size: 64,
        ready: true,
        rings: [0x1000, 0x2000, 0x3000],
        next_available: 5,
        next_used: 4,
    };
    let device = DeviceState {
        status: 15,
        interrupts: 1,
        features: 1 << 32,
        selected: [2, 1, 1],
        queues: vec![queue; 3],
        request: Some(ConnectionRequest { port: 1234, buf_alloc: 1 << 18, fwd_cnt: 0 }),
    };
    MachineState {
        binding: "memory:1 image:2".into(),
        clock_ns: 123_456_789,
        chips: ChipState { pics: Default::default(), ioapic: Default::default() },
        vcpus: vec![vcpu(0), vcpu(1)],
        devices: vec![device, DeviceState::default()],
        parts: vec![run(0, 100), run(4096, 12288)],
        working_set: WorkingSet {
            written: vec![run(3, 1), run(300, 7)],
            read: vec![run(4, 1)],
            image: vec![run(511, 1)],
        },
    }
}

fn sealed() -> Vec<u8> {
    seal(&header(), &machine().encode(), &key(7)).unwrap()
}

fn decode(payload: &[u8]) -> Result<MachineState, Malformed> {
    MachineState::decode(payload, 2, u64::from(MEMORY_MIB) << 20, IMAGE_BYTES)
}

#[test]
fn what_was_saved_is_read_back() {
    let bytes = sealed();
    let (read, payload) = open(&bytes, &key(7)).unwrap();
    assert_eq!(read, header());
    let (state, saved) = (decode(payload).unwrap(), machine());
    assert_eq!(state.encode(), saved.encode());
    assert_eq!((&state.devices, &state.parts), (&saved.devices, &saved.parts));
    assert_eq!(state.working_set, saved.working_set);
    assert_eq!(state.vcpus[1].regs.rip, 0xffff_ffff_8100_0001);
    assert_eq!(state.vcpus[0].time, Timekeeping { tsc: 99, deadline: Some(0) });
    assert_eq!(state.vcpus[1].time.deadline, None);
    assert!(
        matches!(&state.vcpus[0].vectors, Vectors::Xsave { area, xcr0: 7 } if area[6] == 0x1f80)
    );
}

#[test]
fn a_state_cut_off_anywhere_is_refused() {
    let bytes = sealed();
    for length in 0..bytes.len() {
        let error = open(&bytes[..length], &key(7)).unwrap_err();
        assert!(
            matches!(error, StateError::Length { found, .. } if found == length),
            "{length}: {error}"
        );
        assert!(error_chain(&error).contains("build it again"));
    }
    let longer = [bytes.as_slice(), &[0]].concat();
    assert!(matches!(open(&longer, &key(7)), Err(StateError::Length { .. })));
}

#[test]
fn a_state_with_any_byte_changed_is_refused() {
    let mut bytes = sealed();
    for at in 0..bytes.len() {
        for change in [1, 0x80, 0xff] {
            bytes[at] ^= change;
            let error = open(&bytes, &key(7)).unwrap_err();
            let due = match at {
                0..8 => matches!(error, StateError::Magic),
                8..12 => matches!(error, StateError::Version { .. }),
                12..16 => matches!(error, StateError::Length { .. }),
                _ => matches!(error, StateError::Mac),
            };
            assert!(due, "byte {at}: {error}");
            bytes[at] ^= change;
        }
    }
    open(&bytes, &key(7)).unwrap();
}

#[test]
fn the_key_decides_and_is_not_shown() {
    assert!(matches!(open(&sealed(), &key(8)), Err(StateError::Mac)));
    assert_eq!(format!("{:?}", key(7)), "Key(…)");
}

#[test]
fn another_version_is_named_whatever_its_layout() {
    let mut bytes = sealed();
    bytes[8..12].copy_from_slice(&2u32.to_le_bytes());
    bytes.truncate(20);
    let error = open(&bytes, &key(7)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the template has version 2, this monitor makes and takes version 1: build it again"
    );
    assert!(matches!(open(b"not a state file at all", &key(7)), Err(StateError::Magic)));
}

#[test]
fn a_payload_cut_off_or_too_long_is_malformed_also_with_a_good_mac() {
    let payload = machine().encode();
    for length in 0..payload.len() {
        assert!(decode(&payload[..length]).is_err(), "{length}");
    }
    assert!(decode(&[payload.as_slice(), &[0]].concat()).is_err());
    decode(&payload).unwrap();
}

#[test]
fn no_payload_makes_the_reader_panic_or_leave_its_bounds() {
    let payload = machine().encode();
    // A cheap generator: the same bytes every time.
    let mut seed = 1u32;
    let mut random = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        seed >> 16
    };
    for _ in 0..20_000 {
        let mut bytes = payload.clone();
        for _ in 0..=random() % 4 {
            let at = random() as usize % bytes.len();
            bytes[at] = random().to_le_bytes()[0];
        }
        if let Ok(state) = decode(&bytes) {
            let end =
                |runs: &[PageRun]| runs.iter().map(|run| run.first + run.count).max().unwrap_or(0);
            assert!(end(&state.parts) <= MEMORY_MIB << 8 && end(&state.working_set.image) <= 512);
            assert_eq!((state.vcpus.len(), state.devices.len()), (2, 2));
        }
    }
}

#[test]
fn pages_outside_memory_and_lists_without_end_are_malformed() {
    let wrong = |change: &dyn Fn(&mut MachineState)| {
        let mut state = machine();
        change(&mut state);
        decode(&state.encode()).err().unwrap()
    };
    let outside = Malformed("a page is not in the memory");
    assert_eq!(wrong(&|state| state.parts[1].count += 1), outside);
    assert_eq!(wrong(&|state| state.working_set.image[0].count = 2), outside);
    assert_eq!(wrong(&|state| state.working_set.read[0].count = 0), outside);
    assert_eq!(wrong(&|state| state.working_set.read[0].first = u32::MAX - 1), outside);
    wrong(&|state| drop(state.vcpus.pop()));
    wrong(&|state| drop(state.devices.pop()));
    // Longer lists than are read are cut off when they are written.
    let mut state = machine();
    state.working_set.written =
        (0..6000).map(|number| PageRun { first: number * 2, count: 1 }).collect();
    let state = decode(&state.encode()).unwrap();
    assert_eq!(state.working_set.written.len(), usize::from(MAX_RUNS));
}

#[test]
fn a_key_is_read_whole_or_not_at_all() {
    for bytes in [0, 31] {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; bytes]).unwrap();
        file.rewind().unwrap();
        assert!(matches!(Key::read(&mut file), Err(StateError::Key(_))));
    }
}

/// What the host is told about a template that cannot be used, before KVM is even opened.
fn complaint(state: &[u8], memory_bytes: u64, spec: impl FnOnce(&mut VmSpec)) -> String {
    let file = |contents: &[u8], length: u64| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(contents).unwrap();
        file.as_file().set_len(length).unwrap();
        file
    };
    let mut image = vec![0; 4096];
    image[1024..1028].copy_from_slice(&0xe0f5_e1e2u32.to_le_bytes());
    let image = file(&image, IMAGE_BYTES);
    let (state, memory) = (file(state, state.len() as u64), file(&[], memory_bytes));
    let files = TemplateFiles {
        memory: File::open(memory.path()).unwrap(),
        state: state.as_fd().try_clone_to_owned().unwrap().into(),
        key: key(7),
    };
    let mut asked = VmSpec {
        restore: true,
        vcpus: 2,
        memory_mib: MEMORY_MIB,
        binding: machine().binding,
        kernel: PathBuf::new(),
        ..VmSpec::new("", image.path())
    };
    spec(&mut asked);
    error_chain(&Monitor::builder().spec(asked).template(files).build().err().unwrap())
}

#[test]
fn a_template_that_is_not_what_is_asked_for_is_refused_with_a_reason() {
    let memory = u64::from(MEMORY_MIB) << 20;
    let good = sealed();
    assert_eq!(
        complaint(&good, memory, |spec| spec.vcpus = 1),
        "the template has 2 vCPUs, and 1 were asked for"
    );
    assert_eq!(
        complaint(&good, memory, |spec| spec.memory_mib = 128),
        "the template has 64 MiB of memory, and 128 were asked for"
    );
    assert_eq!(
        complaint(&good, memory, |spec| spec.binding = "memory:1 image:3".into()),
        "the template belongs to other files (it is bound to `memory:1 image:2`, not to `memory:1 image:3`): build it again"
    );
    assert_eq!(
        complaint(&good, memory - 1, |_| {}),
        "the memory of the template is shorter than the guest's memory: build it again"
    );
    assert!(complaint(&good[..100], memory, |_| {}).contains("it was cut off"));
    assert!(complaint(&vec![0; 300_000], memory, |_| {}).contains("more than 262144 bytes"));
    let long = MachineState { parts: vec![PageRun { first: 0, count: 1 << 20 }], ..machine() };
    let long = seal(&header(), &long.encode(), &key(7)).unwrap();
    assert!(complaint(&long, memory, |_| {}).contains("malformed"));
}

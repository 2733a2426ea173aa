use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;

use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_regs};

use super::machine::{ConnectionRequest, DeviceState, QueueState};
use super::*;
use crate::control::TemplateFiles;
use crate::memory::memory_file::MemoryFileError;
use crate::memory::page_run::{MAX_RUNS, PageRun, WorkingSet};
use crate::state::processor::Processor;
use crate::state::vcpu::{ChipState, FpuState, LAPIC_WORDS, Timekeeping, VcpuState, XSAVE_WORDS};
use crate::{Monitor, MonitorError, VmSpec};

const MEMORY_MIB: u32 = 64;
const IMAGE_BYTES: u64 = 2 << 20;

fn processor(family: u32) -> Processor {
    let leaf = kvm_cpuid_entry2 { function: 1, eax: family << 8, ..Default::default() };
    Processor::from_cpuid(&CpuId::from_entries(&[leaf]).unwrap())
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
        fpu: if number == 0 {
            FpuState::Xsave { area, xcr0: 7 }
        } else {
            FpuState::Fxsave(Box::default())
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

fn signed() -> Vec<u8> {
    sign_state(&header(), &machine().encode(), &Key::from_byte(7)).unwrap()
}

fn decode(payload: &[u8]) -> Result<MachineState, Malformed> {
    MachineState::decode(payload, 2, u64::from(MEMORY_MIB) << 20, IMAGE_BYTES)
}

/// Decodes a valid state after a change.
fn decode_changed(change: impl FnOnce(&mut MachineState)) -> Result<MachineState, Malformed> {
    let mut state = machine();
    change(&mut state);
    decode(&state.encode())
}

#[test]
fn state_is_decoded_as_encoded() {
    let bytes = signed();
    let (read, payload) = verify_state(&bytes, &Key::from_byte(7)).unwrap();
    assert_eq!(read, header());
    let (state, saved) = (decode(payload).unwrap(), machine());
    assert_eq!(state.encode(), saved.encode());
    assert_eq!((&state.devices, &state.parts), (&saved.devices, &saved.parts));
    assert_eq!(state.working_set, saved.working_set);
    assert_eq!(state.vcpus[1].regs.rip, 0xffff_ffff_8100_0001);
    assert_eq!(state.vcpus[0].time, Timekeeping { tsc: 99, deadline: Some(0) });
    assert_eq!(state.vcpus[1].time.deadline, None);
    let fpu = &state.vcpus[0].fpu;
    assert!(matches!(fpu, FpuState::Xsave { area, xcr0: 7 } if area[6] == 0x1f80));
}

#[test]
fn truncated_state_is_refused_at_any_length() {
    let bytes = signed();
    for length in 0..bytes.len() {
        let error = verify_state(&bytes[..length], &Key::from_byte(7)).unwrap_err();
        let named = matches!(error, StateError::Length { found, .. } if found == length);
        assert!(named, "{length}: {error}");
    }
    let longer = [bytes.as_slice(), &[0]].concat();
    let error = verify_state(&longer, &Key::from_byte(7));
    assert!(matches!(error, Err(StateError::Length { .. })));
}

#[test]
fn state_with_any_byte_changed_is_refused() {
    let mut bytes = signed();
    for at in 0..bytes.len() {
        for change in [1, 0x80, 0xff] {
            bytes[at] ^= change;
            let error = verify_state(&bytes, &Key::from_byte(7)).unwrap_err();
            let expected = match at {
                0..8 => matches!(error, StateError::Magic),
                8..12 => matches!(error, StateError::Version { .. }),
                12..16 => matches!(error, StateError::Length { .. }),
                _ => matches!(error, StateError::Mac),
            };
            assert!(expected, "byte {at}: {error}");
            bytes[at] ^= change;
        }
    }
    verify_state(&bytes, &Key::from_byte(7)).unwrap();
}

#[test]
fn state_with_another_key_is_refused() {
    let bytes = signed();
    assert!(matches!(verify_state(&bytes, &Key::from_byte(8)), Err(StateError::Mac)));
}

#[test]
fn key_is_not_printed() {
    assert_eq!(format!("{:?}", Key::from_byte(7)), "Key(…)");
}

#[test]
fn other_version_is_named_whatever_its_layout() {
    let mut bytes = signed();
    bytes[8..12].copy_from_slice(&2u32.to_le_bytes());
    bytes.truncate(20);
    let error = verify_state(&bytes, &Key::from_byte(7));
    assert!(matches!(error, Err(StateError::Version { found: 2 })));
    let error = verify_state(b"not a state file at all", &Key::from_byte(7));
    assert!(matches!(error, Err(StateError::Magic)));
}

#[test]
fn payload_of_wrong_length_is_malformed() {
    let payload = machine().encode();
    for length in 0..payload.len() {
        assert!(decode(&payload[..length]).is_err(), "{length}");
    }
    assert!(decode(&[payload.as_slice(), &[0]].concat()).is_err());
    decode(&payload).unwrap();
}

#[test]
fn random_payload_stays_in_bounds_and_never_panics() {
    let payload = machine().encode();
    // A simple generator, which returns the same bytes every time.
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
            let end = |runs: &[PageRun]| runs.iter().map(PageRun::end).max().unwrap_or(0);
            assert!(end(&state.parts) <= MEMORY_MIB << 8 && end(&state.working_set.image) <= 512);
            assert_eq!((state.vcpus.len(), state.devices.len()), (2, 2));
        }
    }
}

#[test]
fn page_outside_memory_is_malformed() {
    let changes: [fn(&mut MachineState); 4] = [
        |state| state.parts[1].count += 1,
        |state| state.working_set.image[0].count = 2,
        |state| state.working_set.read[0].count = 0,
        |state| state.working_set.read[0].first = u32::MAX - 1,
    ];
    for change in changes {
        assert_eq!(decode_changed(change).err(), Some(Malformed::Page));
    }
}

#[test]
fn wrong_number_of_vcpus_or_devices_is_malformed() {
    let changes: [fn(&mut MachineState); 2] =
        [|state| drop(state.vcpus.pop()), |state| drop(state.devices.pop())];
    for change in changes {
        assert_eq!(decode_changed(change).err(), Some(Malformed::Count));
    }
}

#[test]
fn long_list_of_runs_is_cut_off_when_written() {
    let runs = (0..6000).map(|number| PageRun { first: number * 2, count: 1 }).collect();
    let state = decode_changed(|state| state.working_set.written = runs).unwrap();
    assert_eq!(state.working_set.written.len(), usize::from(MAX_RUNS));
}

#[test]
fn short_key_is_refused() {
    for bytes in [0, 31] {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![1; bytes]).unwrap();
        file.rewind().unwrap();
        assert!(matches!(Key::read(&mut file), Err(StateError::Key(_))));
    }
}

/// Returns the error of a monitor for a template that cannot be used, before KVM is even opened.
fn build_error(state: &[u8], memory_bytes: u64, change: impl FnOnce(&mut VmSpec)) -> MonitorError {
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
        key: Key::from_byte(7),
    };
    let mut spec = VmSpec {
        restore: true,
        vcpus: 2,
        memory_mib: MEMORY_MIB,
        binding: machine().binding,
        kernel: PathBuf::new(),
        ..VmSpec::new("", image.path())
    };
    change(&mut spec);
    Monitor::builder().spec(spec).template(files).build().err().unwrap()
}

#[test]
fn template_that_differs_from_the_spec_is_refused() {
    let memory = u64::from(MEMORY_MIB) << 20;
    let error = build_error(&signed(), memory, |spec| spec.vcpus = 1);
    let expected =
        matches!(error, MonitorError::State(StateError::VcpuCount { made: 2, requested: 1 }));
    assert!(expected, "{error:?}");
    let error = build_error(&signed(), memory, |spec| spec.memory_mib = 128);
    let expected = matches!(
        error,
        MonitorError::State(StateError::MemorySize { made_mib: 64, requested_mib: 128 })
    );
    assert!(expected, "{error:?}");
    let error = build_error(&signed(), memory, |spec| spec.binding = "memory:1 image:3".into());
    let expected = matches!(
        &error,
        MonitorError::State(StateError::Binding { made, requested })
            if made == "memory:1 image:2" && requested == "memory:1 image:3"
    );
    assert!(expected, "{error:?}");
}

#[test]
fn unusable_template_file_is_refused() {
    let memory = u64::from(MEMORY_MIB) << 20;
    let error = build_error(&signed(), memory - 1, |_| {});
    let short = matches!(error, MonitorError::MemoryFile(MemoryFileError::TooShort { .. }));
    assert!(short, "{error:?}");
    let error = build_error(&signed()[..100], memory, |_| {});
    let cut_off = matches!(error, MonitorError::State(StateError::Length { .. }));
    assert!(cut_off, "{error:?}");
    let error = build_error(&vec![0; 300_000], memory, |_| {});
    assert!(matches!(error, MonitorError::State(StateError::TooLong)), "{error:?}");
    let parts = vec![PageRun { first: 0, count: 1 << 20 }];
    let malformed = MachineState { parts, ..machine() };
    let malformed = sign_state(&header(), &malformed.encode(), &Key::from_byte(7)).unwrap();
    let error = build_error(&malformed, memory, |_| {});
    let malformed = matches!(error, MonitorError::State(StateError::Malformed(Malformed::Page)));
    assert!(malformed, "{error:?}");
}

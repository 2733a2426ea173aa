use super::*;

fn spec() -> VmSpec {
    VmSpec::new("vmlinux", "root.img")
}

#[test]
fn bounds_are_inclusive() {
    for vcpus in [1, MAX_VCPUS] {
        VmSpec { vcpus, ..spec() }.validate().unwrap();
    }
    for memory_mib in [MIN_MEMORY_MIB, MAX_MEMORY_MIB] {
        VmSpec { memory_mib, ..spec() }.validate().unwrap();
    }
}

#[test]
fn field_out_of_range_is_refused() {
    for vcpus in [0, MAX_VCPUS + 1, u8::MAX] {
        assert_eq!(VmSpec { vcpus, ..spec() }.validate(), Err(SpecError::Vcpus { vcpus }));
    }
    for memory_mib in [0, MIN_MEMORY_MIB - 1, MAX_MEMORY_MIB + 1, 10 << 20] {
        let spec = VmSpec { memory_mib, ..spec() };
        assert_eq!(spec.validate(), Err(SpecError::Memory { memory_mib }));
    }
    let spec = VmSpec::new("", "root.img");
    assert_eq!(spec.validate(), Err(SpecError::EmptyPath { field: "kernel" }));
}

#[test]
fn conflicting_fields_are_refused() {
    let restore = VmSpec { restore: true, ..VmSpec::new("", "root.img") };
    restore.validate().unwrap();
    for (spec, error) in [
        (VmSpec { console: true, template: true, ..spec() }, SpecError::ConsoleInTemplate),
        (VmSpec { console: true, ..restore.clone() }, SpecError::ConsoleInTemplate),
        (VmSpec { record: true, ..spec() }, SpecError::RecordWithoutRestore),
        (
            VmSpec { record: true, private_memory: true, ..restore.clone() },
            SpecError::RecordPrivate,
        ),
        (VmSpec { binding: "x".into(), ..spec() }, SpecError::BindingWithoutRestore),
        (VmSpec { binding: "x".repeat(257), ..restore }, SpecError::Binding { bytes: 257 }),
    ] {
        assert_eq!(spec.validate(), Err(error));
    }
}

#[test]
fn unknown_field_is_refused() {
    let json = r#"{"kernel": "k", "root_image": "r", "memory": 1}"#;
    let error = serde_json::from_str::<VmSpec>(json).unwrap_err();
    assert!(error.to_string().contains("unknown field `memory`"), "{error}");
}

#[test]
fn spec_is_parsed_as_written() {
    let spec = VmSpec { vcpus: 8, memory_mib: 64, console: true, ..spec() };
    let json = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<VmSpec>(&json).unwrap(), spec);
}

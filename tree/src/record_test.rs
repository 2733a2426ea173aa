use super::*;

fn decoded(mut bytes: &[u8]) -> Result<Record, Broken> {
    Input::new(&mut bytes).record()
}

#[test]
fn records_survive_the_wire() {
    let attributes = Attributes { mode: 0o751, seconds: -2, nanoseconds: 999_999_999 };
    for record in [
        Record::Directory { name: vec![], attributes },
        Record::File { name: vec![b'n'; 255], attributes },
        Record::Symlink { name: b"l".to_vec(), target: vec![b't'; MAX_TARGET] },
        Record::Data { offset: u64::MAX, len: u32::MAX },
        Record::EndOfFile { size: 1 << 40 },
        Record::EndOfDirectory,
    ] {
        let mut bytes = Vec::new();
        record.encode(&mut bytes).unwrap();
        assert_eq!(bytes[0], record.kind());
        assert_eq!(decoded(&bytes).unwrap(), record);
        assert!(matches!(decoded(&bytes[..bytes.len() - 1]), Err(Broken::EndedEarly)));
        if let Record::Data { .. } = record {
            assert_eq!(bytes.len(), DATA_HEAD);
        }
    }
}

#[test]
fn names_and_targets_that_linux_does_not_have_are_not_sent() {
    let attributes = Attributes { mode: 0, seconds: 0, nanoseconds: 0 };
    let name = vec![b'n'; 256];
    assert_eq!(Record::File { name, attributes }.encode(&mut Vec::new()), Err(Limit::Name));
    let target = vec![b't'; MAX_TARGET + 1];
    assert_eq!(
        Record::Symlink { name: vec![], target }.encode(&mut Vec::new()),
        Err(Limit::Target)
    );
}

#[test]
fn what_no_sender_writes_is_a_breach() {
    let entry = |mode: u16, nanoseconds: u32| {
        let mut bytes = vec![2, 0];
        bytes.extend_from_slice(&mode.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&nanoseconds.to_le_bytes());
        bytes
    };
    for (bytes, breach) in [
        (vec![0], Breach::UnknownKind(0)),
        (vec![7], Breach::UnknownKind(7)),
        (entry(0o1000, 0), Breach::BadAttributes),
        (entry(0o4755, 0), Breach::BadAttributes),
        (entry(0o755, 1_000_000_000), Breach::BadAttributes),
        (vec![3, 0, 0, 0], Breach::BadTarget),
        (vec![3, 0, 0, 0x10], Breach::BadTarget),
        (vec![3, 0, 2, 0, b'a', 0], Breach::BadTarget),
    ] {
        match decoded(&bytes) {
            Err(Broken::Breach(found)) => assert_eq!(found, breach, "{bytes:?}"),
            other => panic!("{bytes:?}: {other:?}"),
        }
    }
}

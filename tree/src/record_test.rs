use super::*;

fn decode(mut bytes: &[u8]) -> Result<Record, ReadError> {
    RecordReader::new(&mut bytes).read_record()
}

#[test]
fn records_round_trip() {
    let attributes = Attributes { mode: 0o751, seconds: -2, nanoseconds: 999_999_999 };
    for record in [
        Record::Directory { name: vec![], attributes },
        Record::File { name: vec![b'n'; 255], attributes },
        Record::Symlink { name: b"l".to_vec(), target: vec![b't'; MAX_TARGET] },
        Record::Data { offset: u64::MAX, len: u32::MAX },
        Record::EndOfFile { size: 1 << 40 },
        Record::EndOfDirectory,
        Record::LeftOut { name: b"n".to_vec(), kind: LeftOut::Device },
    ] {
        let mut bytes = Vec::new();
        record.encode(&mut bytes).unwrap();
        assert_eq!(bytes[0], record.kind());
        assert_eq!(decode(&bytes).unwrap(), record);
        assert!(matches!(decode(&bytes[..bytes.len() - 1]), Err(ReadError::EndedEarly)));
        if let Record::Data { .. } = record {
            assert_eq!(bytes.len(), DATA_HEADER_LEN);
        }
    }
}

#[test]
fn overlong_name_or_target_is_not_encoded() {
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
fn invalid_record_is_format_error() {
    let entry = |mode: u16, nanoseconds: u32| {
        let mut bytes = vec![2, 0];
        bytes.extend_from_slice(&mode.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&nanoseconds.to_le_bytes());
        bytes
    };
    for (bytes, error) in [
        (vec![0], FormatError::UnknownRecord(0)),
        (vec![8], FormatError::UnknownRecord(8)),
        (vec![7, 1, 0], FormatError::UnknownLeftOut(0)),
        (entry(0o1000, 0), FormatError::InvalidAttributes),
        (entry(0o4755, 0), FormatError::InvalidAttributes),
        (entry(0o755, 1_000_000_000), FormatError::InvalidAttributes),
        (vec![3, 0, 0, 0], FormatError::InvalidTarget),
        (vec![3, 0, 0, 0x10], FormatError::InvalidTarget),
        (vec![3, 0, 2, 0, b'a', 0], FormatError::InvalidTarget),
    ] {
        match decode(&bytes) {
            Err(ReadError::Format(found)) => assert_eq!(found, error, "{bytes:?}"),
            other => panic!("{bytes:?}: {other:?}"),
        }
    }
}

use zeroize::Zeroizing;

use super::*;

const VALUE: &[u8] = b"canary-3f9/a1+c07e";

fn patterns() -> RedactionPatterns {
    RedactionPatterns::new(&[Zeroizing::new(VALUE.to_vec())])
}

fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    push_frame(&mut out, first, payload);
    out
}

fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [1, 2, 3, 4];
    let mut out = vec![first, MASKED | u8::try_from(payload.len()).unwrap()];
    out.extend(mask);
    out.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    out
}

/// Returns the payload of all data frames, and those of all control frames.
fn read_payloads(mut input: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (mut reader, mut control) = (FrameReader::new(Side::Endpoint), false);
    let (mut data, mut controls) = (Vec::new(), Vec::new());
    while let Some(part) = reader.read_part(&mut input).unwrap() {
        match part {
            FramePart::Header(frame) => {
                reader.header.clear();
                control = frame.is_control();
            }
            FramePart::Payload { bytes, .. } if control => controls.extend_from_slice(bytes),
            FramePart::Payload { bytes, .. } => data.extend_from_slice(bytes),
        }
    }
    assert!(!reader.in_message && reader.frame.is_none() && reader.header.is_empty());
    (data, controls)
}

#[test]
fn every_kind_of_frame_is_scrubbed_at_every_cut() {
    let stars = "*".repeat(VALUE.len());
    let close = [&[3, 232][..], VALUE].concat();
    let input = [
        frame(FIN | TEXT, &[b"a", VALUE].concat()),
        frame(BINARY, &VALUE[..7]),
        frame(FIN | 9, VALUE),
        frame(CONTINUATION, &VALUE[7..11]),
        frame(FIN | CONTINUATION, &VALUE[11..]),
        frame(FIN | PONG, VALUE),
        frame(FIN | TEXT, b""),
        frame(FIN | TEXT, &vec![b'x'; 70_000]),
        frame(FIN | CLOSE, &close),
    ]
    .concat();
    let whole = MessageScrubber::new().scrub(&patterns(), &input).unwrap();
    assert!(whole.starts_with(&frame(FIN | TEXT, format!("a{stars}").as_bytes())));
    for cut in (0..120).chain(input.len() - 40..input.len()) {
        let mut scrubber = MessageScrubber::new();
        let mut out = scrubber.scrub(&patterns(), &input[..cut]).unwrap();
        out.extend(scrubber.scrub(&patterns(), &input[cut..]).unwrap());
        let (data, controls) = read_payloads(&out);
        let expected = [format!("a{stars}{stars}"), "x".repeat(70_000)].concat();
        assert!(data == expected.as_bytes(), "{cut}");
        assert_eq!(
            controls,
            [stars.as_bytes(), stars.as_bytes(), &[3, 232], stars.as_bytes()].concat()
        );
        assert_eq!(scrubber.take_hits(), 5);
    }
}

#[test]
fn frame_with_an_extension_is_refused() {
    for input in [
        &[0xc1, 0][..],       // RSV1: a compressed message
        &[0xa1, 0],           // RSV2
        &[0x91, 0],           // RSV3
        &[0x83, 0],           // an opcode that is not assigned
        &[0x8b, 0],           // another one, of a control frame
        &[0x81, 0x80],        // masked by the endpoint
        &[0x09, 0],           // a control frame in fragments
        &[0x89, 126, 0, 126], // a control frame that is too long
        &[0x80, 0],           // a continuation without a message
        &[0x01, 0, 0x81, 0],  // a message within a message
        &[0x81, 126, 0, 125], // a length in more bytes than needed
        &[0x81, 127, 0, 0, 0, 0, 0, 0, 255, 255],
        &[0x81, 127, 255, 0, 0, 0, 0, 0, 0, 0],
    ] {
        let scrubbed = MessageScrubber::new().scrub(&patterns(), input);
        assert_eq!(scrubbed, Err(InvalidFrame), "{input:x?}");
    }
    // The sandbox must mask.
    let scanned = MessageScanner::new().scan(&Placeholders::default(), &[0x81, 0]);
    assert_eq!(scanned, Err(ScanError::Frame(InvalidFrame)));
}

#[test]
fn masked_placeholder_is_found_at_every_cut() {
    let placeholder = super::super::placeholder::format_placeholder([7; 20]);
    let mut placeholders = Placeholders::default();
    placeholders.insert(placeholder.clone(), 3);
    let text = placeholder.as_bytes();
    for input in [
        masked(FIN | TEXT, text),
        masked(FIN | 9, text),
        [masked(TEXT, &text[..9]), masked(FIN | 9, b"x"), masked(FIN, &text[9..])].concat(),
    ] {
        for cut in 0..input.len() {
            let mut scanner = MessageScanner::new();
            let scanned = scanner
                .scan(&placeholders, &input[..cut])
                .and_then(|_| scanner.scan(&placeholders, &input[cut..]));
            assert_eq!(scanned, Err(ScanError::Placeholder(3)), "{cut}");
        }
    }
    let harmless = [masked(FIN | TEXT, &text[..30]), masked(FIN | BINARY, &text[30..])].concat();
    assert_eq!(MessageScanner::new().scan(&placeholders, &harmless).unwrap(), harmless);
}

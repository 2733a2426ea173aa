use super::*;

#[test]
fn image_is_padded_with_zeroes_to_whole_sections() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    for (length, padded) in
        [(0, 0), (1, ALIGNMENT), (ALIGNMENT, ALIGNMENT), (ALIGNMENT + 1, 2 * ALIGNMENT)]
    {
        fs::write(&image, vec![7; usize::try_from(length).unwrap()]).unwrap();
        assert_eq!(pad_image(&image).unwrap(), padded);
        let content = fs::read(&image).unwrap();
        assert_eq!(content.len() as u64, padded);
        assert!(
            content
                .iter()
                .enumerate()
                .all(|(at, byte)| *byte == if (at as u64) < length { 7 } else { 0 })
        );
    }
}

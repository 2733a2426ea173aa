//! Releases of gVisor whose faults a workload meets.

/// The first day of the releases without the faults below, as in their version: the release of July
/// 2024 has none of them.
const FIXED_SINCE: u32 = 20_240_101;

/// Faults of the release of December 2022, which Debian 12 has, with the remedy.
const FAULTS_OF_2022: [&str; 2] = [
    "it does not know AT_NO_AUTOMOUNT, so that ls and stat of coreutils fail",
    "a newer one is in Debian's backports: add `deb http://deb.debian.org/debian \
     bookworm-backports main` to the sources of apt, then `apt-get update` and \
     `apt-get install --target-release bookworm-backports runsc`",
];

/// Returns the known faults of a release, and the remedy at the end.
pub(crate) fn list_known_faults(version: &str) -> &'static [&'static str] {
    match release_date(version) {
        Some(date) if date < FIXED_SINCE => &FAULTS_OF_2022,
        _ => &[],
    }
}

/// Returns the date in a version: of `0.0~20221219.0` or `release-20240729.0` its eight digits.
fn release_date(version: &str) -> Option<u32> {
    let mut numbers = version.split(|character: char| !character.is_ascii_digit());
    numbers.find(|number| number.len() == 8)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_old_releases_have_known_faults() {
        for old in ["0.0~20221219.0", "release-20231204.0"] {
            assert_eq!(list_known_faults(old), FAULTS_OF_2022, "{old}");
        }
        for other in ["0.0~20240729.0", "release-20250707.0", "VERSION_MISSING", "", "1.2.3"] {
            assert!(list_known_faults(other).is_empty(), "{other}");
        }
    }
}

//! Advisories about KVM, and the kernel versions that have their fixes.
//!
//! The table lists what lets a guest reach memory outside of itself, from the records that the
//! kernel's CVE team publishes. It is not a substitute for updates: it tells of a kernel that is
//! known to be behind. State: 2026-11.

/// A version of Linux: `6.12.47`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelVersion {
    /// The series: `(6, 12)`.
    pub series: (u32, u32),
    /// The number within the series.
    pub patch: u32,
}

impl KernelVersion {
    /// Parses the begin of `/proc/sys/kernel/osrelease`; the rest belongs to the distribution.
    pub fn parse(release: &str) -> Option<Self> {
        let version = release.split(|c: char| c != '.' && !c.is_ascii_digit()).next()?;
        let mut numbers = version.split('.').map(str::parse);
        let mut next = || numbers.next()?.ok();
        let series = (next()?, next()?);
        Some(Self { series, patch: next().unwrap_or(0) })
    }
}

/// An advisory and its fixes.
#[derive(Debug)]
pub struct Advisory {
    /// The identifier.
    pub id: &'static str,
    /// The fault in a few words.
    pub title: &'static str,
    /// The first fixed version of each series that got the fix, the oldest series first. The last
    /// series, and all after it, were released with the fix.
    pub fixed: &'static [(u32, u32, u32)],
}

/// The advisories, the newest first.
pub const ADVISORIES: [Advisory; 3] = [
    Advisory {
        id: "CVE-2026-31588",
        title: "use after free when an emulated write spans two MMIO pages",
        fixed: &[(6, 12, 83), (6, 18, 24), (6, 19, 14), (7, 0, 1), (7, 1, 0)],
    },
    Advisory {
        id: "CVE-2025-40300",
        title: "VMScape: a guest reads the memory of its monitor through the branch predictor",
        fixed: &[
            (5, 10, 244),
            (5, 15, 193),
            (6, 1, 152),
            (6, 6, 106),
            (6, 12, 47),
            (6, 16, 7),
            (6, 17, 0),
        ],
    },
    Advisory {
        id: "CVE-2024-50115",
        title: "nested SVM reads beyond a page of the monitor",
        fixed: &[(5, 10, 229), (5, 15, 170), (6, 1, 115), (6, 6, 59), (6, 11, 6), (6, 12, 0)],
    },
];

impl Advisory {
    /// Returns true if the version has the fix.
    pub fn is_fixed_in(&self, version: KernelVersion) -> bool {
        let newest = self.fixed.last().map(|&(major, minor, _)| (major, minor));
        newest.is_some_and(|newest| version.series > newest)
            || self.fixed.iter().any(|&(major, minor, patch)| {
                version.series == (major, minor) && version.patch >= patch
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_version_ignores_what_follows() {
        let parse = |release| KernelVersion::parse(release).map(|v| (v.series, v.patch));
        assert_eq!(parse("6.12.47-amd64"), Some(((6, 12), 47)));
        assert_eq!(parse("6.1"), Some(((6, 1), 0)));
        assert_eq!(parse("6.17-rc3"), Some(((6, 17), 0)));
        assert_eq!(parse("6.18.44-fc-v857"), Some(((6, 18), 44)));
        assert_eq!(parse("linux"), None);
        assert_eq!(parse("6"), None);
        assert_eq!(parse("99999999999.1"), None);
    }

    #[test]
    fn fix_counts_within_its_series() {
        let [_, vmscape, _] = &ADVISORIES;
        let is_fixed = |release| vmscape.is_fixed_in(KernelVersion::parse(release).unwrap());
        for release in ["6.12.47", "6.12.90", "6.17.0", "6.18.1", "7.0", "5.10.244"] {
            assert!(is_fixed(release), "{release}");
        }
        for release in ["6.12.46", "6.13.9", "6.16.6", "5.4.300", "4.19.325"] {
            assert!(!is_fixed(release), "{release}");
        }
    }

    #[test]
    fn fixed_versions_ascend() {
        for advisory in &ADVISORIES {
            assert!(advisory.fixed.is_sorted(), "{}", advisory.id);
        }
    }
}

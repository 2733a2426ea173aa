use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

/// A host of a careful operator.
const GOOD: [(&str, &str); 20] = [
    ("proc/sys/kernel/osrelease", "7.1.3-amd64\n"),
    ("proc/cmdline", "quiet mitigations=auto,nosmt\n"),
    ("sys/devices/system/cpu/smt/active", "0\n"),
    ("sys/kernel/mm/ksm/run", "0\n"),
    ("proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n"),
    ("sys/module/kvm/parameters/nx_huge_pages", "Y\n"),
    ("sys/module/kvm_intel/parameters/nested", "N\n"),
    ("sys/module/kvm/parameters/ignore_msrs", "N\n"),
    ("proc/sys/kernel/core_pattern", "core\n"),
    ("proc/sys/fs/suid_dumpable", "0\n"),
    ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n"),
    ("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu vme vmx\n"),
    ("proc/sys/kernel/unprivileged_bpf_disabled", "2\n"),
    ("proc/sys/vm/unprivileged_userfaultfd", "0\n"),
    ("proc/sys/kernel/kptr_restrict", "1\n"),
    ("proc/sys/kernel/dmesg_restrict", "1\n"),
    ("proc/sys/kernel/yama/ptrace_scope", "1\n"),
    ("proc/sys/kernel/perf_event_paranoid", "3\n"),
    ("dev/kvm", ""),
    ("sys/devices/system/cpu/vulnerabilities/mds", "Mitigation: Clear CPU buffers; SMT disabled\n"),
];

/// The changes that weaken it, each with the check that must tell.
const WEAK: [(&str, &str, &str, Grade); 20] = [
    ("proc/sys/kernel/osrelease", "6.12.46-amd64", "kernel version", Grade::Warning),
    ("proc/cmdline", "quiet mitigations=off", "mitigations", Grade::Bad),
    ("proc/cmdline", "mitigations=auto,no_guest_host", "mitigations", Grade::Bad),
    ("sys/devices/system/cpu/smt/active", "1", "SMT", Grade::Warning),
    ("sys/kernel/mm/ksm/run", "1", "KSM", Grade::Bad),
    ("proc/swaps", "Filename\n/dev/sda2 partition 1 0 -2", "swap", Grade::Warning),
    ("sys/module/kvm/parameters/nx_huge_pages", "never", "nx_huge_pages", Grade::Warning),
    ("sys/module/kvm_intel/parameters/nested", "Y", "nested virtualization", Grade::Warning),
    ("sys/module/kvm/parameters/ignore_msrs", "Y", "ignore_msrs", Grade::Warning),
    ("proc/sys/kernel/core_pattern", "|/usr/share/apport %p", "core dumps", Grade::Warning),
    ("proc/sys/fs/suid_dumpable", "2", "set-id core dumps", Grade::Warning),
    ("sys/fs/cgroup/cgroup.controllers", "cpuset io", "cgroup v2", Grade::Warning),
    ("proc/cpuinfo", "flags : fpu hypervisor", "hypervisor", Grade::Warning),
    ("proc/sys/kernel/unprivileged_bpf_disabled", "0", "unprivileged BPF", Grade::Bad),
    ("proc/sys/vm/unprivileged_userfaultfd", "1", "unprivileged userfaultfd", Grade::Warning),
    ("proc/sys/kernel/kptr_restrict", "0", "kernel addresses", Grade::Warning),
    ("proc/sys/kernel/dmesg_restrict", "0", "kernel log", Grade::Warning),
    ("proc/sys/kernel/yama/ptrace_scope", "0", "ptrace", Grade::Warning),
    ("proc/sys/kernel/perf_event_paranoid", "-1", "perf events", Grade::Warning),
    (
        "sys/devices/system/cpu/vulnerabilities/mds",
        "Vulnerable: Clear CPU buffers attempted, no microcode",
        "processor: mds",
        Grade::Bad,
    ),
];

fn make_good_host() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in GOOD {
        write_file(&root, path, text);
    }
    let device = root.path().join("dev/kvm");
    fs::set_permissions(device, fs::Permissions::from_mode(0o660)).unwrap();
    root
}

fn write_file(root: &tempfile::TempDir, path: &str, text: &str) {
    let path = root.path().join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn grade_of(findings: &[HostFinding], name: &str) -> Grade {
    findings.iter().find(|finding| finding.name == name).unwrap().grade
}

#[test]
fn good_host_has_no_finding() {
    let root = make_good_host();
    for finding in check_host_at(root.path()) {
        assert_eq!(finding.grade, Grade::Ok, "{finding:?}");
        assert_eq!(finding.remedy, None);
    }
}

#[test]
fn each_weakness_is_noticed_alone() {
    for (path, text, name, grade) in WEAK {
        let root = make_good_host();
        write_file(&root, path, text);
        for finding in check_host_at(root.path()) {
            let expected = if finding.name == name { grade } else { Grade::Ok };
            assert_eq!(finding.grade, expected, "{text}: {finding:?}");
            assert_eq!(finding.remedy.is_some(), expected != Grade::Ok);
        }
    }
}

#[test]
fn device_for_everyone_is_noticed() {
    let root = make_good_host();
    let device = root.path().join("dev/kvm");
    fs::set_permissions(device, fs::Permissions::from_mode(0o666)).unwrap();
    assert_eq!(grade_of(&check_host_at(root.path()), "/dev/kvm"), Grade::Warning);
}

#[test]
fn amd_host_is_read_from_its_module() {
    let root = make_good_host();
    fs::remove_file(root.path().join("sys/module/kvm_intel/parameters/nested")).unwrap();
    write_file(&root, "sys/module/kvm_amd/parameters/nested", "1");
    let findings = check_host_at(root.path());
    assert_eq!(grade_of(&findings, "nested virtualization"), Grade::Warning);
}

#[test]
fn host_without_files_is_unknown_not_ok() {
    let root = tempfile::tempdir().unwrap();
    let findings = check_host_at(root.path());
    for name in ["SMT", "swap", "mitigations", "kernel version", "processor"] {
        assert_eq!(grade_of(&findings, name), Grade::Unknown, "{name}");
    }
    // A kernel without these features cannot have them switched on.
    for name in ["KSM", "unprivileged BPF", "unprivileged userfaultfd"] {
        assert_eq!(grade_of(&findings, name), Grade::Ok, "{name}");
    }
}

#[test]
fn smt_that_remains_is_a_warning() {
    let root = make_good_host();
    let path = "sys/devices/system/cpu/vulnerabilities/mds";
    write_file(&root, path, "Mitigation: Clear CPU buffers; SMT vulnerable");
    assert_eq!(grade_of(&check_host_at(root.path()), "processor: mds"), Grade::Warning);
}

#[test]
fn long_and_binary_files_are_bounded() {
    let root = make_good_host();
    write_file(&root, "proc/sys/kernel/core_pattern", &"x".repeat(1 << 20));
    let device = root.path().join("proc/cpuinfo");
    fs::write(device, vec![0xff; 1 << 20]).unwrap();
    for finding in check_host_at(root.path()) {
        assert!(finding.found.chars().count() <= 81, "{}", finding.name);
    }
}

#[test]
fn document_has_each_row() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/host.md");
    let document = fs::read_to_string(path).unwrap();
    assert!(document.contains(&render_document()), "write the table anew: see CONTRIBUTING.md");
}

//! The checks, a row each.

use std::fmt::Write as _;

use super::advisories::{ADVISORIES, KernelVersion};
use super::files::HostFiles;
use super::{Grade, HostFinding};

const VULNERABILITIES: &str = "/sys/devices/system/cpu/vulnerabilities";

/// The reason and remedy of all rows of [`VULNERABILITIES`].
const VULNERABILITY_REASON: &str = "A guest may read memory of the host or of another guest \
                                    through the processor.";
const VULNERABILITY_REMEDY: &str = "update kernel and microcode, and boot without a `mitigations=` \
                                    option that weakens it (`mitigations=auto,nosmt` if SMT is \
                                    named)";

/// A check of one file.
pub struct Row {
    name: &'static str,
    /// The file. The first that exists, if there are alternatives.
    sources: &'static [&'static str],
    /// Judges its text.
    judge: fn(&str) -> Grade,
    /// Returns the part of the text that decided.
    describe: fn(&str) -> String,
    /// The judgement if no file exists.
    absent: Grade,
    reason: &'static str,
    remedy: &'static str,
}

/// The checks of single files, in the order of their weight.
pub const ROWS: [Row; 19] = [
    Row {
        name: "kernel version",
        sources: &["/proc/sys/kernel/osrelease"],
        judge: judge_release,
        describe: describe_release,
        absent: Grade::Unknown,
        reason: "A guest attacks the host's kernel through KVM.",
        remedy: "install the newest kernel of the distribution and reboot; a distribution may have \
                 the fix in a version that looks older: its security tracker tells",
    },
    Row {
        name: "mitigations",
        sources: &["/proc/cmdline"],
        judge: judge_command_line,
        describe: describe_command_line,
        absent: Grade::Unknown,
        reason: "A boot option may switch off the protection between guests and host.",
        remedy: "remove `mitigations=off`, `mitigations=…no_guest_host` and the like from the \
                 kernel's command line",
    },
    Row {
        name: "SMT",
        sources: &["/sys/devices/system/cpu/smt/active"],
        judge: |text| if text == "0" { Grade::Ok } else { Grade::Warning },
        describe: first_line,
        absent: Grade::Unknown,
        reason: "Two guests on the threads of one core see each other's use of its caches.",
        remedy: "`echo off > /sys/devices/system/cpu/smt/control`, or the boot option `nosmt`; core \
                 scheduling, which monitors ask for, helps where the kernel has it",
    },
    Row {
        name: "KSM",
        sources: &["/sys/kernel/mm/ksm/run"],
        judge: |text| if text == "0" { Grade::Ok } else { Grade::Bad },
        describe: first_line,
        absent: Grade::Ok,
        reason: "Merged pages tell a guest by their timing what other guests have in memory.",
        remedy: "`echo 2 > /sys/kernel/mm/ksm/run`",
    },
    Row {
        name: "swap",
        sources: &["/proc/swaps"],
        judge: |text| if text.lines().count() <= 1 { Grade::Ok } else { Grade::Warning },
        describe: describe_swap,
        absent: Grade::Unknown,
        reason: "Guest memory, with what a workload was given, may be written to a disk.",
        remedy: "`swapoff -a`, or swap on an encrypted device with a key that is not kept",
    },
    Row {
        name: "nx_huge_pages",
        sources: &["/sys/module/kvm/parameters/nx_huge_pages"],
        // The kernel says N on a processor without the fault, which has a row below.
        judge: |text| if text == "never" { Grade::Warning } else { Grade::Ok },
        describe: first_line,
        absent: Grade::Unknown,
        reason: "On processors with the iTLB multihit fault, a guest can stop the host.",
        remedy: "boot with `kvm.nx_huge_pages=auto`",
    },
    Row {
        name: "nested virtualization",
        sources: &[
            "/sys/module/kvm_intel/parameters/nested",
            "/sys/module/kvm_amd/parameters/nested",
        ],
        judge: |text| if matches!(text, "N" | "0") { Grade::Ok } else { Grade::Warning },
        describe: first_line,
        absent: Grade::Unknown,
        reason: "It is the largest part of KVM that a guest can reach. Chitin's guests do not see \
                 it; guests of other programs on this host may.",
        remedy: "`options kvm_intel nested=0` (or `kvm_amd`) in /etc/modprobe.d/kvm.conf",
    },
    Row {
        name: "ignore_msrs",
        sources: &["/sys/module/kvm/parameters/ignore_msrs"],
        judge: |text| if matches!(text, "N" | "0") { Grade::Ok } else { Grade::Warning },
        describe: first_line,
        absent: Grade::Unknown,
        reason: "KVM then answers for registers that it does not emulate, instead of a fault.",
        remedy: "`echo N > /sys/module/kvm/parameters/ignore_msrs`",
    },
    Row {
        name: "core dumps",
        sources: &["/proc/sys/kernel/core_pattern"],
        judge: |text| if text.starts_with('|') { Grade::Warning } else { Grade::Ok },
        describe: first_line,
        absent: Grade::Unknown,
        reason: "A program of the host, as root, reads the memory of whatever fails.",
        remedy: "`sysctl kernel.core_pattern=core`; monitors of Chitin have a limit of 0",
    },
    Row {
        name: "set-id core dumps",
        sources: &["/proc/sys/fs/suid_dumpable"],
        judge: |text| if text == "0" { Grade::Ok } else { Grade::Warning },
        describe: first_line,
        absent: Grade::Unknown,
        reason: "Processes that changed their user, as monitors do, may be dumped.",
        remedy: "`sysctl fs.suid_dumpable=0`",
    },
    Row {
        name: "cgroup v2",
        sources: &["/sys/fs/cgroup/cgroup.controllers"],
        judge: judge_controllers,
        describe: first_line,
        absent: Grade::Warning,
        reason: "Without it, memory, tasks and processor time of a monitor have no outer limit.",
        remedy: "boot with `systemd.unified_cgroup_hierarchy=1`, and delegate cpu, memory and pids",
    },
    Row {
        name: "hypervisor",
        sources: &["/proc/cpuinfo"],
        judge: judge_processor,
        describe: describe_processor,
        absent: Grade::Unknown,
        reason: "This host is itself a guest: its own host can read everything here, and decides \
                 about microcode and SMT.",
        remedy: "use a machine of its own where that matters",
    },
    Row {
        name: "unprivileged BPF",
        sources: &["/proc/sys/kernel/unprivileged_bpf_disabled"],
        judge: |text| if matches!(text, "1" | "2") { Grade::Ok } else { Grade::Bad },
        describe: first_line,
        absent: Grade::Ok,
        reason: "Any user of the host may load programs that help to attack its kernel, also \
                 through speculation.",
        remedy: "`sysctl kernel.unprivileged_bpf_disabled=1`",
    },
    Row {
        name: "unprivileged userfaultfd",
        sources: &["/proc/sys/vm/unprivileged_userfaultfd"],
        judge: |text| if text == "0" { Grade::Ok } else { Grade::Warning },
        describe: first_line,
        absent: Grade::Ok,
        reason: "It makes races in the kernel easy to win.",
        remedy: "`sysctl vm.unprivileged_userfaultfd=0`",
    },
    Row {
        name: "kernel addresses",
        sources: &["/proc/sys/kernel/kptr_restrict"],
        judge: |text| if matches!(text, "1" | "2") { Grade::Ok } else { Grade::Warning },
        describe: first_line,
        absent: Grade::Unknown,
        reason: "The kernel tells every user where its code and data are.",
        remedy: "`sysctl kernel.kptr_restrict=1`",
    },
    Row {
        name: "kernel log",
        sources: &["/proc/sys/kernel/dmesg_restrict"],
        judge: |text| if text == "1" { Grade::Ok } else { Grade::Warning },
        describe: first_line,
        absent: Grade::Unknown,
        reason: "The kernel's log tells every user addresses and failures.",
        remedy: "`sysctl kernel.dmesg_restrict=1`",
    },
    Row {
        name: "ptrace",
        sources: &["/proc/sys/kernel/yama/ptrace_scope"],
        judge: |text| if matches!(text, "1" | "2" | "3") { Grade::Ok } else { Grade::Warning },
        describe: first_line,
        absent: Grade::Warning,
        reason: "A program of the same user can read the memory of a program that holds \
                 credentials.",
        remedy: "a kernel with Yama, and `sysctl kernel.yama.ptrace_scope=1`",
    },
    Row {
        name: "perf events",
        sources: &["/proc/sys/kernel/perf_event_paranoid"],
        judge: |text| match text.parse() {
            Ok(2_i32..) => Grade::Ok,
            _ => Grade::Warning,
        },
        describe: first_line,
        absent: Grade::Unknown,
        reason: "Every user may count events of the processor, which helps to spy on guests.",
        remedy: "`sysctl kernel.perf_event_paranoid=2`",
    },
    Row {
        name: "/dev/kvm",
        sources: &["/dev/kvm"],
        judge: judge_device,
        describe: first_line,
        absent: Grade::Unknown,
        reason: "Every user of the host, also a service that was broken into, can attack the \
                 kernel through KVM.",
        remedy: "mode 0660 and a group: `chgrp kvm /dev/kvm && chmod 660 /dev/kvm`, and a udev \
                 rule that keeps it",
    },
];

impl Row {
    /// Runs the check.
    pub fn check(&self, files: &HostFiles) -> HostFinding {
        let read = |source: &&'static str| Some((*source, self.read(files, source)?));
        let (source, grade, found) = match self.sources.iter().find_map(read) {
            Some((source, text)) => (source, (self.judge)(&text), (self.describe)(&text)),
            None => {
                let source = self.sources.first().copied().unwrap_or_default();
                (source, self.absent, "absent, or not readable".to_owned())
            }
        };
        HostFinding {
            name: self.name.to_owned(),
            grade,
            source: source.to_owned(),
            found,
            reason: self.reason.to_owned(),
            remedy: (grade != Grade::Ok).then(|| self.remedy.to_owned()),
        }
    }

    /// Returns the text to judge: of a device, its permissions in octal.
    fn read(&self, files: &HostFiles, source: &str) -> Option<String> {
        if source.starts_with("/dev/") {
            return files.permissions(source).ok().map(|mode| format!("{mode:04o}"));
        }
        files.read_text(source).ok()
    }
}

/// Judges what the kernel says of each fault of the processor that it knows.
pub fn check_vulnerabilities(files: &HostFiles) -> Vec<HostFinding> {
    let mut findings = Vec::new();
    for name in files.list_names(VULNERABILITIES) {
        let source = format!("{VULNERABILITIES}/{name}");
        let (grade, found) = match files.read_text(&source) {
            Ok(text) => (judge_vulnerability(&text), text),
            Err(_) => (Grade::Unknown, "not readable".to_owned()),
        };
        findings.push(vulnerability(format!("processor: {name}"), grade, source, found));
    }
    if findings.is_empty() {
        let found = "absent, or not readable".to_owned();
        findings.push(vulnerability(
            "processor".to_owned(),
            Grade::Unknown,
            VULNERABILITIES.to_owned(),
            found,
        ));
    }
    findings
}

fn vulnerability(name: String, grade: Grade, source: String, found: String) -> HostFinding {
    HostFinding {
        name,
        grade,
        source,
        found,
        reason: VULNERABILITY_REASON.to_owned(),
        remedy: (grade != Grade::Ok).then(|| VULNERABILITY_REMEDY.to_owned()),
    }
}

/// Judges a line as the kernel writes it: `Not affected`, `Mitigation: …` or `Vulnerable: …`. A
/// mitigation may leave something: `…; SMT vulnerable`.
fn judge_vulnerability(text: &str) -> Grade {
    let rest = ["vulnerable", "no microcode"];
    if text.starts_with("Vulnerable") {
        Grade::Bad
    } else if text.starts_with("Not affected") {
        Grade::Ok
    } else if text.starts_with("Mitigation") {
        let lower = text.to_ascii_lowercase();
        if rest.iter().any(|word| lower.contains(word)) { Grade::Warning } else { Grade::Ok }
    } else {
        Grade::Unknown
    }
}

fn judge_release(release: &str) -> Grade {
    match KernelVersion::parse(release) {
        None => Grade::Unknown,
        Some(version) if ADVISORIES.iter().all(|advisory| advisory.is_fixed_in(version)) => {
            Grade::Ok
        }
        Some(_) => Grade::Warning,
    }
}

/// Judges the options that weaken mitigations, one by one.
fn judge_command_line(line: &str) -> Grade {
    let options = ["mitigations", "spectre_v2", "l1tf", "mds", "tsx_async_abort", "vmscape"];
    let weakens = |word: &str| {
        let Some((option, value)) = word.split_once('=') else {
            return matches!(word, "nopti" | "nospectre_v1" | "nospectre_v2");
        };
        options.contains(&option)
            && value.split(',').any(|part| part == "off" || part.starts_with("no_guest"))
    };
    if line.split_whitespace().any(weakens) { Grade::Bad } else { Grade::Ok }
}

fn judge_controllers(controllers: &str) -> Grade {
    let has = |name| controllers.split_whitespace().any(|word| word == name);
    if ["cpu", "memory", "pids"].into_iter().all(has) { Grade::Ok } else { Grade::Warning }
}

fn judge_processor(text: &str) -> Grade {
    let flags = text.lines().find(|line| line.starts_with("flags"));
    match flags {
        Some(line) if line.split_whitespace().any(|flag| flag == "hypervisor") => Grade::Warning,
        Some(_) => Grade::Ok,
        // Other processors than x86 do not tell.
        None => Grade::Unknown,
    }
}

fn judge_device(mode: &str) -> Grade {
    match u32::from_str_radix(mode, 8) {
        Ok(mode) if mode & 0o006 == 0 => Grade::Ok,
        Ok(_) => Grade::Warning,
        Err(_) => Grade::Unknown,
    }
}

fn describe_release(release: &str) -> String {
    let missing = KernelVersion::parse(release).map(list_missing_fixes).unwrap_or_default();
    if missing.is_empty() { release.to_owned() } else { format!("{release} {missing}") }
}

fn describe_command_line(line: &str) -> String {
    let words = line.split_whitespace().filter(|word| judge_command_line(word) != Grade::Ok);
    let words: Vec<&str> = words.collect();
    if words.is_empty() { "on".to_owned() } else { first_line(&words.join(" ")) }
}

fn describe_swap(swaps: &str) -> String {
    match swaps.lines().count() {
        0 | 1 => "none".to_owned(),
        lines => format!("{} in use", lines - 1),
    }
}

fn describe_processor(text: &str) -> String {
    let found = match judge_processor(text) {
        Grade::Ok => "none",
        Grade::Warning => "present",
        _ => "not told",
    };
    found.to_owned()
}

/// Returns the first line of a text, shortened.
fn first_line(text: &str) -> String {
    const MAX_CHARS: usize = 80;
    let line = text.lines().next().unwrap_or_default();
    if line.chars().count() <= MAX_CHARS {
        return line.to_owned();
    }
    line.chars().take(MAX_CHARS).chain(['…']).collect()
}

fn list_missing_fixes(version: KernelVersion) -> String {
    let mut list = String::new();
    for advisory in ADVISORIES.iter().filter(|advisory| !advisory.is_fixed_in(version)) {
        let separator = if list.is_empty() { "without the fix of " } else { ", " };
        let _ = write!(list, "{separator}{} ({})", advisory.id, advisory.title);
    }
    list
}

/// Returns the table of `docs/host.md`.
pub fn render_document() -> String {
    let mut table =
        String::from("| check | read from | if it is bad | remedy |\n|---|---|---|---|\n");
    for row in &ROWS {
        let sources: Vec<String> = row.sources.iter().map(|path| format!("`{path}`")).collect();
        let sources = sources.join(", ");
        let _ = writeln!(table, "| {} | {sources} | {} | {} |", row.name, row.reason, row.remedy);
    }
    let _ = writeln!(
        table,
        "| processor: one row for each fault that the kernel knows | `{VULNERABILITIES}/*` | \
         {VULNERABILITY_REASON} | {VULNERABILITY_REMEDY} |"
    );
    table
}

use super::rules::{ioctl_rules, syscall_rules};
use super::syscall_names::syscall_name;
use super::*;

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;

/// The end of the numbers that are tried: more than there are calls. Each is also tried as a call
/// of the x32 ABI.
const NUMBERS: u32 = 1024;
const X32: u32 = 0x4000_0000;

/// The number of system calls of Linux 6.12.
const KNOWN: u32 = 467;

/// Executes a program as the kernel does (`Documentation/networking/filter.rst` of Linux), for the
/// instructions that `seccompiler` uses. Returns the verdict and the number of steps.
fn execute(program: &BpfProgram, data: &[u32; 16]) -> (u32, usize) {
    let (mut at, mut accumulator, mut steps) = (0, 0u32, 0);
    loop {
        let op = &program[at];
        let (code, k) = (u32::from(op.code), op.k);
        steps += 1;
        at += 1;
        let mut jump = |holds: bool| at += usize::from(if holds { op.jt } else { op.jf });
        match code & 0x07 {
            libc::BPF_LD => accumulator = data[usize::try_from(k).unwrap() / 4],
            libc::BPF_ALU => {
                assert_eq!(code, libc::BPF_ALU | libc::BPF_AND | libc::BPF_K);
                accumulator &= k;
            }
            libc::BPF_JMP => match code & 0xf0 {
                libc::BPF_JA => at += usize::try_from(k).unwrap(),
                libc::BPF_JEQ => jump(accumulator == k),
                other => panic!("jump {other:#x}"),
            },
            libc::BPF_RET => return (k, steps),
            other => panic!("class {other:#x}"),
        }
    }
}

/// Lays out a `seccomp_data`.
fn seccomp_data(number: u32, arch: u32, arguments: [u64; 6]) -> [u32; 16] {
    let mut data = [0; 16];
    (data[0], data[1]) = (number, arch);
    for (at, argument) in arguments.into_iter().enumerate() {
        let bytes = argument.to_le_bytes();
        let half = |from: usize| u32::from_le_bytes(std::array::from_fn(|byte| bytes[from + byte]));
        (data[4 + 2 * at], data[5 + 2 * at]) = (half(0), half(4));
    }
    data
}

/// Returns every combination of filters with both roles.
fn all_filters() -> impl Iterator<Item = (Filters, ThreadRole)> {
    // A recorded guest is one of those that may be saved.
    let bits = (0..1 << 5).filter(|bits| bits >> 3 & 0b11 != 0b10);
    let filters = bits.map(|bits| {
        let [console, restored, prepared, snapshotted, recorded] =
            [0, 1, 2, 3, 4].map(|bit| bits >> bit & 1 != 0);
        Filters { console, restored, prepared, snapshotted, recorded }
    });
    filters.flat_map(|filters| [(filters, ThreadRole::Vcpu), (filters, ThreadRole::Vmm)])
}

/// Decides by the rules, read one by one, whether a call is allowed.
fn is_allowed(filters: Filters, role: ThreadRole, number: u32, arguments: [u64; 6]) -> bool {
    let low = |at: u8| u32::try_from(arguments[usize::from(at)] & 0xffff_ffff).unwrap();
    if i64::from(number) == libc::SYS_ioctl {
        return ioctl_rules(role)
            .iter()
            .any(|rule| rule.request == low(1) && filters.is_in_scope(rule.scope));
    }
    syscall_rules(role).any(|rule| {
        rule.number == i64::from(number)
            && filters.is_in_scope(rule.scope)
            && match rule.check {
                ArgCheck::Any => true,
                ArgCheck::BitsClear(at, bits) => low(at) & bits == 0,
                ArgCheck::OneOf(at, values) => values.contains(&low(at)),
                ArgCheck::Both((first, one), (second, other)) => {
                    low(first) == one && low(second) == other
                }
            }
    })
}

/// Returns every value that a rule compares with, its neighbours, and some others.
fn argument_values() -> Vec<u64> {
    let mut values = vec![0, 1, 2, 4, 7, u64::MAX, 1 << 32, 4 << 32];
    for role in [ThreadRole::Vcpu, ThreadRole::Vmm] {
        for rule in syscall_rules(role) {
            match rule.check {
                ArgCheck::Any => {}
                ArgCheck::BitsClear(_, bits) => values.push(bits.into()),
                ArgCheck::OneOf(_, list) => {
                    values.extend(list.iter().map(|value| u64::from(*value)));
                }
                ArgCheck::Both((_, one), (_, other)) => {
                    values.extend([u64::from(one), u64::from(other)]);
                }
            }
        }
        values.extend(ioctl_rules(role).iter().map(|rule| u64::from(rule.request)));
    }
    let neighbours =
        |value: &u64| [value.wrapping_sub(1), *value, value.wrapping_add(1), value | 0xabcd << 32];
    values.iter().flat_map(neighbours).collect()
}

#[test]
fn filters_match_rules_for_every_call_and_argument() {
    let values = argument_values();
    for (filters, role) in all_filters() {
        let program = filters.build_program(role).unwrap();
        let checks_arguments = |number: u32| {
            let number = i64::from(number);
            number == libc::SYS_ioctl
                || syscall_rules(role)
                    .any(|rule| rule.number == number && rule.check != ArgCheck::Any)
        };
        for number in (0..NUMBERS).flat_map(|number| [number, number | X32]) {
            // A few values show that the arguments of the other calls do not matter.
            let values = if checks_arguments(number) { &values[..] } else { &values[..3] };
            for value in values {
                for at in 0..6 {
                    let mut arguments = [0; 6];
                    arguments[at] = *value;
                    let data = seccomp_data(number, X86_64, arguments);
                    let (verdict, _) = execute(&program, &data);
                    let expected = if is_allowed(filters, role, number, arguments) {
                        libc::SECCOMP_RET_ALLOW
                    } else {
                        libc::SECCOMP_RET_TRAP
                    };
                    assert_eq!(verdict, expected, "{role:?} {filters:?} {number} {arguments:x?}");
                }
            }
        }
    }
}

#[test]
fn memory_is_mapped_with_listed_flags_only() {
    let (mmap, madvise, mremap) = (9, 28, 25);
    for (filters, role) in all_filters() {
        let program = filters.build_program(role).unwrap();
        let is_allowed = |number, arguments| {
            execute(&program, &seccomp_data(number, X86_64, arguments)).0 == libc::SECCOMP_RET_ALLOW
        };
        // Every protection, with every single flag added to every kind of mapping.
        for protection in 0..16u64 {
            for kind in [0u64, 0x01, 0x02, 0x03, 0x20, 0x21, 0x22] {
                for flag in std::iter::once(0).chain((4..32).map(|bit| 1 << bit)) {
                    let flags = kind | flag;
                    let spare = role == ThreadRole::Vmm && filters.snapshotted;
                    let expected = match (protection, flags) {
                        (3, 0x22) => true,
                        (3, 0x01) => spare,
                        (0, 0x4022) => role == ThreadRole::Vmm && filters.recorded,
                        _ => false,
                    };
                    let found = is_allowed(mmap, [0, 4096, protection, flags, u64::MAX, 0]);
                    assert_eq!(found, expected, "{role:?} {filters:?} {protection} {flags:#x}");
                }
            }
        }
        let recorded = role == ThreadRole::Vmm && filters.recorded;
        for flags in 0x4010..0x4014u64 {
            let found = is_allowed(mmap, [0, 4096, 1, flags, 5, 0]);
            assert_eq!(found, recorded && flags == 0x4011, "{role:?} {filters:?} {flags:#x}");
        }
        for advice in 0..128u64 {
            let expected = advice == 4 || recorded && [16, 25].contains(&advice);
            assert_eq!(is_allowed(madvise, [0, 0, advice, 0, 0, 0]), expected, "{advice}");
        }
        for flags in 0..8u64 {
            let expected = role == ThreadRole::Vmm && flags == 1;
            assert_eq!(is_allowed(mremap, [0, 0, 0, flags, 0, 0]), expected, "{flags}");
        }
    }
}

#[test]
fn calls_of_another_architecture_kill_the_process() {
    for (filters, role) in all_filters() {
        let program = filters.build_program(role).unwrap();
        for number in 0..NUMBERS {
            let (verdict, _) = execute(&program, &seccomp_data(number, I386, [0; 6]));
            assert_eq!(verdict, libc::SECCOMP_RET_KILL_PROCESS);
        }
    }
}

#[test]
fn rule_lists_are_short_and_give_reasons() {
    for (role, limit) in [(ThreadRole::Vcpu, 16), (ThreadRole::Vmm, 35)] {
        let mut numbers: Vec<_> = syscall_rules(role).map(|rule| rule.number).collect();
        numbers.sort_unstable();
        let mut calls = numbers.clone();
        calls.dedup();
        // With ioctl, and without the call that only this build makes.
        let count = calls.len() + 1 - usize::from(cfg!(debug_assertions));
        assert!(count <= limit, "{role:?} has {count}");
        let repeated = numbers.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
        for number in repeated {
            let mut rules = syscall_rules(role).filter(|rule| rule.number == number);
            assert!(rules.all(|rule| rule.check != ArgCheck::Any), "{number} is listed twice");
        }
        for rule in syscall_rules(role) {
            assert_eq!(syscall_name(usize::try_from(rule.number).unwrap()), Some(rule.name));
            assert!(rule.reason.len() > 5, "{}", rule.name);
            assert_ne!(rule.check, ArgCheck::OneOf(0, &[]), "{} is never allowed", rule.name);
        }
        for rule in ioctl_rules(role) {
            let of_kvm = rule.name.starts_with("KVM_") && rule.request >> 8 & 0xff == 0xae;
            assert!(of_kvm || (rule.name, rule.request) == ("FIONBIO", 0x5421), "{}", rule.name);
        }
    }
}

#[test]
fn calls_that_open_connect_or_execute_are_refused() {
    let refused = "open openat openat2 creat socket socketpair connect bind listen accept accept4 \
        sendmsg sendmmsg clone clone3 fork vfork execve execveat ptrace process_vm_readv \
        process_vm_writev mprotect pkey_mprotect memfd_create shmat dup dup2 dup3 mount umount2 \
        pivot_root chroot chdir setns unshare kill tkill rt_sigqueueinfo rt_tgsigqueueinfo \
        rt_sigaction prctl seccomp setrlimit prlimit64 setuid setgid setresuid bpf io_uring_setup \
        userfaultfd keyctl perf_event_open pidfd_getfd pidfd_open personality modify_ldt \
        arch_prctl finit_module kexec_load sendfile splice";
    let numbers: Vec<u32> = refused
        .split_whitespace()
        .map(|name| {
            let is_named =
                |number: &u32| syscall_name(usize::try_from(*number).unwrap()) == Some(name);
            (0..NUMBERS).find(is_named).unwrap_or_else(|| panic!("{name} has no number"))
        })
        .collect();
    for (filters, role) in all_filters() {
        let program = filters.build_program(role).unwrap();
        for number in &numbers {
            let (verdict, _) = execute(&program, &seccomp_data(*number, X86_64, [0; 6]));
            assert_eq!(verdict, libc::SECCOMP_RET_TRAP, "{role:?} {number}");
        }
    }
}

#[test]
fn filters_decide_in_a_bounded_number_of_steps() {
    for (filters, role) in all_filters() {
        let program = filters.build_program(role).unwrap();
        let steps = |number: u32, request| {
            execute(&program, &seccomp_data(number, X86_64, [0, request, 0, 0, 0, 0]))
        };
        if role == ThreadRole::Vcpu {
            let (verdict, steps) = steps(16, 0xae80);
            assert_eq!(verdict, libc::SECCOMP_RET_ALLOW);
            assert!(steps <= 32, "{filters:?}: {steps} to enter the guest");
        }
        // Each call is compared one after the other.
        let longest = (0..NUMBERS).map(|number| steps(number, 0).1).max().unwrap();
        assert!(longest <= 160, "{role:?} {filters:?}: {longest}");
        // The kernel tries the program once for each call there is when it installs a filter.
        let all: usize = (0..KNOWN).map(|number| steps(number, 0).1).sum();
        // Only the builder of a template records.
        let each = if filters.recorded { 110 } else { 105 };
        assert!(all <= each * KNOWN as usize, "{role:?} {filters:?}: {all}");
    }
}

/// Renders the rules as tables for the documentation.
fn render_tables() -> String {
    let mut text = String::new();
    for (role, title) in
        [(ThreadRole::Vcpu, "The thread of a vCPU"), (ThreadRole::Vmm, "The VMM thread")]
    {
        let rules: Vec<_> = syscall_rules(role).filter(|rule| rule.name != "fcntl").collect();
        text += &format!(
            "\n### {title}: {} calls\n\n\
             | call | condition | guests | reason |\n|---|---|---|---|\n",
            rules.len() + 1
        );
        for rule in rules {
            let check = match rule.check {
                ArgCheck::Any => String::new(),
                ArgCheck::BitsClear(argument, bits) => {
                    format!("argument {argument} has no bit of {bits:#x}")
                }
                ArgCheck::OneOf(argument, values) => {
                    format!("argument {argument} is one of {values:?}")
                }
                ArgCheck::Both((first, one), (second, other)) => {
                    format!("argument {first} is {one:#x}, argument {second} is {other:#x}")
                }
            };
            let scope = describe_scope(rule.scope);
            text += &format!("| `{}` | {check} | {scope} | {} |\n", rule.name, rule.reason);
        }
        for rule in ioctl_rules(role) {
            let scope = describe_scope(rule.scope);
            text += &format!("| `ioctl` | `{}` | {scope} | {} |\n", rule.name, rule.reason);
        }
    }
    text + "\n"
}

fn describe_scope(scope: Scope) -> &'static str {
    match scope {
        Scope::All => "all",
        Scope::Console => "with `--console`",
        Scope::Restored => "restored from a template",
        Scope::Prepared => "of a pool",
        Scope::Snapshotted => "saved as a template",
        Scope::Recorded => "recorded for a template",
    }
}

#[test]
fn rules_are_documented() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/jail.md");
    let document = std::fs::read_to_string(path).unwrap();
    let (start, rest) = document.split_once(", from here -->\n").unwrap();
    let (documented, end) = rest.split_once("<!-- to here -->").unwrap();
    let tables = render_tables();
    if std::env::var_os("CHITIN_BLESS").is_some() {
        let blessed = format!("{start}, from here -->\n{tables}<!-- to here -->{end}");
        std::fs::write(path, blessed).unwrap();
    } else {
        assert!(
            documented == tables,
            "bless it: CHITIN_BLESS=1 cargo nextest run -p chitin-vmm rules_are_documented"
        );
    }
}

#[test]
fn recorded_guest_may_join_pages_of_its_file() {
    use crate::memory::page_run::{PageRun, WorkingSet};
    use crate::memory::working_set::collapse_read_pages;

    let spec = VmSpec { restore: true, record: true, ..VmSpec::new("", "image") };
    let file = tempfile::tempfile().unwrap();
    file.set_len(8 << 20).unwrap();
    // A refused call is reported to standard error, and ends this process.
    prepare_process(2).unwrap();
    let (done_tx, done_rx) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        Filters::for_spec(&spec).install_filter(ThreadRole::Vmm).unwrap();
        let read = (0..2048).map(|page| PageRun { first: page, count: 1 }).collect();
        let mut set = WorkingSet { read, ..WorkingSet::default() };
        collapse_read_pages(&file, &mut set, 8 << 20);
        done_tx.send(set.read.len()).unwrap();
        // The end of this thread would be refused.
        loop {
            std::thread::park();
        }
    });
    assert!(done_rx.recv().unwrap() > 0);
}

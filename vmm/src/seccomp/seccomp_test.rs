use super::rules::{Check, calls, ioctls};
use super::*;

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;

/// The largest number tried: more than there are, and some of those of the x32 ABI come on top.
const NUMBERS: u32 = 1024;
const X32: u32 = 0x4000_0000;

/// How many numbers Linux 6.12 has.
const KNOWN: u32 = 467;

/// What the kernel does with a program (`Documentation/networking/filter.rst` of Linux), as far as ours go; also the number of
/// steps.
fn execute(program: &[sock_filter], data: &[u32; 16]) -> (u32, usize) {
    let (mut at, mut accumulator, mut steps) = (0, 0u32, 0);
    loop {
        let op = program[at];
        let (code, k) = (u32::from(op.code), op.k);
        steps += 1;
        at += 1;
        let mut jump = |holds: bool| at += usize::from(if holds { op.jt } else { op.jf });
        match code & 0x07 {
            libc::BPF_LD => accumulator = data[usize::try_from(k).unwrap() / 4],
            libc::BPF_JMP => match code & 0xf0 {
                libc::BPF_JA => at += usize::try_from(k).unwrap(),
                libc::BPF_JEQ => jump(accumulator == k),
                libc::BPF_JGE => jump(accumulator >= k),
                libc::BPF_JSET => jump(accumulator & k != 0),
                other => panic!("jump {other:#x}"),
            },
            libc::BPF_RET => return (k, steps),
            other => panic!("class {other:#x}"),
        }
    }
}

fn data(number: u32, arch: u32, arguments: [u64; 6]) -> [u32; 16] {
    let mut data = [0; 16];
    (data[0], data[1]) = (number, arch);
    for (at, argument) in arguments.into_iter().enumerate() {
        let bytes = argument.to_le_bytes();
        let half = |from: usize| u32::from_le_bytes(std::array::from_fn(|byte| bytes[from + byte]));
        (data[4 + 2 * at], data[5 + 2 * at]) = (half(0), half(4));
    }
    data
}

fn all() -> impl Iterator<Item = (Filters, Thread)> {
    let filters = (0..1 << 4).map(|bits| {
        let has = |bit| bits >> bit & 1 != 0;
        Filters { console: has(0), restored: has(1), prepared: has(2), saved: has(3) }
    });
    filters.flat_map(|filters| [(filters, Thread::Vcpu), (filters, Thread::Vmm)])
}

/// What the rules say, read one by one.
fn allowed(filters: Filters, thread: Thread, number: u32, arguments: [u64; 6]) -> bool {
    let low = |at: u8| u32::try_from(arguments[usize::from(at)] & 0xffff_ffff).unwrap();
    if i64::from(number) == libc::SYS_ioctl {
        return ioctls(thread)
            .iter()
            .any(|ioctl| ioctl.number == low(1) && filters.hold(ioctl.when));
    }
    calls(thread).any(|rule| {
        rule.call == i64::from(number)
            && filters.hold(rule.when)
            && match rule.check {
                Check::Any => true,
                Check::Without(at, bits) => low(at) & bits == 0,
                Check::OneOf(at, values) => values.contains(&low(at)),
            }
    })
}

#[test]
fn filters_do_what_the_rules_say_for_every_call_and_argument_that_matters() {
    // Every value that a rule compares with, their neighbours, and some more.
    let mut values = vec![0, 1, 2, 4, 7, u64::MAX, 1 << 32, 4 << 32];
    for thread in [Thread::Vcpu, Thread::Vmm] {
        for rule in calls(thread) {
            match rule.check {
                Check::Any => {}
                Check::Without(_, bits) => values.push(bits.into()),
                Check::OneOf(_, list) => values.extend(list.iter().map(|value| u64::from(*value))),
            }
        }
        values.extend(ioctls(thread).iter().map(|ioctl| u64::from(ioctl.number)));
    }
    let neighbours =
        |value: &u64| [value.wrapping_sub(1), *value, value.wrapping_add(1), value | 0xabcd << 32];
    let values: Vec<u64> = values.iter().flat_map(neighbours).collect();
    for (filters, thread) in all() {
        let program = filters.program(thread);
        let listed = |number: u32| {
            let number = i64::from(number);
            number == libc::SYS_ioctl
                || calls(thread).any(|rule| rule.call == number && rule.check != Check::Any)
        };
        for number in (0..NUMBERS).flat_map(|number| [number, number | X32]) {
            // Where arguments do not matter, a few of them show it.
            let values = if listed(number) { &values[..] } else { &values[..3] };
            for value in values {
                for at in 0..6 {
                    let mut arguments = [0; 6];
                    arguments[at] = *value;
                    let (verdict, _) = execute(&program, &data(number, X86_64, arguments));
                    let expected = if allowed(filters, thread, number, arguments) {
                        libc::SECCOMP_RET_ALLOW
                    } else {
                        libc::SECCOMP_RET_TRAP
                    };
                    assert_eq!(verdict, expected, "{thread:?} {filters:?} {number} {arguments:x?}");
                }
            }
        }
    }
}

#[test]
fn calls_of_another_architecture_end_the_process() {
    for (filters, thread) in all() {
        let program = filters.program(thread);
        for number in 0..NUMBERS {
            let (verdict, _) = execute(&program, &data(number, I386, [0; 6]));
            assert_eq!(verdict, libc::SECCOMP_RET_KILL_PROCESS);
        }
    }
}

#[test]
fn lists_are_short_and_say_why() {
    for (thread, most) in [(Thread::Vcpu, 16), (Thread::Vmm, 35)] {
        let mut numbers: Vec<_> = calls(thread).map(|rule| rule.call).collect();
        // With ioctl, and without what only this build has.
        let count = numbers.len() + 1 - usize::from(cfg!(debug_assertions));
        assert!(count <= most, "{thread:?} has {count}");
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), calls(thread).count(), "one twice");
        for rule in calls(thread) {
            assert_eq!(syscall_names::name(usize::try_from(rule.call).unwrap()), Some(rule.name));
            assert!(rule.why.len() > 5, "{}", rule.name);
        }
        for ioctl in ioctls(thread) {
            let of_kvm = ioctl.name.starts_with("KVM_") && ioctl.number >> 8 & 0xff == 0xae;
            assert!(of_kvm || (ioctl.name, ioctl.number) == ("FIONBIO", 0x5421), "{}", ioctl.name);
        }
    }
}

#[test]
fn nothing_that_opens_connects_starts_or_executes_is_allowed() {
    let never = "open openat openat2 creat socket socketpair connect bind listen accept accept4 sendmsg sendmmsg clone clone3 \
        fork vfork execve execveat ptrace process_vm_readv process_vm_writev mprotect pkey_mprotect memfd_create shmat dup dup2 \
        dup3 mount umount2 pivot_root chroot chdir setns unshare kill tkill rt_sigqueueinfo rt_tgsigqueueinfo rt_sigaction \
        prctl seccomp setrlimit prlimit64 setuid setgid setresuid bpf io_uring_setup userfaultfd keyctl perf_event_open \
        pidfd_getfd pidfd_open personality modify_ldt arch_prctl finit_module kexec_load sendfile splice";
    for (filters, thread) in all() {
        let program = filters.program(thread);
        for name in never.split_whitespace() {
            let number = (0..NUMBERS).find(|number| {
                syscall_names::name(usize::try_from(*number).unwrap()) == Some(name)
            });
            let number = number.unwrap_or_else(|| panic!("{name} has no number"));
            let (verdict, _) = execute(&program, &data(number, X86_64, [0; 6]));
            assert_eq!(verdict, libc::SECCOMP_RET_TRAP, "{thread:?} {name}");
        }
    }
}

#[test]
fn the_way_into_the_guest_is_short_and_no_way_is_long() {
    for (filters, thread) in all() {
        let program = filters.program(thread);
        let run = data(16, X86_64, [0, 0xae80, 0, 0, 0, 0]);
        let (verdict, steps) = execute(&program, &run);
        if thread == Thread::Vcpu {
            assert_eq!((verdict, steps), (libc::SECCOMP_RET_ALLOW, 7));
        }
        let steps = |number: u32| execute(&program, &data(number, X86_64, [0; 6])).1;
        let longest = (0..NUMBERS).map(steps).max().unwrap();
        assert!(longest <= 18, "{thread:?} {longest}");
        // Each number is gone through once when the filter is installed.
        let all: usize = (0..KNOWN).map(steps).sum();
        assert!(all <= 9 * KNOWN as usize, "{thread:?} {filters:?} {all}");
    }
}

#[test]
fn a_program_that_is_longer_than_a_jump_leads_to_the_same_ends() {
    let check = |number: u32| match number % 3 {
        0 => Check::Any,
        1 => Check::Without(2, 4),
        _ => Check::OneOf(1, &[3, 7]),
    };
    let calls: Vec<_> = (0..NUMBERS)
        .step_by(2)
        .map(|number| assemble::Allowed { call: number.into(), check: check(number) })
        .collect();
    let program = assemble::program(&calls, &[]);
    assert!(program.len() > 4 * usize::from(u8::MAX));
    for number in 0..NUMBERS {
        for (arguments, holds) in
            [([0, 7, 0], [true, true, true]), ([0, 2, 4], [true, false, false])]
        {
            let [a, b, c] = arguments;
            let (verdict, _) = execute(&program, &data(number, X86_64, [a, b, c, 0, 0, 0]));
            let allowed = number % 2 == 0 && holds[usize::try_from(number % 3).unwrap()];
            let expected = if allowed { libc::SECCOMP_RET_ALLOW } else { libc::SECCOMP_RET_TRAP };
            assert_eq!(verdict, expected, "{number} {arguments:?}");
        }
    }
}

/// The rules as documentation.
fn tables() -> String {
    let mut text = String::new();
    for (thread, title) in [(Thread::Vcpu, "A vCPU's thread"), (Thread::Vmm, "The VMM thread")] {
        let rules: Vec<_> = calls(thread).filter(|rule| rule.name != "fcntl").collect();
        text += &format!(
            "\n### {title}: {} calls\n\n| call | if | for | why |\n|---|---|---|---|\n",
            rules.len() + 1
        );
        for rule in rules {
            let check = match rule.check {
                Check::Any => String::new(),
                Check::Without(argument, bits) => {
                    format!("argument {argument} has no bit of {bits:#x}")
                }
                Check::OneOf(argument, values) => {
                    format!("argument {argument} is one of {values:?}")
                }
            };
            text +=
                &format!("| `{}` | {check} | {} | {} |\n", rule.name, whom(rule.when), rule.why);
        }
        for ioctl in ioctls(thread) {
            text +=
                &format!("| `ioctl` | `{}` | {} | {} |\n", ioctl.name, whom(ioctl.when), ioctl.why);
        }
    }
    text + "\n"
}

fn whom(when: When) -> &'static str {
    match when {
        When::Always => "all",
        When::Console => "`--console`",
        When::Restored => "copies of a template",
        When::Prepared => "those of a pool",
        When::Saved => "a template that is made",
    }
}

#[test]
fn rules_are_documented_as_they_are() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/jail.md");
    let document = std::fs::read_to_string(path).unwrap();
    let (before, rest) = document.split_once(", from here -->\n").unwrap();
    let (documented, after) = rest.split_once("<!-- to here -->").unwrap();
    if std::env::var_os("CHITIN_BLESS").is_some() {
        std::fs::write(
            path,
            format!("{before}, from here -->\n{}<!-- to here -->{after}", tables()),
        )
        .unwrap();
    } else {
        assert!(
            documented == tables(),
            "write it again: CHITIN_BLESS=1 cargo nextest run -p chitin-vmm documented"
        );
    }
}

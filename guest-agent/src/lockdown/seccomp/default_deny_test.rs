use std::collections::BTreeMap;

use super::*;
use crate::lockdown::seccomp::allowlist::{CHECKED, Group};

/// Runs the filter over a `seccomp_data` as the kernel does. Returns the result and the number of
/// instructions.
fn run_filter(
    filter: &Filter,
    architecture: u32,
    number: u32,
    arguments: [u64; 6],
) -> (u32, usize) {
    let mut data = [number.to_le_bytes(), architecture.to_le_bytes()].concat();
    data.extend(0_u64.to_le_bytes());
    data.extend(arguments.into_iter().flat_map(u64::to_le_bytes));
    let (mut at, mut accumulator) = (0, 0);
    for count in 1.. {
        let Instruction { code, jt, jf, k } = filter.0[at];
        at += 1;
        let taken = match code {
            LOAD => {
                let offset = usize::try_from(k).unwrap();
                accumulator = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap());
                continue;
            }
            RETURN => return (k, count),
            JUMP => {
                at += usize::try_from(k).unwrap();
                continue;
            }
            JUMP_EQUAL => accumulator == k,
            JUMP_AT_LEAST => accumulator >= k,
            JUMP_ANY_BIT => accumulator & k != 0,
            other => panic!("operation {other:#x}"),
        };
        at += usize::from(if taken { jt } else { jf });
    }
    unreachable!()
}

fn evaluate(number: libc::c_long, arguments: [u64; 6]) -> u32 {
    run_filter(&Filter::default_deny(), X86_64, u32::try_from(number).unwrap(), arguments).0
}

#[test]
fn default_deny_allows_listed_calls_only() {
    let filter = Filter::default_deny();
    let listed: BTreeMap<u32, &str> =
        ALLOWED.iter().flat_map(|group| group.calls).map(|call| (call.number, call.name)).collect();
    let entries: usize = ALLOWED.iter().map(|group| group.calls.len()).sum();
    assert_eq!(listed.len(), entries, "a call is listed twice");
    let checked = [
        libc::SYS_socket,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_ioctl,
        libc::SYS_personality,
    ]
    .map(|call| u32::try_from(call).unwrap());
    for number in 0..=LAST {
        if checked.contains(&number) {
            assert!(!listed.contains_key(&number));
            continue;
        }
        let expected = if listed.contains_key(&number) { ALLOW } else { fail_with(Errno::PERM) };
        let (value, count) = run_filter(&filter, X86_64, number, [0; 6]);
        assert_eq!(value, expected, "{number} {:?}", listed.get(&number));
        assert!(count <= 16, "{number} takes {count} instructions");
    }
    for number in [LAST + 1, 1000, 0x4000_0000, 0x4000_0029, u32::MAX] {
        assert_eq!(
            run_filter(&filter, X86_64, number, [0; 6]).0,
            fail_with(Errno::NOSYS),
            "{number:#x}"
        );
    }
    // AUDIT_ARCH_I386.
    assert_eq!(run_filter(&filter, 0x4000_0003, 1, [0; 6]).0, KILL);
}

#[test]
fn default_deny_checks_arguments() {
    let eperm = fail_with(Errno::PERM);
    let socket = |domain: u64, protocol| evaluate(libc::SYS_socket, [domain, 1, protocol, 0, 0, 0]);
    for domain in [1, 2, 10] {
        assert_eq!(socket(domain, 0), ALLOW);
    }
    // The kernel takes an int and ignores the upper half.
    assert_eq!(socket(1 << 32 | 2, 0), ALLOW);
    assert_eq!(socket(16, 0), ALLOW);
    for (domain, protocol) in
        [(16, 15), (40, 0), (1 << 32 | 40, 0), (17, 0), (38, 0), (0, 0), (29, 0)]
    {
        assert_eq!(socket(domain, protocol), fail_with(Errno::AFNOSUPPORT), "{domain} {protocol}");
    }
    let clone = |flags| evaluate(libc::SYS_clone, [flags, 0, 0, 0, 0, 0]);
    assert_eq!((clone(17), clone(0x3d_0f00), clone(0x120_0011)), (ALLOW, ALLOW, ALLOW));
    for namespace in
        [0x2_0000, 0x200_0000, 0x400_0000, 0x800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000]
    {
        assert_eq!(clone(namespace | 17), eperm, "{namespace:#x}");
    }
    assert_eq!(evaluate(libc::SYS_clone3, [0; 6]), fail_with(Errno::NOSYS));
    let ioctl = |request| evaluate(libc::SYS_ioctl, [0, request, 0, 0, 0, 0]);
    assert_eq!((ioctl(0x5401), ioctl(0x5413)), (ALLOW, ALLOW));
    assert_eq!((ioctl(0x5412), ioctl(1 << 32 | 0x5412), ioctl(0x541c)), (eperm, eperm, eperm));
    let personality = |persona| evaluate(libc::SYS_personality, [persona, 0, 0, 0, 0, 0]);
    assert_eq!((personality(0), personality(0xffff_ffff)), (ALLOW, ALLOW));
    // ADDR_NO_RANDOMIZE.
    assert_eq!(personality(0x4_0000), eperm);
}

#[test]
fn binary_search_of_any_size_finds_the_range() {
    // The longest are further apart than a branch can jump.
    for len in [1, 2, 3, 100, 511, 512, 2000] {
        let ranges: Vec<_> = (0..len).map(|number| (number * 2, Action::Return(number))).collect();
        let mut code = vec![instruction(LOAD, NUMBER)];
        assemble_search(&ranges, &mut code);
        let filter = Filter(code);
        for number in 0..len * 2 {
            assert_eq!(
                run_filter(&filter, X86_64, number, [0; 6]).0,
                number / 2,
                "{number} of {len}"
            );
        }
    }
}

#[test]
fn dangerous_calls_are_denied() {
    for call in [
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_pidfd_getfd,
        libc::SYS_kcmp,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_move_mount,
        libc::SYS_open_tree,
        libc::SYS_fsopen,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_kexec_load,
        libc::SYS_reboot,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_iopl,
        libc::SYS_ioperm,
        libc::SYS_modify_ldt,
        libc::SYS_open_by_handle_at,
        libc::SYS_name_to_handle_at,
        libc::SYS_swapon,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_sethostname,
        libc::SYS_syslog,
        libc::SYS_quotactl,
        libc::SYS_acct,
    ] {
        assert_eq!(evaluate(call, [0; 6]), fail_with(Errno::PERM), "{call}");
    }
}

#[test]
fn documented_allowlist_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/policy.md");
    let text = std::fs::read_to_string(path).unwrap();
    let mut expected = String::new();
    for Group { why, calls } in ALLOWED {
        let names: Vec<String> = calls
            .iter()
            .map(|call| format!("`{}`", call.name.trim_start_matches("SYS_")))
            .collect();
        expected.push_str(&format!("- {why}: {}\n", names.join(" ")));
    }
    for (name, why) in CHECKED {
        expected.push_str(&format!("- `{name}` {why}\n"));
    }
    assert!(text.contains(&expected), "docs/policy.md should have this list:\n{expected}");
}

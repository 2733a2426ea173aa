//! The command line of QEMU.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use chitin_nested_init::{CONTROL_PORT, ROOT_TAG, STDERR_PORT, STDIN_PORT, STDOUT_PORT, share_tag};

use super::host::Host;
use super::{Args, qemu};

/// Everything that QEMU can emulate.
const CPU: &str = "max";
/// The same without AVX: with AVX, the C library copies by `rep movsb`, of which the deterministic
/// clock counts every byte.
const CPU_ICOUNT: &str = "max,-avx,-avx2,-f16c,-vaes,-vpclmulqdq";
/// Mitigations and address randomization of the emulated machine's kernel would slow the emulation
/// down and blur figures; those of the guests in it stay on. The initializers that are left out
/// take a quarter of the boot: tracing events, BPF types, built-in certificates, a noise source.
const KERNEL_COMMAND_LINE: &str = "console=ttyS0 panic=-1 quiet mitigations=off nokaslr norandmaps \
    initcall_blacklist=trace_eval_init,init_kprobe_trace,bpf_tcp_ca_kfunc_init,\
    bpf_dummy_struct_ops_init,load_system_certificate_list,jent_mod_init";

/// The names of the socket pairs between us and QEMU, in the order of their descriptors.
pub const CHANNELS: [&str; 5] = ["control", "stdin", "stdout", "stderr", "console"];

/// Returns the arguments for a machine that boots `host`, with a descriptor for each of
/// [`CHANNELS`].
pub fn build_arguments(
    args: &Args,
    host: &Host,
    shares: &[PathBuf],
    fds: &[RawFd; CHANNELS.len()],
) -> Vec<OsString> {
    let mut list: Vec<OsString> = Vec::new();
    let mut add = |words: &[&str]| list.extend(words.iter().map(OsString::from));
    for firmware in qemu::FIRMWARE {
        add(&["-L", firmware]);
    }
    add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35"]);
    add(&["-m", &args.memory.to_string()]);
    if args.icount {
        add(&["-cpu", CPU_ICOUNT, "-accel", "tcg,thread=single", "-smp", "1"]);
        // shift=1: 2 ns for each instruction; sleep=off: an idle CPU advances to its next timer
        // instead of waiting for it.
        add(&["-icount", "shift=1,sleep=off", "-rtc", "clock=vm"]);
        // Makes RDRAND, and with it every random choice of the machine, the same each time.
        add(&["-seed", "1"]);
    } else {
        let threads = if args.cpus == 1 { "single" } else { "multi" };
        add(&["-cpu", CPU, "-accel", &format!("tcg,thread={threads}")]);
        add(&["-smp", &args.cpus.to_string()]);
    }
    add(&["-kernel", &host.kernel.to_string_lossy(), "-initrd", &host.initrd.to_string_lossy()]);
    add(&["-append", KERNEL_COMMAND_LINE]);
    for (name, fd) in CHANNELS.iter().zip(fds) {
        add(&["-chardev", &format!("socket,id={name},fd={fd}")]);
    }
    add(&["-serial", "chardev:console", "-device", "virtio-serial-pci,max_ports=8"]);
    let ports = [CONTROL_PORT, STDIN_PORT, STDOUT_PORT, STDERR_PORT];
    for (number, (chardev, port)) in CHANNELS.iter().zip(ports).enumerate() {
        let number = number + 1;
        add(&["-device", &format!("virtserialport,chardev={chardev},name={port},nr={number}")]);
    }
    add_share(&mut list, ROOT_TAG, Path::new("/"), ",readonly=on");
    for (index, path) in shares.iter().enumerate() {
        add_share(&mut list, &share_tag(index), path, "");
    }
    list
}

fn add_share(list: &mut Vec<OsString>, tag: &str, path: &Path, mode: &str) {
    let options = format!("local,id={tag},security_model=none,multidevs=remap{mode},path=");
    let mut fsdev = OsString::from(options);
    fsdev.push(path);
    let device = format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}");
    list.extend(["-fsdev".into(), fsdev, "-device".into(), device.into()]);
}

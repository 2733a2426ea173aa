//! Whether this host can run microVMs, found out by running one.
//!
//! `/dev/kvm` may be there, answer every request, and still execute guests by emulating one instruction after another, some
//! thousand times too slow for Linux, or fail at the first instruction it does not know. So a guest of a few instructions
//! is run in 64-bit mode: it uses SSE, and counts down 10,000 times.

use std::ops::ControlFlow::{self, Break, Continue};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use crate::arch::x86_64::registers;
use crate::kvm::{self, Vm};
use crate::memory;
use crate::vm::kick;

/// How often the guest counts down.
const COUNTDOWN: u32 = 10_000;

/// The count down is repeated and the fastest taken: the first includes page faults of the host, any may include another
/// process's turn.
const ROUNDS: usize = 3;

/// An emulated KVM takes some 15 ms for a count down, at 1.4 million instructions per second. A processor takes 5 µs, and
/// one that is itself emulated by binary translation, 100 million instructions per second, takes 0.2 ms.
const SLOWEST: Duration = Duration::from_millis(2);

/// How long the whole probe may take. An emulated KVM needs 50 ms.
const LIMIT: Duration = Duration::from_secs(1);

/// The port that the guest writes to: after the SSE instruction, and after each count down.
const PORT: u16 = 0x80;

const ENTRY: GuestAddress = GuestAddress(0x1_0000);
const RAM_BYTES: u64 = 2 << 20;

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Whether microVMs can be run.
    pub usable: bool,
    /// Why not, with the remedy.
    pub reason: Option<String>,
    /// The fastest count down, where the guest got that far.
    pub elapsed_ns: Option<u64>,
    /// The version of KVM's interface, where there is one.
    pub api_version: Option<i32>,
}

/// Runs the probe; takes a few milliseconds on a usable KVM and never more than some two seconds.
pub fn run() -> Verdict {
    let unusable = |reason: String, api_version| Verdict {
        usable: false,
        reason: Some(reason),
        elapsed_ns: None,
        api_version,
    };
    let kvm = match kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => return unusable(crate::one_line(&error), None),
    };
    let api_version = Some(kvm::api_version(&kvm));
    let prepared = prepare(&kvm);
    match prepared.map(run_bounded) {
        Err(error) => unusable(error, api_version),
        Ok(Err(reason)) => unusable(reason, api_version),
        Ok(Ok(fastest)) if fastest > SLOWEST => Verdict {
            usable: false,
            reason: Some(format!(
                "this KVM emulates instructions: {COUNTDOWN} loops took {} µs instead of a few: use a host with hardware virtualization, or `cargo xtask nested`",
                fastest.as_micros()
            )),
            elapsed_ns: nanoseconds(fastest),
            api_version,
        },
        Ok(Ok(fastest)) => {
            Verdict { usable: true, reason: None, elapsed_ns: nanoseconds(fastest), api_version }
        }
    }
}

fn nanoseconds(time: Duration) -> Option<u64> {
    u64::try_from(time.as_nanos()).ok()
}

/// A VM, its memory, and a vCPU that is about to run the probe. Fields are dropped in this order.
struct Prepared {
    vcpu: VcpuFd,
    _vm: Vm,
    _ram: memory::GuestRam,
}

fn prepare(kvm: &kvm_ioctls::Kvm) -> Result<Prepared, String> {
    let line = |error: &dyn std::error::Error| crate::one_line(error);
    let ram = memory::create(RAM_BYTES).map_err(|error| line(&error))?;
    registers::write_tables(&ram).map_err(|error| line(&error))?;
    ram.write_slice(&program(), ENTRY).map_err(|error| line(&error))?;
    let mut vm = Vm::new(kvm).map_err(|error| line(&error))?;
    vm.add_ram(&ram).map_err(|error| line(&error))?;
    let vcpu = vm.add_probe_vcpu(ENTRY).map_err(|error| line(&error))?;
    Ok(Prepared { vcpu, _vm: vm, _ram: ram })
}

/// The guest.
fn program() -> Vec<u8> {
    let [port, _] = PORT.to_le_bytes();
    let [a, b, c, d] = COUNTDOWN.to_le_bytes();
    vec![
        0x66, 0x0f, 0xef, 0xc0, // pxor xmm0, xmm0
        0xe6, port, // out PORT, al
        // again:
        0xb9, a, b, c, d, // mov ecx, COUNTDOWN
        // count:
        0xff, 0xc9, // dec ecx
        0x75, 0xfc, // jnz count
        0xe6, port, // out PORT, al
        0xeb, 0xf3, // jmp again
    ]
}

/// Runs the guest in a thread of its own, so that one that never comes out does not keep the caller.
fn run_bounded(prepared: Prepared) -> Result<Duration, String> {
    kick::install_kick_handler()
        .map_err(|error| format!("install the signal handler of vCPUs: {error}"))?;
    let (sender, result) = mpsc::channel();
    let thread = std::thread::Builder::new().name("probe".into()).spawn(move || {
        let mut prepared = prepared;
        let answer = kick::run_kickable(&mut prepared.vcpu, measure);
        // Nobody listens any more if it took too long.
        let _ = sender.send(answer);
    });
    let thread = thread.map_err(|error| format!("start a thread: {error}"))?;
    let hung =
        || "the probe guest did not finish within a second: this KVM is not usable".to_owned();
    match result.recv_timeout(LIMIT) {
        Ok(answer) => answer,
        Err(RecvTimeoutError::Disconnected) => Err(hung()),
        Err(RecvTimeoutError::Timeout) => {
            // Thread and VM are left behind if even this does not get it out.
            let _ = thread.kill(SIGRTMIN());
            let _ = result.recv_timeout(LIMIT);
            Err(hung())
        }
    }
}

fn measure(vcpu: &mut VcpuFd) -> Result<Duration, String> {
    let mut fastest = Duration::MAX;
    until_out(vcpu).map_err(|why| format!("{why} at an SSE instruction: this KVM emulates instructions and not all of them: use a host with hardware virtualization, or `cargo xtask nested`"))?;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        until_out(vcpu).map_err(|why| {
            format!("{why} in a loop of two instructions: this KVM is not usable")
        })?;
        fastest = fastest.min(start.elapsed());
    }
    Ok(fastest)
}

fn until_out(vcpu: &mut VcpuFd) -> Result<(), String> {
    let step = |vcpu: &mut VcpuFd| -> ControlFlow<Result<(), String>> {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, _)) => Break(Ok(())),
            Ok(VcpuExit::Intr) => Continue(()),
            Ok(VcpuExit::InternalError) => {
                Break(Err("KVM failed to emulate an instruction".into()))
            }
            Ok(exit) => Break(Err(format!("unexpected exit {exit:?}"))),
            Err(error) => Break(Err(format!("the probe guest stopped: {error}"))),
        }
    };
    loop {
        if let Break(result) = step(vcpu) {
            return result;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_has_an_answer_in_bounded_time_wherever_it_runs() {
        let start = Instant::now();
        let verdict = run();
        assert!(start.elapsed() < 3 * LIMIT);
        assert_eq!(verdict.usable, verdict.reason.is_none());
    }

    #[test]
    fn jumps_of_the_guest_land_on_instructions() {
        let program = program();
        let target = |at: usize| {
            let end = i64::try_from(at + 2).unwrap();
            usize::try_from(end + i64::from(program[at + 1].cast_signed())).unwrap()
        };
        assert_eq!(program[target(13)], 0xff);
        assert_eq!(program[target(17)], 0xb9);
    }
}

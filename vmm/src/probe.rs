//! Finds out whether this host can run microVMs, by running one.
//!
//! `/dev/kvm` may exist, accept every request, and still be unusable: it may emulate one
//! instruction after another, some thousand times too slow for Linux, or fail at the first
//! instruction that it does not know. So a guest of a few instructions runs in 64-bit mode: it uses
//! SSE, then counts down from 10,000 again and again.
//!
//! ```text
//!  open /dev/kvm ─▶ prepare VM ─▶ thread: SSE instruction, 3 countdowns ─▶ fastest ≤ 2 ms: usable
//!                                    └─ no end within 1 s: kicked, or left behind ─▶ unusable
//! ```

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use chitin_text::error_chain;
use kvm_ioctls::{VcpuExit, VcpuFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use crate::arch::x86_64::registers;
use crate::kvm::{self, Vm};
use crate::memory;
use crate::vm::kick;

/// The number that the guest counts down from.
const COUNTDOWN: u32 = 10_000;

/// The number of countdowns, of which the fastest counts: the first includes page faults of the
/// host, and any may be interrupted by another process.
const ROUNDS: usize = 3;

/// The longest countdown of a usable KVM.
///
/// An emulated KVM takes about 15 ms, at 1.4 million instructions per second. A processor takes
/// 5 µs. A processor that is itself emulated by binary translation, at 100 million instructions per
/// second, takes 0.2 ms.
const SLOWEST: Duration = Duration::from_millis(2);

/// The time limit of the whole probe. An emulated KVM needs 50 ms.
const LIMIT: Duration = Duration::from_secs(1);

/// The port that the guest writes to: after the SSE instruction, and after each countdown.
const PORT: u16 = 0x80;

const ENTRY: GuestAddress = GuestAddress(0x1_0000);
const RAM_BYTES: u64 = 2 << 20;

/// The support of a host for microVMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmSupport {
    /// True if microVMs can run.
    pub usable: bool,
    /// The reason why they cannot, with the remedy.
    pub reason: Option<String>,
    /// The time of the fastest countdown, if the guest got that far.
    pub elapsed_ns: Option<u64>,
    /// The version of KVM's API, if it could be opened.
    pub api_version: Option<i32>,
}

/// Runs the probe. It takes a few milliseconds on a usable KVM, and never more than about two
/// seconds.
pub fn probe_kvm() -> KvmSupport {
    let mut support =
        KvmSupport { usable: false, reason: None, elapsed_ns: None, api_version: None };
    match measure_kvm(&mut support.api_version) {
        Ok(fastest) => {
            support.elapsed_ns = u64::try_from(fastest.as_nanos()).ok();
            support.usable = fastest <= SLOWEST;
            if !support.usable {
                support.reason = Some(format!(
                    "this KVM emulates instructions: {COUNTDOWN} loops took {} µs instead of a \
                     few: use a host with hardware virtualization, or `cargo xtask nested`",
                    fastest.as_micros()
                ));
            }
        }
        Err(reason) => support.reason = Some(reason),
    }
    support
}

/// Runs the guest, and returns the time of its fastest countdown.
fn measure_kvm(api_version: &mut Option<i32>) -> Result<Duration, String> {
    let kvm = kvm::open_kvm().map_err(|error| error_chain(&error))?;
    *api_version = Some(kvm::api_version(&kvm));
    run_with_limit(PreparedGuest::new(&kvm)?)
}

/// A VM, its memory, and a vCPU that has not run the guest yet. Fields are dropped in this order.
struct PreparedGuest {
    vcpu: VcpuFd,
    _vm: Vm,
    _ram: memory::GuestRam,
}

impl PreparedGuest {
    fn new(kvm: &kvm_ioctls::Kvm) -> Result<Self, String> {
        let ram = memory::create_ram(&[(GuestAddress(0), RAM_BYTES)])
            .map_err(|error| error_chain(&error))?;
        registers::write_page_tables(&ram).map_err(|error| error_chain(&error))?;
        ram.write_slice(&assemble_guest(), ENTRY).map_err(|error| error_chain(&error))?;
        let mut vm = Vm::new(kvm).map_err(|error| error_chain(&error))?;
        vm.add_ram(&ram).map_err(|error| error_chain(&error))?;
        let vcpu = vm.create_probe_vcpu(ENTRY).map_err(|error| error_chain(&error))?;
        Ok(Self { vcpu, _vm: vm, _ram: ram })
    }
}

/// Returns the code of the guest.
fn assemble_guest() -> Vec<u8> {
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

/// Runs the guest in a separate thread, so that a guest that never exits does not block the caller.
fn run_with_limit(mut guest: PreparedGuest) -> Result<Duration, String> {
    kick::install_kick_handler()
        .map_err(|error| format!("install the signal handler of vCPUs: {error}"))?;
    let (sender, result) = mpsc::channel();
    let thread = std::thread::Builder::new().name("probe".into()).spawn(move || {
        let measured = kick::run_kickable(&mut guest.vcpu, measure_countdown);
        // The receiver is gone if the guest took too long.
        let _ = sender.send(measured);
    });
    let thread = thread.map_err(|error| format!("start a thread: {error}"))?;
    let timed_out =
        || "the probe guest did not finish within a second: this KVM is not usable".to_owned();
    match result.recv_timeout(LIMIT) {
        Ok(measured) => measured,
        Err(RecvTimeoutError::Disconnected) => Err(timed_out()),
        Err(RecvTimeoutError::Timeout) => {
            // Thread and VM are left behind if the vCPU does not exit even then.
            let _ = thread.kill(SIGRTMIN());
            let _ = result.recv_timeout(LIMIT);
            Err(timed_out())
        }
    }
}

/// Runs the guest through its SSE instruction and all countdowns.
fn measure_countdown(vcpu: &mut VcpuFd) -> Result<Duration, String> {
    let mut fastest = Duration::MAX;
    run_to_port(vcpu).map_err(|cause| {
        format!(
            "{cause} at an SSE instruction: this KVM emulates instructions and not all of them: \
             use a host with hardware virtualization, or `cargo xtask nested`"
        )
    })?;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        run_to_port(vcpu).map_err(|cause| {
            format!("{cause} in a loop of two instructions: this KVM is not usable")
        })?;
        fastest = fastest.min(start.elapsed());
    }
    Ok(fastest)
}

/// Runs the guest until it writes to [`PORT`].
fn run_to_port(vcpu: &mut VcpuFd) -> Result<(), String> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, _)) => return Ok(()),
            Ok(VcpuExit::Intr) => {}
            Ok(VcpuExit::InternalError) => {
                return Err("KVM failed to emulate an instruction".into());
            }
            Ok(exit) => return Err(format!("unexpected exit {exit:?}")),
            Err(error) => return Err(format!("the probe guest stopped: {error}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probe_reports_a_result_in_bounded_time() {
        let start = Instant::now();
        let support = probe_kvm();
        assert!(start.elapsed() < 3 * LIMIT);
        assert_eq!(support.usable, support.reason.is_none());
    }

    #[test]
    fn guest_jumps_land_on_instructions() {
        let code = assemble_guest();
        let target = |at: usize| {
            let end = i64::try_from(at + 2).unwrap();
            usize::try_from(end + i64::from(code[at + 1].cast_signed())).unwrap()
        };
        assert_eq!(code[target(13)], 0xff);
        assert_eq!(code[target(17)], 0xb9);
    }
}

//! The benchmarks: their arguments, the figures that are compared, and the tables of a peer.

use std::path::{Path, PathBuf};

use crate::parts::Part;
use crate::workspace;

/// The request that the server of `examples/warm-python.sh` gets while the template is built, which
/// is the one that copies get.
const ASKING: &str = "'import socket; s = socket.create_connection((\"127.0.0.1\", 8000)); \
                      s.sendall(b\"print(1)\"); s.shutdown(1); s.recv(9)'";

pub const MILLISECONDS: f64 = 1e6;
pub const KIB: f64 = 1024.0;
pub const MIB: f64 = 1048576.0;

/// One benchmark.
pub struct Bench {
    /// The name of its table, and the beginning of the names of its figures.
    pub name: &'static str,
    /// Arguments of `chitin-bench`.
    pub arguments: &'static str,
    /// One unit of the table, in units of the report.
    pub unit: f64,
    pub more_is_better: bool,
    /// The rows that are compared with committed figures; the others only explain them.
    pub compared: &'static [&'static str],
}

pub const BENCHES: [Bench; 10] = [
    Bench {
        name: "boot",
        arguments: "boot --runs 9",
        unit: MILLISECONDS,
        more_is_better: false,
        compared: &["entered", "kernel", "agent", "exec"],
    },
    Bench {
        name: "restore",
        arguments: "restore --runs 15",
        unit: MILLISECONDS,
        more_is_better: false,
        compared: &["entered", "agent", "exec"],
    },
    Bench {
        name: "pool",
        arguments: "restore --pool --runs 101",
        unit: MILLISECONDS,
        more_is_better: false,
        compared: &["exec"],
    },
    Bench {
        name: "exec",
        arguments: "exec --runs 101",
        unit: MILLISECONDS,
        more_is_better: false,
        compared: &["output", "exit"],
    },
    Bench {
        name: "python",
        arguments: "restore --runs 7 --warm-up {warm-up} -- python3 -c {print}",
        unit: MILLISECONDS,
        more_is_better: false,
        compared: &["exec"],
    },
    Bench {
        name: "running python",
        arguments: "restore --runs 9 --warm-up {serve} --ask {question} -- python3 -c {asking}",
        unit: MILLISECONDS,
        more_is_better: false,
        compared: &["exec"],
    },
    Bench {
        name: "running python, pool",
        arguments: "restore --pool --runs 31 --warm-up {serve} --ask {question} \
                    -- python3 -c {asking}",
        unit: MILLISECONDS,
        more_is_better: false,
        compared: &["exec"],
    },
    Bench {
        name: "throughput",
        arguments: "throughput --size 32 --runs 3",
        unit: MIB,
        more_is_better: true,
        compared: &["in", "out"],
    },
    Bench {
        name: "egress",
        arguments: "egress --runs 15 --size 8 --large 2",
        unit: MILLISECONDS,
        more_is_better: false,
        // Connections are left out: they are so short that one clock interrupt changes them.
        compared: &["requests egress", "requests proxy", "answers egress", "answers proxy"],
    },
    Bench {
        name: "memory",
        arguments: "memory",
        unit: KIB,
        more_is_better: false,
        compared: &["booted guest", "booted monitor", "copied guest", "copied monitor"],
    },
];

/// Benchmarks that measure a peer too: a name, and arguments of `chitin-bench`. They are not
/// compared with committed figures, because not everyone has the peer.
pub const PEER_BENCHES: [(&str, &str); 6] = [
    ("peer-enter", "enter --runs 9"),
    ("peer-boot", "boot --runs 3"),
    ("peer-restore", "restore --runs 9"),
    ("peer-exec", "exec --runs 51"),
    ("peer-throughput", "throughput --size 16 --runs 3"),
    ("peer-memory", "memory --sandboxes 2"),
];

/// Benchmarks of the root image over either device, in the peer.
pub const ROOT_BENCHES: [(&str, &str); 4] = [
    ("root-blk", "memory --sandboxes 1 --peer-root blk -- python3 -c {python}"),
    ("root-pmem", "memory --sandboxes 1 --peer-root pmem -- python3 -c {python}"),
    ("root-blk-boot", "boot --runs 3 --peer-root blk -- python3 -c {python}"),
    ("root-pmem-boot", "boot --runs 3 --peer-root pmem -- python3 -c {python}"),
];

/// A row of a table about a peer.
pub struct PeerRow {
    pub title: &'static str,
    /// The name of the benchmark; of [`ROOT_ROWS`], what follows the name of the device.
    pub bench: &'static str,
    /// The row of its report.
    pub row: &'static str,
    /// One unit of the table, in units of the report.
    pub unit: f64,
    /// Decimals.
    pub digits: usize,
}

/// Rows of the comparison with a peer.
pub const PEER_ROWS: [PeerRow; 13] = [
    PeerRow {
        title: "process start → the guest's first instruction",
        bench: "peer-enter",
        row: "entered",
        unit: MILLISECONDS,
        digits: 2,
    },
    PeerRow {
        title: "cold boot → first byte of agent or init",
        bench: "peer-boot",
        row: "agent",
        unit: MILLISECONDS,
        digits: 2,
    },
    PeerRow {
        title: "cold boot → first byte of a command",
        bench: "peer-boot",
        row: "exec",
        unit: MILLISECONDS,
        digits: 2,
    },
    PeerRow {
        title: "copy → first byte of agent or init",
        bench: "peer-restore",
        row: "agent",
        unit: MILLISECONDS,
        digits: 2,
    },
    PeerRow {
        title: "copy → first byte of a command",
        bench: "peer-restore",
        row: "exec",
        unit: MILLISECONDS,
        digits: 2,
    },
    PeerRow {
        title: "a command in a running sandbox, first byte",
        bench: "peer-exec",
        row: "output",
        unit: MILLISECONDS,
        digits: 2,
    },
    PeerRow {
        title: "a command in a running sandbox, its end",
        bench: "peer-exec",
        row: "exit",
        unit: MILLISECONDS,
        digits: 2,
    },
    PeerRow {
        title: "MiB/s into the guest",
        bench: "peer-throughput",
        row: "in",
        unit: MIB,
        digits: 1,
    },
    PeerRow {
        title: "MiB/s out of it",
        bench: "peer-throughput",
        row: "out",
        unit: MIB,
        digits: 1,
    },
    PeerRow {
        title: "booted: KiB of private guest memory",
        bench: "peer-memory",
        row: "booted guest",
        unit: KIB,
        digits: 0,
    },
    PeerRow {
        title: "booted: KiB of the monitor",
        bench: "peer-memory",
        row: "booted monitor",
        unit: KIB,
        digits: 0,
    },
    PeerRow {
        title: "copied: KiB of private guest memory",
        bench: "peer-memory",
        row: "copied guest",
        unit: KIB,
        digits: 0,
    },
    PeerRow {
        title: "copied: KiB of the monitor",
        bench: "peer-memory",
        row: "copied monitor",
        unit: KIB,
        digits: 0,
    },
];

/// Rows of the comparison of both root devices.
pub const ROOT_ROWS: [PeerRow; 6] = [
    PeerRow {
        title: "cold boot → first byte of init",
        bench: "-boot",
        row: "agent",
        unit: MILLISECONDS,
        digits: 2,
    },
    PeerRow {
        title: "cold boot → first byte of Python's output",
        bench: "-boot",
        row: "exec",
        unit: MILLISECONDS,
        digits: 2,
    },
    PeerRow {
        title: "booted, after Python: KiB of private guest memory",
        bench: "",
        row: "booted guest",
        unit: KIB,
        digits: 0,
    },
    PeerRow {
        title: "booted, after Python: KiB shared by all guests",
        bench: "",
        row: "booted shared",
        unit: KIB,
        digits: 0,
    },
    PeerRow {
        title: "copied, after Python again: KiB of private guest memory",
        bench: "",
        row: "copied guest",
        unit: KIB,
        digits: 0,
    },
    PeerRow {
        title: "copied, after Python again: KiB shared by all guests",
        bench: "",
        row: "copied shared",
        unit: KIB,
        digits: 0,
    },
];

/// Returns the report file of a benchmark.
pub fn report_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(name).with_extension("json")
}

/// Returns a benchmark on a separate emulated host, which writes a report file.
pub fn new_part(name: &str, arguments: &str, peer: Option<&Path>, dir: &Path) -> Part {
    let tool = workspace::target_dir().join("release/chitin-bench");
    let serve = workspace::root_dir().join("examples/warm-python.sh");
    let arguments = arguments
        .replace("{warm-up}", "'python3 -c \"import json, ssl\"'")
        .replace("{print}", "'print(1)'")
        .replace("{python}", "'import json, ssl; print(1)'")
        .replace("{serve}", &format!("\"$(cat '{}')\"", serve.display()))
        .replace("{question}", "'8000=print(1)'")
        .replace("{asking}", ASKING);
    // The command in the sandbox follows `--`, and the report option must precede it.
    let (arguments, command) = match arguments.split_once(" -- ") {
        Some((arguments, command)) => (arguments, format!("-- {command}")),
        None => (arguments.as_str(), String::new()),
    };
    let peer_option =
        peer.map(|peer| format!("--peer firecracker='{}'", peer.display())).unwrap_or_default();
    // In memory: reads of the template's files are not part of the measurement.
    let script = format!(
        "export CHITIN_TEMPLATES=/dev/shm/templates TMPDIR=/dev/shm; \
         exec '{}' {arguments} {peer_option} --json '{}' {command}",
        tool.display(),
        report_path(dir, name).display(),
    );
    let mut options = vec!["--icount".to_owned()];
    // A program that is the command itself is copied into memory; inside a script it must be named.
    for program in [Some(tool.as_path()), peer].into_iter().flatten() {
        options.extend(["--preload".to_owned(), program.display().to_string()]);
    }
    Part::nested(name, options, ["/bin/sh", "-c", &script].map(str::to_owned).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_about_a_peer_has_a_benchmark() {
        for PeerRow { bench: name, .. } in PEER_ROWS {
            assert!(PEER_BENCHES.iter().any(|(bench, _)| *bench == name), "{name}");
        }
        for PeerRow { bench: suffix, .. } in ROOT_ROWS {
            for device in ["blk", "pmem"] {
                let name = format!("root-{device}{suffix}");
                assert!(ROOT_BENCHES.iter().any(|(bench, _)| *bench == name), "{name}");
            }
        }
    }
}

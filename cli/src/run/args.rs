//! The arguments of `chitin run`.

use std::ffi::OsString;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use chitin::{HeaderField, SecretSpec, TierKind};

use super::values::{CopySpec, PortPair, WORKDIR, parse_bytes, parse_header};
use crate::machine_args::MachineArgs;
use crate::policy_args::PolicyArgs;

/// Headings of options in the help.
const CREDENTIALS: &str = "Credentials";
const NETWORK: &str = "Network";
const FILES: &str = "Files";

/// Arguments of `chitin run`.
#[derive(clap::Args)]
#[command(after_help = "\
Exit code: that of the command; 2 if an option is invalid; 124 if the time limit was reached; 125 \
if Chitin failed; 126 if the command is not executable; 127 if it was not found; 128+n if signal n \
ended it. If a limit of \
the sandbox is the cause, a line on standard error names it, and `cause` in the report does.

Examples:
  chitin run -- python3 -c 'print(6 * 7)'
  head -c 1G /dev/urandom | chitin run -- sha256sum
  chitin run --copy-in agent.py:/work/ --copy-out /work/out:out -- python3 agent.py
  chitin run --fallback nanoclaw,nemoclaw -- python3 -c 'print(6 * 7)'
  chitin run --allow api.example.com:443 --audit net.jsonl -- python3 agent.py
  chitin run -p 8080:8000 -- python3 -m http.server

Examples with credentials:
  chitin run --secret API_TOKEN=env:API_TOKEN -- sh -c 'wc -c < $API_TOKEN_FILE'
  chitin run --secret 'DB=vault://kv/app/db#password' -- python3 job.py
  chitin run --secret API_TOKEN=env:API_TOKEN@api.example.com -- python3 agent.py
  chitin run --secret AWS=vault://aws/creds/deploy --secret-endpoint AWS -- python3 deploy.py")]
pub struct Args {
    /// Isolation: ironclaw (a microVM), nanoclaw (gVisor, or a container where it does not run), or
    /// nemoclaw (Docker) [default: that of the policy, or ironclaw]
    #[arg(long, value_name = "T")]
    pub tier: Option<TierKind>,

    /// Tiers to try, in order, if the first is unavailable
    #[arg(long, value_name = "T,…", value_delimiter = ',')]
    pub fallback: Vec<TierKind>,

    /// Start a copy of this template instead of booting
    #[arg(long, value_name = "NAME", conflicts_with_all = ["cpus", "memory", "console"])]
    pub template: Option<String>,

    #[command(flatten)]
    pub policy: PolicyArgs,

    #[command(flatten)]
    pub machine: MachineArgs,

    /// End the sandbox after this time, boot included: 90s, 5m, 1h. With --copy-out, the command is
    /// killed then, and the copies get up to 10s more
    #[arg(long, value_name = "DUR", value_parser = humantime::parse_duration)]
    pub timeout: Option<Duration>,

    /// Set an environment variable; K alone passes on the value of this host
    #[arg(long, value_name = "K=V")]
    pub env: Vec<OsString>,

    /// Directory that the command starts in; a relative path is below /work, as everywhere else
    #[arg(long, value_name = "DIR", default_value = WORKDIR)]
    pub workdir: OsString,

    /// Give the command an empty standard input, as `ssh -n` does
    ///
    /// Otherwise standard input is read ahead of the command, also if it never reads: in a loop
    /// such as `while read line; do chitin run … ; done`, the run takes the lines of the loop.
    #[arg(short = 'n', long)]
    pub no_stdin: bool,

    /// Deliver a credential from env:VAR, file:PATH, exec:CMD or vault://MOUNT/PATH#FIELD: the
    /// command reads it from the file that $NAME_FILE names. With @HOST it never enters the
    /// sandbox: $NAME holds a placeholder, which is replaced in HTTPS requests to these hosts, in
    /// headers that carry keys (Authorization, X-API-Key, …)
    #[arg(long, help_heading = CREDENTIALS, value_name = "NAME=SRC[@HOST,…]")]
    pub secret: Vec<SecretSpec>,

    /// Deliver the secret NAME in the environment variable NAME instead, which every process of the
    /// command can read
    #[arg(long, help_heading = CREDENTIALS, value_name = "NAME")]
    pub secret_env: Vec<String>,

    /// Serve the secret NAME to AWS SDKs in the sandbox: a pair of keys, as JSON or from a Vault
    /// secret, which is read again before it expires
    #[arg(long, help_heading = CREDENTIALS, value_name = "NAME")]
    pub secret_endpoint: Option<String>,

    /// Replace the placeholder of NAME in this header too. Choose one that the host does not store
    /// or show to others
    #[arg(long, help_heading = CREDENTIALS, value_name = "NAME=HEADER", value_parser = parse_header)]
    pub secret_header: Vec<(String, HeaderField)>,

    /// Replace the placeholder of NAME in the query of URLs too; servers write URLs to their logs
    #[arg(long, help_heading = CREDENTIALS, value_name = "NAME")]
    pub secret_query: Vec<String>,

    /// Replace the placeholder of NAME in request bodies of up to 1 MiB too
    #[arg(long, help_heading = CREDENTIALS, value_name = "NAME")]
    pub secret_body: Vec<String>,

    /// Allow TCP connections to HOST:PORT, or to any host below a domain: '*.example.com:443'
    #[arg(long, help_heading = NETWORK, value_name = "HOST:PORT")]
    pub allow: Vec<String>,

    /// Accept loopback and private addresses of allowed hosts. For test servers: the owner of a
    /// name chooses its address
    #[arg(long, help_heading = NETWORK)]
    pub allow_private: bool,

    /// Close connections after this many bytes, both directions and all connections together: 500k,
    /// 10M, 1G
    #[arg(long, help_heading = NETWORK, value_name = "BYTES", value_parser = parse_bytes)]
    pub egress_bytes: Option<NonZeroU64>,

    /// Maximum bytes per second, both directions and all connections together
    #[arg(long, help_heading = NETWORK, value_name = "BYTES", value_parser = parse_bytes)]
    pub egress_rate: Option<NonZeroU64>,

    /// Maximum concurrent connections (1–128) [default: 128]
    #[arg(long, help_heading = NETWORK, value_name = "COUNT",
        value_parser = clap::value_parser!(u16).range(1..=128))]
    pub egress_connections: Option<u16>,

    /// Append one line of JSON to FILE for each connection attempt and each use of a credential
    #[arg(long, help_heading = NETWORK, value_name = "FILE")]
    pub audit: Option<PathBuf>,

    /// Forward port HOST of 127.0.0.1 on this host to port GUEST in the sandbox
    #[arg(short = 'p', long = "publish", help_heading = NETWORK, value_name = "HOST:GUEST")]
    pub publish: Vec<PortPair>,

    /// Copy a file or directory in before the start. DST is its new path; DST/ is the directory to
    /// copy it into; SRC/. is the contents of a directory. A relative DST is below /work
    #[arg(long, help_heading = FILES, value_name = "SRC:DST",
        value_parser = CopySpec::parse_copy_in)]
    pub copy_in: Vec<CopySpec>,

    /// Copy a file or directory out after the end, also after a failure or the time limit. DST is
    /// its new path; DST/ is the directory to copy it into; SRC/. is the contents of a directory. A
    /// relative SRC is below /work. FIFOs, sockets and devices in it are left out and named
    #[arg(long, help_heading = FILES, value_name = "SRC:DST",
        value_parser = CopySpec::parse_copy_out)]
    pub copy_out: Vec<CopySpec>,

    /// Show the serial console of the guest on standard error
    #[arg(long)]
    pub console: bool,

    /// Write a JSON record of the run
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,

    /// The command to run, and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

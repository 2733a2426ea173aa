use super::{Ask, Job, Source, measure_starts, report_starts};
use crate::args::{Common, Workload};
use crate::error::BenchError;
use crate::template::TemporaryTemplate;

/// Monitors that the pool keeps waiting: two, so that one is always ready.
const POOL_SIZE: usize = 2;

/// Arguments of `chitin-bench restore`.
#[derive(clap::Args)]
#[command(after_help = "\
Without --template, a template is built first and removed afterwards. Times are as for \
`chitin-bench boot`; with --pool they count from the request to the pool. One copy comes first \
and is not counted.

Examples:
  chitin-bench restore --runs 20
  chitin-bench restore --pool
  chitin-bench restore --warm-up 'python3 -c \"import json, ssl\"' -- python3 -c 'print(1)'
  chitin-bench restore --template py
  chitin-bench restore --pool --warm-up \"$(cat examples/warm-python.sh)\" --ask '8000=print(1)'")]
pub struct RestoreArgs {
    /// Number of copies, one after the other
    #[arg(long, value_name = "N", default_value_t = 10,
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,

    /// Use this existing template
    #[arg(long, value_name = "NAME", conflicts_with = "memory")]
    template: Option<String>,

    /// Shell command that warms up the template before it is saved
    #[arg(long, value_name = "CMD", conflicts_with = "template")]
    warm_up: Option<String>,

    /// Send TEXT to a server on PORT that the warm-up has left running, and read its answer,
    /// instead of running the command; the command then runs only while the template is built
    #[arg(long, value_name = "PORT=TEXT", conflicts_with = "peer")]
    ask: Option<Ask>,

    /// Take the copies from a pool of waiting monitors
    #[arg(long)]
    pool: bool,

    #[command(flatten)]
    common: Common,

    #[command(flatten)]
    workload: Workload,
}

/// Measures copies of a template, in turns with the peer.
pub async fn measure_restore(args: RestoreArgs) -> Result<(), BenchError> {
    let RestoreArgs { runs, template, warm_up, ask, pool, common, workload } = args;
    let builder = common.guest.builder();
    let peer = common.find_peer(1)?;
    let snapshot = match &peer {
        Some(peer) => Some(peer.save(&workload.to_peer_command()).await?),
        None => None,
    };
    let temporary = match template {
        Some(_) => None,
        None => {
            Some(TemporaryTemplate::build(builder.clone(), warm_up, workload.argv.clone()).await?)
        }
    };
    let name = template.or(temporary.as_ref().map(|built| built.name.clone())).unwrap_or_default();
    let builder = builder.template(&name);
    let source = match pool {
        true => Source::Pool(builder.pool(POOL_SIZE).await?),
        false => Source::Builder(Box::new(builder)),
    };
    let peer_source = peer.as_ref().map(|peer| (peer, snapshot.as_ref()));
    let job = Job { workload: &workload, ask: ask.as_ref() };
    let turns = measure_starts(runs, &source, &job, peer_source).await?;
    let origin = if pool { ", from a pool" } else { "" };
    report_starts(
        &format!("{runs} copies of a template{origin}"),
        turns,
        peer.as_ref(),
        &common.output,
    )
}

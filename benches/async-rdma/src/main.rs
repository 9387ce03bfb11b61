//! RDMA WRITE by async-rdma 0.5.0 between two ends, at its best setting: memory registered once (strategy Raw), path MTU 4096,
//! as many writes at a time as `--depth` says, each into a region of its own (it locks a region while it is written).
//!
//! `async-rdma-bench destination|source --address IP:PORT --bytes N --message N --depth N --device rxe0 --gid-index N`
//!
//! Each end prints one line of JSON: bytes, seconds, `cpu_seconds`. It uses no code of Limosa and Limosa none of it; see README.md.
#![forbid(unsafe_code)]

use async_rdma::{LocalMr, MRManageStrategy, MTU, Rdma, RdmaBuilder, RemoteMr};
use std::alloc::Layout;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the destination keeps its regions for the source.
const REGIONS_LIVE: Duration = Duration::from_secs(600);

struct Options {
    source: bool,
    address: String,
    bytes: u64,
    message: usize,
    depth: usize,
    device: Option<String>,
    gid_index: usize,
}

fn wrong(words: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, words.into())
}

fn options() -> io::Result<Options> {
    let mut words = std::env::args().skip(1);
    let source = match words.next().as_deref() {
        Some("source") => true,
        Some("destination") => false,
        _ => return Err(wrong("first say which end: source or destination")),
    };
    let address = "127.0.0.1:13561".to_owned();
    let mut options = Options { source, address, bytes: 64 << 20, message: 1 << 20, depth: 16, device: None, gid_index: 1 };
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| wrong(format!("{word} needs a value")))?;
        let number = || value.parse::<usize>().map_err(|error| wrong(format!("{word} {value}: {error}")));
        match word.as_str() {
            "--address" => options.address.clone_from(&value),
            "--bytes" => options.bytes = number()? as u64,
            "--message" => options.message = number()?.max(1),
            "--depth" => options.depth = number()?.max(1),
            "--device" => options.device = Some(value.clone()),
            "--gid-index" => options.gid_index = number()?,
            _ => return Err(wrong(format!("unknown option {word}"))),
        }
    }
    Ok(options)
}

fn builder(options: &Options) -> RdmaBuilder {
    // A full queue makes it sleep for a second, so the queues hold more than is ever under way.
    let depth = u32::try_from(options.depth).unwrap_or(u32::MAX).saturating_mul(2).max(64);
    let builder = RdmaBuilder::default()
        .set_mr_strategy(MRManageStrategy::Raw)
        .set_mtu(MTU::MTU4096)
        .set_gid_index(options.gid_index)
        .set_qp_max_send_wr(depth)
        .set_cq_size(depth.saturating_mul(2))
        .set_max_cqe(i32::try_from(depth).unwrap_or(i32::MAX));
    match &options.device {
        Some(device) => builder.set_dev(device),
        None => builder,
    }
}

/// CPU time of this process so far, in the kernel's ticks of 10 ms.
fn cpu_seconds() -> io::Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or_default();
    Ok((ticks(11) + ticks(12)) / 100.0)
}

/// `count` writes one after the other, from one region into one.
async fn write(rdma: Arc<Rdma>, local: LocalMr, mut remote: RemoteMr, count: u64) -> io::Result<RemoteMr> {
    for _ in 0..count {
        rdma.write(&local, &mut remote).await?;
    }
    Ok(remote)
}

async fn send(options: &Options) -> io::Result<()> {
    let rdma = Arc::new(builder(options).connect(&options.address).await?);
    let layout = Layout::from_size_align(options.message, 4096).map_err(|error| wrong(error.to_string()))?;
    let mut regions = Vec::new();
    for _ in 0..options.depth {
        regions.push((rdma.alloc_local_mr(layout)?, rdma.request_remote_mr_with_timeout(layout, REGIONS_LIVE).await?));
    }
    let count = (options.bytes / (options.message * options.depth) as u64).max(1);
    let (cpu, start) = (cpu_seconds()?, Instant::now());
    let writers: Vec<_> =
        regions.into_iter().map(|(local, remote)| tokio::spawn(write(rdma.clone(), local, remote, count))).collect();
    let mut written = Vec::new();
    for writer in writers {
        written.push(writer.await.map_err(io::Error::other)??);
    }
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds()? - cpu);
    let bytes = count * (options.message * options.depth) as u64;
    println!("{{\"bytes\": {bytes}, \"seconds\": {seconds}, \"cpu_seconds\": {cpu}}}");
    // Giving the last region back tells the destination that all is written.
    match written.pop() {
        Some(last) => rdma.send_remote_mr(last).await,
        None => Ok(()),
    }
}

async fn receive(options: &Options) -> io::Result<()> {
    let (cpu, start) = (cpu_seconds()?, Instant::now());
    let rdma = builder(options).listen(&options.address).await?;
    let _last = rdma.receive_local_mr().await?;
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds()? - cpu);
    println!("{{\"bytes\": null, \"seconds\": {seconds}, \"cpu_seconds\": {cpu}}}");
    Ok(())
}

#[tokio::main]
async fn main() -> io::Result<()> {
    let options = options()?;
    if options.source { send(&options).await } else { receive(&options).await }
}

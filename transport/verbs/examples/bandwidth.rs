//! Bulk RDMA writes from one host to another, to be compared with `ib_write_bw` on the same path. Also the smallest whole use of
//! this crate. Not a benchmark of Limosa: no pages, no rounds, no checks.
//!
//! `bandwidth destination ADDRESS:PORT`, then on the other host `bandwidth source ADDRESS:PORT [MIB] [MESSAGE_BYTES] [DEPTH]`.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)]

use limosa_verbs::{
    Access, Context, Handshake, Listener, Mapping, MemoryRegion, PairSettings, Payload, Piece, ProtectionDomain, RemoteKey,
    Resolved, WaitError, Write,
};
use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);
const MEMORY: u64 = 16 << 20;
/// Bytes posted with one doorbell.
const LIST: u64 = 8 << 20;

type Outcome<T> = Result<T, Box<dyn Error>>;

#[tokio::main]
async fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |place: usize, otherwise: u64| arguments.get(place).map_or(Ok(otherwise), |text| text.parse());
    match arguments.first().map(String::as_str).zip(arguments.get(1)) {
        Some(("destination", address)) => destination(address.parse()?).await,
        Some(("source", address)) => source(address.parse()?, number(2, 64)? << 20, number(3, 1 << 20)?, number(4, 64)?).await,
        _ => Err("bandwidth destination ADDRESS:PORT | bandwidth source ADDRESS:PORT [MIB] [MESSAGE_BYTES] [DEPTH]".into()),
    }
}

fn memory(device: &str, access: Access) -> Outcome<Arc<MemoryRegion>> {
    let domain = ProtectionDomain::new(&Context::open(device)?)?;
    Ok(MemoryRegion::register(&domain, &Mapping::anonymous(MEMORY)?, 0..MEMORY, access)?)
}

async fn destination(address: SocketAddr) -> Outcome<()> {
    let mut listener = Listener::bind(address, 1)?;
    println!("listening on {}", listener.address());
    let request = listener.next().await?;
    let region = memory(request.device(), Access { remote_write: true, ..Access::default() })?;
    let settings = PairSettings { remote_write: true, ..PairSettings::default() };
    let key = region.remote();
    let private_data = [key.address.to_le_bytes().as_slice(), key.rkey.to_le_bytes().as_slice()].concat();
    let handshake = Handshake { private_data, ..Handshake::default() };
    let mut pair = request.prepare(region.domain(), &settings)?.establish(&handshake, LONG).await?;
    loop {
        match pair.completions(LONG).await {
            Err(WaitError::Disconnected) => return Ok(()),
            Err(WaitError::TimedOut(_)) | Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

async fn source(address: SocketAddr, total: u64, message: u64, depth: u64) -> Outcome<()> {
    let resolved = Resolved::resolve(address, None, LONG).await?;
    let region = memory(resolved.device(), Access::default())?;
    let settings = PairSettings { send_depth: u32::try_from(depth)?, ..PairSettings::default() };
    let mut pair = resolved.prepare(region.domain(), &settings)?.establish(&Handshake::default(), LONG).await?;
    let (place, key) = pair.peer_data().split_first_chunk().ok_or("no key")?;
    let to = RemoteKey { address: u64::from_le_bytes(*place), rkey: u32::from_le_bytes(key.try_into()?) };
    let bytes = u32::try_from(message)?;
    let (mut sent, mut done) = (0, 0);
    let (begun, cpu) = (Instant::now(), cpu_seconds());
    while done < total {
        let fits = (pair.room() as u64).min((LIST / message).max(1)).min((total - sent).div_ceil(message));
        // Full lists only, but for the last one.
        if fits > 0 && (fits * message >= LIST.min(depth / 2 * message) || sent + fits * message >= total) {
            let offset = |at: u64| (sent + at * message) % (MEMORY - MEMORY % message);
            let payload = |at| Payload::Region(Piece { region: &region, offset: offset(at), bytes });
            let write =
                |at| Write { payload: payload(at), to: to.at(offset(at)), immediate: None, signalled: at + 1 == fits, id: fits };
            pair.post_writes(&(0..fits).map(write).collect::<Vec<_>>())?;
            sent += fits * message;
            continue;
        }
        for completion in pair.wait(LONG)? {
            completion.ok()?;
            done += completion.id * message;
        }
    }
    let (seconds, posted) = (begun.elapsed().as_secs_f64(), pair.posted());
    println!(
        "{done} bytes in {seconds:.3} s: {:.2} MB/s; {} writes of {message}, {} doorbells ({:.1} MiB each), path MTU {}, {:.2} s CPU",
        done as f64 / seconds / 1e6,
        posted.writes,
        posted.doorbells,
        done as f64 / posted.doorbells as f64 / f64::from(1 << 20),
        pair.path_mtu(),
        cpu_seconds() - cpu,
    );
    Ok(())
}

fn cpu_seconds() -> f64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID)
        .map_or(0.0, |spent| Duration::from(spent).as_secs_f64())
}

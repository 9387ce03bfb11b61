//! How fast pages move: gather and scatter through loopback TCP, the zero scan, zeroing, population.
//! A measurement to be run by hand with `--release` on an idle machine; `benches/` has the published figures.
//!
//! ```text
//! cargo run --release -p limosa-plug --example page_speed
//! ```
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout)]

use limosa_plug::{GuestMemory, memfd};
use limosa_proto::memory::{Gpa, MemoryMap, PageRange, Region};
use nix::sys::socket::{setsockopt, sockopt::TcpCongestion};
use std::error::Error;
use std::hint::black_box;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Instant;

const PAGES: u64 = 128 << 10;
/// 1 MiB.
const CHUNK: u64 = 256;
const TIMES: u32 = 5;
/// Passes over all pages on one connection.
const PASSES: u64 = 6;

fn guest() -> Result<GuestMemory, Box<dyn Error>> {
    let map = MemoryMap::new(vec![Region { gpa: Gpa(0), bytes: PAGES * 4096, page_bytes: 4096 }])?;
    Ok(GuestMemory::map(map, vec![(memfd::create("page-speed", PAGES * 4096)?, 0)])?)
}

fn whole() -> PageRange {
    PageRange { first: 0, count: PAGES }
}

fn chunks() -> impl Iterator<Item = PageRange> {
    (0..PAGES).step_by(CHUNK as usize).map(|first| PageRange { first, count: CHUNK })
}

/// All chunks, several times.
fn passes() -> impl Iterator<Item = PageRange> {
    (0..PASSES).flat_map(|_| chunks())
}

/// Runs it several times and prints the fastest and the median.
fn measure(name: &str, passes: u64, mut run: impl FnMut() -> Result<(), Box<dyn Error>>) -> Result<(), Box<dyn Error>> {
    let mut rates = Vec::new();
    for _ in 0..TIMES {
        let begun = Instant::now();
        run()?;
        rates.push((passes * PAGES * 4096) as f64 / begun.elapsed().as_secs_f64() / 1e9);
    }
    rates.sort_by(f64::total_cmp);
    let median = rates.get(rates.len() / 2).copied().unwrap_or(0.0);
    println!("{name:48} median {median:6.2} GB/s, best {:6.2} GB/s", rates.last().copied().unwrap_or(0.0));
    Ok(())
}

fn pair() -> Result<(TcpStream, TcpStream), Box<dyn Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let source = TcpStream::connect(listener.local_addr()?)?;
    let destination = listener.accept()?.0;
    // The same on both sides as in the comparison: `iperf3 -C cubic -l 1M`.
    setsockopt(&source, TcpCongestion, &"cubic".into())?;
    setsockopt(&destination, TcpCongestion, &"cubic".into())?;
    Ok((source, destination))
}

/// Moves all pages; `runs` makes the runs of one chunk.
fn transfer(
    from: &GuestMemory,
    to: &GuestMemory,
    runs: impl Fn(PageRange) -> Vec<PageRange> + Sync,
) -> Result<(), Box<dyn Error>> {
    let (source, destination) = pair()?;
    let (runs, head) = (&runs, [7; 48]);
    std::thread::scope(|scope| {
        let sender = scope.spawn(move || -> std::io::Result<()> {
            for chunk in passes() {
                let runs = runs(chunk);
                let (mut done, all) = (0, 48 + runs.iter().map(|run| run.bytes()).sum::<u64>());
                while done < all {
                    done += from.gather(source.as_fd(), &head, &runs, done, false)? as u64;
                }
            }
            Ok(())
        });
        let mut header = [0; 48];
        std::io::Read::read_exact(&mut &destination, &mut header)?;
        for (number, chunk) in passes().enumerate() {
            let runs = runs(chunk);
            let last = number as u64 + 1 == PASSES * (PAGES / CHUNK);
            let tail = if last { &mut [][..] } else { &mut header[..] };
            let (mut done, all) = (0, runs.iter().map(|run| run.bytes()).sum::<u64>() + tail.len() as u64);
            while done < all {
                done += match to.scatter(destination.as_fd(), &runs, done, tail)? {
                    0 => return Err("the stream ended".into()),
                    moved => moved as u64,
                };
            }
        }
        sender.join().map_err(|_| "the sender panicked")??;
        Ok(())
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let (from, to) = (guest()?, guest()?);
    let begun = Instant::now();
    chunks().try_for_each(|chunk| to.populate(chunk))?;
    println!("{:48} {:.2} us a page", "populate", begun.elapsed().as_secs_f64() * 1e6 / PAGES as f64);
    chunks().try_for_each(|chunk| from.populate(chunk))?;
    let filler: Vec<u8> = (0..1_u32 << 20).map(|byte| (byte.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    let mut buffer = filler.clone();
    chunks().for_each(|chunk| from.write(chunk, 0, &filler));

    measure("copy out of the mapping (memcpy, 1 MiB)", 1, || {
        chunks().for_each(|chunk| from.read(chunk, 0, black_box(&mut buffer)));
        Ok(())
    })?;
    measure("copy into the mapping (memcpy, 1 MiB)", 1, || {
        chunks().for_each(|chunk| to.write(chunk, 0, black_box(&filler)));
        Ok(())
    })?;
    measure("gather and scatter, one run of 1 MiB", PASSES, || transfer(&from, &to, |chunk| vec![chunk]))?;
    measure("gather and scatter, runs of 1 page, reversed", PASSES, || {
        transfer(&from, &to, |chunk| (chunk.first..chunk.end()).rev().map(|first| PageRange { first, count: 1 }).collect())
    })?;
    measure("zero scan, no page is zero", 1, || {
        from.scan(whole(), &mut |run, zero| {
            black_box((run, zero));
        });
        Ok(())
    })?;
    measure("zero (memset)", 1, || {
        to.zero(whole());
        Ok(())
    })?;
    measure("zero scan, every page is zero", 1, || {
        let mut zeros = 0;
        to.scan(whole(), &mut |run, zero| zeros += if zero { run.count } else { 0 });
        if zeros == PAGES { Ok(()) } else { Err("the scan is wrong".into()) }
    })?;
    measure("zero scan, only the last byte is not zero", 1, || {
        to.write(PageRange { first: PAGES - 1, count: 1 }, 4095, &[1]);
        to.scan(whole(), &mut |run, zero| {
            black_box((run, zero));
        });
        Ok(())
    })?;
    Ok(())
}

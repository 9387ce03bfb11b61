//! The first words of a real source, for those who begin handshakes and end none. Used by the flood's test and its benchmark.
#![allow(unreachable_pub, missing_docs)]

use limosa_link::{HostKey, TcpLink, TrustedHosts, ask_cpu};
use rig::{Context, Result, ensure};
use std::io::Read;
use std::net::TcpListener;
use std::time::Duration;

/// The first words of a real source.
pub fn hello() -> Result<Vec<u8>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let (key, to) = (HostKey::generate()?, listener.local_addr()?.to_string());
    let asking = std::thread::spawn(move || {
        let link = TcpLink::new(to, key.id(), key, TrustedHosts::default(), Duration::from_secs(5));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        // It is not answered.
        runtime.map(|runtime| runtime.block_on(ask_cpu(&link)).is_err())
    });
    let (mut stream, _) = listener.accept()?;
    let mut bytes = vec![0; 4096];
    let count = stream.read(&mut bytes)?;
    bytes.truncate(count);
    drop(stream);
    asking.join().ok().context("asking")??;
    ensure!(bytes.first() == Some(&22), "no handshake: {bytes:02x?}");
    Ok(bytes)
}

//! The hosts that this one trusts, by name, identity and address: a file in the state directory, and the set that
//! links check keys against. Our own key is made here too. Whether an address may connect at all is the allow-list's.

use crate::api::HostInfo;
use crate::checked::{ConfigError, Problems, Section, read_text};
use crate::config::{DEFAULT_PORT, NAME_WANTS, plain_name};
use crate::journal::sync_directory;
use limosa_link::{HostKey, HostKeyError, TrustedHosts};
use limosa_proto::identity::HostId;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most hosts that are trusted.
const HOSTS_MAX: usize = 4096;

/// A host that is trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// What it is called here.
    pub name: String,
    /// Its key.
    pub id: HostId,
    /// Where its agent listens: `address:port` or `name:port`.
    pub address: String,
}

/// The trusted hosts.
#[derive(Debug)]
pub struct Hosts {
    file: PathBuf,
    table: Mutex<BTreeMap<String, Host>>,
    trusted: TrustedHosts,
}

/// Why a host is not taken in, or out.
#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    /// A name, identity or address that is none, or one that is taken.
    #[error("{0}")]
    Bad(String),
    /// The file cannot be written.
    #[error("{file}: the trusted hosts cannot be kept: {cause}", file = file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
}

/// This host's key from `directory`; made at the first start.
///
/// # Errors
/// The file cannot be read or written, or others may read it.
pub fn own_key(directory: &Path) -> Result<HostKey, HostKeyError> {
    HostKey::load_or_make(&directory.join("host.key"))
}

impl Hosts {
    /// Reads `hosts.toml` in `directory`; without the file nobody is trusted.
    ///
    /// # Errors
    /// Every problem of the file, with its line.
    pub fn open(directory: &Path) -> Result<Hosts, ConfigError> {
        let file = directory.join("hosts.toml");
        let table = if file.exists() { parse(&file, &read_text(&file)?)? } else { BTreeMap::new() };
        let trusted = TrustedHosts::new(table.values().map(|host| host.id));
        Ok(Hosts { file, table: Mutex::new(table), trusted })
    }

    /// The set that keys are checked against; it follows every change.
    #[must_use]
    pub fn trusted(&self) -> TrustedHosts {
        self.trusted.clone()
    }

    /// All hosts by name.
    #[must_use]
    pub fn all(&self) -> Vec<Host> {
        self.lock().values().cloned().collect()
    }

    /// The host called `name`.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<Host> {
        self.lock().get(name).cloned()
    }

    /// The host with this key.
    #[must_use]
    pub fn with_id(&self, id: HostId) -> Option<Host> {
        self.lock().values().find(|host| host.id == id).cloned()
    }

    /// Its name if it has one here, else its identity.
    #[must_use]
    pub fn shown(&self, id: HostId) -> String {
        self.with_id(id).map_or_else(|| id.to_string(), |host| host.name)
    }

    /// Trusts a host from now on, durably. The same name again changes its key and address.
    ///
    /// # Errors
    /// A name, identity or address that is none; another host with this key; a file that cannot be written.
    pub fn trust(&self, info: &HostInfo) -> Result<Host, HostsError> {
        let bad = |words: String| Err(HostsError::Bad(words));
        if !plain_name(&info.name) {
            return bad(format!("{:?} is no name for a host: {NAME_WANTS}", info.name));
        }
        let id: HostId = info.id.parse().map_err(|e| HostsError::Bad(format!("{e}")))?;
        let address = with_port(&info.address).ok_or_else(|| HostsError::Bad(bad_address(&info.address)))?;
        let mut table = self.lock();
        if let Some(other) = table.values().find(|host| host.id == id && host.name != info.name) {
            return bad(format!("that key is already trusted as \"{}\"; `limosa host remove {}` first", other.name, other.name));
        }
        if table.len() >= HOSTS_MAX {
            return bad(format!("{HOSTS_MAX} hosts are trusted already"));
        }
        let host = Host { name: info.name.clone(), id, address };
        let mut next = table.clone();
        next.insert(host.name.clone(), host.clone());
        self.keep(&mut table, next)?;
        Ok(host)
    }

    /// Trusts a host no more, durably.
    ///
    /// # Errors
    /// No such host, or a file that cannot be written.
    pub fn remove(&self, name: &str) -> Result<(), HostsError> {
        let mut table = self.lock();
        let mut next = table.clone();
        if next.remove(name).is_none() {
            return Err(HostsError::Bad(format!("no host is called \"{name}\" here; `limosa host list` shows them")));
        }
        self.keep(&mut table, next)
    }

    fn keep(&self, table: &mut BTreeMap<String, Host>, next: BTreeMap<String, Host>) -> Result<(), HostsError> {
        let beside = self.file.with_extension("new");
        let write = || {
            let mut file = File::create(&beside)?;
            file.write_all(text(&next).as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&beside, &self.file)?;
            sync_directory(self.file.parent().unwrap_or(Path::new("/")))
        };
        write().map_err(|cause| HostsError::Io { file: self.file.clone(), cause })?;
        self.trusted.replace(next.values().map(|host| host.id));
        *table = next;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Host>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn text(table: &BTreeMap<String, Host>) -> String {
    let mut text = String::from("# The hosts that this one trusts, kept by `limosa host trust` and `limosa host remove`.\n");
    for Host { name, id, address } in table.values() {
        text.push_str(&format!("\n[[host]]\nname = \"{name}\"\nid = \"{id}\"\naddress = \"{address}\"\n"));
    }
    text
}

fn parse(file: &Path, text: &str) -> Result<BTreeMap<String, Host>, ConfigError> {
    let problems = Problems::new(file, text);
    let root = problems.root();
    let table = root.as_ref().map(|table| {
        let mut root = Section::root(table, &problems);
        let mut hosts = BTreeMap::new();
        for mut section in root.sections("host") {
            let name = section.string("name").filter(|name| plain_name(name));
            let id = section.parsed::<HostId>("id", "what `limosa host id` prints on that host");
            let address = section.string("address").and_then(|address| with_port(&address));
            match (name, id, address) {
                (Some(name), Some(id), Some(address)) => {
                    hosts.insert(name.clone(), Host { name, id, address });
                }
                _ => section.problem("name", "is not a whole host", "name, id and address are needed"),
            }
            section.close();
        }
        root.close();
        hosts
    });
    drop(root);
    problems.finish(table)
}

/// `address` with the default port if it has none; none if it is no address.
pub(crate) fn with_port(address: &str) -> Option<String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']' | '%');
    if address.is_empty() || address.len() > 255 || !address.chars().all(good) {
        return None;
    }
    if let Ok(plain) = address.parse::<std::net::IpAddr>() {
        return Some(std::net::SocketAddr::new(plain, DEFAULT_PORT).to_string());
    }
    match address.rsplit_once(':') {
        None => Some(format!("{address}:{DEFAULT_PORT}")),
        Some((host, port)) => {
            let whole = !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0);
            (whole && (address.parse::<std::net::SocketAddr>().is_ok() || !host.contains([':', '[', ']'])))
                .then(|| address.to_string())
        }
    }
}

pub(crate) fn bad_address(address: &str) -> String {
    let shown: String = address.chars().take(80).collect();
    format!("{shown:?} is no address: ADDRESS or ADDRESS:PORT is needed, such as 10.0.0.2, [fd00::2]:13560 or beta.example:13560")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn info(name: &str, key: u8, address: &str) -> HostInfo {
        HostInfo { name: name.into(), id: HostId([key; 32]).to_string(), address: address.into() }
    }

    #[test]
    fn hosts_are_kept_and_taken_out() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = Hosts::open(dir.path()).unwrap();
        hosts.trust(&info("beta", 1, "10.0.0.2")).unwrap();
        hosts.trust(&info("gamma", 2, "gamma.example:99")).unwrap();
        assert!(hosts.trusted().contains(HostId([1; 32])));
        let again = Hosts::open(dir.path()).unwrap();
        assert_eq!(again.all(), hosts.all());
        assert_eq!(again.named("beta").unwrap().address, "10.0.0.2:13560");
        assert_eq!(again.shown(HostId([2; 32])), "gamma");
        again.remove("beta").unwrap();
        assert!(!again.trusted().contains(HostId([1; 32])));
        assert!(again.remove("beta").unwrap_err().to_string().contains("no host is called"));
    }

    #[test]
    fn nonsense_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = Hosts::open(dir.path()).unwrap();
        hosts.trust(&info("beta", 1, "10.0.0.2")).unwrap();
        for bad in [info("a b", 3, "10.0.0.3"), info("x", 1, "10.0.0.3"), info("x", 3, "a\"b"), info("x", 3, "host:0")] {
            assert!(hosts.trust(&bad).is_err(), "{bad:?}");
        }
        std::fs::write(dir.path().join("hosts.toml"), "[[host]]\nname = \"x\"\nid = \"zz\"\n").unwrap();
        let error = Hosts::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("hosts.toml:3: host.id is \"zz\""), "{error}");
    }

    #[test]
    fn addresses_get_a_port() {
        for (given, whole) in
            [("fd00::2", "[fd00::2]:13560"), ("[fd00::2]:5", "[fd00::2]:5"), ("beta", "beta:13560"), ("beta:7", "beta:7")]
        {
            assert_eq!(with_port(given).as_deref(), Some(whole));
        }
        assert_eq!([with_port(""), with_port("a:b:c"), with_port(":5")], [None, None, None]);
    }

    #[test]
    fn the_key_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let id = own_key(dir.path()).unwrap().id();
        assert_eq!(own_key(dir.path()).unwrap().id(), id);
    }
}

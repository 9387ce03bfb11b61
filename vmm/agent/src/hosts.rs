//! The hosts that this one trusts, by name, identity and addresses, and the keys that it never trusts again: a file in the state
//! directory, and the set that links check keys against. Our own key is made here too. Whether an address may connect at all
//! is the allow-list's.

use crate::api::HostInfo;
use crate::checked::{ConfigError, Problems, Section, read_text};
use crate::config::{DEFAULT_PORT, NAME_WANTS, TrustConfig, plain_name};
use crate::durable::replace_file;
use limosa_link::{HostKey, HostKeyError, Trust, TrustedHosts};
use limosa_proto::identity::HostId;
use limosa_proto::statement::{Member, Statement, Succession};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most hosts that are trusted.
const HOSTS_MAX: usize = 4096;

/// Most keys that are revoked.
const REVOKED_MAX: usize = 65_536;
/// Former keys of one host that are remembered.
const FORMER_MAX: usize = 4;
/// Most addresses of one host.
const ADDRESSES_MAX: usize = 8;

/// A host that is trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// What it is called here.
    pub name: String,
    /// Its key.
    pub id: HostId,
    /// Where its agent listens: `address:port` or `name:port`, or several with commas between.
    pub address: String,
    /// Its keys before, the oldest first.
    pub former: Vec<FormerKey>,
    /// The second since 1970 after which its fleet does not vouch for it any more; none: a person has named it.
    pub until: Option<u64>,
}

/// A key that a host had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FormerKey {
    /// The key.
    pub id: HostId,
    /// The last second since 1970 in which it is good.
    pub until: u64,
}

impl Host {
    fn had(&self, id: HostId) -> bool {
        self.id == id || self.former.iter().any(|former| former.id == id)
    }

    /// As commands are told.
    #[must_use]
    pub fn info(self) -> HostInfo {
        HostInfo { name: self.name, id: self.id.to_string(), address: self.address }
    }
}

/// The trusted hosts.
#[derive(Debug)]
pub struct Hosts {
    file: PathBuf,
    table: Mutex<Table>,
    trusted: TrustedHosts,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Table {
    hosts: BTreeMap<String, Host>,
    /// Hosts that the fleet vouches for, as the configuration's file has them: not kept here.
    members: BTreeMap<String, Host>,
    revoked: BTreeSet<HostId>,
}

impl Table {
    /// What links check keys against.
    fn trust(&self) -> Trust {
        let mut trust = Trust { revoked: self.revoked.clone(), ..Trust::default() };
        for host in self.all() {
            for (before, after) in host.former.iter().zip(host.former.iter().map(|key| key.id).skip(1).chain([host.id])) {
                let until = host.until.map_or(before.until, |until| until.min(before.until));
                trust.keys.entry(before.id).or_insert(Some(until));
                trust.successors.insert(before.id, after);
            }
            // A person's word is not bounded by the fleet's.
            let until = trust.keys.get(&host.id).map_or(host.until, |known| known.and(host.until));
            trust.keys.insert(host.id, until);
        }
        trust
    }

    /// Those that a person has named, and the fleet's others.
    fn all(&self) -> impl Iterator<Item = &Host> {
        let others = self.members.values().filter(|member| !self.hosts.contains_key(&member.name));
        self.hosts.values().chain(others.filter(|member| !self.hosts.values().any(|host| host.had(member.id))))
    }

    /// Notes a host's new key. False if it is known. Gives the host's name too.
    fn succeed(&mut self, said: &Succession) -> Result<(String, bool), HostsError> {
        let bad = |words: String| Err(HostsError::Bad(words));
        let Succession { old, new, until } = *said;
        if self.revoked.contains(&old) || self.revoked.contains(&new) {
            return bad("one of its keys is revoked here: its word does not count".into());
        }
        let other = self.all().find(|host| host.had(new) && !host.had(old)).map(|host| host.name.clone());
        if let Some(other) = other {
            return bad(format!("the new key is already known as that of \"{other}\""));
        }
        let whose = |host: &&mut Host| host.had(old);
        let host = self.hosts.values_mut().find(whose).or_else(|| self.members.values_mut().find(whose));
        let Some(host) = host else { return bad(format!("no host with the key {old} is trusted here")) };
        if host.had(new) {
            return Ok((host.name.clone(), false));
        }
        if host.id != old {
            return bad(format!("{} has a newer key already, {}", host.name, host.id));
        }
        host.former.push(FormerKey { id: old, until });
        let spare = host.former.len().saturating_sub(FORMER_MAX);
        host.former.drain(..spare);
        host.id = new;
        Ok((host.name.clone(), true))
    }

    /// Takes a host in; the same name again changes its key and addresses.
    fn put(&mut self, info: &HostInfo) -> Result<Host, HostsError> {
        let bad = |words: String| Err(HostsError::Bad(words));
        if !plain_name(&info.name) {
            return bad(format!("{:?} is no name for a host: {NAME_WANTS}", info.name));
        }
        let id: HostId = info.id.parse().map_err(|e| HostsError::Bad(format!("{e}")))?;
        let address = with_ports(&info.address).ok_or_else(|| HostsError::Bad(bad_address(&info.address)))?;
        if self.revoked.contains(&id) {
            return bad(format!(
                "the key {id} is revoked here: it is not trusted again (`limosa host revoke --undo {id}` forgets that)"
            ));
        }
        if let Some(other) = self.hosts.values().find(|host| host.id == id && host.name != info.name) {
            return bad(format!("that key is already trusted as \"{}\"; `limosa host remove {}` first", other.name, other.name));
        }
        if self.hosts.len() >= HOSTS_MAX {
            return bad(format!("{HOSTS_MAX} hosts are trusted already"));
        }
        let mut host = Host { name: info.name.clone(), id, address, former: Vec::new(), until: None };
        // The same key with another address: what is known of its keys stays.
        if let Some(known) = self.hosts.get(&info.name).filter(|known| known.id == id) {
            host.former.clone_from(&known.former);
        }
        self.hosts.insert(host.name.clone(), host.clone());
        Ok(host)
    }
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
        let table = if file.exists() { parse(&file, &read_text(&file)?)? } else { Table::default() };
        let trusted = TrustedHosts::default();
        trusted.replace(table.trust());
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
        self.lock().all().cloned().collect()
    }

    /// The host called `name`.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<Host> {
        self.lock().all().find(|host| host.name == name).cloned()
    }

    /// The host that has or had this key.
    #[must_use]
    pub fn with_id(&self, id: HostId) -> Option<Host> {
        self.lock().all().find(|host| host.had(id)).cloned()
    }

    /// Its name if it has one here, else its identity.
    #[must_use]
    pub fn shown(&self, id: HostId) -> String {
        self.with_id(id).map_or_else(|| id.to_string(), |host| host.name)
    }

    /// Trusts a host from now on, durably. The same name again changes its key and address.
    ///
    /// # Errors
    /// A name, identity or address that is none; another host with this key; a revoked key; a file that cannot be written.
    pub fn trust(&self, info: &HostInfo) -> Result<Host, HostsError> {
        let mut table = self.lock();
        let mut next = table.clone();
        let host = next.put(info)?;
        self.keep(&mut table, next)?;
        Ok(host)
    }

    /// Trusts all of these, or none.
    ///
    /// # Errors
    /// As [`Hosts::trust`], with the name of the first that is refused; one name or key that is there twice.
    pub fn trust_all(&self, all: &[HostInfo]) -> Result<usize, HostsError> {
        let mut table = self.lock();
        let mut next = table.clone();
        let mut names = BTreeSet::new();
        for info in all {
            if !names.insert(&info.name) {
                return Err(HostsError::Bad(format!("nothing was changed: {} is there twice", info.name)));
            }
            next.put(info).map_err(|e| HostsError::Bad(format!("nothing was changed: {}: {e}", info.name)))?;
        }
        self.keep(&mut table, next)?;
        Ok(all.len())
    }

    /// Trusts a host no more, durably.
    ///
    /// # Errors
    /// No such host, or a file that cannot be written.
    pub fn remove(&self, name: &str) -> Result<(), HostsError> {
        let mut table = self.lock();
        let mut next = table.clone();
        if next.hosts.remove(name).is_none() {
            return Err(HostsError::Bad(format!("no host is called \"{name}\" here; `limosa host list` shows them")));
        }
        self.keep(&mut table, next)
    }

    /// Revokes a key, durably: it is refused from now on, trusted or not. `which` is an id, or the name of a trusted host, which
    /// stays in the list. Gives the key.
    ///
    /// # Errors
    /// Neither an id nor a host's name; too many; a file that cannot be written.
    pub fn revoke(&self, which: &str) -> Result<HostId, HostsError> {
        let mut table = self.lock();
        let mut next = table.clone();
        let named = table.all().find(|host| host.name == which);
        let (id, all) = match (named, which.parse::<HostId>()) {
            // Of a host all keys: which of them was lost nobody says.
            (Some(host), _) => (host.id, host.former.iter().map(|key| key.id).collect()),
            (None, Ok(id)) => (id, Vec::new()),
            (None, Err(error)) => return Err(HostsError::Bad(format!("no host is called \"{which}\" here, and {error}"))),
        };
        if !next.revoked.insert(id) {
            return Err(HostsError::Bad(format!("the key {id} is revoked already")));
        }
        next.revoked.extend(all);
        if next.revoked.len() > REVOKED_MAX {
            return Err(HostsError::Bad(format!("{REVOKED_MAX} keys are revoked already")));
        }
        self.keep(&mut table, next)?;
        Ok(id)
    }

    /// Forgets that a key was revoked, durably. It is trusted only if it was or is again.
    ///
    /// # Errors
    /// It is not revoked; a file that cannot be written.
    pub fn forget_revocation(&self, id: HostId) -> Result<(), HostsError> {
        let mut table = self.lock();
        let mut next = table.clone();
        if !next.revoked.remove(&id) {
            return Err(HostsError::Bad(format!("the key {id} is not revoked; `limosa host revoked` shows which are")));
        }
        self.keep(&mut table, next)
    }

    /// Takes a host's new key, durably. Gives the host's name.
    ///
    /// # Errors
    /// Nobody trusted has the old key, one of them is revoked, or the file cannot be written.
    pub fn succeed(&self, said: &Succession) -> Result<String, HostsError> {
        let mut table = self.lock();
        let mut next = table.clone();
        let (name, new) = next.succeed(said)?;
        if new {
            self.keep(&mut table, next)?;
        }
        Ok(name)
    }

    /// Reads the statements of a fleet, and of hosts about their new keys. Gives what should be said about them.
    ///
    /// # Errors
    /// The file cannot be read, a line is no statement, or what it says cannot be kept: nothing is changed.
    pub fn read_statements(&self, config: &TrustConfig) -> Result<Vec<String>, HostsError> {
        let bad = |words: String| HostsError::Bad(words);
        let mut warnings = Vec::new();
        let (mut members, mut successions) = (BTreeMap::new(), Vec::new());
        if let Some(file) = &config.statements {
            let whole = read_text(file).map_err(|e| bad(e.to_string()))?;
            for (number, line) in (1..).zip(whole.lines()) {
                if line.trim().is_empty() || line.starts_with('#') {
                    continue;
                }
                let wrong = |words: String| bad(format!("{}:{number}: {words}", file.display()));
                match Statement::parse(line, config.fleet).map_err(|e| wrong(e.to_string()))? {
                    Statement::Succession(said) => successions.push((number, said)),
                    Statement::Member(Member { host, name, address, not_after }) => {
                        if !plain_name(&name) || with_ports(&address).as_ref() != Some(&address) {
                            return Err(wrong(format!("{name:?} at {address:?} is no host")));
                        }
                        let member = Host { name: name.clone(), id: host, address, former: Vec::new(), until: Some(not_after) };
                        // Of two statements the one that holds longer.
                        let known = members.get(&name).is_some_and(|known: &Host| known.until >= member.until);
                        if !known {
                            members.insert(name, member);
                        }
                    }
                }
            }
        }
        let mut table = self.lock();
        let mut next = Table { members, ..table.clone() };
        for (number, said) in successions {
            if let Err(error) = next.succeed(&said) {
                warnings.push(format!("the statement in line {number} about the key {} says nothing here: {error}", said.old));
            }
        }
        if next != *table {
            self.keep(&mut table, next)?;
        }
        Ok(warnings)
    }

    /// All keys that are revoked.
    #[must_use]
    pub fn revoked(&self) -> Vec<HostId> {
        self.lock().revoked.iter().copied().collect()
    }

    fn keep(&self, table: &mut Table, next: Table) -> Result<(), HostsError> {
        let kept = replace_file(&self.file, text(&next).as_bytes());
        kept.map_err(|cause| HostsError::Io { file: self.file.clone(), cause })?;
        self.trusted.replace(next.trust());
        *table = next;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn text(table: &Table) -> String {
    let mut text = String::from(
        "# The trusted hosts: an agent's are kept by `limosa host trust|remove|revoke`, an operator's by `limosa operator trust|forget`.\n",
    );
    if !table.revoked.is_empty() {
        let ids: Vec<String> = table.revoked.iter().map(|id| format!("    \"{id}\",\n")).collect();
        text.push_str(&format!("\nrevoked = [\n{}]\n", ids.concat()));
    }
    for Host { name, id, address, former, .. } in table.hosts.values() {
        text.push_str(&format!("\n[[host]]\nname = \"{name}\"\nid = \"{id}\"\naddress = \"{address}\"\n"));
        if !former.is_empty() {
            let key = |key: &FormerKey| format!("{{ id = \"{}\", until = {} }}", key.id, key.until);
            text.push_str(&format!("former = [{}]\n", former.iter().map(key).collect::<Vec<_>>().join(", ")));
        }
    }
    text
}

fn parse(file: &Path, text: &str) -> Result<Table, ConfigError> {
    let problems = Problems::new(file, text);
    let root = problems.root();
    let table = root.as_ref().map(|table| {
        let mut root = Section::root(table, &problems);
        let revoked = root.parsed_list("revoked", "a host id").unwrap_or_default().into_iter().collect();
        let mut table = Table { revoked, ..Table::default() };
        for host in hosts_of(&mut root) {
            table.hosts.insert(host.name.clone(), host);
        }
        root.close();
        table
    });
    drop(root);
    problems.finish(table)
}

/// The hosts of a file of `[[host]]` tables, for `limosa host trust --file`.
///
/// # Errors
/// Every problem of the file, with its line.
pub fn read_file(file: &Path) -> Result<Vec<HostInfo>, ConfigError> {
    let text = read_text(file)?;
    let problems = Problems::new(file, &text);
    let root = problems.root();
    let hosts = root.as_ref().map(|table| {
        let mut root = Section::root(table, &problems);
        let hosts = hosts_of(&mut root).into_iter().map(Host::info).collect();
        root.close();
        hosts
    });
    drop(root);
    problems.finish(hosts)
}

fn hosts_of(root: &mut Section<'_, '_>) -> Vec<Host> {
    let mut hosts = Vec::new();
    for mut section in root.sections("host") {
        let name = section.string("name").filter(|name| plain_name(name));
        let id = section.parsed::<HostId>("id", "what `limosa host id` prints on that host");
        let address = section.string("address").and_then(|address| with_ports(&address));
        match (name, id, address) {
            (Some(name), Some(id), Some(address)) => {
                let former = former_of(&mut section);
                hosts.push(Host { name, id, address, former, until: None });
            }
            _ => section.problem("name", "is not a whole host", "name, id and address are needed"),
        }
        section.close();
    }
    hosts
}

fn former_of(host: &mut Section<'_, '_>) -> Vec<FormerKey> {
    let mut former = Vec::new();
    for mut section in host.sections("former") {
        let id = section.parsed::<HostId>("id", "a host id");
        let until = section.integer("until", 0..=i64::MAX.unsigned_abs());
        match id.zip(until) {
            Some((id, until)) => former.push(FormerKey { id, until }),
            None => section.problem("id", "is not a whole key", "id and until are needed"),
        }
        section.close();
    }
    former
}

/// Each of the addresses with the default port if it has none; none if one of them is no address.
pub(crate) fn with_ports(addresses: &str) -> Option<String> {
    let all: Vec<String> = addresses.split(',').map(|one| with_port(one.trim())).collect::<Option<_>>()?;
    (all.len() <= ADDRESSES_MAX).then(|| all.join(","))
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
    format!(
        "{shown:?} is no address: ADDRESS or ADDRESS:PORT is needed, up to {ADDRESSES_MAX} with commas between, such as 10.0.0.2, [fd00::2]:13560 or beta.example:13560"
    )
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
    fn a_revoked_key_stays_refused_until_that_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = Hosts::open(dir.path()).unwrap();
        hosts.trust(&info("beta", 1, "10.0.0.2")).unwrap();
        let (beta, other) = (HostId([1; 32]), HostId([9; 32]));
        assert_eq!(hosts.revoke("beta").unwrap(), beta);
        assert_eq!(hosts.revoke(&other.to_string()).unwrap(), other, "one that nobody has trusted yet too");
        assert!(hosts.revoke("beta").unwrap_err().to_string().contains("already"));
        assert!(hosts.revoke("delta").unwrap_err().to_string().contains("no host is called"));
        let hosts = Hosts::open(dir.path()).unwrap();
        assert!(!hosts.trusted().contains(beta) && hosts.named("beta").is_some());
        for key in [1, 9] {
            assert!(hosts.trust(&info("new", key, "10.0.0.3")).unwrap_err().to_string().contains("is revoked"));
        }
        assert_eq!(hosts.revoked(), [beta, other]);
        hosts.forget_revocation(beta).unwrap();
        assert!(hosts.forget_revocation(beta).is_err());
        assert!(Hosts::open(dir.path()).unwrap().trusted().contains(beta), "it was trusted all the time");
    }

    #[test]
    fn many_are_trusted_at_once_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = Hosts::open(dir.path()).unwrap();
        let good = [info("beta", 1, "10.0.0.2,10.9.0.2:99"), info("gamma", 2, "10.0.0.3")];
        let bad = [info("delta", 3, "10.0.0.4"), info("epsilon", 1, "10.0.0.5")];
        assert_eq!(hosts.trust_all(&good).unwrap(), 2);
        assert_eq!(hosts.named("beta").unwrap().address, "10.0.0.2:13560,10.9.0.2:99");
        let error = hosts.trust_all(&bad).unwrap_err().to_string();
        assert!(error.contains("nothing was changed: epsilon: that key is already trusted"), "{error}");
        assert!(hosts.trust_all(&[info("x", 5, "a"), info("x", 6, "a")]).unwrap_err().to_string().contains("twice"));
        assert_eq!((hosts.all().len(), Hosts::open(dir.path()).unwrap().all().len()), (2, 2));
        // The file that is kept is of the form that can be given.
        assert_eq!(
            read_file(&dir.path().join("hosts.toml")).unwrap(),
            hosts.all().into_iter().map(Host::info).collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_new_key_is_kept_and_the_host_stays_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = Hosts::open(dir.path()).unwrap();
        let key = |number: u8| HostId([number; 32]);
        let said = |old, new, until| Succession { old: key(old), new: key(new), until };
        hosts.trust_all(&[info("beta", 1, "10.0.0.2"), info("gamma", 5, "10.0.0.3")]).unwrap();
        let soon = crate::jobs::unix_ms() / 1000 + 1000;
        assert_eq!(hosts.succeed(&said(1, 2, soon)).unwrap(), "beta");
        assert_eq!(hosts.succeed(&said(1, 2, soon)).unwrap(), "beta", "told twice it is the same");
        hosts.succeed(&said(2, 3, 7)).unwrap();
        for bad in [said(9, 8, soon), said(3, 5, soon), said(2, 4, soon)] {
            assert!(hosts.succeed(&bad).is_err(), "{bad:?}");
        }
        let hosts = Hosts::open(dir.path()).unwrap();
        let trusted = hosts.trusted();
        // The first is good for a while, the second's time is over, the third is the key.
        assert_eq!([1, 2, 3].map(|number| trusted.contains(key(number))), [true, false, true]);
        assert!(trusted.same_host(key(1), key(3)) && !trusted.same_host(key(1), key(5)));
        assert_eq!((hosts.named("beta").unwrap().id, hosts.shown(key(1))), (key(3), "beta".to_owned()));
        // Of a host that is named all keys are revoked, and a revoked key names no successor.
        hosts.revoke("beta").unwrap();
        assert_eq!([1, 2, 3].map(|number| hosts.trusted().contains(key(number))), [false; 3]);
        assert!(hosts.succeed(&said(3, 4, soon)).unwrap_err().to_string().contains("revoked"));
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

//! The rules of the two allow-lists: those of the configuration and those that commands have made, which are kept in a file of
//! the state directory. It joins them, changes them, and gives the lists that the links ask. Whom a change cuts off is
//! `cutting`'s.

use crate::allow_api::{AllowAnswer, Lists};
use crate::api::ApiError;
use crate::checked::{ConfigError, Problems, Section, read_text};
use crate::config::Config;
use crate::durable::replace_file;
use limosa_link::Here;
use limosa_proto::allow::{AllowList, Names, parse_zoned};
use limosa_proto::here::{HereList, PRIORITY_DEFAULT};
use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// Rules that commands may make.
const KEPT_MAX: usize = 1000;
/// The number of an interface that is not there: none has it.
const NO_ZONE: u32 = u32::MAX;

/// What is said of a rule that is none.
const PEER_WANTS: &str = "it should be an address, ADDRESS/PREFIX such as \"10.0.0.0/24\" or \"fd00::/64\", or a host's name";

/// The system's names. What is not to be had allows nobody, and is noted: a name server that is down opens no door, and keeps no
/// agent from its start.
#[derive(Debug, Default)]
pub(crate) struct SystemNames(RefCell<Vec<String>>);

impl Names for SystemNames {
    fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, String> {
        match (host, 0).to_socket_addrs() {
            Ok(found) => Ok(found.map(|address| address.ip()).collect()),
            Err(error) => {
                self.0.borrow_mut().push(format!("the name \"{host}\" has no address now, so its rule allows nobody: {error}"));
                Ok(Vec::new())
            }
        }
    }

    fn zone(&self, interface: &str) -> Result<u32, String> {
        Ok(nix::net::if_::if_nametoindex(interface).unwrap_or_else(|error| {
            let words = format!("the interface \"{interface}\" is not there, so its rule allows nobody: {error}");
            self.0.borrow_mut().push(words);
            NO_ZONE
        }))
    }
}

impl SystemNames {
    pub(crate) fn unresolved(self) -> Vec<String> {
        self.0.into_inner()
    }
}

impl Config {
    /// Reads `[allow]`.
    pub(crate) fn read_allow(&mut self, mut section: Section<'_, '_>) {
        let names = SystemNames::default();
        let texts = section.strings("peers").unwrap_or_default();
        for text in &texts {
            if AllowList::resolved(&[text], &names).is_err() {
                section.problem("peers", format_args!("has {text:?}"), PEER_WANTS);
            }
        }
        if let Ok((list, warnings)) = AllowList::resolved(&texts, &names) {
            self.warnings.extend(warnings);
            self.allow = list;
        }
        if section.has("here") {
            let rules = here_rules(&mut section, &names);
            if let Ok((list, warnings)) = HereList::new(&rules, &names) {
                self.warnings.extend(warnings);
                self.here = list;
            }
        }
        section.close();
        for words in names.unresolved() {
            // A name is looked up several times, and said once.
            if !self.unresolved.contains(&words) {
                self.warnings.push(words.clone());
                self.unresolved.push(words);
            }
        }
    }

    /// Both lists, of the configuration alone.
    #[must_use]
    pub fn lists(&self) -> Lists {
        let here_configured = self.here.texts();
        let (peers, here) = (self.allow.clone(), self.here.clone());
        Lists { peers_configured: peers.texts(), here_configured, peers, here }
    }
}

/// The tables under `here`: each a network with a priority.
fn here_rules(section: &mut Section<'_, '_>, names: &dyn Names) -> Vec<(String, u16)> {
    let mut rules = Vec::new();
    for mut one in section.sections("here") {
        let network = one.string("network");
        let priority = one.integer("priority", 0..=65_535).and_then(|number| u16::try_from(number).ok());
        match network {
            None => one.problem("network", "is missing", "each needs a network of this host, such as \"10.9.0.0/24\""),
            Some(text) => match HereList::new(&[(&text, 0)], names) {
                Ok(_) => rules.push((text, priority.unwrap_or(PRIORITY_DEFAULT))),
                Err(_) => one.problem("network", format_args!("is {text:?}"), "it should be a network, such as \"10.9.0.0/24\""),
            },
        }
        one.close();
    }
    rules
}

/// The rules in force.
#[derive(Debug)]
pub(crate) struct Rules {
    file: PathBuf,
    table: Mutex<Table>,
    allow: Arc<RwLock<AllowList>>,
    here: Here,
}

#[derive(Debug, Clone)]
struct Table {
    configured: Lists,
    kept: Kept,
}

/// What commands have made, each rule as it was read when it came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Kept {
    peers: Vec<(String, AllowList)>,
    /// Set as soon as there was one: taking the last one out does not open what was closed.
    here: Option<Vec<(String, u16, HereList)>>,
}

impl Table {
    fn joined(&self) -> Lists {
        let mut all = self.configured.clone();
        for (_, list) in &self.kept.peers {
            all.peers = all.peers.and(list);
        }
        if let Some(rules) = &self.kept.here {
            let none = HereList::new::<&str>(&[], &SystemNames::default()).map(|(list, _)| list).unwrap_or_default();
            all.here = rules.iter().fold(all.here.and(&none), |all, (_, _, list)| all.and(list));
        }
        all
    }
}

impl Rules {
    /// Those of the configuration, and those in the state directory. Gives what should be said about them too.
    ///
    /// # Errors
    /// Every problem of the file, with its line.
    pub(crate) fn open(config: &Config) -> Result<(Rules, Vec<String>), ConfigError> {
        let file = config.state_dir.join("allow.toml");
        let (kept, warnings) = read_kept(&file)?;
        let table = Table { configured: config.lists(), kept };
        let all = table.joined();
        let (allow, here) = (Arc::new(RwLock::new(all.peers)), Here::new(all.here));
        Ok((Rules { file, table: Mutex::new(table), allow, here }, warnings))
    }

    /// The list that the links ask about peers.
    pub(crate) fn allow(&self) -> Arc<RwLock<AllowList>> {
        Arc::clone(&self.allow)
    }

    /// The list that the links ask about this host's addresses.
    pub(crate) fn here(&self) -> Here {
        self.here.clone()
    }

    /// Both as they are now.
    pub(crate) fn lists(&self) -> Lists {
        self.lock().joined()
    }

    /// Which rule decides about an address.
    ///
    /// # Errors
    /// It is no address.
    pub(crate) fn test(&self, address: &str, here: bool) -> Result<AllowAnswer, ApiError> {
        let lists = self.lists();
        Ok(AllowAnswer::Test(verdict(&lists, address, here)?))
    }

    /// One rule more. Gives the lists before.
    ///
    /// # Errors
    /// It is none, it is there already, or it cannot be kept.
    pub(crate) fn add(&self, rule: &str, here: Option<u16>) -> Result<Lists, ApiError> {
        let names = SystemNames::default();
        let rule = rule.trim();
        let mut table = self.lock();
        let mut next = table.clone();
        let bad = |error: limosa_proto::error::Misuse| ApiError::usage("rule", error.to_string());
        let again = || ApiError::refused("rule", format!("\"{rule}\" is a rule already; `limosa allow list` shows it"));
        match here {
            None => {
                let (list, _) = AllowList::resolved(&[rule], &names).map_err(bad)?;
                let all = table.joined().peers;
                if !list.networks().is_empty() && all.and(&list).networks().len() == all.networks().len() {
                    return Err(again());
                }
                next.kept.peers.push((rule.to_owned(), list));
            }
            Some(priority) => {
                let (list, _) = HereList::new(&[(rule, priority)], &names).map_err(bad)?;
                let all = table.joined().here;
                if all.is_set() && all.and(&list).rules().count() == all.rules().count() {
                    return Err(again());
                }
                next.kept.here.get_or_insert_default().push((rule.to_owned(), priority, list));
            }
        }
        if let Some(words) = names.unresolved().pop() {
            return Err(ApiError::refused("rule", words));
        }
        if next.kept.peers.len() + next.kept.here.as_ref().map_or(0, Vec::len) > KEPT_MAX {
            return Err(ApiError::refused("rule", format!("there are {KEPT_MAX} rules of commands already")));
        }
        self.keep(&mut table, next)
    }

    /// One rule of a command less. Gives the lists before.
    ///
    /// # Errors
    /// There is none, it is the configuration's, or the others cannot be kept.
    pub(crate) fn remove(&self, rule: &str, here: bool) -> Result<Lists, ApiError> {
        let rule = rule.trim();
        let mut table = self.lock();
        let mut next = table.clone();
        let names = SystemNames::default();
        let meant = AllowList::resolved(&[rule], &names).map(|(list, _)| list).unwrap_or_default();
        let fits = |text: &str, networks: Vec<String>| text == rule || (!networks.is_empty() && networks == networks_of(&meant));
        let before = next.kept.peers.len() + next.kept.here.as_ref().map_or(0, Vec::len);
        if here {
            let own = |list: &HereList| list.rules().map(|(rule, _)| rule.network.to_string()).collect();
            next.kept.here.iter_mut().for_each(|rules| rules.retain(|(text, _, list)| !fits(text, own(list))));
        } else {
            next.kept.peers.retain(|(text, list)| !fits(text, networks_of(list)));
        }
        if next.kept.peers.len() + next.kept.here.as_ref().map_or(0, Vec::len) < before {
            return self.keep(&mut table, next);
        }
        let configured = if here {
            table.configured.here.rules().any(|(one, _)| fits(one.text, vec![one.network.to_string()]))
        } else {
            table.configured.peers.rules().any(|one| fits(one.text, vec![one.network.to_string()]))
        };
        let words = if configured {
            format!("\"{rule}\" is a rule of the configuration: take it out there, then `limosa allow reload`")
        } else {
            format!("there is no rule \"{rule}\"; `limosa allow list` shows what there is")
        };
        Err(ApiError::refused("rule", words))
    }

    /// The configuration's rules anew, and the names in those of commands. Gives the lists before.
    ///
    /// # Errors
    /// The file of the rules of commands is bad, or a name in it cannot be looked up; nothing is changed then.
    pub(crate) fn reload(&self, config: &Config) -> Result<Lists, ApiError> {
        let (kept, warnings) = read_kept(&self.file).map_err(|e| ApiError::usage("rule", e.to_string()))?;
        if let Some(words) = warnings.into_iter().next() {
            return Err(ApiError::refused("rule", format!("{}: {words}", self.file.display())));
        }
        let mut table = self.lock();
        let before = table.joined();
        *table = Table { configured: config.lists(), kept };
        self.publish(&table);
        Ok(before)
    }

    fn keep(&self, table: &mut Table, next: Table) -> Result<Lists, ApiError> {
        let kept = replace_file(&self.file, text(&next.kept).as_bytes());
        kept.map_err(|e| ApiError::refused("rule", format!("{}: the rule cannot be kept: {e}", self.file.display())))?;
        let before = table.joined();
        *table = next;
        self.publish(table);
        Ok(before)
    }

    fn publish(&self, table: &Table) {
        let all = table.joined();
        *self.allow.write().unwrap_or_else(PoisonError::into_inner) = all.peers;
        self.here.replace(all.here);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which rule of `lists` decides about an address, of a peer or of this host.
///
/// # Errors
/// It is no address.
pub fn verdict(lists: &Lists, address: &str, here: bool) -> Result<crate::allow_api::AllowVerdict, ApiError> {
    let (ip, zone) = parse_zoned(address).map_err(|e| ApiError::usage("address", e.to_string()))?;
    let zone = zone.map_or(0, |zone| nix::net::if_::if_nametoindex(zone).unwrap_or(0));
    if here {
        let socket = match ip {
            IpAddr::V6(v6) => SocketAddr::V6(SocketAddrV6::new(v6, 0, 0, zone)),
            IpAddr::V4(_) => SocketAddr::new(ip, 0),
        };
        return Ok(lists.of_here(&lists.here.decide(socket)));
    }
    Ok(lists.of_peer(&lists.peers.decide_at(ip, zone)))
}

fn networks_of(list: &AllowList) -> Vec<String> {
    list.networks().iter().map(ToString::to_string).collect()
}

fn text(kept: &Kept) -> String {
    let mut text =
        String::from("# Rules beside those of the configuration, kept by `limosa allow add` and `limosa allow remove`.\n");
    let peers: Vec<&String> = kept.peers.iter().map(|(text, _)| text).collect();
    text.push_str(&format!("peers = {peers:?}\n"));
    if let Some(rules) = &kept.here {
        let rule = |(text, priority, _): &(String, u16, HereList)| format!("{{ network = {text:?}, priority = {priority} }}");
        text.push_str(&format!("here = [{}]\n", rules.iter().map(rule).collect::<Vec<_>>().join(", ")));
    }
    text
}

fn read_kept(file: &Path) -> Result<(Kept, Vec<String>), ConfigError> {
    if !file.exists() {
        return Ok((Kept::default(), Vec::new()));
    }
    let whole = read_text(file)?;
    let problems = Problems::new(file, &whole);
    let names = SystemNames::default();
    let root = problems.root();
    let kept = root.as_ref().map(|table| {
        let mut root = Section::root(table, &problems);
        let mut kept = Kept::default();
        for text in root.strings("peers").unwrap_or_default() {
            match AllowList::resolved(&[&text], &names) {
                Ok((list, _)) => kept.peers.push((text, list)),
                Err(_) => root.problem("peers", format_args!("has {text:?}"), PEER_WANTS),
            }
        }
        if root.has("here") {
            let read = |(text, priority): (String, u16)| {
                let list = HereList::new(&[(&text, priority)], &names).map(|(list, _)| list).unwrap_or_default();
                (text, priority, list)
            };
            kept.here = Some(here_rules(&mut root, &names).into_iter().map(read).collect());
        }
        root.close();
        kept
    });
    drop(root);
    let kept = problems.finish(kept)?;
    Ok((kept, names.unresolved()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn config(dir: &Path, allow: &str) -> Config {
        let text = format!("[agent]\nstate_dir = {dir:?}\n[allow]\n{allow}\n");
        Config::parse(Path::new("agent.toml"), &text).unwrap()
    }

    fn allowed(rules: &Rules, address: &str, here: bool) -> bool {
        verdict(&rules.lists(), address, here).unwrap().allowed
    }

    #[test]
    fn rules_of_commands_are_kept_and_say_where_they_come_from() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), "peers = [\"10.0.0.0/8\"]");
        let (rules, _) = Rules::open(&config).unwrap();
        let before = rules.add("192.0.2.0/24", None).unwrap();
        assert!(!before.peers.decide("192.0.2.1".parse().unwrap()).allowed && allowed(&rules, "192.0.2.1", false));
        assert!(rules.add("192.0.2.7/24", None).unwrap_err().words.contains("is a rule already"));
        assert_eq!(rules.add("10.0.0.300", None).unwrap_err().exit, 2);
        let (again, _) = Rules::open(&config).unwrap();
        let report = again.lists().report(&config.listen);
        let shown: Vec<_> = report.peers.iter().map(|rule| (rule.position, rule.from.as_str())).collect();
        assert_eq!(shown, [(1, "configuration"), (2, "command")]);
        let words = verdict(&again.lists(), "192.0.2.1", false).unwrap().words;
        assert_eq!(words, "192.0.2.1 is allowed by rule 2, \"192.0.2.0/24\" (limosa allow add)");
        assert!(again.remove("10.0.0.0/8", false).unwrap_err().words.contains("rule of the configuration"));
        assert!(again.remove("172.16.0.0/12", false).unwrap_err().words.contains("no rule"));
        again.remove("192.0.2.99/24", false).unwrap();
        assert!(!allowed(&again, "192.0.2.1", false) && !allowed(&Rules::open(&config).unwrap().0, "192.0.2.1", false));
    }

    #[test]
    fn a_list_of_this_hosts_addresses_stays_a_list() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), "");
        let (rules, _) = Rules::open(&config).unwrap();
        assert!(allowed(&rules, "10.0.0.1", true), "what is not set forbids nothing");
        rules.add("10.9.0.0/16", Some(1)).unwrap();
        assert!(allowed(&rules, "10.9.0.1", true) && !allowed(&rules, "10.0.0.1", true));
        rules.remove("10.9.0.0/16", true).unwrap();
        // The last rule is gone, and nothing is open because of that; nor after a restart.
        for rules in [rules, Rules::open(&config).unwrap().0] {
            assert!(!allowed(&rules, "10.9.0.1", true) && !allowed(&rules, "10.0.0.1", true));
        }
    }

    #[test]
    fn the_configuration_has_both_lists() {
        let dir = tempfile::tempdir().unwrap();
        let here = "[[allow.here]]\nnetwork = \"10.9.0.0/16\"\npriority = 1\n[[allow.here]]\nnetwork = \"10.0.0.0/8\"\n";
        let config = config(dir.path(), here);
        let priority = |address: &str| config.here.decide(SocketAddr::new(address.parse().unwrap(), 1)).priority;
        assert_eq!((priority("10.9.1.1"), priority("10.1.1.1"), priority("192.0.2.1")), (1, PRIORITY_DEFAULT, u16::MAX));
        let text =
            "[allow]\npeers = [\"10.0.0.0/99\"]\n[[allow.here]]\npriority = 1\n[[allow.here]]\nnetwork = \"x y\"\nprio = 1\n";
        let error = Config::parse(Path::new("agent.toml"), text).unwrap_err().to_string();
        for part in ["2: allow.peers has \"10.0.0.0/99\"", "network is missing", "\"x y\"", "7: unknown key \"allow.here.prio\""]
        {
            assert!(error.contains(part), "{part}\nis not in\n{error}");
        }
    }

    #[test]
    fn a_name_that_is_not_to_be_had_allows_nobody_and_is_refused_later() {
        let dir = tempfile::tempdir().unwrap();
        // RFC 6761: never has an address.
        let config = config(dir.path(), "peers = [\"limosa-test.invalid\", \"localhost\", \"fe80::%no-such-if0/10\"]");
        assert_eq!(config.unresolved.len(), 2, "{:?}", config.unresolved);
        let (rules, _) = Rules::open(&config).unwrap();
        let loopback = ["127.0.0.1", "::1"].into_iter().any(|address| allowed(&rules, address, false));
        assert!(loopback && !allowed(&rules, "fe80::1", false));
        assert!(rules.add("limosa-test.invalid", None).unwrap_err().words.contains("limosa-test.invalid"));
    }
}

//! What commands and the agent say about the two allow-lists: the types, shared by both ends, and how lists are told. What is
//! done is in `rules`.

use limosa_proto::allow::{AllowList, Decision, Rule};
use limosa_proto::here::{HereDecision, HereList};
use serde::{Deserialize, Serialize};

/// What a command asks about the lists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AllowRequest {
    /// All rules.
    List,
    /// Which rule decides.
    Test {
        /// An address, with its zone if it has one.
        address: String,
        /// Whether it is one of this host.
        here: bool,
    },
    /// One rule more, durably.
    Add {
        /// As for a configuration.
        rule: String,
        /// Of a rule about this host's addresses, its priority.
        here: Option<u16>,
    },
    /// One rule less, durably.
    Remove {
        /// As it was written, or the same network.
        rule: String,
        /// Whether it is about this host's addresses.
        here: bool,
    },
    /// Read the configuration again.
    Reload,
}

impl AllowRequest {
    /// Whether it may change anything.
    #[must_use]
    pub fn changes(&self) -> bool {
        !matches!(self, AllowRequest::List | AllowRequest::Test { .. })
    }
}

/// What the agent answers, where it is more than words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AllowAnswer {
    /// All rules.
    List(AllowReport),
    /// What decides.
    Test(AllowVerdict),
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleInfo {
    /// Its place, from 1: first those of the configuration, then those of commands.
    pub position: usize,
    /// As it was written.
    pub rule: String,
    /// What it is read as.
    pub network: String,
    /// Of this host's addresses: the smaller, the sooner taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<u16>,
    /// "configuration", or "command" for one that `limosa allow add` made.
    pub from: String,
}

/// Both lists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllowReport {
    /// From which addresses hosts may connect.
    pub peers: Vec<RuleInfo>,
    /// On which addresses of this host migrations are accepted; none: on all that it listens on.
    pub here: Option<Vec<RuleInfo>>,
    /// Where it listens.
    pub listen: Vec<String>,
}

/// What a list says about an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllowVerdict {
    /// As it was compared.
    pub address: String,
    /// Whether it is allowed.
    pub allowed: bool,
    /// By which rule.
    pub rule: Option<RuleInfo>,
    /// How many rules there are.
    pub rules: usize,
    /// All of it in words.
    pub words: String,
}

/// Two lists, and how many texts of each are the configuration's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lists {
    /// Addresses of peers.
    pub peers: AllowList,
    /// Addresses of this host.
    pub here: HereList,
    /// Texts of the configuration in `peers`.
    pub peers_configured: usize,
    /// Texts of the configuration in `here`.
    pub here_configured: usize,
}

fn info(rule: &Rule<'_>, priority: Option<u16>, configured: usize) -> RuleInfo {
    let from = if rule.position <= configured { "configuration" } else { "command" };
    let (rule, position, network) = (rule.text.to_owned(), rule.position, rule.network.to_string());
    RuleInfo { position, rule, network, priority, from: from.to_owned() }
}

/// How a rule's origin is said.
fn origin(rule: Option<&RuleInfo>) -> &'static str {
    match rule.map(|rule| rule.from.as_str()) {
        Some("command") => " (limosa allow add)",
        Some(_) => " (the configuration)",
        None => "",
    }
}

impl Lists {
    /// All rules.
    #[must_use]
    pub fn report(&self, listen: &[std::net::SocketAddr]) -> AllowReport {
        let peers = self.peers.rules().map(|rule| info(&rule, None, self.peers_configured)).collect();
        let here = || self.here.rules().map(|(rule, priority)| info(&rule, Some(priority), self.here_configured)).collect();
        let listen = listen.iter().map(ToString::to_string).collect();
        AllowReport { peers, here: self.here.is_set().then(here), listen }
    }

    /// What is said of a peer's address.
    #[must_use]
    pub fn of_peer(&self, decision: &Decision<'_>) -> AllowVerdict {
        let rule = decision.rule.as_ref().map(|rule| info(rule, None, self.peers_configured));
        let words = format!("{decision}{}", origin(rule.as_ref()));
        let address = decision.address.to_string();
        AllowVerdict { address, allowed: decision.allowed, rule, rules: decision.rules, words }
    }

    /// What is said of an address of this host.
    #[must_use]
    pub fn of_here(&self, decision: &HereDecision<'_>) -> AllowVerdict {
        let rule = decision.rule.as_ref().map(|rule| info(rule, Some(decision.priority), self.here_configured));
        let words = format!("{decision}{}", origin(rule.as_ref()));
        let address = decision.address.to_string();
        AllowVerdict { address, allowed: decision.allowed, rule, rules: decision.rules.unwrap_or(0), words }
    }
}

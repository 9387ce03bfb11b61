//! The second allow-list: on which addresses of this host migrations are accepted, and which of them is preferred. Where it is
//! not set, those that the host listens on count as before; where it is set, none but those that it names.

use crate::allow::{AllowList, Names, Rule, zone_of};
use crate::error::Misuse;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// The priority of a network of which nothing is said.
pub const PRIORITY_DEFAULT: u16 = 100;

/// Networks of this host on which migrations are accepted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HereList {
    set: Option<Set>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Set {
    list: AllowList,
    /// Of each text.
    priorities: Vec<u16>,
}

/// What the list says about an address of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HereDecision<'t> {
    /// The address as it was compared.
    pub address: IpAddr,
    /// Whether migrations may use it.
    pub allowed: bool,
    /// The rule that decides: of those that name it the one with the smallest number, and of these the first.
    pub rule: Option<Rule<'t>>,
    /// Its number: the smaller, the sooner it is taken.
    pub priority: u16,
    /// How many rules there are; none: the list is not set.
    pub rules: Option<usize>,
}

impl HereList {
    /// A list of networks with their priorities; an empty one accepts nothing.
    ///
    /// # Errors
    /// Names the text that is no network.
    pub fn new<T: AsRef<str>>(rules: &[(T, u16)], names: &dyn Names) -> Result<(HereList, Vec<String>), Misuse> {
        let texts: Vec<&str> = rules.iter().map(|(text, _)| text.as_ref()).collect();
        let (list, warnings) = AllowList::resolved(&texts, names)?;
        let priorities = rules.iter().map(|(_, priority)| *priority).collect();
        Ok((HereList { set: Some(Set { list, priorities }) }, warnings))
    }

    /// Whether it names anything, or forbids everything.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.set.is_some()
    }

    /// How many texts it was made of.
    #[must_use]
    pub fn texts(&self) -> usize {
        self.set.as_ref().map_or(0, |set| set.list.texts())
    }

    /// The rules of both, those of `more` behind. It is set if one of them is.
    #[must_use]
    pub fn and(&self, more: &HereList) -> HereList {
        let set = match (&self.set, &more.set) {
            (Some(first), Some(second)) => Some(Set {
                list: first.list.and(&second.list),
                priorities: first.priorities.iter().chain(&second.priorities).copied().collect(),
            }),
            (first, second) => first.clone().or_else(|| second.clone()),
        };
        HereList { set }
    }

    /// Whether migrations may use this address of the host.
    #[must_use]
    pub fn decide(&self, address: SocketAddr) -> HereDecision<'_> {
        let (zone, address) = (zone_of(address), address.ip().to_canonical());
        let Some(set) = &self.set else {
            return HereDecision { address, allowed: true, rule: None, priority: PRIORITY_DEFAULT, rules: None };
        };
        let best = self.rules().filter(|(rule, _)| rule.fits(address, zone)).min_by_key(|(_, priority)| *priority);
        let (rule, priority) = best.unzip();
        let rules = Some(set.list.networks().len());
        HereDecision { address, allowed: rule.is_some(), rule, priority: priority.unwrap_or(u16::MAX), rules }
    }

    /// The rules in the order in which they were written, each with its priority.
    pub fn rules(&self) -> impl Iterator<Item = (Rule<'_>, u16)> {
        self.set.iter().flat_map(|set| {
            let priority = |rule: &Rule<'_>| set.priorities.get(rule.position.saturating_sub(1)).copied();
            set.list.rules().map(move |rule| (rule, priority(&rule).unwrap_or(PRIORITY_DEFAULT)))
        })
    }
}

impl fmt::Display for HereDecision<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = self.address;
        match (self.rule, self.rules) {
            (_, None) => write!(f, "{address} of this host takes migrations if it listens there: no list is set"),
            (Some(Rule { position, text, .. }), _) => {
                write!(f, "{address} of this host takes migrations by rule {position}, \"{text}\", priority {}", self.priority)
            }
            (None, Some(0)) => write!(f, "{address} of this host takes no migrations: the list is empty"),
            (None, Some(1)) => write!(f, "{address} of this host takes no migrations: the one rule does not name it"),
            (None, Some(rules)) => {
                write!(f, "{address} of this host takes no migrations: none of the {rules} rules names it")
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::allow::NoNames;

    fn list(rules: &[(&str, u16)]) -> HereList {
        HereList::new(rules, &NoNames).unwrap().0
    }

    fn at(text: &str) -> SocketAddr {
        SocketAddr::new(text.parse().unwrap(), 13_560)
    }

    #[test]
    fn what_is_not_set_forbids_nothing_and_what_is_set_all_but_what_it_names() {
        assert!(HereList::default().decide(at("10.0.0.1")).allowed && !HereList::default().is_set());
        let empty = list(&[]);
        assert!(empty.is_set() && !empty.decide(at("10.0.0.1")).allowed);
        assert!(empty.decide(at("10.0.0.1")).to_string().contains("the list is empty"));
        let one = list(&[("10.0.0.0/8", 5)]);
        assert!(one.decide(at("::ffff:10.0.0.1")).allowed && !one.decide(at("192.0.2.1")).allowed);
        // Joined with what is not set, it stays set.
        assert!(!HereList::default().and(&empty).decide(at("10.0.0.1")).allowed);
        assert!(!empty.and(&HereList::default()).decide(at("10.0.0.1")).allowed);
    }

    #[test]
    fn the_smallest_number_decides_and_then_the_first() {
        let here = list(&[("0.0.0.0/0", 90), ("10.9.0.0/16", 1), ("10.9.8.0/24", 1)]).and(&list(&[("10.9.8.7", 0)]));
        let told = |text: &str| {
            let decision = here.decide(at(text));
            (decision.priority, decision.rule.map(|rule| rule.position))
        };
        assert_eq!((told("10.9.8.1"), told("10.9.8.7"), told("10.1.1.1")), ((1, Some(2)), (0, Some(4)), (90, Some(1))));
        assert_eq!(told("fd00::1"), (u16::MAX, None));
        assert_eq!(
            here.decide(at("10.9.8.1")).to_string(),
            "10.9.8.1 of this host takes migrations by rule 2, \"10.9.0.0/16\", priority 1"
        );
        assert!(here.decide(at("fd00::1")).to_string().contains("none of the 4 rules"));
    }
}

//! Which link carries a guest: what the operator asked for, what both hosts have and what was measured, made into a list of
//! links to try, best first, each with its reason. Pure: [`look()`] finds out what there is, the caller opens and retries.
//!
//! Never in the list is a link that protects guest memory less than was asked for, and nothing but the one link where one was
//! named.

mod look;

pub use look::{Found, MakeRdma, OwnRdma, Reach, look};

use limosa_proto::event::SourceOutcome;
use limosa_proto::report::LinkTried;
use limosa_proto::wire::code::Code;
use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Figures that differ by less than this part of the larger one are the same: a short probe knows no better.
const ALIKE: f64 = 0.10;

/// A kind of link between two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LinkKind {
    /// Queue pairs; not encrypted, only within a trusted fabric.
    Rdma,
    /// Streams over UDP, always encrypted.
    Quic,
    /// TCP, with TLS unless plain text was asked for.
    Tcp,
}

impl LinkKind {
    /// All of them.
    pub const ALL: [LinkKind; 3] = [LinkKind::Rdma, LinkKind::Quic, LinkKind::Tcp];

    /// Its name in reports, offers and Hello.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            LinkKind::Rdma => "rdma",
            LinkKind::Quic => "quic",
            LinkKind::Tcp => "tcp",
        }
    }
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which link the operator asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wanted {
    /// The best that both hosts have.
    #[default]
    Auto,
    /// This one or none.
    Only(LinkKind),
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Wanted, String> {
        let named = LinkKind::ALL.into_iter().find(|kind| kind.name() == text).map(Wanted::Only);
        let wanted = named.or_else(|| (text == "auto").then_some(Wanted::Auto));
        wanted.ok_or_else(|| {
            format!("{:?} is no link; it should be auto, tcp, quic or rdma", text.chars().take(80).collect::<String>())
        })
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wanted::Auto => f.write_str("auto"),
            Wanted::Only(kind) => kind.fmt(f),
        }
    }
}

/// How guest memory must be protected on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protection {
    /// Encrypted, whatever the fabric.
    Encrypted,
    /// Encrypted, unless both hosts have declared the fabric between them trusted.
    #[default]
    EncryptedOrTrusted,
    /// In plain text over TCP too.
    PlainText,
}

/// Why a link is not to be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// The code that the report gets where this link was the only hope.
    pub code: Code,
    /// Whose fault it is, and what to do about it.
    pub words: String,
}

impl Obstacle {
    pub(crate) fn unavailable(words: impl Into<String>) -> Obstacle {
        Obstacle { code: Code::LinkUnavailable, words: words.into() }
    }
}

/// What is known about one link to one destination.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// Which.
    pub kind: LinkKind,
    /// Why it cannot be used; `None` where it can, as far as can be told before it is tried.
    pub obstacle: Option<Obstacle>,
    /// Its round trip, where it was measured.
    pub round_trip: Option<Duration>,
    /// What a short probe reached in bytes per second, where it was made.
    pub bytes_per_s: Option<f64>,
}

impl Seen {
    /// A link of which nothing was measured.
    #[must_use]
    pub fn usable(kind: LinkKind) -> Seen {
        Seen { kind, obstacle: None, round_trip: None, bytes_per_s: None }
    }

    /// A link that is not to be had.
    #[must_use]
    pub fn not(kind: LinkKind, obstacle: Obstacle) -> Seen {
        Seen { obstacle: Some(obstacle), ..Seen::usable(kind) }
    }

    fn tried(&self, words: String) -> LinkTried {
        LinkTried {
            link: self.kind.name().to_owned(),
            words,
            round_trip_us: self.round_trip.map(|time| time.as_secs_f64() * 1e6),
            probe_bytes_per_s: self.bytes_per_s,
        }
    }
}

/// A link to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub kind: LinkKind,
    /// Whether the lanes are to be asked for without encryption.
    pub plaintext: bool,
    /// Why it comes at this place.
    pub reason: String,
}

/// The links to try, and what was learnt of all of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    candidates: Vec<Candidate>,
    at: usize,
    reason: String,
    tried: Vec<LinkTried>,
}

/// No link is to be had.
#[derive(Debug, Clone, PartialEq)]
pub struct NoLink {
    /// The code that the report gets.
    pub code: Code,
    /// Why, for each link that was asked for.
    pub words: String,
    /// Every link that was looked at.
    pub tried: Vec<LinkTried>,
}

/// Puts the links that were seen in order.
///
/// # Errors
/// None of them may be used, or can.
pub fn choose(wanted: Wanted, protection: Protection, seen: &[Seen]) -> Result<Choice, NoLink> {
    let seen: Vec<Seen> = seen.iter().map(|seen| protected(wanted, protection, seen)).collect();
    let asked = |seen: &&Seen| wanted == Wanted::Auto || wanted == Wanted::Only(seen.kind);
    let mut usable: Vec<&Seen> = seen.iter().filter(asked).filter(|seen| seen.obstacle.is_none()).collect();
    usable.sort_by(|a, b| before(a, b));
    let reasons: Vec<(&Seen, String)> = usable.iter().map(|one| (*one, reason(wanted, one, &seen))).collect();
    let mut tried: Vec<LinkTried> = Vec::new();
    for (index, (one, reason)) in reasons.iter().enumerate() {
        let place = if index == 0 { "taken" } else { "in reserve" };
        tried.push(one.tried(format!("{place}: {reason}")));
    }
    let obstacles: Vec<(&Seen, &Obstacle)> =
        seen.iter().filter_map(|one| one.obstacle.as_ref().map(|obstacle| (one, obstacle))).collect();
    tried.extend(obstacles.iter().map(|(one, obstacle)| one.tried(format!("not to be had: {}", obstacle.words))));
    let candidates: Vec<Candidate> = reasons
        .into_iter()
        .map(|(one, reason)| Candidate { kind: one.kind, plaintext: is_plain(one.kind, protection), reason })
        .collect();
    match candidates.first().map(|first| first.reason.clone()) {
        Some(reason) => Ok(Choice { candidates, at: 0, reason, tried }),
        None => Err(none(wanted, &obstacles, tried)),
    }
}

fn is_plain(kind: LinkKind, protection: Protection) -> bool {
    match kind {
        LinkKind::Rdma => true,
        LinkKind::Quic => false,
        LinkKind::Tcp => protection == Protection::PlainText,
    }
}

/// The same with an obstacle where it would protect less than was asked for.
fn protected(wanted: Wanted, protection: Protection, seen: &Seen) -> Seen {
    let too_little = seen.kind == LinkKind::Rdma && protection == Protection::Encrypted && seen.obstacle.is_none();
    let obstacle = too_little.then(|| Obstacle {
        code: Code::PlaintextRefused,
        words: match wanted {
            Wanted::Only(_) => "RDMA does not encrypt, and encryption was asked for: one of the two has to go".to_owned(),
            Wanted::Auto => "RDMA does not encrypt, and encryption was asked for".to_owned(),
        },
    });
    Seen { obstacle: obstacle.or_else(|| seen.obstacle.clone()), ..seen.clone() }
}

/// The words of a refusal: the link that was asked for, or, where any would have done, TCP first, which every host has.
fn none(wanted: Wanted, obstacles: &[(&Seen, &Obstacle)], tried: Vec<LinkTried>) -> NoLink {
    let of = |kind: LinkKind| obstacles.iter().find(|(seen, _)| seen.kind == kind).map(|(_, obstacle)| *obstacle);
    let (mut code, mut words) = (Code::LinkUnavailable, String::new());
    for kind in LinkKind::ALL.into_iter().rev().filter(|kind| wanted == Wanted::Auto || wanted == Wanted::Only(*kind)) {
        let Some(obstacle) = of(kind) else { continue };
        if words.is_empty() {
            (code, words) = (obstacle.code, obstacle.words.clone());
        } else if kind != LinkKind::Rdma {
            // That there is no RDMA either is in the list; it seldom helps to know.
            words = format!("{words}; {kind}: {}", obstacle.words);
        }
    }
    if let Wanted::Only(kind) = wanted {
        words = format!("{kind} was asked for by name: {words}");
    }
    NoLink { code, words, tried }
}

/// Which of two usable links comes first.
fn before(a: &Seen, b: &Seen) -> Ordering {
    let rank = |seen: &Seen| u8::from(seen.kind != LinkKind::Rdma);
    rank(a).cmp(&rank(b)).then_with(|| match (a.bytes_per_s, b.bytes_per_s) {
        (Some(left), Some(right)) => faster(right, left).then_with(|| match (a.round_trip, b.round_trip) {
            (Some(left), Some(right)) => faster(left.as_secs_f64(), right.as_secs_f64()).then_with(|| tcp_first(a, b)),
            _ => tcp_first(a, b),
        }),
        // What was measured is known to work.
        (left, right) => right.is_some().cmp(&left.is_some()).then_with(|| tcp_first(a, b)),
    })
}

fn tcp_first(a: &Seen, b: &Seen) -> Ordering {
    (a.kind != LinkKind::Tcp).cmp(&(b.kind != LinkKind::Tcp))
}

/// The order of two figures, the same where they are alike.
fn faster(a: f64, b: f64) -> Ordering {
    if (a - b).abs() <= ALIKE * a.max(b) { Ordering::Equal } else { a.total_cmp(&b) }
}

/// Why a usable link comes where it comes.
fn reason(wanted: Wanted, one: &Seen, seen: &[Seen]) -> String {
    if let Wanted::Only(kind) = wanted {
        return format!("{kind} was asked for by name");
    }
    let other = match one.kind {
        LinkKind::Rdma => return "both hosts have it and declare the fabric between them trusted".to_owned(),
        LinkKind::Quic => LinkKind::Tcp,
        LinkKind::Tcp => LinkKind::Quic,
    };
    let Some(other) = seen.iter().find(|seen| seen.kind == other) else { return "nothing else was looked at".to_owned() };
    if let Some(obstacle) = &other.obstacle {
        return format!("{} is not to be had ({})", other.kind, obstacle.words);
    }
    let (Some(ours), Some(theirs)) = (one.bytes_per_s, other.bytes_per_s) else {
        return format!("{} was not measured", if one.bytes_per_s.is_none() { one.kind } else { other.kind });
    };
    let figures = format!("({} against {} MB/s in a short probe)", mega(ours), mega(theirs));
    match faster(ours, theirs) {
        Ordering::Greater => format!("faster than {} {figures}", other.kind),
        Ordering::Less => format!("slower than {} {figures}", other.kind),
        Ordering::Equal => {
            let us = |seen: &Seen| seen.round_trip.map_or_else(|| "?".to_owned(), |time| time.as_micros().to_string());
            format!("as fast as {} {figures}, round trip {} against {} µs", other.kind, us(one), us(other))
        }
    }
}

fn mega(bytes_per_s: f64) -> String {
    let value = bytes_per_s / 1e6;
    if value < 10.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

impl Choice {
    /// The link to try now.
    #[must_use]
    pub fn current(&self) -> Option<&Candidate> {
        self.candidates.get(self.at)
    }

    /// Every link that may be tried, best first.
    #[must_use]
    pub fn candidates(&self) -> &[Candidate] {
        &self.candidates
    }

    /// Why the current link, with what became of those before it.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// What was learnt of every link, for the report.
    #[must_use]
    pub fn tried(&self) -> &[LinkTried] {
        &self.tried
    }

    /// The current link failed before the first round, as `words` say: goes on to the next, if there is one.
    pub fn fall_back(&mut self, words: &str) -> Option<&Candidate> {
        let failed = self.current()?.kind;
        let note = |tried: &mut Vec<LinkTried>, kind: LinkKind, words: String| {
            if let Some(entry) = tried.iter_mut().find(|entry| entry.link == kind.name()) {
                entry.words = words;
            }
        };
        note(&mut self.tried, failed, format!("failed before the first round: {words}"));
        self.at += 1;
        let next = self.candidates.get(self.at)?;
        self.reason = format!("{failed} failed before the first round ({words})");
        note(&mut self.tried, next.kind, format!("taken: {}", self.reason));
        Some(next)
    }
}

/// Why the next link may be tried after this end, in the words of the failure; `None` where it must not be: pages had begun to
/// move, or another link would change nothing.
#[must_use]
pub fn may_fall_back(kind: LinkKind, outcome: &SourceOutcome, rounds_begun: bool) -> Option<String> {
    if rounds_begun {
        return None;
    }
    match outcome {
        SourceOutcome::Refused(refusal) => {
            // Only of RDMA that is the link's fault; where the operator asked for plain text, it is the answer to that.
            let untrusted = kind == LinkKind::Rdma && refusal.code == Code::PlaintextRefused;
            let of_link = untrusted || matches!(refusal.code, Code::LinkUnavailable | Code::LinkLost | Code::Timeout);
            of_link.then(|| refusal.words())
        }
        SourceOutcome::Aborted { code, words, guest_runs: true, .. } => {
            matches!(code, Code::LinkUnavailable | Code::LinkLost).then(|| words.clone())
        }
        SourceOutcome::Aborted { .. } | SourceOutcome::Committed | SourceOutcome::InDoubt { .. } => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_proto::event::Side;
    use limosa_proto::wire::message::Refusal;

    const AUTO: Wanted = Wanted::Auto;
    const USUAL: Protection = Protection::EncryptedOrTrusted;

    fn measured(kind: LinkKind, mega: f64, us: u64) -> Seen {
        Seen { round_trip: Some(Duration::from_micros(us)), bytes_per_s: Some(mega * 1e6), ..Seen::usable(kind) }
    }

    fn blocked(kind: LinkKind, code: Code, words: &str) -> Seen {
        Seen::not(kind, Obstacle { code, words: words.into() })
    }

    fn order(wanted: Wanted, protection: Protection, seen: &[Seen]) -> String {
        match choose(wanted, protection, seen) {
            Ok(choice) => choice
                .candidates()
                .iter()
                .map(|one| format!("{}{}", one.kind, if one.plaintext { " plain" } else { "" }))
                .collect::<Vec<_>>()
                .join(", "),
            Err(none) => format!("{}: {}", none.code, none.words),
        }
    }

    #[test]
    fn the_order_in_every_case() {
        use LinkKind::{Quic, Rdma, Tcp};
        let rdma = Seen::usable(Rdma);
        let (tcp, quic) = (measured(Tcp, 800.0, 60), measured(Quic, 400.0, 120));
        let no_quic = blocked(Quic, Code::Timeout, "no answer");
        let no_rdma = blocked(Rdma, Code::LinkUnavailable, "no device");
        let no_tcp = blocked(Tcp, Code::LinkLost, "tcp is cut");
        let plain = Protection::PlainText;
        let cases: Vec<(&str, Wanted, Protection, Vec<Seen>, &str)> = vec![
            ("trusted RDMA first", AUTO, USUAL, vec![tcp.clone(), quic.clone(), rdma.clone()], "rdma plain, tcp, quic"),
            (
                "RDMA never where encryption is demanded",
                AUTO,
                Protection::Encrypted,
                vec![tcp.clone(), quic.clone(), rdma.clone()],
                "tcp, quic",
            ),
            ("the faster", AUTO, USUAL, vec![tcp.clone(), measured(Quic, 900.0, 120), no_rdma.clone()], "quic, tcp"),
            ("the faster, turned around", AUTO, USUAL, vec![measured(Quic, 700.0, 20), tcp.clone()], "tcp, quic"),
            ("alike: the shorter round trip", AUTO, USUAL, vec![tcp.clone(), measured(Quic, 790.0, 20)], "quic, tcp"),
            ("alike in both: TCP", AUTO, USUAL, vec![measured(Quic, 820.0, 58), tcp.clone()], "tcp, quic"),
            ("UDP blocked", AUTO, USUAL, vec![tcp.clone(), no_quic.clone(), no_rdma.clone()], "tcp"),
            ("TCP blocked", AUTO, USUAL, vec![no_tcp.clone(), quic.clone()], "quic"),
            ("what was measured before what was not", AUTO, USUAL, vec![Seen::usable(Tcp), quic.clone()], "quic, tcp"),
            ("nothing was measured", AUTO, USUAL, vec![Seen::usable(Quic), Seen::usable(Tcp)], "tcp, quic"),
            ("plain text only where asked for", AUTO, plain, vec![tcp.clone(), quic.clone()], "tcp plain, quic"),
            ("QUIC is never plain", AUTO, plain, vec![tcp.clone(), measured(Quic, 1200.0, 9)], "quic, tcp plain"),
            ("one and no other", Wanted::Only(Quic), USUAL, vec![tcp.clone(), quic.clone(), rdma.clone()], "quic"),
            (
                "one or none",
                Wanted::Only(Rdma),
                USUAL,
                vec![no_rdma.clone(), tcp.clone()],
                "link-unavailable: rdma was asked for by name: no device",
            ),
            ("none", AUTO, USUAL, vec![no_tcp, no_quic, no_rdma], "link-lost: tcp is cut; quic: no answer"),
        ];
        for (name, wanted, protection, seen, expected) in cases {
            assert_eq!(order(wanted, protection, &seen), expected, "{name}");
        }
        let words = order(Wanted::Only(Rdma), Protection::Encrypted, &[rdma]);
        assert!(words.starts_with("plaintext-refused: rdma was asked for by name: RDMA does not encrypt"), "{words}");
    }

    #[test]
    fn reasons_and_figures_are_in_the_report() {
        let seen = [
            measured(LinkKind::Tcp, 800.0, 60),
            measured(LinkKind::Quic, 4.25, 120),
            blocked(LinkKind::Rdma, Code::LinkUnavailable, "no device"),
        ];
        let choice = choose(AUTO, USUAL, &seen).unwrap();
        assert_eq!(choice.reason(), "faster than quic (800 against 4.2 MB/s in a short probe)");
        let words: Vec<_> = choice.tried().iter().map(|one| format!("{} {}", one.link, one.words)).collect();
        assert_eq!(
            words,
            [
                "tcp taken: faster than quic (800 against 4.2 MB/s in a short probe)",
                "quic in reserve: slower than tcp (4.2 against 800 MB/s in a short probe)",
                "rdma not to be had: no device"
            ]
        );
        assert_eq!(choice.tried().first().unwrap().probe_bytes_per_s, Some(8e8));
        assert_eq!(choice.tried().first().unwrap().round_trip_us, Some(60.0));
        let blocked = [measured(LinkKind::Tcp, 800.0, 60), blocked(LinkKind::Quic, Code::Timeout, "no answer")];
        assert_eq!(choose(AUTO, USUAL, &blocked).unwrap().reason(), "quic is not to be had (no answer)");
    }

    #[test]
    fn falling_back_goes_down_the_list_and_says_why() {
        let seen = [Seen::usable(LinkKind::Rdma), measured(LinkKind::Tcp, 800.0, 60), measured(LinkKind::Quic, 400.0, 60)];
        let mut choice = choose(AUTO, USUAL, &seen).unwrap();
        assert_eq!(choice.current().unwrap().kind, LinkKind::Rdma);
        assert_eq!(choice.fall_back("memlock is too low").unwrap().kind, LinkKind::Tcp);
        assert_eq!(choice.reason(), "rdma failed before the first round (memlock is too low)");
        assert_eq!(choice.tried().first().unwrap().words, "failed before the first round: memlock is too low");
        assert!(choice.tried().get(1).unwrap().words.starts_with("taken: rdma failed"));
        assert_eq!(choice.fall_back("cut").unwrap().kind, LinkKind::Quic);
        assert_eq!(choice.fall_back("cut"), None);
        assert_eq!(choice.current(), None);
    }

    #[test]
    fn only_a_link_that_failed_before_the_first_round_is_replaced() {
        let refused = |code| SourceOutcome::Refused(Refusal::one(code, "so"));
        let aborted = |code, guest_runs| SourceOutcome::Aborted { code, words: "so".into(), by: Side::Source, guest_runs };
        for code in Code::ALL {
            let of_link = matches!(code, Code::LinkUnavailable | Code::LinkLost);
            let tcp = LinkKind::Tcp;
            assert_eq!(may_fall_back(tcp, &refused(*code), false).is_some(), of_link || *code == Code::Timeout, "{code}");
            assert_eq!(may_fall_back(tcp, &aborted(*code, true), false).is_some(), of_link, "{code}");
            for outcome in [refused(*code), aborted(*code, true)] {
                assert_eq!(may_fall_back(tcp, &outcome, true), None, "{code}: pages had begun to move");
            }
            assert_eq!(may_fall_back(tcp, &aborted(*code, false), false), None, "{code}: the guest does not run");
        }
        assert!(may_fall_back(LinkKind::Rdma, &refused(Code::PlaintextRefused), false).is_some());
        assert_eq!(may_fall_back(LinkKind::Tcp, &SourceOutcome::Committed, false), None);
        assert_eq!(may_fall_back(LinkKind::Tcp, &SourceOutcome::InDoubt { words: "so".into() }, false), None);
    }

    #[test]
    fn names_are_read() {
        assert_eq!("auto".parse(), Ok(Wanted::Auto));
        for kind in LinkKind::ALL {
            assert_eq!(kind.name().parse(), Ok(Wanted::Only(kind)));
        }
        assert!("pigeon".parse::<Wanted>().unwrap_err().contains("auto, tcp, quic or rdma"));
    }
}

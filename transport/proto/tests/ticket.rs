//! Tickets: the matrix of what a ticket is worthless for, its golden bytes, damage of every kind, and that one is used once,
//! also across a restart. Whether agents ask for tickets is not here.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use limosa_proto::identity::{HostId, MigrationId, Nonce, OperatorId, VmId};
use limosa_proto::ticket::{
    Action, BYTES_MAX, Claims, Context, Grant, Guests, LIFE_MAX_S, Link, Links, NamePattern, Operator, PREFIX, SKEW_MAX_S,
    STANDING_LIFE_MAX_S, STRANGERS_CODE, STRANGERS_WORDS, SpentNonces, TEXT_BYTES_MAX, Ticket, TicketBytes, TicketRefusal,
    verify,
};
use proptest::prelude::*;
use ring::signature::{Ed25519KeyPair, KeyPair as _};

const SOURCE: HostId = HostId([0xaa; 32]);
const HERE: HostId = HostId([0xbb; 32]);
const VM: VmId = VmId([0x11; 16]);
const BEGINS: u64 = 1_800_000_000;
const ENDS: u64 = BEGINS + 600;
const SKEW: u64 = 30;

fn key(seed: u8) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
}

fn id(key: &Ed25519KeyPair) -> OperatorId {
    OperatorId(key.public_key().as_ref().try_into().unwrap())
}

fn claims() -> Claims {
    Claims {
        action: Action::Migrate,
        guests: Guests::One(VM),
        source: SOURCE,
        destination: HERE,
        links: Links::of(&[Link::Tcp, Link::Quic]),
        not_before: BEGINS,
        not_after: ENDS,
        nonce: Nonce([0x22; 16]),
        issuer: id(&key(7)),
    }
}

fn signature(claims: &Claims, key: &Ed25519KeyPair) -> [u8; 64] {
    key.sign(&claims.to_sign()).as_ref().try_into().unwrap()
}

fn ticket(claims: Claims) -> Ticket {
    let signature = signature(&claims, &key(7));
    Ticket::sealed(claims, signature).unwrap()
}

/// A signed ticket whose claims make no sense: `sealed` would not make it, another program could.
fn senseless(claims: &Claims) -> Ticket {
    let domain = self::claims().to_sign().len() - (ticket(self::claims()).emit().len() - 64);
    let bytes = [&claims.to_sign()[domain..], &signature(claims, &key(7))].concat();
    Ticket::decode(&bytes).unwrap()
}

struct World {
    operators: Vec<Operator>,
    spent: SpentNonces,
}

impl World {
    fn new() -> World {
        let operator = Operator { id: id(&key(7)), name: "ana".into(), actions: vec![Action::Migrate] };
        World { operators: vec![operator], spent: SpentNonces::new(16) }
    }

    fn context(&self) -> Context<'_> {
        Context {
            now: BEGINS + 10,
            skew: SKEW,
            here: HERE,
            source: SOURCE,
            vm: VM,
            vm_name: "web-1",
            action: Action::Migrate,
            link: Some(Link::Tcp),
            operators: &self.operators,
            spent: &self.spent,
            migration: None,
        }
    }

    fn grant(&self) -> Grant {
        verify(&ticket(claims()), &self.context()).unwrap()
    }
}

/// The refusal's code, after its words were found to name each of `words`.
fn refused(ticket: &Ticket, context: &Context<'_>, words: &[&str]) -> &'static str {
    let refusal = verify(ticket, context).unwrap_err();
    let said = refusal.to_string();
    for word in words {
        assert!(said.contains(word), "{word:?} is not in {said:?}");
    }
    assert_eq!(refusal.told(false), (STRANGERS_CODE, STRANGERS_WORDS.to_owned()));
    assert_eq!(refusal.told(true), (refusal.code(), said));
    refusal.code()
}

#[test]
fn a_good_ticket_is_good_for_what_it_says() {
    let world = World::new();
    let grant = world.grant();
    assert_eq!((grant.operator.as_str(), grant.action, grant.single_use), ("ana", Action::Migrate, true));
    let quic = Context { link: Some(Link::Quic), ..world.context() };
    assert!(verify(&ticket(claims()), &quic).is_ok());
    // The name does not matter where the id is given.
    assert!(verify(&ticket(claims()), &Context { vm_name: "db", ..world.context() }).is_ok());
}

#[test]
fn a_ticket_is_worthless_for_anything_else() {
    let world = World::new();
    let (good, context) = (ticket(claims()), world.context());
    let other = HostId([0xcc; 32]);
    assert_eq!(refused(&good, &Context { vm: VmId([0x12; 16]), ..context }, &["1111", "1212", "web-1"]), "ticket-guest");
    let (named, peer) = (SOURCE.to_string(), other.to_string());
    assert_eq!(refused(&good, &Context { source: other, ..context }, &[&named, &peer]), "ticket-source");
    let here = HERE.to_string();
    assert_eq!(refused(&good, &Context { here: other, ..context }, &[&here, &peer]), "ticket-destination");
    assert_eq!(refused(&good, &Context { action: Action::Check, ..context }, &["migrate", "--action check"]), "ticket-action");
    assert_eq!(refused(&good, &Context { link: Some(Link::Rdma), ..context }, &["tcp, quic", "rdma"]), "ticket-link");
}

#[test]
fn only_a_trusted_operator_counts_and_only_for_what_it_is_trusted_with() {
    let mut world = World::new();
    let issuer = id(&key(7)).to_string();
    let strangers = Context { operators: &[], ..world.context() };
    assert_eq!(refused(&ticket(claims()), &strangers, &[&issuer, &HERE.to_string(), "limosa operator id"]), "ticket-issuer");
    // Signed by another who is trusted too, in the name of the first.
    world.operators.push(Operator { id: id(&key(8)), name: "ben".into(), actions: vec![Action::Migrate] });
    let forged = signature(&claims(), &key(8));
    assert!(matches!(Ticket::sealed(claims(), forged), Err(TicketRefusal::Signature { .. })));
    let mut bytes = ticket(claims()).emit();
    let at = bytes.len() - 64;
    bytes[at..].copy_from_slice(&forged);
    assert_eq!(refused(&Ticket::decode(&bytes).unwrap(), &world.context(), &[&issuer]), "ticket-signature");
    // Signed without the domain: nothing else that an operator's key signs is a ticket.
    let bare: [u8; 64] = key(7).sign(&ticket(claims()).emit()[..at]).as_ref().try_into().unwrap();
    bytes[at..].copy_from_slice(&bare);
    assert_eq!(refused(&Ticket::decode(&bytes).unwrap(), &world.context(), &[]), "ticket-signature");
    // Trusted, but not with this.
    let check = ticket(Claims { action: Action::Check, ..claims() });
    let asked = Context { action: Action::Check, ..world.context() };
    assert_eq!(refused(&check, &asked, &["ana", &issuer, "check"]), "ticket-not-delegated");
    world.operators[0].actions.push(Action::Check);
    assert!(verify(&check, &Context { action: Action::Check, ..world.context() }).is_ok());
}

#[test]
fn clocks_may_differ_by_the_skew_and_not_by_a_second_more() {
    let world = World::new();
    let good = ticket(claims());
    let at = |now, skew| Context { now, skew, ..world.context() };
    for (now, skew) in [(BEGINS - SKEW, SKEW), (ENDS + SKEW, SKEW), (BEGINS, 0), (ENDS, 0)] {
        assert!(verify(&good, &at(now, skew)).is_ok(), "{now} {skew}");
    }
    assert_eq!(refused(&good, &at(BEGINS - SKEW - 1, SKEW), &["in 31 s", "30 s of skew", "timedatectl"]), "ticket-not-yet");
    assert_eq!(refused(&good, &at(ENDS + SKEW + 1, SKEW), &["31 s ago", "30 s of skew", "timedatectl"]), "ticket-expired");
    assert_eq!(refused(&good, &at(BEGINS - 1, 0), &["in 1 s", "0 s of skew"]), "ticket-not-yet");
    assert_eq!(refused(&good, &at(ENDS + 1, 0), &["1 s ago"]), "ticket-expired");
    assert_eq!(refused(&good, &at(ENDS + 90_061, 0), &["1 days 1 h ago"]), "ticket-expired");
    // No setting goes beyond what used tickets are remembered for.
    assert!(verify(&good, &at(ENDS + SKEW_MAX_S, u64::MAX)).is_ok());
    assert_eq!(refused(&good, &at(ENDS + SKEW_MAX_S + 1, u64::MAX), &[]), "ticket-expired");
    assert_eq!(refused(&good, &at(0, SKEW), &[]), "ticket-not-yet");
    assert_eq!(refused(&good, &at(u64::MAX, SKEW), &[]), "ticket-expired");
}

#[test]
fn claims_that_make_no_sense_are_neither_made_nor_accepted() {
    let world = World::new();
    let pattern = || Guests::Named("*".parse().unwrap());
    let bad = [
        Claims { not_after: BEGINS, ..claims() },
        Claims { not_after: BEGINS - 1, ..claims() },
        Claims { not_after: BEGINS + LIFE_MAX_S + 1, ..claims() },
        Claims { guests: pattern(), not_after: BEGINS + STANDING_LIFE_MAX_S + 1, ..claims() },
        Claims { not_before: 0, not_after: u64::MAX, ..claims() },
        Claims { destination: SOURCE, ..claims() },
        Claims { links: Links::of(&[]), ..claims() },
    ];
    for claims in bad {
        let made = Ticket::sealed(claims.clone(), signature(&claims, &key(7)));
        assert!(matches!(made, Err(TicketRefusal::Senseless { .. })), "{claims:?}");
        assert_eq!(refused(&senseless(&claims), &world.context(), &[]), "ticket-senseless", "{claims:?}");
    }
    for claims in [
        Claims { not_after: BEGINS + LIFE_MAX_S, ..claims() },
        Claims { guests: pattern(), not_after: BEGINS + STANDING_LIFE_MAX_S, ..claims() },
    ] {
        assert!(verify(&ticket(claims), &world.context()).is_ok());
    }
}

#[test]
fn a_ticket_is_good_once_also_after_a_restart() {
    let mut world = World::new();
    let mut file = world.spent.emit();
    let grant = world.grant();
    file.extend(world.spent.spend(&grant, None, BEGINS + 10).unwrap().unwrap());
    assert_eq!(refused(&ticket(claims()), &world.context(), &["2222", "make another"]), "ticket-used");
    // Two sessions may both have verified it before either spent it.
    assert_eq!(world.spent.spend(&grant, None, BEGINS + 11).unwrap_err().code(), "ticket-used");
    // The agent starts anew; another ticket is as good as before.
    let (spent, good) = SpentNonces::read(&file, 16).unwrap();
    assert_eq!(good, file.len());
    world.spent = spent;
    assert_eq!(refused(&ticket(claims()), &world.context(), &[]), "ticket-used");
    let other = ticket(Claims { nonce: Nonce([0x23; 16]), ..claims() });
    let grant = verify(&other, &world.context()).unwrap();
    file.extend(world.spent.spend(&grant, None, BEGINS + 12).unwrap().unwrap());
    // A crash in the middle of that line: it was not durable, so the ticket was not acted upon. The first one stays used.
    let torn = &file[..file.len() - 3];
    let (spent, good) = SpentNonces::read(torn, 16).unwrap();
    assert!(good < torn.len() && spent.count() == 1);
    assert_eq!(refused(&ticket(claims()), &Context { spent: &spent, ..world.context() }, &[]), "ticket-used");
    assert!(verify(&other, &Context { spent: &spent, ..world.context() }).is_ok());
}

#[test]
fn another_attempt_at_the_same_migration_is_no_second_use() {
    let mut world = World::new();
    let (first, other) = (Some(MigrationId([1; 16])), Some(MigrationId([2; 16])));
    let grant = world.grant();
    let line = world.spent.spend(&grant, first, BEGINS).unwrap();
    assert!(line.is_some());
    let by = |spent: &SpentNonces, migration| {
        let code = verify(&ticket(claims()), &Context { spent, migration, ..World::new().context() }).err();
        code.map(|refusal| refusal.code())
    };
    assert_eq!((by(&world.spent, first), by(&world.spent, other)), (None, Some("ticket-used")));
    assert_eq!(by(&world.spent, None), Some("ticket-used"), "a question is no attempt at a migration");
    assert_eq!(world.spent.spend(&grant, first, BEGINS), Ok(None), "a further attempt writes no further line");
    assert_eq!(world.spent.spend(&grant, other, BEGINS).unwrap_err().code(), "ticket-used");
    // A restart remembers the use and not the attempt; closing has the same effect without one.
    let (restarted, _) = SpentNonces::read(&world.spent.emit(), 16).unwrap();
    assert_eq!(by(&restarted, first), Some("ticket-used"));
    world.spent.close(grant.nonce);
    assert_eq!(by(&world.spent, first), Some("ticket-used"));
    assert_eq!(world.spent.spend(&grant, first, BEGINS).unwrap_err().code(), "ticket-used");
}

#[test]
fn what_is_presented_shows_itself_to_nobody() {
    let good = ticket(claims());
    let bytes = TicketBytes::from(&good);
    assert_eq!(bytes.parse().unwrap(), good);
    assert_eq!(format!("{bytes:?}"), format!("TicketBytes({} bytes)", good.emit().len()));
    assert_eq!(TicketBytes::of(vec![1, 2]).parse().unwrap_err().code(), "ticket-malformed");
}

#[test]
fn used_tickets_are_remembered_as_long_as_any_clock_setting_could_accept_them() {
    let mut world = World::new();
    let grant = world.grant();
    world.spent.spend(&grant, None, BEGINS).unwrap();
    let last = ENDS + SKEW_MAX_S;
    assert_eq!(world.spent.forget(last), 0);
    let latest = Context { now: last, skew: SKEW_MAX_S, ..world.context() };
    assert_eq!(refused(&ticket(claims()), &latest, &[]), "ticket-used");
    assert_eq!((world.spent.forget(last + 1), world.spent.count()), (1, 0));
    // The clock goes back, and the agent has been restarted since: nobody knows what was used.
    let (spent, _) = SpentNonces::read(&world.spent.emit(), 16).unwrap();
    assert_eq!(spent, world.spent);
    assert_eq!(refused(&ticket(claims()), &world.context(), &["clock"]), "ticket-forgotten");
    let later = ticket(Claims { not_after: ENDS + 1, ..claims() });
    assert!(verify(&later, &world.context()).is_ok(), "a ticket that ends later was never forgotten");
}

#[test]
fn there_is_room_for_so_many_and_no_promise_is_dropped_for_another() {
    let mut world = World::new();
    for number in 0..16 {
        let grant = Grant { nonce: Nonce([number; 16]), ..world.grant() };
        assert!(world.spent.spend(&grant, None, BEGINS).unwrap().is_some());
    }
    let more = Grant { nonce: Nonce([99; 16]), ..world.grant() };
    assert_eq!(world.spent.spend(&more, None, BEGINS).unwrap_err(), TicketRefusal::Full { count: 16 });
    assert_eq!(world.spent.spend(&more, None, ENDS + SKEW_MAX_S).unwrap_err().code(), "ticket-full");
    // Once they have expired there is room by itself.
    let later = Grant { not_after: ENDS + 100_000, ..more };
    assert!(world.spent.spend(&later, None, ENDS + SKEW_MAX_S + 1).is_ok());
    assert_eq!(world.spent.count(), 1);
    // A file with more than there is room for is kept whole.
    let many: Vec<u8> = (0..16).fold(world.spent.emit(), |mut file, number| {
        let mut spent = SpentNonces::new(1);
        file.extend(spent.spend(&Grant { nonce: Nonce([number; 16]), ..later.clone() }, None, BEGINS).unwrap().unwrap());
        file
    });
    assert_eq!(SpentNonces::read(&many, 2).unwrap().0.count(), 17);
}

#[test]
fn files_of_used_tickets_that_cannot_be_trusted_are_not_read() {
    let mut spent = SpentNonces::new(4);
    let world = World::new();
    let mut file = spent.emit();
    file.extend(spent.spend(&world.grant(), None, BEGINS).unwrap().unwrap());
    file.extend(spent.spend(&Grant { nonce: Nonce([1; 16]), ..world.grant() }, None, BEGINS).unwrap().unwrap());
    assert_eq!(SpentNonces::read(&file, 4).unwrap().0, spent);
    assert_eq!(SpentNonces::read(&[], 4).unwrap(), (SpentNonces::new(4), 0));
    for cut in 0..file.len() {
        let (found, good) = SpentNonces::read(&file[..cut], 4).unwrap();
        assert!(good <= cut && found.count() <= 2, "cut at {cut}");
    }
    let last = file[..file.len() - 1].iter().rposition(|byte| *byte == b'\n').unwrap();
    for bit in 0..last * 8 {
        let mut bytes = file.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(SpentNonces::read(&bytes, 4).is_err(), "bit {bit}");
    }
    let line = |body: &str| limosa_proto::lines::line_of(body);
    for (bytes, words) in [
        (line("limosa-spent-tickets 2 0"), "limosa-spent-tickets 2"),
        (line("limosa-spent-tickets 1"), "begins with"),
        (b"hello\n".to_vec(), "byte 0"),
        ([line("limosa-spent-tickets 1 0"), line("nonsense 7")].concat(), "no nonce"),
    ] {
        let error = SpentNonces::read(&bytes, 4).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_standing_delegation_is_for_names_that_fit_and_not_used_up() {
    let mut world = World::new();
    let claims = Claims { guests: Guests::Named("web-*".parse().unwrap()), not_after: BEGINS + 30 * 86_400, ..claims() };
    let standing = ticket(claims);
    for vm in [VM, VmId([9; 16])] {
        let grant = verify(&standing, &Context { vm, ..world.context() }).unwrap();
        assert!(!grant.single_use);
        assert_eq!(world.spent.spend(&grant, None, BEGINS).unwrap(), None);
    }
    assert_eq!(world.spent.count(), 0);
    let other = Context { vm_name: "db-1", ..world.context() };
    assert_eq!(refused(&standing, &other, &["web-*", "db-1"]), "ticket-guest");
    let other = Context { source: HostId([0xcc; 32]), ..world.context() };
    assert_eq!(refused(&standing, &other, &[]), "ticket-source");
}

#[test]
fn patterns_fit_whole_names() {
    let fits = |pattern: &str, name: &str| pattern.parse::<NamePattern>().unwrap().fits(name);
    for (pattern, name) in [
        ("web", "web"),
        ("*", ""),
        ("*", "web"),
        ("web-*", "web-"),
        ("*-db", "a-db"),
        ("a*b*c", "a-b-b-c"),
        ("**", "x"),
        ("a*a", "aa"),
    ] {
        assert!(fits(pattern, name), "{pattern} {name}");
    }
    for (pattern, name) in [
        ("web", "webs"),
        ("web", "Web"),
        ("web-*", "web"),
        ("a*a", "a"),
        ("a*b*c", "a-c"),
        ("*b", "ba"),
        ("a*", "ba"),
        ("a.c", "abc"),
    ] {
        assert!(!fits(pattern, name), "{pattern} {name}");
    }
    for bad in ["", "web?", "a b", "ä", "[ab]", &"a".repeat(65)] {
        assert!(bad.parse::<NamePattern>().is_err(), "{bad}");
    }
}

/// The layout by hand, and a text whose signature is OpenSSL's (`openssl pkeyutl -sign -rawin` over the domain and the bytes).
#[test]
fn a_ticket_has_its_golden_bytes() {
    let ticket = ticket(claims());
    let bytes = ticket.emit();
    let head = [
        vec![1, 1, 3, 0],
        vec![0xaa; 32],
        vec![0xbb; 32],
        vec![0x00, 0xd2, 0x49, 0x6b, 0, 0, 0, 0],
        vec![0x58, 0xd4, 0x49, 0x6b, 0, 0, 0, 0],
        vec![0x22; 16],
        id(&key(7)).0.to_vec(),
        vec![16],
        vec![0x11; 16],
    ]
    .concat();
    assert_eq!(&bytes[..head.len()], head);
    assert_eq!(ticket.text(), GOLDEN);
    assert_eq!(Ticket::parse(&format!("  {GOLDEN}\n")).unwrap(), ticket);
    let standing = self::ticket(Claims { guests: Guests::Named("web-*".parse().unwrap()), action: Action::Check, ..claims() });
    assert_eq!(&standing.emit()[..4], [1, 2, 3, 1]);
    assert_eq!(&standing.emit()[132..138], b"\x05web-*");
}

const GOLDEN: &str = "limosa-ticket-1.AQEDAKqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqu7u7u7u7u7u7u7u7u7u7u7u7u7u7u7u7u7u7u7u7u7sA0klrAAAAAFjUSWsAAAAAIiIiIiIiIiIiIiIiIiIiIupKbGPinFIKvvVQexMuxfmVR3auvr57kkIe6mkURtIsEBEREREREREREREREREREREn_DfgihvYQgN-ixQb3IHF88SOeHvPW3ZP33gj43xn86rfj2WnfnPYo0aidtMzYznqAWsZ5EyzF3-gtPbeWzIL";

#[test]
fn every_truncation_and_every_flipped_bit_is_refused() {
    let world = World::new();
    for claims in [claims(), Claims { guests: Guests::Named("web-*".parse().unwrap()), ..claims() }] {
        let bytes = ticket(claims).emit();
        for cut in 0..bytes.len() {
            assert_eq!(Ticket::decode(&bytes[..cut]).unwrap_err().code(), "ticket-malformed", "cut at {cut}");
        }
        assert_eq!(Ticket::decode(&[&bytes[..], &[0]].concat()).unwrap_err().code(), "ticket-malformed");
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(ticket) = Ticket::decode(&bytes) {
                let code = refused(&ticket, &world.context(), &[]);
                assert!(matches!(code, "ticket-signature" | "ticket-issuer"), "bit {bit}: {code}");
            }
        }
    }
    let text = ticket(claims()).text();
    for at in 0..text.len() {
        assert!(Ticket::parse(&text[..at]).is_err(), "cut at {at}");
        for other in ["A", "-", "_", "=", " ", "~"].into_iter().filter(|other| !text[at..].starts_with(other)) {
            let changed = format!("{}{other}{}", &text[..at], &text[at + 1..]);
            let found = Ticket::parse(&changed).and_then(|ticket| verify(&ticket, &world.context()));
            assert!(found.is_err(), "{other} at {at}");
        }
    }
}

#[test]
fn texts_are_bounded_and_versions_told() {
    let longest = Guests::Named("a".repeat(64).parse().unwrap());
    let text = ticket(Claims { guests: longest, ..claims() }).text();
    assert_eq!(text.len(), TEXT_BYTES_MAX);
    assert!(Ticket::parse(&text).is_ok());
    let code = |text: &str| Ticket::parse(text).unwrap_err().code();
    assert_eq!(code(&format!("{text}A")), "ticket-malformed");
    assert_eq!(code(&"A".repeat(10 << 20)), "ticket-malformed");
    assert_eq!(code("limosa-ticket-2.AAAA"), "ticket-version");
    assert_eq!(code("limosa-ticket-x.AAAA"), "ticket-malformed");
    assert_eq!(code(&format!("limosa-ticket-{}.AAAA", "9".repeat(200))), "ticket-malformed");
    assert_eq!(code(""), "ticket-malformed");
    assert_eq!(code(PREFIX), "ticket-malformed");
    assert!(Ticket::parse("limosa-ticket-2.AAAA").unwrap_err().to_string().contains("version 2"));
    let mut bytes = ticket(claims()).emit();
    bytes[0] = 9;
    assert_eq!(Ticket::decode(&bytes).unwrap_err().code(), "ticket-version");
    assert!(bytes.len() < BYTES_MAX);
}

#[test]
fn logs_do_not_show_what_could_be_presented() {
    let ticket = ticket(claims());
    let (shown, text) = (format!("{ticket:?}"), ticket.text());
    let end = ticket.emit().len() - 64;
    assert!(!shown.contains(&text[text.len() - 40..]) && !shown.contains(&format!("{:?}", &ticket.emit()[end..])), "{shown}");
}

fn any_claims() -> impl Strategy<Value = Claims> {
    let guests = prop_oneof![
        any::<[u8; 16]>().prop_map(|id| Guests::One(VmId(id))),
        "[a-z0-9*._-]{1,64}".prop_map(|text| Guests::Named(text.parse().unwrap())),
    ];
    let hosts = (any::<[u8; 32]>(), any::<[u8; 32]>()).prop_filter("two hosts", |(a, b)| a != b);
    let action = prop_oneof![Just(Action::Migrate), Just(Action::Check)];
    let links = prop::sample::subsequence(Link::ALL.to_vec(), 1..=3);
    (guests, hosts, any::<[u8; 16]>(), 0..u64::MAX / 2, 1..=LIFE_MAX_S, action, links).prop_map(
        |(guests, (source, destination), nonce, not_before, life, action, links)| Claims {
            action,
            guests,
            source: HostId(source),
            destination: HostId(destination),
            links: Links::of(&links),
            not_before,
            not_after: not_before + life,
            nonce: Nonce(nonce),
            issuer: id(&key(7)),
        },
    )
}

/// Written apart from `NamePattern`: by trying every length for a star.
fn fits_by_trying(pattern: &[u8], name: &[u8]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some((b'*', rest)) => (0..=name.len()).any(|skip| fits_by_trying(rest, &name[skip..])),
        Some((byte, rest)) => name.first() == Some(byte) && fits_by_trying(rest, &name[1..]),
    }
}

proptest! {
    #[test]
    fn tickets_go_there_and_back(claims in any_claims()) {
        let ticket = ticket(claims.clone());
        let read = Ticket::decode(&ticket.emit()).unwrap();
        prop_assert_eq!(read.claims(), &claims);
        let text = ticket.text();
        prop_assert!(text.len() <= TEXT_BYTES_MAX && !text.contains(char::is_whitespace));
        prop_assert_eq!(Ticket::parse(&text).unwrap(), ticket);
    }

    /// Bytes have one reading and claims one writing: what decodes is what would be written.
    #[test]
    fn any_bytes_are_judged_without_harm(mut bytes in prop::collection::vec(any::<u8>(), 0..300), form in any::<bool>()) {
        if let Some([version, action, links, kind]) = bytes.first_chunk_mut::<4>().filter(|_| form) {
            (*version, *action, *links, *kind) = (1, 1 + *action % 2, *links % 8, *kind % 2);
        }
        if let Ok(ticket) = Ticket::decode(&bytes) {
            prop_assert_eq!(ticket.emit(), bytes);
            prop_assert!(verify(&ticket, &World::new().context()).is_err());
        }
    }

    #[test]
    fn any_text_is_judged_without_harm(text in any::<String>(), body in "[A-Za-z0-9_-]{0,400}") {
        prop_assert!(Ticket::parse(&text).is_err());
        let text = format!("{PREFIX}{body}");
        prop_assert!(Ticket::parse(&text).and_then(|ticket| verify(&ticket, &World::new().context())).is_err());
    }

    /// Whoever asks for anything but what the ticket says is refused, whatever the ticket.
    #[test]
    fn a_ticket_fits_exactly_what_it_says(claims in any_claims(), late in 0..LIFE_MAX_S * 2, which in 0..6u8) {
        let world = World::new();
        let mut actions = world.operators.clone();
        actions[0].actions = Action::ALL.to_vec();
        let link = Link::ALL.into_iter().find(|link| claims.links.has(*link));
        let (vm, name) = match &claims.guests {
            Guests::One(id) => (*id, "any".to_owned()),
            Guests::Named(pattern) => (VM, pattern.example()),
        };
        let mut asked = Context {
            now: claims.not_before + late, skew: 0, here: claims.destination, source: claims.source, vm, vm_name: &name,
            action: claims.action, link, operators: &actions, spent: &world.spent,
            migration: None,
        };
        let in_time = asked.now <= claims.not_after;
        let ticket = ticket(claims.clone());
        prop_assert_eq!(verify(&ticket, &asked).is_ok(), in_time);
        match which {
            0 => asked.here.0[5] ^= 4,
            1 => asked.source.0[31] ^= 128,
            2 => asked.action = if asked.action == Action::Migrate { Action::Check } else { Action::Migrate },
            3 => asked.now = claims.not_before.wrapping_sub(1),
            4 => asked.now = claims.not_after + 1,
            _ => asked.operators = &[],
        }
        prop_assert!(verify(&ticket, &asked).is_err());
    }

    #[test]
    fn patterns_fit_as_trying_says(pattern in "[ab*]{1,10}", name in "[ab]{0,12}") {
        let parsed: NamePattern = pattern.parse().unwrap();
        prop_assert_eq!(parsed.fits(&name), fits_by_trying(pattern.as_bytes(), name.as_bytes()));
        prop_assert!(parsed.fits(&parsed.example()));
    }

    /// Whatever is spent, forgotten and restarted: a nonce that was spent is never accepted again, whatever the clock says.
    #[test]
    fn a_spent_ticket_never_comes_back(steps in prop::collection::vec((0..4u8, 0..8u8, 0..20_000u64), 1..60)) {
        let world = World::new();
        let mut spent = SpentNonces::new(6);
        let mut file = spent.emit();
        let mut used = std::collections::BTreeSet::new();
        for (what, number, time) in steps {
            match what {
                0 | 1 => {
                    let grant = Grant { nonce: Nonce([number; 16]), not_after: BEGINS + u64::from(number) * 1_000, ..world.grant() };
                    if let Ok(line) = spent.spend(&grant, None, BEGINS + time) {
                        prop_assert!(used.insert(number), "ticket {number} was accepted twice");
                        file.extend(line.unwrap());
                    }
                }
                2 => {
                    spent.forget(BEGINS + time);
                    file = spent.emit();
                }
                _ => spent = SpentNonces::read(&file, 6).unwrap().0,
            }
        }
    }
}

//! Statements about host keys: who must have signed, and what changing any of it does.
#![allow(clippy::unwrap_used, missing_docs)]

use limosa_proto::identity::{FleetId, HostId};
use limosa_proto::statement::{Member, Statement, StatementError, Succession};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use std::sync::atomic::{AtomicU8, Ordering};

/// A key that no other call gives.
fn key() -> Ed25519KeyPair {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    Ed25519KeyPair::from_seed_unchecked(&[NEXT.fetch_add(1, Ordering::Relaxed); 32]).unwrap()
}

fn public(key: &Ed25519KeyPair) -> [u8; 32] {
    key.public_key().as_ref().try_into().unwrap()
}

fn sign(key: &Ed25519KeyPair, message: &[u8]) -> [u8; 64] {
    key.sign(message).as_ref().try_into().unwrap()
}

fn member(key: &Ed25519KeyPair) -> Member {
    Member { host: HostId(public(key)), name: "beta".into(), address: "10.0.0.2:13560".into(), not_after: 2_000_000_000 }
}

#[test]
fn a_succession_needs_both_keys() {
    let (old, new, third) = (key(), key(), key());
    let said = Succession { old: HostId(public(&old)), new: HostId(public(&new)), until: 1_900_000_000 };
    let by = |first: &Ed25519KeyPair, second: &Ed25519KeyPair| {
        let message = said.to_sign();
        Statement::parse(&said.text(&sign(first, &message), &sign(second, &message)), None)
    };
    assert_eq!(by(&old, &new), Ok(Statement::Succession(said)));
    for (first, second, whose) in [(&third, &new, "old"), (&old, &third, "new"), (&new, &old, "old"), (&old, &old, "new")] {
        let error = by(first, second).unwrap_err();
        assert!(matches!(&error, StatementError::Signature(whom) if whom.contains(whose)), "{error}");
    }
    // Nobody is made the successor of another by the old key alone, and none comes after itself.
    let own = Succession { new: said.old, ..said };
    let text = own.text(&sign(&old, &own.to_sign()), &sign(&old, &own.to_sign()));
    assert!(matches!(Statement::parse(&text, None), Err(StatementError::Malformed(_))));
}

#[test]
fn a_member_needs_the_fleet_that_is_trusted() {
    let (fleet, other, host) = (key(), key(), key());
    let said = member(&host);
    let text = said.text(&sign(&fleet, &said.to_sign().unwrap())).unwrap();
    let by = |fleet: &Ed25519KeyPair| Statement::parse(&format!(" {text}\n"), Some(FleetId(public(fleet))));
    assert_eq!(by(&fleet), Ok(Statement::Member(said.clone())));
    assert!(matches!(by(&other), Err(StatementError::Signature(_))));
    // A host that vouches for itself is no fleet.
    assert!(matches!(by(&host), Err(StatementError::Signature(_))));
    assert_eq!(Statement::parse(&text, None), Err(StatementError::NoFleet));
    assert!(Member { name: "x".repeat(64), ..said.clone() }.to_sign().is_none());
    let odd = Member { name: "a\"b".into(), ..said };
    let text = odd.text(&sign(&fleet, &odd.to_sign().unwrap())).unwrap();
    assert!(matches!(Statement::parse(&text, Some(FleetId(public(&fleet)))), Err(StatementError::Malformed(_))));
}

#[test]
fn every_truncation_and_every_changed_letter_of_a_statement_is_refused() {
    let (old, new, fleet) = (key(), key(), key());
    let said = Succession { old: HostId(public(&old)), new: HostId(public(&new)), until: 1 };
    let succession = said.text(&sign(&old, &said.to_sign()), &sign(&new, &said.to_sign()));
    let said = member(&new);
    let member = said.text(&sign(&fleet, &said.to_sign().unwrap())).unwrap();
    let fleet = Some(FleetId(public(&fleet)));
    for text in [succession, member] {
        assert!(Statement::parse(&text, fleet).is_ok());
        for at in 0..text.len() {
            assert!(Statement::parse(&text[..at], fleet).is_err(), "cut at {at}");
            let mut bytes = text.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(Statement::parse(&changed, fleet).is_err(), "changed at {at}");
        }
        assert!(Statement::parse(&format!("{text}AAAA"), fleet).is_err());
    }
    assert!(Statement::parse(&"A".repeat(100_000), None).is_err());
}

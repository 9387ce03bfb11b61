//! Which tickets were used: their nonces, until nobody could use them any more. As a file it is one line a nonce with a
//! CRC-32 (`lines`), to be appended and synced by the caller *before* the ticket is acted upon. It opens no file.
//!
//! Forgetting goes by the clock, and clocks go back. So the latest end of what was forgotten is kept, and a ticket that ends
//! no later is refused: it might be one of those.
//!
//! A migration may take several attempts (another link, when one cannot be opened). So a used ticket is *open* to the migration
//! that used it until the caller closes it, at the latest when the guest could be committed. What is open is in memory only:
//! after a restart nothing is.

use super::verify::{Grant, TicketRefusal};
use crate::identity::{MigrationId, Nonce};
use crate::lines::{self, Damage, line_of};
use std::collections::BTreeMap;

/// Version of the file, in its first line.
const FORMAT: &str = "limosa-spent-tickets 1";

/// The nonces of used tickets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpentNonces {
    /// Until when each has to be known.
    until: BTreeMap<Nonce, u64>,
    /// Those of them that one migration may still present.
    open: BTreeMap<Nonce, MigrationId>,
    /// The latest of what was forgotten.
    forgotten_until: u64,
    most: usize,
}

/// Why a file of used tickets cannot be read: until it can, no ticket may be accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpentError {
    /// Damage that is no torn tail.
    #[error(
        "the used tickets are not readable: {0}; restore the file, or remove it once every ticket that was made before has expired"
    )]
    Damaged(#[from] Damage),
    /// Another version, or another file.
    #[error(
        "the file of used tickets begins with {found:?}, this build reads {FORMAT:?}: use the release that wrote it, or a newer one"
    )]
    Format {
        /// Its beginning.
        found: String,
    },
}

impl SpentNonces {
    /// None yet; at most `most` are remembered, and while that many are, no other ticket for one guest is accepted.
    #[must_use]
    pub fn new(most: usize) -> SpentNonces {
        SpentNonces { until: BTreeMap::new(), open: BTreeMap::new(), forgotten_until: 0, most }
    }

    /// How many are remembered.
    #[must_use]
    pub fn count(&self) -> usize {
        self.until.len()
    }

    /// Whether `migration` used it, and it is still open to it.
    fn is_open_to(&self, nonce: Nonce, migration: Option<MigrationId>) -> bool {
        migration.is_some() && self.open.get(&nonce).copied() == migration
    }

    /// Whether the ticket of `grant` may still be used, by `migration` if it is for one.
    ///
    /// # Errors
    /// It was used, or nobody knows any more.
    pub fn is_new(&self, grant: &Grant, migration: Option<MigrationId>) -> Result<(), TicketRefusal> {
        if !grant.single_use || self.is_open_to(grant.nonce, migration) {
            return Ok(());
        }
        if self.until.contains_key(&grant.nonce) {
            return Err(TicketRefusal::Used { nonce: grant.nonce });
        }
        if grant.remembered_until() <= self.forgotten_until {
            return Err(TicketRefusal::Forgotten);
        }
        Ok(())
    }

    /// Uses the ticket of `grant` up; it stays open to `migration`. Gives the line that has to be appended and synced before
    /// anything is done with the grant; if that fails the ticket stays used. None for a standing delegation, which is not used
    /// up, and for a further attempt at the same migration.
    ///
    /// # Errors
    /// It was used, between the verifying and now too; or there is no room.
    pub fn spend(&mut self, grant: &Grant, migration: Option<MigrationId>, now: u64) -> Result<Option<Vec<u8>>, TicketRefusal> {
        self.is_new(grant, migration)?;
        if !grant.single_use || self.is_open_to(grant.nonce, migration) {
            return Ok(None);
        }
        if self.until.len() >= self.most {
            self.forget(now);
        }
        if self.until.len() >= self.most {
            return Err(TicketRefusal::Full { count: self.until.len() });
        }
        let until = grant.remembered_until();
        self.until.insert(grant.nonce, until);
        if let Some(migration) = migration {
            self.open.insert(grant.nonce, migration);
        }
        Ok(Some(line(grant.nonce, until)))
    }

    /// No attempt may present it any more, not even at the migration that used it.
    pub fn close(&mut self, nonce: Nonce) {
        self.open.remove(&nonce);
    }

    /// Forgets what nobody can use any more; says how many. The file may then be written anew from [`SpentNonces::emit`].
    pub fn forget(&mut self, now: u64) -> usize {
        let before = self.until.len();
        let latest = &mut self.forgotten_until;
        self.until.retain(|_, until| {
            let keep = *until >= now;
            *latest = if keep { *latest } else { (*latest).max(*until) };
            keep
        });
        self.open.retain(|nonce, _| self.until.contains_key(nonce));
        before - self.until.len()
    }

    /// A whole file.
    #[must_use]
    pub fn emit(&self) -> Vec<u8> {
        let mut bytes = line_of(&format!("{FORMAT} {}", self.forgotten_until));
        self.until.iter().for_each(|(nonce, until)| bytes.extend(line(*nonce, *until)));
        bytes
    }

    /// What a file holds, and how many of its bytes: what is behind them was torn by a crash, before the ticket of that line
    /// was acted upon, and is to be cut off. With 0 there is no file yet, and [`SpentNonces::emit`] begins it.
    /// More than `most` are all kept.
    ///
    /// # Errors
    /// Damage before the tail, or no file of this version.
    pub fn read(bytes: &[u8], most: usize) -> Result<(SpentNonces, usize), SpentError> {
        let lines = lines::read(bytes)?;
        let mut spent = SpentNonces::new(most);
        let mut bodies = lines.bodies.iter();
        match bodies.next() {
            Some((_, head)) => {
                let forgotten = head.strip_prefix(FORMAT).and_then(|rest| rest.strip_prefix(' ')).and_then(|n| n.parse().ok());
                let format = || SpentError::Format { found: head.chars().take(40).collect() };
                spent.forgotten_until = forgotten.ok_or_else(format)?;
            }
            // A whole line that is none of ours was torn by no crash.
            None if bytes.contains(&b'\n') => {
                return Err(Damage { offset: 0, words: "its first line is none of ours".into() }.into());
            }
            None => {}
        }
        for (range, body) in bodies {
            let parsed = body.split_once(' ').and_then(|(nonce, until)| Some((nonce.parse().ok()?, until.parse().ok()?)));
            let (nonce, until): (Nonce, u64) =
                parsed.ok_or_else(|| Damage { offset: range.start, words: "no nonce and time".into() })?;
            let known = spent.until.entry(nonce).or_insert(until);
            *known = until.max(*known);
        }
        Ok((spent, lines.good))
    }
}

fn line(nonce: Nonce, until: u64) -> Vec<u8> {
    line_of(&format!("{nonce} {until}"))
}

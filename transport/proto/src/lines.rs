//! Lines that survive a crash: each has a CRC-32 before its body, so that a tail torn in the middle of a write is told from
//! damage. It opens no file and knows no meaning of a body: appending, syncing and cutting off are the caller's.

use std::ops::Range;

/// The lines of a file, up to the torn tail if there is one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Lines<'t> {
    /// Bodies of the good lines, oldest first, and where each of their lines is.
    pub bodies: Vec<(Range<usize>, &'t str)>,
    /// Bytes up to the end of the last good line. What is behind them was torn by a crash and has to be cut off before
    /// anything is appended.
    pub good: usize,
}

/// Damage that is no torn tail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("damaged at byte {offset} ({words})")]
pub struct Damage {
    /// Where the bad line begins.
    pub offset: usize,
    /// What is wrong with it.
    pub words: String,
}

/// `body` as a line; it must have no line feed in it.
#[must_use]
pub fn line_of(body: &str) -> Vec<u8> {
    debug_assert!(!body.contains('\n'), "a line feed would make two lines of it");
    format!("{:08x} {body}\n", crc32fast::hash(body.as_bytes())).into_bytes()
}

/// Reads lines as [`line_of`] makes them.
///
/// # Errors
/// A bad line that a good one follows: a crash leaves no such thing.
pub fn read(bytes: &[u8]) -> Result<Lines<'_>, Damage> {
    let mut lines = Lines::default();
    let mut offset = 0;
    let mut bad: Option<Damage> = None;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let end = offset + line.len();
        match (body_of(line), bad.take()) {
            (Ok(_), Some(damage)) => return Err(damage),
            (Ok(body), None) => {
                lines.bodies.push((offset..end, body));
                lines.good = end;
            }
            (Err(_), Some(first)) => bad = Some(first),
            (Err(words), None) => bad = Some(Damage { offset, words: words.to_owned() }),
        }
        offset = end;
    }
    Ok(lines)
}

fn body_of(line: &[u8]) -> Result<&str, &'static str> {
    let text = std::str::from_utf8(line).map_err(|_| "no text")?;
    let text = text.strip_suffix('\n').ok_or("its end is missing")?;
    let (crc, body) = text.split_once(' ').ok_or("no checksum")?;
    // Eight digits exactly: `from_str_radix` alone takes a sign and upper case, and a flipped bit must not make another good line.
    let digits = crc.len() == 8 && crc.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    let crc = u32::from_str_radix(crc, 16).ok().filter(|_| digits).ok_or("no checksum")?;
    if crc == crc32fast::hash(body.as_bytes()) { Ok(body) } else { Err("its checksum is wrong") }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn file() -> Vec<u8> {
        [line_of("one"), line_of("two words"), line_of("")].concat()
    }

    fn bodies(bytes: &[u8]) -> Result<Vec<&str>, Damage> {
        read(bytes).map(|lines| lines.bodies.into_iter().map(|(_, body)| body).collect())
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(line_of("one"), b"7a6c86f1 one\n");
        assert_eq!(bodies(&file()).unwrap(), ["one", "two words", ""]);
        assert_eq!(read(&[]).unwrap(), Lines::default());
    }

    #[test]
    fn a_tail_torn_at_any_byte_costs_its_own_line_only() {
        let whole = file();
        let ends: Vec<usize> = read(&whole).unwrap().bodies.iter().map(|(range, _)| range.end).collect();
        for cut in 0..whole.len() {
            let lines = read(&whole[..cut]).unwrap();
            let kept = ends.iter().filter(|end| **end <= cut).count();
            assert_eq!(lines.bodies.len(), kept, "cut at {cut}");
            assert_eq!(lines.good, ends.get(kept.wrapping_sub(1)).copied().unwrap_or(0), "cut at {cut}");
        }
    }

    #[test]
    fn a_flipped_bit_before_the_last_line_is_damage_and_in_it_a_torn_tail() {
        let whole = file();
        let last = read(&whole).unwrap().bodies.last().unwrap().0.start;
        for at in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[at / 8] ^= 1 << (at % 8);
            match bodies(&bytes) {
                Err(damage) => assert!(at / 8 < last && damage.offset <= at / 8, "bit {at}"),
                // The line feed before the last line, gone, makes one bad line of both.
                Ok(found) => assert!(at / 8 >= last - 1 && found.len() < 3, "bit {at}: {found:?}"),
            }
        }
    }
}

//! What is fuzzed: each target takes any bytes and fails by a panic. The same functions are run by `tests/fuzz` for seconds and
//! by libFuzzer (`fuzz/`) for as long as one likes. No target depends on time or chance, so that what fails once fails again.

mod bytes;
mod destination;
mod ends;
mod source;

/// Takes any bytes.
pub(crate) type Target = fn(&[u8]);

/// Every target by its name; its corpus is the folder of that name in `tests/fuzz/corpus`.
pub(crate) const TARGETS: [(&str, Target); 11] = [
    ("control", bytes::control),
    ("message", bytes::message),
    ("lane", bytes::lane),
    ("journal", bytes::journal),
    ("snapshot", bytes::snapshot),
    ("plug", bytes::plug),
    ("learn", bytes::learn),
    ("text", bytes::text),
    ("plug-ends", ends::ends),
    ("source", source::source),
    ("destination", destination::destination),
];

/// Bytes that are taken from the front.
struct Taken<'a>(&'a [u8]);

impl<'a> Taken<'a> {
    fn u8(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// As many bytes as the next one says, or what is left.
    fn chunk(&mut self) -> &'a [u8] {
        let most = self.u8().map_or(0, usize::from).min(self.0.len());
        let (chunk, rest) = self.0.split_at(most);
        self.0 = rest;
        chunk
    }
}

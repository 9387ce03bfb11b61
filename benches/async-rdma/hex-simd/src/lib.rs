//! Stand-in for hex-simd 0.5, as much of it as async-rdma 0.5.0 calls (to print a GUID). The published crate cannot be
//! resolved: every version of its dependency simd-abstraction 0.5 is yanked. It uses no SIMD.
#![forbid(unsafe_code)]

use std::mem::MaybeUninit;

/// Which letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AsciiCase {
    /// a to f.
    Lower,
    /// A to F.
    Upper,
}

/// Where digits are written.
#[derive(Debug)]
pub struct OutBuf<'a>(&'a mut [MaybeUninit<u8>]);

impl<'a> OutBuf<'a> {
    /// Over memory that may hold anything.
    pub fn from_uninit_mut(bytes: &'a mut [MaybeUninit<u8>]) -> OutBuf<'a> {
        OutBuf(bytes)
    }
}

/// The digits of `bytes`, two for each, in `out`.
///
/// # Errors
/// `out` is too short.
pub fn encode_as_str<'a>(bytes: &[u8], out: OutBuf<'a>, case: AsciiCase) -> Result<&'a str, &'static str> {
    let digit = |value: u8| char::from_digit(value.into(), 16).unwrap_or('0');
    let text: String = bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect();
    let text = if case == AsciiCase::Upper { text.to_uppercase() } else { text };
    let place = out.0.get_mut(..text.len()).ok_or("no room for the digits")?;
    std::str::from_utf8(place.write_copy_of_slice(text.as_bytes())).map_err(|_| "digits are ASCII")
}

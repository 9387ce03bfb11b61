//! What travels between a lab machine and the world outside of it: one connection is one command, and a connection is a
//! sequence of frames. The bytes of the command's own streams are carried exactly. It starts nothing itself.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::io::{ErrorKind, Read, Write};

/// Where the agent inside a machine listens, in the control network of the machine.
pub const PORT: u16 = 77;

/// No frame carries more; longer streams are cut into frames.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// To the machine, first and once: a [`Request`] as JSON.
    Request = 1,
    /// To the machine: bytes for the command's standard input.
    Input = 2,
    /// To the machine: the end of standard input.
    InputEnd = 3,
    /// To the machine: a signal for the command's process group, one byte.
    Signal = 4,
    /// From the machine: the command runs; its process id in decimal.
    Started = 5,
    /// From the machine: bytes of standard output.
    Stdout = 6,
    /// From the machine: bytes of standard error.
    Stderr = 7,
    /// From the machine, last: an [`End`] as JSON.
    End = 8,
    /// From the machine, last: the command could not be started; why, in words.
    Failed = 9,
}

const KINDS: [Kind; 9] = [
    Kind::Request,
    Kind::Input,
    Kind::InputEnd,
    Kind::Signal,
    Kind::Started,
    Kind::Stdout,
    Kind::Stderr,
    Kind::End,
    Kind::Failed,
];

/// A command to run inside.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Request {
    /// The program and its arguments.
    pub words: Vec<String>,
    /// Added to the machine's own environment.
    pub environment: Vec<(String, String)>,
    /// The working folder; `/` when there is none.
    pub folder: Option<String>,
    /// After so many milliseconds it is ended; never when there is none.
    pub limit_ms: Option<u64>,
    /// Whether what the machine knows of the outer machine's files is forgotten first: they may have been rebuilt.
    pub fresh: bool,
    /// The terminal to give it, when a person sits at the other end.
    pub terminal: Option<Terminal>,
}

/// The size of a terminal.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Terminal {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Its exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Whether it was ended because its time was over.
    pub timed_out: bool,
}

impl End {
    /// One number for a shell: the exit code, 124 when the time was over (as `timeout` has it), 128 and the signal's number.
    pub fn status(&self) -> i32 {
        match (self.timed_out, self.code, self.signal) {
            (true, _, _) => 124,
            (false, Some(code), _) => code,
            (false, None, signal) => 128 + signal.unwrap_or(0),
        }
    }
}

/// Writes one frame.
///
/// # Errors
/// The connection is broken, or the payload is longer than [`PAYLOAD_BYTES_MAX`].
pub fn write_frame(to: &mut impl Write, kind: Kind, payload: &[u8]) -> Result<()> {
    ensure!(payload.len() <= PAYLOAD_BYTES_MAX, "a frame of {} bytes is too long", payload.len());
    let length = u32::try_from(payload.len())?;
    let mut bytes = Vec::with_capacity(5 + payload.len());
    bytes.push(kind as u8);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(payload);
    to.write_all(&bytes).context("writing to the lab's control connection")
}

/// Reads one frame; none at the end of the connection between two frames.
///
/// # Errors
/// The connection breaks inside a frame, or what arrives is no frame.
pub fn read_frame(from: &mut impl Read) -> Result<Option<(Kind, Vec<u8>)>> {
    let mut kind = [0u8; 1];
    loop {
        match from.read(&mut kind) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("reading from the lab's control connection"),
        }
    }
    let mut length = [0u8; 4];
    from.read_exact(&mut length).context("reading the length of a frame")?;
    let length = usize::try_from(u32::from_le_bytes(length))?;
    ensure!(length <= PAYLOAD_BYTES_MAX, "a frame that says it has {length} bytes");
    let Some(kind) = KINDS.into_iter().find(|k| *k as u8 == kind[0]) else {
        bail!("a frame of the unknown kind {}", kind[0]);
    };
    let mut payload = vec![0u8; length];
    from.read_exact(&mut payload).context("reading the payload of a frame")?;
    Ok(Some((kind, payload)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_as_they_went_in() {
        let mut bytes = Vec::new();
        for kind in KINDS {
            write_frame(&mut bytes, kind, &[kind as u8, 0, 255, b'\n']).unwrap();
        }
        write_frame(&mut bytes, Kind::Stdout, &[]).unwrap();
        let mut from = bytes.as_slice();
        for kind in KINDS {
            assert_eq!(read_frame(&mut from).unwrap(), Some((kind, vec![kind as u8, 0, 255, b'\n'])));
        }
        assert_eq!(read_frame(&mut from).unwrap(), Some((Kind::Stdout, Vec::new())));
        assert_eq!(read_frame(&mut from).unwrap(), None);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        assert!(write_frame(&mut Vec::new(), Kind::Input, &vec![0; PAYLOAD_BYTES_MAX + 1]).is_err());
        for bad in [&[99u8, 0, 0, 0, 0][..], &[1, 255, 255, 255, 255], &[1, 4, 0, 0, 0, 1], &[1, 0]] {
            assert!(read_frame(&mut &bad[..]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_end_is_one_number_for_a_shell() {
        assert_eq!(End { code: Some(3), signal: None, timed_out: false }.status(), 3);
        assert_eq!(End { code: None, signal: Some(9), timed_out: false }.status(), 137);
        assert_eq!(End { code: None, signal: Some(15), timed_out: true }.status(), 124);
    }
}

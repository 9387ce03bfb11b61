//! Small files of the state directory, replaced as a whole: after a crash the old one is there or the new one, never a half.

use crate::journal::sync_directory;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Puts `bytes` in place of `file`, durably, readable by its owner only.
pub(crate) fn replace_file(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = file.with_extension("new");
    let mut new = File::options().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    new.write_all(bytes)?;
    new.sync_all()?;
    std::fs::rename(&beside, file)?;
    sync_directory(file.parent().unwrap_or(Path::new("/")))
}

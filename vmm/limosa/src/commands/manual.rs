//! `limosa completions` and `limosa man`: made from the definition of the command line.

use super::Ended;
use crate::args::Cli;
use clap::CommandFactory as _;
use limosa_agent::api::{ApiError, exit};
use std::io::Write as _;
use std::path::Path;

pub(crate) fn completions(shell: clap_complete::Shell) -> Ended {
    let mut bytes = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "limosa", &mut bytes);
    print(&bytes)
}

pub(crate) fn man(directory: Option<&Path>) -> Ended {
    let failed = |e: std::io::Error| ApiError::refused("write", format!("the manual cannot be written: {e}"));
    if let Some(directory) = directory {
        std::fs::create_dir_all(directory).map_err(failed)?;
        clap_mangen::generate_to(Cli::command(), directory).map_err(failed)?;
        return Ok(exit::DONE);
    }
    let mut bytes = Vec::new();
    clap_mangen::Man::new(Cli::command()).render(&mut bytes).map_err(failed)?;
    print(&bytes)
}

fn print(bytes: &[u8]) -> Ended {
    // A reader that has seen enough, such as `head`, is no failure.
    let _ = std::io::stdout().lock().write_all(bytes);
    Ok(exit::DONE)
}

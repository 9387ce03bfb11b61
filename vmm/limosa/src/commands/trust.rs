//! `limosa host trust`: by name, id and address; by the address alone, whose key a person compares, as ssh does; or by a file of
//! hosts. Nothing is trusted that was not said: by an id, by a person, or by `--yes`.

use super::{Context, Ended, strange};
use crate::args_who::TrustArgs;
use crate::output;
use limosa_agent::api::{Answer, ApiError, HostInfo, Request};
use limosa_agent::hosts::read_file;
use std::io::{BufRead as _, IsTerminal as _, Read as _, Write as _};

/// Most that is read of standard input.
const LINE_BYTES_MAX: u64 = 4096;
/// Letters of an id that are shown together.
const GROUP: usize = 4;

pub(crate) fn run(context: &Context, args: TrustArgs) -> Ended {
    if let Some(file) = &args.file {
        let hosts = read_file(file).map_err(|e| ApiError::usage("hosts", e.to_string()))?;
        return context.ask_done(&Request::HostTrustAll(hosts));
    }
    if let Some(statement) = args.statement {
        let text = if statement == "-" { read_line()? } else { statement };
        return context.ask_done(&Request::HostStatement { text });
    }
    let TrustArgs { words, fingerprint, yes, .. } = args;
    match words.as_slice() {
        [name, id, address] => {
            let given = HostInfo { name: name.clone(), id: id.clone(), address: address.clone() };
            if fingerprint.is_some_and(|fingerprint| id.parse() != Ok(fingerprint)) {
                return Err(ApiError::usage("fingerprint", "the id and --fingerprint are not the same; one of them is enough"));
            }
            context.ask_done(&Request::HostTrust(given))
        }
        [name, address] => by_address(context, Some(name), address, fingerprint.map(|id| id.to_string()).as_deref(), yes),
        [address] => by_address(context, None, address, fingerprint.map(|id| id.to_string()).as_deref(), yes),
        _ => Err(ApiError::usage("host", "NAME ID ADDRESS, NAME ADDRESS or ADDRESS is needed")),
    }
}

fn read_line() -> Result<String, ApiError> {
    let mut line = String::new();
    let read = std::io::stdin().lock().take(LINE_BYTES_MAX).read_line(&mut line);
    read.map(|_| line).map_err(|e| ApiError::usage("input", format!("standard input: {e}")))
}

/// Asks the host for its key, and a person whether it is the right one.
fn by_address(context: &Context, name: Option<&str>, address: &str, expected: Option<&str>, yes: bool) -> Ended {
    let shown = match context.ask(&Request::HostAsk { address: address.to_owned() })? {
        Answer::Host(host) => host,
        other => return Err(strange(&other)),
    };
    output::note(format!("limosa: the host at {} shows the key\n\n    {}\n", shown.address, grouped(&shown.id)));
    if !shown.name.is_empty() {
        output::note(format!("limosa: that key is trusted here already, as {}", shown.name));
    }
    let trust = match expected {
        Some(expected) if expected != shown.id => {
            let words = format!(
                "the host at {} has another key than the one expected:\n    {}\nNothing is trusted.",
                shown.address,
                grouped(expected)
            );
            return Err(ApiError::refused("fingerprint", words));
        }
        Some(_) => true,
        None if yes => true,
        None => compared()?,
    };
    if !trust {
        return Err(ApiError::refused("fingerprint", "nothing is trusted"));
    }
    let name = name.map_or_else(|| name_of(&shown), str::to_owned);
    context.ask_done(&Request::HostTrust(HostInfo { name, ..shown }))
}

/// Has a person compare.
fn compared() -> Result<bool, ApiError> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        let words = "nobody is there to compare the key with what `limosa host id` prints on that host: --fingerprint ID says what \
                     it must be, --yes takes whatever it is. Nothing is trusted";
        return Err(ApiError::refused("fingerprint", words));
    }
    let mut answer = String::new();
    let asked = write!(std::io::stderr(), "Is that what `limosa host id` prints there? (yes/no) ")
        .and_then(|()| std::io::stderr().flush())
        .and_then(|()| stdin.lock().read_line(&mut answer));
    asked.map_err(|e| ApiError::refused("input", e.to_string()))?;
    Ok(answer.trim() == "yes")
}

/// What a host is called of which only the address is known: the first address without its port.
fn name_of(host: &HostInfo) -> String {
    if !host.name.is_empty() {
        return host.name.clone();
    }
    let first = host.address.split(',').next().unwrap_or_default();
    let plain = first.rsplit_once(':').map_or(first, |(host, _)| host).trim_matches(['[', ']']);
    plain.replace([':', '%'], "-").trim_start_matches('-').to_owned()
}

/// An id in groups, for people; it may be given so too.
fn grouped(id: &str) -> String {
    let letters: Vec<char> = id.chars().collect();
    letters.chunks(GROUP).map(|group| group.iter().collect::<String>()).collect::<Vec<_>>().join("-")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use limosa_proto::identity::HostId;

    #[test]
    fn what_is_shown_in_groups_is_the_id() {
        let id = HostId([7; 32]);
        let shown = grouped(&id.to_string());
        assert_eq!((shown.len(), shown.parse::<HostId>().unwrap()), (64, id));
    }

    #[test]
    fn a_host_without_a_name_is_called_by_its_address() {
        let named = |address: &str| name_of(&HostInfo { name: String::new(), id: String::new(), address: address.into() });
        assert_eq!(named("10.0.0.2:13560,10.9.0.2:13560"), "10.0.0.2");
        assert_eq!((named("[fd00::2]:5"), named("beta.example:7")), ("fd00--2".into(), "beta.example".into()));
    }
}

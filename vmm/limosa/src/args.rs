//! The command line as typed. Nothing is resolved or done here: `plan` and `commands` do that.

use crate::args_who::{AllowCommand, FleetCommand, HostCommand};
use clap::{Args, Parser, Subcommand, ValueEnum};
use limosa_agent::checked::parse_size;
use limosa_proto::identity::{HostId, OperatorId, VmId};
use limosa_proto::ticket::{Action, Link, NamePattern};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// Live migration for KVM guests: moves a running guest to another host without stopping it.
#[derive(Debug, Parser)]
#[command(name = "limosa", version, max_term_width = 110, propagate_version = true)]
#[command(after_help = "Exit codes: 0 done; 1 refused, nothing changed; 2 usage or configuration; \
                        3 aborted, the guest runs on at the source; 4 in doubt.")]
pub(crate) struct Cli {
    /// Print results as JSON on standard output
    #[arg(long, global = true, overrides_with = "no_json")]
    pub(crate) json: bool,
    #[arg(long, global = true, hide = true)]
    pub(crate) no_json: bool,
    /// The agent's directory of sockets
    #[arg(long, global = true, value_name = "DIR", env = "LIMOSA_RUN_DIR", default_value = "/run/limosa")]
    pub(crate) run_dir: PathBuf,
    /// The agent's API socket, if it is not api.sock in the run directory
    #[arg(long, global = true, value_name = "SOCKET")]
    pub(crate) api: Option<PathBuf>,
    /// Command the agent of another machine, with your operator key: a host of `limosa operator hosts`, or its address
    #[arg(long, global = true, value_name = "HOST|ADDRESS[:PORT]", conflicts_with = "api")]
    pub(crate) host: Option<String>,
    /// The key that agent must have: what `limosa host id` prints there
    #[arg(long, global = true, value_name = "ID", requires = "host")]
    pub(crate) host_id: Option<HostId>,
    /// Your operator key
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "LIMOSA_OPERATOR_KEY",
        help = "Your operator key [default: limosa/operator.key in $XDG_CONFIG_HOME, or in ~/.config]"
    )]
    pub(crate) key: Option<PathBuf>,
    /// How logs look, on standard error
    #[arg(long, global = true, value_enum, default_value = "text")]
    pub(crate) log_format: LogFormat,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How logs look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run this host's agent: it sends and receives guests
    Agent {
        /// Its configuration
        #[arg(long, value_name = "FILE", help = "Its configuration [default: /etc/limosa/agent.toml, if it exists]")]
        config: Option<PathBuf>,
        /// Only check the configuration
        #[arg(long, overrides_with = "no_check")]
        check: bool,
        #[arg(long, hide = true)]
        no_check: bool,
        /// Fence the agent in: fewer capabilities, seccomp, Landlock, no core dumps (the default)
        #[arg(long, overrides_with = "no_sandbox")]
        sandbox: bool,
        /// Do not: only to find out whether the fences are the trouble
        #[arg(long, overrides_with = "sandbox")]
        no_sandbox: bool,
    },
    /// Run one guest (the agent starts this)
    Vmm(VmmArgs),
    /// Guests on this host
    #[command(subcommand)]
    Vm(VmCommand),
    /// Who this host is, and which hosts it trusts
    #[command(subcommand)]
    Host(HostCommand),
    /// Move a running guest to another host
    Migrate(MigrateArgs),
    /// Every reason that would stop a guest from moving to another host, and what the move would take
    Check(CheckArgs),
    /// Migrations of this host
    Jobs {
        /// Go on showing them until none is at work
        #[arg(long, overrides_with = "no_watch")]
        watch: bool,
        #[arg(long, hide = true)]
        no_watch: bool,
    },
    /// One migration: how far it is, or its report
    Job {
        id: u64,
        /// Go on showing it until it ends
        #[arg(long, overrides_with = "no_watch")]
        watch: bool,
        #[arg(long, hide = true)]
        no_watch: bool,
    },
    /// Stop a migration; the guest runs on at the source
    Cancel { id: u64 },
    /// Whom the guest of a migration belongs to: the facts of both hosts, and as a last resort a person's decision
    Verdict(VerdictArgs),
    /// Tell the network once more where a guest is
    Announce { vm: String },
    /// The rules that say from which addresses hosts may connect, and which addresses of this host take migrations
    #[command(subcommand)]
    Allow(AllowCommand),
    /// A fleet's key, which vouches for its hosts. Needs no agent
    #[command(subcommand)]
    Fleet(FleetCommand),
    /// Who you are as an operator, and which hosts you know
    #[command(subcommand)]
    Operator(OperatorCommand),
    /// Tickets: an operator's signed word that one host may move a guest to another. Needs no agent
    #[command(subcommand)]
    Ticket(TicketCommand),
    /// Two hosts on this machine, one live migration, a report
    Demo(DemoArgs),
    /// Shell completions on standard output
    Completions { shell: clap_complete::Shell },
    /// The manual page on standard output, or one page per command into a directory
    Man {
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Start the guest of a configuration file
    Start {
        #[arg(value_name = "CONFIG")]
        config: PathBuf,
    },
    /// List the guests
    List,
    /// Show one guest
    Show { vm: String },
    /// Stop a guest
    Stop { vm: String },
    /// This terminal on a guest's serial line; Ctrl-] leaves it
    Console { vm: String },
    /// Pause a guest until `vm resume`; it stays paused when it migrates and when the agent is restarted
    Pause { vm: String },
    /// Let a paused guest run on, and tell the network where it is
    Resume { vm: String },
    /// Save a guest into a file, then stop it; its disks are not in the file
    Save {
        vm: String,
        /// The file; it must not be there
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
        /// Let it run on afterwards
        #[arg(long, overrides_with = "no_keep_running")]
        keep_running: bool,
        #[arg(long, hide = true)]
        no_keep_running: bool,
    },
    /// Start a guest out of a file of `vm save`: it goes back to the time of the save
    Restore {
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Leave it paused
        #[arg(long, overrides_with = "no_paused")]
        paused: bool,
        #[arg(long, hide = true)]
        no_paused: bool,
    },
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true))]
pub(crate) struct VmmArgs {
    /// The guest's configuration
    #[arg(long, value_name = "FILE", group = "what")]
    pub(crate) config: Option<PathBuf>,
    /// Wait for a guest that comes from another host
    #[arg(long, group = "what", requires = "plug")]
    pub(crate) incoming: bool,
    /// Print as JSON which CPU this host's KVM can give to guests, and do nothing else
    #[arg(long, group = "what")]
    pub(crate) print_cpu: bool,
    /// Hold the guest's CPU to the profile in this file
    #[arg(long, value_name = "FILE", requires = "config")]
    pub(crate) cpu_limit: Option<PathBuf>,
    /// The agent's plug socket; without it the guest runs on its own
    #[arg(long, value_name = "SOCKET")]
    pub(crate) plug: Option<PathBuf>,
    /// What the agent knows this process by
    #[arg(long, value_name = "HEX", requires = "plug", hide = true)]
    pub(crate) token: Option<String>,
    /// Fence this process in by seccomp and Landlock (the default)
    #[arg(long, overrides_with = "no_sandbox")]
    pub(crate) sandbox: bool,
    /// Do not: only to find out whether the fences are the trouble
    #[arg(long, overrides_with = "sandbox")]
    pub(crate) no_sandbox: bool,
    /// Where to make the socket of the guest's serial line
    #[arg(long, value_name = "SOCKET")]
    pub(crate) console: Option<PathBuf>,
    /// The bridge of a network on this host, and its VLAN there
    #[arg(long, value_name = "NETWORK=BRIDGE[:VLAN]", value_parser = parse_bridge)]
    pub(crate) bridge: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// The guest
    pub(crate) vm: String,
    /// The destination, as `limosa host list` names it
    #[arg(long, value_name = "HOST")]
    pub(crate) to: String,
    /// What carries the guest's memory; auto takes the best that both hosts have [default: the agent's]
    #[arg(long, value_enum)]
    pub(crate) link: Option<LinkKind>,
    /// Connections for guest memory [default: the agent's]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) lanes: Option<u16>,
    /// Send guest memory in plain text over TCP; the destination must allow it too
    #[arg(long, overrides_with = "no_plaintext")]
    pub(crate) plaintext: bool,
    /// Encrypt guest memory whatever the configuration says, on a trusted fabric too: no RDMA
    #[arg(long, overrides_with = "plaintext")]
    pub(crate) no_plaintext: bool,
    /// Check pages by a keyed hash where the link does not encrypt (RDMA)
    #[arg(long, overrides_with = "no_page_check")]
    pub(crate) page_check: bool,
    /// Do not, unless the destination demands it
    #[arg(long, overrides_with = "page_check")]
    pub(crate) no_page_check: bool,
    /// The pause to aim at, such as 50ms
    #[arg(long, value_parser = parse_duration)]
    pub(crate) downtime: Option<Duration>,
    /// The longest pause, such as 2s
    #[arg(long, value_parser = parse_duration)]
    pub(crate) downtime_max: Option<Duration>,
    /// What to do when the guest writes faster than memory is sent
    #[arg(long, value_parser = ["longer-downtime", "abort"])]
    pub(crate) on_no_convergence: Option<String>,
    /// Most bytes a second, such as 500M; 0 is no limit
    #[arg(long, value_parser = size)]
    pub(crate) bandwidth: Option<u64>,
    /// Pause the guest first, then send everything at once: shortest total time, longest pause
    #[arg(long, overrides_with = "no_quick")]
    pub(crate) quick: bool,
    /// Send it while it runs
    #[arg(long, overrides_with = "quick")]
    pub(crate) no_quick: bool,
    /// An operator's ticket for it, as text or as @FILE [default: one that is made with your operator key, if you have one]
    #[arg(long, value_name = "TICKET|@FILE")]
    pub(crate) ticket: Option<String>,
    /// Print the ticket that is used, on standard error
    #[arg(long, overrides_with = "no_print_ticket")]
    pub(crate) print_ticket: bool,
    #[arg(long, hide = true)]
    pub(crate) no_print_ticket: bool,
    /// Show what would be done, and do nothing
    #[arg(long, overrides_with = "no_print_plan")]
    pub(crate) print_plan: bool,
    #[arg(long, hide = true)]
    pub(crate) no_print_plan: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// The guest
    pub(crate) vm: String,
    /// The destination, as `limosa host list` names it
    #[arg(long, value_name = "HOST")]
    pub(crate) to: String,
    /// What would carry the guest's memory [default: the agent's]
    #[arg(long, value_enum)]
    pub(crate) link: Option<LinkKind>,
    /// An operator's ticket for it, as text or as @FILE [default: one that is made with your operator key, if you have one]
    #[arg(long, value_name = "TICKET|@FILE")]
    pub(crate) ticket: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum OperatorCommand {
    /// Show your operator id; the first time, make your key
    Id,
    /// Make a host known to you, for --host
    Trust {
        /// What to call it
        name: String,
        /// What `limosa host id` prints there
        id: String,
        /// Where its agent listens: ADDRESS or ADDRESS:PORT
        #[arg(value_name = "ADDRESS[:PORT]")]
        address: String,
    },
    /// List the hosts that are known to you
    Hosts,
    /// Forget a host
    Forget { name: String },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TicketCommand {
    /// Make a ticket and sign it with your key
    Make(TicketMakeArgs),
    /// Show what a ticket says, and whether its signature fits; not whether anybody trusts its issuer
    Show {
        /// The ticket; - reads it from standard input
        ticket: String,
    },
    /// Check a ticket as its destination would: exit 0 if it is good, 1 if not. What you leave out is not compared
    Verify(TicketVerifyArgs),
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("guests").required(true))]
pub(crate) struct TicketMakeArgs {
    /// For this guest, once: its id, as `limosa vm show` prints it
    #[arg(long, value_name = "ID", group = "guests")]
    pub(crate) vm: Option<VmId>,
    /// For all guests whose name fits, as often as needed: a standing delegation, such as 'web-*'
    #[arg(long, value_name = "PATTERN", group = "guests")]
    pub(crate) vms: Option<NamePattern>,
    /// The host that may use it: what `limosa host id` prints there
    #[arg(long, value_name = "ID")]
    pub(crate) source: HostId,
    /// The host that is to accept it
    #[arg(long, value_name = "ID")]
    pub(crate) destination: HostId,
    /// What it allows: migrate or check
    #[arg(long, default_value = "migrate")]
    pub(crate) action: Action,
    /// A link that may be used, several times for several: tcp, quic or rdma [default: all]
    #[arg(long, value_name = "LINK")]
    pub(crate) link: Vec<Link>,
    /// How long it is good [default: 10m]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "until")]
    pub(crate) life: Option<Duration>,
    /// Until when, in UTC, such as 2026-12-31T18:00:00Z
    #[arg(long, value_name = "DATE", value_parser = humantime::parse_rfc3339_weak)]
    pub(crate) until: Option<SystemTime>,
    /// From when on [default: now]
    #[arg(long, value_name = "DATE", value_parser = humantime::parse_rfc3339_weak)]
    pub(crate) from: Option<SystemTime>,
}

#[derive(Debug, Args)]
pub(crate) struct TicketVerifyArgs {
    /// The ticket; - reads it from standard input
    pub(crate) ticket: String,
    /// An operator to trust, several times for several [default: you]
    #[arg(long, value_name = "ID")]
    pub(crate) operator: Vec<OperatorId>,
    /// The guest's id
    #[arg(long, value_name = "ID")]
    pub(crate) vm: Option<VmId>,
    /// The guest's name
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// The host that would present it
    #[arg(long, value_name = "ID")]
    pub(crate) source: Option<HostId>,
    /// The host that would accept it
    #[arg(long, value_name = "ID")]
    pub(crate) destination: Option<HostId>,
    /// What would be done: migrate or check
    #[arg(long)]
    pub(crate) action: Option<Action>,
    /// What would carry the guest: tcp, quic or rdma
    #[arg(long)]
    pub(crate) link: Option<Link>,
    /// When [default: now]
    #[arg(long, value_name = "DATE", value_parser = humantime::parse_rfc3339_weak)]
    pub(crate) at: Option<SystemTime>,
    /// By how much the clocks may differ [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(crate) skew: Option<Duration>,
}

/// Which link carries the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LinkKind {
    Auto,
    Tcp,
    Quic,
    Rdma,
}

impl LinkKind {
    /// As the agent calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            LinkKind::Auto => "auto",
            LinkKind::Tcp => "tcp",
            LinkKind::Quic => "quic",
            LinkKind::Rdma => "rdma",
        }
    }
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DemoArgs {
    /// What carries the guest's memory
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) link: LinkKind,
    /// Connections for guest memory
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) lanes: Option<u16>,
    /// Send guest memory in plain text
    #[arg(long, overrides_with = "no_plaintext")]
    pub(crate) plaintext: bool,
    #[arg(long, hide = true)]
    pub(crate) no_plaintext: bool,
    /// The guest's memory
    #[arg(long, value_parser = size, default_value = "512M")]
    pub(crate) memory: u64,
    /// How fast the guest writes to its memory, in bytes a second
    #[arg(long, value_parser = size, default_value = "20MB/s")]
    pub(crate) dirty: u64,
    /// Keep the demo's directory and say where it is
    #[arg(long, overrides_with = "no_keep")]
    pub(crate) keep: bool,
    #[arg(long, hide = true)]
    pub(crate) no_keep: bool,
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).ok_or_else(|| "a size such as 512M, 2G or 50MB/s is needed".into())
}

/// `50ms`, `2s`, `1m`, or a plain number of milliseconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits).unwrap_or((text, ""));
    let factor = match unit.trim() {
        "" | "ms" => Some(1),
        "s" => Some(1_000),
        "m" | "min" => Some(60_000),
        _ => None,
    };
    let ms = number.parse::<u64>().ok().zip(factor).and_then(|(number, factor)| number.checked_mul(factor));
    ms.map(Duration::from_millis).ok_or_else(|| "a duration such as 50ms or 2s is needed".into())
}

fn parse_bridge(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(network, bridge)| !network.is_empty() && !bridge.is_empty());
    let (network, bridge) = pair.ok_or("NETWORK=BRIDGE or NETWORK=BRIDGE:VLAN is needed, such as lan=br0 or lan=br0:100")?;
    limosa_agent::vm_config::bridge_and_vlan(bridge)?;
    Ok((network.into(), bridge.into()))
}

/// `limosa verdict`.
#[derive(Debug, clap::Args)]
pub(crate) struct VerdictArgs {
    /// The job's number
    pub(crate) id: u64,
    /// Decide about a guest in doubt: "here" runs it on this host, "gone" ends its VMM on this host
    #[arg(long, requires = "reason")]
    pub(crate) decide: Option<WhoseArg>,
    /// Why, written into the journal with who decided
    #[arg(long, requires = "decide")]
    pub(crate) reason: Option<String>,
    /// You have made sure of what the other host does, which cannot be asked: for "here", that it does not run the guest and
    /// never will
    #[arg(long, requires = "decide", overrides_with = "no_i_have_looked_at_the_other_host")]
    pub(crate) i_have_looked_at_the_other_host: bool,
    #[arg(long, hide = true)]
    pub(crate) no_i_have_looked_at_the_other_host: bool,
}

/// Whose a guest is.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum WhoseArg {
    /// This host's
    Here,
    /// Not this host's
    Gone,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("limosa").chain(line.split_whitespace()))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn each_command_has_help() {
        fn walk(command: &clap::Command, path: &str) {
            for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help") {
                let line = format!("{path} {}", sub.get_name());
                assert!(sub.get_about().is_some(), "{line} has no words");
                let error = parse(&format!("{line} --help")).unwrap_err();
                assert_eq!(error.kind(), clap::error::ErrorKind::DisplayHelp, "{line}");
                walk(sub, &line);
            }
        }
        walk(&Cli::command(), "");
    }

    #[test]
    fn each_switch_can_be_taken_back() {
        fn walk(command: &clap::Command, path: &str) {
            let switch = |arg: &&clap::Arg| {
                matches!(arg.get_action(), clap::ArgAction::SetTrue) && arg.get_id() != "incoming" && arg.get_id() != "print_cpu"
            };
            let names: Vec<&str> = command.get_arguments().filter(switch).filter_map(clap::Arg::get_long).collect();
            for name in names.iter().filter(|name| !name.starts_with("no-")) {
                assert!(names.contains(&format!("no-{name}").as_str()), "{path} --{name}");
            }
            command.get_subcommands().for_each(|sub| walk(sub, &format!("{path} {}", sub.get_name())));
        }
        walk(&Cli::command(), "limosa");
        let Command::Jobs { watch, .. } = parse("jobs --watch --no-watch").unwrap().command else { unreachable!() };
        assert!(!watch);
        // Clap does not let the one override the other across a command's name; `Context` does.
        assert!(parse("--json jobs --no-json").unwrap().no_json && !parse("jobs --no-json").unwrap().json);
    }

    #[test]
    fn migrate_is_read_whole() {
        let line = "migrate web --to beta --lanes 4 --plaintext --downtime 50ms --downtime-max 2s --on-no-convergence abort --bandwidth 500M --json";
        let cli = parse(line).unwrap();
        assert!(cli.json);
        let Command::Migrate(args) = cli.command else { unreachable!() };
        assert_eq!((args.vm.as_str(), args.to.as_str(), args.lanes, args.plaintext), ("web", "beta", Some(4), true));
        assert_eq!((args.downtime, args.downtime_max), (Some(Duration::from_millis(50)), Some(Duration::from_secs(2))));
        assert_eq!(args.bandwidth, Some(500 << 20));
        assert_eq!((args.link, args.page_check, args.no_page_check), (None, false, false));
        let Command::Migrate(args) = parse("migrate web --to beta --quick --no-quick").unwrap().command else { unreachable!() };
        assert!(!args.quick && args.no_quick);
        let Command::Migrate(args) = parse("migrate web --to beta --link quic --page-check --no-page-check").unwrap().command
        else {
            unreachable!()
        };
        assert_eq!((args.link, args.page_check, args.no_page_check), (Some(LinkKind::Quic), false, true));
        let Command::Migrate(args) = parse("migrate web --to beta --plaintext --no-plaintext").unwrap().command else {
            unreachable!()
        };
        assert!(!args.plaintext && args.no_plaintext);
    }

    #[test]
    fn bad_values_are_refused() {
        for line in [
            "migrate web",
            "check web",
            "migrate web --to b --lanes 17",
            "migrate web --to b --link pigeon",
            "migrate web --to b --downtime soon",
            "vmm",
            "vmm --incoming",
            "demo --link carrier-pigeon",
            "demo --memory much",
            "vmm --config a --bridge br0",
            "vm save web",
            "vm restore",
            "allow test",
            "allow add",
            "allow add 10.0.0.0/8 --priority 3",
            "allow add 10.0.0.0/8 --here --priority much",
            "allow remove",
            "host trust",
            "host trust a b c d",
            "host trust --file x y",
            "host revoke",
            "host rotate --overlap soon",
            "host trust a --statement x",
            "fleet id",
            "fleet sign a b c --key k",
            "ticket make --source x --destination y --vm z",
            "ticket make --vms web-*",
            "ticket verify",
            "vm list --host-id x --host a",
            "vm list --host a --api /run/a",
            "operator trust a",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        let (a, b, vm) = ("a".repeat(52), format!("{}q", "b".repeat(51)), "0".repeat(32));
        let make = |more: &str| parse(&format!("ticket make --source {a} --destination {b} {more}"));
        assert!(make(&format!("--vm {vm} --life 1h --link tcp --link quic")).is_ok());
        assert!(make("--vms web-* --until 2026-12-31T18:00:00Z --action check").is_ok());
        for more in [
            "".to_owned(),
            format!("--vm {vm} --vms web-*"),
            "--vms web?".into(),
            format!("--vm {vm} --life soon"),
            format!("--vm {vm} --life 1h --until 2026-12-31T18:00:00Z"),
            format!("--vm {vm} --action fly"),
            format!("--vm {vm} --link pigeon"),
        ] {
            assert!(make(&more).is_err(), "{more}");
        }
        assert!(parse("vmm --incoming --plug /run/p --token 00").is_ok());
        assert!(parse("vmm --print-cpu").is_ok() && parse("vmm --print-cpu --config a").is_err());
        assert!(parse("vmm --config a --cpu-limit b").is_ok());
        let Command::Check(args) = parse("check web --to beta --link tcp").unwrap().command else { unreachable!() };
        assert_eq!((args.vm.as_str(), args.to.as_str(), args.link), ("web", "beta", Some(LinkKind::Tcp)));
    }
}

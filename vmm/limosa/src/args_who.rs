//! The command line of `limosa host` and `limosa allow` as typed: who may talk to this host. The rest is in `args`.

use clap::{Args, Subcommand};
use limosa_proto::identity::HostId;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// Show this host's name and id
    Id,
    /// Show this host's addresses, links and RDMA devices
    Show,
    /// Show the CPU that this host gives to guests
    Cpu,
    /// Trust a host: NAME ID ADDRESS as given; or by ADDRESS alone, which is asked for its key, for you to compare
    Trust(TrustArgs),
    /// List the trusted hosts
    List,
    /// Trust a host no more; migrations with it are cut
    Remove { name: String },
    /// Refuse a key for good, trusted or not; migrations with it are cut
    Revoke {
        /// A host's id, or the name of a trusted one
        #[arg(value_name = "ID|NAME")]
        which: String,
        /// Forget that this key was revoked
        #[arg(long, overrides_with = "no_undo")]
        undo: bool,
        #[arg(long, hide = true)]
        no_undo: bool,
    },
    /// List the keys that are revoked
    Revoked,
    /// Replace this host's own key: prints the statement for the hosts that trust it (`limosa host trust --statement`)
    Rotate {
        /// How long the old key is good beside the new one
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "7d")]
        overlap: Duration,
        /// Take the new key now: when all hosts have the statement
        #[arg(long, overrides_with = "no_finish")]
        finish: bool,
        #[arg(long, hide = true)]
        no_finish: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct TrustArgs {
    /// NAME ID ADDRESS, or NAME ADDRESS, or ADDRESS: what to call it here, what `limosa host id` prints there, and where its
    /// agent listens (ADDRESS or ADDRESS:PORT, several with commas between)
    #[arg(value_name = "NAME ID ADDRESS", num_args = 1..=3, required_unless_present_any = ["file", "statement"])]
    pub(crate) words: Vec<String>,
    /// Trust all hosts of this file, or none: `[[host]]` tables with name, id and address
    #[arg(long, value_name = "HOSTS", conflicts_with_all = ["words", "fingerprint", "yes"])]
    pub(crate) file: Option<PathBuf>,
    /// Take a trusted host's new key, by the line that `limosa host rotate` printed there; - reads standard input
    #[arg(long, value_name = "LINE", conflicts_with_all = ["words", "file", "fingerprint", "yes"])]
    pub(crate) statement: Option<String>,
    /// The id that the host that is asked must show; nobody is asked then
    #[arg(long, value_name = "ID")]
    pub(crate) fingerprint: Option<HostId>,
    /// Trust whatever key the host that is asked shows: only on a network where nobody can be in between
    #[arg(long, overrides_with = "no_yes")]
    pub(crate) yes: bool,
    #[arg(long, hide = true)]
    pub(crate) no_yes: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AllowCommand {
    /// List the rules in the order in which they are asked, and where each comes from
    List {
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Which rule decides about an address: exit 0 if it is allowed, 1 if not
    Test {
        #[arg(value_name = "ADDRESS")]
        address: String,
        #[command(flatten)]
        here: Here,
        #[command(flatten)]
        config: ConfigFile,
    },
    /// Add a rule, durably
    Add {
        /// An address, a network (ADDRESS/PREFIX), or a host's name, which is looked up now
        #[arg(value_name = "RULE")]
        rule: String,
        #[command(flatten)]
        here: Here,
        /// How soon this host's address is taken: the smallest first [default: 100]
        #[arg(long, requires = "here")]
        priority: Option<u16>,
    },
    /// Remove a rule that `allow add` made; migrations that only it allowed are cut
    Remove {
        /// As it was written, or the same network
        #[arg(value_name = "RULE")]
        rule: String,
        #[command(flatten)]
        here: Here,
    },
    /// Read the lists of the configuration again, as SIGHUP does; a bad file changes nothing
    Reload,
}

#[derive(Debug, Subcommand)]
pub(crate) enum FleetCommand {
    /// Show the fleet's id, for `[trust] fleet` of its hosts; the first time, make its key
    Id {
        #[command(flatten)]
        key: FleetKeyFile,
    },
    /// Print a line for the file that `[trust] statements` of the hosts names: that a host is a member for a time
    Sign {
        /// What the fleet calls the host
        name: String,
        /// What `limosa host id` prints there
        id: HostId,
        /// Where its agent listens: ADDRESS or ADDRESS:PORT, several with commas between
        #[arg(value_name = "ADDRESS[:PORT]")]
        address: String,
        /// For how long
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "90d")]
        life: Duration,
        #[command(flatten)]
        key: FleetKeyFile,
    },
}

#[derive(Debug, Args)]
pub(crate) struct FleetKeyFile {
    /// The fleet's key: whoever has that file decides who is in the fleet
    #[arg(long, value_name = "FILE")]
    pub(crate) key: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Here {
    /// About the addresses of this host that take migrations, not about peers
    #[arg(long, overrides_with = "no_here")]
    pub(crate) here: bool,
    #[arg(long, hide = true)]
    pub(crate) no_here: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ConfigFile {
    /// Ask no agent, but this configuration
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

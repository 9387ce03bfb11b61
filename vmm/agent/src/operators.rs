//! The operators of this host: whose commands it obeys from other machines, and whose tickets count here. A short policy, with
//! nothing allowed that is not named. Root on this host needs none of it: it comes by the UNIX socket.

use crate::api::{Answer, ApiError, JobInfo, Request, Response};
use crate::checked::Section;
use crate::config::{NAME_WANTS, plain_name};
use limosa_link::TrustedHosts;
use limosa_link::trust::Trust;
use limosa_proto::identity::{HostId, OperatorId};
use limosa_proto::ticket::{self, NamePattern};
use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::Semaphore;

/// Commands from other machines that are answered at once.
const SESSIONS_MAX: usize = 32;

macro_rules! actions {
    ($($(#[doc = $doc:literal])+ $action:ident $name:literal)+) => {
        /// What an operator may do.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum OperatorAction { $($(#[doc = $doc])+ $action),+ }

        impl OperatorAction {
            /// All of them.
            pub const ALL: &'static [OperatorAction] = &[$(OperatorAction::$action),+];

            /// As configurations call it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(OperatorAction::$action => $name),+ }
            }
        }
    };
}

actions! {
    /// To see guests, jobs and hosts.
    Show "show"
    /// To move guests: away from here by a command, to here by a ticket.
    Migrate "migrate"
    /// To ask whether they could be moved, in both ways.
    Check "check"
    /// To stop a job.
    Cancel "cancel"
    /// To stop a guest.
    Stop "stop"
    /// To pause a guest.
    Pause "pause"
    /// To let a paused guest run on.
    Resume "resume"
    /// To tell the network where a guest is.
    Announce "announce"
    /// To decide about a guest in doubt.
    Decide "decide"
    /// To change which hosts are trusted.
    Trust "trust"
}

/// An operator, and what it may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operator {
    /// What it is called here.
    pub name: String,
    /// Its key.
    pub id: OperatorId,
    /// The guests, by their names.
    pub vms: Vec<NamePattern>,
    /// What may be done.
    pub actions: Vec<OperatorAction>,
    /// Where guests may be moved to from here, by the names of hosts.
    pub destinations: Vec<NamePattern>,
}

/// All operators of a host: one set, which may be replaced while commands are answered.
#[derive(Debug)]
pub struct Operators {
    all: RwLock<Arc<Vec<Operator>>>,
    keys: TrustedHosts,
    pub(crate) sessions: Arc<Semaphore>,
}

fn as_key(id: OperatorId) -> HostId {
    HostId(id.0)
}

impl Operators {
    /// These.
    #[must_use]
    pub fn new(operators: Vec<Operator>) -> Operators {
        let keys = TrustedHosts::new(operators.iter().map(|one| as_key(one.id)));
        Operators { all: RwLock::new(Arc::new(operators)), keys, sessions: Arc::new(Semaphore::new(SESSIONS_MAX)) }
    }

    /// From now on these, also for commands that are being answered.
    pub fn replace(&self, operators: Vec<Operator>) {
        self.keys.replace(Trust { keys: operators.iter().map(|one| (as_key(one.id), None)).collect(), ..Trust::default() });
        *self.all.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(operators);
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Arc<Vec<Operator>> {
        Arc::clone(&self.all.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The one with this key.
    #[must_use]
    pub fn with_key(&self, key: HostId) -> Option<Operator> {
        self.all().iter().find(|one| as_key(one.id) == key).cloned()
    }

    /// Their keys, as the port compares them; it follows every change.
    #[must_use]
    pub fn keys(&self) -> TrustedHosts {
        self.keys.clone()
    }

    /// Who of them is one of `hosts` too: nobody may be both.
    #[must_use]
    pub fn both(&self, hosts: impl IntoIterator<Item = HostId>) -> Option<Operator> {
        hosts.into_iter().find_map(|id| self.with_key(id))
    }

    /// As tickets are checked by.
    #[must_use]
    pub fn issuers(&self) -> Vec<ticket::Operator> {
        let issuer = |one: &Operator| {
            let pairs = [(OperatorAction::Migrate, ticket::Action::Migrate), (OperatorAction::Check, ticket::Action::Check)];
            let actions = pairs.into_iter().filter(|(mine, _)| one.actions.contains(mine)).map(|(_, theirs)| theirs).collect();
            ticket::Operator { id: one.id, name: one.name.clone(), actions }
        };
        self.all().iter().map(issuer).collect()
    }
}

/// The operators of a configuration file.
pub(crate) fn read(sections: Vec<Section<'_, '_>>) -> Vec<Operator> {
    let mut all: Vec<Operator> = Vec::new();
    let names: Vec<&str> = OperatorAction::ALL.iter().map(|action| action.name()).collect();
    for mut section in sections {
        let name = section.string("name").filter(|name| plain_name(name));
        let id = section.parsed::<OperatorId>("key", "what `limosa operator id` prints for that operator");
        let patterns = "a name or a pattern of names, such as \"web-*\"";
        let vms = section.parsed_list::<NamePattern>("vms", patterns).unwrap_or_default();
        let destinations = section.parsed_list::<NamePattern>("destinations", patterns).unwrap_or_default();
        let mut actions = BTreeSet::new();
        for text in section.strings("actions").unwrap_or_default() {
            match OperatorAction::ALL.iter().find(|action| action.name() == text) {
                Some(action) => drop(actions.insert(*action)),
                None => section.problem("actions", format_args!("has {text:?}"), format!("known are {}", names.join(", "))),
            }
        }
        let twice = all.iter().find(|one| Some(&one.name) == name.as_ref() || Some(one.id) == id);
        if let Some(twice) = twice {
            let words = format!("is that of \"{}\" again, or its key is", twice.name);
            section.problem("name", words, "each [[operator]] should have a name and a key of its own");
        }
        match (name, id) {
            (Some(name), Some(id)) => {
                let actions = actions.into_iter().collect();
                all.push(Operator { name, id, vms, actions, destinations });
            }
            (None, _) => section.problem("name", "is missing or none", format!("each [[operator]] needs a name: {NAME_WANTS}")),
            (_, None) => section.problem("key", "is missing or none", "each [[operator]] needs its key (`limosa operator id`)"),
        }
        section.close();
    }
    all
}

fn fits(patterns: &[NamePattern], name: &str) -> bool {
    patterns.iter().any(|pattern| pattern.fits(name))
}

fn listed(patterns: &[NamePattern]) -> String {
    if patterns.is_empty() { "none".into() } else { patterns.iter().map(NamePattern::as_str).collect::<Vec<_>>().join(", ") }
}

impl Operator {
    /// Whether a guest of this name is one of its guests.
    #[must_use]
    pub fn has_guest(&self, vm: &str) -> bool {
        fits(&self.vms, vm)
    }

    fn refused(&self, code: &str, words: String, remedy: &str, host: &str) -> ApiError {
        let name = &self.name;
        ApiError::refused(
            code,
            format!("operator {name} {words} on {host}: {remedy} of [[operator]] \"{name}\" in its agent.toml"),
        )
    }

    fn may(&self, action: OperatorAction, host: &str) -> Result<(), ApiError> {
        if self.actions.contains(&action) {
            return Ok(());
        }
        let remedy = format!("add \"{}\" to actions", action.name());
        Err(self.refused("operator-action", format!("may not {}", action.name()), &remedy, host))
    }

    fn may_with(&self, action: OperatorAction, vm: &str, host: &str) -> Result<(), ApiError> {
        self.may(action, host)?;
        if self.has_guest(vm) {
            return Ok(());
        }
        let vm: String = vm.chars().take(80).collect();
        let words = format!("may do nothing with guests called {vm} (its guests: {})", listed(&self.vms));
        Err(self.refused("operator-vm", words, "add the name to vms", host))
    }

    fn may_move(&self, action: OperatorAction, vm: &str, to: &str, host: &str) -> Result<(), ApiError> {
        self.may_with(action, vm, host)?;
        if fits(&self.destinations, to) {
            return Ok(());
        }
        let to: String = to.chars().take(80).collect();
        let words = format!("may move no guest to {to} (its destinations: {})", listed(&self.destinations));
        Err(self.refused("operator-destination", words, "add the name to destinations", host))
    }

    /// Whether this request of its may be carried out on `host`. `vm_of` gives the guest of a job.
    ///
    /// # Errors
    /// Why not, with the rule and what to do.
    pub(crate) fn permits(
        &self,
        request: &Request,
        host: &str,
        vm_of: impl Fn(u64) -> Option<String>,
    ) -> Result<OperatorAction, ApiError> {
        use OperatorAction::{self as Action, Announce, Cancel, Check, Decide, Migrate, Pause, Resume, Show, Stop};
        let here = |what: &str| {
            let words = format!("{what} works with files of the host itself: run it on {host}");
            Err(ApiError::refused("not-remote", words))
        };
        let of_job = |action, id| {
            self.may(action, host)?;
            // Of a job of others' guests not even the number is confirmed.
            vm_of(id).filter(|vm| self.has_guest(vm)).map(|_| action).ok_or_else(|| no_job(id))
        };
        let (action, checked) = match request {
            Request::VmStart { .. } => return here("`limosa vm start`"),
            Request::VmSave { .. } => return here("`limosa vm save`"),
            Request::VmRestore { .. } => return here("`limosa vm restore`"),
            Request::VmList
            | Request::Jobs { .. }
            | Request::HostId
            | Request::HostShow
            | Request::HostCpu
            | Request::HostList => (Show, self.may(Show, host)),
            Request::HostRevoked => (Show, self.may(Show, host)),
            Request::Allow(asked) if !asked.changes() => (Show, self.may(Show, host)),
            Request::HostAsk { .. }
            | Request::HostTrust(_)
            | Request::HostTrustAll(_)
            | Request::HostRemove { .. }
            | Request::HostRevoke { .. }
            | Request::HostStatement { .. }
            | Request::HostRotate { .. }
            | Request::HostRotateFinish
            | Request::Allow(_) => (Action::Trust, self.may(Action::Trust, host)),
            Request::VmShow { vm } => (Show, self.may_with(Show, vm, host)),
            Request::VmStop { vm } => (Stop, self.may_with(Stop, vm, host)),
            Request::VmPause { vm } => (Pause, self.may_with(Pause, vm, host)),
            Request::VmResume { vm } => (Resume, self.may_with(Resume, vm, host)),
            Request::Announce { vm } => (Announce, self.may_with(Announce, vm, host)),
            Request::Migrate(order) => (Migrate, self.may_move(Migrate, &order.vm, &order.to, host)),
            Request::Check(order) => (Check, self.may_move(Check, &order.vm, &order.to, host)),
            Request::Parties { vm, to } => {
                let either = if self.actions.contains(&Migrate) { Migrate } else { Check };
                (either, self.may_move(either, vm, to, host))
            }
            Request::Job { id, .. } | Request::Verdict { id, decide: None } => return of_job(Show, *id),
            Request::Verdict { id, decide: Some(_) } => return of_job(Decide, *id),
            Request::Cancel { id } => return of_job(Cancel, *id),
        };
        checked.map(|()| action)
    }

    /// What it is shown of a line: of others' guests nothing.
    pub(crate) fn shown(&self, response: Response) -> Option<Response> {
        let ours = |job: &JobInfo| self.has_guest(&job.vm);
        match response {
            Response::Progress(job) => ours(&job).then_some(Response::Progress(job)),
            Response::Result(Answer::Vms(mut vms)) => {
                vms.retain(|vm| self.has_guest(&vm.name));
                Some(Response::Result(Answer::Vms(vms)))
            }
            Response::Result(Answer::Jobs(mut jobs)) => {
                jobs.retain(ours);
                Some(Response::Result(Answer::Jobs(jobs)))
            }
            other => Some(other),
        }
    }
}

/// There is no such job, or none that the asker may know of.
pub(crate) fn no_job(id: u64) -> ApiError {
    ApiError::refused("no-job", format!("there is no job {id}; `limosa jobs` lists them"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::api::MigrateRequest;
    use crate::config::Config;
    use std::path::Path;

    const KEY: HostId = HostId([7; 32]);

    fn config(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("agent.toml"), text).map_err(|e| e.to_string())
    }

    fn ana() -> Operator {
        let id = OperatorId(KEY.0);
        let text = format!(
            "[[operator]]\nname = \"ana\"\nkey = \"{id}\"\nvms = [\"web*\"]\nactions = [\"migrate\", \"show\", \"cancel\"]\n\
             destinations = [\"beta\"]\n"
        );
        config(&text).unwrap().operators[0].clone()
    }

    fn asked(request: &Request) -> Result<OperatorAction, String> {
        let jobs = |id| [(1, "web-1"), (2, "db")].into_iter().find(|(known, _)| *known == id).map(|(_, vm)| vm.to_owned());
        ana().permits(request, "alpha", jobs).map_err(|error| format!("{}: {}", error.code, error.words))
    }

    #[test]
    fn nothing_is_allowed_that_is_not_named() {
        let order = |vm: &str, to: &str| MigrateRequest { vm: vm.into(), to: to.into(), ..MigrateRequest::default() };
        assert_eq!(asked(&Request::Migrate(order("web-1", "beta"))), Ok(OperatorAction::Migrate));
        assert_eq!(asked(&Request::Job { id: 1, watch: false }), Ok(OperatorAction::Show));
        assert_eq!(asked(&Request::Cancel { id: 1 }), Ok(OperatorAction::Cancel));
        let refused = [
            (Request::Migrate(order("db", "beta")), "operator-vm"),
            (Request::Migrate(order("web-1", "gamma")), "operator-destination"),
            (Request::Check(order("web-1", "beta")), "operator-action"),
            (Request::VmShow { vm: "db".into() }, "operator-vm"),
            (Request::VmStop { vm: "web-1".into() }, "operator-action"),
            (Request::HostRemove { name: "beta".into() }, "operator-action"),
            (Request::Job { id: 2, watch: false }, "no-job"),
            (Request::Job { id: 3, watch: false }, "no-job"),
            (Request::Cancel { id: 2 }, "no-job"),
            (Request::VmStart { config: "/etc/web.toml".into() }, "not-remote"),
            (Request::VmRestore { file: "/tmp/x".into(), paused: false }, "not-remote"),
        ];
        for (request, code) in refused {
            let error = asked(&request).unwrap_err();
            assert!(error.starts_with(&format!("{code}: ")), "{request:?}: {error}");
        }
        let error = asked(&Request::Migrate(order("web-1", "gamma"))).unwrap_err();
        for words in ["ana", "gamma", "alpha", "beta", "destinations"] {
            assert!(error.contains(words), "{words}: {error}");
        }
        // Whether a guest is there is not told to whom it is no business.
        assert_eq!(
            asked(&Request::Job { id: 2, watch: true }).unwrap_err().replace('2', "3"),
            asked(&Request::Job { id: 3, watch: true }).unwrap_err()
        );
    }

    #[test]
    fn an_operator_that_is_none_is_told_with_its_line() {
        let id = OperatorId([7; 32]);
        let text = format!(
            "[[operator]]\nname = \"ana\"\nkey = \"zz\"\n[[operator]]\nkey = \"{id}\"\nactions = [\"fly\"]\n\
             [[operator]]\nname = \"ben\"\nkey = \"{id}\"\nvms = [\"web?\"]\n[[operator]]\nname = \"ben\"\nkey = \"{id}\"\nvm = []\n"
        );
        let error = config(&text).unwrap_err();
        for words in [
            ":3: operator.key is \"zz\"",
            ":6: operator.actions has \"fly\"",
            "operator.name is missing",
            "has \"web?\"",
            "again",
            "\"operator.vm\"",
        ] {
            assert!(error.contains(words), "{words:?} is not in {error}");
        }
        let none = config(&format!("[[operator]]\nname = \"ana\"\nkey = \"{id}\"\n")).unwrap().operators[0].clone();
        assert!(none.permits(&Request::VmList, "alpha", |_| None).is_err() && !none.has_guest("web"));
    }

    #[test]
    fn a_change_holds_at_once() {
        let operators = Operators::new(vec![ana()]);
        let keys = operators.keys();
        assert!(keys.contains(KEY) && operators.with_key(KEY).is_some() && operators.both([HostId([1; 32]), KEY]).is_some());
        assert_eq!(operators.issuers()[0].actions, [ticket::Action::Migrate]);
        operators.replace(Vec::new());
        assert!(!keys.contains(KEY) && operators.with_key(KEY).is_none());
    }
}

//! What may go wrong, and where: 84 numbered and named fault points, the faults, and the plan that a seed makes of them.
//! It breaks nothing itself; `world` does, when a point is reached.

use std::time::Duration;

/// Chance by seed (splitmix64): the same on every machine.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `bound`, which is not zero.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// One of so many.
    pub(crate) fn index(&mut self, count: usize) -> usize {
        usize::try_from(self.below(count as u64)).unwrap()
    }

    pub(crate) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn micros(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(from + self.below(to - from + 1))
    }

    pub(crate) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.index(all.len())]
    }
}

macro_rules! steps {
    ($($name:ident $words:literal,)+) => {
        /// A step of a migration or of a recovery. Each has two fault points: before and after.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Step { $($name,)+ }

        impl Step {
            pub(crate) const ALL: &'static [Step] = &[$(Step::$name,)+];

            pub(crate) fn words(self) -> &'static str {
                match self { $(Step::$name => $words,)+ }
            }
        }
    };
}

steps! {
    Started "source writes started",
    OpenLanes "source opens lanes",
    StartTracking "source starts tracking",
    FetchDirty "source fetches dirty pages",
    Round "source sends a round",
    LastRound "source sends the last round",
    Pause "source pauses the guest",
    Save "source saves the guest's state",
    Released "source writes released",
    SourceResume "source resumes the guest",
    StopTracking "source stops tracking",
    Release "source lets the guest go",
    SourceRunning "source writes running",
    Aborted "source writes aborted",
    Check "destination checks",
    Prepare "destination prepares a VMM",
    Load "destination loads the guest's state",
    Ready "destination writes ready",
    DestinationResume "destination resumes the guest",
    Announce "destination announces",
    DestinationRunning "destination writes running",
    Discard "destination throws its VMM away",
    Discarded "destination writes discarded",
    HelloSent "Hello on the wire",
    AcceptSent "Accept on the wire",
    PreparedSent "Prepared on the wire",
    RoundDoneSent "RoundDone on the wire",
    RecordsEndSent "RecordsEnd on the wire",
    ReadySent "Ready on the wire",
    CommitSent "Commit on the wire",
    RunningSent "Running on the wire",
    FinishedSent "Finished on the wire",
    AbortSent "Abort on the wire",
    VerdictAskSent "VerdictAsk on the wire",
    VerdictSent "Verdict on the wire",
    Start "agent opens its journal and settles",
    Ask "a restarted agent asks the destination",
    AskSource "a restarted destination asks the source",
    ReleasedAskSent "ReleasedAsk on the wire",
    ReleasedSent "Released on the wire",
    PlugIn "a VMM plugs in again",
    Patience "a destination's patience with a source ends",
}

/// How many fault points there are.
pub(crate) const POINTS: usize = Step::ALL.len() * 2;

/// A place in the course of things: a step, and whether it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Point {
    pub(crate) step: Step,
    pub(crate) done: bool,
}

impl Point {
    pub(crate) fn number(self) -> usize {
        self.step as usize * 2 + usize::from(self.done)
    }

    pub(crate) fn numbered(number: usize) -> Point {
        Point { step: Step::ALL[number / 2], done: number % 2 == 1 }
    }
}

impl std::fmt::Display for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let when = if self.done { "after" } else { "before" };
        write!(f, "F{:02} {when}: {}", self.number() + 1, self.step.words())
    }
}

/// Whom a fault hits: the host of the fault point, or the other one of its migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum At {
    Here,
    There,
}

/// Which way nothing comes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Both,
    FromHere,
    ToHere,
}

/// What a disk does to the journal's next write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Misfortune {
    /// Some of the bytes are written, then an error.
    HalfWrite,
    /// Writing it out fails; the bytes may be durable all the same.
    SyncFails { durable: bool },
    /// And taking the write back fails too.
    SyncAndCutFail { durable: bool },
    /// The agent dies between the write and its sync.
    DieUnsynced,
    /// The whole host does.
    PowerCutUnsynced,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The agent dies, and comes back; the VMMs live.
    AgentDies(At),
    /// The host loses power and comes back: agent, VMMs and what the disk had not made durable are gone.
    PowerCut(At),
    /// A VMM dies with its guest.
    VmmDies(At),
    /// Nothing comes through, for so long. `loud`: connections break at once; else nobody is told.
    Cut { way: Way, loud: bool, seconds: u64 },
    /// One end of the control channel is gone and the other end is not told.
    HalfOpen(At),
    /// The lanes break, or stand still.
    Lanes { breaks: bool },
    /// The next thing that the host is asked by a migration fails; `done`: it was done all the same.
    HostFails { at: At, done: bool },
    /// It takes longer than anybody waits, and is then done or not.
    HostHangs { at: At, done: bool },
    /// The journal's disk.
    Disk(At, Misfortune),
    /// Somebody cancels.
    Cancel(At),
    /// The agent's clock jumps.
    Clock { at: At, seconds: i64 },
    /// The agent stands still (SIGSTOP), then goes on.
    Freeze { at: At, seconds: u64 },
}

fn any_fault(random: &mut Random) -> Fault {
    let at = random.of(&[At::Here, At::Here, At::There]);
    let done = random.percent(50);
    match random.below(25) {
        0..=4 => Fault::AgentDies(at),
        5..=6 => Fault::PowerCut(at),
        7 => Fault::VmmDies(at),
        8..=11 => Fault::Cut {
            way: random.of(&[Way::Both, Way::Both, Way::FromHere, Way::ToHere]),
            loud: random.percent(50),
            seconds: random.of(&[1, 4, 15, 60]),
        },
        12 => Fault::HalfOpen(at),
        13..=14 => Fault::Lanes { breaks: done },
        15..=16 => Fault::HostFails { at, done },
        17 => Fault::HostHangs { at, done },
        18..=20 => Fault::Disk(at, any_misfortune(random)),
        21..=22 => Fault::Cancel(at),
        23 => Fault::Clock { at, seconds: random.of(&[-20, -3, 3, 12, 40]) },
        _ => Fault::Freeze { at, seconds: random.of(&[2, 8, 30]) },
    }
}

fn any_misfortune(random: &mut Random) -> Misfortune {
    let durable = random.percent(50);
    match random.below(6) {
        0 => Misfortune::HalfWrite,
        1 => Misfortune::SyncFails { durable },
        2 => Misfortune::SyncAndCutFail { durable },
        3 => Misfortune::DieUnsynced,
        _ => Misfortune::PowerCutUnsynced,
    }
}

/// A fault that waits for its point to be reached for the n-th time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) point: Point,
    pub(crate) nth: u64,
    pub(crate) fault: Fault,
}

/// The faults of one seed: none to eight. Half of them where it hurts: in the hand-over and after a restart.
pub(crate) fn plan(random: &mut Random) -> Vec<Planned> {
    use Step as S;
    const HANDOVER: &[Step] = &[
        S::Released,
        S::Released,
        S::Ready,
        S::ReadySent,
        S::CommitSent,
        S::CommitSent,
        S::DestinationResume,
        S::DestinationResume,
        S::RunningSent,
        S::DestinationRunning,
        S::SourceRunning,
        S::Discarded,
        S::VerdictAskSent,
        S::VerdictSent,
        S::Start,
        S::Ask,
        S::AskSource,
        S::ReleasedSent,
        S::PlugIn,
        S::Patience,
        S::Load,
        S::LastRound,
        S::Aborted,
        S::Save,
    ];
    let count = random.of(&[0, 1, 2, 3, 4, 5, 6, 8]);
    let one = |random: &mut Random| {
        let step = if random.percent(50) { random.of(HANDOVER) } else { random.of(Step::ALL) };
        Planned { point: Point { step, done: random.percent(50) }, nth: random.of(&[1, 1, 1, 2, 3]), fault: any_fault(random) }
    };
    (0..count).map(|_| one(random)).collect()
}

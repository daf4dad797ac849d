//! The target's half: take everything, decide, run or refuse.
//!
//! Invariant: `Run` comes only behind a durable acceptance, and `Answer(Refused)` only when no
//! acceptance is durable or can become so, or a durable refusal stands behind it.

use serde::{Deserialize, Serialize};

use super::{Choice, Conflict, Standing, Verdict};

/// What the target's journal and hypervisor entitle it to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TargetState {
    /// Bytes arrive; the source may still abort.
    Receiving,
    /// The token is here: this side decides, with or without a link.
    Holding,
    /// The acceptance is being made durable.
    Accepting,
    /// The guest is this side's and is being started.
    Starting,
    /// The guest is this side's.
    Owner,
    /// It is, and is one of this host's VMs like any other.
    Settled,
    /// The refusal is being made durable; no acceptance was ever tried.
    Refusing,
    /// As `Refusing`, but an acceptance is, or may be, durable: the refusal must be, too.
    Revoking,
    /// This side will never run the guest of this attempt.
    Refused,
    /// The source's operator has overruled this side: that it gives way is being made durable.
    GivingWay,
    /// It is durable that the guest is to stop here, and was perhaps not done.
    Yielding,
    /// It was done: the guest stands still here until the operator has looked at it.
    Yielded,
}

/// What can happen to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TargetEvent {
    /// The source delegated.
    Token,
    /// Every byte is here and checked, disks are durable, the hypervisor has loaded the state.
    Verified,
    /// It cannot work: a hash, the hypervisor, a disk.
    Failed,
    /// The source or the operator ended the attempt, or the link went before the token came.
    Abort,
    /// The last `Journal` effect is durable.
    Journaled,
    /// The last `Journal` effect failed, and its record is not durable and never will be.
    Unwritten,
    /// The last `Journal` effect failed; whether its record is durable is not known.
    JournalFailed,
    /// The guest runs, or is paused as its owner had paused it.
    Ran,
    /// The hypervisor ended before it was told to run the guest.
    NeverRan,
    /// The hypervisor ended, and the guest may have run before.
    MayHaveRun,
    /// The source asks what our journal says.
    Asked(Standing),
    /// Our decision is durable at the source.
    Confirmed,
    /// The operator's word.
    Resolve(Choice),
    /// This is a later life of the agent: the machine was made from what the journal says.
    Restarted,
    /// Some time has passed.
    Retry,
}

/// What the target does next, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TargetEffect {
    /// Make this durable before anything else is done, then report it.
    Journal(TargetRecord),
    /// Make this durable some time: what follows from it does not wait.
    Note(TargetRecord),
    /// Make the guest run, then report it. The only thing in Longhaul that does so at a target.
    Run,
    /// Enter the VM in this host's book.
    Settle,
    /// End the hypervisor that holds the arrived state.
    Discard,
    /// Stop the guest's CPUs; its state stays to be looked at.
    Pause,
    /// End the hypervisor of a guest that was paused, and strike the VM from this host's book.
    Remove,
    /// Tell the source what we decided.
    Answer(Verdict),
    /// Tell the operator, loudly.
    Shout(Conflict),
    /// The attempt is over: note it, once all that was done before is durable.
    End,
}

/// What the target's journal can say about the hand-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetRecord {
    /// The guest is ours to run.
    Accepted,
    /// It was started.
    Started,
    /// It is one of this host's VMs.
    Settled,
    /// It never will be ours.
    Refused,
    /// It was ours and is the source's again, as soon as it stands still here.
    Yielding,
    /// It stands still here.
    Yielded,
}

/// The target's half of the hand-over.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    state: TargetState,
}

impl Target {
    /// A target in the given state.
    pub fn at(state: TargetState) -> Self {
        Self { state }
    }

    /// A target at the start of a migration.
    pub fn new() -> Self {
        Self::at(TargetState::Receiving)
    }

    /// A target after a restart, with what its journal said last: feed it
    /// [`TargetEvent::Restarted`]. What had arrived is lost, so without an acceptance only a
    /// refusal is possible.
    pub fn recover(last: Option<TargetRecord>) -> Self {
        Self::at(match last {
            None => TargetState::Receiving,
            Some(TargetRecord::Accepted) => TargetState::Starting,
            Some(TargetRecord::Started) => TargetState::Owner,
            Some(TargetRecord::Settled) => TargetState::Settled,
            Some(TargetRecord::Refused) => TargetState::Refused,
            Some(TargetRecord::Yielding) => TargetState::Yielding,
            Some(TargetRecord::Yielded) => TargetState::Yielded,
        })
    }

    /// Where it stands.
    pub fn state(&self) -> TargetState {
        self.state
    }

    /// Takes an event; one that has no meaning in this state changes nothing.
    pub fn on(&mut self, event: TargetEvent) -> Vec<TargetEffect> {
        use TargetEffect as Do;
        use TargetEvent as On;
        use TargetRecord as Record;
        use TargetState as Is;
        let (next, effects) = match (self.state, event) {
            (Is::Receiving, On::Token) => (Is::Holding, vec![]),
            (Is::Receiving, On::Failed | On::Abort | On::Restarted) | (Is::Holding, On::Failed) => {
                (Is::Refusing, vec![Do::Journal(Record::Refused)])
            }
            (Is::Holding, On::Verified) => (Is::Accepting, vec![Do::Journal(Record::Accepted)]),

            (Is::Accepting, On::Journaled) => (Is::Starting, vec![Do::Run]),
            (Is::Accepting, On::Unwritten) => (Is::Refusing, vec![Do::Journal(Record::Refused)]),
            (Is::Accepting, On::JournalFailed) => {
                (Is::Revoking, vec![Do::Journal(Record::Refused)])
            }

            (Is::Starting, On::Restarted) => (Is::Starting, vec![Do::Run]),
            (Is::Starting, On::Ran | On::MayHaveRun) => (
                Is::Settled,
                vec![
                    Do::Answer(Verdict::Runs),
                    Do::Note(Record::Started),
                    Do::Settle,
                    Do::Note(Record::Settled),
                ],
            ),
            (Is::Starting, On::NeverRan) => (Is::Revoking, vec![Do::Journal(Record::Refused)]),

            (Is::Owner, On::Restarted) => {
                (Is::Settled, vec![Do::Settle, Do::Note(Record::Settled)])
            }
            (Is::Owner | Is::Settled, On::Asked(Standing::Waits)) => {
                (self.state, vec![Do::Answer(Verdict::Runs)])
            }
            // The operator of the source has decided against us: the later word counts.
            (Is::Owner | Is::Settled, On::Asked(Standing::TookBack)) => {
                (Is::GivingWay, vec![Do::Shout(Conflict::RanTwice), Do::Journal(Record::Yielding)])
            }
            // An owner that is not settled has something left to do.
            (Is::Settled, On::Confirmed | On::Resolve(Choice::Here)) => {
                (Is::Settled, vec![Do::End])
            }

            // Without an acceptance a journal is a refusal, whether or not it says so.
            (Is::Refusing, On::Journaled | On::Unwritten | On::JournalFailed)
            | (Is::Revoking, On::Journaled) => {
                (Is::Refused, vec![Do::Answer(Verdict::Refused), Do::Discard, Do::End])
            }
            (Is::Revoking, On::Retry) => (Is::Revoking, vec![Do::Journal(Record::Refused)]),
            (Is::Refused, On::Restarted) => (Is::Refused, vec![Do::Discard, Do::End]),

            (Is::GivingWay, On::Journaled) | (Is::Yielding, On::Restarted | On::Asked(_)) => {
                (Is::Yielding, vec![Do::Pause, Do::Journal(Record::Yielded)])
            }
            // It runs at the source by now: it has to stand still here, written down or not.
            (Is::GivingWay, On::Unwritten | On::JournalFailed) => (Is::GivingWay, vec![Do::Pause]),
            (Is::Yielding, On::Journaled) => (Is::Yielded, vec![Do::Answer(Verdict::Refused)]),
            (Is::Yielded, On::Resolve(Choice::There)) => (Is::Yielded, vec![Do::Remove, Do::End]),

            (Is::Refused | Is::Yielded, On::Asked(_)) => {
                (self.state, vec![Do::Answer(Verdict::Refused)])
            }
            (state, On::Asked(_)) => (state, vec![Do::Answer(Verdict::Undecided)]),
            (state, _) => (state, vec![]),
        };
        self.state = next;
        effects
    }
}

impl Default for Target {
    fn default() -> Self {
        Self::new()
    }
}

//! The source's half: delegate, wait, let go or take back.
//!
//! Invariant: between `Delegated` and the target's answer nothing but the operator's word leads to
//! `Rollback`, which is the one effect that lets a guest run here.

use serde::{Deserialize, Serialize};

use super::{Choice, Conflict, Standing, Verdict};

/// What the source's journal and hypervisor entitle it to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceState {
    /// The guest is this side's: it runs, or may be made to run again.
    Ours,
    /// The delegation is being made durable; the guest is parked.
    Delegating,
    /// The target decides. This side never starts the guest by itself.
    Delegated,
    /// The attempt is over and the guest is this side's.
    Kept,
    /// The target runs it. This side only tidies up.
    Gone,
    /// The operator's word that it is to run here is being made durable.
    TakingBack,
    /// That word is durable, and was perhaps not carried out.
    TookBack,
    /// It was carried out. The target still has to hear of it.
    Returned,
    /// The operator's word that it runs at the target is being made durable.
    GivingUp,
    /// That word is durable, and was perhaps not carried out.
    GaveUp,
    /// It was carried out. The target still has to be asked.
    Left,
    /// A word that may be durable, and was not followed, is being written over.
    Withdrawing,
}

/// What can happen to the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The hypervisor was seen parked, and the last byte is with the transport.
    Parked,
    /// Something failed, or the operator wants the attempt to end.
    Abort,
    /// The last `Journal` effect is durable.
    Journaled,
    /// The last `Journal` effect failed, and its record is not durable and never will be.
    Unwritten,
    /// The last `Journal` effect failed; whether its record is durable is not known.
    JournalFailed,
    /// What the target says.
    Peer(Verdict),
    /// The operator's word.
    Resolve(Choice),
    /// This is a later life of the agent: the machine was made from what the journal says.
    Restarted,
    /// Some time has passed, or the peer can be reached again.
    Retry,
}

/// What the source does next, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceEffect {
    /// Make this durable before anything else is done, then report it.
    Journal(SourceRecord),
    /// Make this durable some time: what follows from it does not wait.
    Note(SourceRecord),
    /// Send the token, behind everything else.
    SendToken,
    /// Tell the peer that this attempt is over.
    SendAbort,
    /// Ask the peer what its journal says, and tell it how we stand.
    Ask(Standing),
    /// Tell the peer that its decision is durable here.
    Confirm,
    /// Give the guest back to its owner, as it was. The only thing that makes it run here.
    Rollback,
    /// End the parked hypervisor, and strike the VM from this host's book.
    Destroy,
    /// Enter the VM in this host's book again; it does not run.
    Reclaim,
    /// Tell the operator, loudly.
    Shout(Conflict),
    /// Say that it is too late to abort: the target decides.
    TooLate,
    /// Say that the operator's word could not be written down, was not followed and never will be.
    NotResolved,
    /// The attempt is over: note it, once all that was done before is durable.
    End,
}

/// What the source's journal can say about the hand-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceRecord {
    /// The target decides from here on.
    Delegated,
    /// The guest is ours again.
    Kept,
    /// The target runs it.
    Gone,
    /// The operator took the guest back without the target's word.
    TookBack,
    /// And it was given back to its owner.
    Returned,
    /// The operator left the guest to the target without the target's word.
    GaveUp,
    /// And nothing of it runs here any more.
    Left,
}

/// The source's half of the hand-over.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Source {
    state: SourceState,
}

impl Source {
    /// A source in the given state.
    pub fn at(state: SourceState) -> Self {
        Self { state }
    }

    /// A source at the start of a migration.
    pub fn new() -> Self {
        Self::at(SourceState::Ours)
    }

    /// A source after a restart, with what its journal said last: feed it
    /// [`SourceEvent::Restarted`].
    pub fn recover(last: Option<SourceRecord>) -> Self {
        Self::at(match last {
            None => SourceState::Ours,
            Some(SourceRecord::Delegated) => SourceState::Delegated,
            Some(SourceRecord::Kept) => SourceState::Kept,
            Some(SourceRecord::Gone) => SourceState::Gone,
            Some(SourceRecord::TookBack) => SourceState::TookBack,
            Some(SourceRecord::Returned) => SourceState::Returned,
            Some(SourceRecord::GaveUp) => SourceState::GaveUp,
            Some(SourceRecord::Left) => SourceState::Left,
        })
    }

    /// Where it stands.
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// Takes an event; one that has no meaning in this state changes nothing.
    pub fn on(&mut self, event: SourceEvent) -> Vec<SourceEffect> {
        use SourceEffect as Do;
        use SourceEvent as On;
        use SourceRecord as Record;
        use SourceState as Is;
        use Verdict::{Refused, Runs};
        let (next, effects) = match (self.state, event) {
            (Is::Ours, On::Parked) => (Is::Delegating, vec![Do::Journal(Record::Delegated)]),
            (Is::Ours, On::Abort) => (Is::Kept, vec![Do::Rollback, Do::SendAbort, Do::End]),
            (Is::Ours, On::Restarted) => (Is::Kept, vec![Do::Rollback, Do::End]),

            (Is::Delegating, On::Journaled) => (Is::Delegated, vec![Do::SendToken]),
            // Even if the record did reach the disk: the token was never sent, so a restart that
            // reads it will ask, and the target can only refuse.
            (Is::Delegating, On::Unwritten | On::JournalFailed) => {
                (Is::Kept, vec![Do::Rollback, Do::SendAbort, Do::End])
            }

            (Is::Delegated, On::Peer(Runs)) => {
                (Is::Gone, vec![Do::Note(Record::Gone), Do::Destroy, Do::Confirm, Do::End])
            }
            (Is::Delegated, On::Peer(Refused)) => {
                (Is::Kept, vec![Do::Note(Record::Kept), Do::Rollback, Do::End])
            }
            (Is::Delegated, On::Restarted | On::Retry) => {
                (Is::Delegated, vec![Do::Ask(Standing::Waits)])
            }
            (Is::Delegating | Is::Delegated | Is::Withdrawing, On::Abort) => {
                (self.state, vec![Do::TooLate])
            }
            (Is::Delegated, On::Resolve(Choice::Here)) => {
                (Is::TakingBack, vec![Do::Journal(Record::TookBack)])
            }
            (Is::Delegated, On::Resolve(Choice::There)) => {
                (Is::GivingUp, vec![Do::Journal(Record::GaveUp)])
            }

            (Is::Kept, On::Restarted) => (Is::Kept, vec![Do::Rollback, Do::End]),
            (Is::Gone, On::Restarted) => (Is::Gone, vec![Do::Destroy, Do::Confirm, Do::End]),
            (Is::Gone, On::Peer(Runs) | On::Retry) => (Is::Gone, vec![Do::Confirm, Do::End]),

            (Is::TakingBack, On::Journaled) => {
                (Is::Returned, vec![Do::Rollback, Do::Note(Record::Returned)])
            }
            (Is::TookBack, On::Restarted) => (
                Is::Returned,
                vec![Do::Rollback, Do::Note(Record::Returned), Do::Ask(Standing::TookBack)],
            ),
            (Is::Returned, On::Restarted | On::Retry) => {
                (Is::Returned, vec![Do::Ask(Standing::TookBack)])
            }
            // Nothing is noted from here on that a restart would act upon: the VM may be in another
            // attempt by then. `Runs` can only be an older answer: a target that hears of this
            // gives way first.
            (Is::Returned, On::Peer(Refused)) => (Is::Kept, vec![Do::End]),

            (Is::GivingUp, On::Journaled) => (Is::Left, vec![Do::Destroy, Do::Note(Record::Left)]),
            (Is::GaveUp, On::Restarted) => {
                (Is::Left, vec![Do::Destroy, Do::Note(Record::Left), Do::Ask(Standing::Waits)])
            }
            (Is::Left, On::Restarted | On::Retry) => (Is::Left, vec![Do::Ask(Standing::Waits)]),
            (Is::Left, On::Peer(Runs)) => (Is::Gone, vec![Do::Confirm, Do::End]),
            (Is::Left, On::Peer(Refused)) => {
                (Is::Kept, vec![Do::Reclaim, Do::Shout(Conflict::RunsNowhere), Do::End])
            }

            (Is::TakingBack | Is::GivingUp, On::Unwritten) => {
                (Is::Delegated, vec![Do::NotResolved])
            }
            // What may stand in the journal is written over, lest a restart follows it. Until it is,
            // nobody can be told that it will not be.
            (Is::TakingBack | Is::GivingUp, On::JournalFailed) | (Is::Withdrawing, On::Retry) => {
                (Is::Withdrawing, vec![Do::Journal(Record::Delegated)])
            }
            (Is::Withdrawing, On::Journaled) => (Is::Delegated, vec![Do::NotResolved]),
            (state, _) => (state, vec![]),
        };
        self.state = next;
        effects
    }
}

impl Default for Source {
    fn default() -> Self {
        Self::new()
    }
}

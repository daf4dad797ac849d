//! The hand-over: which side may run the VM. Two pure state machines, one for each role.
//!
//! Invariant: at most one side is ever in a state that lets its hypervisor run the guest, and a
//! side leaves "may run" only after its journal says so. No I/O, no clock, no async in here: events
//! go in, effects come out, and the shell carries them out in order.
//!
//! ```text
//!  source   Ours --ready--> Delegating --journaled--> Delegated --peer runs-----> Gone
//!            ^  ^----journal failed----'                  |
//!            '-------------- peer refused ---------------'   (nothing else leads back)
//!
//!  target   Receiving --token--> Holding --verified--> Accepting --journaled--> Owner
//!               |                   |                      '--journal failed--> Stuck
//!               '-- failed, abort --'--> Refusing --journaled--> Refused
//!                                            '----journal failed-----> Stuck
//! ```
//!
//! The decision travels behind the last byte: the source delegates once its hypervisor is parked,
//! and from then on only the target's durable refusal gives the guest back. No timer is an event.

/// What the source's journal and hypervisor entitle it to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// The guest is this side's: it runs, or may be made to run again.
    Ours,
    /// The delegation is being made durable; the guest is parked.
    Delegating,
    /// The target decides. This side never starts the guest by itself.
    Delegated,
    /// The target runs it. This side only tidies up.
    Gone,
}

/// What can happen to the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The hypervisor is parked and the last byte is with the transport.
    Ready,
    /// The last `Journal` effect is durable.
    Journaled,
    /// The last `Journal` effect failed.
    JournalFailed,
    /// Something failed, or the operator wants the move to end.
    Abort,
    /// The target's journal says that it runs the guest.
    PeerRuns,
    /// The target's journal says that it never will.
    PeerRefused,
    /// The peer can be reached (again), in whatever state it is.
    PeerReachable,
}

/// What the source does next, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceEffect {
    /// Make this durable, then report `Journaled` or `JournalFailed`.
    Journal(SourceRecord),
    /// Send the token, behind everything else.
    SendToken,
    /// Ask the peer what its journal says.
    Ask,
    /// Tell the peer that this attempt is over.
    SendAbort,
    /// Give the guest back to its owner.
    Rollback,
    /// End the parked process.
    Destroy,
    /// Say that it is too late to abort: the target decides.
    TooLate,
}

/// What the source's journal can say about the hand-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceRecord {
    /// The target decides from here on.
    Delegated,
    /// The target refused: the guest is ours again.
    Kept,
    /// The target runs it.
    Gone,
}

/// The source's half of the hand-over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    state: SourceState,
}

impl Source {
    /// A source at the start of a migration, or after a restart with what its journal said last.
    pub fn new(last: Option<SourceRecord>) -> Self {
        let state = match last {
            None | Some(SourceRecord::Kept) => SourceState::Ours,
            Some(SourceRecord::Delegated) => SourceState::Delegated,
            Some(SourceRecord::Gone) => SourceState::Gone,
        };
        Self { state }
    }

    /// Where it stands.
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// Takes an event; an event that has no meaning in this state changes nothing.
    pub fn on(&mut self, event: SourceEvent) -> Vec<SourceEffect> {
        use SourceEffect as Do;
        use SourceEvent as On;
        use SourceState as Is;
        let (next, effects) = match (self.state, event) {
            (Is::Ours, On::Ready) => (Is::Delegating, vec![Do::Journal(SourceRecord::Delegated)]),
            (Is::Ours, On::Abort) => (Is::Ours, vec![Do::Rollback, Do::SendAbort]),
            (Is::Delegating, On::Journaled) => (Is::Delegated, vec![Do::SendToken]),
            // Even if the record did reach the disk: the token was never sent, so a restart that
            // reads it will ask, and the target can only refuse.
            (Is::Delegating, On::JournalFailed) => (Is::Ours, vec![Do::Rollback, Do::SendAbort]),
            (Is::Delegated, On::PeerRuns) => {
                (Is::Gone, vec![Do::Journal(SourceRecord::Gone), Do::Destroy])
            }
            (Is::Delegated, On::PeerRefused) => {
                (Is::Ours, vec![Do::Journal(SourceRecord::Kept), Do::Rollback])
            }
            (Is::Delegated, On::PeerReachable) => (Is::Delegated, vec![Do::Ask]),
            (Is::Delegated | Is::Delegating, On::Abort) => (self.state, vec![Do::TooLate]),
            (Is::Gone, On::PeerRuns) => (Is::Gone, vec![Do::Destroy]),
            (state, _) => (state, Vec::new()),
        };
        self.state = next;
        effects
    }
}

/// What the target's journal and hypervisor entitle it to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TargetState {
    /// Bytes arrive; the source may still abort.
    Receiving,
    /// The token is here: this side decides, with or without a link.
    Holding,
    /// The acceptance is being made durable.
    Accepting,
    /// The guest is this side's.
    Owner,
    /// The refusal is being made durable.
    Refusing,
    /// This side will never run the guest of this attempt.
    Refused,
    /// The journal failed in the middle of a decision: neither runs nor answers until a restart
    /// has read what is durable.
    Stuck,
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
    /// The last `Journal` effect failed.
    JournalFailed,
    /// The source asks what our journal says.
    Asked,
}

/// What the target does next, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TargetEffect {
    /// Make this durable, then report `Journaled` or `JournalFailed`.
    Journal(TargetRecord),
    /// Make the guest run. The only thing in Longhaul that does so at a target.
    Run,
    /// End the hypervisor that holds the arrived state.
    Discard,
    /// Tell the source what we decided.
    Answer(Verdict),
}

/// What the target's journal can say about the hand-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetRecord {
    /// The guest is ours to run.
    Accepted,
    /// It never will be.
    Refused,
}

/// What a target says when it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It owns the guest.
    Runs,
    /// It refused, durably.
    Refused,
    /// It has not decided yet.
    Undecided,
}

/// The target's half of the hand-over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    state: TargetState,
}

impl Target {
    /// A target at the start of a migration.
    pub fn new() -> Self {
        Self { state: TargetState::Receiving }
    }

    /// A target after a restart, with what its journal said last. What had arrived is lost, so
    /// without an acceptance only a refusal is possible: feed it [`TargetEvent::Abort`].
    pub fn recover(last: Option<TargetRecord>) -> Self {
        let state = match last {
            None => TargetState::Receiving,
            Some(TargetRecord::Accepted) => TargetState::Owner,
            Some(TargetRecord::Refused) => TargetState::Refused,
        };
        Self { state }
    }

    /// Where it stands.
    pub fn state(&self) -> TargetState {
        self.state
    }

    /// Takes an event; an event that has no meaning in this state changes nothing.
    pub fn on(&mut self, event: TargetEvent) -> Vec<TargetEffect> {
        use TargetEffect as Do;
        use TargetEvent as On;
        use TargetState as Is;
        let (next, effects) = match (self.state, event) {
            (Is::Receiving, On::Token) => (Is::Holding, vec![]),
            (Is::Holding, On::Verified) => {
                (Is::Accepting, vec![Do::Journal(TargetRecord::Accepted)])
            }
            (Is::Accepting, On::Journaled) => (Is::Owner, vec![Do::Run, Do::Answer(Verdict::Runs)]),
            // Whether the record is durable is not known now: answering either way could be wrong.
            (Is::Accepting | Is::Refusing, On::JournalFailed) => (Is::Stuck, vec![]),
            (Is::Receiving, On::Failed | On::Abort) | (Is::Holding, On::Failed) => {
                (Is::Refusing, vec![Do::Journal(TargetRecord::Refused)])
            }
            (Is::Refusing, On::Journaled) => {
                (Is::Refused, vec![Do::Discard, Do::Answer(Verdict::Refused)])
            }
            (Is::Owner, On::Asked) => (Is::Owner, vec![Do::Answer(Verdict::Runs)]),
            (Is::Refused, On::Asked) => (Is::Refused, vec![Do::Answer(Verdict::Refused)]),
            (state, On::Asked) => (state, vec![Do::Answer(Verdict::Undecided)]),
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

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE_EVENTS: [SourceEvent; 7] = [
        SourceEvent::Ready,
        SourceEvent::Journaled,
        SourceEvent::JournalFailed,
        SourceEvent::Abort,
        SourceEvent::PeerRuns,
        SourceEvent::PeerRefused,
        SourceEvent::PeerReachable,
    ];
    const TARGET_EVENTS: [TargetEvent; 7] = [
        TargetEvent::Token,
        TargetEvent::Verified,
        TargetEvent::Failed,
        TargetEvent::Abort,
        TargetEvent::Journaled,
        TargetEvent::JournalFailed,
        TargetEvent::Asked,
    ];

    #[test]
    fn a_delegated_source_runs_again_only_after_a_refusal() {
        for event in SOURCE_EVENTS {
            let mut source = Source::new(Some(SourceRecord::Delegated));
            let effects = source.on(event);
            let resumes = effects.contains(&SourceEffect::Rollback);
            assert_eq!(resumes, event == SourceEvent::PeerRefused, "{event:?}: {effects:?}");
        }
    }

    #[test]
    fn a_source_that_gave_the_guest_away_never_runs_it() {
        for event in SOURCE_EVENTS {
            let mut source = Source::new(Some(SourceRecord::Gone));
            assert!(!source.on(event).contains(&SourceEffect::Rollback), "{event:?}");
            assert_eq!(source.state(), SourceState::Gone);
        }
    }

    #[test]
    fn the_token_is_sent_only_after_the_journal_has_it() {
        let mut source = Source::new(None);
        let effects = source.on(SourceEvent::Ready);
        assert_eq!(effects, [SourceEffect::Journal(SourceRecord::Delegated)]);
        assert_eq!(source.on(SourceEvent::Journaled), [SourceEffect::SendToken]);
    }

    /// Every sequence of events up to a length: the target runs only after a durable acceptance,
    /// and never in an attempt that it refused.
    #[test]
    fn a_target_runs_only_what_it_accepted_and_never_what_it_refused() {
        fn explore(target: &Target, accepted: bool, refused: bool, depth: u32) {
            if depth == 0 {
                return;
            }
            for event in TARGET_EVENTS {
                let mut next = target.clone();
                let was = target.state();
                let effects = next.on(event);
                let accepted =
                    accepted || (was == TargetState::Accepting && event == TargetEvent::Journaled);
                let refused =
                    refused || (was == TargetState::Refusing && event == TargetEvent::Journaled);
                assert!(!(accepted && refused));
                if effects.contains(&TargetEffect::Run) {
                    assert!(accepted, "{was:?} {event:?}");
                }
                if effects.contains(&TargetEffect::Answer(Verdict::Refused)) {
                    assert!(refused, "{was:?} {event:?}");
                }
                if effects.contains(&TargetEffect::Answer(Verdict::Runs)) {
                    assert!(accepted, "{was:?} {event:?}");
                }
                explore(&next, accepted, refused, depth - 1);
            }
        }
        explore(&Target::new(), false, false, 6);
    }

    #[test]
    fn a_cut_after_the_token_does_not_make_the_target_give_up() {
        let mut target = Target::new();
        target.on(TargetEvent::Token);
        assert!(target.on(TargetEvent::Abort).is_empty());
        assert_eq!(target.state(), TargetState::Holding);
    }
}

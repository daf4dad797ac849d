//! The world around the two machines: journals, hypervisors, a network, and the shell's rules.
//!
//! Invariant: the machines are the product's own; this file does with their effects what
//! `migration::settle` does, one effect at a time, with every way in which each can go wrong.

use longhaul::migration::handover::{
    Conflict, Source, SourceEffect, SourceEvent, SourceRecord, SourceState, Standing, Target,
    TargetEffect, TargetEvent, TargetRecord, TargetState, Verdict,
};

use super::bugs::Bug;

/// A message under way. The network keeps what it has delivered, so it duplicates, delays and
/// reorders without end; what is dropped is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Message {
    Token,
    Abort,
    Ask(Standing),
    Answer(Verdict),
}

impl Message {
    pub const ALL: [Self; 7] = [
        Self::Token,
        Self::Abort,
        Self::Ask(Standing::Waits),
        Self::Ask(Standing::TookBack),
        Self::Answer(Verdict::Runs),
        Self::Answer(Verdict::Refused),
        Self::Answer(Verdict::Undecided),
    ];

    fn bit(self) -> u8 {
        let nth = Self::ALL.iter().position(|&message| message == self);
        1 << nth.expect("all are listed")
    }
}

/// What a hypervisor does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Qemu {
    /// At the target: the state is not loaded yet.
    Loading,
    /// At the target: loaded, never run.
    Loaded,
    Running,
    /// At the source: `postmigrate`. At the target: stopped in a conflict.
    Stopped,
    /// It died, and the guest in it.
    Dead,
    /// It was ended, as it was no longer needed.
    Ended,
}

/// What may still go wrong at one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Budget {
    /// Agents or hosts that crash.
    pub crashes: u8,
    /// Journal writes that fail.
    pub journal: u8,
    /// Calls to the hypervisor or the book that fail.
    pub calls: u8,
    /// Hypervisors that die.
    pub deaths: u8,
    /// Words of the operator.
    pub words: u8,
}

/// One side.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Side<M, E, R> {
    pub up: bool,
    /// None if nobody works on the attempt: it is over, or has to be settled from the journal.
    pub machine: Option<M>,
    pub todo: Vec<E>,
    pub durable: Option<R>,
    /// What a journal without fsync would hold; only bugs use it.
    pub cached: Option<R>,
    pub ended: bool,
    /// A note was lost: the attempt may not end in this life.
    pub unwritten: bool,
    pub qemu: Qemu,
    /// The VM is one of this host's.
    pub book: bool,
    pub left: Budget,
}

impl<M, E, R> Side<M, E, R> {
    fn new(machine: M, qemu: Qemu, book: bool, left: Budget) -> Self {
        Self {
            up: true,
            machine: Some(machine),
            todo: vec![],
            durable: None,
            cached: None,
            ended: false,
            unwritten: false,
            qemu,
            book,
            left,
        }
    }

    /// The agent crashes, or its host and the hypervisor with it; whether a guest died of that.
    fn crash(&mut self, host: bool) -> bool {
        (self.up, self.machine, self.cached, self.unwritten) = (false, None, None, false);
        self.todo.clear();
        if !host || self.qemu == Qemu::Ended {
            return false;
        }
        let was = std::mem::replace(&mut self.qemu, Qemu::Dead);
        matches!(was, Qemu::Running | Qemu::Stopped)
    }

    /// A step behind the end opens the attempt again.
    fn write(&mut self, record: R) {
        (self.durable, self.ended) = (Some(record), false);
    }
}

pub type SourceSide = Side<Source, SourceEffect, SourceRecord>;
pub type TargetSide = Side<Target, TargetEffect, TargetRecord>;

/// What has happened, for the properties.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Past {
    /// The source's guest was resumed after its delegation was durable.
    pub resumed: bool,
    pub delegated: bool,
    pub token_sent_undelegated: bool,
    pub target_ran: bool,
    pub ran_unaccepted: bool,
    /// The source's guest ran on after the target's had run, or the other way round, and nobody had
    /// decided that.
    pub ran_twice_in_time: bool,
    /// The operator took the guest back at the source.
    pub overridden: bool,
    pub conflict: bool,
    /// A hypervisor with the guest in it died, or the operator let one be ended.
    pub crashed: bool,
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    pub source: SourceSide,
    pub target: TargetSide,
    /// The target's is the life that began the attempt: what arrived is in its memory.
    pub fresh: bool,
    /// A question that is answered when the journal was read.
    pub asked: Option<Standing>,
    pub net: u8,
    pub past: Past,
}

/// How an effect turns out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Turn {
    Well,
    /// It fails; a record is not durable.
    Fails,
    /// A record is durable and its writer does not know; a guest ran and its hypervisor died.
    FailsLate,
}

impl World {
    pub fn new(left: Budget) -> Self {
        Self {
            source: Side::new(Source::new(), Qemu::Running, true, left),
            target: Side::new(Target::new(), Qemu::Loading, false, left),
            fresh: true,
            asked: None,
            net: 0,
            past: Past::default(),
        }
    }

    pub fn send(&mut self, message: Message) {
        self.net |= message.bit();
    }

    pub fn holds(&self, message: Message) -> bool {
        self.net & message.bit() != 0
    }

    pub fn drop_message(&mut self, message: Message) {
        self.net &= !message.bit();
    }

    pub fn source_state(&self) -> Option<SourceState> {
        self.source.machine.as_ref().map(Source::state)
    }

    pub fn target_state(&self) -> Option<TargetState> {
        self.target.machine.as_ref().map(Target::state)
    }

    /// Feeds the source; what follows is done before what is left to do.
    pub fn feed_source(&mut self, event: SourceEvent, bug: Option<Bug>) {
        let Some(machine) = &mut self.source.machine else { return };
        let mut effects = machine.on(event);
        if bug == Some(Bug::ResumeOnTimeout) && event == SourceEvent::Retry {
            effects = vec![SourceEffect::Rollback];
        }
        if bug == Some(Bug::DestroyOnDelegation) && effects.contains(&SourceEffect::SendToken) {
            effects.push(SourceEffect::Destroy);
        }
        effects.append(&mut self.source.todo);
        self.source.todo = effects;
        self.rest_source();
    }

    /// As `feed_source`, for the target.
    pub fn feed_target(&mut self, event: TargetEvent, bug: Option<Bug>) {
        let Some(machine) = &mut self.target.machine else { return };
        let mut effects = machine.on(event);
        if bug == Some(Bug::RevokeUnwritten) && event == TargetEvent::NeverRan {
            *machine = Target::at(TargetState::Refused);
            effects = vec![
                TargetEffect::Answer(Verdict::Refused),
                TargetEffect::Discard,
                TargetEffect::End,
            ];
        }
        effects.append(&mut self.target.todo);
        self.target.todo = effects;
        self.rest_target(bug);
    }

    /// The shell when nothing is left to do: it waits, or the attempt is over for this life.
    fn rest_source(&mut self) {
        if !self.source.todo.is_empty() {
            return;
        }
        let waits = matches!(
            self.source_state(),
            Some(
                SourceState::Ours
                    | SourceState::Delegated
                    | SourceState::Returned
                    | SourceState::Left
            )
        );
        if self.source.unwritten || !waits {
            self.source.machine = None;
            self.source.unwritten = false;
        }
    }

    fn rest_target(&mut self, bug: Option<Bug>) {
        if !self.target.todo.is_empty() {
            return;
        }
        let works =
            matches!(self.target_state(), Some(TargetState::Receiving | TargetState::Holding))
                && self.fresh
                || self.target_state() == Some(TargetState::Revoking);
        if works {
            return;
        }
        match (self.target.machine.is_some(), self.asked.take()) {
            (true, Some(standing)) => self.feed_target(TargetEvent::Asked(standing), bug),
            _ => {
                self.target.machine = None;
                self.target.unwritten = false;
                self.fresh = false;
            }
        }
    }

    /// Carries out the source's next effect.
    pub fn step_source(&mut self, turn: Turn, bug: Option<Bug>) {
        let effect = self.source.todo.remove(0);
        let side = &mut self.source;
        let mut event = None;
        match effect {
            SourceEffect::Journal(record) => {
                if bug == Some(Bug::TokenBeforeJournal) && record == SourceRecord::Delegated {
                    self.net |= Message::Token.bit();
                }
                match turn {
                    Turn::Well if bug == Some(Bug::SourceWithoutFsync) => {
                        side.cached = Some(record);
                    }
                    Turn::Well | Turn::FailsLate => side.write(record),
                    Turn::Fails => {}
                }
                self.past.delegated |= side.durable == Some(SourceRecord::Delegated);
                event = Some(match turn {
                    Turn::Well => SourceEvent::Journaled,
                    Turn::Fails | Turn::FailsLate => SourceEvent::JournalFailed,
                });
            }
            SourceEffect::Note(record) => match turn {
                Turn::Well => side.write(record),
                _ => side.unwritten = true,
            },
            SourceEffect::SendToken => {
                self.past.token_sent_undelegated |=
                    side.durable.or(side.cached) != Some(SourceRecord::Delegated);
                self.send(Message::Token);
            }
            SourceEffect::SendAbort => self.send(Message::Abort),
            SourceEffect::Ask(standing) => self.send(Message::Ask(standing)),
            SourceEffect::Confirm => {
                let heard = turn != Turn::Fails && self.confirm(bug);
                if turn != Turn::Well || !heard {
                    self.source.todo.clear();
                    self.source.unwritten = true;
                }
            }
            SourceEffect::Rollback | SourceEffect::Destroy if turn != Turn::Well => {
                side.todo.clear();
                side.unwritten = true;
            }
            SourceEffect::Rollback => {
                if side.qemu == Qemu::Stopped {
                    side.qemu = Qemu::Running;
                    self.past.resumed |= self.past.delegated;
                    self.past.ran_twice_in_time |= self.past.target_ran && !self.past.overridden;
                }
            }
            SourceEffect::Destroy => {
                if side.qemu != Qemu::Dead {
                    side.qemu = Qemu::Ended;
                }
                side.book = false;
            }
            SourceEffect::Reclaim => side.book = true,
            SourceEffect::Shout(conflict) => {
                self.past.conflict = true;
                // The operator had ended it: that is a crash that was asked for.
                self.past.crashed |= conflict == Conflict::RunsNowhere;
            }
            SourceEffect::TooLate | SourceEffect::NotResolved => {}
            SourceEffect::End => {
                if turn == Turn::Well && !side.unwritten {
                    side.ended = true;
                } else {
                    side.unwritten = true;
                }
            }
        }
        match event {
            Some(event) => self.feed_source(event, bug),
            None => self.rest_source(),
        }
    }

    /// The source's last word, which is answered at once or not at all.
    fn confirm(&mut self, bug: Option<Bug>) -> bool {
        let ends_early = bug == Some(Bug::EndBeforeSettled)
            && matches!(self.target.durable, Some(TargetRecord::Accepted | TargetRecord::Started));
        if !self.target.up || self.target.machine.is_some() && !ends_early {
            return false;
        }
        if self.target.durable == Some(TargetRecord::Settled) || ends_early {
            self.target.ended = true;
        }
        self.target.ended
    }

    /// Carries out the target's next effect.
    pub fn step_target(&mut self, turn: Turn, bug: Option<Bug>) {
        let effect = self.target.todo.remove(0);
        let fresh = self.fresh;
        let side = &mut self.target;
        let mut event = None;
        match effect {
            TargetEffect::Journal(record) => {
                if bug == Some(Bug::RunBeforeJournal)
                    && record == TargetRecord::Accepted
                    && side.qemu == Qemu::Loaded
                {
                    side.qemu = Qemu::Running;
                    self.past.target_ran = true;
                }
                match turn {
                    Turn::Well if bug == Some(Bug::TargetWithoutFsync) => {
                        side.cached = Some(record);
                    }
                    Turn::Well | Turn::FailsLate => side.write(record),
                    Turn::Fails => {}
                }
                event = Some(match turn {
                    Turn::Well => TargetEvent::Journaled,
                    Turn::Fails => TargetEvent::Unwritten,
                    Turn::FailsLate if bug == Some(Bug::UnknownIsUnwritten) => {
                        TargetEvent::Unwritten
                    }
                    Turn::FailsLate => TargetEvent::JournalFailed,
                });
            }
            TargetEffect::Note(record) => match turn {
                Turn::Well => side.write(record),
                _ => side.unwritten = true,
            },
            TargetEffect::Run => {
                let loaded = matches!(side.qemu, Qemu::Loaded | Qemu::Stopped | Qemu::Running);
                event = Some(match (loaded, turn) {
                    (true, Turn::Well) => {
                        side.qemu = Qemu::Running;
                        TargetEvent::Ran
                    }
                    // It was told, and died: with the guest in it, as far as anybody knows.
                    (true, _) => {
                        side.qemu = Qemu::Dead;
                        self.past.crashed = true;
                        TargetEvent::MayHaveRun
                    }
                    (false, _) if fresh => TargetEvent::NeverRan,
                    (false, _) => {
                        self.past.crashed = true;
                        TargetEvent::MayHaveRun
                    }
                });
                if loaded {
                    self.past.target_ran = true;
                    let accepted = Some(TargetRecord::Accepted);
                    self.past.ran_unaccepted |= side.durable != accepted && side.cached != accepted;
                    self.past.ran_twice_in_time |= self.past.resumed && !self.past.overridden;
                }
            }
            TargetEffect::Settle | TargetEffect::Discard if turn != Turn::Well => {
                side.todo.clear();
                side.unwritten = true;
            }
            TargetEffect::Settle => side.book = true,
            TargetEffect::Discard => {
                if side.qemu != Qemu::Dead {
                    side.qemu = Qemu::Ended;
                }
            }
            TargetEffect::Pause => {
                if side.qemu == Qemu::Running {
                    side.qemu = Qemu::Stopped;
                }
            }
            TargetEffect::Remove => {
                side.qemu = Qemu::Ended;
                side.book = false;
            }
            TargetEffect::Answer(verdict) => self.send(Message::Answer(verdict)),
            TargetEffect::Shout(_) => self.past.conflict = true,
            TargetEffect::End => {
                if turn == Turn::Well && !side.unwritten {
                    side.ended = true;
                } else {
                    side.unwritten = true;
                }
            }
        }
        match event {
            Some(event) => self.feed_target(event, bug),
            None => self.rest_target(bug),
        }
    }

    /// Whether a restart of the source, or its shell after a failure, has something left to do.
    pub fn source_unsettled(&self) -> bool {
        self.source.up && self.source.machine.is_none() && !self.source.ended
    }

    /// Whether the target has to act before it may answer.
    pub fn target_unsettled(&self) -> bool {
        let tells_only =
            matches!(self.target.durable, Some(TargetRecord::Settled | TargetRecord::Yielded));
        self.target.up && self.target.machine.is_none() && !self.target.ended && !tells_only
    }

    pub fn settle_source(&mut self, bug: Option<Bug>) {
        let last = match bug {
            Some(Bug::ForgetDelegation) => None,
            _ => self.source.durable,
        };
        self.source.machine = Some(Source::recover(last));
        self.feed_source(SourceEvent::Restarted, bug);
    }

    /// Makes the target's machine from its journal.
    pub fn recover_target(&mut self, bug: Option<Bug>) {
        let last = match (bug, self.target.durable) {
            (Some(Bug::ForgetAcceptance), Some(TargetRecord::Accepted)) => None,
            (Some(Bug::RunWhatWasYielded), Some(TargetRecord::Yielded)) => {
                Some(TargetRecord::Accepted)
            }
            (_, durable) => durable,
        };
        self.target.machine = Some(Target::recover(last));
        self.fresh = false;
    }

    pub fn settle_target(&mut self, bug: Option<Bug>) {
        self.recover_target(bug);
        self.feed_target(TargetEvent::Restarted, bug);
    }

    /// A question arrives at the target.
    pub fn ask_target(&mut self, standing: Standing, bug: Option<Bug>) {
        let standing = match bug {
            Some(Bug::IgnoreTookBack) => Standing::Waits,
            _ => standing,
        };
        if self.target.machine.is_some() || self.target_unsettled() {
            let verdict = match bug {
                Some(Bug::RefuseWhileHolding) => Verdict::Refused,
                _ => Verdict::Undecided,
            };
            self.send(Message::Answer(verdict));
            return;
        }
        self.recover_target(bug);
        self.asked = Some(standing);
        let unknown = self.target_state() == Some(TargetState::Receiving);
        if unknown || bug == Some(Bug::RunWhatWasYielded) {
            self.feed_target(TargetEvent::Restarted, bug);
        } else {
            self.rest_target(bug);
        }
    }

    pub fn crash_source(&mut self, host: bool) {
        self.past.crashed |= self.source.crash(host);
    }

    pub fn crash_target(&mut self, host: bool) {
        (self.fresh, self.asked) = (false, None);
        self.past.crashed |= self.target.crash(host);
    }
}

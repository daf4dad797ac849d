//! The shell around the two machines, as lax as the agent's.
//!
//! Invariant: the machines are the product's own; this file does with their effects what
//! `migration::settle` does, one effect at a time, with every way in which each can go wrong.

use longhaul::migration::handover::{
    Conflict, Source, SourceEffect, SourceEvent, SourceRecord, SourceState, Standing, Target,
    TargetEffect, TargetEvent, TargetRecord, TargetState, Verdict,
};

use super::bugs::Bug;
use super::world::{Message, Qemu, Turn, World};

impl World {
    /// Feeds the source; what follows is done before what is left to do.
    pub fn feed_source(&mut self, event: SourceEvent, bug: Option<Bug>) {
        let Some(machine) = &mut self.source.machine else { return };
        let mut effects = machine.on(event);
        match bug {
            Some(Bug::ResumeOnTimeout) if event == SourceEvent::Retry => {
                effects = vec![SourceEffect::Rollback];
            }
            Some(Bug::DestroyOnDelegation) if effects.contains(&SourceEffect::SendToken) => {
                effects.push(SourceEffect::Destroy);
            }
            Some(Bug::PromiseUnwritten) if machine.state() == SourceState::Withdrawing => {
                *machine = Source::at(SourceState::Delegated);
                effects =
                    vec![SourceEffect::Note(SourceRecord::Delegated), SourceEffect::NotResolved];
            }
            _ => {}
        }
        effects.append(&mut self.source.todo);
        self.source.todo = effects;
        self.rest_source();
    }

    /// As `feed_source`, for the target.
    pub fn feed_target(&mut self, event: TargetEvent, bug: Option<Bug>) {
        let Some(machine) = &mut self.target.machine else { return };
        let before = machine.state();
        let mut effects = machine.on(event);
        match bug {
            Some(Bug::RevokeUnwritten) if event == TargetEvent::NeverRan => {
                *machine = Target::at(TargetState::Refused);
                effects = vec![
                    TargetEffect::Answer(Verdict::Refused),
                    TargetEffect::Discard,
                    TargetEffect::End,
                ];
            }
            Some(Bug::YieldOnlyAtRestart)
                if before == TargetState::Yielding && matches!(event, TargetEvent::Asked(_)) =>
            {
                effects = vec![];
            }
            _ => {}
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
                    | SourceState::Withdrawing
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
        let arrives =
            matches!(self.target_state(), Some(TargetState::Receiving | TargetState::Holding));
        let works = arrives && self.fresh || self.target_state() == Some(TargetState::Revoking);
        if works && !self.target.unwritten {
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

    /// What was left to do is left: it is found in the journal.
    fn source_gives_up(&mut self) {
        self.source.todo.clear();
        self.source.unwritten = true;
    }

    fn target_gives_up(&mut self) {
        self.target.todo.clear();
        self.target.unwritten = true;
        self.asked = None;
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
                let durable = match (bug, turn) {
                    (Some(Bug::SourceWithoutFsync), Turn::Well) => {
                        side.write(record, Turn::FailsSeen);
                        true
                    }
                    _ => side.write(record, turn),
                };
                self.past.delegated |= side.durable == Some(SourceRecord::Delegated);
                event = Some(match turn {
                    _ if durable => SourceEvent::Journaled,
                    Turn::Fails => SourceEvent::Unwritten,
                    _ => SourceEvent::JournalFailed,
                });
            }
            SourceEffect::Note(record) => side.unwritten |= !side.write(record, turn),
            SourceEffect::SendToken => {
                self.past.token_sent_undelegated |= side.durable != Some(SourceRecord::Delegated);
                self.send(Message::Token);
            }
            SourceEffect::SendAbort => self.send(Message::Abort),
            SourceEffect::Ask(standing) => self.send(Message::Ask(standing)),
            SourceEffect::Confirm => {
                if turn != Turn::Well || !self.confirm(bug) {
                    self.source_gives_up();
                }
            }
            SourceEffect::Rollback | SourceEffect::Destroy | SourceEffect::Reclaim
                if turn != Turn::Well =>
            {
                self.source_gives_up();
            }
            SourceEffect::Rollback => {
                if side.qemu == Qemu::Stopped {
                    side.qemu = Qemu::Running;
                    self.past.resumed |= self.past.delegated;
                    self.past.ran_twice_in_time |= self.past.target_ran && !self.past.overridden;
                }
                self.past.refused_word_followed |=
                    self.past.word_refused && self.source_state() == Some(SourceState::Returned);
            }
            SourceEffect::Destroy => {
                self.past.ended_running |= side.qemu == Qemu::Running;
                if side.qemu != Qemu::Dead {
                    side.qemu = Qemu::Ended;
                }
                side.book = false;
                self.past.refused_word_followed |=
                    self.past.word_refused && self.source_state() == Some(SourceState::Left);
            }
            SourceEffect::Reclaim => side.book = true,
            SourceEffect::Shout(conflict) => {
                self.past.conflict = true;
                // The operator had ended it: that is a crash that was asked for.
                self.past.crashed |= conflict == Conflict::RunsNowhere;
            }
            SourceEffect::TooLate => {}
            SourceEffect::NotResolved => self.past.word_refused = true,
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
        if !self.target.up || self.target.machine.is_some() && bug != Some(Bug::EndBeforeSettled) {
            return false;
        }
        self.target.make_sure(bug);
        let settled = match bug {
            Some(Bug::EndBeforeSettled) => self.target.read.is_some(),
            _ => self.target.read == Some(TargetRecord::Settled),
        };
        self.target.ended |= settled;
        self.target.ended
    }

    /// Carries out the target's next effect.
    pub fn step_target(&mut self, turn: Turn, bug: Option<Bug>) {
        let effect = self.target.todo.remove(0);
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
                let durable = match (bug, turn) {
                    (Some(Bug::TargetWithoutFsync), Turn::Well) => {
                        side.write(record, Turn::FailsSeen);
                        true
                    }
                    _ => side.write(record, turn),
                };
                event = Some(match turn {
                    _ if durable => TargetEvent::Journaled,
                    Turn::Fails => TargetEvent::Unwritten,
                    _ if bug == Some(Bug::UnknownIsUnwritten) => TargetEvent::Unwritten,
                    _ => TargetEvent::JournalFailed,
                });
            }
            TargetEffect::Note(record) => side.unwritten |= !side.write(record, turn),
            TargetEffect::Run => event = self.run(turn, bug),
            TargetEffect::Settle
            | TargetEffect::Discard
            | TargetEffect::Pause
            | TargetEffect::Remove
                if turn != Turn::Well =>
            {
                self.target_gives_up();
            }
            TargetEffect::Settle => side.book = true,
            TargetEffect::Discard => {
                self.past.ended_running |= side.qemu == Qemu::Running;
                if side.qemu != Qemu::Dead {
                    side.qemu = Qemu::Ended;
                }
            }
            TargetEffect::Pause => {
                let found = side.book || bug != Some(Bug::PauseOnlyBooked);
                if found && side.qemu == Qemu::Running {
                    side.qemu = Qemu::Stopped;
                }
            }
            TargetEffect::Remove => {
                self.past.ended_running |= side.qemu == Qemu::Running;
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

    /// Tells the target's hypervisor to run the guest; nothing if it lives and was not seen to.
    fn run(&mut self, turn: Turn, bug: Option<Bug>) -> Option<TargetEvent> {
        let (fresh, side) = (self.fresh, &mut self.target);
        if !matches!(side.qemu, Qemu::Loaded | Qemu::Stopped | Qemu::Running) {
            // Whether one of an earlier life ran is not known.
            self.past.crashed |= !fresh;
            return Some(if fresh { TargetEvent::NeverRan } else { TargetEvent::MayHaveRun });
        }
        self.past.ran_unaccepted |= side.durable != Some(TargetRecord::Accepted);
        if turn != Turn::FailsSeen {
            self.past.target_ran = true;
            self.past.ran_twice_in_time |= self.past.resumed && !self.past.overridden;
            side.qemu = Qemu::Running;
        }
        match turn {
            Turn::Well => return Some(TargetEvent::Ran),
            Turn::Fails => {
                // With the guest in it, as far as anybody knows.
                (side.qemu, self.past.crashed) = (Qemu::Dead, true);
                return Some(TargetEvent::MayHaveRun);
            }
            _ if bug == Some(Bug::UnseenIsRun) => return Some(TargetEvent::MayHaveRun),
            _ => {}
        }
        self.target_gives_up();
        None
    }

    /// Whether a restart of the source, or its shell after a failure, has something left to do.
    pub fn source_unsettled(&self) -> bool {
        self.source.up && self.source.machine.is_none() && !self.source.ended
    }

    /// Whether the target has something left to do by itself.
    pub fn target_unsettled(&self, bug: Option<Bug>) -> bool {
        let tells_only = match self.target.read {
            Some(TargetRecord::Settled | TargetRecord::Yielded) => true,
            Some(TargetRecord::Yielding) => bug == Some(Bug::YieldOnlyAtRestart),
            _ => false,
        };
        self.target.up && self.target.machine.is_none() && !self.target.ended && !tells_only
    }

    pub fn settle_source(&mut self, bug: Option<Bug>) {
        self.source.make_sure(bug);
        self.past.delegated |= self.source.durable == Some(SourceRecord::Delegated);
        let last = match bug {
            Some(Bug::ForgetDelegation) => None,
            _ => self.source.read,
        };
        self.source.machine = Some(Source::recover(last));
        self.feed_source(SourceEvent::Restarted, bug);
    }

    /// Makes the target's machine from its journal.
    pub fn recover_target(&mut self, bug: Option<Bug>) {
        self.target.make_sure(bug);
        let last = match (bug, self.target.read) {
            (Some(Bug::ForgetAcceptance), Some(TargetRecord::Accepted)) => None,
            (Some(Bug::RunWhatWasYielded), Some(TargetRecord::Yielded)) => {
                Some(TargetRecord::Accepted)
            }
            (_, read) => read,
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
        if self.target.machine.is_some() {
            let verdict = match bug {
                Some(Bug::RefuseWhileHolding) => Verdict::Refused,
                _ => Verdict::Undecided,
            };
            self.send(Message::Answer(verdict));
            return;
        }
        // It need not have been settled from its journal before.
        self.recover_target(bug);
        self.asked = Some(standing);
        let unknown = self.target_state() == Some(TargetState::Receiving);
        if unknown || bug == Some(Bug::RunWhatWasYielded) {
            self.feed_target(TargetEvent::Restarted, bug);
        } else {
            self.rest_target(bug);
        }
    }
}

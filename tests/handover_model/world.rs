//! The world around the two machines: journals, hypervisors, a network, and what has happened.
//!
//! Invariant: what a crash loses is what is not durable, and nothing else; what is read is not
//! always that.

use longhaul::migration::handover::{
    Source, SourceEffect, SourceRecord, SourceState, Standing, Target, TargetEffect, TargetRecord,
    TargetState, Verdict,
};

use super::bugs::Bug;

/// A message under way. The network keeps what it has delivered, so it duplicates, delays and
/// reorders without end; what is dropped is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Message {
    /// What the target has to load: the token may overtake it.
    Data,
    Token,
    Abort,
    Ask(Standing),
    Answer(Verdict),
}

impl Message {
    pub const ALL: [Self; 7] = [
        Self::Data,
        Self::Token,
        Self::Abort,
        Self::Ask(Standing::Waits),
        Self::Ask(Standing::TookBack),
        Self::Answer(Verdict::Runs),
        Self::Answer(Verdict::Refused),
    ];

    pub fn bit(self) -> u8 {
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
    /// The last step that is on the disk.
    pub durable: Option<R>,
    /// The last step that a reader finds: after a failed fsync it can be another.
    pub read: Option<R>,
    pub ended: bool,
    /// A note was lost: the attempt may not end in this life.
    pub unwritten: bool,
    pub qemu: Qemu,
    /// The VM is one of this host's.
    pub book: bool,
    pub left: Budget,
}

impl<M, E, R: Copy> Side<M, E, R> {
    fn new(machine: M, qemu: Qemu, book: bool, left: Budget) -> Self {
        Self {
            up: true,
            machine: Some(machine),
            todo: vec![],
            durable: None,
            read: None,
            ended: false,
            unwritten: false,
            qemu,
            book,
            left,
        }
    }

    /// The agent crashes, or its host and the hypervisor with it; whether a guest died of that.
    fn crash(&mut self, host: bool) -> bool {
        (self.up, self.machine, self.unwritten) = (false, None, false);
        self.todo.clear();
        if !host {
            return false;
        }
        self.read = self.durable;
        if self.qemu == Qemu::Ended {
            return false;
        }
        let was = std::mem::replace(&mut self.qemu, Qemu::Dead);
        matches!(was, Qemu::Running | Qemu::Stopped)
    }

    /// Writes a record, which turns out so; false if the writer is not told that it is durable. A
    /// step behind the end opens the attempt again.
    pub fn write(&mut self, record: R, turn: Turn) -> bool {
        match turn {
            Turn::Well | Turn::FailsLate => {
                (self.durable, self.read) = (Some(record), Some(record))
            }
            Turn::FailsSeen => (self.durable, self.read) = (self.read, Some(record)),
            Turn::FailsUnseen => self.durable = Some(record),
            Turn::Fails => return false,
        }
        self.ended = false;
        turn == Turn::Well
    }

    /// Makes durable what is read, before it is acted upon.
    pub fn make_sure(&mut self, bug: Option<Bug>) {
        if bug != Some(Bug::BelieveUnsynced) {
            self.durable = self.read;
        }
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
    /// It was shouted.
    pub conflict: bool,
    /// The operator was told that a word of theirs will not be followed.
    pub word_refused: bool,
    /// And it was.
    pub refused_word_followed: bool,
    /// An agent ended a guest that ran.
    pub ended_running: bool,
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
    /// It fails; a record is not durable. A guest that was told to run: its hypervisor died of it.
    Fails,
    /// A record is durable and its writer does not know; a guest runs and nobody has seen that.
    FailsLate,
    /// A record is read and not durable; a guest stands still, and nobody has seen that.
    FailsSeen,
    /// A record is durable and not read.
    FailsUnseen,
}

impl Turn {
    /// How a write can fail.
    pub const BAD_WRITES: [Self; 4] =
        [Self::Fails, Self::FailsLate, Self::FailsSeen, Self::FailsUnseen];
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

    /// That nothing is decided yet is not sent: its receiver does nothing upon it, as if it were lost.
    pub fn send(&mut self, message: Message) {
        if message != Message::Answer(Verdict::Undecided) {
            self.net |= message.bit();
        }
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

    pub fn crash_source(&mut self, host: bool) {
        self.past.crashed |= self.source.crash(host);
    }

    pub fn crash_target(&mut self, host: bool) {
        (self.fresh, self.asked) = (false, None);
        self.past.crashed |= self.target.crash(host);
    }
}

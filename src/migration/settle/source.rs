//! The source's half: journal, token, the target's answer, the operator's word.
//!
//! Invariant: a lost link changes nothing but whom to ask: the question is repeated until the
//! target's journal answers, in this life of the agent or a later one, and the guest stands still.

mod question;
mod word;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::Patience;
use crate::hypervisor::SourceVm;
use crate::migration::doubts::{Doubt, Held};
use crate::migration::error::{MigrationError, chain};
use crate::migration::handover::{
    Conflict, Source, SourceEffect, SourceEvent, SourceRecord, SourceState, Verdict,
};
use crate::migration::job::{Dial, Site};
use crate::migration::journal::{AppendError, Began, History, Record, Role};
use crate::migration::link::Link;
use crate::migration::message::{JobId, TargetTimes, ToSource, ToTarget, Token};
use crate::migration::points;

/// What the target said last.
#[derive(Debug, Clone, Default)]
struct Answer {
    /// Why, for a refusal.
    reason: Option<String>,
    /// How long its part took.
    times: TargetTimes,
}

/// An attempt as its source settles it.
pub(in crate::migration) struct Leaving<'a> {
    site: &'a Site,
    dial: &'a dyn Dial,
    id: JobId,
    name: &'a str,
    peer: &'a str,
    /// Whether the guest ran before the attempt.
    ran: bool,
    /// The VM, while this life of the agent has worked with it.
    pub(in crate::migration) vm: Option<Arc<dyn SourceVm>>,
    /// The link of the attempt, and the token that goes over it.
    pub(in crate::migration) link: Option<(&'a Link, Token)>,
    machine: Source,
    state: Carried,
}

/// What came of the effects so far.
#[derive(Debug, Default)]
struct Carried {
    /// A record that nothing waits for is not durable.
    unwritten: Option<AppendError>,
    /// The delegation could not be written.
    not_delegated: Option<AppendError>,
    /// The operator's word could not be written.
    not_resolved: bool,
    /// The guest's process had ended when it was to be given back.
    crashed: bool,
    conflict: Option<Conflict>,
    token_sent: Option<Instant>,
    answer: Answer,
}

/// How a hand-over ended at its source.
#[derive(Debug)]
pub(in crate::migration) struct HandingOver {
    /// When the token was with the transport.
    pub(in crate::migration) token_sent: Instant,
    /// When the target's answer was here.
    pub(in crate::migration) answered: Instant,
    /// What the target said of its part.
    pub(in crate::migration) times: TargetTimes,
    /// What an operator should know.
    pub(in crate::migration) notes: Vec<String>,
}

impl<'a> Leaving<'a> {
    /// An attempt that `machine` is at.
    pub(in crate::migration) fn new(
        site: &'a Site,
        dial: &'a dyn Dial,
        id: JobId,
        [name, peer]: [&'a str; 2],
        ran: bool,
        machine: Source,
    ) -> Self {
        let state = Carried::default();
        Self { site, dial, id, name, peer, ran, vm: None, link: None, machine, state }
    }

    /// Hands over: returns once the target has decided and that was carried out here, once the
    /// operator has decided instead, or, in doubt, once `unattended`.
    ///
    /// # Errors
    ///
    /// The guest is this side's again, or (`NotGivenBack`) is being made so.
    pub(in crate::migration) async fn hand_over(
        &mut self,
        note: impl Fn(String),
        unattended: impl Future<Output = ()>,
    ) -> Result<HandingOver, MigrationError> {
        let delegated = self.feed(SourceEvent::Parked).await;
        if let Some(error) = self.state.not_delegated.take() {
            delegated?;
            return Err(MigrationError::Journal { vm: self.name.to_owned(), source: error });
        }
        // A token that does not go out may still have gone out: the answer tells.
        let sent = self.state.token_sent.unwrap_or_else(Instant::now);
        let told = match delegated {
            Ok(()) => self.answer_on_the_link().await,
            Err(error) => {
                tracing::warn!(vm = self.name, error = chain(&error), "the token is lost");
                None
            }
        };
        let answered = Instant::now();
        let carried_out = match told {
            Some(verdict) => {
                points::reach(points::ANSWERED).await;
                self.feed(SourceEvent::Peer(verdict)).await
            }
            None => {
                note(format!(
                    "the link was lost in the hand-over of {}: it is paused here until {} \
                     answers; asking again",
                    self.name, self.peer
                ));
                self.settle_in_doubt(unattended).await
            }
        };
        self.conclude(carried_out, sent, answered)
    }

    fn conclude(
        &mut self,
        carried_out: Result<(), MigrationError>,
        token_sent: Instant,
        answered: Instant,
    ) -> Result<HandingOver, MigrationError> {
        let (name, peer) = (self.name.to_owned(), self.peer.to_owned());
        let Answer { reason, times } = self.state.answer.clone();
        match self.machine.state() {
            SourceState::Gone => {
                let mut notes: Vec<String> = Vec::new();
                notes.extend(reason.map(|reason| format!("{peer} says: {reason}")));
                notes.extend(carried_out.err().map(|error| {
                    format!(
                        "{name} runs at {peer}; this host has not tidied up yet and goes on \
                         trying: {}",
                        chain(&error)
                    )
                }));
                Ok(HandingOver { token_sent, answered, times, notes })
            }
            SourceState::Kept => {
                if self.state.crashed {
                    return Err(MigrationError::Crashed { vm: name });
                }
                match carried_out {
                    Err(error) if !error.is_journal() => return Err(error.not_given_back(&name)),
                    _ => {}
                }
                let reason = reason.unwrap_or_else(|| "it refused the hand-over".into());
                Err(MigrationError::Peer { peer, reason })
            }
            state @ (SourceState::Returned | SourceState::Left) => Err(MigrationError::Resolved {
                vm: name,
                here: state == SourceState::Returned,
                undone: carried_out.err().map(|error| chain(&error)),
            }),
            _ => Err(MigrationError::InDoubt { vm: name, peer, job: self.id }),
        }
    }

    /// Ends the attempt before the hand-over: gives the guest back and says so, in that order.
    pub(in crate::migration) async fn abort(&mut self, error: MigrationError) -> MigrationError {
        match self.feed(SourceEvent::Abort).await {
            _ if self.state.crashed => MigrationError::Crashed { vm: self.name.to_owned() },
            Ok(()) => error,
            // The journal stays open: it is tried again, by whoever looks for such journals.
            Err(back) if back.is_journal() => {
                tracing::warn!(vm = self.name, error = chain(&back), "not written down");
                error
            }
            Err(back) => {
                tracing::error!(vm = self.name, first = %error, "could not give the guest back");
                back.not_given_back(self.name)
            }
        }
    }

    async fn answer_on_the_link(&mut self) -> Option<Verdict> {
        let (link, _) = self.link?;
        loop {
            match link.reply().await.ok()? {
                ToSource::Verdict { job, verdict, reason, times }
                    if job == self.id && verdict != Verdict::Undecided =>
                {
                    self.state.answer = Answer { reason, times };
                    return Some(verdict);
                }
                _ => {}
            }
        }
    }

    /// Asks, and listens to the operator, until either has decided, or until nobody waits for that
    /// any longer: then it goes on without this job.
    async fn settle_in_doubt(
        &mut self,
        unattended: impl Future<Output = ()>,
    ) -> Result<(), MigrationError> {
        let mut held = self.site.doubts.hold(Doubt {
            job: self.id,
            vm: self.name.to_owned(),
            peer: self.peer.to_owned(),
            role: Role::Source,
            since: jiff::Timestamp::now().to_string(),
            blocks: true,
            detail: String::new(),
        });
        let decided = |state| !matches!(state, SourceState::Delegated | SourceState::Withdrawing);
        self.ask_until(&mut held, decided, unattended).await
    }

    /// Asks the target, and listens to the operator, until the state is such.
    async fn ask_until(
        &mut self,
        held: &mut Held,
        enough: fn(SourceState) -> bool,
        unattended: impl Future<Output = ()>,
    ) -> Result<(), MigrationError> {
        let mut unattended = std::pin::pin!(unattended);
        let mut patience = None;
        loop {
            let (blocks, detail) = self.what_is_known().await;
            held.say(blocks, detail);
            // Only what can be dropped half-way is waited for together with something else.
            let asking = async {
                if let Some(patience) = &mut patience {
                    Patience::wait(patience).await;
                }
                self.ask_again().await
            };
            tokio::select! {
                event = asking => {
                    patience.get_or_insert_with(Patience::new);
                    if let Some(event) = event {
                        self.feed(event).await?;
                    } else if self.machine.state() == SourceState::Withdrawing {
                        self.feed(SourceEvent::Retry).await?;
                    }
                }
                word = held.word() => self.follow(word).await?,
                () = &mut unattended => return Ok(()),
            }
            if enough(self.machine.state()) {
                return Ok(());
            }
        }
    }

    /// Asks the target once more, if there is something to ask; what it says, if it is reached.
    async fn ask_again(&mut self) -> Option<SourceEvent> {
        match self.machine.on(SourceEvent::Retry)[..] {
            [SourceEffect::Ask(standing)] => self.ask(standing).await,
            _ => None,
        }
    }

    /// Takes an event and carries out all that follows from it. A record that nothing waited for and
    /// that could not be written makes it fail in the end.
    async fn feed(&mut self, event: SourceEvent) -> Result<(), MigrationError> {
        let mut todo = VecDeque::from(self.machine.on(event));
        while let Some(effect) = todo.pop_front() {
            if let Some(event) = self.carry_out(effect).await? {
                for effect in self.machine.on(event).into_iter().rev() {
                    todo.push_front(effect);
                }
            }
        }
        match self.state.unwritten.take() {
            Some(source) => Err(MigrationError::Journal { vm: self.name.to_owned(), source }),
            None => Ok(()),
        }
    }

    async fn carry_out(
        &mut self,
        effect: SourceEffect,
    ) -> Result<Option<SourceEvent>, MigrationError> {
        match effect {
            SourceEffect::Journal(step) => {
                if step == SourceRecord::Delegated {
                    points::reach(points::PARKED).await;
                }
                return Ok(Some(match self.append(&Record::source(step)) {
                    Ok(()) => SourceEvent::Journaled,
                    Err(error) => {
                        tracing::error!(vm = self.name, ?step, %error, "not journaled");
                        let event = match error {
                            AppendError::Unwritten(_) => SourceEvent::Unwritten,
                            AppendError::Unknown(_) => SourceEvent::JournalFailed,
                        };
                        if step == SourceRecord::Delegated {
                            self.state.not_delegated = Some(error);
                        }
                        event
                    }
                }));
            }
            SourceEffect::Note(step) => {
                if let Err(error) = self.append(&Record::source(step)) {
                    tracing::error!(vm = self.name, ?step, %error, "not noted");
                    self.state.unwritten = Some(error);
                }
            }
            SourceEffect::SendToken => {
                points::reach(points::DELEGATED).await;
                if let Some((link, token)) = self.link {
                    let sent = link.tell(&ToTarget::Token(token)).await;
                    self.state.token_sent = Some(Instant::now());
                    sent?;
                }
                points::reach(points::TOKEN_SENT).await;
            }
            SourceEffect::SendAbort => {
                if let Some((link, _)) = self.link {
                    let reason = "the source ended the attempt".to_owned();
                    // The peer learns of it by the end of the session as well.
                    let _ = link.tell(&ToTarget::Abort { reason }).await;
                }
            }
            SourceEffect::Ask(standing) => return Ok(self.ask(standing).await),
            SourceEffect::Confirm => self.confirm().await?,
            SourceEffect::Rollback => self.rollback().await?,
            SourceEffect::Destroy => {
                points::reach(points::NOTED).await;
                if self.site.host.runs(self.name).await {
                    self.vm().await?.destroy().await?;
                }
                self.site.host.departed(self.name).await?;
                points::reach(points::LET_GO).await;
            }
            SourceEffect::Reclaim => self.site.host.reclaim(self.name).await?,
            SourceEffect::Shout(conflict) => {
                let reason = self.state.answer.reason.as_deref().unwrap_or_default();
                tracing::error!(vm = self.name, peer = self.peer, ?conflict, reason, "CONFLICT");
                self.site.doubts.count_conflict(conflict);
                self.state.conflict = Some(conflict);
            }
            SourceEffect::TooLate => {}
            SourceEffect::NotResolved => self.state.not_resolved = true,
            SourceEffect::End => {
                if self.state.unwritten.is_none() {
                    self.state.unwritten = self.append(&Record::Ended).err();
                }
            }
        }
        Ok(None)
    }

    fn append(&self, record: &Record) -> Result<(), AppendError> {
        self.site.journals.append(self.id, record)
    }

    async fn vm(&self) -> Result<Arc<dyn SourceVm>, MigrationError> {
        match &self.vm {
            Some(vm) => Ok(Arc::clone(vm)),
            None => Ok(self.site.host.source(self.name).await?),
        }
    }

    async fn rollback(&mut self) -> Result<(), MigrationError> {
        let given_back = async {
            let vm = self.vm().await?;
            vm.rollback(self.ran).await?;
            Ok(vm.cleanup(false).await?)
        };
        match given_back.await {
            Err(_) if !self.site.host.runs(self.name).await => {
                self.state.crashed = true;
                Ok(())
            }
            given_back => given_back,
        }
    }

    /// Whether the VM is held up, and what is known, in a sentence.
    async fn what_is_known(&self) -> (bool, String) {
        let (name, peer) = (self.name, self.peer);
        match self.machine.state() {
            SourceState::Withdrawing => (true, self.said()),
            SourceState::Delegated if self.is_running().await => (
                true,
                format!(
                    "{name} runs here: it was given back (or resumed by hand), and that {peer} has \
                     refused it is not written down; {peer} is asked once more"
                ),
            ),
            SourceState::Returned => {
                (false, format!("its operator took {name} back; {peer} has not heard of it yet"))
            }
            SourceState::Left => {
                (false, format!("its operator left {name} to {peer}, which has not confirmed it"))
            }
            _ => (
                true,
                format!(
                    "{peer} was given the decision and has not answered: {name} is paused here \
                     and is started only if {peer} says that it never will"
                ),
            ),
        }
    }

    /// What holds now, in a sentence.
    fn said(&self) -> String {
        let (name, peer) = (self.name, self.peer);
        let reason = self.state.answer.reason.as_deref().unwrap_or("it gave no reason");
        match (self.machine.state(), self.state.conflict) {
            (_, Some(Conflict::RunsNowhere)) => format!(
                "CONFLICT: {name} was left to {peer}, and {peer} has refused it ({reason}): it runs \
                 nowhere; its disks are here as they were when it was paused: `longhaul vm start \
                 {name}`"
            ),
            (SourceState::Kept | SourceState::Returned, _) if self.state.crashed => format!(
                "{name} is this host's and does not run: its hypervisor has ended, which is a crash \
                 of the guest; start it from its disks with `longhaul vm start {name}`"
            ),
            (SourceState::Kept, _) => format!("{name} is this host's, as it was before ({reason})"),
            (SourceState::Gone, _) => format!("{name} runs at {peer}"),
            (SourceState::Returned, _) => format!("{name} is this host's, by its operator's word"),
            (SourceState::Left, _) => format!("{name} was left to {peer}, by its operator's word"),
            (SourceState::Withdrawing, _) => format!(
                "an operator's word for {name} was not followed, and the disk does not say whether \
                 it holds it: it is being written over, and until that is done a restart of this \
                 agent may follow it; mend the disk"
            ),
            (_, _) => format!("{name} is paused here until {peer} has decided"),
        }
    }
}

/// Settles an attempt from what its journal says. Returns what holds now.
pub(super) async fn recover(
    site: &Site,
    history: &History,
    began: &Began,
    dial: &dyn Dial,
    held: &mut Held,
) -> Result<String, MigrationError> {
    let machine = Source::recover(history.source_step());
    let names = [began.vm.as_str(), began.peer.as_str()];
    let mut leaving = Leaving::new(site, dial, history.job, names, began.was_running, machine);
    let (blocks, detail) = match history.source_step() {
        None => (true, format!("the move of {} was interrupted: it is given back", began.vm)),
        Some(_) => leaving.what_is_known().await,
    };
    held.say(blocks, detail);
    leaving.feed(SourceEvent::Restarted).await?;
    let over = |state| matches!(state, SourceState::Kept | SourceState::Gone);
    if !over(leaving.machine.state()) {
        leaving.ask_until(held, over, std::future::pending()).await?;
    }
    Ok(leaving.said())
}

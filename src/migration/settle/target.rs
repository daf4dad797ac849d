//! The target's half: verify, decide, run; and the answers that its journal gives afterwards.
//!
//! Invariant: the guest is run by the machine's `Run` alone, and each of a journal's readers (the
//! arrival, a question of the source, the operator's word, a restart) acts under one lock.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use longhaul_transport::ControlSender;

use super::{Patience, unsure};
use crate::hypervisor::{NotRunning, TargetVm, VmSpec};
use crate::migration::attempts::{Attempts, Entered};
use crate::migration::doubts::{Held, Word};
use crate::migration::error::{MigrationError, chain};
use crate::migration::handover::{
    Choice, Standing, Target, TargetEffect, TargetEvent, TargetRecord, TargetState, Verdict,
};
use crate::migration::job::{Side, Site};
use crate::migration::journal::{AppendError, Began, History, Record, Role};
use crate::migration::message::{JobId, TargetTimes, ToSource};
use crate::migration::points;

/// An attempt as its target settles it.
pub(in crate::migration) struct Arriving<'a> {
    site: &'a Site,
    id: JobId,
    name: String,
    peer: &'a str,
    /// What the VM is; unknown only for an attempt that this host never took part in.
    spec: Option<VmSpec>,
    pub(in crate::migration) machine: Target,
    /// The guest is to run; its owner had not paused it.
    pub(in crate::migration) run: bool,
    /// The hypervisor that this life of the agent has prepared.
    pub(in crate::migration) vm: Option<Arc<dyn TargetVm>>,
    /// Where answers go.
    control: Option<&'a ControlSender>,
    pub(in crate::migration) times: TargetTimes,
    /// When the last item of data came, for the report.
    pub(in crate::migration) last_item_at: Option<Instant>,
    reason: Option<String>,
    verdict: Option<Verdict>,
    unwritten: Option<AppendError>,
    /// A record that something waits for could not be written.
    not_journaled: Option<AppendError>,
    crashed: bool,
}

impl<'a> Arriving<'a> {
    /// An attempt that begins.
    pub(in crate::migration) fn new(
        site: &'a Site,
        id: JobId,
        spec: &VmSpec,
        peer: &'a str,
        control: &'a ControlSender,
    ) -> Self {
        let mut new = Self::at(site, id, &spec.name, peer, Target::new());
        (new.spec, new.control) = (Some(spec.clone()), Some(control));
        new
    }

    fn at(site: &'a Site, id: JobId, name: &str, peer: &'a str, machine: Target) -> Self {
        Self {
            site,
            id,
            name: name.to_owned(),
            peer,
            spec: None,
            machine,
            run: true,
            vm: None,
            control: None,
            times: TargetTimes::default(),
            last_item_at: None,
            reason: None,
            verdict: None,
            unwritten: None,
            not_journaled: None,
            crashed: false,
        }
    }

    fn recovered(site: &'a Site, history: &History, began: &'a Began) -> Self {
        let machine = Target::recover(history.target_step());
        let mut new = Self::at(site, history.job, &began.vm, &began.peer, machine);
        (new.spec, new.run) = (began.spec.clone(), history.runs_at_target());
        new.reason = history.reason();
        new
    }

    /// Takes an event and carries out all that follows from it. A record that nothing waited for and
    /// that could not be written makes it fail in the end.
    pub(in crate::migration) async fn feed(
        &mut self,
        event: TargetEvent,
    ) -> Result<(), MigrationError> {
        let mut todo = VecDeque::from(self.machine.on(event));
        while let Some(effect) = todo.pop_front() {
            if let Some(event) = self.carry_out(effect).await? {
                for effect in self.machine.on(event).into_iter().rev() {
                    todo.push_front(effect);
                }
            }
        }
        match self.unwritten.take() {
            Some(source) => Err(MigrationError::Journal { vm: self.name.clone(), source }),
            None => Ok(()),
        }
    }

    /// Takes an event upon which this side decides, and stays until the decision is durable.
    pub(in crate::migration) async fn decide(
        &mut self,
        event: TargetEvent,
    ) -> Result<(), MigrationError> {
        self.feed(event).await?;
        let mut patience = Patience::new();
        while self.machine.state() == TargetState::Revoking {
            patience.wait().await;
            self.feed(TargetEvent::Retry).await?;
        }
        Ok(())
    }

    /// Decides against the attempt, unless it is decided.
    pub(in crate::migration) async fn refuse(
        &mut self,
        event: TargetEvent,
        reason: String,
    ) -> Result<(), MigrationError> {
        self.reason = Some(reason);
        self.decide(event).await
    }

    async fn carry_out(
        &mut self,
        effect: TargetEffect,
    ) -> Result<Option<TargetEvent>, MigrationError> {
        match effect {
            TargetEffect::Journal(step) => {
                if step == TargetRecord::Accepted {
                    points::reach(points::LOADED).await;
                }
                let begun = Instant::now();
                let journaled = self.append(step);
                self.times.journal_ms += ms_since(begun);
                return Ok(Some(match journaled {
                    Ok(()) => TargetEvent::Journaled,
                    Err(error) => self.not_journaled(step, error),
                }));
            }
            TargetEffect::Note(step) => {
                if let Err(error) = self.append(step) {
                    tracing::error!(vm = self.name, ?step, %error, "not noted");
                    self.unwritten = Some(error);
                }
            }
            TargetEffect::Run => {
                points::reach(points::ACCEPTED).await;
                let begun = Instant::now();
                let ran = self.run().await?;
                self.times.start_ms = ms_since(begun);
                self.times.since_last_ms = self.last_item_at.map(ms_since).unwrap_or_default();
                if ran == TargetEvent::Ran {
                    points::reach(points::RUNS).await;
                }
                return Ok(Some(ran));
            }
            TargetEffect::Settle => {
                points::reach(points::TOLD).await;
                if let Some(spec) = &self.spec {
                    self.site.host.settle(spec).await?;
                }
                points::reach(points::BOOKED).await;
            }
            TargetEffect::Discard => self.discard().await?,
            TargetEffect::Pause => self.pause().await?,
            TargetEffect::Remove => {
                if self.is_newest()? {
                    let host = &self.site.host;
                    if host.runs(&self.name).await {
                        host.source(&self.name).await?.destroy().await?;
                    } else if let Some(vm) = host.prepared(&self.name).await? {
                        vm.destroy().await?;
                    }
                    host.departed(&self.name).await?;
                }
            }
            TargetEffect::Answer(verdict) => {
                self.verdict = Some(verdict);
                if let Some(control) = self.control {
                    // A source that is not reached asks later; the journal has the answer.
                    let _ = control.send(&self.answer(verdict)).await;
                }
            }
            TargetEffect::Shout(conflict) => {
                tracing::error!(vm = self.name, peer = self.peer, ?conflict, "CONFLICT");
                self.site.doubts.count_conflict(conflict);
            }
            TargetEffect::End => {
                if self.unwritten.is_none() {
                    let ended = self.site.journals.append(self.id, &Record::Ended);
                    self.unwritten = ended.err();
                    self.site.doubts.changed(self.id);
                }
            }
        }
        Ok(None)
    }

    fn append(&self, step: TargetRecord) -> Result<(), AppendError> {
        let reason = match step {
            TargetRecord::Refused | TargetRecord::Yielding | TargetRecord::Yielded => {
                self.reason.as_deref()
            }
            _ => None,
        };
        self.site.journals.append(self.id, &Record::target(step, reason, self.run))
    }

    fn not_journaled(&mut self, step: TargetRecord, error: AppendError) -> TargetEvent {
        tracing::error!(vm = self.name, ?step, %error, "not journaled");
        if step == TargetRecord::Accepted {
            let why = chain(&error);
            self.reason = Some(format!("its hand-over could not be written down: {why}"));
        }
        let event = match error {
            AppendError::Unwritten(_) => TargetEvent::Unwritten,
            AppendError::Unknown(_) => TargetEvent::JournalFailed,
        };
        self.not_journaled = Some(error);
        event
    }

    fn answer(&self, verdict: Verdict) -> ToSource {
        let (job, reason, times) = (self.id, self.reason.clone(), self.times);
        ToSource::Verdict { job, verdict, reason, times }
    }

    async fn run(&mut self) -> Result<TargetEvent, MigrationError> {
        if let Some(vm) = self.vm.clone() {
            if !self.run {
                return Ok(TargetEvent::Ran);
            }
            match vm.run().await {
                Ok(()) => return Ok(TargetEvent::Ran),
                Err(NotRunning::NeverDid(error)) => {
                    self.reason = Some(format!("it could not be started: {error}"));
                    return Ok(TargetEvent::NeverRan);
                }
                // It was told. If it lives, it only has to be told again: looked at like that of an
                // earlier life.
                Err(NotRunning::MayHave(error)) => {
                    tracing::error!(vm = self.name, %error, "owned, and not seen to run");
                    self.vm = None;
                }
            }
        }
        // Whether it ran before is not known, unless it is in the book already.
        if self.site.host.runs(&self.name).await {
            return Ok(TargetEvent::Ran);
        }
        let Some(vm) = self.site.host.prepared(&self.name).await? else {
            self.crashed = true;
            self.reason = Some("its hypervisor ended there, and the guest may have run".into());
            return Ok(TargetEvent::MayHaveRun);
        };
        if self.run {
            vm.run().await.map_err(NotRunning::into_error)?;
        }
        Ok(TargetEvent::Ran)
    }

    async fn discard(&mut self) -> Result<(), MigrationError> {
        let vm = match self.vm.take() {
            Some(vm) => Some(vm),
            None if self.spec.is_some() && self.is_newest()? => {
                self.site.host.prepared(&self.name).await?
            }
            None => None,
        };
        if let Some(vm) = vm {
            vm.destroy().await?;
        }
        Ok(())
    }

    /// Stops the guest, if this attempt is still why it is here.
    async fn pause(&self) -> Result<(), MigrationError> {
        if self.is_newest()? {
            self.site.host.pause(&self.name).await?;
        }
        Ok(())
    }

    /// Whether no later attempt has to do with the VM at this host.
    fn is_newest(&self) -> Result<bool, MigrationError> {
        let newest = self.site.journals.newest(&self.name);
        let newest = newest.map_err(|source| MigrationError::Io {
            doing: format!("reading the journals of {}", self.name),
            source,
        })?;
        Ok(newest.is_none_or(|job| job == self.id))
    }

    /// What holds now, in a sentence.
    fn said(&self) -> String {
        let (name, peer) = (&self.name, self.peer);
        let reason = self.reason.as_deref().unwrap_or("no reason was written down");
        match self.machine.state() {
            TargetState::Owner | TargetState::Settled if self.crashed => format!(
                "{name} arrived from {peer} and is this host's, but its hypervisor has ended, which \
                 is a crash of the guest; start it from its disks with `longhaul vm start {name}`"
            ),
            TargetState::Owner | TargetState::Settled => {
                format!("{name} arrived from {peer} and is this host's")
            }
            TargetState::Yielded => format!(
                "CONFLICT: {name} ran here and is {peer}'s again ({reason}). It is stopped here, to \
                 be looked at; `longhaul resolve {name} --runs there` ends it for good"
            ),
            TargetState::Refused => format!("{name} did not arrive from {peer}: {reason}"),
            _ => format!("{name} is arriving from {peer}"),
        }
    }
}

fn ms_since(instant: Instant) -> f64 {
    instant.elapsed().as_secs_f64() * 1000.0
}

/// Answers a source that asks over a session of its own.
pub(in crate::migration) async fn verdict(
    site: &Site,
    attempts: &Attempts,
    job: JobId,
    peer: &str,
    standing: Standing,
) -> Result<ToSource, MigrationError> {
    // Whoever asks has given up the session that the token would come over.
    if attempts.asked(job) {
        let (verdict, reason, times) = (Verdict::Undecided, None, TargetTimes::default());
        return Ok(ToSource::Verdict { job, verdict, reason, times });
    }
    let _turn = site.turn.lock().await;
    let history = site.journals.sure(job).map_err(unsure(job))?;
    let began = history.as_ref().and_then(History::began).cloned();
    let mut arriving = match (&history, &began) {
        (Some(history), Some(began)) => Arriving::recovered(site, history, began),
        _ => {
            let step = history.as_ref().and_then(History::target_step);
            let mut unknown = Arriving::at(site, job, "", peer, Target::recover(step));
            unknown.reason = history.as_ref().and_then(History::reason);
            unknown
        }
    };
    if began.as_ref().is_some_and(|began| began.peer != peer || began.role != Role::Target) {
        return Err(MigrationError::protocol(peer, "it asks about another's attempt"));
    }
    if arriving.machine.state() == TargetState::Receiving {
        // What had arrived is lost: a token that still travels finds the door shut.
        let why = "the attempt is not known here, or was lost before it was accepted".to_owned();
        arriving.reason = Some(why);
        arriving.feed(TargetEvent::Restarted).await?;
    }
    if standing == Standing::TookBack && arriving.machine.state() != TargetState::Refused {
        arriving.reason = Some(format!(
            "the operator at {peer} took it back while it was this host's: it was stopped here"
        ));
    }
    let asked = arriving.feed(TargetEvent::Asked(standing)).await;
    site.doubts.changed(job);
    asked?;
    Ok(arriving.answer(arriving.verdict.unwrap_or(Verdict::Undecided)))
}

/// Notes that the source knows; whether that is all there was to do.
pub(in crate::migration) async fn confirmed(
    site: &Site,
    job: JobId,
    peer: &str,
) -> Result<bool, MigrationError> {
    let _turn = site.turn.lock().await;
    let Some(history) = site.journals.sure(job).map_err(unsure(job))? else { return Ok(true) };
    let Some(began) = history.began().cloned() else { return Ok(true) };
    if began.peer != peer || began.role != Role::Target {
        return Err(MigrationError::protocol(peer, "it confirms another's attempt"));
    }
    if !history.ended() {
        Arriving::recovered(site, &history, &began).feed(TargetEvent::Confirmed).await?;
    }
    let now = site.journals.sure(job).map_err(unsure(job))?;
    Ok(now.is_none_or(|now| now.ended()))
}

/// Settles an attempt from what its journal says. Returns what holds now.
pub(super) async fn recover(
    site: &Site,
    history: &History,
    began: &Began,
    held: &mut Held,
    entered: &mut Option<Entered>,
) -> Result<String, MigrationError> {
    let (job, fresh) = (history.job, history.target_step());
    let said = carry_on(site, history, began).await?;
    // It only has to be told from here on: the next attempt with this VM may begin.
    *entered = None;
    // Whether the earlier life ran it is not known.
    if matches!(fresh, Some(TargetRecord::Accepted | TargetRecord::Started)) {
        after_switchover(site, &began.vm, &began.peer).await;
    }
    loop {
        let now = site.journals.sure(job).map_err(unsure(job))?;
        let Some(now) = now.filter(|now| !now.ended()) else { return Ok(said) };
        // One that stands still here is not started by hand: it is the source's.
        let (blocks, detail) = match now.target_step() {
            // A question has begun that, and could not finish it.
            Some(TargetRecord::Yielding) => (true, carry_on(site, &now, began).await?),
            Some(TargetRecord::Yielded) => (true, Arriving::recovered(site, &now, began).said()),
            _ => (false, format!("{said}; {} has not confirmed yet that it knows", began.peer)),
        };
        held.say(blocks, detail);
        if let Some(word) = held.word_or_change().await {
            follow(site, &now, began, word).await;
        }
    }
}

/// Carries on from what the journal says, until that is done and durable. Returns what holds then.
async fn carry_on(site: &Site, history: &History, began: &Began) -> Result<String, MigrationError> {
    let _turn = site.turn.lock().await;
    let mut arriving = Arriving::recovered(site, history, began);
    if history.target_step().is_none() {
        arriving.reason = Some("the target's agent was restarted before it had everything".into());
    }
    arriving.feed(TargetEvent::Restarted).await?;
    if arriving.machine.state() == TargetState::Yielding
        && let Some(source) = arriving.not_journaled.take()
    {
        return Err(MigrationError::Journal { vm: began.vm.clone(), source });
    }
    Ok(arriving.said())
}

/// Does as the operator says.
async fn follow(site: &Site, history: &History, began: &Began, word: Word) {
    let Word { choice, answer } = word;
    let _turn = site.turn.lock().await;
    let mut arriving = Arriving::recovered(site, history, began);
    let (vm, peer) = (&began.vm, &began.peer);
    let refused = match (arriving.machine.state(), choice) {
        (TargetState::Yielded, Choice::Here) => {
            Some(format!("{vm} is {peer}'s again: the later word was said there"))
        }
        // Its source may have heard already that it runs here, and let go.
        (TargetState::Settled, Choice::There) => Some(format!(
            "{vm} runs here; to have it at {peer} again, move it, or if {peer} is in doubt say \
             `longhaul resolve {vm} --runs here` there"
        )),
        (TargetState::Yielded, Choice::There) | (TargetState::Settled, Choice::Here) => None,
        _ => Some(format!("{vm} is this host's, and has still to be entered in its book")),
    };
    if let Some(why) = refused {
        let _ = answer.send(Err(why));
        return;
    }
    let said = match (arriving.feed(TargetEvent::Resolve(choice)).await, choice) {
        (Err(error), _) => Err(chain(&error)),
        (Ok(()), Choice::Here) => Ok(format!("{vm} is this host's")),
        (Ok(()), Choice::There) => Ok(format!("{vm} is ended here")),
    };
    let _ = answer.send(said);
}

/// Runs the operator's hook behind an arrival.
pub(in crate::migration) async fn after_switchover(site: &Site, vm: &str, peer: &str) {
    if let Err(reason) = site.hooks.after_switchover(vm, peer, Side::Target).await {
        tracing::error!(vm, reason, "the hook after the switchover failed");
    }
}

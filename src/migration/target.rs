//! One attempt at its target, from the first message to the verdict.
//!
//! Invariant: nothing runs here before the journal says `Accepted`, and whatever ends an attempt
//! before that leaves a durable refusal. Items are applied by tasks of their own ([`items`]); this file
//! sorts messages and decides when everything is there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_transport::{ControlSender, Session};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::attempts::{Attempts, Entered};
use super::disk::DiskReceiver;
use super::error::MigrationError;
use super::handover::{Target, TargetEffect, TargetEvent, TargetRecord, TargetState, Verdict};
use super::items::{self, DiskWork, QUEUED_ITEMS_MAX, queue};
use super::job::{Side, Site};
use super::journal::{History, Record, Role};
use super::memory::{self, MemoryReceiver, MemoryWork};
use super::message::{JobId, MAX_DISKS, Open, Purpose, TargetTimes, ToSource, ToTarget, Token};
use crate::hypervisor::{DiskInfo, TargetVm, VmSpec};

/// How long a session stays open behind the last words.
const LINGER: Duration = Duration::from_secs(10);

/// Serves one session of a paired peer, to its end.
pub async fn serve(
    site: &Site,
    attempts: &Attempts,
    peer: &str,
    session: Session,
) -> Result<(), MigrationError> {
    let (control, mut messages) = session
        .control()
        .ok_or_else(|| MigrationError::cut(peer, "its control stream is in use"))?;
    let first = messages.recv::<ToTarget>().await.map_err(MigrationError::receiving(peer))?;
    match first {
        Some(ToTarget::Ask { job }) => {
            let answer = answer_from_journal(site, attempts, job)?;
            control.send(&answer).await.map_err(MigrationError::sending(peer))?;
            linger(&session).await;
            Ok(())
        }
        Some(ToTarget::Open(open)) => {
            let answer = match admit(site, attempts, peer, &open).await {
                Ok((Some(entered), spec, infos)) => {
                    let talking = session.clone();
                    let arrival = Arrival::new(site, peer, *open, spec, talking, control, &entered);
                    let outcome = arrival.run(messages, infos).await;
                    drop(entered);
                    linger(&session).await;
                    return outcome;
                }
                Ok((None, ..)) => ToSource::Accepted { at_generation: Vec::new() },
                Err(reasons) => {
                    tracing::info!(peer, ?reasons, "a VM was refused");
                    ToSource::Refused { reasons }
                }
            };
            control.send(&answer).await.map_err(MigrationError::sending(peer))?;
            linger(&session).await;
            Ok(())
        }
        Some(other) => Err(MigrationError::protocol(peer, format!("it begins with {other:?}"))),
        None => Ok(()),
    }
}

/// What is durable about an attempt. One that is unknown becomes a durable refusal, so that the
/// source may take its guest back: a token that still travels finds the door shut.
fn answer_from_journal(
    site: &Site,
    attempts: &Attempts,
    job: JobId,
) -> Result<ToSource, MigrationError> {
    let times = TargetTimes::default();
    if attempts.contains(job) {
        let verdict = Verdict::Undecided;
        return Ok(ToSource::Verdict { job, verdict, reason: None, times });
    }
    let io = |source| MigrationError::Io { doing: format!("reading attempt {job}"), source };
    let history = site.journals.read(job).map_err(io)?;
    let mut target = Target::recover(history.as_ref().and_then(History::target_step));
    let mut reason = history.as_ref().and_then(refusal_reason);
    if target.state() == TargetState::Receiving {
        target.on(TargetEvent::Abort);
        let why = "the attempt is not known here, or was lost before it was accepted".to_owned();
        let refused = Record::Target { step: TargetRecord::Refused, reason: Some(why.clone()) };
        site.journals.append(job, &refused).map_err(io)?;
        target.on(TargetEvent::Journaled);
        reason = Some(why);
    }
    let verdict = match target.state() {
        TargetState::Owner => Verdict::Runs,
        TargetState::Refused => Verdict::Refused,
        _ => Verdict::Undecided,
    };
    Ok(ToSource::Verdict { job, verdict, reason, times })
}

fn refusal_reason(history: &History) -> Option<String> {
    history.records.iter().rev().find_map(|record| match record {
        Record::Target { reason, .. } => reason.clone(),
        _ => None,
    })
}

/// Checks an opening message, of which nothing is believed, and enters the attempt if it is one.
async fn admit(
    site: &Site,
    attempts: &Attempts,
    peer: &str,
    open: &Open,
) -> Result<(Option<Entered>, VmSpec, Vec<DiskInfo>), Vec<String>> {
    if open.disks.len() > MAX_DISKS {
        return Err(vec![format!("a VM with {} disks is not taken", open.disks.len())]);
    }
    let infos: Vec<DiskInfo> = open.disks.iter().map(super::message::DiskOffer::info).collect();
    let spec = VmSpec::from_peer(&open.vm)?;
    let entered = match open.purpose {
        Purpose::Check => None,
        // First: what an earlier attempt holds would be in the way of this one.
        Purpose::Seed | Purpose::Migrate => {
            let entered = attempts.begin(open.job, &spec.name, peer).await;
            Some(entered.map_err(|reason| vec![reason])?)
        }
    };
    match site.host.refusals(&spec, &infos).await {
        Ok(reasons) if reasons.is_empty() => Ok((entered, spec, infos)),
        Ok(reasons) => Err(reasons),
        Err(error) => {
            tracing::warn!(peer, %error, "could not check a VM that was offered");
            Err(vec![error.to_string()])
        }
    }
}

struct Arrival<'a> {
    site: &'a Site,
    peer: &'a str,
    job: JobId,
    purpose: Purpose,
    spec: VmSpec,
    since: Vec<Option<u64>>,
    session: Session,
    control: ControlSender,
    entered: &'a Entered,
    vm: Option<Arc<dyn TargetVm>>,
    machine: Target,
    token: Option<(Token, Instant)>,
    round: Option<(u32, u64)>,
    tasks: JoinSet<Result<(), MigrationError>>,
}

impl<'a> Arrival<'a> {
    fn new(
        site: &'a Site,
        peer: &'a str,
        open: Open,
        spec: VmSpec,
        session: Session,
        control: ControlSender,
        entered: &'a Entered,
    ) -> Self {
        Self {
            site,
            peer,
            job: open.job,
            purpose: open.purpose,
            spec,
            since: open.disks.iter().map(|disk| disk.since).collect(),
            session,
            control,
            entered,
            vm: None,
            machine: Target::new(),
            token: None,
            round: None,
            tasks: JoinSet::new(),
        }
    }

    async fn run(
        mut self,
        messages: longhaul_transport::ControlReceiver,
        infos: Vec<DiskInfo>,
    ) -> Result<(), MigrationError> {
        if self.purpose == Purpose::Migrate {
            let began = Record::Began {
                role: Role::Target,
                vm: self.spec.name.clone(),
                peer: self.peer.to_owned(),
                was_running: false,
                at: jiff::Timestamp::now().to_string(),
            };
            self.site.journals.begin(self.job, &began).map_err(|source| MigrationError::Io {
                doing: "starting the journal: nothing was begun".into(),
                source,
            })?;
        }
        let outcome = self.receive(messages, infos).await;
        if let Err(error) = &outcome {
            tracing::warn!(
                peer = self.peer, vm = %self.spec.name, job = %self.job, %error, "arrival ended"
            );
            let reason = error.to_string();
            // Best effort, and before the refusal is durable: it ends what waits at the source.
            if self.token.is_none() {
                let _ = self.control.send(&ToSource::Failed { reason: reason.clone() }).await;
            }
            if self.purpose == Purpose::Migrate {
                let event = if error.is_cut() { TargetEvent::Abort } else { TargetEvent::Failed };
                self.decide(event, Some(reason)).await;
            }
        }
        self.tasks.shutdown().await;
        outcome
    }

    async fn receive(
        &mut self,
        mut messages: longhaul_transport::ControlReceiver,
        infos: Vec<DiskInfo>,
    ) -> Result<(), MigrationError> {
        let incoming = self.site.host.incoming_disks(&self.spec, &infos).await?;
        let known = self.site.host.known_images().await?;
        let disks = DiskReceiver::open(self.peer, infos, incoming, known).await?;
        let at_generation: Vec<bool> = self
            .since
            .iter()
            .enumerate()
            .map(|(disk, since)| since.is_some_and(|generation| disks.is_at(disk, generation)))
            .collect();
        self.tell(&ToSource::Accepted { at_generation }).await?;

        let (disk_work, disk_queue) = mpsc::channel(QUEUED_ITEMS_MAX);
        let (memory_work, memory_queue) = mpsc::channel(QUEUED_ITEMS_MAX);
        let (disk_items_in, mut disk_items) = watch::channel(0);
        let (memory_items_in, mut memory_items) = watch::channel(0);
        let (wants_in, mut wants) = mpsc::channel(QUEUED_ITEMS_MAX);
        self.tasks.spawn(items::write_disks(disks, disk_queue, disk_items_in, wants_in));
        self.tasks.spawn(items::sort(
            self.peer.to_owned(),
            self.session.clone(),
            disk_work.clone(),
            memory_work.clone(),
        ));
        // The memory task starts when the hypervisor is there.
        let mut starting = Some((memory_queue, memory_items_in));

        loop {
            if let Some((round, items)) = self.round
                && *disk_items.borrow() >= items
            {
                self.round = None;
                queue(&disk_work, DiskWork::RoundDone, self.peer).await?;
                self.tell(&ToSource::RoundDone { round }).await?;
            }
            if let Some((token, at)) = self.token
                && *disk_items.borrow() >= token.disk_items
                && *memory_items.borrow() >= token.memory_items
            {
                return self.take_over(token, at, &disk_work, &memory_work).await;
            }
            tokio::select! {
                message = messages.recv::<ToTarget>(), if self.token.is_none() => {
                    match message.map_err(MigrationError::receiving(self.peer))? {
                        Some(ToTarget::RoundEnd { round, items }) => {
                            self.round = Some((round, items));
                        }
                        Some(ToTarget::Prepare) => {
                            let Some((queue, items)) = starting.take() else {
                                return Err(self.bad("it prepares twice"));
                            };
                            let vm = self.site.host.prepare(&self.spec).await?;
                            self.vm = Some(vm.clone());
                            let sink = vm.open_memory().await?;
                            let memory = MemoryReceiver::new(self.peer, &self.site.scratch)?;
                            self.tasks.spawn(memory::receive(memory, sink, queue, items));
                            self.tell(&ToSource::Prepared).await?;
                        }
                        Some(ToTarget::Token(token)) if token.job == self.job
                            && self.purpose == Purpose::Migrate => {
                            self.machine.on(TargetEvent::Token);
                            self.token = Some((token, Instant::now()));
                        }
                        Some(ToTarget::Keep { generation }) if self.purpose == Purpose::Seed => {
                            let (done, kept) = oneshot::channel();
                            queue(&disk_work, DiskWork::Keep(generation, done), self.peer).await?;
                            kept.await.map_err(|_| self.bad("the disk task is gone"))??;
                            self.tell(&ToSource::Kept).await?;
                            return Ok(());
                        }
                        Some(ToTarget::Abort { reason }) => {
                            return Err(MigrationError::cut(
                                self.peer,
                                format!("it ended the attempt: {reason}"),
                            ));
                        }
                        Some(other) => {
                            return Err(self.bad(&format!("{other:?} was not expected")));
                        }
                        None => {
                            return Err(MigrationError::cut(self.peer, "it closed the session"));
                        }
                    }
                }
                () = self.entered.asked_to_give_way(), if self.token.is_none() => {
                    return Err(MigrationError::cut(self.peer, "it began another attempt"));
                }
                Some(want) = wants.recv() => self.tell(&want).await?,
                Ok(()) = disk_items.changed() => {}
                Ok(()) = memory_items.changed() => {
                    let items = *memory_items.borrow_and_update();
                    if self.token.is_none() {
                        self.tell(&ToSource::MemoryApplied { items }).await?;
                    }
                }
                Some(ended) = self.tasks.join_next() => {
                    match ended {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => return Err(error),
                        Err(error) => return Err(self.bad(&error.to_string())),
                    }
                }
            }
        }
    }

    /// Everything is here: the last checks, the decision, the start.
    async fn take_over(
        &mut self,
        token: Token,
        token_at: Instant,
        disk_work: &mpsc::Sender<DiskWork>,
        memory_work: &mpsc::Sender<MemoryWork>,
    ) -> Result<(), MigrationError> {
        let drained = Instant::now();
        let Some(vm) = self.vm.clone() else {
            return Err(self.bad("it hands over what was never prepared"));
        };
        let (disks_done, disks_closed) = oneshot::channel();
        let (memory_done, memory_finished) = oneshot::channel();
        queue(disk_work, DiskWork::Close(disks_done), self.peer).await?;
        queue(memory_work, MemoryWork::Finish(memory_done), self.peer).await?;
        let gone = |_| MigrationError::protocol(self.peer, "a task of the attempt is gone");
        memory_finished.await.map_err(gone)??;
        disks_closed.await.map_err(gone)??;
        vm.wait_loaded().await?;

        let effects = self.machine.on(TargetEvent::Verified);
        debug_assert_eq!(effects, [TargetEffect::Journal(TargetRecord::Accepted)]);
        let accepted = Record::Target { step: TargetRecord::Accepted, reason: None };
        if let Err(source) = self.site.journals.append(self.job, &accepted) {
            self.machine.on(TargetEvent::JournalFailed);
            tracing::error!(
                vm = %self.spec.name, %source,
                "the acceptance could not be journaled: the VM runs nowhere until this agent is \
                 restarted and has read what its journal holds"
            );
            return Err(MigrationError::Io { doing: "journaling the hand-over".into(), source });
        }
        self.machine.on(TargetEvent::Journaled);
        let loaded = Instant::now();
        let mut reason = None;
        if token.run
            && let Err(error) = vm.run().await
        {
            tracing::error!(vm = %self.spec.name, %error, "owned, but could not be started");
            reason = Some(format!("it is owned here but could not be started: {error}"));
        }
        let ms = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64() * 1000.0;
        let times = TargetTimes {
            drain_ms: ms(token_at, drained),
            load_ms: ms(drained, loaded),
            start_ms: ms(loaded, Instant::now()),
        };
        let verdict = ToSource::Verdict { job: self.job, verdict: Verdict::Runs, reason, times };
        // A source that is not reached asks later; the journal has the answer.
        let _ = self.control.send(&verdict).await;
        settle(self.site, &self.spec, self.job, self.peer).await
    }

    /// Carries out a decision against the attempt.
    async fn decide(&mut self, event: TargetEvent, reason: Option<String>) {
        for effect in self.machine.on(event) {
            if let TargetEffect::Journal(step) = effect {
                let record = Record::Target { step, reason: reason.clone() };
                let journaled = self.site.journals.append(self.job, &record);
                if let Err(error) = &journaled {
                    tracing::error!(job = %self.job, %error, "a refusal could not be journaled");
                }
                let next = match journaled {
                    Ok(()) => TargetEvent::Journaled,
                    Err(_) => TargetEvent::JournalFailed,
                };
                for effect in self.machine.on(next) {
                    self.carry_out(effect, reason.clone()).await;
                }
            }
        }
    }

    async fn carry_out(&mut self, effect: TargetEffect, reason: Option<String>) {
        match effect {
            TargetEffect::Discard => {
                if let Some(vm) = self.vm.take()
                    && let Err(error) = vm.destroy().await
                {
                    tracing::error!(vm = %self.spec.name, %error, "could not end the hypervisor");
                }
                if let Err(error) = self.site.journals.append(self.job, &Record::Ended) {
                    tracing::warn!(%error, "the end of the attempt could not be journaled");
                }
            }
            TargetEffect::Answer(verdict) => {
                let times = TargetTimes::default();
                let answer = ToSource::Verdict { job: self.job, verdict, reason, times };
                let _ = self.control.send(&answer).await;
            }
            TargetEffect::Journal(_) | TargetEffect::Run => {}
        }
    }

    async fn tell(&mut self, message: &ToSource) -> Result<(), MigrationError> {
        self.control.send(message).await.map_err(MigrationError::sending(self.peer))
    }

    fn bad(&self, detail: &str) -> MigrationError {
        MigrationError::protocol(self.peer, detail)
    }
}

/// The VM is this host's: everything that follows from that.
async fn settle(site: &Site, spec: &VmSpec, job: JobId, peer: &str) -> Result<(), MigrationError> {
    site.host.settle(spec).await?;
    if let Err(error) = site.journals.append(job, &Record::Ended) {
        tracing::warn!(%error, "the end of the attempt could not be journaled");
    }
    let hook = site.hooks.after_switchover(&spec.name, peer, Side::Target);
    if let Err(reason) = hook.await {
        tracing::error!(vm = %spec.name, reason, "the hook after the switchover failed");
    }
    Ok(())
}

/// Brings an attempt of an earlier life of this agent to its end, at its target.
pub async fn recover_target(site: &Site, history: &History) -> Result<String, MigrationError> {
    let Some((_, name, peer, _)) = history.began() else {
        return Ok(format!("the journal of attempt {} says nothing; left alone", history.job));
    };
    let vm = site.host.prepared(name).await?;
    let io = |source| MigrationError::Io { doing: "continuing the journal".into(), source };
    let said = match history.target_step() {
        Some(TargetRecord::Accepted) => match vm {
            Some(vm) => {
                vm.run().await?;
                site.host.arrived(name).await?;
                format!("{name} arrived from {peer} and runs here")
            }
            None => {
                site.host.arrived(name).await?;
                format!(
                    "{name} arrived from {peer} and is this host's, but its hypervisor is gone: \
                     start it from its disks with `longhaul vm start`"
                )
            }
        },
        Some(TargetRecord::Refused) | None => {
            let refused = Record::Target {
                step: TargetRecord::Refused,
                reason: Some("the target's agent was restarted before it had everything".into()),
            };
            site.journals.append(history.job, &refused).map_err(io)?;
            if let Some(vm) = vm {
                vm.destroy().await?;
            }
            format!("{name} did not arrive from {peer}: the attempt was interrupted and is refused")
        }
    };
    site.journals.append(history.job, &Record::Ended).map_err(io)?;
    Ok(said)
}

/// Leaves the source time to read the last words, and to close the session itself.
async fn linger(session: &Session) {
    if tokio::time::timeout(LINGER, session.closed()).await.is_err() {
        session.close("nothing more to say");
    }
}

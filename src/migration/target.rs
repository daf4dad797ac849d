//! One attempt at its target, from the first message to the verdict.
//!
//! Invariant: nothing runs here before the journal says `Accepted`, and whatever ends an attempt
//! before that leaves a durable refusal. Items are applied by tasks of their own ([`items`]); this file
//! sorts messages and decides when everything is there.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use longhaul_transport::{ControlReceiver, ControlSender, Session};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::attempts::{Attempts, Entered};
use super::disk::DiskReceiver;
use super::error::{MigrationError, chain};
use super::handover::{TargetEvent, TargetState};
use super::items::{self, DiskWork, QUEUED_ITEMS_MAX, Received, queue};
use super::job::Site;
use super::journal::Record;
use super::known::Known;
use super::memory::{self, MemoryReceiver, MemoryWork};
use super::message::{JobId, MAX_DISKS, Open, Purpose, ToSource, ToTarget, Token};
use super::points;
use super::push;
use super::settle::{self, Arriving};
use crate::hypervisor::{DiskInfo, IncomingDisk, VmSpec};

/// How long a session stays open behind the last words.
const LINGER: Duration = Duration::from_secs(10);

/// A session behind its purpose: what is left of it are last words.
pub struct LastWords {
    session: Session,
    /// Kept to the end: to drop its halves is to close it under the last answer.
    talk: Option<(Option<JobId>, ControlSender, ControlReceiver)>,
}

/// Serves one session of a paired peer, to where its purpose has ended; for the rest see
/// [`LastWords::hear_out`].
pub async fn serve(
    site: &Site,
    attempts: &Attempts,
    peer: &str,
    session: Session,
) -> (LastWords, Result<(), MigrationError>) {
    let mut last = LastWords { session: session.clone(), talk: None };
    let Some((control, mut messages)) = session.control() else {
        return (last, Err(MigrationError::cut(peer, "its control stream is in use")));
    };
    let first = match messages.recv::<ToTarget>().await.map_err(MigrationError::receiving(peer)) {
        Ok(Some(first)) => first,
        Ok(None) => return (last, Ok(())),
        Err(error) => return (last, Err(error)),
    };
    let answer = match first {
        ToTarget::Ask { job, standing } => {
            settle::verdict(site, attempts, job, peer, standing).await
        }
        ToTarget::Confirm { job } => {
            match settle::confirmed(site, job, peer).await {
                Ok(true) => Ok(ToSource::Noted),
                // It is said again later.
                Ok(false) => return (last, Ok(())),
                Err(error) => Err(error),
            }
        }
        ToTarget::Question(question) => {
            Ok(ToSource::Answer(site.answers.answer(peer, &question).await))
        }
        ToTarget::OpenImage(open) => {
            let arriving =
                push::receive(site, attempts, peer, &open, session, &control, &mut messages);
            let outcome = arriving.await;
            last.talk = Some((None, control, messages));
            return (last, outcome);
        }
        ToTarget::Open(open) => match admit(site, attempts, peer, &open).await {
            Ok((Some(entered), spec, infos)) => {
                let job = open.job;
                let arrival = Arrival::new(site, peer, *open, &spec, session, &control, &entered);
                let outcome = arrival.run(&mut messages, infos).await;
                drop(entered);
                last.talk = Some((Some(job), control, messages));
                return (last, outcome);
            }
            Ok((None, ..)) => {
                Ok(ToSource::Accepted { at_generation: Vec::new(), readable: Vec::new() })
            }
            Err(reasons) => {
                tracing::info!(peer, ?reasons, "a VM was refused");
                Ok(ToSource::Refused { reasons })
            }
        },
        other => Err(MigrationError::protocol(peer, format!("it begins with {other:?}"))),
    };
    let answered = match answer {
        Ok(answer) => control.send(&answer).await.map_err(MigrationError::sending(peer)),
        Err(error) => Err(error),
    };
    last.talk = Some((None, control, messages));
    (last, answered)
}

impl LastWords {
    /// Hears the source out, which may still say that it knows what was decided, and leaves it time
    /// to close the session itself.
    pub async fn hear_out(self, site: &Site, peer: &str) {
        let Self { session, mut talk } = self;
        if let Some((Some(job), control, messages)) = &mut talk {
            let job = *job;
            let confirmed = confirmed(site, job, peer, control, messages);
            match tokio::time::timeout(LINGER, confirmed).await {
                Ok(Ok(())) | Err(_) => {}
                Ok(Err(error)) => tracing::debug!(peer, %job, %error, "no last word"),
            }
        }
        if tokio::time::timeout(LINGER, session.closed()).await.is_err() {
            session.close("nothing more to say");
        }
    }
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

/// Reads the source's last word: that it knows what was decided.
async fn confirmed(
    site: &Site,
    job: JobId,
    peer: &str,
    control: &ControlSender,
    messages: &mut ControlReceiver,
) -> Result<(), MigrationError> {
    while let Some(message) =
        messages.recv::<ToTarget>().await.map_err(MigrationError::receiving(peer))?
    {
        if message == (ToTarget::Confirm { job }) {
            if !settle::confirmed(site, job, peer).await? {
                return Ok(());
            }
            return control.send(&ToSource::Noted).await.map_err(MigrationError::sending(peer));
        }
    }
    Ok(())
}

struct Arrival<'a> {
    site: &'a Site,
    peer: &'a str,
    job: JobId,
    purpose: Purpose,
    spec: &'a VmSpec,
    since: Vec<Option<u64>>,
    session: Session,
    control: &'a ControlSender,
    entered: &'a Entered,
    settling: Arriving<'a>,
    token: Option<(Token, Instant)>,
    round: Option<(u32, u64)>,
    tasks: JoinSet<Result<(), MigrationError>>,
}

impl<'a> Arrival<'a> {
    fn new(
        site: &'a Site,
        peer: &'a str,
        open: Open,
        spec: &'a VmSpec,
        session: Session,
        control: &'a ControlSender,
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
            settling: Arriving::new(site, open.job, spec, peer, control),
            token: None,
            round: None,
            tasks: JoinSet::new(),
        }
    }

    async fn run(
        mut self,
        messages: &mut ControlReceiver,
        infos: Vec<DiskInfo>,
    ) -> Result<(), MigrationError> {
        if self.purpose == Purpose::Migrate {
            let began = Record::arriving(self.spec, self.peer);
            let begun = self.site.journals.begin(self.job, &self.spec.name, &began);
            if let Err(error) = begun {
                let name = &self.spec.name;
                let reason = format!("nothing was begun for {name}: {}", chain(&error));
                let _ = self.tell(&ToSource::Refused { reasons: vec![reason.clone()] }).await;
                return Err(self.bad(&reason));
            }
        }
        // The source says when a lost link is to be waited for.
        self.session.set_patience(self.site.link_patience);
        let outcome = self.receive(messages, infos).await;
        if let Err(error) = &outcome {
            tracing::warn!(
                peer = self.peer, vm = %self.spec.name, job = %self.job, %error, "arrival ended"
            );
            let reason = chain(&error);
            // Best effort, and before the refusal is durable: it ends what waits at the source.
            if self.token.is_none() {
                let _ = self.control.send(&ToSource::Failed { reason: reason.clone() }).await;
            }
            if self.purpose == Purpose::Migrate {
                let event = if error.is_cut() && self.token.is_none() {
                    TargetEvent::Abort
                } else {
                    TargetEvent::Failed
                };
                // Means nothing once it has decided: what was left undone then is in the journal.
                self.settling.refuse(event, reason).await?;
            }
        }
        self.tasks.shutdown().await;
        outcome
    }

    async fn receive(
        &mut self,
        messages: &mut ControlReceiver,
        infos: Vec<DiskInfo>,
    ) -> Result<(), MigrationError> {
        let incoming = self.site.host.incoming_disks(self.spec, &infos).await?;
        let images: Vec<Option<PathBuf>> = incoming.iter().map(IncomingDisk::raw).collect();
        let readable = images.iter().map(Option::is_some).collect();
        let known = self.site.host.known_images().await?;
        let known = Known::of(known, self.site.index.clone()).await;
        let disks = DiskReceiver::open(self.peer, infos, incoming, known).await?;
        let at_generation: Vec<bool> = self
            .since
            .iter()
            .enumerate()
            .map(|(disk, since)| since.is_some_and(|generation| disks.is_at(disk, generation)))
            .collect();
        self.tell(&ToSource::Accepted { at_generation, readable }).await?;

        let (disk_work, disk_queue) = mpsc::channel(QUEUED_ITEMS_MAX);
        let (memory_work, memory_queue) = mpsc::channel(QUEUED_ITEMS_MAX);
        let (disk_items_in, mut disk_items) = watch::channel(0);
        let (memory_items_in, mut memory_items) = watch::channel(0);
        let (wants_in, mut wants) = mpsc::channel(QUEUED_ITEMS_MAX);
        let (received_in, mut received) = watch::channel(Received::nothing());
        let unproven = wants_in.clone();
        self.tasks.spawn(items::write_disks(disks, disk_queue, disk_items_in, wants_in));
        self.tasks.spawn(items::sort(
            self.peer.to_owned(),
            self.session.clone(),
            disk_work.clone(),
            memory_work.clone(),
            received_in,
        ));
        // The memory task starts when the hypervisor is there.
        let mut starting = Some((memory_queue, memory_items_in, images, unproven));

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
                let last = received.borrow().last_at;
                return self.take_over([at, last], &disk_work, &memory_work).await;
            }
            // The token may overtake what was sent before it, and the session may end in between.
            let now = *received.borrow_and_update();
            if let Some((token, _)) = self.token
                && now.ended
                && (now.disk_items < token.disk_items || now.memory_items < token.memory_items)
            {
                return Err(MigrationError::cut(self.peer, "not everything came before it went"));
            }
            tokio::select! {
                message = messages.recv::<ToTarget>(), if self.token.is_none() => {
                    match message.map_err(MigrationError::receiving(self.peer))? {
                        Some(ToTarget::RoundEnd { round, items }) => {
                            self.round = Some((round, items));
                        }
                        Some(ToTarget::Prepare) => {
                            let Some((queue, items, images, unproven)) = starting.take() else {
                                return Err(self.bad("it prepares twice"));
                            };
                            let vm = self.site.host.prepare(self.spec).await?;
                            self.settling.vm = Some(vm.clone());
                            let sink = vm.open_memory().await?;
                            let scratch = &self.site.scratch;
                            let memory =
                                MemoryReceiver::new(self.peer, scratch, images, unproven)?;
                            self.tasks.spawn(memory::receive(memory, sink, queue, items));
                            self.tell(&ToSource::Prepared).await?;
                        }
                        Some(ToTarget::Token(token)) if token.job == self.job
                            && self.purpose == Purpose::Migrate => {
                            self.token = Some((token, Instant::now()));
                            self.settling.run = token.run;
                            self.settling.feed(TargetEvent::Token).await?;
                            points::reach(points::TOKEN).await;
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
                    return Err(MigrationError::cut(self.peer, "it has given this attempt up"));
                }
                Some(want) = wants.recv() => self.tell(&want).await?,
                Ok(()) = received.changed(), if self.token.is_some() => {}
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
        [token_at, last_item_at]: [Instant; 2],
        disk_work: &mpsc::Sender<DiskWork>,
        memory_work: &mpsc::Sender<MemoryWork>,
    ) -> Result<(), MigrationError> {
        let drained = Instant::now();
        let Some(vm) = self.settling.vm.clone() else {
            return Err(self.bad("it hands over what was never prepared"));
        };
        let (disks_done, disks_closed) = oneshot::channel();
        let (memory_done, memory_finished) = oneshot::channel();
        queue(disk_work, DiskWork::Close(disks_done), self.peer).await?;
        queue(memory_work, MemoryWork::Finish(memory_done), self.peer).await?;
        let gone = |_| MigrationError::protocol(self.peer, "a task of the attempt is gone");
        memory_finished.await.map_err(gone)??;
        disks_closed.await.map_err(gone)??;
        let checked = Instant::now();
        vm.wait_loaded().await?;
        let ms = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64() * 1000.0;
        let times = &mut self.settling.times;
        times.drain_ms = ms(token_at, drained);
        times.check_ms = ms(drained, checked);
        times.load_ms = ms(checked, Instant::now());
        self.settling.last_item_at = Some(last_item_at);
        self.settling.decide(TargetEvent::Verified).await?;
        if self.settling.machine.state() == TargetState::Settled {
            settle::after_switchover(self.site, &self.spec.name, self.peer).await;
        }
        Ok(())
    }

    async fn tell(&mut self, message: &ToSource) -> Result<(), MigrationError> {
        self.control.send(message).await.map_err(MigrationError::sending(self.peer))
    }

    fn bad(&self, detail: &str) -> MigrationError {
        MigrationError::protocol(self.peer, detail)
    }
}

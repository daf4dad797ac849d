//! One attempt at its source, top to bottom.
//!
//! Invariant: until the hand-over every way out of here gives the guest back to its owner; from the
//! hand-over on only the target's answer decides. `hand_over` cannot be cancelled: nothing in it
//! is dropped half-way.

mod precopy;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_transport::{Class, Session};
use tokio::sync::watch;

use super::coding::Coding;
use super::disk::{DiskSender, How, ImageRecord};
use super::error::MigrationError;
use super::handover::Source;
use super::job::{Dial, Job, Side, Site};
use super::journal::{BeginError, Record};
use super::link::Link;
use super::memory::{KnownBlocks, MemorySender, Pump, SendState, Stage};
use super::message::{DiskOffer, JobId, Open, Purpose, ToSource, ToTarget, Token};
use super::meter::Meter;
use super::points;
use super::report::{Completed, Downtime, Phase, Progress};
use super::seeds::Seed;
use super::settle::{HandingOver, Leaving};
use crate::hypervisor::{DiskView, RunState, SourceVm};

/// How often progress is published and convergence is judged.
const TICK: Duration = Duration::from_millis(100);
/// Sync rounds before pre-copy; a guest that writes faster than the link gets no better by more.
const SYNC_ROUNDS_MAX: u32 = 12;
/// Written bytes that are not worth a round of their own before pre-copy: they go in the last one.
const SYNC_ENOUGH_BYTES: u64 = 512 << 10;
/// Above this a round asks the target first what it has.
const PUSH_BYTES_MAX: u64 = 64 << 20;
/// How fast the hypervisor may hand us memory: local, so only the staging area slows it down.
const MEMORY_RATE_BYTES_PER_S: u64 = 4 << 30;

/// Moves or seeds one VM over `session`. `cancelled` ends the attempt safely, until the hand-over; then
/// it ends the waiting for a hand-over in doubt, which goes on without it.
pub async fn run(
    site: &Site,
    job: &Job,
    session: Session,
    coding: &Coding,
    dial: &dyn Dial,
    progress: &watch::Sender<Progress>,
    cancelled: impl Future<Output = ()> + Send,
) -> Result<Completed, MigrationError> {
    let vm = site.host.source(&job.vm).await?;
    let reasons = vm.check().await?;
    if !reasons.is_empty() {
        return Err(refused(job, reasons));
    }
    let was_running = vm.run_state().await? == RunState::Running;
    let attempt = Attempt {
        site,
        job,
        id: JobId::random(),
        link: Link::new(&job.peer, session)?,
        meter: Meter::new(&job.vm, &job.peer, Phase::Seed),
        coding,
        record: ImageRecord::new(vm.images()),
        blocks: known_blocks(job, vm.spec().memory_mib << 20),
        vm,
        was_running,
        start: Instant::now(),
    };
    attempt.begin_journal()?;
    let mut cancelled = pin!(cancelled);
    let ended = {
        let mut work = pin!(attempt.work());
        let mut ticks = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                ended = &mut work => break ended,
                lost = attempt.link.lost() => break Err(lost),
                () = &mut cancelled => break Err(MigrationError::Cancelled),
                _ = ticks.tick() => { progress.send_replace(attempt.progress()); }
            }
        }
    };
    let ended = match ended {
        Ok(Worked::Parked(parked)) => {
            return attempt.hand_over(parked, dial, progress, cancelled).await;
        }
        Ok(Worked::Seeded) => attempt.keep_seed().await,
        Err(error) => Err(error),
    };
    match ended {
        Ok(report) => Ok(report),
        Err(error) => Err(attempt.give_up(dial, error).await),
    }
}

struct Attempt<'a> {
    site: &'a Site,
    job: &'a Job,
    id: JobId,
    vm: Arc<dyn SourceVm>,
    link: Link,
    meter: Meter,
    coding: &'a Coding,
    record: ImageRecord,
    /// What the target's disks hold, for its memory.
    blocks: Arc<KnownBlocks>,
    was_running: bool,
    start: Instant,
}

/// An index of what the target's disks hold, if memory is to follow.
fn known_blocks(job: &Job, memory_bytes: u64) -> Arc<KnownBlocks> {
    let moves = job.purpose == Purpose::Migrate;
    Arc::new(KnownBlocks::new(if moves { memory_bytes } else { 0 }))
}

enum Worked {
    Seeded,
    Parked(Parked),
}

/// The guest is paused, and its last blocks are with the transport.
struct Pausing {
    paused: Instant,
    collected: Instant,
    finishing: Instant,
    views: Vec<Box<dyn DiskView>>,
}

/// The guest is parked and the last byte is with the transport.
struct Parked {
    paused: Instant,
    collected: Instant,
    finishing: Instant,
    parked: Instant,
    /// The last views: closing them takes the hypervisor's time, which the guest has not.
    views: Vec<Box<dyn DiskView>>,
}

impl Attempt<'_> {
    /// Everything that can be undone.
    async fn work(&self) -> Result<Worked, MigrationError> {
        self.link.set_patience(self.site.link_patience);
        let at_generation = self.open().await?;
        if self.job.purpose != Purpose::Seed {
            self.meter.later(self.vm.spec().memory_mib << 20);
        }
        self.seed(at_generation).await?;
        self.blocks.is_over();
        if self.job.purpose == Purpose::Seed {
            self.sync().await?;
            self.delta_round(Class::Seed).await?;
            return Ok(Worked::Seeded);
        }
        if at_generation {
            // What the guest wrote since the seed goes beside its memory.
            self.prepare().await?;
        } else {
            // The target's hypervisor starts while the rounds go.
            tokio::try_join!(self.sync(), self.prepare())?;
        }
        self.precopy_and_switchover().await.map(Worked::Parked)
    }

    async fn open(&self) -> Result<bool, MigrationError> {
        let disks = self.vm.disks().await?;
        let disk_bytes: Vec<u64> = disks.iter().map(|disk| disk.bytes).collect();
        let seed = match self.site.seeds.get(&self.job.vm) {
            Some(seed) if seed.peer == self.job.peer && self.vm.is_tracking().await? => {
                Some(seed.generation)
            }
            _ => None,
        };
        let open = Open {
            job: self.id,
            purpose: self.job.purpose,
            vm: self.vm.spec().to_peer().map_err(|reasons| refused(self.job, reasons))?,
            disks: disks
                .into_iter()
                .map(|disk| DiskOffer { id: disk.id, bytes: disk.bytes, since: seed })
                .collect(),
        };
        self.link.tell(&ToTarget::Open(Box::new(open))).await?;
        match self.link.reply().await? {
            ToSource::Accepted { at_generation, readable } => {
                self.blocks.readable(readable);
                let goes_on = seed.is_some() && at_generation.iter().all(|&at| at);
                self.record.begin(&disk_bytes, !goes_on);
                Ok(goes_on)
            }
            ToSource::Refused { reasons } => Err(refused(self.job, reasons)),
            other => Err(self.unexpected(&other)),
        }
    }

    /// The whole disks; or, if the target has them as of an earlier seed, what was written since.
    async fn seed(&self, at_generation: bool) -> Result<(), MigrationError> {
        if let Err(error) = self.site.seeds.remove(&self.job.vm) {
            tracing::warn!(%error, "the seed book could not be written");
        }
        if at_generation {
            return Ok(());
        }
        let views = self.vm.disk_full().await?;
        self.meter.round();
        self.round(views, How::Offer, Class::Seed).await
    }

    /// Rounds until what the guest wrote meanwhile is little.
    async fn sync(&self) -> Result<(), MigrationError> {
        self.begin(Phase::Sync);
        let mut last = u64::MAX;
        for _ in 0..SYNC_ROUNDS_MAX {
            let bytes = self.vm.disk_delta_bytes().await?;
            // A round that leaves as much as it found does not get better by another.
            if bytes <= SYNC_ENOUGH_BYTES || bytes >= last {
                break;
            }
            last = bytes;
            self.delta_round(Class::Blocks).await?;
        }
        Ok(())
    }

    async fn delta_round(&self, class: Class) -> Result<(), MigrationError> {
        self.meter.round();
        self.unseen_delta_round(class).await
    }

    /// As `delta_round`, beside something else that is counted in rounds.
    async fn unseen_delta_round(&self, class: Class) -> Result<(), MigrationError> {
        let bytes = self.vm.disk_delta_bytes().await?;
        let how = if bytes > PUSH_BYTES_MAX { How::Offer } else { How::Push };
        let views = self.vm.disk_delta().await?;
        self.round(views, how, class).await
    }

    /// Sends one round of views and waits until the target has written it.
    async fn round(
        &self,
        views: Vec<Box<dyn DiskView>>,
        how: How,
        class: Class,
    ) -> Result<(), MigrationError> {
        self.send_views(&views, how, class).await?;
        let round = self.link.next_round();
        self.link.tell(&ToTarget::RoundEnd { round, items: self.link.disk_items() }).await?;
        self.link.until(|applied| applied.round >= round).await?;
        // To close a view is to say that what it covers has arrived.
        for view in views {
            view.close().await?;
        }
        Ok(())
    }

    async fn send_views(
        &self,
        views: &[Box<dyn DiskView>],
        how: How,
        class: Class,
    ) -> Result<(), MigrationError> {
        let sender = DiskSender::new(&self.link, &self.meter, self.coding, &self.record)
            .noting(&self.blocks);
        for (disk, view) in views.iter().enumerate() {
            sender.send(disk as u16, &**view, how, class).await?;
        }
        Ok(())
    }

    async fn prepare(&self) -> Result<(), MigrationError> {
        self.link.tell(&ToTarget::Prepare).await?;
        match self.link.reply().await? {
            ToSource::Prepared => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    async fn precopy_and_switchover(&self) -> Result<Parked, MigrationError> {
        self.begin(Phase::PreCopy);
        self.meter.later(0);
        let stage = Stage::default();
        let source = self.vm.start_memory().await?;
        if let Some(note) = self.vm.memory_note().await {
            self.meter.note(note);
        }
        self.vm.set_memory_rate(MEMORY_RATE_BYTES_PER_S).await?;
        let (state, state_seen) = watch::channel(SendState::default());
        let pump = Pump::new(source, self.job.options.staging_bytes).run(&stage);
        let sender = MemorySender::new(&self.link, &self.meter, self.coding, self.blocks.clone())
            .run(&stage, &state);
        let steer = async {
            self.precopy(&stage, &state_seen).await?;
            self.switchover(&stage).await
        };
        let ((), (), pausing) = tokio::try_join!(pump, sender, steer)?;
        self.meter.superseded(stage.superseded_bytes());
        self.vm.wait_parked().await?;
        let Pausing { paused, collected, finishing, views } = pausing;
        Ok(Parked { paused, collected, finishing, parked: Instant::now(), views })
    }

    /// Pause, last blocks, last pages, device state. The pump and the sender run beside this.
    async fn switchover(&self, stage: &Stage) -> Result<Pausing, MigrationError> {
        self.begin(Phase::Switchover);
        self.meter.round();
        let hook = self.site.hooks.before_switchover(&self.job.vm, &self.job.peer, Side::Source);
        hook.await.map_err(|reason| {
            refused(self.job, vec![format!("the hook before the switchover failed: {reason}")])
        })?;
        // A guest that stands still waits for nobody.
        self.link.set_patience(Duration::ZERO);
        points::reach(points::PAUSING).await;
        stage.flat_out();
        self.vm.allow_switchover().await?;
        let stopped = self.vm.wait_paused().await?;
        points::reach(points::PAUSED).await;
        // What its owner paused has no downtime of ours.
        let paused = if self.was_running { stopped } else { Instant::now() };
        let views = self.vm.disk_delta().await?;
        self.send_views(&views, How::Push, Class::HandOver).await?;
        let collected = Instant::now();
        self.vm.finish_memory().await?;
        Ok(Pausing { paused, collected, finishing: Instant::now(), views })
    }

    /// The seed is complete: the target keeps it, and writes are tracked on from here.
    async fn keep_seed(&self) -> Result<Completed, MigrationError> {
        let generation = rand::random();
        self.link.tell(&ToTarget::Keep { generation }).await?;
        match self.link.reply().await? {
            ToSource::Kept => {}
            other => return Err(self.unexpected(&other)),
        }
        self.vm.cleanup(true).await?;
        let at = jiff::Timestamp::now().to_string();
        let seed = Seed { peer: self.job.peer.clone(), generation, at };
        self.site.seeds.insert(&self.job.vm, seed).map_err(|source| MigrationError::Io {
            doing: "writing the seed book".into(),
            source,
        })?;
        self.end_journal();
        self.link.close("the seed is complete");
        Ok(self.complete(None))
    }

    /// From here on the target decides.
    async fn hand_over(
        &self,
        parked: Parked,
        dial: &dyn Dial,
        progress: &watch::Sender<Progress>,
        cancelled: impl Future<Output = ()>,
    ) -> Result<Completed, MigrationError> {
        let token = Token {
            job: self.id,
            disk_items: self.link.disk_items(),
            memory_items: self.link.memory_items(),
            run: self.was_running,
        };
        let half_trip_ms = self.link.stats().rtt.as_secs_f64() * 500.0;
        let mut leaving = self.leaving(dial);
        leaving.link = Some((&self.link, token));
        let note = |note| {
            self.meter.note(note);
            progress.send_replace(self.progress());
        };
        let decided = leaving.hand_over(note, cancelled);
        let HandingOver { token_sent, answered, times, notes } = decided.await?;
        notes.into_iter().for_each(|note| self.meter.note(note));
        let ms = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64() * 1000.0;
        let mut downtime = Downtime {
            total_ms: (ms(parked.paused, answered) - half_trip_ms).max(0.0),
            collect_ms: ms(parked.paused, parked.collected),
            park_ms: ms(parked.finishing, parked.parked),
            drain_ms: ms(parked.collected, parked.finishing) + times.drain_ms,
            token_ms: 0.0,
            check_ms: times.check_ms,
            load_ms: times.load_ms,
            journal_ms: ms(parked.parked, token_sent) + times.journal_ms,
            start_ms: times.start_ms,
            hand_over_ms: half_trip_ms + times.since_last_ms,
        };
        downtime.token_ms = (downtime.total_ms - downtime.known_parts_ms()).max(0.0);
        drop(parked.views);
        let hook = self.site.hooks.after_switchover(&self.job.vm, &self.job.peer, Side::Source);
        if let Err(reason) = hook.await {
            self.meter.note(format!("the hook after the switchover failed: {reason}"));
        }
        self.link.close("the VM has arrived");
        Ok(self.complete(Some(downtime)))
    }

    fn complete(&self, downtime: Option<Downtime>) -> Completed {
        let report = self.meter.complete(self.at_ms(), self.link.wire_bytes(), downtime);
        let mut link = self.link.report(report.total_ms);
        for class in &mut link.classes {
            class.goodput_bits_per_s = class.arrived_bytes * 8000 / report.total_ms.max(1);
        }
        Completed { link: Some(Box::new(link)), ..report }
    }

    /// Gives the guest back and says so to the peer.
    async fn give_up(&self, dial: &dyn Dial, error: MigrationError) -> MigrationError {
        let abort = ToTarget::Abort { reason: error.to_string() };
        let error = self.leaving(dial).abort(self.link.explain(error)).await;
        if let Err(error) = self.link.tell(&abort).await {
            tracing::debug!(%error, "the peer learns of the abort by the end of the session");
        }
        self.link.close("the attempt was given up");
        error
    }

    fn leaving<'a>(&'a self, dial: &'a dyn Dial) -> Leaving<'a> {
        let names = [self.job.vm.as_str(), self.job.peer.as_str()];
        let machine = Source::new();
        let mut leaving = Leaving::new(self.site, dial, self.id, names, self.was_running, machine);
        leaving.vm = Some(Arc::clone(&self.vm));
        leaving
    }

    fn begin_journal(&self) -> Result<(), MigrationError> {
        let Job { vm, peer, .. } = self.job;
        let began = Record::leaving(vm, peer, self.was_running);
        self.site.journals.begin(self.id, vm, &began).map_err(|error| match error {
            BeginError::Io(source) => MigrationError::Io {
                doing: format!("starting the journal of a move of {vm}: nothing was begun"),
                source,
            },
            unsettled => refused(self.job, vec![unsettled.to_string()]),
        })
    }

    fn end_journal(&self) {
        if let Err(error) = self.site.journals.append(self.id, &Record::Ended) {
            // It only says that nothing is left to do: that is found out again.
            tracing::warn!(%error, "the end of the attempt could not be journaled");
        }
    }

    fn begin(&self, phase: Phase) {
        tracing::info!(vm = self.job.vm, %phase, "phase begins");
        self.meter.begin(phase, self.at_ms(), self.link.wire_bytes());
    }

    fn progress(&self) -> Progress {
        let mut progress = self.meter.progress(self.at_ms(), self.link.wire_bytes());
        progress.link = Some(Box::new(self.link.report(progress.elapsed_ms)));
        if let Some(down) = self.link.down_for() {
            let (down_s, patience_s) = (down.as_secs(), self.site.link_patience.as_secs());
            progress.note = Some(format!(
                "the link to {} is down for {down_s} s; waiting up to {patience_s} s for it",
                self.job.peer
            ));
        }
        progress
    }

    fn at_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    fn unexpected(&self, reply: &ToSource) -> MigrationError {
        MigrationError::protocol(&self.job.peer, format!("this answer was not expected: {reply:?}"))
    }
}

fn refused(job: &Job, reasons: Vec<String>) -> MigrationError {
    MigrationError::Refused { vm: job.vm.clone(), peer: job.peer.clone(), reasons }
}

/// Asks a peer why it cannot take a VM; empty if it can. Changes nothing at either end.
pub async fn obstacles(
    peer: &str,
    session: Session,
    vm: &crate::hypervisor::VmSpec,
    disks: Vec<crate::hypervisor::DiskInfo>,
) -> Result<Vec<String>, MigrationError> {
    let vm = match vm.to_peer() {
        Ok(vm) => vm,
        Err(reasons) => return Ok(reasons),
    };
    let link = Link::new(peer, session)?;
    let open = Open {
        job: JobId::random(),
        purpose: Purpose::Check,
        vm,
        disks: disks
            .into_iter()
            .map(|disk| DiskOffer { id: disk.id, bytes: disk.bytes, since: None })
            .collect(),
    };
    link.tell(&ToTarget::Open(Box::new(open))).await?;
    let answer = match link.reply().await? {
        ToSource::Accepted { .. } => Ok(Vec::new()),
        ToSource::Refused { reasons } => Ok(reasons),
        other => Err(MigrationError::protocol(peer, format!("it answers {other:?}"))),
    };
    link.close("thank you");
    answer
}

//! Rate caps: agent > job > class. A byte passes when all three levels let it.
//!
//! ```text
//! agent 500M --+-- job A 200M --+-- pages (no cap)
//!              |                +-- seed 20M
//!              +-- job B (no cap) ...
//! ```
//!
//! A byte is paid for twice. At the entry to QUIC, where it still has a class: there the levels are
//! divided by urgency, and what QUIC has not yet sent stays short. And at the socket
//! ([`crate::pace`]), where all of it is seen, repetitions too: there the caps of agent and job are
//! exact.
//!
//! Invariant: over any span in which nothing was changed, what passed a bucket is at most rate x
//! span + [`BURST`] + one slice (at the socket: one batch of packets) per concurrent sender. The
//! buckets are pure: the time comes in as an argument. Only [`JobRate::acquire`] at the end reads the
//! clock and waits.
//!
//! A bucket may go below zero and is then repaid before anything else passes. So a slice of any
//! size passes at once when the level is positive, and large slices cannot starve behind small
//! ones. More urgent classes go first wherever they wait for the same bucket, and between jobs that
//! send equally urgent ones the one that has had less.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::bit_rate::BitRate;
use crate::class::Class;

/// What a bucket saves up while nothing is sent, in time at its rate. Long enough to bridge the late
/// timers of a busy host; short enough that no second has 2 % too much.
pub const BURST: Duration = Duration::from_millis(12);
/// A slice is what the rate carries in this time, within the two limits below.
const SLICE_TIME: Duration = Duration::from_millis(5);
/// What is owed at the entry for what has left already is forgiven beyond what the cap carries in
/// this time: the socket has kept the cap already, and what is long past is no reason to wait.
const OWED_MAX: Duration = Duration::from_millis(500);
/// Below this, the work per slice outweighs the smoothness.
const SLICE_MIN: u64 = 8 * 1024;
/// The slice of an uncapped job: where there is nothing to smooth, fewer locks are better.
const SLICE_MAX: u64 = 512 * 1024;

/// One token bucket in bytes. Without a rate everything passes.
#[derive(Debug, Clone)]
struct Bucket {
    rate: Option<BitRate>,
    /// Billionths of a bit, so that no rate and no tick loses a rounding.
    level: i128,
    filled: Instant,
}

/// Level units per byte.
const UNITS_PER_BYTE: i128 = 8 * 1_000_000_000;

impl Bucket {
    /// Without a rate.
    fn new(now: Instant) -> Self {
        Self { rate: None, level: 0, filled: now }
    }

    fn set_rate(&mut self, rate: Option<BitRate>, now: Instant) {
        self.fill(now);
        if self.rate.is_none() {
            self.level = 0;
        }
        self.rate = rate;
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled);
        self.filled = self.filled.max(now);
        if let Some(rate) = self.rate {
            let per_nano = i128::from(rate.bits_per_second());
            let nanos = |span: Duration| i128::try_from(span.as_nanos()).unwrap_or(i128::MAX);
            let gained = nanos(elapsed).saturating_mul(per_nano);
            let ceiling = nanos(BURST).saturating_mul(per_nano);
            self.level = self.level.saturating_add(gained).min(ceiling);
        }
    }

    /// How long until something may pass; zero if at once. `fill` first.
    fn wait(&self) -> Duration {
        match self.rate {
            Some(rate) if self.level < 0 => {
                let per_nano = u128::from(rate.bits_per_second());
                let nanos = self.level.unsigned_abs().div_ceil(per_nano);
                Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
            }
            _ => Duration::ZERO,
        }
    }

    fn take(&mut self, bytes: u64) {
        if self.rate.is_some() {
            self.level = self.level.saturating_sub(i128::from(bytes) * UNITS_PER_BYTE);
        }
    }
}

/// A cap that is kept at the entry to QUIC and at the socket.
#[derive(Debug)]
struct Cap {
    entry: Bucket,
    wire: Bucket,
}

impl Cap {
    fn new(now: Instant) -> Self {
        Self { entry: Bucket::new(now), wire: Bucket::new(now) }
    }

    fn set_rate(&mut self, rate: Option<BitRate>, now: Instant) {
        self.entry.set_rate(rate, now);
        self.wire.set_rate(rate, now);
    }
}

#[derive(Debug)]
struct Job {
    cap: Cap,
    classes: [Bucket; Class::ALL.len()],
    /// Senders that wait, by class; they hold less urgent ones back.
    waiting: [usize; Class::ALL.len()],
    /// Bytes that it has had, as far as its turn goes.
    had: u64,
}

/// What a sender is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// The bytes are paid for.
    Pass,
    /// Ask again after this time, or when something changed.
    Wait(Duration),
    /// A more urgent sender comes first: ask again when something changed.
    Yield,
}

/// The tree of buckets, without a clock.
#[derive(Debug)]
struct Tree {
    agent: Cap,
    jobs: BTreeMap<u64, Job>,
    next_job: u64,
    /// Where the turn is: who had less than this was idle, and gets nothing for that.
    turn: u64,
}

impl Tree {
    fn new(now: Instant) -> Self {
        Self { agent: Cap::new(now), jobs: BTreeMap::new(), next_job: 0, turn: 0 }
    }

    fn add_job(&mut self, now: Instant) -> u64 {
        let id = self.next_job;
        self.next_job += 1;
        let classes = std::array::from_fn(|_| Bucket::new(now));
        let job = Job { cap: Cap::new(now), classes, waiting: [0; Class::ALL.len()], had: 0 };
        self.jobs.insert(id, job);
        id
    }

    fn request(&mut self, now: Instant, id: u64, class: Class, bytes: u64) -> Verdict {
        self.agent.entry.fill(now);
        for job in self.jobs.values_mut() {
            job.cap.entry.fill(now);
            job.classes.iter_mut().for_each(|bucket| bucket.fill(now));
        }
        let Some(job) = self.jobs.get(&id) else { return Verdict::Pass };
        let own = job.cap.entry.wait().max(job.classes[class.index()].wait());
        let wait = own.max(self.agent.entry.wait());
        // The hand-over decides how long the guest stands still and is some kilobytes: it is
        // charged and never waits.
        if class != Class::HandOver {
            if wait > Duration::ZERO {
                return Verdict::Wait(wait);
            }
            if self.someone_comes_first(id, class) {
                return Verdict::Yield;
            }
        }
        self.agent.entry.take(bytes);
        if let Some(job) = self.jobs.get_mut(&id) {
            job.cap.entry.take(bytes);
            job.classes[class.index()].take(bytes);
            self.turn = self.turn.max(job.had);
            job.had = self.turn.saturating_add(bytes);
        }
        Verdict::Pass
    }

    /// Charges the entry for what has left, or will, without having passed there.
    fn owe(&mut self, now: Instant, id: u64, bytes: u64) {
        let job = self.jobs.get_mut(&id).map(|job| &mut job.cap);
        for cap in [Some(&mut self.agent), job].into_iter().flatten() {
            cap.entry.fill(now);
            let most = cap.entry.rate.map_or(0, |rate| rate.bytes_in(OWED_MAX));
            cap.entry.take(bytes.min(most));
        }
    }

    /// How long what is of job `id` must not leave the socket yet.
    fn wait_to_leave(&mut self, now: Instant, id: u64) -> Duration {
        let job = self.jobs.get_mut(&id).map(|job| &mut job.cap);
        let caps = [Some(&mut self.agent), job].into_iter().flatten();
        caps.fold(Duration::ZERO, |wait, cap| {
            cap.wire.fill(now);
            wait.max(cap.wire.wait())
        })
    }

    /// Bytes of job `id` have left.
    fn left(&mut self, id: u64, bytes: u64) {
        self.agent.wire.take(bytes);
        if let Some(job) = self.jobs.get_mut(&id) {
            job.cap.wire.take(bytes);
        }
    }

    /// True if a waiting sender competes for a capped bucket above `class`, is not held up by a cap of
    /// its own, and is more urgent or of a job whose turn it is.
    fn someone_comes_first(&self, id: u64, class: Class) -> bool {
        let had = |id: &u64| self.jobs.get(id).map_or(0, |job| job.had.max(self.turn));
        let own = had(&id);
        self.jobs.iter().any(|(other, job)| {
            let is_capped = |cap: &Cap| cap.entry.rate.is_some();
            let shared = is_capped(&self.agent) || (*other == id && is_capped(&job.cap));
            let its_turn = had(other) < own;
            shared
                && job.cap.entry.wait() == Duration::ZERO
                && Class::ALL.iter().any(|&rival| {
                    (rival > class || (rival == class && its_turn))
                        && job.waiting[rival.index()] > 0
                        && job.classes[rival.index()].wait() == Duration::ZERO
                })
        })
    }

    /// The lower one of the caps of the agent and of job `id`.
    fn lowest(&self, id: u64) -> Option<BitRate> {
        let job = self.jobs.get(&id).and_then(|job| job.cap.entry.rate);
        [self.agent.entry.rate, job].into_iter().flatten().min()
    }

    fn slice(&self, id: u64, class: Class) -> u64 {
        let class = self.jobs.get(&id).and_then(|job| job.classes[class.index()].rate);
        let lowest = [self.lowest(id), class].into_iter().flatten().min();
        lowest.map_or(SLICE_MAX, |rate| rate.bytes_in(SLICE_TIME).clamp(SLICE_MIN, SLICE_MAX))
    }
}

#[derive(Debug)]
struct Shared {
    tree: Mutex<Tree>,
    changed: Notify,
}

impl Shared {
    fn tree(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// The caps of one agent. Cheap to clone; all clones are the same caps.
#[derive(Debug, Clone)]
pub struct RateLimiter(Arc<Shared>);

impl Default for RateLimiter {
    fn default() -> Self {
        Self::new()
    }
}

impl RateLimiter {
    /// An agent without any cap.
    pub fn new() -> Self {
        Self(Arc::new(Shared { tree: Mutex::new(Tree::new(now())), changed: Notify::new() }))
    }

    /// Caps all that the jobs of this agent send together; `None` lifts the cap. Holds from the next
    /// slice and packet on.
    pub fn set_agent(&self, rate: Option<BitRate>) {
        self.0.tree().agent.set_rate(rate, now());
        self.0.changed.notify_waiters();
    }

    /// A new job under this agent's cap, itself without caps.
    pub fn job(&self) -> JobRate {
        let id = self.0.tree().add_job(now());
        JobRate(Arc::new(JobHandle { shared: self.0.clone(), id }))
    }
}

#[derive(Debug)]
struct JobHandle {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for JobHandle {
    fn drop(&mut self) {
        self.shared.tree().jobs.remove(&self.id);
        self.shared.changed.notify_waiters();
    }
}

/// The caps of one job. Cheap to clone; the job ends with its last clone.
#[derive(Debug, Clone)]
pub struct JobRate(Arc<JobHandle>);

impl JobRate {
    /// Caps this job; `None` lifts the cap. Holds from the next slice and packet on.
    pub fn set_job(&self, rate: Option<BitRate>) {
        self.change(|job, now| job.cap.set_rate(rate, now));
    }

    /// Caps one class of this job; `None` lifts the cap. A cap on [`Class::HandOver`] is counted
    /// and delays nothing.
    pub fn set_class(&self, class: Class, rate: Option<BitRate>) {
        self.change(|job, now| job.classes[class.index()].set_rate(rate, now));
    }

    /// How many bytes to ask for at a time, so that the caps are felt as a smooth rate.
    pub fn slice(&self, class: Class) -> usize {
        let slice = self.0.shared.tree().slice(self.0.id, class);
        usize::try_from(slice).unwrap_or(usize::MAX)
    }

    /// Waits until `bytes` of `class` may pass and pays for them. Dropping the future pays nothing.
    pub async fn acquire(&self, class: Class, bytes: u64) {
        let shared = &self.0.shared;
        let mut place = None;
        loop {
            // Registered before the question is asked, so that no change falls in between.
            let mut changed = std::pin::pin!(shared.changed.notified());
            changed.as_mut().enable();
            let verdict = shared.tree().request(now(), self.0.id, class, bytes);
            match verdict {
                Verdict::Pass => return,
                Verdict::Wait(time) => {
                    place.get_or_insert_with(|| Place::take(&self.0, class));
                    let _ = tokio::time::timeout(time, changed).await;
                }
                Verdict::Yield => {
                    place.get_or_insert_with(|| Place::take(&self.0, class));
                    changed.await;
                }
            }
        }
    }

    /// Charges the entry for wire bytes that did not pass there; whoever passes next waits for them.
    pub(crate) fn owe(&self, bytes: u64) {
        if bytes > 0 {
            self.0.shared.tree().owe(now(), self.0.id, bytes);
        }
    }

    /// How long nothing of this job must leave the socket.
    pub(crate) fn wait_to_leave(&self, now: Instant) -> Duration {
        self.0.shared.tree().wait_to_leave(now, self.0.id)
    }

    /// Wire bytes of this job have left the socket.
    pub(crate) fn left(&self, bytes: u64) {
        self.0.shared.tree().left(self.0.id, bytes);
    }

    /// The lower one of the caps of this job and its agent.
    pub(crate) fn lowest(&self) -> Option<BitRate> {
        self.0.shared.tree().lowest(self.0.id)
    }

    fn change(&self, change: impl FnOnce(&mut Job, Instant)) {
        if let Some(job) = self.0.shared.tree().jobs.get_mut(&self.0.id) {
            change(job, now());
        }
        self.0.shared.changed.notify_waiters();
    }
}

/// A sender's place among those that wait; given up, also when the sender is dropped.
struct Place<'a> {
    job: &'a JobHandle,
    class: Class,
}

impl<'a> Place<'a> {
    fn take(job: &'a JobHandle, class: Class) -> Self {
        let place = Self { job, class };
        place.count(|waiting| waiting + 1);
        place
    }

    fn count(&self, change: impl FnOnce(usize) -> usize) {
        if let Some(job) = self.job.shared.tree().jobs.get_mut(&self.job.id) {
            let waiting = &mut job.waiting[self.class.index()];
            *waiting = change(*waiting);
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.count(|waiting| waiting.saturating_sub(1));
        self.job.shared.changed.notify_waiters();
    }
}

#[cfg(test)]
#[path = "rate_tests.rs"]
mod tests;

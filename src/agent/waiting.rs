//! Moves that wait for a window: the disk goes ahead in it, the VM follows in it, and what a window is
//! too short for goes on in the next.
//!
//! One that waits for its best time sends its disk at once, and follows when the planner says so.
//!
//! Invariant: outside of its windows nothing of such a move is sent. A wish is on disk before it is
//! answered and until the VM has arrived, its deadline has passed or somebody cancels it; what it starts
//! are jobs like any other, so whatever ends them leaves the guest where it was.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use longhaul_scheduler::timing::Advice;
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, Notify};

use super::answer::{Desk, Reaction};
use super::best_time::Bounds;
use super::durable;
use super::jobs::Follow;
use crate::calendar::{Opening, RateCalendar, Windows};
use crate::control::{
    BestTime, Failure, FailureKind, JobKind, JobOutcome, MoveRequest, Reply, WaitView, chain,
};

/// The wishes, in the state folder.
pub(super) const FILE: &str = "waiting.json";
/// How often jobs are looked after while there are some.
const LOOK_PERIOD: Duration = Duration::from_millis(500);
/// How long nothing is looked at when nothing is to change. Clocks may be set meanwhile.
const REST: Duration = Duration::from_secs(30);
/// A seed that failed within its window is tried again after this time.
const AGAIN_S: i64 = 15;
/// A window that has less left is not begun any more.
const LEFT_S_MIN: i64 = 2;

/// A move that waits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Wait {
    to: String,
    windows: Windows,
    rate: Option<RateCalendar>,
    downtime_limit_ms: Option<u64>,
    deadline: Option<Timestamp>,
    /// The VM follows its disks when least of it crosses twice, not at once.
    #[serde(default)]
    best_time: bool,
    /// The disks have gone ahead.
    seeded: bool,
    /// How its last job ended, if that was not as it should.
    trouble: Option<String>,
}

/// A move that waits, with what is not worth keeping.
#[derive(Debug)]
struct Entry {
    wait: Wait,
    job: Option<Follow>,
    /// We have cancelled its job because its window has closed.
    paused: bool,
    /// Nothing is tried before.
    not_before: Option<Timestamp>,
    /// What is thought of a start now and of later ones, of a VM that waits for its best time.
    advice: Option<Advice>,
}

impl Entry {
    fn new(wait: Wait) -> Self {
        Self { wait, job: None, paused: false, not_before: None, advice: None }
    }
}

/// All moves that wait at this host.
#[derive(Debug)]
pub(super) struct Waiting {
    file: PathBuf,
    zone: TimeZone,
    entries: Mutex<BTreeMap<String, Entry>>,
    wake: Notify,
}

/// What is to be done about one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Nothing,
    Start(JobKind),
    Pause,
}

/// The whole decision.
fn step(wait: &Wait, job: Option<JobKind>, opening: Opening, now: Timestamp) -> Step {
    let left_s = |until: Timestamp| until.as_second() - now.as_second();
    match (opening.is_open, job) {
        (false, Some(_)) => Step::Pause,
        (true, None) if opening.until.is_none_or(|until| left_s(until) >= LEFT_S_MIN) => {
            Step::Start(if wait.seeded { JobKind::Migrate } else { JobKind::Seed })
        }
        _ => Step::Nothing,
    }
}

impl Waiting {
    /// The moves that waited when this agent last ran.
    ///
    /// # Errors
    /// The file cannot be read or makes no sense.
    pub(super) fn open(file: PathBuf, zone: TimeZone) -> io::Result<Self> {
        let waits: BTreeMap<String, Wait> = match durable::read(&file)? {
            Some(document) => serde_json::from_slice(&document)?,
            None => BTreeMap::new(),
        };
        let entries = waits.into_iter().map(|(vm, wait)| (vm, Entry::new(wait))).collect();
        Ok(Self { file, zone, entries: Mutex::new(entries), wake: Notify::new() })
    }

    /// Has a move wait for its windows.
    pub(super) async fn add(&self, wish: MoveRequest, windows: Windows) -> Result<Reply, Failure> {
        let MoveRequest { vm, to, downtime_limit_ms, deadline_s, rate, best_time, .. } = wish;
        let now = Timestamp::now();
        let deadline =
            deadline_s.and_then(|s| Timestamp::from_second(now.as_second() + s as i64).ok());
        let opening = windows.at(now, &self.zone);
        let said = match opening {
            Opening { is_open: true, .. } if best_time => format!(
                "the disks of {vm} go ahead to {to}; it follows in its best hour before the deadline: `longhaul \
                 status` shows which"
            ),
            Opening { is_open: true, .. } => {
                format!("{vm} begins to move to {to}: {windows} is now")
            }
            Opening { until: Some(at), .. } => format!(
                "{vm} waits for {windows}, which begins at {}, and then moves to {to}",
                at.to_zoned(self.zone.clone()).strftime("%Y-%m-%d %H:%M:%S %Z")
            ),
            _ => return Err(Failure::refused(format!("{windows} never comes"), "")),
        };
        let seeded = false;
        let trouble = None;
        let wait =
            Wait { to, windows, rate, downtime_limit_ms, deadline, best_time, seeded, trouble };
        let mut entries = self.entries.lock().await;
        if entries.contains_key(&vm) {
            let next = format!("`longhaul cancel {vm}` first");
            return Err(Failure::refused(format!("{vm} waits for a window already"), next));
        }
        entries.insert(vm.clone(), Entry::new(wait));
        if let Err(error) = self.save(&entries) {
            entries.remove(&vm);
            let what = format!("the wish could not be written down: {}", chain(&error));
            return Err(Failure::failed(what, format!("{vm} stays"), "is the disk full?"));
        }
        self.wake.notify_one();
        Ok(Reply::Said(said))
    }

    /// Ends the waiting of a VM; false if it does not wait.
    pub(super) async fn remove(&self, vm: &str) -> bool {
        let mut entries = self.entries.lock().await;
        let was_there = entries.remove(vm).is_some();
        if was_there {
            self.save_or_warn(&entries);
        }
        was_there
    }

    /// Those that wait.
    pub(super) async fn views(&self) -> Vec<WaitView> {
        let now = Timestamp::now();
        let entries = self.entries.lock().await;
        let view = |(vm, entry): (&String, &Entry)| {
            let Wait { to, windows, seeded, trouble, deadline, .. } = &entry.wait;
            let opening = windows.at(now, &self.zone);
            WaitView {
                vm: vm.clone(),
                to: to.clone(),
                windows: windows.to_string(),
                is_open: opening.is_open,
                until: opening.until,
                deadline: *deadline,
                seeded: *seeded,
                trouble: trouble.clone(),
                best_time: entry.advice.as_ref().map(best_time_view),
            }
        };
        entries.iter().map(view).collect()
    }

    /// Looks after them until it is dropped.
    pub(super) async fn run(&self, desk: &Desk) {
        loop {
            let rest = self.look(desk).await;
            tokio::select! {
                () = tokio::time::sleep(rest) => {}
                () = self.wake.notified() => {}
            }
        }
    }

    /// One look at all; how long nothing will be to do.
    async fn look(&self, desk: &Desk) -> Duration {
        let now = Timestamp::now();
        let mut entries = self.entries.lock().await;
        let (mut rest, mut done, mut changed) = (REST, Vec::new(), false);
        for (vm, entry) in entries.iter_mut() {
            let before = entry.wait.clone();
            if entry.attend(vm, desk, now, &self.zone).await {
                done.push(vm.clone());
            }
            changed |= entry.wait != before;
            if entry.job.is_some() {
                rest = rest.min(LOOK_PERIOD);
            }
            let next = [entry.wait.windows.at(now, &self.zone).until, entry.not_before];
            for at in next.into_iter().flatten().filter(|at| *at > now) {
                let left = Duration::try_from(at.duration_since(now)).unwrap_or(REST);
                rest = rest.min(left.max(Duration::from_millis(10)));
            }
        }
        for vm in &done {
            entries.remove(vm);
        }
        if changed || !done.is_empty() {
            self.save_or_warn(&entries);
        }
        rest
    }

    fn save(&self, entries: &BTreeMap<String, Entry>) -> io::Result<()> {
        let waits: BTreeMap<_, _> = entries.iter().map(|(vm, entry)| (vm, &entry.wait)).collect();
        durable::write(&self.file, &serde_json::to_vec(&waits)?)
    }

    fn save_or_warn(&self, entries: &BTreeMap<String, Entry>) {
        if let Err(error) = self.save(entries) {
            tracing::error!(error = chain(&error), "moves that wait could not be written down");
        }
    }
}

impl Entry {
    /// Sees how its job went and does what is to be done now; true once it waits for nothing more.
    async fn attend(&mut self, vm: &str, desk: &Desk, now: Timestamp, zone: &TimeZone) -> bool {
        let opening = self.wait.windows.at(now, zone);
        if self.has_ended(vm, opening, now) {
            return true;
        }
        if self.wait.deadline.is_some_and(|deadline| now >= deadline) {
            tracing::warn!(vm, "its deadline has passed while it waited: it stays here");
            let _ = desk.jobs.cancel(vm);
            return true;
        }
        let job = self.job.as_ref().map(|job| job.summary().kind);
        let waits = self.not_before.is_some_and(|at| now < at);
        match step(&self.wait, job, opening, now) {
            Step::Pause if !self.paused => {
                tracing::info!(vm, "its window has closed: it pauses");
                self.paused = true;
                let _ = desk.jobs.cancel(vm);
            }
            Step::Start(JobKind::Migrate)
                if !waits && self.has_better_time(vm, desk, zone, now) => {}
            Step::Start(kind) if !waits => self.start(vm, kind, desk, opening, now).await,
            _ => {}
        }
        false
    }

    /// Whether it waits for a better hour than this.
    fn has_better_time(&mut self, vm: &str, desk: &Desk, zone: &TimeZone, now: Timestamp) -> bool {
        let Wait { to, windows, rate, deadline, best_time, seeded, .. } = &self.wait;
        let Some(deadline) = deadline.filter(|_| *best_time) else { return false };
        let (rate, seeded) = (rate.as_ref(), *seeded);
        let bounds = Bounds { vm, to, windows, rate, deadline, seeded };
        self.advice = desk.best_time(&bounds, zone, now);
        // What cannot arrive in time is not helped by waiting.
        self.advice.is_some_and(|advice| !advice.sends && advice.in_time > 0.0)
    }

    async fn start(
        &mut self,
        vm: &str,
        kind: JobKind,
        desk: &Desk,
        opening: Opening,
        now: Timestamp,
    ) {
        let Wait { to, rate, downtime_limit_ms, deadline, .. } = &self.wait;
        let ends = [opening.until, *deadline].into_iter().flatten().min();
        let left_s = ends.map(|end| (end.as_second() - now.as_second()).unsigned_abs().max(1));
        let wish = MoveRequest {
            vm: vm.to_owned(),
            to: to.clone(),
            downtime_limit_ms: *downtime_limit_ms,
            deadline_s: left_s,
            rate: rate.clone(),
            // Nobody waits for disks that go ahead of a VM which has time.
            background: self.wait.best_time && kind == JobKind::Seed,
            detach: false,
            windows: None,
            best_time: false,
        };
        tracing::info!(vm, to, %kind, "its window is open");
        self.paused = false;
        match desk.start(kind, wish).await {
            Ok(Reaction::Follow(job)) => self.job = Some(job),
            Ok(_) => {}
            Err(failure) => self.put_off(vm, &failure, kind, opening, now),
        }
    }

    /// Notes how its job has ended, if it has; true if nothing more is to be done.
    fn has_ended(&mut self, vm: &str, opening: Opening, now: Timestamp) -> bool {
        let Some(job) = &self.job else { return false };
        let Some(outcome) = job.ended.borrow().clone() else { return false };
        let kind = job.summary().kind;
        self.job = None;
        match outcome {
            JobOutcome::Completed(_) => {
                self.wait.trouble = None;
                self.wait.seeded = true;
                kind == JobKind::Migrate
            }
            JobOutcome::Failed(failure) => match failure.kind {
                FailureKind::InDoubt => true,
                FailureKind::Cancelled if !self.paused => {
                    tracing::info!(vm, "cancelled: it waits for no window any more");
                    true
                }
                FailureKind::Cancelled => false,
                FailureKind::Failed | FailureKind::Refused => {
                    // Its window has closed on it: that is no failure.
                    if !self.paused && opening.is_open {
                        self.put_off(vm, &failure, kind, opening, now);
                    }
                    false
                }
            },
        }
    }

    /// Tries again later: a seed soon, a migration in the next window, which may be a better time.
    fn put_off(
        &mut self,
        vm: &str,
        failure: &Failure,
        kind: JobKind,
        opening: Opening,
        now: Timestamp,
    ) {
        tracing::warn!(vm, %kind, what = failure.what, "it is tried again");
        self.wait.trouble = Some(failure.what.clone());
        let soon = Timestamp::from_second(now.as_second() + AGAIN_S).ok();
        self.not_before = match kind {
            JobKind::Migrate => opening.until.or(soon),
            JobKind::Seed | JobKind::Push | JobKind::Pull => soon,
        };
    }
}

fn best_time_view(advice: &Advice) -> BestTime {
    let at = |at_s: i64| Timestamp::from_second(at_s).ok();
    BestTime {
        starts: advice.starts_s.and_then(at),
        ends: advice.ends_s.and_then(at),
        cost_mib: advice.cost_mib as u64,
        now_mib: Some(advice.now_mib).filter(|mib| mib.is_finite()).map(|mib| mib as u64),
        in_time_percent: (advice.in_time * 100.0) as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(seeded: bool) -> Wait {
        Wait {
            to: "lyon".into(),
            windows: "22:00-06:00".parse().unwrap(),
            rate: None,
            downtime_limit_ms: None,
            deadline: None,
            best_time: false,
            seeded,
            trouble: None,
        }
    }

    fn at(moment: &str, seeded: bool, job: Option<JobKind>) -> Step {
        let (wait, now) = (wait(seeded), moment.parse().unwrap());
        step(&wait, job, wait.windows.at(now, &TimeZone::UTC), now)
    }

    #[test]
    fn it_goes_in_its_window_and_pauses_with_it() {
        let (night, end, day) =
            ("2026-08-03T23:00:00Z", "2026-08-04T05:59:59Z", "2026-08-04T07:00:00Z");
        assert_eq!(at(day, false, None), Step::Nothing);
        assert_eq!(at(night, false, None), Step::Start(JobKind::Seed));
        assert_eq!(at(night, false, Some(JobKind::Seed)), Step::Nothing);
        assert_eq!(at(day, false, Some(JobKind::Seed)), Step::Pause);
        assert_eq!(at(night, true, None), Step::Start(JobKind::Migrate));
        assert_eq!(at(end, true, None), Step::Nothing);
        assert_eq!(at(day, true, Some(JobKind::Migrate)), Step::Pause);
    }

    #[tokio::test]
    async fn what_waits_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        let open = || Waiting::open(file.clone(), TimeZone::UTC).unwrap();
        let wish = MoveRequest {
            vm: "db1".into(),
            to: "lyon".into(),
            downtime_limit_ms: None,
            deadline_s: Some(3600),
            rate: "20M".parse().ok(),
            background: false,
            detach: false,
            windows: None,
            best_time: true,
        };
        let windows: Windows = "00:00-24:00".parse().unwrap();
        open().add(wish.clone(), windows.clone()).await.unwrap();
        let again = open();
        assert_eq!(again.views().await[0].vm, "db1");
        assert!(again.entries.lock().await["db1"].wait.best_time);
        assert!(again.add(wish, windows).await.unwrap_err().next.contains("cancel db1"));
        assert!(again.remove("db1").await && !again.remove("db1").await);
        assert!(open().views().await.is_empty());
        std::fs::write(&file, "{").unwrap();
        assert!(Waiting::open(file, TimeZone::UTC).is_err());
    }
}

//! One guest that is moved to and fro while something breaks, and the questions that are asked then.
//!
//! Invariant: a drill acts on what an agent says (it stopped at a point, a job ended, nothing is in
//! doubt), never on the clock; only the length of a cut or freeze is a time.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use longhaul_bench::host::VM;
use longhaul_bench::netns::Side;
use longhaul_bench::watch::Watch;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::super::stage::{LOOK_PERIOD, PATIENCE, Setting, Stage, processes};

/// Every point of the switchover, by who stops there.
pub(super) const POINTS: [&str; 14] = [
    "source.pausing",
    "source.paused",
    "source.parked",
    "source.delegated",
    "source.token-sent",
    "source.answered",
    "source.noted",
    "source.let-go",
    "target.token",
    "target.loaded",
    "target.accepted",
    "target.runs",
    "target.told",
    "target.booked",
];

/// What breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    KillSourceAgent,
    KillTargetAgent,
    KillBothAgents,
    KillSourceQemu,
    KillTargetQemu,
    /// The link, for so long.
    Cut(Duration),
    /// The agent that is at the point, for so long.
    Freeze(Duration),
}

impl Trouble {
    pub(super) const ALL: [Self; 8] = [
        Self::KillSourceAgent,
        Self::KillTargetAgent,
        Self::KillBothAgents,
        Self::KillSourceQemu,
        Self::KillTargetQemu,
        Self::Cut(Duration::from_secs(5)),
        Self::Freeze(Duration::from_secs(10)),
        Self::Cut(Duration::from_secs(60)),
    ];
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KillSourceAgent => f.write_str("kill source agent"),
            Self::KillTargetAgent => f.write_str("kill target agent"),
            Self::KillBothAgents => f.write_str("kill both agents"),
            Self::KillSourceQemu => f.write_str("kill source QEMU"),
            Self::KillTargetQemu => f.write_str("kill target QEMU"),
            Self::Cut(time) => write!(f, "cut {} s", time.as_secs()),
            Self::Freeze(time) => write!(f, "freeze {} s", time.as_secs()),
        }
    }
}

/// Something that breaks, and where.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fault {
    pub(super) point: &'static str,
    pub(super) trouble: Trouble,
}

/// How it ended.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    /// Which of the faults happened: a later one may not be reached any more.
    pub(super) reached: Vec<bool>,
    /// The guest is its target's.
    pub(super) moved: bool,
    /// It crashed with its QEMU.
    pub(super) crashed: bool,
    /// An agent said that something was in doubt.
    pub(super) in_doubt_seen: bool,
}

/// Numbers from a seed: splitmix64.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }

    pub(super) fn fault(&mut self) -> Fault {
        let point = POINTS[self.below(POINTS.len())];
        Fault { point, trouble: Trouble::ALL[self.below(Trouble::ALL.len())] }
    }
}

/// A guest between two hosts.
pub(super) struct Drill {
    stage: Stage,
    /// Where the guest is.
    at: Side,
    /// Logs of heartbeats so far, each in a folder of its own.
    logs: u32,
    /// An agent that was killed and not started again.
    down: [bool; 2],
}

impl Drill {
    pub(super) fn begin(test: &str) -> Option<Self> {
        // Little for the processor to do but to be moved: the guest proves its memory when it is asked.
        let append = "survivor.sweep_mib_s=1 survivor.dirty_mib_s=2";
        let setting = Setting { rate_mbit: 500, append, ..Setting::default() };
        let mut stage = Stage::empty(test, &setting)?;
        let mut description = stage.description();
        // Its kernel lies at both ends, so that each can start it from its disk.
        for (name, file) in [("kernel", &stage.guest.kernel), ("initrd", &stage.guest.initrd)] {
            for side in Side::BOTH {
                fs::copy(file, stage.pair.images(side).join(name)).unwrap();
            }
            description["kernel"][name] = json!({"pool": "default", "file": name});
        }
        stage.pair.start_described(&description).unwrap();
        stage.watch.wait_ready(Side::A).unwrap();
        Some(Self { stage, at: Side::A, logs: 0, down: [false; 2] })
    }

    pub(super) fn end(self) {
        self.stage.finish(Side::A, None);
    }

    /// Moves the guest away from where it is, with these faults on the way, and judges.
    pub(super) fn run(&mut self, faults: &[Fault]) -> Outcome {
        let shown: Vec<String> =
            faults.iter().map(|fault| format!("{} at {}", fault.trouble, fault.point)).collect();
        let what = shown.join(" and ");
        eprintln!("{} -> {}: {what}", self.at.letter(), self.at.other().letter());
        let source = self.at;
        let log = self.new_log();
        self.stage.watch.wait_alive(source).unwrap();
        let mut outcome = Outcome { reached: vec![false; faults.len()], ..Outcome::default() };
        for fault in faults {
            self.stage.arm(self.side_of(fault.point), fault.point);
        }
        self.stage.begin_from(source, "migrate");
        self.break_things(faults, &mut outcome);
        self.mend();
        self.until_settled(&mut outcome, &what);
        self.judge(&log, &mut outcome, &what);
        outcome
    }

    /// Breaks things as their points are reached, until all were or nothing more can be.
    fn break_things(&mut self, faults: &[Fault], outcome: &mut Outcome) {
        let deadline = Instant::now() + PATIENCE;
        while outcome.reached.contains(&false) {
            let next = faults.iter().enumerate().find(|(nth, fault)| {
                !outcome.reached[*nth] && self.stage.is_at(self.side_of(fault.point), fault.point)
            });
            match next {
                Some((nth, fault)) => {
                    outcome.reached[nth] = true;
                    self.inject(fault);
                }
                None if self.is_stuck() => self.mend(),
                None if self.is_over() => break,
                None => std::thread::sleep(LOOK_PERIOD),
            }
            assert!(Instant::now() < deadline, "no point is reached{}", self.stage.logs());
        }
        for fault in faults {
            self.stage.disarm(self.side_of(fault.point), fault.point);
        }
    }

    fn inject(&mut self, fault: &Fault) {
        let (source, target) = (self.at, self.at.other());
        let stops = self.side_of(fault.point);
        match fault.trouble {
            Trouble::KillSourceAgent => self.kill(source),
            Trouble::KillTargetAgent => self.kill(target),
            Trouble::KillBothAgents => {
                self.kill(source);
                self.kill(target);
            }
            Trouble::KillSourceQemu => self.kill_qemu(source),
            Trouble::KillTargetQemu => self.kill_qemu(target),
            Trouble::Cut(time) => {
                self.stage.wan.cut().unwrap();
                self.stage.disarm(stops, fault.point);
                std::thread::sleep(time);
                self.stage.wan.restore().unwrap();
            }
            Trouble::Freeze(time) if !self.down[stops as usize] => {
                let pid = Pid::from_raw(self.stage.pair.pid(stops) as i32).unwrap();
                kill_process(pid, Signal::STOP).unwrap();
                self.stage.disarm(stops, fault.point);
                std::thread::sleep(time);
                kill_process(pid, Signal::CONT).unwrap();
            }
            Trouble::Freeze(_) => {}
        }
        self.stage.disarm(stops, fault.point);
    }

    fn kill(&mut self, side: Side) {
        if !std::mem::replace(&mut self.down[side as usize], true) {
            self.stage.pair.kill(side).unwrap();
        }
    }

    fn kill_qemu(&self, side: Side) {
        let pid = fs::read_to_string(self.stage.run_file(side, "qemu.pid")).ok();
        // It may have ended by itself: the parked one at the end of a move.
        if let Some(pid) = pid.and_then(|pid| Pid::from_raw(pid.trim().parse().ok()?)) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }

    /// Whether nothing more can be reached before somebody is started again.
    fn is_stuck(&self) -> bool {
        let up: Vec<Side> =
            Side::BOTH.into_iter().filter(|&side| !self.down[side as usize]).collect();
        let waits = |side: &Side| {
            let status = self.stage.pair.status(*side).unwrap();
            status["jobs"] == json!([]) || status["in_doubt"] != json!([])
        };
        up.len() < 2 && up.iter().all(waits)
    }

    /// Whether nothing is left that could reach a point.
    fn is_over(&self) -> bool {
        let quiet = |side: Side| {
            let status = self.stage.pair.status(side).unwrap();
            status["jobs"] == json!([]) && status["in_doubt"] == json!([])
        };
        self.down == [false; 2] && Side::BOTH.into_iter().all(quiet) && !self.arrives()
    }

    /// Whether a QEMU that is nobody's yet is at the target.
    fn arrives(&self) -> bool {
        let target = self.at.other();
        // The file of one that was killed stays.
        let runs = |pid: String| std::path::Path::new("/proc").join(pid.trim()).exists();
        let pid = fs::read_to_string(self.stage.run_file(target, "qemu.pid"));
        pid.is_ok_and(runs) && self.stage.state(target).is_none()
    }

    /// Starts again what was killed.
    fn mend(&mut self) {
        for side in Side::BOTH {
            if std::mem::take(&mut self.down[side as usize]) {
                self.stage.pair.restart(&self.stage.wan, side).unwrap();
            }
        }
    }

    /// Waits until no job runs and nothing is in doubt, at either end.
    fn until_settled(&self, outcome: &mut Outcome, what: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let states = Side::BOTH.map(|side| self.stage.pair.status(side).unwrap());
            let empty = |name: &str| states.iter().all(|state| state[name] == json!([]));
            outcome.in_doubt_seen |= !empty("in_doubt");
            if self.is_over() {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{what}: not settled: {:#} {:#}{}",
                states[0],
                states[1],
                self.stage.logs()
            );
            std::thread::sleep(LOOK_PERIOD);
        }
    }

    /// Finds the guest, which must be at one side only, and proves it.
    fn judge(&mut self, log: &PathBuf, outcome: &mut Outcome, what: &str) {
        let states = Side::BOTH.map(|side| self.stage.state(side));
        let said = || format!("{what}: {states:?}{}", self.stage.logs());
        let owners: Vec<Side> =
            Side::BOTH.into_iter().filter(|side| states[*side as usize].is_some()).collect();
        let [owner] = owners[..] else { panic!("not one owner: {}", said()) };
        let running = |side: Side| {
            let all = processes(&self.stage.wan, side);
            all.iter().any(|line| line.contains("qemu-system"))
        };
        assert!(!running(owner.other()), "a QEMU is left: {}", said());
        let beats = beats(log);
        assert_rising(&beats, what);
        outcome.moved = owner != self.at;
        outcome.crashed = !running(owner);
        if outcome.crashed {
            let last = beats.last().map(|(side, _)| *side);
            assert!(last != Some(self.at.other()) || owner != self.at, "it ran on: {}", said());
            let killed = what.contains("QEMU");
            assert!(killed, "it is gone though nobody ended it: {}", said());
            self.at = owner;
            self.start_again(what);
            return;
        }
        assert_eq!(states[owner as usize].as_deref(), Some("running"), "{}", said());
        self.at = owner;
        self.stage.watch.wait_alive(owner).unwrap();
        self.stage.watch.wait_working(owner).unwrap();
        self.stage.watch.prove(owner).unwrap();
        self.assert_well(owner, what);
        assert_rising(&self::beats(log), what);
    }

    /// The guest's side starts it from its disks, as its operator would.
    fn start_again(&mut self, what: &str) {
        let at = self.at;
        self.new_log();
        if let Err(error) = self.stage.pair.ask(at, &["vm", "start", VM]) {
            panic!("{what}: {error:#}{}", self.stage.logs());
        }
        self.stage.watch.wait_ready(at).unwrap();
        self.stage.watch.wait_working(at).unwrap();
        self.stage.watch.prove(at).unwrap();
        self.assert_well(at, what);
    }

    fn assert_well(&mut self, at: Side, what: &str) {
        // A new log, so that the one that is judged is whole.
        let folder = self.folder();
        self.logs += 1;
        let next = self.watch();
        let watch = std::mem::replace(&mut self.stage.watch, next);
        let verdict = watch.end(at, &[]).unwrap();
        let log = folder.display();
        assert!(verdict.ok, "{what}: {:?} in {log}{}", verdict.why, self.stage.logs());
    }

    /// Begins a new log of heartbeats and gives its file.
    fn new_log(&mut self) -> PathBuf {
        self.logs += 1;
        self.stage.watch = self.watch();
        self.folder().join("heartbeat.log")
    }

    fn folder(&self) -> PathBuf {
        self.stage.scratch.path().join(format!("log{}", self.logs))
    }

    fn watch(&self) -> Watch {
        let folder = self.folder();
        fs::create_dir_all(&folder).unwrap();
        let consoles = Side::BOTH.map(|side| (side, self.stage.pair.console(side)));
        Watch::start(&folder, &consoles).unwrap()
    }

    fn side_of(&self, point: &str) -> Side {
        if point.starts_with("source.") { self.at } else { self.at.other() }
    }
}

/// Heartbeats in a log, by the host's clock: where each came from, and its number.
fn beats(log: &PathBuf) -> Vec<(Side, u64)> {
    let text = fs::read_to_string(log).unwrap();
    let mut beats: Vec<(u64, Side, u64)> = text
        .lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ' ');
            let nanos = parts.next()?.parse().ok()?;
            let name = parts.next()?;
            let side = Side::BOTH.into_iter().find(|side| side.letter() == name)?;
            let json: Value = serde_json::from_str(parts.next()?).ok()?;
            // Other lines may name a heartbeat, too.
            let number = json["hb"].as_u64().filter(|_| json.get("ev").is_none())?;
            Some((nanos, side, number))
        })
        .collect();
    beats.sort_by_key(|(nanos, ..)| *nanos);
    beats.into_iter().map(|(_, side, number)| (side, number)).collect()
}

/// A guest that ran twice, or from an old memory, counts something twice; one that changed sides
/// twice ran on where it should not.
fn assert_rising(beats: &[(Side, u64)], what: &str) {
    for pair in beats.windows(2) {
        assert!(pair[0].1 < pair[1].1, "{what}: heartbeat {:?} after {:?}", pair[1], pair[0]);
    }
    let changes = beats.windows(2).filter(|pair| pair[0].0 != pair[1].0).count();
    assert!(changes <= 1, "{what}: the guest changed sides {changes} times");
}

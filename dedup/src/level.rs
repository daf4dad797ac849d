//! Which compression level serves a migration best, from what was measured.
//!
//! A batch is coded, then sent, and both go on at once: payload flows at the speed of the slower.
//!
//! ```text
//! flow(level) = min( coder speed(level) * coders,  link rate * ratio(level),  supply )
//! ```
//! The best level has the greatest flow. Among equals it is the one that takes the least CPU, which the
//! guests on this host could use; but up to [`Level::default`] fewer bytes are worth what they cost.
//! Levels are steps, and what a link leaves time for mostly lies between two: a batch is coded at the
//! next denser one whenever what is coded already keeps the link busy until then.
//!
//! Invariant: pure. A faster link never asks for a slower level. [`LevelPolicy::choose`] climbs one
//! step at a time, because each step changes what is measured next, and descends at once, because
//! too slow a level leaves the link idle.

use std::time::Duration;

use crate::compress::Level;
use crate::lzma::Effort;

/// A level with what it does on an ordinary guest's memory on an ordinary core, until measured.
struct Rung {
    level: Level,
    /// Input bytes a second on one coder.
    bytes_per_s: f64,
    /// Input bytes per output byte.
    ratio: f64,
}

const fn rung(level: Level, bytes_per_s: f64, ratio: f64) -> Rung {
    Rung { level, bytes_per_s, ratio }
}

/// What a coder passes on without compressing: it still gathers and frames.
const STORE_BYTES_PER_S: f64 = 8e9;

/// From fastest to densest. Measurements scale the whole ladder, so only the proportions between
/// rungs matter for long. Those of Zstandard are the means over a tar of system libraries and the heap of a
/// script interpreter that `examples/speed.rs` measured on 1 MiB batches, those of LZMA by what it
/// makes of a Debian's disk in batches of 8 MiB beside level 9. Level 12 is left out, as dense as 9 and
/// slower, and so are 16 and 19: LZMA is denser in the same time.
const LADDER: [Rung; 10] = [
    rung(Level::Store, STORE_BYTES_PER_S, 1.0),
    rung(Level::Zstd(-5), 850e6, 2.2),
    rung(Level::Zstd(-1), 720e6, 3.0),
    rung(Level::Zstd(1), 640e6, 3.4),
    rung(Level::Zstd(3), 430e6, 3.6),
    rung(Level::Zstd(6), 130e6, 3.75),
    rung(Level::Zstd(9), 90e6, 3.85),
    rung(Level::Lzma(Effort::Quick), 14e6, 4.25),
    rung(Level::Lzma(Effort::Careful), 8.3e6, 4.4),
    rung(Level::Lzma(Effort::Thorough), 3.5e6, 4.7),
];

/// Flows and ratios that differ by less than this are equal: measurements are no better.
const EQUAL_WITHIN: f64 = 0.03;
/// What one batch weighs in the running averages.
const NEW_WEIGHT: f64 = 0.125;
/// What it weighs in what is known of its rung alone.
const RUNG_WEIGHT: f64 = 1.0 / 32.0;
/// A rung differs from the others' measure by no more than these factors.
const RUNG_BOUNDS: (f64, f64) = (0.5, 2.0);
/// What is coded must keep the link busy for so many times as long as a denser batch takes.
const AHEAD_MARGIN: f64 = 1.25;
/// A link of which so many times as much is known as before is not known yet: a session begins with little.
const GROWS_FROM: f64 = 1.25;
/// How fast the compressibility that was measured is forgotten while nothing is compressed, per
/// batch: other data may come, and only compressing it shows how it compresses.
const FORGET_WEIGHT: f64 = 1.0 / 1024.0;
/// A queue of coded batches that is emptier than this says that the link waits for the coder.
const STARVING_BELOW: f32 = 0.25;
/// One fuller than this says that the coder waits for the link.
const BACKED_UP_ABOVE: f32 = 0.75;
/// Rates beyond these come from a broken measurement.
const RATE_BOUNDS: (f64, f64) = (1e3, 1e12);
const SCALE_BOUNDS: (f64, f64) = (0.01, 100.0);
/// One batch that all but vanishes says little of the next.
const GAIN_BOUNDS: (f64, f64) = (0.0, 4.0);

/// What a decision depends on besides the past batches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Conditions {
    /// What the link carries, or may carry under its caps, in bytes a second.
    pub link_bytes_per_s: f64,
    /// What there is to code, in bytes a second, if that is what the coders wait for; else infinite.
    pub supply_bytes_per_s: f64,
    /// Coders that work at once.
    pub coders: u32,
    /// How full the queue of coded batches before the link is: 0 empty, 1 full.
    pub queue_fill: f32,
    /// What waits there, coded, in bytes.
    pub ahead_bytes: u64,
    /// Length of the batch that is to be coded, in bytes.
    pub batch_bytes: u64,
}

/// Picks the level for the next batches.
#[derive(Debug, Clone, PartialEq)]
pub struct LevelPolicy {
    /// Index into `LADDER`.
    rung: usize,
    /// The link's rate at the last decision.
    link_bytes_per_s: f64,
    /// Measured coder speed by the ladder's.
    speed_scale: f64,
    /// Measured gain (ratio - 1) by the ladder's.
    gain_scale: f64,
    /// By what factors each rung's speed and gain differ from that.
    own: [(f64, f64); LADDER.len()],
}

impl LevelPolicy {
    /// A policy that has measured nothing yet and begins at [`Level::default`].
    pub fn new() -> Self {
        let rung = LADDER
            .iter()
            .position(|rung| rung.level == Level::default())
            .expect("the ladder has the default level");
        Self {
            rung,
            link_bytes_per_s: 0.0,
            speed_scale: 1.0,
            gain_scale: 1.0,
            own: [(1.0, 1.0); LADDER.len()],
        }
    }

    /// The level in use.
    pub fn level(&self) -> Level {
        LADDER[self.rung].level
    }

    /// Takes in a batch that was coded at `level`: its length before and after, and the time that
    /// one coder was busy with it.
    pub fn observe(&mut self, level: Level, bytes_in: u64, bytes_out: u64, busy: Duration) {
        if bytes_in == 0 {
            return;
        }
        let Some(at) = LADDER.iter().position(|rung| rung.level == level) else {
            return;
        };
        if level == Level::Store {
            self.gain_scale += FORGET_WEIGHT * (1.0 - self.gain_scale);
            return;
        }
        let rung = &LADDER[at];
        let (own_speed, own_gain) = &mut self.own[at];
        let gain = (bytes_in as f64 / bytes_out.max(1) as f64 - 1.0).max(0.0) / (rung.ratio - 1.0);
        learn(&mut self.gain_scale, own_gain, gain, GAIN_BOUNDS);
        // A batch that was stored after all shows the speed of the probe, not of the level.
        if bytes_out < bytes_in && !busy.is_zero() {
            let speed = bytes_in as f64 / busy.as_secs_f64() / rung.bytes_per_s;
            learn(&mut self.speed_scale, own_speed, speed, SCALE_BOUNDS);
        }
    }

    /// The level for the next batches: the one in use, one step slower, or at once a faster one; and for
    /// this batch alone one step slower, if the link has enough to do until then.
    ///
    /// Where the queue contradicts the estimate, the queue is right and the level stays. A link that was
    /// slower just now asks for no denser level: it may be faster still.
    pub fn choose(&mut self, conditions: &Conditions) -> Level {
        let best = self.best_rung(conditions);
        let link = conditions.link_bytes_per_s;
        let grows = link > GROWS_FROM * std::mem::replace(&mut self.link_bytes_per_s, link);
        if best > self.rung && conditions.queue_fill >= STARVING_BELOW && !grows {
            self.rung += 1;
        } else if best < self.rung
            && conditions.queue_fill <= BACKED_UP_ABOVE
            && !self.has_time(self.rung, conditions)
        {
            self.rung = best;
        }
        match self.rung + 1 {
            next if !grows && self.has_time(next, conditions) => LADDER[next].level,
            _ => self.level(),
        }
    }

    /// Whether a batch can be coded at this rung before the link has nothing more to do.
    fn has_time(&self, rung: usize, conditions: &Conditions) -> bool {
        rung < LADDER.len() && {
            let coders = f64::from(conditions.coders.max(1));
            let coding_s = conditions.batch_bytes as f64 / (self.bytes_per_s(rung) * coders);
            let link = conditions.link_bytes_per_s;
            conditions.ahead_bytes as f64 / link > coding_s * AHEAD_MARGIN
        }
    }

    /// What one coder gets through at a rung.
    fn bytes_per_s(&self, rung: usize) -> f64 {
        match LADDER[rung].level {
            Level::Store => STORE_BYTES_PER_S,
            _ => {
                let speed = LADDER[rung].bytes_per_s * self.speed_scale * self.own[rung].0;
                speed.min(STORE_BYTES_PER_S)
            }
        }
    }

    fn ratio(&self, rung: usize) -> f64 {
        1.0 + (LADDER[rung].ratio - 1.0) * self.gain_scale * self.own[rung].1
    }

    /// The level that these conditions ask for in the long run.
    pub fn best(&self, conditions: &Conditions) -> Level {
        LADDER[self.best_rung(conditions)].level
    }

    fn best_rung(&self, conditions: &Conditions) -> usize {
        let link = if conditions.link_bytes_per_s.is_finite() {
            conditions.link_bytes_per_s.clamp(RATE_BOUNDS.0, RATE_BOUNDS.1)
        } else {
            RATE_BOUNDS.1
        };
        let coders = f64::from(conditions.coders.max(1));
        let ratios: [f64; LADDER.len()] = std::array::from_fn(|at| self.ratio(at));
        let flows: [f64; LADDER.len()] = std::array::from_fn(|at| {
            let coder = self.bytes_per_s(at) * coders;
            coder.min(link * ratios[at]).min(conditions.supply_bytes_per_s)
        });
        let greatest = flows.iter().copied().fold(0.0, f64::max);
        let is_best = |at: &usize| flows[*at] >= greatest * (1.0 - EQUAL_WITHIN);
        let cheapest = (0..LADDER.len()).find(is_best).unwrap_or(0);
        // Up to the default, as dense as the densest of them is.
        let cheap = |at: &usize| LADDER[*at].level <= Level::default();
        let densest = (cheapest..LADDER.len()).filter(is_best).take_while(cheap).last();
        let worth = |at: &usize| {
            densest.is_none_or(|densest| ratios[*at] >= ratios[densest] * (1.0 - EQUAL_WITHIN))
        };
        (cheapest..LADDER.len()).filter(is_best).find(worth).unwrap_or(cheapest)
    }
}

/// Takes in what was measured, by the ladder's, of a rung: some of it is so of all rungs, some of this one.
fn learn(all: &mut f64, own: &mut f64, measured: f64, bounds: (f64, f64)) {
    let shared = (measured / *own).clamp(bounds.0, bounds.1);
    *all += NEW_WEIGHT * (shared - *all);
    if *all > SCALE_BOUNDS.0 {
        let alone = (measured / *all).clamp(RUNG_BOUNDS.0, RUNG_BOUNDS.1);
        *own += RUNG_WEIGHT * (alone - *own);
    }
}

impl Default for LevelPolicy {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MBIT: f64 = 1e6 / 8.0;

    fn link(mbit_per_s: f64, coders: u32) -> Conditions {
        Conditions {
            link_bytes_per_s: mbit_per_s * MBIT,
            supply_bytes_per_s: f64::INFINITY,
            coders,
            queue_fill: 0.5,
            ahead_bytes: 0,
            batch_bytes: 1 << 20,
        }
    }

    #[test]
    fn the_slower_of_link_and_coder_decides() {
        let policy = LevelPolicy::new();
        assert_eq!(policy.best(&link(5.0, 1)), Level::Lzma(Effort::Thorough));
        assert_eq!(policy.best(&link(20.0, 1)), Level::Lzma(Effort::Quick));
        assert_eq!(policy.best(&link(100.0, 1)), Level::Zstd(6));
        assert_eq!(policy.best(&link(500.0, 1)), Level::Zstd(3));
        assert_eq!(policy.best(&link(1000.0, 1)), Level::Zstd(3));
        assert_eq!(policy.best(&link(2500.0, 1)), Level::Zstd(-1));
        assert_eq!(policy.best(&link(2500.0, 4)), Level::Zstd(3));
        assert_eq!(policy.best(&link(40_000.0, 1)), Level::Store);
    }

    #[test]
    fn what_comes_slowly_is_not_sent_in_more_bytes() {
        let policy = LevelPolicy::new();
        let supply = Conditions { supply_bytes_per_s: 100e6, ..link(2500.0, 1) };
        assert_eq!(policy.best(&supply), Level::Zstd(3));
        let supply = Conditions { supply_bytes_per_s: 100e6, ..link(100.0, 1) };
        assert_eq!(policy.best(&supply), policy.best(&link(100.0, 1)));
    }

    #[test]
    fn a_slow_machine_compresses_less() {
        let mut policy = LevelPolicy::new();
        let before = policy.best(&link(500.0, 1));
        for _ in 0..100 {
            // A fifth of the speed that the ladder has for level 3.
            policy.observe(Level::Zstd(3), 90_000_000, 30_000_000, Duration::from_secs(1));
        }
        assert!(policy.best(&link(500.0, 1)) < before);
    }

    #[test]
    fn incompressible_data_is_tried_now_and_then_and_other_data_is_noticed() {
        let mut policy = LevelPolicy::new();
        let conditions = link(500.0, 1);
        let mut run = |batches: usize, bytes_out: u64| {
            let compressed = (0..batches).filter(|_| {
                let level = policy.choose(&conditions);
                let bytes_out = if level == Level::Store { 1 << 20 } else { bytes_out };
                policy.observe(level, 1 << 20, bytes_out, Duration::from_millis(2));
                level != Level::Store
            });
            compressed.count()
        };
        run(100, 1 << 20);
        // A try at the fastest level on noise costs about as much as a copy.
        let tries = run(1000, 1 << 20);
        assert!((20..500).contains(&tries), "{tries}");
        run(200, 1 << 18);
        assert_eq!(run(100, 1 << 18), 100);
    }

    #[test]
    fn the_queue_has_the_last_word() {
        let mut policy = LevelPolicy::new();
        let starving = Conditions { queue_fill: 0.0, ..link(10.0, 1) };
        assert_eq!(policy.choose(&starving), Level::Zstd(3));
        let backed_up = Conditions { queue_fill: 1.0, ..link(40_000.0, 1) };
        assert_eq!(policy.choose(&backed_up), Level::Zstd(3));
        assert_eq!(policy.choose(&link(10.0, 1)), Level::Zstd(6));
        assert_eq!(policy.choose(&link(10.0, 1)), Level::Zstd(9));
    }

    /// What a session knows of its link in its first round trips.
    #[test]
    fn a_link_that_is_not_known_yet_asks_for_no_denser_level() {
        let mut policy = LevelPolicy::new();
        for mbit_per_s in [0.2, 5.0, 40.0, 90.0, 200.0] {
            let conditions = Conditions { ahead_bytes: 2_000_000, ..link(mbit_per_s, 2) };
            assert_eq!(policy.choose(&conditions), Level::Zstd(3));
        }
        assert!(policy.choose(&link(200.0, 2)) > Level::Zstd(3));
    }

    #[test]
    fn a_batch_is_denser_when_the_link_has_enough_to_do_meanwhile() {
        let mut policy = LevelPolicy::new();
        let conditions = link(50.0, 2);
        for _ in 0..10 {
            policy.choose(&conditions);
        }
        assert_eq!(policy.level(), Level::Lzma(Effort::Quick));
        // Two coders take a sixteenth of a second for a MiB at the next: 400 kB of this link.
        let with = |ahead_bytes| Conditions { ahead_bytes, ..conditions };
        assert_eq!(policy.choose(&with(300_000)), Level::Lzma(Effort::Quick));
        assert_eq!(policy.choose(&with(600_000)), Level::Lzma(Effort::Careful));
        assert_eq!(policy.choose(&with(0)), Level::Lzma(Effort::Quick));
        // What would need a faster level in the long run does not while the link has enough to do.
        let fast = |ahead_bytes| Conditions { ahead_bytes, ..link(500.0, 2) };
        assert_eq!(policy.choose(&fast(20_000_000)), Level::Lzma(Effort::Quick));
        assert_eq!(policy.choose(&fast(20_000_000)), Level::Lzma(Effort::Careful));
        assert!(policy.choose(&fast(0)) < Level::Lzma(Effort::Quick));
    }

    #[test]
    fn a_rung_that_is_slower_than_its_place_is_known_as_that() {
        let mut policy = LevelPolicy::new();
        for _ in 0..200 {
            // One as the ladder says, one at half of that.
            policy.observe(Level::Zstd(9), 90_000_000, 30_000_000, Duration::from_secs(1));
            policy.observe(
                Level::Lzma(Effort::Quick),
                7_000_000,
                2_000_000,
                Duration::from_secs(1),
            );
        }
        let at = |level| LADDER.iter().position(|rung| rung.level == level).unwrap();
        let (nine, quick) = (at(Level::Zstd(9)), at(Level::Lzma(Effort::Quick)));
        assert!((85e6..95e6).contains(&policy.bytes_per_s(nine)), "{policy:?}");
        assert!((6.5e6..7.5e6).contains(&policy.bytes_per_s(quick)), "{policy:?}");
    }

    #[test]
    fn broken_measurements_do_no_harm() {
        let mut policy = LevelPolicy::new();
        policy.observe(Level::Zstd(3), 0, 0, Duration::ZERO);
        policy.observe(Level::Zstd(3), 10, 0, Duration::ZERO);
        policy.observe(Level::Zstd(7), 10, 5, Duration::from_secs(1));
        for rate in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
            let conditions = Conditions {
                link_bytes_per_s: rate,
                supply_bytes_per_s: rate,
                coders: 0,
                queue_fill: f32::NAN,
                ahead_bytes: u64::MAX,
                batch_bytes: 0,
            };
            policy.choose(&conditions);
        }
    }

    proptest! {
        #[test]
        fn a_faster_link_never_asks_for_a_slower_level(
            slow in 0.1_f64..100_000.0,
            factor in 1.0_f64..1000.0,
            coders in 1_u32..64,
            speed_scale in 0.05_f64..20.0,
            gain_scale in 0.0_f64..5.0,
        ) {
            let policy = LevelPolicy { rung: 0, speed_scale, gain_scale, ..LevelPolicy::new() };
            prop_assert!(policy.best(&link(slow * factor, coders)) <= policy.best(&link(slow, coders)));
        }
    }
}

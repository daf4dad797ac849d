//! What breaks at every named point of the switchover, with real agents and a real guest.
//!
//! Invariant: after each fault things are restarted and nothing else is done; then the guest has run
//! on at exactly one side, or has crashed with the QEMU in which it ran, and exactly one side may
//! start it again. The guest's own heartbeat, its memory and its disk are the witnesses.
//!
//! One guest goes to and fro between two hosts, so that each side is source and target in turn.
//! `SHORT` runs always. The whole product of points and faults, and pairs drawn from a seed, run with
//! `cargo test --test migration -- --ignored every_point` (hours): see `docs/hand-over.md`.

mod drill;

use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::json;

use drill::{Drill, Fault, POINTS, Trouble};

/// One trouble at one point each, so that every point and every trouble but the long cut is there.
const SHORT: [(&str, Trouble); 17] = [
    ("source.pausing", Trouble::KillTargetAgent),
    ("source.paused", Trouble::KillSourceAgent),
    ("source.parked", Trouble::KillBothAgents),
    ("source.delegated", Trouble::KillSourceAgent),
    ("source.delegated", Trouble::KillTargetQemu),
    // The token may have overtaken what was sent before it.
    ("source.token-sent", Trouble::KillSourceAgent),
    ("source.token-sent", Trouble::KillBothAgents),
    ("source.answered", Trouble::KillSourceAgent),
    ("source.noted", Trouble::KillSourceAgent),
    ("source.let-go", Trouble::KillBothAgents),
    ("target.token", Trouble::KillTargetAgent),
    ("target.loaded", Trouble::KillTargetQemu),
    ("target.accepted", Trouble::KillTargetAgent),
    ("target.accepted", Trouble::Freeze(Duration::from_secs(2))),
    ("target.runs", Trouble::KillBothAgents),
    ("target.told", Trouble::Cut(Duration::from_secs(2))),
    ("target.booked", Trouble::KillTargetAgent),
];

#[test]
fn whatever_breaks_in_the_switchover_the_guest_runs_at_one_side() {
    let Some(mut drill) = Drill::begin("drill") else { return };
    for (point, trouble) in SHORT {
        drill.run(&[Fault { point, trouble }]);
    }
    // The QEMU in which the guest runs.
    drill.run(&[Fault { point: "target.runs", trouble: Trouble::KillTargetQemu }]);
    // Two at once: the acceptance is durable, and the source hears of it late.
    drill.run(&[
        Fault { point: "source.token-sent", trouble: Trouble::KillSourceAgent },
        Fault { point: "target.accepted", trouble: Trouble::KillTargetAgent },
    ]);
    drill.end();
}

/// What is said of the long run, one line a fault or pair.
struct Results(Option<std::fs::File>);

impl Results {
    fn open() -> Self {
        let path = std::env::var_os("LONGHAUL_RESULTS");
        Self(
            path.map(|path| std::fs::File::options().create(true).append(true).open(path).unwrap()),
        )
    }

    fn add(&mut self, seed: u64, faults: &[Fault], outcome: &drill::Outcome, took: Duration) {
        let shown: Vec<_> = faults
            .iter()
            .map(|fault| json!({"at": fault.point, "what": fault.trouble.to_string()}))
            .collect();
        let row = json!({
            "seed": seed,
            "faults": shown,
            "reached": outcome.reached,
            "runs_at": if outcome.moved { "target" } else { "source" },
            "crashed": outcome.crashed,
            "in_doubt_seen": outcome.in_doubt_seen,
            "took_s": took.as_secs_f64(),
        });
        if let Some(file) = &mut self.0 {
            writeln!(file, "{row}").unwrap();
        }
        eprintln!("{row}");
    }
}

/// A number from the environment.
fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().unwrap())
}

/// Every point with every trouble, then random pairs. `LONGHAUL_SEED` seeds the pairs,
/// `LONGHAUL_PAIRS` says how many, `LONGHAUL_SHARD=I` and `LONGHAUL_SHARDS=N` split the work, of which
/// `LONGHAUL_DONE` have been done, and `LONGHAUL_RESULTS` names a file for the rows.
#[test]
#[ignore = "takes hours; see docs/hand-over.md"]
fn every_point_with_every_trouble_and_random_pairs() {
    let seed = number("LONGHAUL_SEED", 1);
    let (shard, shards) = (number("LONGHAUL_SHARD", 0), number("LONGHAUL_SHARDS", 1));
    let mut plans: Vec<Vec<Fault>> = Vec::new();
    for trouble in Trouble::ALL {
        plans.extend(POINTS.map(|point| vec![Fault { point, trouble }]));
    }
    let mut random = drill::Random::new(seed);
    for _ in 0..number("LONGHAUL_PAIRS", 200) {
        plans.push(vec![random.fault(), random.fault()]);
    }
    let Some(mut drill) = Drill::begin(&format!("drill{shard}")) else { return };
    let mut results = Results::open();
    let mine = plans.iter().enumerate().filter(|(nth, _)| *nth as u64 % shards == shard);
    for (_, faults) in mine.skip(number("LONGHAUL_DONE", 0) as usize) {
        let begun = Instant::now();
        let outcome = drill.run(faults);
        results.add(seed, faults, &outcome, begun.elapsed());
    }
    drill.end();
}

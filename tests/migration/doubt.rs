//! A hand-over that is in doubt: what both ends say, how it is settled, and the operator's word.

use longhaul_bench::host::VM;
use longhaul_bench::netns::Side;
use serde_json::{Value, json};

use super::stage::{Setting, Stage, processes};

const SETTING: Setting =
    Setting { rate_mbit: 500, append: "", older_target: false, before: |_| {} };

/// Moves the guest and cuts the link with an agent at a point; it goes on then, and the source's
/// agent dies, so that it need not wait to notice the cut.
fn cut_at(stage: &mut Stage, side: Side, point: &str) {
    stage.arm(side, point);
    stage.begin("migrate");
    stage.until_at(side, point);
    stage.wan.cut().unwrap();
    stage.pair.kill(Side::A).unwrap();
    stage.disarm(side, point);
    stage.pair.restart(&stage.wan, Side::A).unwrap();
}

/// What is said of the one hand-over that is not settled.
fn detail(doubts: &Value) -> String {
    assert_eq!(doubts.as_array().map(Vec::len), Some(1), "{doubts:#}");
    doubts[0]["detail"].as_str().unwrap().to_owned()
}

fn blocks(doubts: &Value) -> bool {
    doubts[0]["blocks"] == true
}

fn resolve(stage: &Stage, side: Side, runs: &str) -> String {
    let said = stage.pair.ask(side, &["resolve", VM, "--runs", runs, "--confirm", VM]);
    said.unwrap_or_else(|error| panic!("{error:#}{}", stage.logs())).to_string()
}

/// The link goes when the acceptance is durable, then both agents die: each knows from its own disk
/// what it may do, says so, and the rest is settled when they meet.
#[test]
fn a_doubt_outlives_both_agents_and_is_settled_when_they_meet() {
    let Some(mut stage) = Stage::with_guest("doubt", &SETTING) else { return };
    cut_at(&mut stage, Side::B, "target.accepted");
    stage.watch.wait_alive(Side::B).unwrap();
    for side in Side::BOTH {
        stage.pair.kill(side).unwrap();
    }
    for side in Side::BOTH {
        stage.pair.restart(&stage.wan, side).unwrap();
    }
    let source = stage.until_in_doubt(Side::A, blocks);
    assert!(detail(&source).contains("b was given the decision"), "{source:#}");
    assert_eq!(stage.state(Side::A).as_deref(), Some("parked"));
    let target = stage.until_in_doubt(Side::B, |doubts| doubts[0]["blocks"] == false);
    assert!(detail(&target).contains("a has not confirmed"), "{target:#}");
    // What moves is not touched by hand.
    for deed in [&["vm", "stop", VM, "--force"][..], &["migrate", VM, "--to", "b"]] {
        let refused = stage.pair.ask(Side::A, deed).unwrap_err().to_string();
        assert!(refused.contains("in doubt"), "{refused}");
    }
    stage.wan.restore().unwrap();
    stage.until_all_settled();
    stage.assert_moved();
    stage.assert_well(Side::B);
}

/// The operator takes the guest back although it runs at the target: as soon as the two meet, the
/// target's is stopped, and that is said until somebody has looked at it.
#[test]
fn the_operators_word_beats_the_target_and_the_conflict_is_shouted() {
    let Some(mut stage) = Stage::with_guest("conflict", &SETTING) else { return };
    cut_at(&mut stage, Side::B, "target.accepted");
    stage.watch.wait_alive(Side::B).unwrap();
    stage.until_in_doubt(Side::A, blocks);

    for (arguments, why) in [
        (&["resolve", VM, "--runs", "here"][..], "nobody can be asked on this terminal"),
        (&["resolve", VM, "--runs", "here", "--confirm", "gest"], "is not guest"),
        (&["resolve", "other", "--runs", "here", "--confirm", "other"], "no hand-over of other"),
    ] {
        let refused = stage.pair.ask(Side::A, arguments).unwrap_err().to_string();
        assert!(refused.contains(why), "{refused}");
        assert_eq!(stage.state(Side::A).as_deref(), Some("parked"));
    }
    let there = ["resolve", VM, "--runs", "there", "--confirm", VM];
    stage.until_in_doubt(Side::B, |doubts| *doubts != json!([]));
    let refused = stage.pair.ask(Side::B, &there).unwrap_err().to_string();
    assert!(refused.contains("runs here"), "{refused}");
    let said = resolve(&stage, Side::A, "here");
    assert!(said.contains("by its operator's word"), "{said}");
    stage.watch.wait_alive(Side::A).unwrap();
    stage.until_in_doubt(Side::A, |doubts| detail(doubts).contains("has not heard of it yet"));

    stage.wan.restore().unwrap();
    stage.until_settled(Side::A);
    let conflict = stage.until_in_doubt(Side::B, |doubts| detail(doubts).contains("CONFLICT"));
    assert!(detail(&conflict).contains("operator at a took it back"), "{conflict:#}");
    assert_eq!(stage.state(Side::B).as_deref(), Some("paused"));
    stage.watch.wait_alive(Side::A).unwrap();
    // It does not come back with the agent, and is not forgotten.
    stage.pair.kill(Side::B).unwrap();
    stage.pair.restart(&stage.wan, Side::B).unwrap();
    stage.until_in_doubt(Side::B, |doubts| detail(doubts).contains("CONFLICT"));
    assert_eq!(stage.state(Side::B).as_deref(), Some("paused"));

    resolve(&stage, Side::B, "there");
    stage.until_settled(Side::B);
    assert_eq!(stage.state(Side::B), None);
    stage.assert_untouched();
    stage.migrate();
    stage.watch.wait_alive(Side::B).unwrap();
    stage.finish(Side::B, None);
}

/// The operator leaves the guest to a target that runs it, and the journals agree.
#[test]
fn a_guest_that_was_left_to_its_target_is_let_go() {
    let Some(mut stage) = Stage::with_guest("left", &SETTING) else { return };
    cut_at(&mut stage, Side::B, "target.accepted");
    stage.until_in_doubt(Side::A, blocks);
    resolve(&stage, Side::A, "there");
    assert_eq!(stage.state(Side::A), None);
    assert_eq!(processes(&stage.wan, Side::A).len(), 1, "its parked QEMU is not ended");
    stage.wan.restore().unwrap();
    stage.until_all_settled();
    stage.assert_moved();
    stage.assert_well(Side::B);
}

/// The operator leaves the guest to a target that has refused it: it runs nowhere, and that is said;
/// its disks are where they were.
#[test]
fn a_guest_that_both_gave_away_is_found_again() {
    let Some(mut stage) = Stage::with_guest("nowhere", &SETTING) else { return };
    cut_at(&mut stage, Side::A, "source.delegated");
    stage.until_in_doubt(Side::A, blocks);
    resolve(&stage, Side::A, "there");
    assert_eq!(stage.state(Side::A), None);
    stage.wan.restore().unwrap();
    stage.until_logged(Side::A, "CONFLICT");
    stage.until_all_settled();
    assert_eq!(stage.state(Side::A).as_deref(), Some("not running"));
    assert_eq!(stage.state(Side::B), None);
    stage.pair.ask(Side::A, &["vm", "start", VM]).unwrap();
    stage.watch.wait_ready(Side::A).unwrap();
    stage.finish(Side::A, None);
}

//! What breaks inside the switchover, where only the two journals know who may run the guest.
//!
//! The operator's hooks are the events: they run at known steps of the switchover, so what breaks
//! there breaks at the same step every time.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use longhaul_bench::netns::Side;

use super::stage::{Setting, Stage, lab};

/// Has one agent run `script` at `moment`, from its next start on.
fn hook(stage: &mut Stage, side: Side, moment: &str, script: &str) {
    let folder = stage.pair.folder(side).to_owned();
    stage.pair.stop(side).unwrap();
    let program = folder.join("hook");
    std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
    set_hook(&folder, moment, program.to_str());
    stage.pair.restart(&stage.wan, side).unwrap();
}

fn set_hook(folder: &Path, moment: &str, program: Option<&str>) {
    let file = folder.join("agent.toml");
    let mut config: toml::Table = toml::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    let hooks = config["hooks"].as_table_mut().unwrap();
    match program {
        Some(program) => hooks.insert(moment.to_owned(), program.into()),
        None => hooks.remove(moment),
    };
    std::fs::write(&file, toml::to_string(&config).unwrap()).unwrap();
}

const SETTING: Setting =
    Setting { rate_mbit: 100, append: "", older_target: false, before: |_| {} };

/// The source's agent dies as the guest is about to be paused: the guest is its owner's again.
#[test]
fn the_source_agent_dies_before_the_pause() {
    let Some(mut stage) = Stage::with_guest("die-before", &SETTING) else { return };
    hook(&mut stage, Side::A, "before_switchover", "kill -9 $PPID");
    stage.begin("migrate");
    stage.pair.wait_end(Side::A).unwrap();
    set_hook(stage.pair.folder(Side::A), "before_switchover", None);
    stage.pair.restart(&stage.wan, Side::A).unwrap();
    stage.until_settled(Side::A);
    stage.assert_untouched();
    stage.migrate();
    stage.assert_moved();
    stage.assert_well(Side::B);
}

/// The link goes as the guest is about to be paused. It is paused, and handed over into the void:
/// when the link is back the target says that it never got it, and the guest goes on at its source.
#[test]
fn the_link_is_cut_in_the_switchover() {
    let Some(mut stage) = Stage::with_guest("cut-last", &SETTING) else { return };
    let cut = format!("{} wan cut --name {}", lab().display(), stage.wan.spec().name);
    hook(&mut stage, Side::A, "before_switchover", &cut);
    let job = stage.begin("migrate");
    stage.until(job, "switchover", 0);
    // Both ends notice a cut by themselves; the target's refusal is durable before it is asked.
    stage.until_logged(Side::B, "arrival ended");
    stage.wan.restore().unwrap();
    let outcome = stage.outcome(job);
    assert!(outcome["failed"].is_object(), "{outcome:#}");
    set_hook(stage.pair.folder(Side::A), "before_switchover", None);
    stage.assert_untouched();
    stage.migrate();
    stage.assert_moved();
    stage.assert_well(Side::B);
}

/// The target's agent dies when the guest runs there: it is found again, and nowhere else.
#[test]
fn the_target_agent_dies_after_the_hand_over() {
    let Some(mut stage) = Stage::with_guest("die-after", &SETTING) else { return };
    hook(&mut stage, Side::B, "after_switchover", "kill -9 $PPID");
    let job = stage.begin("migrate");
    stage.pair.wait_end(Side::B).unwrap();
    stage.watch.wait_alive(Side::B).unwrap();
    set_hook(stage.pair.folder(Side::B), "after_switchover", None);
    stage.pair.restart(&stage.wan, Side::B).unwrap();
    stage.until_settled(Side::B);
    let outcome = stage.outcome(job);
    assert!(outcome["completed"].is_object(), "{outcome:#}{}", stage.logs());
    stage.assert_moved();
    stage.assert_well(Side::B);
}

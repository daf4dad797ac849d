//! The operator's hook behind the switchover, and an agent that dies in it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use longhaul_bench::netns::Side;

use super::stage::{Setting, Stage};

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

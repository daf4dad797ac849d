//! A journal that cannot be written, at each step and either end: what is said is clear, the guest
//! runs, and what could not be written down is, as soon as it can be.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use longhaul_bench::netns::Side;
use serde_json::Value;

use super::stage::{Mounts, Setting, Stage, mount};

/// Room for an agent's state: pages that have arrived lie there, too.
const STATE_ROOM: &str = "size=600m";
const JOURNALS_ROOM: &str = "size=256k";

fn state(stage: &Stage, side: Side) -> PathBuf {
    stage.pair.folder(side).join("state")
}

/// What is wrong with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Disk {
    Full,
    ReadOnly,
}

impl Disk {
    fn spoil(self, stage: &Stage, side: Side) {
        match self {
            Self::Full => {
                for folder in [state(stage, side), state(stage, side).join("journals")] {
                    let mut file = fs::File::create(folder.join("filling")).unwrap();
                    let filled = std::io::copy(&mut std::io::repeat(0), &mut file);
                    assert!(filled.is_err(), "it has no end");
                }
            }
            Self::ReadOnly => remount(stage, side, "ro"),
        }
    }

    fn mend(self, stage: &Stage, side: Side) {
        match self {
            Self::Full => {
                for folder in [state(stage, side), state(stage, side).join("journals")] {
                    fs::remove_file(folder.join("filling")).unwrap();
                }
            }
            Self::ReadOnly => remount(stage, side, "rw"),
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Full => "No space left on device",
            Self::ReadOnly => "Read-only file system",
        }
    }
}

fn remount(stage: &Stage, side: Side, mode: &str) {
    let journals = state(stage, side).join("journals");
    let options = format!("remount,{mode}");
    let mounted = Command::new("mount").args(["-o", &options]).arg(journals).status();
    assert!(mounted.unwrap().success(), "{mode} at {}", side.letter());
}

/// Moves the guest from where it is; the disk at one end is spoilt at a point, or before the move
/// begins. Gives how the job ended.
fn moved_while(
    stage: &Stage,
    from: Side,
    disk: Disk,
    at: Side,
    point: Option<&str>,
) -> Result<Value, String> {
    let job = match point {
        None => {
            disk.spoil(stage, at);
            stage.begin_from(from, "migrate")
        }
        Some(point) => {
            stage.arm(at, point);
            let job = stage.begin_from(from, "migrate");
            stage.until_at(at, point);
            disk.spoil(stage, at);
            stage.disarm(at, point);
            job
        }
    };
    let outcome = stage.outcome_at(from, job);
    match outcome["completed"].is_object() {
        true => Ok(outcome["completed"].clone()),
        false => Err(outcome["failed"].to_string()),
    }
}

#[test]
fn a_journal_that_cannot_be_written_costs_no_guest() {
    let setting = Setting {
        rate_mbit: 500,
        before: |folders| {
            for folder in folders {
                mount(&folder.join("state"), STATE_ROOM);
                mount(&folder.join("state/journals"), JOURNALS_ROOM);
            }
        },
        ..Setting::default()
    };
    let Some(mut stage) = Stage::with_guest("full", &setting) else { return };
    let folders = Side::BOTH.map(|side| state(&stage, side));
    let mounts = folders.iter().flat_map(|state| [state.join("journals"), state.clone()]);
    let mounts = Mounts(mounts.collect());

    let mut at = Side::A;
    // (which disk, at the source or else the target, from which point on, whether the guest moves)
    let cases = [
        (Disk::Full, true, None, false),
        (Disk::ReadOnly, true, None, false),
        (Disk::Full, false, None, false),
        (Disk::ReadOnly, false, None, false),
        (Disk::ReadOnly, true, Some("source.paused"), false),
        (Disk::ReadOnly, true, Some("source.parked"), false),
        (Disk::ReadOnly, false, Some("target.token"), false),
        (Disk::ReadOnly, false, Some("target.loaded"), false),
        // Room was reserved: what fills up later stops nothing.
        (Disk::Full, true, Some("source.parked"), true),
        (Disk::Full, false, Some("target.loaded"), true),
        // Behind the point of no return the journal is written later.
        (Disk::ReadOnly, true, Some("source.token-sent"), true),
        (Disk::ReadOnly, true, Some("source.answered"), true),
        (Disk::ReadOnly, true, Some("source.let-go"), true),
        (Disk::ReadOnly, false, Some("target.accepted"), true),
        (Disk::ReadOnly, false, Some("target.runs"), true),
        (Disk::ReadOnly, false, Some("target.booked"), true),
    ];
    for (disk, is_source, point, moves) in cases {
        let side = if is_source { at } else { at.other() };
        let case = format!("{disk:?} at {side:?} from {}, at {point:?}", at.letter());
        eprintln!("{case}");
        let ended = moved_while(&stage, at, disk, side, point);
        match (&ended, moves) {
            (Ok(_), true) => at = at.other(),
            (Err(why), false) => {
                assert!(why.contains(disk.words()), "{case}: no {:?} in {why}", disk.words());
            }
            _ => panic!("{case}: {ended:?}{}", stage.logs()),
        }
        stage.watch.wait_alive(at).unwrap();
        if point.is_some() && disk == Disk::ReadOnly {
            // What could not be written down is not forgotten.
            stage.until_in_doubt(side, |doubts| doubts.to_string().contains(disk.words()));
        }
        disk.mend(&stage, side);
        stage.until_all_settled();
        stage.until_running(at);
        assert_eq!(stage.state(at.other()), None, "{case}");
    }
    stage.watch.prove(at).unwrap();
    let image = stage.image(at);
    stage.watch.power_off(at).unwrap();
    stage.pair.wait_vm_gone(at, super::stage::PATIENCE).unwrap();
    for side in Side::BOTH {
        stage.pair.stop(side).unwrap();
    }
    assert!(image.exists());
    drop(mounts);
}

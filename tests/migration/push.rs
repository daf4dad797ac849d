//! Images that are sent without a VM.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use longhaul_bench::netns::Side;
use serde_json::Value;

use super::stage::{IN_FLIGHT_BYTES, Setting, Stage, files};

const MIB: usize = 1 << 20;
/// Bytes of the image that are not zero; the rest is a hole.
const DATA_BYTES: usize = 24 * MIB;
const IMAGE_BYTES: u64 = 64 << 20;

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// An image at side a, last written to an hour ago.
fn image(stage: &Stage, seed: u64) -> PathBuf {
    let path = stage.scratch.path().join("golden.raw");
    let file = File::create(&path).unwrap();
    file.write_all_at(&noise(seed, DATA_BYTES), 8 << 20).unwrap();
    file.set_len(IMAGE_BYTES).unwrap();
    settle(&path);
    path
}

fn settle(path: &Path) {
    let hour_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    File::options().write(true).open(path).unwrap().set_modified(hour_ago).unwrap();
}

fn push(stage: &Stage, image: &Path, more: &[&str]) -> Result<Value, String> {
    let arguments = [&["push", image.to_str().unwrap(), "b:golden.raw"][..], more].concat();
    let answer = stage.pair.ask(Side::A, &arguments).map_err(|error| format!("{error:#}"))?;
    Ok(answer["completed"].clone())
}

fn assert_arrived(stage: &Stage, image: &Path) {
    let there = stage.pair.images(Side::B).join("golden.raw");
    assert!(fs::read(image).unwrap() == fs::read(there).unwrap(), "{}", stage.logs());
    let left = files(&stage.pair.images(Side::B));
    assert_eq!(left, ["golden.raw", "golden.raw.longhaul-recipe"]);
}

#[test]
fn an_image_goes_to_a_peer_and_only_what_changed_goes_again() {
    let setting = Setting { rate_mbit: 200, ..Setting::default() };
    let Some(stage) = Stage::empty("push", &setting) else { return };
    let image = image(&stage, 1);
    let report = push(&stage, &image, &[]).unwrap();
    let wire = |report: &Value| report["wire_bytes"].as_u64().unwrap();
    assert!(wire(&report) > DATA_BYTES as u64, "{report:#}");
    assert_arrived(&stage, &image);

    // It has its name: another one takes that only if it is told to.
    let refused = push(&stage, &image, &[]).unwrap_err();
    assert!(refused.contains("--replace"), "{refused}");
    let again = push(&stage, &image, &["--replace", "--background"]).unwrap();
    let yields = [&report, &again].map(|report| report["link"]["background"].as_bool());
    assert_eq!(yields, [Some(false), Some(true)], "{again:#}");
    assert!(wire(&again) < 32 << 10, "{again:#}");
    assert_arrived(&stage, &image);

    // A byte here, and bytes that move all behind them there.
    let mut changed = noise(1, DATA_BYTES);
    changed[5 * MIB] ^= 1;
    changed.splice(11 * MIB..11 * MIB, *b"seventeen letters");
    changed.truncate(DATA_BYTES);
    File::options().write(true).open(&image).unwrap().write_all_at(&changed, 8 << 20).unwrap();
    settle(&image);
    // Its time is as before: that it is another file shows in nothing but its inode.
    let renewed = image.with_extension("new");
    fs::copy(&image, &renewed).unwrap();
    fs::rename(&renewed, &image).unwrap();
    let report = push(&stage, &image, &["--replace"]).unwrap();
    assert!(wire(&report) < 2 * MIB as u64, "{report:#}");
    assert_arrived(&stage, &image);
    rot(&stage);
    let healed = push(&stage, &image, &["--replace"]);
    assert!(wire(&healed.unwrap()) < 2 * MIB as u64);
    assert_arrived(&stage, &image);
    stage.finish(Side::A, None);
}

/// What nobody wrote and is another all the same is found by `verify`.
fn rot(stage: &Stage) {
    let path = stage.pair.images(Side::B).join("golden.raw");
    let verify = || stage.pair.ask(Side::B, &["verify", path.to_str().unwrap()]);
    let whole = verify().unwrap();
    assert_eq!((&whole["untouched"], &whole["differing_bytes"]), (&true.into(), &0.into()));
    assert!(whole["recorded_bytes"].as_u64().unwrap() >= DATA_BYTES as u64);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let before = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 9 << 20).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 9 << 20).unwrap();
    file.set_modified(before).unwrap();
    let damaged = format!("{:#}", verify().unwrap_err());
    assert!(damaged.contains("differing"), "{damaged}");
    // Nothing vouches for it any more, so it is read when it is compared next.
    let unknown = format!("{:#}", verify().unwrap_err());
    assert!(unknown.contains("nothing is recorded"), "{unknown}");
}

/// A push that is cancelled goes on where it was, and until then there is no image of that name.
#[test]
fn a_push_goes_on_where_it_was() {
    let setting = Setting { rate_mbit: 50, ..Setting::default() };
    let Some(mut stage) = Stage::empty("pushcut", &setting) else { return };
    let image = image(&stage, 2);
    let path = image.to_str().unwrap();
    let started = stage.pair.ask(Side::A, &["push", path, "b:golden.raw", "--detach"]).unwrap();
    let job = started["started"]["id"].as_u64().unwrap();
    let half = DATA_BYTES as u64 / 2;
    stage.until_sent(job, half);
    stage.pair.ask(Side::A, &["cancel", path]).unwrap();
    let outcome = stage.outcome(job);
    assert!(outcome["failed"].is_object(), "{outcome:#}");
    assert!(!stage.pair.images(Side::B).join("golden.raw").exists());
    // The target's agent ends and comes back besides.
    stage.pair.stop(Side::B).unwrap();
    stage.pair.restart(&stage.wan, Side::B).unwrap();
    let report = push(&stage, &image, &[]).unwrap();
    let known = report["saved"]["disk_known_bytes"].as_u64().unwrap();
    assert!(known + IN_FLIGHT_BYTES >= half, "{report:#}");
    assert_arrived(&stage, &image);
    stage.finish(Side::A, None);
}

/// An image comes from a peer whose operator serves this host, and from no other; a pull that is
/// cancelled ends at the peer, too, and goes on where it was.
#[test]
fn an_image_is_pulled_from_a_peer_that_serves() {
    let setting = Setting { rate_mbit: 50, ..Setting::default() };
    let Some(mut stage) = Stage::empty("pull", &setting) else { return };
    let image = stage.pair.images(Side::A).join("golden.raw");
    fs::rename(self::image(&stage, 4), &image).unwrap();
    let pull = |stage: &Stage, arguments: &[&str]| {
        let answer = stage.pair.ask(Side::B, &[&["pull"], arguments].concat());
        answer.map_err(|error| format!("{error:#}"))
    };
    let refused = pull(&stage, &["a:golden.raw"]).unwrap_err();
    assert!(refused.contains("does not serve") && refused.contains("agent.serves"), "{refused}");
    let file = stage.pair.folder(Side::A).join("agent.toml");
    let config = fs::read_to_string(&file).unwrap();
    fs::write(&file, config.replacen("[agent]\n", "[agent]\nserves = [\"b\"]\n", 1)).unwrap();
    stage.pair.stop(Side::A).unwrap();
    stage.pair.restart(&stage.wan, Side::A).unwrap();
    let unknown = pull(&stage, &["a:nothing.raw"]).unwrap_err();
    assert!(unknown.contains("no image nothing.raw in pool default"), "{unknown}");
    let outside = pull(&stage, &["a:nopool/golden.raw"]).unwrap_err();
    assert!(outside.contains("no pool called nopool"), "{outside}");

    // Cancelled in its middle.
    let started = pull(&stage, &["a:golden.raw", "--detach"]).unwrap();
    assert_eq!(started["started"]["kind"], "pull", "{started:#}");
    let half = DATA_BYTES as u64 / 2;
    let job = stage.first_job(Side::A);
    stage.until_sent(job, half);
    stage.pair.ask(Side::B, &["cancel", "a:default/golden.raw"]).unwrap();
    let ended = stage.outcome(job);
    assert_eq!(ended["failed"]["kind"], "cancelled", "{ended:#}");
    assert!(!stage.pair.images(Side::B).join("golden.raw").exists());

    let report = pull(&stage, &["a:golden.raw"]).unwrap()["completed"].clone();
    assert_eq!(report["vm"], "a:default/golden.raw", "{report:#}");
    let known = report["saved"]["disk_known_bytes"].as_u64().unwrap();
    assert!(known + IN_FLIGHT_BYTES >= half, "{report:#}");
    assert_arrived(&stage, &image);
    let there = pull(&stage, &["a:golden.raw"]).unwrap_err();
    assert!(there.contains("--replace"), "{there}");
    pull(&stage, &["a:golden.raw", "default/copy.raw", "--background"]).unwrap();
    assert!(stage.pair.images(Side::B).join("copy.raw").exists());
    stage.finish(Side::B, None);
}

#[test]
fn a_push_that_cannot_be_says_why_and_changes_nothing() {
    let Some(stage) = Stage::empty("pushno", &Setting::default()) else { return };
    let image = image(&stage, 3);
    let path = image.to_str().unwrap();
    let refused = |arguments: &[&str]| {
        let said = stage.pair.ask(Side::A, &[&["push"], arguments].concat());
        format!("{:#}", said.unwrap_err())
    };
    assert!(refused(&["/nowhere.raw", "b:x.raw"]).contains("there is no image /nowhere.raw"));
    assert!(refused(&[path, "b:nopool/x.raw"]).contains("nopool"));
    assert!(refused(&[path, "b:.hidden"]).contains("no name for an image"));
    assert!(refused(&[path, "b:x.longhaul-recipe"]).contains("no name for an image"));
    assert!(refused(&[path, "nobody:x.raw"]).contains("nobody"));
    assert_eq!(files(&stage.pair.images(Side::B)), [""; 0]);
    stage.finish(Side::A, None);
}

//! QEMU's words for block nodes, bitmaps and exports, and the names that we give ours.
//!
//! Invariant: whatever is ours starts with [`PREFIX`], and nothing without it is ever changed.
//! Pure but for the two queries.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::hypervisor::HypervisorError;
use crate::hypervisor::qemu::qmp::Qmp;

/// How the names of all our bitmaps, exports and sockets begin.
pub const PREFIX: &str = "longhaul-";
/// Longest name of a tracking.
const TRACKING_BYTES_MAX: usize = 64;
/// Most granules in a bitmap while finer ones are to be had: 4 MiB of memory in QEMU.
const GRANULES_MAX: u64 = 32 << 20;
/// One page, and the least that guests write.
const GRANULE_BYTES_MIN: u64 = 4 << 10;
/// Coarser than this, a scattered write would make far too much dirty.
const GRANULE_BYTES_MAX: u64 = 64 << 10;

/// Bytes that one bit of a dirty bitmap stands for, for a disk of `disk_bytes`.
///
/// QEMU holds one bit a granule (and 1/64 more for its index) in memory: 4 KiB granules up to
/// 128 GiB of disk cost at most 4 MiB, and so do the coarser ones up to 2 TiB; from there on it is
/// 2 MiB for each TiB. Each disk has one bitmap, and a second one while a delta is read.
pub fn granule_bytes(disk_bytes: u64) -> u64 {
    let mut granule = GRANULE_BYTES_MIN;
    while granule < GRANULE_BYTES_MAX && disk_bytes.div_ceil(granule) > GRANULES_MAX {
        granule *= 2;
    }
    granule
}

/// A block node as QEMU describes it.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Node {
    #[serde(rename = "node-name")]
    pub(super) name: String,
    pub(super) image: Image,
    #[serde(rename = "dirty-bitmaps", default)]
    pub(super) bitmaps: Vec<Bitmap>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Image {
    #[serde(rename = "virtual-size")]
    pub(super) bytes: u64,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Bitmap {
    #[serde(default)]
    pub(super) name: String,
    /// Dirty bytes.
    pub(super) count: u64,
    /// Whether writes set bits.
    pub(super) recording: bool,
    #[serde(default)]
    pub(super) inconsistent: bool,
}

/// A block export.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Export {
    pub(super) id: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
}

/// A guest's device and the node that it writes to.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Device {
    #[serde(default)]
    device: String,
    #[serde(default)]
    qdev: String,
    inserted: Option<Inserted>,
}

#[derive(Debug, Clone, Deserialize)]
struct Inserted {
    #[serde(rename = "node-name", default)]
    node: String,
    #[serde(default)]
    drv: String,
}

/// Drivers that hand a guest's writes on to the node below them.
const FILTERS: [&str; 8] = [
    "backup-top",
    "blkdebug",
    "commit_top",
    "copy-before-write",
    "copy-on-read",
    "mirror_top",
    "preallocate",
    "throttle",
];

impl Device {
    /// What identifies the device, whatever is inserted in it.
    pub(super) fn key(&self) -> &str {
        if self.qdev.is_empty() { &self.device } else { &self.qdev }
    }

    pub(super) fn writes_to(&self, node: &str) -> bool {
        self.inserted.as_ref().is_some_and(|i| i.node == node)
    }

    /// The node that it writes to instead of `node`, unless that only hands writes on.
    pub(super) fn writes_past(&self, node: &str) -> Option<&str> {
        let inserted = self.inserted.as_ref()?;
        let past = inserted.node != node && !FILTERS.contains(&inserted.drv.as_str());
        past.then_some(inserted.node.as_str())
    }
}

async fn query<T: DeserializeOwned>(
    qmp: &Qmp,
    command: &str,
    arguments: Value,
) -> Result<T, HypervisorError> {
    let answer = qmp.execute(command, arguments).await?;
    serde_json::from_value(answer).map_err(|e| HypervisorError::Unexpected {
        vm: qmp.vm().to_owned(),
        detail: format!("the answer to {command} is not understood: {e}"),
    })
}

/// All named block nodes.
pub(super) async fn nodes(qmp: &Qmp) -> Result<Vec<Node>, HypervisorError> {
    query(qmp, "query-named-block-nodes", json!({ "flat": true })).await
}

/// All block exports.
pub(super) async fn exports(qmp: &Qmp) -> Result<Vec<Export>, HypervisorError> {
    query(qmp, "query-block-exports", Value::Null).await
}

/// All block devices.
pub(super) async fn devices(qmp: &Qmp) -> Result<Vec<Device>, HypervisorError> {
    query(qmp, "query-block", Value::Null).await
}

/// Names of one tracking: bitmaps `longhaul-TRACKING-ROUND`, exports with the disk's number behind.
///
/// A full view has a bitmap too, `longhaul-TRACKING-ROUND-all`: disabled and empty, it only says
/// that the full view of that round did not arrive yet, so that a later process knows.
#[derive(Debug, Clone)]
pub(super) struct Names {
    stem: String,
}

/// A bitmap of one tracking, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Round {
    pub(super) number: u64,
    /// The mark of a full view.
    pub(super) all: bool,
}

impl Names {
    /// `None` if `tracking` is not a plain word of letters, digits and dashes.
    pub(super) fn new(tracking: &str) -> Option<Self> {
        let plain = tracking.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let fits = !tracking.is_empty() && tracking.len() <= TRACKING_BYTES_MAX;
        (plain && fits).then(|| Self { stem: format!("{PREFIX}{tracking}-") })
    }

    pub(super) fn bitmap(&self, round: Round) -> String {
        let all = if round.all { "-all" } else { "" };
        format!("{}{}{all}", self.stem, round.number)
    }

    pub(super) fn export(&self, round: u64, disk: usize) -> String {
        format!("{}{round}-disk{disk}", self.stem)
    }

    pub(super) fn round(&self, bitmap: &str) -> Option<Round> {
        let rest = bitmap.strip_prefix(&self.stem)?;
        let (number, all) = match rest.strip_suffix("-all") {
            Some(number) => (number, true),
            None => (rest, false),
        };
        let number = number.parse().ok()?;
        // Leading zeros and signs parse too, but we never wrote them.
        let round = Round { number, all };
        (self.bitmap(round) == bitmap).then_some(round)
    }
}

/// Actions for QMP's `transaction`.
pub(super) fn add_bitmap(node: &str, name: &str, granularity: u64, enabled: bool) -> Value {
    json!({ "type": "block-dirty-bitmap-add", "data": {
        "node": node, "name": name, "granularity": granularity, "disabled": !enabled } })
}

pub(super) fn disable_bitmap(node: &str, name: &str) -> Value {
    json!({ "type": "block-dirty-bitmap-disable", "data": { "node": node, "name": name } })
}

pub(super) fn remove_bitmap(node: &str, name: &str) -> Value {
    json!({ "type": "block-dirty-bitmap-remove", "data": { "node": node, "name": name } })
}

pub(super) fn merge_bitmap(node: &str, target: &str, from: &str) -> Value {
    json!({ "type": "block-dirty-bitmap-merge", "data": {
        "node": node, "target": target, "bitmaps": [from] } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_are_pages_on_small_disks_and_bounded_on_large_ones() {
        const GIB: u64 = 1 << 30;
        assert_eq!(granule_bytes(1), 4096);
        assert_eq!(granule_bytes(128 * GIB), 4096);
        assert_eq!(granule_bytes(128 * GIB + 1), 8192);
        assert_eq!(granule_bytes(1024 * GIB), 32 << 10);
        assert_eq!(granule_bytes(u64::MAX), 64 << 10);
    }

    #[test]
    fn only_names_of_this_tracking_are_its_rounds() {
        let names = Names::new("web-1").unwrap();
        let delta = Round { number: 12, all: false };
        let full = Round { number: 12, all: true };
        assert_eq!(names.bitmap(delta), "longhaul-web-1-12");
        assert_eq!(names.round("longhaul-web-1-12"), Some(delta));
        assert_eq!(names.round("longhaul-web-1-12-all"), Some(full));
        for other in [
            "longhaul-web-12",
            "longhaul-web-1-012",
            "longhaul-web-1-+1",
            "longhaul-web-1-",
            "longhaul-web-1-12-disk0",
            "web-1-12",
        ] {
            assert_eq!(names.round(other), None, "{other}");
        }
    }

    #[test]
    fn a_tracking_is_a_plain_word() {
        assert!(Names::new("").is_none());
        assert!(Names::new("a b").is_none());
        assert!(Names::new("a/../b").is_none());
        assert!(Names::new(&"x".repeat(65)).is_none());
        assert!(Names::new(&"x".repeat(64)).is_some());
    }

    #[test]
    fn an_overlay_is_told_from_a_filter() {
        let device = |node: &str, drv: &str| -> Device {
            serde_json::from_value(json!({
                "device": "", "qdev": "/machine/disk0",
                "inserted": { "node-name": node, "drv": drv } }))
            .unwrap()
        };
        assert_eq!(device("disk0", "qcow2").writes_past("disk0"), None);
        assert_eq!(device("#block9", "mirror_top").writes_past("disk0"), None);
        assert_eq!(device("snap1", "qcow2").writes_past("disk0"), Some("snap1"));
    }
}

//! The disks of a running QEMU guest: read through exports, followed through dirty bitmaps.
//!
//! ```text
//!  full   [add 1, mark 0-all]        export all        close: remove 0-all
//!  delta  [add 2, disable 1]         export bits of 1  close: remove 1
//!  delta  [add 3, disable 2]         export bits of 2  dropped: 2 is merged into 3 by the next delta
//! ```
//! What stands in brackets is one transaction over all disks, so a round begins at one instant on all
//! of them. QEMU sets bits when a write completes: one that completes before the instant is in the
//! old bitmap and on the disk when it is read; one that completes later is in the new bitmap.
//!
//! Invariants: at every instant each write since the full view is in a bitmap that records, or in one
//! that waits for a view to be closed, or in a view that was closed; a bitmap is removed only when its
//! view was closed, everything of ours anew or at the end. All state lies in QEMU under names that
//! begin with `longhaul-`, so a later process finds it; what has other names is never touched.

mod listeners;
mod nodes;
mod server;
mod view;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Mutex;

use self::nodes::{
    Names, Node, PREFIX, Round, add_bitmap, disable_bitmap, merge_bitmap, remove_bitmap,
};
pub use self::nodes::{PREFIX as NAMES_PREFIX, granule_bytes};
pub use self::server::SOCKET_PATH_BYTES_MAX;
use self::server::{OPEN_ROUNDS_MAX, Place, Server};
use self::view::{ExportView, Lease, resized};
use super::nbd::NbdClient;
use super::qmp::Qmp;
use crate::hypervisor::{DiskInfo, DiskView, HypervisorError};

/// Longest wait for an export to go: QEMU first finishes the requests that it works on.
const EXPORT_GOES_WAIT_MAX: Duration = Duration::from_secs(60);
/// How often it is looked whether an export went, besides listening for its event.
const EXPORT_GOES_POLL: Duration = Duration::from_millis(200);

/// A disk of the guest and where QEMU keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskNode {
    /// The disk's id in the VM's description.
    pub id: String,
    /// The block node that the guest's device writes to.
    pub node: String,
}

/// What [`SourceDisks`] works with besides the monitor.
#[derive(Debug, Clone)]
pub struct SourceDisksConfig {
    /// The guest's disks, in the order of its description.
    pub disks: Vec<DiskNode>,
    /// A folder for one socket, private to us and to QEMU; its path should be short.
    pub run_dir: PathBuf,
    /// Names what the tracked writes are for (a seed to one target, say): at most 64 letters,
    /// digits and dashes. Only an instance with the same name goes on with a tracking.
    pub tracking: String,
    /// QEMU's process, if it is not the one that listens at the monitor.
    pub pid: Option<u32>,
}

/// The disk half of [`SourceVm`](crate::hypervisor::SourceVm) for a QEMU.
///
/// Views may stay open for days, and those of up to four rounds at once: a view that was read earlier
/// must then not be applied over a later one. One instance works on a QEMU at a time. [`DiskView::close`] says that what a view covers has
/// arrived. A delta that is dropped instead is part of the next delta; a full view that is dropped
/// ends the tracking: start with [`disk_full`](Self::disk_full) again.
#[derive(Debug, Clone)]
pub struct SourceDisks {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    qmp: Qmp,
    disks: Vec<DiskNode>,
    run_dir: PathBuf,
    pid: Option<u32>,
    names: Names,
    views: StdMutex<Views>,
    /// One step at a time; what it remembers only saves questions or detects changes.
    memory: Mutex<Memory>,
}

/// What is known of our exports without asking.
#[derive(Debug, Default)]
struct Views {
    /// Exports of views that are neither closed nor dropped.
    living: HashSet<String>,
    /// Connections of views that were dropped, by export, until the export is removed. Some QEMUs
    /// end, and their guest with them, if the client of a disk in an I/O thread hangs up (see
    /// `hangs_up_badly`); all take it well if the export goes first.
    orphans: HashMap<String, Vec<NbdClient>>,
}

#[derive(Debug, Default)]
struct Memory {
    server: Option<Server>,
    /// Last round number used; they never come again, so a late view cannot hit a newer one's names.
    round: u64,
    /// Sizes by disk, from when they were first seen.
    bytes: Option<Vec<u64>>,
    /// The guest's device of each disk.
    devices: Vec<Option<String>>,
}

/// Names of metadata contexts.
struct NbdContextNames;

impl NbdContextNames {
    const ALLOCATION: &str = "base:allocation";

    fn bitmap(name: &str) -> String {
        format!("qemu:dirty-bitmap:{name}")
    }
}

impl SourceDisks {
    /// Disks of the QEMU at `qmp`. Asks and changes nothing yet.
    pub fn new(qmp: Qmp, config: SourceDisksConfig) -> Result<Self, HypervisorError> {
        let Some(names) = Names::new(&config.tracking) else {
            return Err(HypervisorError::Unsupported {
                vm: qmp.vm().to_owned(),
                reason: format!(
                    "{:?} cannot name a tracking: up to 64 letters, digits and dashes can",
                    config.tracking
                ),
            });
        };
        let pid = config.pid.or_else(|| qmp.peer_pid().and_then(|pid| u32::try_from(pid).ok()));
        let inner = Inner {
            qmp,
            disks: config.disks,
            run_dir: config.run_dir,
            pid,
            names,
            views: StdMutex::default(),
            memory: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// See [`SourceVm::disks`](crate::hypervisor::SourceVm::disks).
    pub async fn disks(&self) -> Result<Vec<DiskInfo>, HypervisorError> {
        let nodes = self.inner.nodes().await?;
        Ok(self.inner.infos(&nodes))
    }

    /// Reasons why reading the disks could harm the guest; empty if there are none.
    pub async fn check(&self) -> Result<Vec<String>, HypervisorError> {
        let (major, minor, micro) = self.inner.qmp.version();
        if !hangs_up_badly((major, minor, micro)) {
            return Ok(Vec::new());
        }
        let threads = self.inner.qmp.execute("query-iothreads", Value::Null).await?;
        if threads.as_array().is_none_or(Vec::is_empty) {
            return Ok(Vec::new());
        }
        Ok(vec![format!(
            "QEMU {major}.{minor}.{micro} may crash, and the guest with it, if the agent is killed \
             while it reads a disk that has an I/O thread: start the VM without iothread objects, \
             or with QEMU 9.0 or later"
        )])
    }

    /// See [`SourceVm::disk_full`](crate::hypervisor::SourceVm::disk_full). Views that are still
    /// open end, and so does every tracking with another name.
    pub async fn disk_full(&self) -> Result<Vec<Box<dyn DiskView>>, HypervisorError> {
        let inner = &self.inner;
        let mut memory = inner.memory.lock().await;
        inner.remove_exports(|_| true).await?;
        inner.remove_bitmaps().await?;
        let nodes = inner.nodes().await?;
        let infos = inner.infos(&nodes);
        memory.bytes = Some(infos.iter().map(|info| info.bytes).collect());
        memory.devices = inner.devices().await?;
        let mark = Round { number: memory.round + 1, all: true };
        memory.round += 2;
        let first = Round { number: memory.round, all: false };

        let mut actions = Vec::new();
        for (disk, info) in inner.disks.iter().zip(&infos) {
            let (mark, first) = (inner.names.bitmap(mark), inner.names.bitmap(first));
            // The mark holds no bits: as coarse as QEMU allows.
            actions.push(add_bitmap(&disk.node, &mark, 1 << 31, false));
            actions.push(add_bitmap(&disk.node, &first, granule_bytes(info.bytes), true));
        }
        inner.transaction(actions).await?;
        let views = inner.open_views(&mut memory, mark, infos).await;
        if views.is_err() {
            // A tracking without its full view must not be taken for one that can go on.
            if let Err(error) = inner.remove_all_of_ours().await {
                tracing::warn!(vm = inner.qmp.vm(), %error, "removing bitmaps after a failure");
            }
        }
        views
    }

    /// See [`SourceVm::is_tracking`](crate::hypervisor::SourceVm::is_tracking).
    pub async fn is_tracking(&self) -> Result<bool, HypervisorError> {
        let nodes = self.inner.nodes().await?;
        Ok(self.inner.tracked(&nodes).is_ok())
    }

    /// See [`SourceVm::disk_delta_bytes`](crate::hypervisor::SourceVm::disk_delta_bytes).
    pub async fn disk_delta_bytes(&self) -> Result<u64, HypervisorError> {
        let nodes = self.inner.nodes().await?;
        let tracked = self.inner.tracked(&nodes)?;
        let counts = tracked.iter().zip(&nodes).map(|(tracked, node)| {
            let of_delta = |b: &&nodes::Bitmap| {
                let round = self.inner.names.round(&b.name);
                round.is_some_and(|r| r == tracked.active || tracked.unread.contains(&r))
            };
            node.bitmaps.iter().filter(of_delta).map(|b| b.count).sum::<u64>().min(node.image.bytes)
        });
        Ok(counts.sum())
    }

    /// See [`SourceVm::disk_delta`](crate::hypervisor::SourceVm::disk_delta). Deltas that were
    /// dropped instead of closed are part of this one.
    pub async fn disk_delta(&self) -> Result<Vec<Box<dyn DiskView>>, HypervisorError> {
        let inner = &self.inner;
        let mut memory = inner.memory.lock().await;
        let living = inner.views().living.clone();
        if living.len() >= OPEN_ROUNDS_MAX * inner.disks.len().max(1) {
            return Err(inner.unsupported(format!(
                "views of {OPEN_ROUNDS_MAX} rounds are open: close one before the next delta"
            )));
        }
        inner.remove_exports(|export| !living.contains(export)).await?;
        let nodes = inner.nodes().await?;
        let infos = inner.infos(&nodes);
        let tracked = inner.tracked(&nodes)?;
        inner.check_unchanged(&mut memory, &infos).await?;

        let last = tracked.iter().map(|t| t.active.number).max().unwrap_or(0);
        memory.round = memory.round.max(last) + 1;
        let next = inner.names.bitmap(Round { number: memory.round, all: false });
        let mut rounds = Vec::new();
        let mut actions = Vec::new();
        for ((disk, tracked), info) in inner.disks.iter().zip(&tracked).zip(&infos) {
            let active = inner.names.bitmap(tracked.active);
            for unread in &tracked.unread {
                let unread = inner.names.bitmap(*unread);
                actions.push(merge_bitmap(&disk.node, &active, &unread));
                actions.push(remove_bitmap(&disk.node, &unread));
            }
            actions.push(add_bitmap(&disk.node, &next, granule_bytes(info.bytes), true));
            actions.push(disable_bitmap(&disk.node, &active));
            rounds.push(tracked.active);
        }
        let Some(round) = rounds.first().copied() else { return Ok(Vec::new()) };
        if rounds.iter().any(|other| *other != round) {
            return Err(inner.unexpected("its disks are tracked in different rounds".to_owned()));
        }
        inner.transaction(actions).await?;
        inner.open_views(&mut memory, round, infos).await
    }

    /// See [`SourceVm::cleanup`](crate::hypervisor::SourceVm::cleanup). Views that are still open
    /// end. A QEMU that is gone is clean.
    pub async fn cleanup(&self, keep_tracking: bool) -> Result<(), HypervisorError> {
        let inner = &self.inner;
        let mut memory = inner.memory.lock().await;
        memory.server = None;
        let place = inner.place();
        let cleaned = async {
            inner.remove_exports(|_| true).await?;
            if keep_tracking {
                inner.keep_only_active().await?;
            } else {
                inner.remove_bitmaps().await?;
            }
            place.stop().await
        };
        let cleaned = cleaned.await;
        if cleaned.is_ok() || inner.is_gone() {
            inner.views().orphans.clear();
        }
        match cleaned {
            Err(HypervisorError::Gone { .. }) if inner.is_gone() => {
                tracing::debug!(vm = inner.qmp.vm(), "the hypervisor is gone: nothing to clean");
                place.remove_socket()
            }
            cleaned => cleaned,
        }
    }
}

/// Whether a QEMU of this version may end if an NBD client of a disk in an I/O thread hangs up.
///
/// The fix of CVE-2024-7409 asserts that clients leave in the main thread
/// (`nbd_blockdev_client_closed` in `blockdev-nbd.c`); before 9.0 and 8.2.3 they left in the disk's
/// thread. Seen with 7.2.22. Distributions have that fix in any version, so the number alone does
/// not tell who has it.
fn hangs_up_badly(version: (u32, u32, u32)) -> bool {
    version < (8, 2, 3)
}

/// The bitmaps of one disk.
#[derive(Debug, PartialEq, Eq)]
struct Tracked {
    /// The one that records.
    active: Round,
    /// Those of deltas that were dropped, or left by a process that ended.
    unread: Vec<Round>,
}

impl Inner {
    fn views(&self) -> MutexGuard<'_, Views> {
        // Both are whole after every operation.
        self.views.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self) -> Place<'_> {
        Place { qmp: &self.qmp, run_dir: &self.run_dir, pid: self.pid, disks: self.disks.len() }
    }

    fn is_gone(&self) -> bool {
        self.qmp.is_closed()
            && self.pid.is_none_or(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_err())
    }

    fn unexpected(&self, detail: String) -> HypervisorError {
        HypervisorError::Unexpected { vm: self.qmp.vm().to_owned(), detail }
    }

    fn unsupported(&self, reason: String) -> HypervisorError {
        HypervisorError::Unsupported { vm: self.qmp.vm().to_owned(), reason }
    }

    /// The guest's disks' nodes, in their order.
    async fn nodes(&self) -> Result<Vec<Node>, HypervisorError> {
        let mut by_name: BTreeMap<String, Node> =
            nodes::nodes(&self.qmp).await?.into_iter().map(|n| (n.name.clone(), n)).collect();
        let found = self.disks.iter().map(|disk| {
            by_name.remove(&disk.node).ok_or_else(|| {
                self.unsupported(format!("disk {} has no block node {}", disk.id, disk.node))
            })
        });
        found.collect()
    }

    fn infos(&self, nodes: &[Node]) -> Vec<DiskInfo> {
        let of = |(disk, node): (&DiskNode, &Node)| DiskInfo {
            id: disk.id.clone(),
            bytes: node.image.bytes,
        };
        self.disks.iter().zip(nodes).map(of).collect()
    }

    /// The guest's device that writes to each disk, where there is one.
    async fn devices(&self) -> Result<Vec<Option<String>>, HypervisorError> {
        let devices = nodes::devices(&self.qmp).await?;
        let of = |disk: &DiskNode| {
            let device = devices.iter().find(|device| device.writes_to(&disk.node));
            device.map(|device| device.key().to_owned())
        };
        Ok(self.disks.iter().map(of).collect())
    }

    /// Refuses to go on if a disk has another size, or its device writes elsewhere by now: then
    /// writes would be missing in the bitmaps.
    async fn check_unchanged(
        &self,
        memory: &mut Memory,
        infos: &[DiskInfo],
    ) -> Result<(), HypervisorError> {
        let Some(bytes) = &memory.bytes else {
            // A process that goes on with an earlier one's tracking.
            memory.bytes = Some(infos.iter().map(|info| info.bytes).collect());
            memory.devices = self.devices().await?;
            return Ok(());
        };
        for (info, bytes) in infos.iter().zip(bytes) {
            if info.bytes != *bytes {
                let before = DiskInfo { id: info.id.clone(), bytes: *bytes };
                return Err(resized(self.qmp.vm(), &before, info.bytes));
            }
        }
        let devices = nodes::devices(&self.qmp).await?;
        for (disk, key) in self.disks.iter().zip(&memory.devices) {
            let device = devices.iter().find(|device| Some(device.key()) == key.as_deref());
            if let Some(elsewhere) = device.and_then(|device| device.writes_past(&disk.node)) {
                return Err(self.unsupported(format!(
                    "disk {} writes to block node {elsewhere} instead of {} by now (a snapshot was \
                     taken?): seed it anew",
                    disk.id, disk.node
                )));
            }
        }
        Ok(())
    }

    /// What is tracked, or why it cannot go on.
    fn tracked(&self, nodes: &[Node]) -> Result<Vec<Tracked>, HypervisorError> {
        let living = self.views().living.clone();
        let of = |(index, (disk, node)): (usize, (&DiskNode, &Node))| {
            let mut active = None;
            let mut unread = Vec::new();
            for bitmap in &node.bitmaps {
                let Some(round) = self.names.round(&bitmap.name) else { continue };
                let lives = living.contains(&self.names.export(round.number, index));
                if bitmap.inconsistent {
                    return Err(self.untracked(disk, "its bitmap is damaged"));
                } else if round.all {
                    if !lives {
                        return Err(self.untracked(disk, "its first full view was never closed"));
                    }
                } else if bitmap.recording {
                    if active.replace(round).is_some() {
                        return Err(self.untracked(disk, "two bitmaps of ours record"));
                    }
                } else if !lives {
                    unread.push(round);
                }
            }
            let none = || self.untracked(disk, "no bitmap of ours records");
            Ok(Tracked { active: active.ok_or_else(none)?, unread })
        };
        self.disks.iter().zip(nodes).enumerate().map(of).collect()
    }

    fn untracked(&self, disk: &DiskNode, why: &str) -> HypervisorError {
        self.unsupported(format!(
            "writes to disk {} were not tracked without a gap ({why}): seed it anew",
            disk.id
        ))
    }

    async fn transaction(&self, actions: Vec<Value>) -> Result<(), HypervisorError> {
        if actions.is_empty() {
            return Ok(());
        }
        self.qmp.execute("transaction", json!({ "actions": actions })).await.map(drop)
    }

    /// Exports every disk for `round` and opens a view of each.
    async fn open_views(
        self: &Arc<Self>,
        memory: &mut Memory,
        round: Round,
        infos: Vec<DiskInfo>,
    ) -> Result<Vec<Box<dyn DiskView>>, HypervisorError> {
        let server = match memory.server.take() {
            Some(server) if server.answers().await => server,
            _ => self.place().start().await?,
        };
        let server = memory.server.insert(server);
        let mut views: Vec<Box<dyn DiskView>> = Vec::with_capacity(infos.len());
        for (index, (disk, info)) in self.disks.iter().zip(infos).enumerate() {
            let export = self.names.export(round.number, index);
            let bitmap = self.names.bitmap(round);
            let bitmaps = if round.all { json!([]) } else { json!([bitmap]) };
            self.views().living.insert(export.clone());
            // From here on the lease takes it out again, whatever happens.
            let inner = Arc::clone(self);
            let lease = Lease { inner, disk: index, round, export, clients: Vec::new() };
            let arguments = json!({
                "type": "nbd",
                "id": lease.export,
                "name": lease.export,
                "node-name": disk.node,
                "writable": false,
                "bitmaps": bitmaps,
            });
            self.qmp.execute("block-export-add", arguments).await?;
            views.push(Box::new(ExportView::open(lease, info, server).await?));
        }
        Ok(views)
    }

    /// Ends a view whose content arrived.
    async fn close_view(&self, lease: &Lease) -> Result<(), HypervisorError> {
        let _memory = self.memory.lock().await;
        if nodes::exports(&self.qmp).await?.iter().any(|e| e.id == lease.export) {
            self.remove_export(&lease.export).await?;
        }
        let node = &self.disks[lease.disk].node;
        let bitmap = self.names.bitmap(lease.round);
        let present = self.nodes().await?[lease.disk].bitmaps.iter().any(|b| b.name == bitmap);
        if present {
            let arguments = json!({ "node": node, "name": bitmap });
            self.qmp.execute("block-dirty-bitmap-remove", arguments).await?;
        }
        Ok(())
    }

    async fn remove_exports(&self, unwanted: impl Fn(&str) -> bool) -> Result<(), HypervisorError> {
        for export in nodes::exports(&self.qmp).await? {
            if export.id.starts_with(PREFIX) && unwanted(&export.id) {
                self.remove_export(&export.id).await?;
            }
        }
        Ok(())
    }

    /// Removes an export with whoever uses it, and returns once it is gone: its bitmap is in use
    /// until then.
    async fn remove_export(&self, id: &str) -> Result<(), HypervisorError> {
        let mut events = self.qmp.events();
        let arguments = json!({ "id": id, "mode": "hard" });
        let asked = self.qmp.execute("block-export-del", arguments).await;
        let goes = async {
            loop {
                if !nodes::exports(&self.qmp).await?.iter().any(|export| export.id == id) {
                    return Ok(());
                }
                // It may have been going already when we asked; only a refusal that leaves it
                // standing counts, and the time limit below tells that.
                let deleted = |event: &super::qmp::QmpEvent| {
                    event.name == "BLOCK_EXPORT_DELETED" && event.data["id"] == id
                };
                match self.qmp.wait_event(&mut events, deleted, EXPORT_GOES_POLL).await {
                    Ok(_) => return Ok(()),
                    Err(error) if self.qmp.is_closed() => return Err(error),
                    Err(_) => {}
                }
            }
        };
        match tokio::time::timeout(EXPORT_GOES_WAIT_MAX, goes).await {
            Ok(Ok(())) => {
                self.views().orphans.remove(id);
                Ok(())
            }
            Ok(Err(error)) => Err(error),
            Err(_) => {
                asked?;
                Err(self.unexpected(format!(
                    "export {id} did not go within {} s: the disk below it does not answer",
                    EXPORT_GOES_WAIT_MAX.as_secs()
                )))
            }
        }
    }

    /// Removes every bitmap of ours from every node. No export may use one any more.
    async fn remove_bitmaps(&self) -> Result<(), HypervisorError> {
        for node in nodes::nodes(&self.qmp).await? {
            let ours = node.bitmaps.iter().filter(|b| b.name.starts_with(PREFIX));
            let actions = ours.map(|b| remove_bitmap(&node.name, &b.name)).collect();
            self.transaction(actions).await?;
        }
        Ok(())
    }

    async fn remove_all_of_ours(&self) -> Result<(), HypervisorError> {
        self.remove_exports(|_| true).await?;
        self.remove_bitmaps().await
    }

    /// Takes the bitmaps that nobody will read into those that record. No export may use one.
    async fn keep_only_active(&self) -> Result<(), HypervisorError> {
        self.views().living.clear();
        let nodes = self.nodes().await?;
        // Without a whole tracking there is nothing to keep in order.
        let Ok(tracked) = self.tracked(&nodes) else { return Ok(()) };
        let mut actions = Vec::new();
        for (disk, tracked) in self.disks.iter().zip(&tracked) {
            let active = self.names.bitmap(tracked.active);
            for unread in tracked.unread.iter().map(|unread| self.names.bitmap(*unread)) {
                actions.push(merge_bitmap(&disk.node, &active, &unread));
                actions.push(remove_bitmap(&disk.node, &unread));
            }
        }
        self.transaction(actions).await
    }
}

//! What arrives at a target in bulk: sorted to the task that applies it. Disks and memory have one
//! each, so that neither waits for the other's image or hypervisor.
//!
//! Invariant: a task that is full holds up whoever feeds it, and so in the end the source.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use longhaul_transport::Session;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use super::disk::{DiskReceiver, Unpacked};
use super::error::MigrationError;
use super::memory::MemoryWork;
use super::message::{BulkHeader, ToSource};

/// Items that wait for the task that applies them.
pub(super) const QUEUED_ITEMS_MAX: usize = 32;
/// Bytes of disk items that wait, at most; one that is larger waits alone.
const QUEUED_DISK_BYTES_MAX: usize = 32 << 20;
/// Disk items that are unpacked while another is applied.
const UNPACKED_AHEAD: usize = 2;

/// What the disk task is told; `I` is an item, as it came or unpacked.
pub(super) enum DiskWork<I = (BulkHeader, Bytes)> {
    /// With its room in the queue.
    Item(I, OwnedSemaphorePermit),
    RoundDone,
    Keep(u64, oneshot::Sender<Result<(), MigrationError>>),
    Close(oneshot::Sender<Result<(), MigrationError>>),
}

/// Hands work to a task of the attempt.
pub(super) async fn queue<T>(
    queue: &mpsc::Sender<T>,
    work: T,
    peer: &str,
) -> Result<(), MigrationError> {
    let sent = queue.send(work).await;
    sent.map_err(|_| MigrationError::protocol(peer, "a task of the attempt is gone"))
}

/// What has come so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Received {
    pub(super) disk_items: u64,
    pub(super) memory_items: u64,
    /// When the last of them came.
    pub(super) last_at: Instant,
    /// Nothing more can come.
    pub(super) ended: bool,
}

impl Received {
    pub(super) fn nothing() -> Self {
        Self { disk_items: 0, memory_items: 0, last_at: Instant::now(), ended: false }
    }
}

/// Sorts bulk items to who applies them, and says what has come.
pub(super) async fn sort(
    peer: String,
    session: Session,
    disks: mpsc::Sender<DiskWork>,
    memory: mpsc::Sender<MemoryWork>,
    received: watch::Sender<Received>,
) -> Result<(), MigrationError> {
    let room = Arc::new(Semaphore::new(QUEUED_DISK_BYTES_MAX));
    loop {
        // The control stream has the better words, as long as it is read.
        let Ok(batch) = session.recv_batch().await else {
            received.send_modify(|received| received.ended = true);
            return Ok(());
        };
        let (header, body) = BulkHeader::decode(batch.body)
            .map_err(|error| MigrationError::protocol(&peer, error))?;
        match header {
            BulkHeader::Memory { item, kind } => {
                received.send_modify(|received| {
                    received.memory_items += 1;
                    received.last_at = Instant::now();
                });
                queue(&memory, MemoryWork::Item(item, kind, body), &peer).await?;
            }
            header => {
                received.send_modify(|received| {
                    received.disk_items += 1;
                    received.last_at = Instant::now();
                });
                let bytes = body.len().min(QUEUED_DISK_BYTES_MAX) as u32;
                let permit = Arc::clone(&room).acquire_many_owned(bytes).await;
                let permit = permit.expect("the semaphore is never closed");
                queue(&disks, DiskWork::Item((header, body), permit), &peer).await?;
            }
        }
    }
}

/// Applies disk items in the order in which they come; counts them, and answers offers.
pub(super) async fn write_disks(
    mut disks: DiskReceiver,
    mut work: mpsc::Receiver<DiskWork>,
    items: watch::Sender<u64>,
    wants: mpsc::Sender<ToSource>,
) -> Result<(), MigrationError> {
    let mut ready = stream::poll_fn(|cx| work.poll_recv(cx))
        .map(|work| async {
            match work {
                DiskWork::Item((header, body), permit) => {
                    DiskWork::Item(Unpacked::of(header, body).await, permit)
                }
                DiskWork::RoundDone => DiskWork::RoundDone,
                DiskWork::Keep(generation, done) => DiskWork::Keep(generation, done),
                DiskWork::Close(done) => DiskWork::Close(done),
            }
        })
        .buffered(UNPACKED_AHEAD);
    while let Some(work) = ready.next().await {
        match work {
            DiskWork::Item(item, permit) => {
                let want = disks.apply(item).await?;
                drop(permit);
                if let Some(want) = want
                    && wants.send(want).await.is_err()
                {
                    return Ok(());
                }
                items.send_replace(disks.items());
            }
            DiskWork::RoundDone => disks.round_done().await?,
            DiskWork::Keep(generation, done) => {
                let _ = done.send(disks.keep(generation).await);
                return Ok(());
            }
            DiskWork::Close(done) => {
                let _ = done.send(disks.close().await);
                return Ok(());
            }
        }
    }
    Ok(())
}

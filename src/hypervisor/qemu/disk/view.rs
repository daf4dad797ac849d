//! A disk, or what one round wrote to it, through a read-only export of QEMU's.
//!
//! Invariant: the extents are fetched when the view is made, so a view goes on serving reads after
//! the hypervisor gave the images up (where QEMU, from 10.0 on, answers nothing but reads); and a
//! view that was dropped instead of closed never loses a write: its bitmap stays until the next delta
//! takes it in.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::task::JoinSet;

use super::nodes::Round;
use super::server::Server;
use super::{Inner, NbdContextNames};
use crate::hypervisor::qemu::extents::{Extents, mark_zeros, questions};
use crate::hypervisor::qemu::nbd::codec::{ALLOCATION_ZERO, BITMAP_DIRTY};
use crate::hypervisor::qemu::nbd::{NbdClient, NbdError, Status};
use crate::hypervisor::{DiskInfo, DiskView, Extent, HypervisorError};

/// Questions about allocation under way at once.
const QUESTIONS_IN_FLIGHT: usize = 8;

/// Our export of one disk in one round, registered as living until this is dropped.
pub(super) struct Lease {
    pub(super) inner: Arc<Inner>,
    pub(super) disk: usize,
    pub(super) round: Round,
    pub(super) export: String,
    /// Every connection to the export. None may close before the export is removed: see
    /// [`Views::orphans`](super::Views::orphans).
    pub(super) clients: Vec<NbdClient>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut views = self.inner.views();
        views.living.remove(&self.export);
        if !self.clients.is_empty() {
            views.orphans.insert(self.export.clone(), std::mem::take(&mut self.clients));
        }
    }
}

/// See [`DiskView`].
pub(super) struct ExportView {
    lease: Lease,
    info: DiskInfo,
    extents: Vec<Extent>,
    client: NbdClient,
}

impl ExportView {
    /// Connects to an export that exists, and fetches the extents.
    pub(super) async fn open(
        mut lease: Lease,
        info: DiskInfo,
        server: &mut Server,
    ) -> Result<Self, HypervisorError> {
        let vm = lease.inner.qmp.vm().to_owned();
        let doing = format!("reading the extents of disk {}", info.id);
        let failed = |error: NbdError| error.of_vm(&vm, &doing);
        let client =
            server.connect(&lease.export, NbdContextNames::ALLOCATION).await.map_err(failed)?;
        lease.clients.push(client.clone());
        if client.info().bytes != info.bytes {
            return Err(resized(&vm, &info, client.info().bytes));
        }
        let extents = if lease.round.all {
            allocation(&client, info.bytes).await.map_err(failed)?
        } else {
            let bitmap = lease.inner.names.bitmap(lease.round);
            let context = NbdContextNames::bitmap(&bitmap);
            // A connection of its own: a question is answered for every context of its connection,
            // and allocation is only wanted where something was written.
            let bits = server.connect(&lease.export, &context).await.map_err(failed)?;
            lease.clients.push(bits.clone());
            delta(&client, &bits, info.bytes).await.map_err(failed)?
        };
        Ok(Self { lease, info, extents, client })
    }
}

/// The error for a disk whose size changed under us.
pub(super) fn resized(vm: &str, info: &DiskInfo, now: u64) -> HypervisorError {
    HypervisorError::Unsupported {
        vm: vm.to_owned(),
        reason: format!(
            "disk {} was resized from {} to {now} bytes since it was first read: seed it anew",
            info.id, info.bytes
        ),
    }
}

async fn allocation(client: &NbdClient, bytes: u64) -> Result<Vec<Extent>, NbdError> {
    let mut extents = Extents::new();
    if bytes > 0 {
        let each = |s: Status| {
            extents.push(s.offset, s.len, s.flags & ALLOCATION_ZERO != 0);
        };
        client.status(0, 0, bytes, each).await?;
    }
    Ok(extents.finish())
}

async fn delta(
    allocation: &NbdClient,
    bits: &NbdClient,
    bytes: u64,
) -> Result<Vec<Extent>, NbdError> {
    let mut dirty = Extents::new();
    if bytes > 0 {
        bits.status(0, 0, bytes, |s| {
            if s.flags & BITMAP_DIRTY != 0 {
                dirty.push(s.offset, s.len, false);
            }
        })
        .await?;
    }
    let dirty = dirty.finish();

    let mut asked = questions(&dirty).into_iter().enumerate();
    let mut answers = Vec::new();
    let mut asking = JoinSet::new();
    loop {
        while asking.len() < QUESTIONS_IN_FLIGHT
            && let Some((index, range)) = asked.next()
        {
            let client = allocation.clone();
            asking.spawn(async move {
                let mut zeros = Extents::new();
                let each = |s: Status| {
                    if s.flags & ALLOCATION_ZERO != 0 {
                        zeros.push(s.offset, s.len, true);
                    }
                };
                client.status(0, range.start, range.end - range.start, each).await?;
                Ok::<_, NbdError>((index, zeros.finish()))
            });
        }
        match asking.join_next().await {
            Some(answer) => answers.push(answer.expect("asking neither panics nor is aborted")?),
            None => break,
        }
    }
    answers.sort_by_key(|(index, _)| *index);
    let zeros: Vec<Extent> = answers.into_iter().flat_map(|(_, zeros)| zeros).collect();
    Ok(mark_zeros(&dirty, &zeros))
}

#[async_trait]
impl DiskView for ExportView {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    async fn extents(&self) -> Result<Vec<Extent>, HypervisorError> {
        Ok(self.extents.clone())
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, HypervisorError> {
        self.client.read(offset, len).await.map_err(|error| {
            let doing = format!("reading disk {}", self.info.id);
            error.of_vm(self.lease.inner.qmp.vm(), &doing)
        })
    }

    async fn close(self: Box<Self>) -> Result<(), HypervisorError> {
        self.lease.inner.close_view(&self.lease).await
    }
}

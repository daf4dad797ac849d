//! Reads the hypervisor's stream into the staging area, no faster than is good.
//!
//! Invariant: at most the staging budget waits here until the last pass. Not reading is the brake:
//! a hypervisor whose socket is full goes on running the guest and keeps its own list of what is
//! dirty. Towards the end of the first pass little may wait, because a guest that writes next to
//! nothing is paused as soon as the hypervisor has nothing left to send.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

use super::super::error::MigrationError;
use super::super::message::MAX_REGIONS;
use super::super::staging::{PageKey, Staging};
use crate::hypervisor::{HypervisorError, MemoryEvent, MemoryLayout, MemorySource, PAGE_BYTES};

/// What may always wait: one batch for the coder and one for the link. After the first pass this
/// much is always there while the guest is busy, and it is sent while the guest is paused; less on a
/// link that is slow, see [`Stage::link_takes`].
const STAGED_LOW_BYTES: u64 = 1 << 20;
/// What may wait towards the end of the first pass.
const STAGED_FIRST_PASS_BYTES: u64 = 4 << 20;
/// What may wait on the slowest link: enough for pages to compress together.
const STAGED_LEAST_BYTES: u64 = 128 << 10;
/// The largest guest that is accepted: 4 TiB, a bound for the tables that are made for it.
const GUEST_BYTES_MAX: u64 = 4 << 40;
/// Pages of the first pass that stay unread while a switchover is not wanted yet.
const HELD_PAGES: u64 = 2048;

/// What waits to be sent, beside pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Waiting {
    Layout(MemoryLayout),
    Opaque(Bytes),
    PagesDone,
    NotUnderstood(String),
    End,
}

/// What the pump and the sender share.
#[derive(Debug, Default)]
pub(in super::super) struct Stage {
    inner: Mutex<Inner>,
    /// Something was staged.
    pub(super) filled: Notify,
    /// Something was taken, or reading became allowed.
    pub(super) drained: Notify,
}

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) staging: Staging,
    pub(super) waiting: VecDeque<Waiting>,
    waiting_bytes: u64,
    /// Pages of the layout that were not seen yet.
    first_pass_left: u64,
    layout_seen: bool,
    last_pass: bool,
    /// The rest of the stream passes through: there are no pages to count any more.
    passthrough: bool,
    /// Page bytes that the link takes in a moment; 0 while it is not known.
    link_takes: u64,
    /// The switchover may come: nothing is held back.
    open: bool,
    /// Everything must be read as fast as the budget allows, the last pass at full speed.
    flat_out: bool,
}

impl Stage {
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that wait.
    pub(in super::super) fn bytes(&self) -> u64 {
        let inner = self.lock();
        inner.staging.bytes() + inner.waiting_bytes
    }

    /// Whether every page was read at least once.
    pub(in super::super) fn first_pass_done(&self) -> bool {
        let inner = self.lock();
        inner.passthrough || (inner.layout_seen && inner.first_pass_left <= HELD_PAGES)
    }

    /// Bytes of page versions that were superseded while they waited.
    pub(in super::super) fn superseded_bytes(&self) -> u64 {
        self.lock().staging.superseded_bytes()
    }

    /// So many page bytes the link takes in a fraction of the downtime that is asked for. When little
    /// is left to read, no more than this waits: the guest may be paused at any moment.
    pub(in super::super) fn link_takes(&self, bytes: u64) {
        self.lock().link_takes = bytes;
    }

    /// Nothing else stands against a switchover: the end of the first pass may be read.
    pub(in super::super) fn open(&self) {
        self.lock().open = true;
        self.drained.notify_one();
    }

    /// The guest is paused, or about to be: read as fast as it comes, up to the budget until the last
    /// pass begins and without bound from there on.
    pub(in super::super) fn flat_out(&self) {
        self.lock().flat_out = true;
        self.drained.notify_one();
    }
}

impl Inner {
    pub(super) fn take_waiting(&mut self) -> Option<Waiting> {
        let taken = self.waiting.pop_front();
        if let Some(Waiting::Opaque(bytes)) = &taken {
            self.waiting_bytes -= bytes.len() as u64;
        }
        taken
    }

    fn may_read(&self, budget: u64) -> bool {
        let waits = self.staging.bytes() + self.waiting_bytes;
        if self.flat_out {
            // Before its last pass a hypervisor can wait, and may have all of memory to say again.
            return self.last_pass || waits < budget;
        }
        if self.passthrough || !self.layout_seen {
            return waits < STAGED_LOW_BYTES;
        }
        if !self.open && self.first_pass_left <= HELD_PAGES && !self.last_pass {
            return false;
        }
        let left = self.first_pass_left * PAGE_BYTES as u64;
        let low = if left == 0 { STAGED_LOW_BYTES } else { STAGED_FIRST_PASS_BYTES };
        let low = match self.link_takes {
            0 => low,
            takes => low.min(takes.max(STAGED_LEAST_BYTES)),
        };
        waits < budget.min(left / 4).max(low)
    }
}

/// Reads one stream.
pub(in super::super) struct Pump {
    source: Box<dyn MemorySource>,
    budget: u64,
    seen: Vec<Vec<bool>>,
}

impl Pump {
    /// Reads `source`, staging at most about `budget` bytes.
    pub(in super::super) fn new(source: Box<dyn MemorySource>, budget: u64) -> Self {
        Self { source, budget, seen: Vec::new() }
    }

    /// Reads to the end of the stream.
    pub(in super::super) async fn run(mut self, stage: &Stage) -> Result<(), MigrationError> {
        let mut events = Vec::new();
        loop {
            let allowed = stage.lock().may_read(self.budget);
            if !allowed {
                stage.drained.notified().await;
                continue;
            }
            if !self.source.next(&mut events).await? {
                stage.lock().waiting.push_back(Waiting::End);
                stage.filled.notify_one();
                return Ok(());
            }
            for event in events.drain(..) {
                self.absorb(stage, event)?;
            }
            stage.filled.notify_one();
        }
    }

    fn absorb(&mut self, stage: &Stage, event: MemoryEvent) -> Result<(), HypervisorError> {
        let mut inner = stage.lock();
        match event {
            MemoryEvent::Layout(layout) => {
                let bytes = layout.regions.iter().try_fold(0_u64, |sum, region| {
                    sum.checked_add(region.bytes).filter(|&sum| sum <= GUEST_BYTES_MAX)
                });
                if bytes.is_none() || layout.regions.len() > MAX_REGIONS {
                    return Err(unexpected("a memory layout beyond every bound"));
                }
                self.seen = layout
                    .regions
                    .iter()
                    .map(|region| vec![false; region.bytes.div_ceil(PAGE_BYTES as u64) as usize])
                    .collect();
                inner.first_pass_left = self.seen.iter().map(|pages| pages.len() as u64).sum();
                inner.layout_seen = true;
                inner.waiting.push_back(Waiting::Layout(layout));
            }
            MemoryEvent::Opaque(bytes) => {
                inner.waiting_bytes += bytes.len() as u64;
                inner.waiting.push_back(Waiting::Opaque(bytes));
            }
            MemoryEvent::Zero { region, page } => {
                self.see(&mut inner, region, page)?;
                inner.staging.put(PageKey::new(region, page), None);
            }
            MemoryEvent::Page { region, page, content } => {
                self.see(&mut inner, region, page)?;
                inner.staging.put(PageKey::new(region, page), Some(content));
            }
            MemoryEvent::LastPass => inner.last_pass = true,
            MemoryEvent::PagesDone => inner.waiting.push_back(Waiting::PagesDone),
            MemoryEvent::NotUnderstood { reason } => {
                inner.passthrough = true;
                inner.waiting.push_back(Waiting::NotUnderstood(reason));
            }
        }
        Ok(())
    }

    fn see(&mut self, inner: &mut Inner, region: u16, page: u64) -> Result<(), HypervisorError> {
        let seen = self
            .seen
            .get_mut(usize::from(region))
            .and_then(|pages| pages.get_mut(page as usize))
            .ok_or_else(|| unexpected("a page outside its memory layout"))?;
        if !*seen {
            *seen = true;
            inner.first_pass_left -= 1;
        }
        Ok(())
    }
}

fn unexpected(detail: &str) -> HypervisorError {
    HypervisorError::Unexpected { vm: "the memory stream".into(), detail: detail.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn before_a_slow_link_little_waits_once_the_guest_may_be_paused() {
        let mut inner = Inner { layout_seen: true, open: true, ..Inner::default() };
        for page in 0..64 {
            inner.staging.put(PageKey::new(0, page), Some(Bytes::from(vec![1; PAGE_BYTES])));
        }
        assert!(inner.may_read(1 << 30), "256 KiB on a link that is not known");
        inner.link_takes = 200 << 10;
        assert!(!inner.may_read(1 << 30), "more than it takes");
        inner.first_pass_left = 1 << 20;
        assert!(inner.may_read(1 << 30), "in the first pass much may wait, to be superseded");
        inner.flat_out = true;
        inner.first_pass_left = 0;
        assert!(inner.may_read(1 << 30), "the guest is about to be paused: read it all");
    }
}

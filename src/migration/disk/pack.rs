//! What is to be sent of a view: gathered into bundles, coded by several coders at once, and sent.
//!
//! Coders take what has been gathered; what comes meanwhile makes the next bundle. So bundles are small
//! while the link waits for them, and large, which compresses better, while they wait for the link.
//!
//! Invariant: a bundle's item is numbered as it is taken, so an end that is told when nothing is
//! gathered comes behind all that was put before. Bundles overtake each other. What is gathered
//! holds on to nothing but its own bytes, at most [`BUNDLE_BYTES`] of them.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use longhaul_dedup::blocks::MAX_PIECE_BYTES;
use longhaul_dedup::bundle::{BundlePart, ChunkBundle, MAX_BUNDLE_PARTS};
use longhaul_dedup::compress::{Compressor, Level};
use longhaul_transport::Class;
use tokio::sync::watch;

use super::super::coders;
use super::super::coding::{Coding, Turn};
use super::super::error::MigrationError;
use super::super::link::Link;
use super::super::message::BulkHeader;
use super::super::meter::Meter;

/// Payload of one bundle, at most. Twice as much would gain 1 % more and take twice the memory, for each
/// coder and for each bundle that waits at the target.
const BUNDLE_BYTES: u64 = 8 << 20;
/// Payload of one bundle, at most, however badly that compresses: of what does not compress, long bundles
/// gain nothing, and what is half there when an agent is killed is sent again.
const BUNDLE_BYTES_MIN: u64 = 5 << 18;
/// Coded bytes that are handed to the transport at once on the shortest path.
const SENDING_BYTES_MIN: u64 = 512 << 10;
/// Bundles that are handed to the transport at once: one stream has less in its window than a long path
/// holds.
const SENDS_AT_ONCE: usize = 4;
/// So much is sent without waiting for more, if no coder has anything to do; and three times as much for
/// each that has.
const WORTHWHILE_BYTES: u64 = 1 << 20;

/// What will be sent next, as one.
struct Gathered {
    parts: Vec<BundlePart>,
    bytes: u64,
    /// Payload of a bundle, at most: what the last one says that is too much when coded.
    limit: u64,
    /// Coded bytes that are not with the transport yet.
    coded: u64,
    /// Those of them that are being handed to the transport.
    sending: u64,
    /// Bundles that were taken and are not with the transport yet.
    in_hand: usize,
    /// Nothing more comes before some of this was sent.
    is_last: bool,
    /// Nothing more comes at all.
    is_closed: bool,
}

impl Default for Gathered {
    fn default() -> Self {
        Self {
            parts: Vec::new(),
            bytes: 0,
            limit: BUNDLE_BYTES_MIN,
            coded: 0,
            sending: 0,
            in_hand: 0,
            is_last: false,
            is_closed: false,
        }
    }
}

impl Gathered {
    fn has_room(&self, len: u64) -> bool {
        self.bytes + len <= self.limit && self.parts.len() < MAX_BUNDLE_PARTS
    }

    fn is_due(&self) -> bool {
        !self.has_room(u64::from(MAX_PIECE_BYTES))
            || self.bytes >= WORTHWHILE_BYTES * (1 + 3 * self.in_hand as u64)
            || !self.parts.is_empty() && self.is_last && self.in_hand == 0
    }
}

/// A bundle that is to be coded.
struct Taken {
    item: u64,
    parts: Vec<BundlePart>,
    payload: u64,
    /// For how long it was waited for.
    starved: Duration,
}

/// A bundle that is to be sent.
struct Coded {
    item: u64,
    body: Bytes,
    level: Level,
    payload: u64,
    starved: Duration,
    busy: Duration,
    /// Since the one before it was coded.
    elapsed: Duration,
}

/// Gathers, codes and sends.
pub(super) struct Packer<'a> {
    link: &'a Link,
    meter: &'a Meter,
    coding: &'a Coding,
    disk: u16,
    class: Class,
    gathered: watch::Sender<Gathered>,
    /// Those that nobody uses just now: they keep their memory.
    compressors: Mutex<Vec<Compressor>>,
    /// When a bundle was coded last.
    last: Mutex<Instant>,
}

impl<'a> Packer<'a> {
    pub(super) fn new(
        link: &'a Link,
        meter: &'a Meter,
        coding: &'a Coding,
        disk: u16,
        class: Class,
    ) -> Self {
        Self {
            link,
            meter,
            coding,
            disk,
            class,
            gathered: watch::Sender::default(),
            compressors: Mutex::default(),
            last: Mutex::new(Instant::now()),
        }
    }

    /// Adds a part once there is room for it. Its bytes should be its own: see the invariant.
    pub(super) async fn put(&self, part: BundlePart) {
        let len = part.data().len() as u64;
        let mut part = Some(part);
        while part.is_some() {
            self.until(|gathered| gathered.has_room(len)).await;
            self.gathered.send_if_modified(|gathered| {
                let has_room = gathered.has_room(len);
                if has_room {
                    gathered.parts.extend(part.take());
                    gathered.bytes += len;
                }
                has_room
            });
        }
    }

    /// Says that nothing more comes before some of what was gathered has been sent.
    pub(super) fn hurry(&self) {
        self.gathered.send_if_modified(|gathered| {
            !gathered.is_last && {
                gathered.is_last = true;
                true
            }
        });
    }

    /// Returns once all that was put is with the transport.
    pub(super) async fn flush(&self) {
        self.hurry();
        self.until(|gathered| gathered.parts.is_empty() && gathered.in_hand == 0).await;
    }

    /// Ends [`run`](Self::run).
    pub(super) fn close(&self) {
        self.gathered.send_modify(|gathered| gathered.is_closed = true);
    }

    /// Codes and sends until it is closed.
    // Boxed: the compiler cannot see yet that this may go to another thread.
    pub(super) fn run(&self) -> BoxFuture<'_, Result<(), MigrationError>> {
        stream::unfold((), |()| async { Some((self.take().await?, ())) })
            .map(|bundle| self.code(bundle))
            .buffer_unordered(coders::count())
            .map(|coded| self.send(coded))
            .buffer_unordered(SENDS_AT_ONCE)
            .try_collect()
            .boxed()
    }

    /// The next bundle.
    async fn take(&self) -> Option<Taken> {
        let since = Instant::now();
        loop {
            self.until(|gathered| gathered.is_due() || gathered.is_closed).await;
            let mut taken = None;
            let mut is_closed = false;
            self.gathered.send_if_modified(|gathered| {
                is_closed = gathered.is_closed;
                if !gathered.is_due() {
                    return false;
                }
                taken = Some(Taken {
                    item: self.link.next_disk_item(),
                    parts: std::mem::take(&mut gathered.parts),
                    payload: std::mem::take(&mut gathered.bytes),
                    starved: since.elapsed(),
                });
                gathered.in_hand += 1;
                gathered.is_last = false;
                true
            });
            if taken.is_some() || is_closed {
                return taken;
            }
        }
    }

    async fn code(&self, taken: Taken) -> Coded {
        let Taken { item, parts, payload, starved } = taken;
        let bundle = ChunkBundle { disk: self.disk, parts };
        let ahead = self.gathered.borrow().coded;
        let link = self.link.bytes_per_s();
        let level = self.coding.level(link, ahead, payload);
        tracing::debug!(item, ahead, link, ?level, "a bundle is taken");
        let mut compressor = self.compressors().pop().unwrap_or_default();
        let (compressor, body, busy) = coders::run(move || {
            let began = Instant::now();
            let body = bundle.encode(&mut compressor, level);
            (compressor, body, began.elapsed())
        })
        .await;
        self.gathered.send_modify(|gathered| gathered.coded += body.len() as u64);
        self.compressors().push(compressor);
        let now = Instant::now();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed = now - std::mem::replace(&mut *last, now);
        Coded { item, body, level, payload, starved, busy, elapsed }
    }

    async fn send(&self, coded: Coded) -> Result<(), MigrationError> {
        let Coded { item, body, level, payload, starved, busy, elapsed } = coded;
        let bytes = body.len() as u64;
        tracing::debug!(
            item,
            ?level,
            payload,
            bytes,
            ?starved,
            ?busy,
            ?elapsed,
            "a bundle is coded"
        );
        if payload > 0 {
            self.coding.observe(&Turn { level, payload, bytes, busy, starved, elapsed });
            self.meter.disk_sent(payload, bytes);
        }
        let room = (4 * self.link.stats().holds()).max(SENDING_BYTES_MIN);
        let mut has_room = false;
        while !has_room {
            let may =
                |gathered: &Gathered| gathered.sending == 0 || gathered.sending + bytes <= room;
            self.until(may).await;
            self.gathered.send_if_modified(|gathered| {
                has_room = may(gathered);
                if has_room {
                    gathered.sending += bytes;
                    gathered.limit = limit(payload, bytes);
                }
                has_room
            });
        }
        let sent = self.link.send_bulk(self.class, &BulkHeader::Chunks { item }, body).await;
        self.gathered.send_modify(|gathered| {
            gathered.in_hand -= 1;
            gathered.coded -= bytes;
            gathered.sending -= bytes;
        });
        sent
    }

    fn compressors(&self) -> MutexGuard<'_, Vec<Compressor>> {
        self.compressors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn until(&self, holds: impl FnMut(&Gathered) -> bool) {
        let mut gathered = self.gathered.subscribe();
        // The sender is this one's own: it cannot be gone.
        let _ = gathered.wait_for(holds).await;
    }
}

/// Payload of a bundle, at most, where `payload` came to `bytes` when coded: by the square of how well that
/// compressed: at 2.5 : 1 and beyond as much as there may be.
fn limit(payload: u64, bytes: u64) -> u64 {
    let ratio = payload.max(1) as f64 / bytes.max(1) as f64;
    let limit = BUNDLE_BYTES_MIN as f64 * ratio * ratio;
    (limit as u64).clamp(BUNDLE_BYTES_MIN, BUNDLE_BYTES)
}

//! Batches that leave: one stream each, by urgency, under the rate caps, bounded in number.
//!
//! Invariant: a batch reaches the peer whole and once or, if its sender gives up, not at all, however
//! many connections that takes; batches that are not acknowledged never use up the streams that more
//! urgent classes need; and under a cap QUIC has little to send that is not on the wire yet.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use quinn::{PathStats, SendStream, VarInt, WriteError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::AbortHandle;

use crate::class::Class;
use crate::congestion::carried;
use crate::frame::BatchHead;
use crate::link::{Line, Link};
use crate::rate::JobRate;
use crate::session::SendError;
use crate::stats::header_bytes;
use crate::tuning::MAX_UNI_STREAMS;

/// Batches of each class that may be on the way, least urgent class first.
const UNACKED_BATCHES: [usize; Class::ALL.len()] = [48, 48, 96, 32, 16];
/// Least send window: keeps a path busy while its window is still small.
const SEND_WINDOW_MIN: u64 = 4 * 1024 * 1024;
/// Send window in what the path holds. A lost packet keeps all that follows it in its stream in the
/// window for a round trip more: with 2, a path of 100 Mbit/s, 200 ms and 0.5 % loss carries 3 %
/// less. Beyond 3 nothing is gained, and data only ages in the queue, where a page cannot be
/// superseded any more.
const SEND_WINDOW_HELD: u32 = 3;
/// Send window under a cap, in what the cap carries in this time and the round trips above. A link
/// that was cut then holds little that must be sent again before anything new.
const SEND_WINDOW_TIME: Duration = Duration::from_millis(200);
/// Least send window under a cap: a slice of each class.
const SEND_WINDOW_CAPPED_MIN: u64 = 64 * 1024;
/// One part in so many more is paid for at the entry than is handed to QUIC. What has come to wait
/// there, behind repetitions or because a cap was lowered, drains by that much.
const ENTRY_MARGIN: u64 = 400;
/// Bytes of a QUIC packet that carry no stream data: header, frame header and seal, on average.
const QUIC_OVERHEAD: u64 = 40;
/// Code of a stream whose sender gave up.
const ABANDONED: VarInt = VarInt::from_u32(1);

const _: () = {
    let [a, b, c, d, e] = UNACKED_BATCHES;
    assert!(a + b + c + d + e < MAX_UNI_STREAMS as usize, "every class must find a stream");
};

/// Batches on the way, whatever connection carries them.
#[derive(Debug)]
pub(crate) struct Outbox {
    /// How many more batches of each class may leave.
    slots: [Arc<Semaphore>; Class::ALL.len()],
    /// Bytes of urgent batches that have not arrived; the send window makes room for them.
    urgent: AtomicU64,
    next: AtomicU64,
    on_the_way: Mutex<HashMap<u64, OnTheWay>>,
}

/// A batch that has not arrived, as far as is known here.
#[derive(Debug)]
struct OnTheWay {
    /// Bytes that the peer has kept from a connection that was lost.
    offset: usize,
    arrived: oneshot::Sender<()>,
}

impl Outbox {
    pub(crate) fn new() -> Self {
        Self {
            slots: UNACKED_BATCHES.map(|count| Arc::new(Semaphore::new(count))),
            urgent: AtomicU64::new(0),
            next: AtomicU64::new(0),
            on_the_way: Mutex::default(),
        }
    }

    fn on_the_way(&self) -> MutexGuard<'_, HashMap<u64, OnTheWay>> {
        self.on_the_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Batches that have not arrived.
    pub(crate) fn load(&self) -> usize {
        self.on_the_way().len()
    }

    /// The peer has batch `number`.
    pub(crate) fn arrived(&self, number: u64) {
        if let Some(batch) = self.on_the_way().remove(&number) {
            // Nobody waits if the sender gave up at this moment.
            let _ = batch.arrived.send(());
        }
    }

    /// Another connection begins, and the peer holds these parts of batches. Returns the numbers of
    /// those that will not be finished.
    pub(crate) fn go_on_from(&self, parts: &[(u64, u32)]) -> Vec<u64> {
        let mut on_the_way = self.on_the_way();
        on_the_way.values_mut().for_each(|batch| batch.offset = 0);
        let mut dropped = Vec::new();
        for &(number, offset) in parts {
            match (on_the_way.get_mut(&number), usize::try_from(offset)) {
                (Some(batch), Ok(offset)) => batch.offset = offset,
                _ => dropped.push(number),
            }
        }
        dropped
    }
}

/// A stream that is reset unless it was finished, so that half a batch never looks like a whole
/// one that is malformed.
struct Unfinished(Option<SendStream>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(stream) = &mut self.0 {
            // Fails only if the stream is closed already.
            let _ = stream.reset(ABANDONED);
        }
    }
}

/// A batch as it was given, until it has arrived or its sender gives up.
struct Shipment {
    link: Arc<Link>,
    class: Class,
    number: u64,
    /// The sender's header, then its body.
    pieces: Vec<Bytes>,
    length: usize,
    arrived: oneshot::Receiver<()>,
    /// Another may take its place when this one is dropped.
    _slot: OwnedSemaphorePermit,
}

impl Drop for Shipment {
    fn drop(&mut self) {
        self.link.outbox.on_the_way().remove(&self.number);
        if self.class.is_urgent() {
            self.link.outbox.urgent.fetch_sub(self.length as u64, Ordering::Relaxed);
        }
    }
}

/// Where a batch was written to.
struct Written {
    line: Arc<Line>,
    /// Resolves to a code if the peer does not want it.
    stopped: Pin<Box<dyn Future<Output = Option<VarInt>> + Send>>,
}

impl Shipment {
    async fn new(
        link: &Arc<Link>,
        class: Class,
        header: &[u8],
        body: Vec<Bytes>,
    ) -> Result<Self, SendError> {
        let length = body
            .iter()
            .try_fold(header.len(), |sum, piece| sum.checked_add(piece.len()))
            .unwrap_or(usize::MAX);
        BatchHead::check(length)?;
        let slot = link.outbox.slots[class.index()].clone().acquire_owned();
        let slot = tokio::select! {
            biased;
            reason = link.ended() => return Err(SendError::Closed(reason)),
            slot = slot => slot.expect("these semaphores are never closed"),
        };
        let number = link.outbox.next.fetch_add(1, Ordering::Relaxed);
        let (tell, arrived) = oneshot::channel();
        let on_the_way = OnTheWay { offset: 0, arrived: tell };
        link.outbox.on_the_way().insert(number, on_the_way);
        if class.is_urgent() {
            link.outbox.urgent.fetch_add(length as u64, Ordering::Relaxed);
        }
        let mut pieces = Vec::with_capacity(body.len() + 1);
        pieces.push(Bytes::copy_from_slice(header));
        pieces.extend(body);
        Ok(Self { link: link.clone(), class, number, pieces, length, arrived, _slot: slot })
    }

    /// Hands the batch to QUIC, on the first connection after `tried` that stays for long enough.
    async fn write(&self, mut tried: Option<u64>) -> Result<Written, SendError> {
        loop {
            let line = self.link.line_after(tried).await.map_err(SendError::Closed)?;
            match self.write_to(&line).await {
                Ok(stopped) => return Ok(Written { line, stopped: Box::pin(stopped) }),
                Err(WriteError::ConnectionLost(_)) => tried = Some(line.number),
                Err(_) => return Err(SendError::BatchRefused { class: self.class }),
            }
        }
    }

    async fn write_to(
        &self,
        line: &Line,
    ) -> Result<impl Future<Output = Option<VarInt>> + Send + use<>, WriteError> {
        let mut stream = Unfinished(Some(line.connection.open_uni().await?));
        let writer = stream.0.as_mut().expect("a stream that was just opened is there");
        // Fails only if the stream is closed; the write below then says so.
        let _ = writer.set_priority(i32::from(self.class.to_byte()));

        let offset = self.link.outbox.on_the_way().get(&self.number).map_or(0, |one| one.offset);
        let Self { class, number, length, .. } = *self;
        let head = Bytes::copy_from_slice(&BatchHead { class, number, offset, length }.encode());
        let mut pieces = vec![head];
        let mut skip = offset;
        for piece in &self.pieces {
            let skipped = skip.min(piece.len());
            skip -= skipped;
            pieces.push(piece.slice(skipped..));
        }
        write(&self.link, line, class, writer, pieces).await?;
        // Fails only if the stream is closed; waiting for the acknowledgement then says so.
        let _ = writer.finish();
        let stopped = writer.stopped();
        // Finished: from here on dropping the stream is no abandoning.
        stream.0 = None;
        Ok(async move { stopped.await.ok().flatten() })
    }

    /// Waits until the peer has the batch, and writes it again where a connection was lost.
    async fn arrive(&mut self, mut written: Written) -> Result<(), SendError> {
        loop {
            let lost = written.line.number;
            tokio::select! {
                biased;
                Ok(()) = &mut self.arrived => return Ok(()),
                line = self.link.line_after(Some(lost)) => line.map_err(SendError::Closed)?,
                Some(_) = &mut written.stopped => {
                    return Err(SendError::BatchRefused { class: self.class });
                }
            };
            written = self.write(Some(lost)).await?;
        }
    }
}

pub(crate) type Acked = oneshot::Receiver<Result<(), SendError>>;

/// A batch that is given up with its sender, as long as QUIC has not taken it.
struct Handing(Option<AbortHandle>);

impl Drop for Handing {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// Hands a batch to QUIC. The result resolves when the peer has it, or will not have it.
pub(crate) async fn send(
    link: &Arc<Link>,
    class: Class,
    header: &[u8],
    body: Vec<Bytes>,
) -> Result<Acked, SendError> {
    let mut shipment = Shipment::new(link, class, header, body).await?;
    let (taken, is_taken) = oneshot::channel();
    let (tell, acked) = oneshot::channel();
    let task = link.home.spawn(async move {
        // Nobody waits any more if the sender gives up at this very moment.
        let written = match shipment.write(None).await {
            Ok(written) => {
                shipment.link.counters.count_sent(class, shipment.length);
                let _ = taken.send(Ok(()));
                written
            }
            Err(error) => {
                let _ = taken.send(Err(error));
                return;
            }
        };
        let result = shipment.arrive(written).await;
        if result.is_ok() {
            shipment.link.counters.count_acked(class, shipment.length);
        }
        drop(shipment);
        // Nobody waits if only `send_batch` was asked for.
        let _ = tell.send(result);
    });
    let mut handing = Handing(Some(task.abort_handle()));
    let taken = is_taken.await;
    handing.0 = None;
    // The task ends without a word only with its thread.
    taken.unwrap_or(Err(SendError::BatchRefused { class }))?;
    Ok(acked)
}

/// Writes `pieces` in slices that the caps let pass one by one.
async fn write(
    link: &Link,
    line: &Line,
    class: Class,
    stream: &mut SendStream,
    pieces: Vec<Bytes>,
) -> Result<(), WriteError> {
    let (rate, pacing) = (link.rate(), &line.pacing);
    let header = header_bytes(line.connection.remote_address());
    let mut slice = Vec::new();
    let mut sliced = 0;
    let mut limit = rate.slice(class);
    let mut pieces = pieces.into_iter().filter(|piece| !piece.is_empty()).peekable();
    while let Some(mut piece) = pieces.next() {
        while !piece.is_empty() {
            let part = piece.split_to(piece.len().min(limit - sliced));
            sliced += part.len();
            slice.push(part);
            if sliced == limit || (piece.is_empty() && pieces.peek().is_none()) {
                let path = fit_send_window(link, line, &rate);
                // The caps are about the link: headers are paid for too, and with the next slice
                // whatever else has left since the last one.
                rate.owe(pacing.due(&path, header));
                let mtu = u64::from(path.current_mtu);
                let payload = mtu.saturating_sub(QUIC_OVERHEAD).max(1);
                let wire = (sliced as u64).saturating_mul(mtu + header).div_ceil(payload);
                rate.acquire(class, wire + wire / ENTRY_MARGIN).await;
                pacing.paid(wire);
                if class == Class::HandOver {
                    // Before it leaves what was handed to the socket already.
                    pacing.hurry(wire + mtu + header);
                }
                stream.write_all_chunks(&mut slice).await?;
                slice.clear();
                sliced = 0;
                limit = rate.slice(class);
            }
        }
    }
    Ok(())
}

/// Sets the send window to what the path, or the cap, can use soon; returns what QUIC knows of the path.
fn fit_send_window(link: &Link, line: &Line, rate: &JobRate) -> PathStats {
    line.pacing.follow(&line.connection);
    let path = line.connection.stats().path;
    let limit = link.connection_window;
    let urgent = link.outbox.urgent.load(Ordering::Relaxed);
    let window = if urgent > 0 {
        // Above all that bulk may have filled, so that urgent bytes never wait for room. Their
        // stream's priority then lets them overtake what is queued.
        limit + urgent
    } else {
        // Of the congestion window a half: it is twice what the path holds, where that is not known.
        let [_, bandwidth] = line.pacing.rates();
        let held = carried(bandwidth, path.min_rtt).max(path.cwnd / 2);
        let window = (held * u64::from(SEND_WINDOW_HELD)).clamp(SEND_WINDOW_MIN.min(limit), limit);
        let span = path.rtt * SEND_WINDOW_HELD + SEND_WINDOW_TIME;
        let capped = rate.lowest().map(|rate| rate.bytes_in(span).max(SEND_WINDOW_CAPPED_MIN));
        capped.map_or(window, |capped| capped.min(window))
    };
    line.connection.set_send_window(window);
    path
}

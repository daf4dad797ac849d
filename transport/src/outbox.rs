//! Batches that leave: one stream each, by urgency, under the rate caps, bounded in number.
//!
//! Invariant: a batch reaches the peer whole or, if its sender gives up, not at all; batches that are
//! not acknowledged never use up the streams that more urgent classes need; and under a cap QUIC has
//! little to send that is not on the wire yet.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use quinn::{ConnectionError, PathStats, SendStream, StoppedError, VarInt, WriteError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::class::Class;
use crate::congestion::carried;
use crate::frame::{BATCH_HEAD, BatchHead, FrameError, MAX_BATCH_BYTES};
use crate::rate::JobRate;
use crate::session::{Link, SendError, SessionInner};
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
const ENTRY_MARGIN: u64 = 200;
/// Bytes of a QUIC packet that carry no stream data: header, frame header and seal, on average.
const QUIC_OVERHEAD: u64 = 40;
/// Code of a stream whose sender gave up.
const ABANDONED: VarInt = VarInt::from_u32(1);

const _: () = {
    let [a, b, c, d, e] = UNACKED_BATCHES;
    assert!(a + b + c + d + e < MAX_UNI_STREAMS as usize, "every class must find a stream");
};

/// How many more batches of each class may leave.
#[derive(Debug)]
pub(crate) struct Slots([Arc<Semaphore>; Class::ALL.len()]);

impl Slots {
    pub(crate) fn new() -> Self {
        Self(UNACKED_BATCHES.map(|count| Arc::new(Semaphore::new(count))))
    }

    async fn take(&self, class: Class) -> OwnedSemaphorePermit {
        let slot = self.0[class.index()].clone().acquire_owned().await;
        slot.expect("these semaphores are never closed")
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

/// Urgent bytes that the send window makes room for; given back when dropped.
struct UrgentRoom(Arc<Link>, u64);

impl UrgentRoom {
    fn take(link: &Arc<Link>, bytes: u64) -> Self {
        link.urgent_unacked.fetch_add(bytes, Ordering::Relaxed);
        Self(link.clone(), bytes)
    }
}

impl Drop for UrgentRoom {
    fn drop(&mut self) {
        self.0.urgent_unacked.fetch_sub(self.1, Ordering::Relaxed);
    }
}

pub(crate) type Acked = oneshot::Receiver<Result<Option<VarInt>, StoppedError>>;

/// Hands a batch to QUIC. The result resolves to `None` when the peer has it,
/// and to a code if the peer stopped reading it.
pub(crate) async fn send(
    session: &Arc<SessionInner>,
    class: Class,
    header: &[u8],
    body: Vec<Bytes>,
) -> Result<Acked, SendError> {
    let length = body
        .iter()
        .try_fold(header.len(), |sum, piece| sum.checked_add(piece.len()))
        .ok_or(FrameError::TooLarge { what: "batch", length: u64::MAX, limit: MAX_BATCH_BYTES })?;
    let head = BatchHead::new(class, length)?;
    let lost = |error: ConnectionError| SendError::Closed(session.ended(&error));

    let slot = session.link.slots.take(class).await;
    let mut stream = Unfinished(Some(session.connection.open_uni().await.map_err(lost)?));
    let writer = stream.0.as_mut().expect("a stream that was just opened is there");
    // Fails only if the stream is closed; the write below then says so.
    let _ = writer.set_priority(i32::from(class.to_byte()));

    let room = class.is_urgent().then(|| UrgentRoom::take(&session.link, length as u64));
    let mut first = BytesMut::with_capacity(BATCH_HEAD + header.len());
    first.put_slice(&head.encode());
    first.put_slice(header);
    let pieces = std::iter::once(first.freeze()).chain(body);
    write(session, class, writer, pieces).await.map_err(|error| match error {
        WriteError::ConnectionLost(error) => lost(error),
        _ => SendError::BatchRefused { class },
    })?;
    // Fails only if the stream is closed; waiting for the acknowledgement then says so.
    let _ = writer.finish();
    session.link.counters.count_sent(class, length);

    let stopped = writer.stopped();
    // Finished: from here on dropping the stream is no abandoning.
    stream.0 = None;
    let (tell, acked) = oneshot::channel();
    let link = session.link.clone();
    tokio::spawn(async move {
        let result = stopped.await;
        if result == Ok(None) {
            link.counters.count_acked(class, length);
        }
        drop((slot, room));
        // Nobody waits if only `send_batch` was asked for.
        let _ = tell.send(result);
    });
    Ok(acked)
}

/// Writes `pieces` in slices that the caps let pass one by one.
async fn write(
    session: &SessionInner,
    class: Class,
    stream: &mut SendStream,
    pieces: impl Iterator<Item = Bytes>,
) -> Result<(), WriteError> {
    let (rate, pacing) = (session.rate(), &session.link.pacing);
    let header = header_bytes(session.connection.remote_address());
    let mut slice = Vec::new();
    let mut sliced = 0;
    let mut limit = rate.slice(class);
    let mut pieces = pieces.filter(|piece| !piece.is_empty()).peekable();
    while let Some(mut piece) = pieces.next() {
        while !piece.is_empty() {
            let part = piece.split_to(piece.len().min(limit - sliced));
            sliced += part.len();
            slice.push(part);
            if sliced == limit || (piece.is_empty() && pieces.peek().is_none()) {
                let path = fit_send_window(session, &rate);
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
fn fit_send_window(session: &SessionInner, rate: &JobRate) -> PathStats {
    session.link.pacing.follow(&session.connection);
    let path = session.connection.stats().path;
    let limit = session.link.connection_window;
    let urgent = session.link.urgent_unacked.load(Ordering::Relaxed);
    let window = if urgent > 0 {
        // Above all that bulk may have filled, so that urgent bytes never wait for room. Their
        // stream's priority then lets them overtake what is queued.
        limit + urgent
    } else {
        // Of the congestion window a half: it is twice what the path holds, where that is not known.
        let [_, bandwidth] = session.link.pacing.rates();
        let held = carried(bandwidth, path.min_rtt).max(path.cwnd / 2);
        let window = (held * u64::from(SEND_WINDOW_HELD)).clamp(SEND_WINDOW_MIN.min(limit), limit);
        let span = path.rtt * SEND_WINDOW_HELD + SEND_WINDOW_TIME;
        let capped = rate.lowest().map(|rate| rate.bytes_in(span).max(SEND_WINDOW_CAPPED_MIN));
        capped.map_or(window, |capped| capped.min(window))
    };
    session.connection.set_send_window(window);
    path
}

//! Batches that arrive: read concurrently, handed out by urgency, bounded in memory.
//!
//! Invariant: no byte of a batch is stored before its whole length has been reserved from a budget,
//! and urgent classes have a budget of their own that bulk cannot use up. What a lost connection has
//! brought of a batch is kept, room and all, for the next one to go on with.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use quinn::{Connection, ReadError, ReadExactError, RecvStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::class::Class;
use crate::frame::{BATCH_HEAD, BatchHead, FrameError};
use crate::link::Link;
use crate::tuning::MAX_UNI_STREAMS;
use crate::watched::Watched;

/// Memory for batches of bulk classes that are being received or wait for [`recv_batch`].
///
/// [`recv_batch`]: crate::Session::recv_batch
pub const INBOUND_BULK_BYTES: usize = 128 * 1024 * 1024;
/// The same for the urgent classes.
pub const INBOUND_URGENT_BYTES: usize = 32 * 1024 * 1024;
/// Grain in which memory is reserved; even an empty batch takes one.
const GRAIN: usize = 4096;
/// Most bytes taken from QUIC at a time: lets other readers of the connection in between.
const READ_AT_ONCE: usize = 1024 * 1024;

/// A batch as the peer sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Its class.
    pub class: Class,
    /// The sender's header and body, joined.
    pub body: Bytes,
}

#[derive(Debug, Default)]
struct Queues {
    arrived: [VecDeque<(Batch, OwnedSemaphorePermit)>; Class::ALL.len()],
    /// When one was last taken while there was no room for more.
    relieved: Option<Instant>,
    ended: bool,
}

/// A batch of which not all is here.
#[derive(Debug)]
struct Part {
    class: Class,
    length: usize,
    body: BytesMut,
    room: OwnedSemaphorePermit,
}

/// Complete batches that nobody has taken yet, and parts of others. A session's lanes share its queues
/// and its room; numbers of batches are each connection's own.
#[derive(Debug)]
pub(crate) struct Inbox {
    queues: Arc<Watched<Queues>>,
    /// Parts that a lost connection has left, by number.
    parts: Mutex<HashMap<u64, Part>>,
    bulk: Arc<Semaphore>,
    urgent: Arc<Semaphore>,
    is_lanes: bool,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self {
            queues: Arc::default(),
            parts: Mutex::default(),
            bulk: Arc::new(Semaphore::new(INBOUND_BULK_BYTES / GRAIN)),
            urgent: Arc::new(Semaphore::new(INBOUND_URGENT_BYTES / GRAIN)),
            is_lanes: false,
        }
    }

    /// For a lane of the session that has this one.
    pub(crate) fn of_a_lane(&self) -> Self {
        Self {
            queues: self.queues.clone(),
            parts: Mutex::default(),
            bulk: self.bulk.clone(),
            urgent: self.urgent.clone(),
            is_lanes: true,
        }
    }

    /// The most urgent complete batch; `None` once the connection ended and all were taken.
    pub(crate) async fn next(&self) -> Option<Batch> {
        self.queues
            .until(|queues| {
                let most_urgent = queues.arrived.iter_mut().rev().find_map(VecDeque::pop_front);
                match most_urgent {
                    Some((batch, _room)) => {
                        if self.is_full() {
                            queues.relieved = Some(Instant::now());
                        }
                        Some(Some(batch))
                    }
                    None => queues.ended.then_some(None),
                }
            })
            .await
    }

    /// When whole batches that nobody has taken last left no room for others, which is now if they do.
    /// What has no room stays in QUIC's windows, and may keep the peer from saying anything.
    pub(crate) fn was_full(&self) -> Option<Instant> {
        let queues = self.queues.lock();
        let waiting = queues.arrived.iter().any(|queue| !queue.is_empty());
        if waiting && self.is_full() { Some(Instant::now()) } else { queues.relieved }
    }

    fn is_full(&self) -> bool {
        [&self.bulk, &self.urgent].iter().any(|budget| budget.available_permits() == 0)
    }

    /// Bytes that bulk may still take.
    #[cfg(test)]
    pub(crate) fn bulk_room(&self) -> usize {
        self.bulk.available_permits() * GRAIN
    }

    fn push(&self, batch: Batch, room: OwnedSemaphorePermit) {
        self.queues.change(|queues| {
            queues.arrived[batch.class.index()].push_back((batch, room));
        });
    }

    /// Nothing more will come: readers end behind what is here. A lane's end is not the session's.
    pub(crate) fn end(&self) {
        self.parts().clear();
        if self.is_lanes {
            return;
        }
        self.bulk.close();
        self.urgent.close();
        self.queues.change(|queues| queues.ended = true);
    }

    fn parts(&self) -> MutexGuard<'_, HashMap<u64, Part>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is here of batches that are not whole: their numbers, and how many bytes.
    pub(crate) fn list_parts(&self) -> Vec<(u64, u32)> {
        let mut list: Vec<_> = self
            .parts()
            .iter()
            .filter_map(|(&number, part)| Some((number, u32::try_from(part.body.len()).ok()?)))
            .collect();
        list.sort_unstable();
        list
    }

    /// The sender has given batch `number` up.
    pub(crate) fn drop_part(&self, number: u64) {
        self.parts().remove(&number);
    }

    fn keep_part(&self, number: u64, part: Part) {
        let mut parts = self.parts();
        // An honest peer has no more batches on the way; what is not kept comes again.
        if parts.len() < MAX_UNI_STREAMS as usize {
            parts.insert(number, part);
        }
    }

    /// Waits for room for a batch of `length` bytes; `None` if the connection ended meanwhile.
    async fn room(&self, class: Class, length: usize) -> Option<OwnedSemaphorePermit> {
        let budget = if class.is_urgent() { &self.urgent } else { &self.bulk };
        let grains = u32::try_from(length.div_ceil(GRAIN).max(1)).ok()?;
        budget.clone().acquire_many_owned(grains).await.ok()
    }
}

/// Receives batches until the connection is lost. At most as many streams as QUIC lets the peer open
/// are read at a time.
pub(crate) async fn receive(connection: Connection, link: Arc<Link>) {
    let mut readers = JoinSet::new();
    loop {
        tokio::select! {
            stream = connection.accept_uni() => match stream {
                Ok(stream) => {
                    readers.spawn(receive_one(stream, connection.clone(), link.clone()));
                }
                Err(_) => break,
            },
            Some(_) = readers.join_next() => {}
        }
    }
    while readers.join_next().await.is_some() {}
}

async fn receive_one(mut stream: RecvStream, connection: Connection, link: Arc<Link>) {
    let received = match read_batch(&mut stream, &connection, &link.inbox).await {
        Ok((number, batch, room)) => {
            link.counters.count_received(batch.class, batch.body.len());
            link.inbox.push(batch, room);
            link.receipts.acknowledge(number)
        }
        // A batch that its sender abandoned; nothing of it is kept.
        Err(ReadBatchError::Abandoned) => {
            tracing::debug!("the peer abandoned a batch");
            Ok(())
        }
        Err(ReadBatchError::Lost(None)) => Ok(()),
        Err(ReadBatchError::Lost(Some((number, part)))) => {
            link.inbox.keep_part(number, *part);
            Ok(())
        }
        Err(ReadBatchError::Frame(error)) => Err(error),
    };
    if let Err(error) = received {
        link.violation(&connection, &error);
    }
}

enum ReadBatchError {
    Abandoned,
    /// With the connection; and what it has brought.
    Lost(Option<(u64, Box<Part>)>),
    Frame(FrameError),
}

async fn read_batch(
    stream: &mut RecvStream,
    connection: &Connection,
    inbox: &Inbox,
) -> Result<(u64, Batch, OwnedSemaphorePermit), ReadBatchError> {
    let what = "batch";
    let mut head = [0; BATCH_HEAD];
    stream.read_exact(&mut head).await.map_err(|error| match error {
        ReadExactError::FinishedEarly(_) => ReadBatchError::Frame(FrameError::Truncated { what }),
        ReadExactError::ReadError(ReadError::Reset(_)) => ReadBatchError::Abandoned,
        ReadExactError::ReadError(_) => ReadBatchError::Lost(None),
    })?;
    let head = BatchHead::decode(head).map_err(ReadBatchError::Frame)?;
    let number = head.number;
    let before = inbox.parts().remove(&number);
    let mut part = match before {
        Some(part) if head.offset > 0 => part,
        // An earlier part of a batch that begins anew is let go.
        _ => {
            let room = tokio::select! {
                room = inbox.room(head.class, head.length) => room,
                _ = connection.closed() => None,
            };
            let room = room.ok_or(ReadBatchError::Lost(None))?;
            Part {
                class: head.class,
                length: head.length,
                body: BytesMut::with_capacity(head.length),
                room,
            }
        }
    };
    if (part.class, part.length, part.body.len()) != (head.class, head.length, head.offset) {
        let offset = head.offset as u64;
        return Err(ReadBatchError::Frame(FrameError::Offset { number, offset }));
    }
    loop {
        match stream.read_chunk(READ_AT_ONCE, true).await {
            Ok(Some(chunk)) if chunk.bytes.len() > part.length - part.body.len() => {
                return Err(ReadBatchError::Frame(FrameError::Trailing { what }));
            }
            Ok(Some(chunk)) => part.body.extend_from_slice(&chunk.bytes),
            Ok(None) if part.body.len() < part.length => {
                return Err(ReadBatchError::Frame(FrameError::Truncated { what }));
            }
            Ok(None) => {
                let batch = Batch { class: part.class, body: part.body.freeze() };
                return Ok((number, batch, part.room));
            }
            Err(ReadError::Reset(_)) => return Err(ReadBatchError::Abandoned),
            Err(_) => return Err(ReadBatchError::Lost(Some((number, Box::new(part))))),
        }
    }
}

//! Batches that arrive: read concurrently, handed out by urgency, bounded in memory.
//!
//! Invariant: no byte of a batch is stored before its whole length has been reserved from a budget,
//! and urgent classes have a budget of their own that bulk cannot use up.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use quinn::{Connection, ReadError, ReadExactError, RecvStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::class::Class;
use crate::frame::{BATCH_HEAD, BatchHead, FrameError};
use crate::session::Link;

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
    ended: bool,
}

/// Complete batches that nobody has taken yet.
#[derive(Debug)]
pub(crate) struct Inbox {
    queues: Mutex<Queues>,
    changed: Notify,
    bulk: Arc<Semaphore>,
    urgent: Arc<Semaphore>,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self {
            queues: Mutex::default(),
            changed: Notify::new(),
            bulk: Arc::new(Semaphore::new(INBOUND_BULK_BYTES / GRAIN)),
            urgent: Arc::new(Semaphore::new(INBOUND_URGENT_BYTES / GRAIN)),
        }
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The most urgent complete batch; `None` once the connection ended and all were taken.
    pub(crate) async fn next(&self) -> Option<Batch> {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            {
                let mut queues = self.queues();
                let most_urgent = queues.arrived.iter_mut().rev().find_map(VecDeque::pop_front);
                if let Some((batch, _room)) = most_urgent {
                    return Some(batch);
                }
                if queues.ended {
                    return None;
                }
            }
            changed.await;
        }
    }

    fn push(&self, batch: Batch, room: OwnedSemaphorePermit) {
        self.queues().arrived[batch.class.index()].push_back((batch, room));
        self.changed.notify_waiters();
    }

    fn end(&self) {
        self.queues().ended = true;
        self.changed.notify_waiters();
    }

    /// Waits for room for a batch of `length` bytes; `None` if the connection ended meanwhile.
    async fn room(&self, class: Class, length: usize) -> Option<OwnedSemaphorePermit> {
        let budget = if class.is_urgent() { &self.urgent } else { &self.bulk };
        let grains = u32::try_from(length.div_ceil(GRAIN).max(1)).ok()?;
        budget.clone().acquire_many_owned(grains).await.ok()
    }
}

/// Receives batches until the connection ends. At most as many streams as QUIC lets the peer open
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
    // Whoever waits for room will not get the bytes any more.
    link.inbox.bulk.close();
    link.inbox.urgent.close();
    while readers.join_next().await.is_some() {}
    link.inbox.end();
}

async fn receive_one(mut stream: RecvStream, connection: Connection, link: Arc<Link>) {
    match read_batch(&mut stream, &link.inbox).await {
        Ok((batch, room)) => {
            link.counters.count_received(batch.class, batch.body.len());
            link.inbox.push(batch, room);
        }
        // A batch that its sender abandoned; nothing of it is kept.
        Err(ReadBatchError::Abandoned) => tracing::debug!("the peer abandoned a batch"),
        Err(ReadBatchError::Ended) => {}
        Err(ReadBatchError::Frame(error)) => link.violation(&connection, &error),
    }
}

enum ReadBatchError {
    Abandoned,
    Ended,
    Frame(FrameError),
}

impl From<ReadError> for ReadBatchError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(_) => Self::Abandoned,
            _ => Self::Ended,
        }
    }
}

async fn read_batch(
    stream: &mut RecvStream,
    inbox: &Inbox,
) -> Result<(Batch, OwnedSemaphorePermit), ReadBatchError> {
    let what = "batch";
    let mut head = [0; BATCH_HEAD];
    stream.read_exact(&mut head).await.map_err(|error| match error {
        ReadExactError::FinishedEarly(_) => ReadBatchError::Frame(FrameError::Truncated { what }),
        ReadExactError::ReadError(error) => error.into(),
    })?;
    let BatchHead { class, length } = BatchHead::decode(head).map_err(ReadBatchError::Frame)?;
    let room = inbox.room(class, length).await.ok_or(ReadBatchError::Ended)?;
    let mut body = BytesMut::with_capacity(length);
    while let Some(chunk) = stream.read_chunk(READ_AT_ONCE, true).await? {
        if chunk.bytes.len() > length - body.len() {
            return Err(ReadBatchError::Frame(FrameError::Trailing { what }));
        }
        body.extend_from_slice(&chunk.bytes);
    }
    if body.len() < length {
        return Err(ReadBatchError::Frame(FrameError::Truncated { what }));
    }
    Ok((Batch { class, body: body.freeze() }, room))
}

//! Receipts: what each end tells the other about what has arrived, on a stream of their own.
//!
//! Invariant: a batch is forgotten by its sender only when the receiver's session has it, not when
//! QUIC has; and a receipt is kept until the sender has it. So a lost connection loses no batch, and
//! none is handed out twice.
//!
//! They are an end's sign of life too: QUIC keeps a connection alive for a peer that does nothing any
//! more, and one that holds a session's memory for nothing is to be told from one whose batches wait.
//!
//! When a session goes on over another connection, each end first repeats the receipts that the other
//! does not have, and then says which parts of batches it holds ([`Receipt::Parts`]): what follows is
//! sent again from there.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quinn::{Connection, ReadExactError, RecvStream, SendStream};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, sleep_until};

use crate::frame::{FrameError, LENGTH_PREFIX, Receipt};
use crate::kept::Kept;
use crate::link::{Line, Link};

/// Receipts that the peer is not known to have. A peer that lets more gather does not read them.
const KEPT_MAX: usize = 1 << 14;
/// The peer is told how much has arrived after so many receipts.
const TELL_AFTER: u64 = 64;
/// Each end says something at least this often. Its batches may stand still for hours, where a cap is
/// shared with more urgent ones of other jobs.
const SAY: Duration = Duration::from_secs(20);
/// A peer that says nothing for so long, over a link that works and with room here for all that it has
/// sent, is dropped. Longer than any cut goes unnoticed ([`IDLE_TIMEOUT_MAX`](crate::IDLE_TIMEOUT_MAX)).
pub const STALL_TIMEOUT: Duration = Duration::from_secs(120);
/// Receipts written at a time.
const AT_ONCE: usize = 64;

/// The receipts of a session, whatever connection carries them.
#[derive(Debug)]
pub(crate) struct Receipts {
    /// Batches that arrived here, by number.
    arrived: Mutex<Kept<u64>>,
    /// Receipts for our batches that came.
    received: AtomicU64,
    /// The peer is to be told how much has arrived.
    due: Notify,
    /// To whoever writes on the connection of now.
    out: Mutex<Option<mpsc::UnboundedSender<Receipt>>>,
}

impl Receipts {
    pub(crate) fn new() -> Self {
        Self {
            arrived: Mutex::new(Kept::new("receipts")),
            received: AtomicU64::new(0),
            due: Notify::new(),
            out: Mutex::new(None),
        }
    }

    fn arrived(&self) -> MutexGuard<'_, Kept<u64>> {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn out(&self) -> MutexGuard<'_, Option<mpsc::UnboundedSender<Receipt>>> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Receipts that have come for what this end has sent.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Batch `number` is here: the peer is told, over this connection or the next.
    pub(crate) fn acknowledge(&self, number: u64) -> Result<(), FrameError> {
        let mut arrived = self.arrived();
        if arrived.len() >= KEPT_MAX {
            return Err(FrameError::Count { what: "receipts" });
        }
        arrived.push(number);
        self.send(Receipt::Batch(number));
        Ok(())
    }

    /// Has the peer told how much of what it sends in order is here, and how patient this end is.
    pub(crate) fn tell(&self) {
        self.due.notify_one();
    }

    fn send(&self, receipt: Receipt) {
        if let Some(out) = &*self.out() {
            // Without a writer there is no connection: the next one begins with all that is kept.
            let _ = out.send(receipt);
        }
    }

    /// Prepares a connection that takes the session on: what is to be written to it first.
    ///
    /// # Errors
    /// The peer cannot have `batches` receipts.
    pub(crate) fn go_on(&self, batches: u64, parts: Vec<(u64, u32)>) -> Result<Writer, FrameError> {
        let mut arrived = self.arrived();
        arrived.let_go(batches)?.for_each(drop);
        let writer = self.begin();
        for &number in arrived.iter() {
            self.send(Receipt::Batch(number));
        }
        self.send(Receipt::Parts(parts));
        Ok(writer)
    }

    /// Prepares the first connection.
    pub(crate) fn begin(&self) -> Writer {
        let (out, waiting) = mpsc::unbounded_channel();
        *self.out() = Some(out);
        Writer(waiting)
    }
}

/// What is to be written to a connection.
#[derive(Debug)]
pub(crate) struct Writer(mpsc::UnboundedReceiver<Receipt>);

impl Writer {
    /// Writes receipts for as long as it is polled, also when the connection is lost: who reads from it
    /// notices that.
    pub(crate) async fn run(mut self, link: &Link, mut stream: SendStream) -> Infallible {
        let mut receipts = Vec::new();
        // At once, so that the peer sees the stream.
        link.receipts.tell();
        loop {
            tokio::select! {
                biased;
                1.. = self.0.recv_many(&mut receipts, AT_ONCE) => {}
                () = link.receipts.due.notified() => receipts.push(link.seen_receipt()),
                () = sleep(SAY) => receipts.push(link.seen_receipt()),
            }
            let bytes: Vec<u8> = receipts.drain(..).flat_map(|one| one.encode()).collect();
            if stream.write_all(&bytes).await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}

/// Takes the peer's receipts until the connection is lost. If the session `goes_on` over this one, it
/// is up once the peer has said what parts it holds.
pub(crate) async fn read(link: &Link, line: &Arc<Line>, stream: RecvStream, goes_on: bool) {
    if let Err(error) = read_all(link, line, stream, goes_on).await {
        link.violation(&line.connection, &error);
    }
}

async fn read_all(
    link: &Link,
    line: &Arc<Line>,
    mut stream: RecvStream,
    mut goes_on: bool,
) -> Result<(), FrameError> {
    let receipts = &link.receipts;
    let mut told = receipts.received();
    while let Some(receipt) = in_time(link, next(&mut stream)).await?? {
        match receipt {
            Receipt::Batch(number) => {
                let received = receipts.received.fetch_add(1, Ordering::Relaxed) + 1;
                link.outbox.arrived(number);
                if received - told >= TELL_AFTER {
                    told = received;
                    receipts.tell();
                }
            }
            Receipt::Seen(seen, patience_ms, is_full) => {
                link.set_peer_full(is_full);
                link.set_peer_patience(Duration::from_millis(patience_ms));
                link.messages.seen(seen.messages)?;
                receipts.arrived().let_go(seen.batches)?.for_each(drop);
            }
            Receipt::Parts(parts) if std::mem::take(&mut goes_on) => {
                for number in link.outbox.go_on_from(&parts) {
                    receipts.send(Receipt::Dropped(number));
                }
                link.up(line);
            }
            Receipt::Parts(_) => return Err(FrameError::Count { what: "parts" }),
            Receipt::Dropped(number) => link.inbox.drop_part(number),
        }
    }
    Ok(())
}

/// The next receipt; `None` once the connection is lost.
async fn next(stream: &mut RecvStream) -> Result<Option<Receipt>, FrameError> {
    let mut prefix = [0; LENGTH_PREFIX];
    if !filled(stream.read_exact(&mut prefix).await)? {
        return Ok(None);
    }
    let mut frame = vec![0; Receipt::length(prefix)?];
    if !filled(stream.read_exact(&mut frame).await)? {
        return Ok(None);
    }
    Receipt::decode(&frame).map(Some)
}

fn filled(read: Result<(), ReadExactError>) -> Result<bool, FrameError> {
    match read {
        Ok(()) => Ok(true),
        Err(ReadExactError::ReadError(quinn::ReadError::ConnectionLost(_))) => Ok(false),
        // The stream lives as long as its connection.
        Err(_) => Err(FrameError::Truncated { what: "receipt" }),
    }
}

/// What comes of `waiting`, if the peer does not stall.
async fn in_time<T>(link: &Link, waiting: impl Future<Output = T>) -> Result<T, FrameError> {
    let mut waiting = pin!(waiting);
    let mut since = Instant::now();
    loop {
        tokio::select! {
            biased;
            done = &mut waiting => return Ok(done),
            () = sleep_until(since + STALL_TIMEOUT) => {}
        }
        match link.inbox.was_full() {
            Some(full) if full > since => since = full,
            _ => return Err(FrameError::Silent { seconds: STALL_TIMEOUT.as_secs() }),
        }
    }
}

/// The stream of receipts of a connection, opened by the side that opened the connection; `None` if
/// there will be none.
pub(crate) async fn open(
    link: &Link,
    connection: &Connection,
    is_dialer: bool,
) -> Option<(SendStream, RecvStream)> {
    let opening =
        async { if is_dialer { connection.open_bi().await } else { connection.accept_bi().await } };
    match in_time(link, opening).await {
        Ok(opened) => {
            let (send, recv) = opened.ok()?;
            // Fails only if the stream is closed; what is written then says so.
            let _ = send.set_priority(crate::control::CONTROL_PRIORITY);
            Some((send, recv))
        }
        Err(error) => {
            link.violation(connection, &error);
            None
        }
    }
}

//! Keeps a session on a connection: one after another, until it ends.
//!
//! Invariant: what has arrived is counted only when nothing is under way on the old connection any
//! more, so both ends agree on where the next one goes on.
//!
//! The side that connected connects again; the other waits for it. A link that fell silent is not
//! waited for until QUIC gives it up: another connection is tried beside it, and whichever is heard
//! first carries the session.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::close::{CloseCode, CloseReason};
use crate::control::Messages;
use crate::dial::Dial;
use crate::endpoint::HANDSHAKE_TIMEOUT;
use crate::fingerprint::Fingerprint;
use crate::frame::{Hello, Seen, SessionId};
use crate::greeting::{self, GreetingError};
use crate::inbox;
use crate::link::{Line, Link};
use crate::pace::Place;
use crate::receipts::{self, Writer};
use crate::tls::Presented;

/// Silence, after something was asked, from which another connection is tried: at least so long, and
/// so many round trips.
const SILENCE: Duration = Duration::from_secs(2);
const SILENCE_ROUNDS: u32 = 4;
/// How often it is looked whether something was heard.
const LISTEN: Duration = Duration::from_millis(250);
/// Between two tries that fail at once.
const TRY_WAIT: Duration = Duration::from_millis(500);

/// Sessions that one peer may have opened, lanes counted: with what each may hold, the bound on what it
/// can cost.
pub const MAX_SESSIONS_OF_A_PEER: usize = 64;

/// A connection of a session and what runs on it.
pub(crate) struct Streams {
    pub(crate) line: Arc<Line>,
    pub(crate) control: (SendStream, RecvStream),
    pub(crate) receipts: Writer,
    /// Messages that the peer has, if it has taken the session on here.
    pub(crate) goes_on: Option<u64>,
}

/// A connection on which the peer wants to go on with a session.
pub(crate) struct Arrival {
    pub(crate) made: (Connection, Arc<Place>),
    pub(crate) control: (SendStream, RecvStream),
    /// What the peer has.
    pub(crate) seen: Seen,
    /// The greeting that is still to be answered, but for what is here.
    pub(crate) answer: Hello,
}

/// Which side of the session this is.
pub(crate) enum Role {
    /// The side that connects.
    Dialer(Dial),
    /// The side that is connected to.
    Listener(Registered),
}

/// The sessions of the peers that connect to an endpoint, and their lanes, for as long as each lives.
#[derive(Debug, Default)]
pub(crate) struct Registry(Mutex<HashMap<(Fingerprint, SessionId), Entry>>);

#[derive(Debug)]
struct Entry {
    arrive: mpsc::Sender<Arrival>,
    /// Dead until the session has begun.
    link: Weak<Link>,
}

impl Registry {
    fn sessions(&self) -> MutexGuard<'_, HashMap<(Fingerprint, SessionId), Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a session; `None` if there is one of that name, or too many of that peer.
    pub(crate) fn enter(self: &Arc<Self>, peer: Fingerprint, id: SessionId) -> Option<Registered> {
        let mut sessions = self.sessions();
        let theirs = sessions.keys().filter(|(known, _)| *known == peer).count();
        if theirs >= MAX_SESSIONS_OF_A_PEER || sessions.contains_key(&(peer, id)) {
            return None;
        }
        let (arrive, arrivals) = mpsc::channel(1);
        sessions.insert((peer, id), Entry { arrive, link: Weak::new() });
        Some(Registered { registry: self.clone(), name: (peer, id), arrivals })
    }

    /// Whom to give a connection that takes a session on; `None` if there is no such session.
    pub(crate) fn find(&self, peer: Fingerprint, id: SessionId) -> Option<mpsc::Sender<Arrival>> {
        self.sessions().get(&(peer, id)).map(|entry| entry.arrive.clone())
    }

    /// The session of that name, if it has begun.
    pub(crate) fn session(&self, peer: Fingerprint, id: SessionId) -> Option<Arc<Link>> {
        self.sessions().get(&(peer, id))?.link.upgrade()
    }
}

/// A session's entry in the registry; leaves it when dropped.
pub(crate) struct Registered {
    registry: Arc<Registry>,
    name: (Fingerprint, SessionId),
    arrivals: mpsc::Receiver<Arrival>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.registry.sessions().remove(&self.name);
    }
}

/// What may carry the session on.
enum Candidate {
    Dialed((Connection, Arc<Place>)),
    Arrived(Arrival),
}

impl Candidate {
    fn connection(&self) -> &Connection {
        match self {
            Self::Dialed((connection, _)) => connection,
            Self::Arrived(arrival) => &arrival.made.0,
        }
    }
}

/// Why a connection is left.
enum Left {
    /// The session has ended.
    Ended,
    /// QUIC has given it up, or the peer has left it.
    Lost(ConnectionError),
    /// Here is a better one.
    For(Candidate),
}

/// Why a candidate does not carry the session.
enum Unfit {
    /// Another may.
    Lost,
    /// None will.
    Refused(CloseReason),
    /// The session has ended.
    Ended,
}

/// What reads and writes on a connection.
struct Work {
    batches: JoinHandle<()>,
    receipts: JoinHandle<()>,
    messages: JoinHandle<()>,
    writing: AbortHandle,
}

impl Work {
    fn begin(link: &Arc<Link>, streams: Streams, is_dialer: bool) -> Self {
        let Streams { line, control: (mut send, recv), receipts: writer, goes_on } = streams;
        let connection = line.connection.clone();
        let batches = tokio::spawn(inbox::receive(connection.clone(), link.clone()));
        let messages = tokio::spawn({
            let link = link.clone();
            async move { Messages::read(&link, &connection, recv).await }
        });
        let writing = tokio::spawn({
            let link = link.clone();
            async move { link.messages.write(&mut send, goes_on.unwrap_or(0)).await }
        });
        let receipts = tokio::spawn({
            let link = link.clone();
            async move {
                let opened = receipts::open(&link, &line.connection, is_dialer).await;
                let Some((send, recv)) = opened else { return };
                // Ends with the reader, which takes in all that has come.
                tokio::select! {
                    biased;
                    () = receipts::read(&link, &line, recv, goes_on.is_some()) => {}
                    never = writer.run(&link, send) => match never {},
                }
            }
        });
        Self { batches, receipts, messages, writing: writing.abort_handle() }
    }

    /// Ends what runs on a connection that is closed, with all that it has brought taken in, except
    /// messages for which there is no room: returns what still takes them.
    async fn stop(self) -> JoinHandle<()> {
        self.writing.abort();
        // Each ends by itself: its connection is gone.
        let _ = self.batches.await;
        let _ = self.receipts.await;
        self.messages
    }
}

/// Keeps the session until it ends.
pub(crate) async fn keep(link: Arc<Link>, mut role: Role, first: Streams) {
    let mut streams = first;
    loop {
        let line = streams.line.clone();
        let goes_on = streams.goes_on.is_some();
        let is_dialer = matches!(role, Role::Dialer(_));
        let work = Work::begin(&link, streams, is_dialer);
        let left = role.watch(&link, &line, goes_on).await;
        link.part(&line.connection);
        leave(&line.connection);
        let messages = work.stop().await;
        let candidate = match left {
            Left::Ended => None,
            Left::Lost(error) => role.find_another(&link, &error).await,
            Left::For(candidate) => Some(candidate),
        };
        let Some(candidate) = candidate else {
            link.inbox.end();
            // Ends when all that came has found room.
            let _ = messages.await;
            break;
        };
        messages.abort();
        let _ = messages.await;
        let Some(next) = role.take_on(&link, candidate).await else { break };
        streams = next;
    }
    link.inbox.end();
    link.messages.end();
}

impl Role {
    /// Waits until the connection is to be left.
    async fn watch(&mut self, link: &Link, line: &Line, goes_on: bool) -> Left {
        tokio::select! {
            biased;
            _ = link.ended() => Left::Ended,
            error = line.connection.closed() => Left::Lost(error),
            candidate = self.better(link, line) => match candidate {
                Ok(candidate) => Left::For(candidate),
                Err(reason) => {
                    link.end(reason);
                    Left::Ended
                }
            },
            () = never_up(link, line), if goes_on => Left::Lost(ConnectionError::TimedOut),
        }
    }

    /// Waits for a connection that is better than `line`, which still lives.
    async fn better(&mut self, link: &Link, line: &Line) -> Result<Candidate, CloseReason> {
        let dial = match self {
            Self::Listener(listening) => return Ok(listening.next().await),
            Self::Dialer(dial) => dial,
        };
        loop {
            link.set_silent(Some(silence(link, line).await));
            tracing::info!(
                peer = %line.connection.remote_address(),
                "the link is silent, another connection is tried"
            );
            tokio::select! {
                biased;
                () = heard(line) => link.set_silent(None),
                made = redial(dial, line) => return made.map(Candidate::Dialed),
            }
        }
    }

    /// Waits for a connection after one was lost, for as long as the session has patience. Ends the
    /// session if there will be none.
    async fn find_another(&mut self, link: &Link, error: &ConnectionError) -> Option<Candidate> {
        let lost = CloseReason::from_quic(error, None);
        let replaced = is_closed_with(error, CloseCode::Replaced);
        let least = if replaced { HANDSHAKE_TIMEOUT } else { Duration::ZERO };
        let may_return =
            replaced || (lost.is_retryable() && !matches!(lost, CloseReason::Shutdown { .. }));
        let patience = least.max(link.patience());
        if !may_return || patience.is_zero() {
            link.end(lost);
            return None;
        }
        link.down();
        let line = link.line();
        let since = Instant::now();
        let candidate = async {
            match self {
                Self::Listener(listening) => Ok(listening.next().await),
                Self::Dialer(dial) => redial(dial, &line).await.map(Candidate::Dialed),
            }
        };
        tokio::select! {
            biased;
            _ = link.ended() => None,
            candidate = candidate => candidate.map_err(|reason| link.end(reason)).ok(),
            () = link.out_of_patience(since, least) => {
                link.end(lost);
                None
            }
        }
    }

    /// Agrees with the peer on where to go on; looks for another connection if this one is lost over
    /// it. Ends the session if there will be none.
    async fn take_on(&mut self, link: &Arc<Link>, candidate: Candidate) -> Option<Streams> {
        link.down();
        let mut candidate = candidate;
        loop {
            let connection = candidate.connection().clone();
            let greeted = tokio::select! {
                biased;
                _ = link.ended() => Err(Unfit::Ended),
                greeted = self.greet(link, candidate) => greeted,
            };
            match greeted {
                Ok(streams) => return Some(streams),
                Err(Unfit::Lost) => {
                    leave(&connection);
                    candidate = self.find_another(link, &ConnectionError::TimedOut).await?;
                }
                Err(unfit) => {
                    if let Unfit::Refused(reason) = unfit {
                        link.end(reason);
                    }
                    link.part(&connection);
                    return None;
                }
            }
        }
    }

    async fn greet(&self, link: &Link, candidate: Candidate) -> Result<Streams, Unfit> {
        let seen = link.seen();
        let (made, control, theirs) = match (candidate, self) {
            (Candidate::Dialed(made), Self::Dialer(dial)) => {
                let hello = dial.hello(Some(seen));
                let greeting = timeout(HANDSHAKE_TIMEOUT, greeting::connect(&made.0, &hello));
                let greeted = greeting.await.map_err(|_| Unfit::Lost)?;
                let (send, recv, hello) = greeted.map_err(|error| dial.unfit(error))?;
                let theirs = hello.goes_on.ok_or(Unfit::Refused(CloseReason::Forgotten))?;
                (made, (send, recv), theirs)
            }
            (Candidate::Arrived(arrival), _) => {
                let Arrival { made, control: (mut send, recv), seen: theirs, answer } = arrival;
                let hello = Hello { goes_on: Some(seen), ..answer };
                greeting::answer(&mut send, &hello).await.map_err(|_| Unfit::Lost)?;
                (made, (send, recv), theirs)
            }
            (Candidate::Dialed(_), Self::Listener(_)) => return Err(Unfit::Lost),
        };
        let agreed = link
            .messages
            .seen(theirs.messages)
            .and_then(|()| link.receipts.go_on(theirs.batches, link.inbox.list_parts()));
        match agreed {
            Ok(receipts) => {
                let line = Arc::new(link.line().next(made));
                Ok(Streams { line, control, receipts, goes_on: Some(theirs.messages) })
            }
            Err(error) => {
                link.violation(&made.0, &error);
                Err(Unfit::Ended)
            }
        }
    }
}

impl Dial {
    fn unfit(&self, error: GreetingError) -> Unfit {
        match error {
            GreetingError::Lost(error) if is_closed_with(&error, CloseCode::Forgotten) => {
                Unfit::Refused(CloseReason::Forgotten)
            }
            GreetingError::Lost(_) | GreetingError::Stream => Unfit::Lost,
            error => {
                let error = self.failed(&Presented::default(), error);
                Unfit::Refused(CloseReason::Transport { detail: error.to_string() })
            }
        }
    }
}

/// Leaves a connection, but not the session.
fn leave(connection: &Connection) {
    connection.close(CloseCode::Replaced.value(), b"the session goes on over another connection");
}

fn is_closed_with(error: &ConnectionError, code: CloseCode) -> bool {
    matches!(error, ConnectionError::ApplicationClosed(close) if close.error_code == code.value())
}

impl Registered {
    /// The session has begun.
    pub(crate) fn begun(&self, link: &Arc<Link>) {
        if let Some(entry) = self.registry.sessions().get_mut(&self.name) {
            entry.link = Arc::downgrade(link);
        }
    }

    async fn next(&mut self) -> Candidate {
        match self.arrivals.recv().await {
            Some(arrival) => Candidate::Arrived(arrival),
            // The registry keeps the sender for as long as this lives.
            None => std::future::pending().await,
        }
    }
}

/// Connects anew, as often as it takes.
async fn redial(dial: &Dial, line: &Line) -> Result<(Connection, Arc<Place>), CloseReason> {
    loop {
        let began = Instant::now();
        match dial.again(line).await {
            Ok(made) => return Ok(made),
            Err(error) if error.is_retryable() => {
                tracing::debug!(%error, "the session has no connection yet");
                sleep_until(began + TRY_WAIT).await;
            }
            Err(error) => return Err(CloseReason::Transport { detail: error.to_string() }),
        }
    }
}

/// Waits until the peer owes an answer for too long, and the session has the patience to try another
/// connection. Says since when it does.
async fn silence(link: &Link, line: &Line) -> Instant {
    let (mut heard, mut said) = packets(line);
    let mut asked: Option<Instant> = None;
    loop {
        sleep(LISTEN).await;
        let now = packets(line);
        if now.0 != heard {
            (heard, said, asked) = (now.0, now.1, None);
        } else if now.1 != said {
            asked.get_or_insert_with(Instant::now);
        }
        let rtt = line.connection.rtt();
        let limit = SILENCE.max(rtt * SILENCE_ROUNDS);
        let since = asked.filter(|asked| asked.elapsed() >= limit);
        if let Some(since) = since.filter(|_| !link.patience().is_zero()) {
            return since;
        }
    }
}

/// Waits until something is heard.
async fn heard(line: &Line) {
    let (before, _) = packets(line);
    while packets(line).0 == before {
        sleep(LISTEN).await;
    }
}

/// Datagrams that came and went.
fn packets(line: &Line) -> (u64, u64) {
    let stats = line.connection.stats();
    (stats.udp_rx.datagrams, stats.udp_tx.datagrams)
}

/// Waits for as long as a session that goes on may need to be up.
async fn never_up(link: &Link, line: &Line) {
    loop {
        sleep(HANDSHAKE_TIMEOUT).await;
        if !link.is_up_on(line) {
            return;
        }
    }
}

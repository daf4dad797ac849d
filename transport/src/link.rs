//! What the tasks of a session share, and how it stands: over which connection, or over none.
//!
//! Invariant: a session ends once and for one reason; until then it has a connection, or waits for
//! the next one. Everything here outlives a connection.

use std::sync::Arc;
use std::time::Duration;

use quinn::Connection;
use tokio::time::{Instant, sleep_until};

use crate::close::{CloseCode, CloseReason, short};
use crate::control::Messages;
use crate::frame::{FrameError, Receipt, Seen};
use crate::home::Home;
use crate::inbox::Inbox;
use crate::lanes::Lanes;
use crate::outbox::Outbox;
use crate::pace::{Pacing, Place};
use crate::rate::{JobRate, RateLimiter};
use crate::receipts::Receipts;
use crate::stats::{Counters, PathStats, Totals};
use crate::watched::Watched;

/// One connection of a session.
#[derive(Debug)]
pub(crate) struct Line {
    /// Its place among the session's connections, from 0.
    pub(crate) number: u64,
    pub(crate) connection: Connection,
    pub(crate) pacing: Pacing,
}

impl Line {
    /// A session's first connection, with its place at the socket.
    pub(crate) fn first(connection: Connection, place: Arc<Place>) -> Self {
        let pacing = Pacing::new(place);
        pacing.follow(&connection);
        Self { number: 0, connection, pacing }
    }

    /// The connection after this one.
    pub(crate) fn next(&self, (connection, place): (Connection, Arc<Place>)) -> Self {
        Self { number: self.number + 1, ..Self::first(connection, place) }
    }
}

/// How a session stands.
#[derive(Debug)]
enum Standing {
    Up,
    /// Since then. Another connection is awaited.
    Down(Instant),
    Ended(CloseReason, CloseCode),
}

#[derive(Debug)]
struct State {
    line: Arc<Line>,
    standing: Standing,
    /// Since when nothing is heard where something should be.
    silent: Option<Instant>,
    /// How long this end would be without a connection, and the peer.
    patience: [Duration; 2],
    /// What the connections before this one have cost.
    past: Totals,
    /// The caps under which is sent.
    rate: JobRate,
    /// Whether what is sent yields to others.
    background: bool,
    /// Whether a core is what limits the peer.
    peer_is_full: bool,
}

impl State {
    fn patience(&self) -> Duration {
        let [own, peer] = self.patience;
        own.min(peer)
    }

    fn end_reason(&self) -> Option<CloseReason> {
        match &self.standing {
            Standing::Ended(reason, _) => Some(reason.clone()),
            Standing::Up | Standing::Down(_) => None,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Link {
    /// Where all that has to do with packets runs.
    pub(crate) home: Arc<Home>,
    state: Watched<State>,
    pub(crate) messages: Messages,
    pub(crate) receipts: Receipts,
    pub(crate) inbox: Inbox,
    pub(crate) outbox: Outbox,
    pub(crate) counters: Counters,
    /// Its lanes; none if it is one.
    pub(crate) lanes: Lanes,
    is_lane: bool,
    /// Send and receive window of a connection.
    pub(crate) connection_window: u64,
}

impl Link {
    pub(crate) fn new(
        home: Arc<Home>,
        line: Arc<Line>,
        messages: Messages,
        connection_window: u64,
    ) -> Self {
        let state = State {
            line,
            standing: Standing::Up,
            silent: None,
            patience: [Duration::ZERO; 2],
            past: Totals::default(),
            rate: RateLimiter::new().job(),
            background: false,
            peer_is_full: false,
        };
        Self {
            home,
            state: Watched::new(state),
            messages,
            receipts: Receipts::new(),
            inbox: Inbox::new(),
            outbox: Outbox::new(),
            counters: Counters::default(),
            lanes: Lanes::default(),
            is_lane: false,
            connection_window,
        }
    }

    /// One that carries batches for this one, at a home of its own.
    pub(crate) fn lane(&self, home: Arc<Home>, line: Arc<Line>) -> Self {
        // Nobody listens to its messages: there are none.
        let (messages, _) = Messages::new();
        line.pacing.live_at(&home);
        Self {
            inbox: self.inbox.of_a_lane(),
            is_lane: true,
            ..Self::new(home, line, messages, self.connection_window)
        }
    }

    /// Sends as `other` is to: under its caps, in the background or not, with its patience.
    pub(crate) fn go_as(&self, other: &Self) {
        let (rate, background, patience) = {
            let state = other.state.lock();
            (state.rate.clone(), state.background, state.patience[0])
        };
        self.set_rate(rate);
        self.set_background(background);
        self.set_patience(patience);
    }

    /// The newest connection, whether it still lives or not.
    pub(crate) fn line(&self) -> Arc<Line> {
        self.state.lock().line.clone()
    }

    /// A connection that works, other than the one of number `tried`.
    pub(crate) async fn line_after(&self, tried: Option<u64>) -> Result<Arc<Line>, CloseReason> {
        let line = |state: &mut State| match &state.standing {
            Standing::Up if Some(state.line.number) != tried => Some(Ok(state.line.clone())),
            Standing::Up | Standing::Down(_) => None,
            Standing::Ended(reason, _) => Some(Err(reason.clone())),
        };
        self.state.until(line).await
    }

    /// Why the session has ended, once it has.
    pub(crate) async fn ended(&self) -> CloseReason {
        self.state.until(|state| state.end_reason()).await
    }

    /// Why the session has ended, if it has.
    pub(crate) fn end_reason(&self) -> Option<CloseReason> {
        self.state.lock().end_reason()
    }

    /// For how long the link has been silent, or there has been no connection.
    pub(crate) fn down_for(&self) -> Option<Duration> {
        let state = self.state.lock();
        match state.standing {
            Standing::Down(since) => Some(since.elapsed()),
            Standing::Up => Some(state.silent?.elapsed()),
            Standing::Ended(..) => None,
        }
    }

    /// Nothing is heard where something should be, since then; or something is again.
    pub(crate) fn set_silent(&self, since: Option<Instant>) {
        self.stand(|state| state.silent = since);
    }

    /// True while `line` is the one that carries the session.
    pub(crate) fn is_up_on(&self, line: &Line) -> bool {
        let state = self.state.lock();
        matches!(state.standing, Standing::Up) && state.line.number == line.number
    }

    /// Changes how an open session stands.
    fn stand(&self, change: impl FnOnce(&mut State)) {
        self.state.change(|state| {
            if state.end_reason().is_none() {
                change(state);
            }
        });
    }

    /// The session goes on over `line`.
    pub(crate) fn up(&self, line: &Arc<Line>) {
        if self.is_lane {
            line.pacing.live_at(&self.home);
        }
        self.stand(|state| {
            line.pacing.set_rate(state.rate.clone());
            line.pacing.set_background(state.background);
            state.past.add(&state.line.connection);
            state.past.connections += 1;
            state.line = line.clone();
            state.standing = Standing::Up;
            state.silent = None;
        });
    }

    /// There is no connection, until another one takes the session on.
    pub(crate) fn down(&self) {
        self.stand(|state| {
            if matches!(state.standing, Standing::Up) {
                let since = state.silent.unwrap_or_else(Instant::now);
                state.standing = Standing::Down(since);
            }
        });
    }

    /// Ends as `other` has ended, if it has.
    pub(crate) fn end_as(&self, other: &Self) {
        let ended = match &other.state.lock().standing {
            Standing::Ended(reason, code) => Some((*code, reason.clone())),
            Standing::Up | Standing::Down(_) => None,
        };
        if let Some((code, reason)) = ended {
            self.end_with(code, reason);
        }
    }

    /// Ends the session, unless it has ended for another reason already.
    pub(crate) fn end(&self, reason: CloseReason) {
        self.end_with(CloseCode::Shutdown, reason);
    }

    /// Ends the session and tells the peer.
    pub(crate) fn end_with(&self, code: CloseCode, reason: CloseReason) {
        self.stand(|state| state.standing = Standing::Ended(reason, code));
        self.part(&self.line().connection);
    }

    /// Ends the session because the peer broke the protocol.
    pub(crate) fn violation(&self, connection: &Connection, error: &FrameError) {
        let detail = error.to_string();
        tracing::warn!(peer = %connection.remote_address(), %detail, "the peer broke the protocol");
        self.end_with(CloseCode::Violation, CloseReason::Violation { detail });
        self.part(connection);
    }

    /// Closes a connection of a session that has ended, with the words that it ended with.
    pub(crate) fn part(&self, connection: &Connection) {
        if let Standing::Ended(reason, code) = &self.state.lock().standing {
            let said = match reason {
                CloseReason::Local { reason } => reason.clone(),
                CloseReason::Violation { detail } => detail.clone(),
                other => other.to_string(),
            };
            connection.close(code.value(), short(&said).as_bytes());
        }
    }

    /// How long the session may be without a connection: as long as both ends would.
    pub(crate) fn patience(&self) -> Duration {
        self.state.lock().patience()
    }

    /// What the peer is told about how much is here, and how long this end would be without a connection.
    pub(crate) fn seen_receipt(&self) -> Receipt {
        let patience = self.state.lock().patience[0];
        let patience = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        Receipt::Seen(self.seen(), patience, self.is_full())
    }

    /// Whether a core is what limits the session here: none of its connections has one to spare.
    pub(crate) fn is_full(&self) -> bool {
        self.home.is_full() && self.lanes.all().iter().all(|lane| lane.home.is_full())
    }

    /// Whether the peer has said that of itself.
    pub(crate) fn is_peer_full(&self) -> bool {
        self.state.lock().peer_is_full
    }

    pub(crate) fn set_peer_full(&self, is_full: bool) {
        self.state.lock().peer_is_full = is_full;
    }

    pub(crate) fn set_patience(&self, patience: Duration) {
        self.stand(|state| state.patience[0] = patience);
        self.receipts.tell();
    }

    pub(crate) fn set_peer_patience(&self, patience: Duration) {
        // It is told again and again, and rarely something new.
        if self.state.lock().patience[1] == patience {
            return;
        }
        self.stand(|state| state.patience[1] = patience);
    }

    /// Waits until the session has been without a connection since `since` for as long as its patience
    /// lasts, and for `least`.
    pub(crate) async fn out_of_patience(&self, since: Instant, least: Duration) {
        loop {
            let patience = self.patience();
            tokio::select! {
                biased;
                () = sleep_until(since + patience.max(least)) => return,
                () = self.state.until(|state| (state.patience() != patience).then_some(())) => {}
            }
        }
    }

    /// What has arrived of what the peer sends in order.
    pub(crate) fn seen(&self) -> Seen {
        Seen { messages: self.messages.received(), batches: self.receipts.received() }
    }

    pub(crate) fn rate(&self) -> JobRate {
        self.state.lock().rate.clone()
    }

    pub(crate) fn set_rate(&self, rate: JobRate) {
        let mut state = self.state.lock();
        state.line.pacing.set_rate(rate.clone());
        state.rate = rate;
    }

    pub(crate) fn set_background(&self, background: bool) {
        let mut state = self.state.lock();
        state.line.pacing.set_background(background);
        state.background = background;
    }

    /// What this connection, and those before it, have cost and carried.
    pub(crate) fn stats(&self) -> PathStats {
        let state = self.state.lock();
        self.counters.snapshot(state.past, &state.line)
    }
}

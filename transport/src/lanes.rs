//! Lanes: more connections of a session, each with a thread of its own, where one core is the limit.
//!
//! Invariant: a lane carries bulk and nothing else, under the session's caps and into the session's
//! inbox, so nobody can tell which connection has brought a batch. A lane ends with its session, and
//! the session with any of its lanes.
//!
//! A session whose thread has time to spare has none: several connections take several shares of a link.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream};
use tokio::time::{sleep, timeout};

use crate::class::Class;
use crate::close::CloseReason;
use crate::dial::Dial;
use crate::endpoint::HANDSHAKE_TIMEOUT;
use crate::errors::ConnectError;
use crate::keeper::{self, Role, Streams};
use crate::link::{Line, Link};
use crate::pace::Place;
use crate::stats::PathStats;

/// Most lanes of a session.
pub const LANES_MAX: usize = 3;
/// How often it is looked whether one more is needed.
const LOOK: Duration = Duration::from_secs(1);
/// After one was opened, until it has shown what it brings; and after a try that failed.
const SETTLE: Duration = Duration::from_secs(5);
const TRY_WAIT: Duration = Duration::from_secs(30);
/// Wire bytes a second from which on a session may be what keeps its thread busy.
const BUSY_RATE: u64 = 8 * 1024 * 1024;

/// A session's lanes, for as long as the session is known.
#[derive(Debug, Default)]
pub(crate) struct Lanes {
    links: Mutex<Vec<Arc<Link>>>,
    /// One is opened at a time: one that the peer has and this end has no room for would end the session.
    opening: tokio::sync::Mutex<()>,
}

impl Lanes {
    fn lanes(&self) -> MutexGuard<'_, Vec<Arc<Link>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn all(&self) -> Vec<Arc<Link>> {
        self.lanes().clone()
    }

    /// Whether there may be another one.
    pub(crate) fn has_room(&self) -> bool {
        self.lanes().len() < LANES_MAX
    }

    /// Adds a lane of `main`, which sends as that one does; `false` if there are too many already.
    fn add(&self, main: &Link, lane: &Arc<Link>) -> bool {
        // Whoever changes how the session sends changes the first connection, then those that are here.
        let mut lanes = self.lanes();
        if lanes.len() == LANES_MAX {
            return false;
        }
        lane.go_as(main);
        lanes.push(lane.clone());
        true
    }
}

impl Link {
    /// Changes how this connection sends, and its lanes do.
    pub(crate) fn change_all(&self, change: impl Fn(&Self)) {
        change(self);
        self.lanes.lanes().iter().for_each(|lane| change(lane));
    }

    /// For how long the longest silent or lost of its connections has been so, if any is.
    pub(crate) fn any_down_for(&self) -> Option<Duration> {
        let lanes = self.lanes.all();
        let lanes = lanes.iter().filter_map(|lane| lane.down_for());
        lanes.chain(self.down_for()).max()
    }

    /// What is to carry a batch: for bulk, whichever connection has the least to do.
    pub(crate) fn carrier(self: &Arc<Self>, class: Class) -> Arc<Self> {
        if class.is_urgent() {
            return self.clone();
        }
        let lanes = self.lanes.lanes();
        let able = lanes.iter().filter(|lane| lane.can_carry());
        able.chain([self]).min_by_key(|link| link.outbox.load()).unwrap_or(self).clone()
    }

    fn can_carry(&self) -> bool {
        self.end_reason().is_none() && self.down_for().is_none()
    }

    /// What the session has cost and carried, over all its connections.
    pub(crate) fn stats_of_all(&self) -> PathStats {
        self.lanes.all().iter().fold(self.stats(), |sum, lane| sum.beside(&lane.stats()))
    }
}

/// Makes a connection whose greeting is done a lane of `main`. It is dropped if there are too many.
///
/// # Errors
/// It cannot have a thread.
pub(crate) fn begin(
    main: &Arc<Link>,
    (connection, place): (Connection, Arc<Place>),
    control: (SendStream, RecvStream),
    role: Role,
) -> io::Result<()> {
    let line = Arc::new(Line::first(connection, place));
    let lane = Arc::new(main.lane(main.home.one_more()?, line.clone()));
    if !main.lanes.add(main, &lane) {
        return Ok(());
    }
    let receipts = lane.receipts.begin();
    let streams = Streams { line, control, receipts, goes_on: None };
    lane.home.spawn(keeper::keep(lane.clone(), role, streams));
    main.home.spawn(stand_and_fall(main.clone(), lane));
    tracing::info!(
        connections = main.lanes.lanes().len() + 1,
        "one core is the limit: the session goes on over one more connection"
    );
    Ok(())
}

/// Ends the lane with its session, and the session with its lane.
async fn stand_and_fall(main: Arc<Link>, lane: Arc<Link>) {
    let reason = tokio::select! {
        biased;
        _ = main.ended() => return lane.end_as(&main),
        reason = lane.ended() => reason,
    };
    if !matches!(reason, CloseReason::Violation { .. }) {
        // A peer ends one connection after another, and its last words come over the first one.
        let _ = timeout(HANDSHAKE_TIMEOUT, main.ended()).await;
    }
    main.end(reason);
}

/// Opens a lane when a core is the limit, at this end or the other, until there are `most`. Without
/// `dial` only tells the peer that it is.
pub(crate) async fn watch(main: Arc<Link>, dial: Option<Dial>, most: usize) {
    let (mut told, mut before) = (false, 0);
    let mut wait = LOOK;
    loop {
        tokio::select! {
            biased;
            _ = main.ended() => return,
            () = sleep(wait) => {}
        }
        wait = LOOK;
        let is_full = main.is_full();
        if is_full != told {
            main.receipts.tell();
            told = is_full;
        }
        let stats = main.stats_of_all();
        let wire = stats.wire_bytes_sent + stats.wire_bytes_received;
        let is_busy = wire.saturating_sub(before) >= BUSY_RATE;
        before = wire;
        let has_room = main.lanes.all().len() < most.min(LANES_MAX);
        let Some(dial) = &dial else { continue };
        if is_busy && has_room && (is_full || main.is_peer_full()) {
            let opened = open(&main, dial).await;
            wait = if opened.is_ok() { SETTLE } else { TRY_WAIT };
            if let Err(error) = opened {
                tracing::debug!(%error, "no further connection could be opened");
            }
        }
    }
}

/// Opens one more lane of the session that `of` has begun.
pub(crate) async fn open(main: &Arc<Link>, of: &Dial) -> Result<(), ConnectError> {
    let failed = |detail| {
        let reason = CloseReason::Transport { detail };
        ConnectError::Failed { addr: of.addr, reason }
    };
    let _opening = main.lanes.opening.lock().await;
    if !main.lanes.has_room() {
        return Err(failed(format!("the session has {} connections", LANES_MAX + 1)));
    }
    let dial = of.another();
    let (made, (send, recv, _)) = dial.greet(Some(of.session)).await?;
    begin(main, made, (send, recv), Role::Dialer(dial))
        .map_err(|error| failed(format!("no thread for another connection: {error}")))
}

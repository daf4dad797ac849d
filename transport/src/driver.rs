//! The task that quinn drives a connection with, on a thread that may change.
//!
//! Invariant: it runs on one thread at a time, and the home that it moved to stays for as long as it
//! runs, which is until the peer may be forgotten.
//!
//! quinn spawns it before the handshake, when nobody knows yet what the connection is for.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::home::Home;

thread_local! {
    /// Of what quinn has just spawned on this thread.
    static SPAWNED: Cell<Option<Seat>> = const { Cell::new(None) };
}

/// From where a driver is moved.
#[derive(Debug, Clone)]
pub(crate) struct Seat(Arc<Mutex<Moves>>);

#[derive(Debug, Default)]
struct Moves {
    /// Where to go at the next turn.
    to: Option<Arc<Home>>,
    waker: Option<Waker>,
}

impl Seat {
    /// Of the driver that was made last on this thread, the first time that it is asked for.
    pub(crate) fn of_new() -> Option<Self> {
        SPAWNED.take()
    }

    fn moves(&self) -> MutexGuard<'_, Moves> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the driver go on at `home`.
    pub(crate) fn move_to(&self, home: &Arc<Home>) {
        let mut moves = self.moves();
        moves.to = Some(home.clone());
        if let Some(waker) = moves.waker.take() {
            waker.wake();
        }
    }
}

/// A task that moves.
pub(crate) struct Driver {
    task: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    seat: Seat,
    /// Where it has moved to, which stays for it.
    _home: Option<Arc<Home>>,
}

impl Driver {
    pub(crate) fn of(task: Pin<Box<dyn Future<Output = ()> + Send>>) -> Self {
        let seat = Seat(Arc::default());
        SPAWNED.set(Some(seat.clone()));
        Self { task: Some(task), seat, _home: None }
    }
}

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let mut moves = this.seat.moves();
        let Some(home) = moves.to.take() else {
            let is_known = moves.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
            if !is_known {
                moves.waker = Some(cx.waker().clone());
            }
            drop(moves);
            let Some(task) = &mut this.task else { return Poll::Ready(()) };
            return task.as_mut().poll(cx);
        };
        moves.waker = None;
        drop(moves);
        // Its first turn there takes up whatever woke it here.
        let next =
            Self { task: this.task.take(), seat: this.seat.clone(), _home: Some(home.clone()) };
        home.spawn(next);
        Poll::Ready(())
    }
}

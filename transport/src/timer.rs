//! A timer of a task that may move to another thread.
//!
//! Invariant: it waits on the runtime that polls it, so it never outlives the one that it waits on.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use quinn::AsyncTimer;
use tokio::runtime::{Handle, Id};
use tokio::time::{Instant, Sleep, sleep_until};

#[derive(Debug)]
pub(crate) struct Timer {
    at: Instant,
    sleep: Pin<Box<Sleep>>,
    runtime: Id,
}

impl Timer {
    /// One that ends `at` then. Must be called inside a tokio runtime, as the others.
    pub(crate) fn new(at: Instant) -> Self {
        Self { at, sleep: Box::pin(sleep_until(at)), runtime: Handle::current().id() }
    }

    pub(crate) fn end_at(&mut self, at: Instant) {
        self.at = at;
        self.sleep.as_mut().reset(at);
    }

    pub(crate) fn wait(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if Handle::current().id() != self.runtime {
            *self = Self::new(self.at);
        }
        Future::poll(self.sleep.as_mut(), cx)
    }
}

impl AsyncTimer for Timer {
    fn reset(mut self: Pin<&mut Self>, at: std::time::Instant) {
        self.end_at(Instant::from_std(at));
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.wait(cx)
    }
}

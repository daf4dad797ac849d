//! The wish that a job should end.
//!
//! Invariant: once wished, always wished, and the first reason stays.

use std::sync::Arc;

use tokio::sync::watch;

/// Why a job should end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CancelReason {
    /// Somebody asked.
    Asked,
    /// Its deadline passed.
    Deadline,
    /// The agent stops.
    Stopping,
}

/// Given to a job; every clone is the same wish.
///
/// A job looks at it between steps and at its waits. After the hand-over it no longer applies.
#[derive(Debug, Clone)]
pub struct CancelToken(Arc<watch::Sender<Option<CancelReason>>>);

impl Default for CancelToken {
    fn default() -> Self {
        Self::new()
    }
}

impl CancelToken {
    /// Nobody wishes anything yet.
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }

    /// Wishes that the job ends.
    pub fn cancel(&self, reason: CancelReason) {
        self.0.send_if_modified(|wish| {
            let first = wish.is_none();
            wish.get_or_insert(reason);
            first
        });
    }

    /// The wish, if there is one.
    pub fn reason(&self) -> Option<CancelReason> {
        *self.0.borrow()
    }

    /// Whether the job should end.
    pub fn is_cancelled(&self) -> bool {
        self.reason().is_some()
    }

    /// Returns once the job should end.
    pub async fn cancelled(&self) -> CancelReason {
        let mut wish = self.0.subscribe();
        loop {
            if let Some(reason) = *wish.borrow_and_update() {
                return reason;
            }
            if wish.changed().await.is_err() {
                // The sender lives in `self`: this cannot end while somebody waits.
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_reason_stays_and_reaches_everyone() {
        let token = CancelToken::new();
        assert!(!token.is_cancelled());
        let waiter = tokio::spawn({
            let token = token.clone();
            async move { token.cancelled().await }
        });
        token.cancel(CancelReason::Deadline);
        token.cancel(CancelReason::Asked);
        assert_eq!(waiter.await.unwrap(), CancelReason::Deadline);
        assert_eq!(token.cancelled().await, CancelReason::Deadline);
    }
}

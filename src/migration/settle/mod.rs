//! Carries out the hand-over: what the two pure machines ask for, in their order.
//!
//! Invariant: effects are carried out one after the other; what follows from one (its record is
//! durable, the guest runs) is carried out before what stood behind it. An effect that fails ends the
//! list: what it left undone is found in the journal, by the same code that a restart runs.

mod source;
mod target;

use std::time::Duration;

pub(super) use source::{HandingOver, Leaving};
pub(super) use target::{Arriving, after_switchover, confirmed, verdict};

use super::Attempts;
use super::doubts::Doubt;
use super::error::{MigrationError, chain};
use super::job::{Dial, Site};
use super::journal::{Began, History, Role};
use super::message::JobId;

/// First wait between two questions to a peer that does not answer, or two tries to write a journal;
/// it doubles up to the other.
const WAIT_FIRST: Duration = Duration::from_millis(500);
const WAIT_MAX: Duration = Duration::from_secs(15);

/// Waits that grow.
struct Patience(Duration);

impl Patience {
    fn new() -> Self {
        Self(WAIT_FIRST)
    }

    async fn wait(&mut self) {
        let wait = self.0;
        self.0 = (wait * 2).min(WAIT_MAX);
        tokio::time::sleep(wait).await;
    }
}

/// Brings an attempt that this agent no longer works on to its end, whatever that takes: one of an
/// earlier life, or one whose end could not be carried out or written down. From the call on, and not
/// only from the first poll, the attempt is in doubt and a new one for its VM has to wait.
pub fn recover<D: Dial + 'static>(
    site: Site,
    attempts: &Attempts,
    history: &History,
    began: Began,
    dial: D,
) -> impl Future<Output = ()> + Send + use<D> {
    let job = history.job;
    let mut held = site.doubts.hold(doubt(history, &began));
    let arrives = began.role == Role::Target && history.acts();
    let mut entered = arrives.then(|| attempts.recovering(job, &began.vm, &began.peer));
    async move {
        let mut patience = Patience::new();
        loop {
            // Read anew each time: it may say more by now.
            let settled = match site.journals.sure(job) {
                Ok(Some(now)) if !now.ended() => match began.role {
                    Role::Source => source::recover(&site, &now, &began, &dial, &mut held).await,
                    Role::Target => {
                        target::recover(&site, &now, &began, &mut held, &mut entered).await
                    }
                },
                Ok(_) => return,
                Err(error) => Err(unsure(job)(error)),
            };
            match settled {
                Ok(said) => {
                    tracing::info!(vm = began.vm, peer = began.peer, %job, said, "settled");
                    return;
                }
                Err(error) => {
                    let detail = chain(&error);
                    tracing::error!(vm = began.vm, peer = began.peer, %job, detail, "not settled");
                    held.say(true, detail);
                }
            }
            patience.wait().await;
        }
    }
}

/// Why nothing is done because of a journal.
fn unsure(job: JobId) -> impl FnOnce(std::io::Error) -> MigrationError {
    let doing = format!("making sure of what the journal of {job} says");
    move |source| MigrationError::Io { doing, source }
}

fn doubt(history: &History, began: &Began) -> Doubt {
    Doubt {
        job: history.job,
        vm: began.vm.clone(),
        peer: began.peer.clone(),
        role: began.role,
        since: history.since().unwrap_or_default().to_owned(),
        blocks: true,
        detail: "a move was interrupted: it is being settled".to_owned(),
    }
}

//! The attempts that this host is the target of now.
//!
//! Invariant: at most one attempt for each VM's name. A peer that begins anew has given up what it
//! began before, whether or not this host has noticed: the earlier attempt is told to give way and
//! the new one begins when it has let go of images and hypervisor. Peers never end each other's.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};

use super::message::JobId;

/// How long an attempt may take to give way: a hypervisor that is just being started comes first.
const GIVE_WAY_WITHIN: Duration = Duration::from_secs(90);

/// Attempts that this agent works on now; an attempt that is not among them and not in the journal
/// can only be refused.
#[derive(Debug, Clone, Default)]
pub struct Attempts(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    table: Mutex<HashMap<JobId, Known>>,
    /// Changes when an attempt leaves.
    left: watch::Sender<()>,
}

#[derive(Debug)]
struct Known {
    vm: String,
    peer: String,
    give_way: Arc<Notify>,
}

/// An attempt's place among them; it leaves with this value.
#[derive(Debug)]
pub struct Entered {
    attempts: Attempts,
    job: JobId,
    give_way: Arc<Notify>,
}

impl Attempts {
    /// Enters an attempt, after earlier ones of the same peer for the same VM have given way.
    ///
    /// # Errors
    ///
    /// Why it cannot be now, in a sentence.
    pub(super) async fn begin(&self, job: JobId, vm: &str, peer: &str) -> Result<Entered, String> {
        let mut left = self.0.left.subscribe();
        let deadline = Instant::now() + GIVE_WAY_WITHIN;
        loop {
            {
                let mut table = self.table();
                if table.contains_key(&job) {
                    return Err("this attempt is under way already".to_owned());
                }
                match table.values().find(|known| known.vm == vm) {
                    None => return Ok(self.insert(&mut table, job, vm, peer)),
                    Some(known) if known.peer != peer => {
                        return Err(format!("{} moves a VM called {vm} here now", known.peer));
                    }
                    Some(known) => known.give_way.notify_one(),
                }
            }
            if timeout_at(deadline, left.changed()).await.is_err() {
                return Err(format!("an earlier attempt to move {vm} here has not ended yet"));
            }
        }
    }

    /// Enters an attempt of an earlier life of this agent, which gives way by being settled.
    pub fn recovering(&self, job: JobId, vm: &str, peer: &str) -> Entered {
        self.insert(&mut self.table(), job, vm, peer)
    }

    /// Whether this attempt is under way, now that its source asks for the outcome: it has given up
    /// the session, so an attempt that has no token yet gives way.
    pub(super) fn asked(&self, job: JobId) -> bool {
        let table = self.table();
        let known = table.get(&job);
        known.inspect(|known| known.give_way.notify_one()).is_some()
    }

    /// Whether this attempt is under way.
    pub fn contains(&self, job: JobId) -> bool {
        self.table().contains_key(&job)
    }

    fn insert(
        &self,
        table: &mut HashMap<JobId, Known>,
        job: JobId,
        vm: &str,
        peer: &str,
    ) -> Entered {
        let give_way = Arc::new(Notify::new());
        let known =
            Known { vm: vm.to_owned(), peer: peer.to_owned(), give_way: Arc::clone(&give_way) };
        table.insert(job, known);
        Entered { attempts: self.clone(), job, give_way }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<JobId, Known>> {
        // Whole after every operation.
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entered {
    /// Returns when a newer attempt waits for this one's end.
    pub(super) async fn asked_to_give_way(&self) {
        self.give_way.notified().await;
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.attempts.table().remove(&self.job);
        self.attempts.0.left.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_that_begins_anew_ends_its_own_attempt_and_nobody_elses() {
        let attempts = Attempts::default();
        let [first, second, third] = [JobId::random(), JobId::random(), JobId::random()];
        let entered = attempts.begin(first, "web", "dc1").await.unwrap();
        assert!(attempts.begin(third, "web", "dc2").await.unwrap_err().contains("dc1"));
        let giving_way = async {
            entered.asked_to_give_way().await;
            drop(entered);
        };
        let (again, ()) = tokio::join!(attempts.begin(second, "web", "dc1"), giving_way);
        assert!(!attempts.contains(first) && attempts.contains(second));
        drop(again);
        attempts.begin(third, "web", "dc2").await.unwrap();
    }
}

//! The hand-overs that are not settled, for whoever looks, and the operator's word for them.
//!
//! Invariant: an attempt is in here from the moment at which its outcome is not known at this side,
//! or not known to be known at the other, until its journal has ended; one entry for each attempt.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, mpsc, oneshot};

use super::handover::{Choice, Conflict};
use super::journal::Role;
use super::message::JobId;

/// A hand-over that is not settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doubt {
    /// The attempt.
    pub job: JobId,
    /// The VM.
    pub vm: String,
    /// The other side's name here.
    pub peer: String,
    /// Which half this host plays.
    pub role: Role,
    /// Since when, in RFC 3339.
    pub since: String,
    /// Whether nothing else may be done with the VM at this host meanwhile.
    pub blocks: bool,
    /// What is known, in a sentence.
    pub detail: String,
}

/// The operator's word, and where the answer to it goes.
pub(super) struct Word {
    pub(super) choice: Choice,
    pub(super) answer: oneshot::Sender<Result<String, String>>,
}

/// All of a host's.
#[derive(Debug, Clone, Default)]
pub struct Doubts(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    table: Mutex<HashMap<JobId, Known>>,
    ran_twice: AtomicU64,
    runs_nowhere: AtomicU64,
}

#[derive(Debug)]
struct Known {
    doubt: Doubt,
    words: mpsc::Sender<Word>,
    changed: Arc<Notify>,
}

/// One of them, held by the task that settles it; it is no doubt any more when this is dropped.
pub(super) struct Held {
    doubts: Doubts,
    job: JobId,
    words: mpsc::Receiver<Word>,
    changed: Arc<Notify>,
}

impl Doubts {
    /// What is not settled, by VM.
    pub fn list(&self) -> Vec<Doubt> {
        let mut list: Vec<Doubt> = self.table().values().map(|known| known.doubt.clone()).collect();
        list.sort_by(|a, b| (&a.vm, &a.since).cmp(&(&b.vm, &b.since)));
        list
    }

    /// Whether somebody settles this attempt.
    pub fn contains(&self, job: JobId) -> bool {
        self.table().contains_key(&job)
    }

    /// How often two journals that met have found this conflict, in the life of this agent.
    pub fn conflicts(&self, conflict: Conflict) -> u64 {
        self.count(conflict).load(Ordering::Relaxed)
    }

    /// Two journals that met have found a conflict.
    pub(super) fn count_conflict(&self, conflict: Conflict) {
        self.count(conflict).fetch_add(1, Ordering::Relaxed);
    }

    fn count(&self, conflict: Conflict) -> &AtomicU64 {
        match conflict {
            Conflict::RanTwice => &self.0.ran_twice,
            Conflict::RunsNowhere => &self.0.runs_nowhere,
        }
    }

    /// Passes the operator's word on the VM to whoever settles its hand-over; gives what came of it,
    /// in a sentence.
    ///
    /// # Errors
    ///
    /// Why it was not followed: nothing is in doubt, or it could not be written down.
    pub async fn resolve(&self, vm: &str, choice: Choice) -> Result<String, String> {
        let words = {
            let table = self.table();
            // The one that holds the VM up first; an older one may still wait for its peer.
            let of_vm = || table.values().filter(|known| known.doubt.vm == vm);
            let known = of_vm().find(|known| known.doubt.blocks).or_else(|| of_vm().next());
            known.map(|known| known.words.clone())
        };
        let Some(words) = words else {
            return Err(format!("no hand-over of {vm} is in doubt here"));
        };
        let (answer, answered) = oneshot::channel();
        let settled = || format!("the hand-over of {vm} was settled meanwhile");
        words.send(Word { choice, answer }).await.map_err(|_| settled())?;
        answered.await.unwrap_or_else(|_| Err(settled()))
    }

    /// Enters an attempt.
    pub(super) fn hold(&self, doubt: Doubt) -> Held {
        let (words_in, words) = mpsc::channel(1);
        let (job, changed) = (doubt.job, Arc::new(Notify::new()));
        self.table().insert(job, Known { doubt, words: words_in, changed: Arc::clone(&changed) });
        Held { doubts: self.clone(), job, words, changed }
    }

    /// The journal of an attempt has gone on: whoever holds it reads it again.
    pub(super) fn changed(&self, job: JobId) {
        if let Some(known) = self.table().get(&job) {
            known.changed.notify_one();
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<JobId, Known>> {
        // Whole after every operation.
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// Says anew what is known.
    pub(super) fn say(&self, blocks: bool, detail: String) {
        if let Some(known) = self.doubts.table().get_mut(&self.job) {
            known.doubt.blocks = blocks;
            known.doubt.detail = detail;
        }
    }

    /// The operator's next word, or `None` once the attempt's journal has gone on by another hand.
    pub(super) async fn word_or_change(&mut self) -> Option<Word> {
        tokio::select! {
            () = self.changed.notified() => None,
            word = self.words.recv() => word,
        }
    }

    /// The operator's next word.
    pub(super) async fn word(&mut self) -> Word {
        match self.words.recv().await {
            Some(word) => word,
            // The sender is in the table for as long as this is.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.doubts.table().remove(&self.job);
    }
}

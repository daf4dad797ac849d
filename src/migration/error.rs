//! How an attempt can end badly, and what that means for the VM.
//!
//! Invariant: every variant but the last four means that the guest is the source's, and runs there as
//! it did before.

use std::error::Error;

use longhaul_transport::{RecvError, SendError};

use super::journal::AppendError;
use super::message::JobId;
use crate::hypervisor::HypervisorError;

/// An attempt that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The VM cannot leave, or the target will not take it. Nothing was sent.
    #[error("{vm} cannot move to {peer}: {}", reasons.join("; "))]
    Refused {
        /// The VM.
        vm: String,
        /// The peer.
        peer: String,
        /// Each in a sentence.
        reasons: Vec<String>,
    },
    /// The link to the peer was lost before the hand-over.
    #[error("the link to {peer} was lost: {detail}")]
    Cut {
        /// The peer.
        peer: String,
        /// What was noticed.
        detail: String,
        /// It was found again and does not know the session: its agent was started anew, or waited less.
        forgotten: bool,
    },
    /// The peer failed before the hand-over.
    #[error("{peer} gave up: {reason}")]
    Peer {
        /// The peer.
        peer: String,
        /// Its own words.
        reason: String,
    },
    /// What the peer sent breaks the protocol.
    #[error("{peer} broke the protocol: {detail}")]
    Protocol {
        /// The peer.
        peer: String,
        /// How.
        detail: String,
    },
    /// A hypervisor, here.
    #[error(transparent)]
    Hypervisor(#[from] HypervisorError),
    /// A file of ours, here.
    #[error("{doing}")]
    Io {
        /// What was being done.
        doing: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The move cannot be had within what the job allows.
    #[error("{vm} does not converge: {reason}")]
    DoesNotConverge {
        /// The VM.
        vm: String,
        /// With the numbers.
        reason: String,
    },
    /// The operator ended it.
    #[error("cancelled")]
    Cancelled,
    /// A journal, here: the hand-over was stopped before it, or its end could not be written down.
    #[error("the hand-over of {vm} could not be written down")]
    Journal {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: AppendError,
    },
    /// The guest is the source's, and its hypervisor has ended.
    #[error("the hypervisor of {vm} has ended here: that is a crash of the guest")]
    Crashed {
        /// The VM.
        vm: String,
    },
    /// The guest is the source's, and could not be given back yet; that is tried again.
    #[error("{vm} is still paused here: it could not be given back to its owner yet")]
    NotGivenBack {
        /// The VM.
        vm: String,
        /// Why.
        #[source]
        source: Box<Self>,
    },
    /// The operator has decided in the target's place.
    #[error("{vm} {} by its operator's word, while the hand-over was in doubt{}",
        if *here { "was taken back" } else { "was left to the other side" },
        undone.as_deref().map(|undone| format!("; but: {undone}")).unwrap_or_default())]
    Resolved {
        /// The VM.
        vm: String,
        /// Whether it is to run here.
        here: bool,
        /// What of it could not be done yet.
        undone: Option<String>,
    },
    /// The target has the token and its answer is not here: nobody but the target's journal knows.
    #[error(
        "the hand-over of {vm} is in doubt: {peer} was given the decision and has not answered. \
         The guest is paused here and stays so until {peer} answers; it is asked again and again"
    )]
    InDoubt {
        /// The VM.
        vm: String,
        /// The peer.
        peer: String,
        /// The attempt.
        job: JobId,
    },
}

impl MigrationError {
    /// Whether another attempt over a mended link could succeed.
    pub fn is_cut(&self) -> bool {
        matches!(self, Self::Cut { .. })
    }

    /// Whether the peer can be reached and another attempt is all that is missing.
    pub fn is_forgotten(&self) -> bool {
        matches!(self, Self::Cut { forgotten: true, .. })
    }

    pub(super) fn is_journal(&self) -> bool {
        matches!(self, Self::Journal { .. })
    }

    pub(super) fn not_given_back(self, vm: &str) -> Self {
        Self::NotGivenBack { vm: vm.to_owned(), source: Box::new(self) }
    }

    /// The link to `peer` was lost.
    pub fn cut(peer: &str, detail: impl ToString) -> Self {
        Self::Cut { peer: peer.to_owned(), detail: detail.to_string(), forgotten: false }
    }

    pub(super) fn protocol(peer: &str, detail: impl ToString) -> Self {
        Self::Protocol { peer: peer.to_owned(), detail: detail.to_string() }
    }

    pub(super) fn sending(peer: &str) -> impl Fn(SendError) -> Self + '_ {
        move |error| Self::cut(peer, error)
    }

    pub(super) fn receiving(peer: &str) -> impl Fn(RecvError) -> Self + '_ {
        move |error| Self::cut(peer, error)
    }
}

/// An error and its causes in one line, each said once.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Some errors quote their cause themselves.
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

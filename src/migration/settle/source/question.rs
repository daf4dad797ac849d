//! What a source asks of its target, and tells it, over sessions of their own.
//!
//! Invariant: every question has a time in which it is answered or given up; what is not answered is
//! asked again by whoever asked.

use std::time::Duration;

use super::{Answer, Leaving};
use crate::migration::error::MigrationError;
use crate::migration::handover::{SourceEvent, Standing, Verdict};
use crate::migration::message::{ToSource, ToTarget};

/// How long a target may take to answer one question.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the link of the attempt may take to carry a last word and its answer.
const NOTED_TIMEOUT: Duration = Duration::from_secs(5);

impl Leaving<'_> {
    /// Asks over a session of its own; nothing if there is no answer.
    pub(super) async fn ask(&mut self, standing: Standing) -> Option<SourceEvent> {
        match self.converse(&ToTarget::Ask { job: self.id, standing }).await {
            Ok(ToSource::Verdict { job, verdict, reason, times }) if job == self.id => {
                if verdict == Verdict::Undecided {
                    tracing::info!(peer = self.peer, job = %self.id, "it has not decided yet");
                } else {
                    self.state.answer = Answer { reason, times };
                }
                Some(SourceEvent::Peer(verdict))
            }
            Ok(_) => None,
            Err(error) => {
                tracing::warn!(peer = self.peer, job = %self.id, error, "in doubt; asking again");
                None
            }
        }
    }

    /// Tells the target that its decision is durable here, and waits until it has noted that.
    pub(super) async fn confirm(&mut self) -> Result<(), MigrationError> {
        let confirm = ToTarget::Confirm { job: self.id };
        if let Some((link, _)) = self.link
            && link.tell(&confirm).await.is_ok()
        {
            let noted = async {
                while !matches!(link.reply().await?, ToSource::Noted) {}
                Ok(())
            };
            let noted: Result<Result<(), MigrationError>, _> =
                tokio::time::timeout(NOTED_TIMEOUT, noted).await;
            if matches!(noted, Ok(Ok(()))) {
                return Ok(());
            }
        }
        match self.converse(&confirm).await {
            Ok(ToSource::Noted) => Ok(()),
            Ok(other) => Err(MigrationError::protocol(self.peer, format!("it answers {other:?}"))),
            Err(error) => Err(MigrationError::cut(self.peer, error)),
        }
    }

    async fn converse(&self, question: &ToTarget) -> Result<ToSource, String> {
        let talk = async {
            let session = self.dial.dial().await?;
            let (control, mut answers) = session.control().ok_or("its control stream is in use")?;
            control.send(question).await.map_err(|error| error.to_string())?;
            let answer = answers.recv::<ToSource>().await.map_err(|error| error.to_string())?;
            session.close("thank you");
            answer.ok_or_else(|| "it answers nothing".to_owned())
        };
        match tokio::time::timeout(ANSWER_TIMEOUT, talk).await {
            Ok(answer) => answer,
            Err(_) => Err("it does not answer".to_owned()),
        }
    }
}

//! Questions between agents that are about no attempt: carried here, understood by those who ask.
//!
//! Invariant: a question and its answer are bytes of bounded size (a control frame each) and one session;
//! whoever answers decides whether this peer may ask at all.

use std::time::Duration;

use async_trait::async_trait;
use longhaul_transport::Session;

use super::error::MigrationError;
use super::link::Link;
use super::message::{ToSource, ToTarget};

/// How long an answer may take: whoever asks has others to ask.
const ANSWER_WAIT: Duration = Duration::from_secs(30);

/// Whoever answers them at this host.
#[async_trait]
pub trait Answers: Send + Sync {
    /// The answer to what `peer` asks; a refusal is one, too.
    async fn answer(&self, peer: &str, question: &[u8]) -> Vec<u8>;
}

/// Asks `peer` over a session of its own.
///
/// # Errors
/// The link was lost, the peer breaks the protocol, or it takes too long to answer.
pub async fn ask(
    peer: &str,
    session: Session,
    question: Vec<u8>,
) -> Result<Vec<u8>, MigrationError> {
    let link = Link::new(peer, session)?;
    let asked = async {
        link.tell(&ToTarget::Question(question)).await?;
        match link.reply().await? {
            ToSource::Answer(answer) => Ok(answer),
            other => Err(MigrationError::protocol(peer, format!("it answers {other:?}"))),
        }
    };
    let answer = tokio::time::timeout(ANSWER_WAIT, asked).await;
    link.close("thank you");
    answer.unwrap_or_else(|_| Err(MigrationError::cut(peer, "it does not answer in time")))
}

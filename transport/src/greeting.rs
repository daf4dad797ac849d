//! The first words on a new connection: both sides say which protocol they speak.
//!
//! Invariant: no other frame is sent or read before both greetings were read and the versions are
//! equal; where they are not, both sides learn both numbers.

use std::time::Duration;

use quinn::{Connection, ConnectionError, ReadExactError, RecvStream, SendStream, WriteError};

use crate::close::CloseCode;
use crate::control::CONTROL_PRIORITY;
use crate::frame::{FrameError, Hello, LENGTH_PREFIX};

/// How long the side that listens waits for the other to read its greeting and leave by itself,
/// when the versions differ.
const VERSION_GRACE: Duration = Duration::from_secs(2);

/// Why a greeting failed. The connection is closed then.
#[derive(Debug)]
pub(crate) enum GreetingError {
    /// The versions differ.
    Version { theirs: u16 },
    /// What came is no greeting.
    Frame(FrameError),
    /// The connection ended first.
    Lost(ConnectionError),
    /// The peer ended the stream first.
    Stream,
}

impl From<ConnectionError> for GreetingError {
    fn from(error: ConnectionError) -> Self {
        Self::Lost(error)
    }
}

impl From<WriteError> for GreetingError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::ConnectionLost(error) => Self::Lost(error),
            _ => Self::Stream,
        }
    }
}

impl From<ReadExactError> for GreetingError {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error)) => Self::Lost(error),
            _ => Self::Stream,
        }
    }
}

/// A control stream on which both have greeted.
pub(crate) type Greeted = (SendStream, RecvStream, Hello);

/// Greets as the side that connected.
pub(crate) async fn connect(
    connection: &Connection,
    ours: &Hello,
) -> Result<Greeted, GreetingError> {
    let result = async {
        let (mut send, mut recv) = connection.open_bi().await?;
        // Fails only if the stream is closed; the write then says so.
        let _ = send.set_priority(CONTROL_PRIORITY);
        send.write_all(&ours.encode()).await?;
        let theirs = read(&mut recv).await?;
        Ok((send, recv, theirs))
    }
    .await;
    match settle(result, ours) {
        Err(error) => {
            close(connection, ours, &error);
            Err(error)
        }
        greeted => greeted,
    }
}

/// Hears the greeting as the side that listens, which is to be answered unless the versions differ:
/// then it is, with `ours`.
pub(crate) async fn hear(connection: &Connection, ours: &Hello) -> Result<Greeted, GreetingError> {
    let result = async {
        let (mut send, mut recv) = connection.accept_bi().await?;
        // Fails only if the stream is closed; the write then says so.
        let _ = send.set_priority(CONTROL_PRIORITY);
        let theirs = read(&mut recv).await?;
        if theirs.protocol != ours.protocol {
            answer(&mut send, ours).await?;
        }
        Ok((send, recv, theirs))
    }
    .await;
    match settle(result, ours) {
        Err(error) => {
            if matches!(error, GreetingError::Version { .. }) {
                // Closing at once could overtake our greeting.
                let _ = tokio::time::timeout(VERSION_GRACE, connection.closed()).await;
            }
            close(connection, ours, &error);
            Err(error)
        }
        heard => heard,
    }
}

/// Answers a greeting that was heard.
pub(crate) async fn answer(send: &mut SendStream, ours: &Hello) -> Result<(), GreetingError> {
    Ok(send.write_all(&ours.encode()).await?)
}

fn settle(result: Result<Greeted, GreetingError>, ours: &Hello) -> Result<Greeted, GreetingError> {
    let greeted = result?;
    let theirs = greeted.2.protocol;
    if theirs == ours.protocol { Ok(greeted) } else { Err(GreetingError::Version { theirs }) }
}

fn close(connection: &Connection, ours: &Hello, error: &GreetingError) {
    match error {
        GreetingError::Version { theirs } => {
            let reason = format!(
                "this agent speaks protocol version {}, yours speaks version {theirs}",
                ours.protocol
            );
            connection.close(CloseCode::Version.value(), reason.as_bytes());
        }
        GreetingError::Frame(error) => {
            connection.close(CloseCode::Violation.value(), error.to_string().as_bytes());
        }
        GreetingError::Stream => {
            connection.close(CloseCode::Violation.value(), b"the greeting ends early");
        }
        GreetingError::Lost(_) => {}
    }
}

async fn read(recv: &mut RecvStream) -> Result<Hello, GreetingError> {
    let mut prefix = [0; LENGTH_PREFIX];
    recv.read_exact(&mut prefix).await?;
    let length = Hello::body_length(prefix).map_err(GreetingError::Frame)?;
    let mut body = vec![0; length];
    recv.read_exact(&mut body).await?;
    Hello::decode(&body).map_err(GreetingError::Frame)
}

//! The command's end of the control socket.
//!
//! Invariant: every failure to talk to the agent says what to do about it. Dropping a [`Call`] never
//! stops a job: the agent owns it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::line::{LineError, read_line_into, write_line};
use super::message::{Answer, Request};
use super::{LINE_BYTES_MAX, VERSION};

/// Why the agent could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens on the socket.
    #[error("no agent answers at {}", socket.display())]
    NoAgent {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The socket belongs to another user.
    #[error("the agent's socket {} is not open to this user", socket.display())]
    Forbidden {
        /// The socket.
        socket: PathBuf,
    },
    /// The agent is of another version.
    #[error("this command speaks control version {VERSION}, the agent {theirs}")]
    Version {
        /// The agent's version.
        theirs: u16,
    },
    /// The agent went away in the middle of the answer.
    #[error("the agent closed the connection before it had answered")]
    Closed,
    /// The request or the answer is larger than a line may be.
    #[error("a request or answer of more than {LINE_BYTES_MAX} bytes")]
    TooLong,
    /// What answered is not an agent.
    #[error("what answers at {} is not an agent of longhaul", socket.display())]
    NotAnAgent {
        /// The socket.
        socket: PathBuf,
        /// What was wrong with its answer.
        #[source]
        source: LineError,
    },
}

impl CallError {
    /// What an operator does about it.
    pub fn next(&self) -> &'static str {
        match self {
            Self::NoAgent { .. } => {
                "start it with `longhaul agent` (`longhaul init` sets a new host up), \
                 or name its socket with --socket"
            }
            Self::Forbidden { .. } => "run the command as the agent's user, e.g. with sudo",
            Self::Version { .. } => "restart the agent after an update, so that both are the same",
            Self::Closed => "jobs go on by themselves: see `longhaul status` and the agent's log",
            Self::TooLong => "is this the right file?",
            Self::NotAnAgent { .. } => "name the agent's socket with --socket",
        }
    }
}

/// A request under way.
#[derive(Debug)]
pub struct Call {
    socket: PathBuf,
    reader: BufReader<OwnedReadHalf>,
    /// A line that has not come whole yet.
    partial: Vec<u8>,
    // Kept open: the agent takes its closing as "nobody watches any more".
    _writer: OwnedWriteHalf,
}

/// Sends `request` to the agent that listens on `socket`.
///
/// # Errors
/// No agent listens there, or it does not take the request.
pub async fn call(socket: &Path, request: &Request) -> Result<Call, CallError> {
    let stream = UnixStream::connect(socket).await.map_err(|source| match source.kind() {
        ErrorKind::PermissionDenied => CallError::Forbidden { socket: socket.to_owned() },
        _ => CallError::NoAgent { socket: socket.to_owned(), source },
    })?;
    let (reader, mut writer) = stream.into_split();
    match write_line(&mut writer, request).await {
        Ok(()) => {}
        // The agent may have answered and closed without reading all of it: see what it said.
        Err(LineError::Io(_)) => {}
        Err(error) => return Err(failure(socket, error)),
    }
    let (socket, reader) = (socket.to_owned(), BufReader::new(reader));
    Ok(Call { socket, reader, partial: Vec::new(), _writer: writer })
}

impl Call {
    /// The next event, or the response, after which there is nothing. May be dropped half-way and
    /// called again.
    ///
    /// # Errors
    /// The agent went away or is of another version.
    pub async fn next(&mut self) -> Result<Answer, CallError> {
        let answer = read_line_into(&mut self.reader, &mut self.partial).await;
        answer.map_err(|error| failure(&self.socket, error))
    }
}

fn failure(socket: &Path, error: LineError) -> CallError {
    match error {
        LineError::Version { theirs } => CallError::Version { theirs },
        LineError::Closed | LineError::Io(_) => CallError::Closed,
        LineError::TooLong => CallError::TooLong,
        LineError::Malformed(_) => {
            CallError::NotAnAgent { socket: socket.to_owned(), source: error }
        }
    }
}

//! The control socket: takes requests, sends answers, follows jobs.
//!
//! Invariant: a watcher that is slow, gone or wrong costs its connection and nothing else; no job
//! waits for anybody who watches.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, MissedTickBehavior, timeout};

use super::answer::{Desk, Reaction, Work};
use super::jobs::Follow;
use crate::control::{
    Answer, Event, Failure, JobOutcome, LineError, Reply, Request, Response, VERSION, read_line,
    write_line,
};

/// Commands at a time. Every watcher is one; more than this is a script in a loop.
const CONNECTIONS_MAX: usize = 128;
/// Time for a command to send its request.
const REQUEST_WAIT: Duration = Duration::from_secs(10);
/// Time for a command to take one line; one that is stopped is dropped.
const WRITE_WAIT: Duration = Duration::from_secs(30);
/// Least time between two progress events: ten a second is what eyes can use.
const EVENT_INTERVAL: Duration = Duration::from_millis(100);
/// Pause after the system refused a connection (it is out of descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The bound socket; removed when dropped.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    /// Binds `path`, for its owner only. The caller holds the instance lock, so a socket that lies
    /// there is a leftover.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        // Bound under another name first: between bind and chmod anybody could connect.
        let hidden = path.with_extension("new");
        for path in [&hidden, path] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        let listener = UnixListener::bind(&hidden)?;
        std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&hidden, path)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Serves until it is dropped.
    pub(crate) async fn serve(&self, desk: Arc<Desk>) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            // Nobody closes the semaphore.
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let desk = Arc::clone(&desk);
                    tokio::spawn(async move {
                        if let Err(error) = converse(stream, &desk).await {
                            tracing::debug!(%error, "a command went away");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot take a command");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn converse(stream: UnixStream, desk: &Arc<Desk>) -> Result<(), LineError> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let request = match timeout(REQUEST_WAIT, read_line::<Request>(&mut reader)).await {
        Ok(Ok(request)) => request,
        Ok(Err(LineError::Closed)) | Err(_) => return Ok(()),
        Ok(Err(error)) => return end(&mut writer, Err(misunderstood(&error))).await,
    };
    match desk.react(request).await {
        Reaction::Answer(answer) => end(&mut writer, *answer).await,
        Reaction::Follow(follow) => watch(&mut reader, &mut writer, follow).await,
        Reaction::Work(work) => tell(&mut writer, work).await,
    }
}

fn misunderstood(error: &LineError) -> Failure {
    let next = "restart the agent after an update, so that both are the same";
    let what = match error {
        LineError::Version { theirs } => {
            format!("this command speaks control version {theirs}, the agent {VERSION}")
        }
        LineError::Malformed(cause) => format!("the agent does not understand this: {cause}"),
        other => format!("the agent could not read the request: {other}"),
    };
    Failure::refused(what, next)
}

/// Sends progress until the job or the watcher ends.
async fn watch(
    reader: &mut BufReader<OwnedReadHalf>,
    writer: &mut OwnedWriteHalf,
    mut follow: Follow,
) -> Result<(), LineError> {
    send(writer, Event::Admitted(follow.summary())).await?;
    let mut progress = follow.progress.clone();
    let mut tick = tokio::time::interval(EVENT_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut byte = [0];
    loop {
        tokio::select! {
            outcome = follow.outcome() => {
                return end(writer, match outcome {
                    JobOutcome::Completed(completed) => Ok(Reply::Completed(completed)),
                    JobOutcome::Failed(failure) => Err(failure),
                }).await;
            }
            _ = tick.tick() => {
                if progress.has_changed().unwrap_or(false) {
                    let now = progress.borrow_and_update().clone();
                    send(writer, Event::Progress(now)).await?;
                }
            }
            // A watcher says nothing more; the end of its side is its end.
            read = reader.read(&mut byte) => match read? {
                0 => return Ok(()),
                _ => return Err(LineError::TooLong),
            },
        }
    }
}

/// Sends what is told of some work, and what came of it.
async fn tell(writer: &mut OwnedWriteHalf, work: Work) -> Result<(), LineError> {
    let Work { mut events, done } = work;
    let mut last = None::<Instant>;
    while let Some(event) = events.recv().await {
        if last.is_none_or(|last| last.elapsed() >= EVENT_INTERVAL) {
            send(writer, event).await?;
            last = Some(Instant::now());
        }
    }
    let broken = |_| {
        let next = "`longhaul index check` tells whether the index is whole";
        Err(Failure::failed("the agent's work ended by a defect", "", next))
    };
    end(writer, done.await.unwrap_or_else(broken)).await
}

async fn send(writer: &mut OwnedWriteHalf, event: Event) -> Result<(), LineError> {
    line(writer, &Answer::Event(event)).await
}

async fn end(writer: &mut OwnedWriteHalf, answer: Result<Reply, Failure>) -> Result<(), LineError> {
    let response = match answer {
        Ok(reply) => Response::Done(reply),
        Err(failure) => Response::Failed(failure),
    };
    match line(writer, &Answer::Response(response)).await {
        Err(LineError::TooLong) => {
            let failure = Failure::failed("the answer is too long for a line", "", "ask for less");
            line(writer, &Answer::Response(Response::Failed(failure))).await
        }
        done => done,
    }
}

async fn line(writer: &mut OwnedWriteHalf, answer: &Answer) -> Result<(), LineError> {
    match timeout(WRITE_WAIT, write_line(writer, answer)).await {
        Ok(written) => written,
        Err(_) => Err(LineError::Closed),
    }
}

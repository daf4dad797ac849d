//! The agent's numbers over HTTP, for Prometheus: one GET or HEAD of `/metrics` a connection.
//!
//! Invariant: whoever scrapes, and however, costs at most a few connections of a few KiB and a few
//! seconds each; nothing of the agent waits for them. Nothing but numbers can be had here.
//!
//! This is HTTP/1.1's smallest honest server: the request's first line counts, its fields are read
//! past, a body is not awaited, and the connection ends with the answer.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::agent::answer::Desk;
use crate::control::{METRICS_MEDIA_TYPE, metrics_text};

/// Scrapes at a time; others wait in the system's queue.
const CONNECTIONS_MAX: usize = 8;
/// Least time between two connections: nobody needs a hundred scrapes a second.
const ACCEPT_INTERVAL: Duration = Duration::from_millis(10);
/// Pause after the system refused a connection (it is out of descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Longest request, without a body. Prometheus' have some 300 bytes.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Time for a request to come.
const REQUEST_WAIT: Duration = Duration::from_secs(5);
/// Time for the numbers to be gathered, a monitor that does not answer included.
const GATHER_WAIT: Duration = Duration::from_secs(10);
/// Time for an answer to be taken.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// What is read and thrown away behind an answer, so that closing does not destroy it on its way.
const REST_BYTES_MAX: usize = 64 << 10;
/// Time for that.
const REST_WAIT: Duration = Duration::from_secs(1);

/// The bound socket.
#[derive(Debug)]
pub(crate) struct MetricsSocket {
    listener: TcpListener,
}

impl MetricsSocket {
    /// Binds `address`, or gives it back with the reason why not.
    pub(crate) fn bind(address: SocketAddr) -> Result<Self, (SocketAddr, io::Error)> {
        let bound = std::net::TcpListener::bind(address).and_then(|listener| {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        });
        bound.map(|listener| Self { listener }).map_err(|error| (address, error))
    }
}

/// Serves for as long as it is polled; without a socket, nobody.
pub(crate) async fn serve(socket: Option<&MetricsSocket>, desk: Arc<Desk>) {
    let Some(MetricsSocket { listener }) = socket else { return std::future::pending().await };
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "metrics are served");
        if !address.ip().is_loopback() {
            tracing::warn!(%address, "metrics name VMs and peers to anybody who reaches them");
        }
    }
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // Nobody closes the semaphore.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let desk = Arc::clone(&desk);
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, &desk).await {
                        tracing::debug!(%error, "a scrape went away");
                    }
                    drop(place);
                });
                sleep(ACCEPT_INTERVAL).await;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot take a scrape");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn converse(mut stream: TcpStream, desk: &Desk) -> io::Result<()> {
    let request = match timeout(REQUEST_WAIT, read_head(&mut stream)).await {
        Ok(Ok(Some(head))) => wanted(&head),
        Ok(Ok(None)) => return Ok(()),
        Ok(Err(TooLong)) => Err(Refusal::TooLong),
        Err(_) => Err(Refusal::TooSlow),
    };
    let (answer, head_only) = match request {
        Ok(Wanted { head_only }) => match timeout(GATHER_WAIT, desk.metrics()).await {
            Ok(metrics) => {
                (answer("200 OK", METRICS_MEDIA_TYPE, "", &metrics_text(&metrics)), head_only)
            }
            Err(_) => (Refusal::NotGathered.answer(), head_only),
        },
        Err(refusal) => (refusal.answer(), false),
    };
    let (head, body) = answer;
    let sent = async {
        stream.write_all(head.as_bytes()).await?;
        if !head_only {
            stream.write_all(body.as_bytes()).await?;
        }
        stream.shutdown().await
    };
    timeout(ANSWER_WAIT, sent).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let rest = async {
        let (mut left, mut buffer) = (REST_BYTES_MAX, [0; 1024]);
        while let Ok(read @ 1..) = stream.read(&mut buffer).await {
            match left.checked_sub(read) {
                Some(less) => left = less,
                None => return,
            }
        }
    };
    let _ = timeout(REST_WAIT, rest).await;
    Ok(())
}

struct TooLong;

/// Reads up to the empty line; `None` if the connection ended before it.
async fn read_head(stream: &mut TcpStream) -> Result<Option<Vec<u8>>, TooLong> {
    let (mut head, mut buffer) = (Vec::new(), [0; 1024]);
    while head.len() < HEAD_BYTES_MAX {
        let room = buffer.len().min(HEAD_BYTES_MAX - head.len());
        let read = match stream.read(&mut buffer[..room]).await {
            Ok(0) | Err(_) => return Ok(None),
            Ok(read) => read,
        };
        // The empty line may have begun in what came before.
        let from = head.len().saturating_sub(3);
        head.extend_from_slice(&buffer[..read]);
        if head[from..].windows(4).any(|window| window == b"\r\n\r\n") {
            return Ok(Some(head));
        }
    }
    Err(TooLong)
}

/// A request that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    head_only: bool,
}

/// Why a request is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Malformed,
    OtherPath,
    OtherMethod,
    TooSlow,
    TooLong,
    OtherVersion,
    NotGathered,
}

impl Refusal {
    fn answer(self) -> (String, String) {
        let (status, fields, why) = match self {
            Self::Malformed => ("400 Bad Request", "", "this is not HTTP"),
            Self::OtherPath => ("404 Not Found", "", "the numbers are at /metrics"),
            Self::OtherMethod => {
                ("405 Method Not Allowed", "Allow: GET, HEAD\r\n", "only GET and HEAD")
            }
            Self::TooSlow => ("408 Request Timeout", "", "the request did not come in time"),
            Self::TooLong => ("431 Request Header Fields Too Large", "", "the request is too long"),
            Self::OtherVersion => {
                ("505 HTTP Version Not Supported", "", "only HTTP/1.0 and HTTP/1.1")
            }
            Self::NotGathered => {
                ("503 Service Unavailable", "", "the numbers were not there in time")
            }
        };
        answer(status, "text/plain; charset=utf-8", fields, &format!("{why}\n"))
    }
}

/// What the head of a request asks for.
fn wanted(head: &[u8]) -> Result<Wanted, Refusal> {
    let end = head.windows(2).position(|pair| pair == b"\r\n").ok_or(Refusal::Malformed)?;
    let line = std::str::from_utf8(&head[..end]).map_err(|_| Refusal::Malformed)?;
    let words: Vec<&str> = line.split(' ').collect();
    let [method, target, version] = words[..] else { return Err(Refusal::Malformed) };
    match version {
        "HTTP/1.1" | "HTTP/1.0" => {}
        other if other.starts_with("HTTP/") => return Err(Refusal::OtherVersion),
        _ => return Err(Refusal::Malformed),
    }
    let path = target.split('?').next().unwrap_or_default();
    match (path, method) {
        ("/metrics", "GET") => Ok(Wanted { head_only: false }),
        ("/metrics", "HEAD") => Ok(Wanted { head_only: true }),
        ("/metrics", _) => Err(Refusal::OtherMethod),
        _ => Err(Refusal::OtherPath),
    }
}

/// Head and body.
fn answer(status: &str, media: &str, fields: &str, body: &str) -> (String, String) {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {media}\r\nContent-Length: {}\r\n{fields}\
         Connection: close\r\n\r\n",
        body.len()
    );
    (head, body.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_page_is_served_and_the_rest_is_told_why_not() {
        for (line, expected) in [
            ("GET /metrics HTTP/1.1", Ok(Wanted { head_only: false })),
            ("GET /metrics?format=x HTTP/1.0", Ok(Wanted { head_only: false })),
            ("HEAD /metrics HTTP/1.1", Ok(Wanted { head_only: true })),
            ("POST /metrics HTTP/1.1", Err(Refusal::OtherMethod)),
            ("GET / HTTP/1.1", Err(Refusal::OtherPath)),
            ("GET /metrics/../state HTTP/1.1", Err(Refusal::OtherPath)),
            ("GET /metrics HTTP/2", Err(Refusal::OtherVersion)),
            ("GET  /metrics HTTP/1.1", Err(Refusal::Malformed)),
            ("GET /metrics", Err(Refusal::Malformed)),
            ("", Err(Refusal::Malformed)),
        ] {
            assert_eq!(wanted(format!("{line}\r\nHost: x\r\n\r\n").as_bytes()), expected, "{line}");
        }
        assert_eq!(wanted(b"GET /\xff HTTP/1.1\r\n\r\n"), Err(Refusal::Malformed));
    }

    #[test]
    fn an_answer_says_its_length_and_that_it_is_the_last() {
        let (head, body) = Refusal::OtherMethod.answer();
        assert!(head.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"), "{head}");
        for field in ["Content-Length: 18\r\n", "Allow: GET, HEAD\r\n", "Connection: close\r\n\r\n"]
        {
            assert!(head.contains(field), "no {field:?} in {head}");
        }
        assert_eq!(body.len(), 18);
    }
}

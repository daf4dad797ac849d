//! Lines of the monitor's protocol: what one can be, and how one is read.
//!
//! Invariant: a line longer than [`LINE_BYTES_MAX`] ends the connection before it is kept, and fields
//! that are not known are passed over, so that a newer QEMU is understood as far as an older one.

use std::io;

use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::OwnedReadHalf;

/// Longest line that is accepted. `query-qmp-schema`, the longest known answer, has about 250 KiB.
pub const LINE_BYTES_MAX: usize = 16 << 20;

#[derive(Debug, Deserialize)]
pub(super) struct ErrorAnswer {
    #[serde(default)]
    pub(super) class: String,
    #[serde(default)]
    pub(super) desc: String,
}

/// Everything a line can be. Which of the fields are there says which kind it is.
#[derive(Debug, Deserialize)]
pub(super) struct Line {
    #[serde(rename = "QMP")]
    pub(super) greeting: Option<Greeting>,
    #[serde(rename = "return", default, deserialize_with = "present")]
    pub(super) returned: Option<Value>,
    pub(super) error: Option<ErrorAnswer>,
    pub(super) id: Option<Value>,
    pub(super) event: Option<String>,
    #[serde(default)]
    pub(super) data: Value,
    pub(super) timestamp: Option<Timestamp>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Greeting {
    version: GreetingVersion,
}

#[derive(Debug, Deserialize)]
struct GreetingVersion {
    qemu: Version,
}

#[derive(Debug, Deserialize)]
struct Version {
    major: u32,
    minor: u32,
    micro: u32,
}

#[derive(Debug, Deserialize)]
pub(super) struct Timestamp {
    pub(super) seconds: i64,
    pub(super) microseconds: i64,
}

/// Keeps `"return": null` apart from a line that has no `return` at all.
fn present<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(d).map(Some)
}

/// Reads one line without its end into `line`; false at the end of the stream.
pub(super) async fn next_line(
    read: &mut BufReader<OwnedReadHalf>,
    line: &mut Vec<u8>,
) -> io::Result<bool> {
    line.clear();
    let taken = read.take(LINE_BYTES_MAX as u64 + 1).read_until(b'\n', line).await?;
    if taken > LINE_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("it sent a line of more than {LINE_BYTES_MAX} bytes"),
        ));
    }
    Ok(taken > 0 && line.last() == Some(&b'\n'))
}

/// Why there is no greeting.
pub(super) enum NoGreeting {
    Closed(String),
    Stranger,
}

/// Reads up to the greeting and gives QEMU's version.
pub(super) async fn greet(
    read: &mut BufReader<OwnedReadHalf>,
) -> Result<(u32, u32, u32), NoGreeting> {
    let mut line = Vec::new();
    match next_line(read, &mut line).await {
        Ok(true) => {}
        Ok(false) => return Err(NoGreeting::Closed("end of stream".to_owned())),
        Err(e) => return Err(NoGreeting::Closed(e.to_string())),
    }
    let parsed: Result<Line, _> = serde_json::from_slice(&line);
    match parsed.map(|line| line.greeting) {
        Ok(Some(Greeting { version: GreetingVersion { qemu } })) => {
            Ok((qemu.major, qemu.minor, qemu.micro))
        }
        Ok(None) | Err(_) => Err(NoGreeting::Stranger),
    }
}

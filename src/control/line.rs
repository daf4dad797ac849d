//! One JSON document per line, with the protocol's version in front.
//!
//! Invariant: no more than [`LINE_BYTES_MAX`] bytes are ever held for a line, and a line of another
//! version is reported as that, whatever else it says.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{LINE_BYTES_MAX, VERSION};

/// Why a line could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The other side closed the connection.
    #[error("the connection was closed")]
    Closed,
    /// A line does not end within the limit.
    #[error("a line of more than {LINE_BYTES_MAX} bytes")]
    TooLong,
    /// The other side speaks another version.
    #[error("control version {theirs} was spoken, {VERSION} is known here")]
    Version {
        /// The version that the other side named.
        theirs: u16,
    },
    /// The line is not what this version says.
    #[error("a line that makes no sense")]
    Malformed(#[source] serde_json::Error),
    /// The socket failed.
    #[error("the control socket failed")]
    Io(#[from] std::io::Error),
}

#[derive(Serialize)]
struct Envelope<'a, T> {
    longhaul: u16,
    body: &'a T,
}

/// Read before the body, so that a body nobody here understands cannot hide its version.
#[derive(Deserialize)]
struct VersionOnly {
    longhaul: u16,
}

#[derive(Deserialize)]
struct BodyOnly<T> {
    body: T,
}

/// Reads the next line.
///
/// # Errors
/// The connection ended, or the line is too long, of another version or malformed.
pub async fn read_line<T: DeserializeOwned>(
    reader: &mut (impl AsyncBufRead + Unpin),
) -> Result<T, LineError> {
    let mut line = Vec::new();
    read_line_into(reader, &mut line).await
}

/// Reads the next line; `line` holds what has come of it so far. If the future is dropped half-way,
/// calling again with the same `line` goes on where it was. Afterwards `line` is empty.
///
/// # Errors
/// As [`read_line`].
pub(super) async fn read_line_into<T: DeserializeOwned>(
    reader: &mut (impl AsyncBufRead + Unpin),
    line: &mut Vec<u8>,
) -> Result<T, LineError> {
    // `read_until` appends as it goes, so nothing is lost with a dropped future.
    let mut bounded = reader.take(LINE_BYTES_MAX.saturating_sub(line.len()) as u64);
    bounded.read_until(b'\n', line).await?;
    let line = std::mem::take(line);
    match line.last() {
        None => return Err(LineError::Closed),
        Some(b'\n') => {}
        Some(_) if line.len() >= LINE_BYTES_MAX => return Err(LineError::TooLong),
        Some(_) => return Err(LineError::Closed),
    }
    let version: VersionOnly = serde_json::from_slice(&line).map_err(LineError::Malformed)?;
    if version.longhaul != VERSION {
        return Err(LineError::Version { theirs: version.longhaul });
    }
    let envelope: BodyOnly<T> = serde_json::from_slice(&line).map_err(LineError::Malformed)?;
    Ok(envelope.body)
}

/// Writes one line.
///
/// # Errors
/// The line would be too long, or the connection ended.
pub async fn write_line<T: Serialize>(
    writer: &mut (impl AsyncWrite + Unpin),
    body: &T,
) -> Result<(), LineError> {
    let envelope = Envelope { longhaul: VERSION, body };
    let mut line = serde_json::to_vec(&envelope).map_err(LineError::Malformed)?;
    line.push(b'\n');
    if line.len() > LINE_BYTES_MAX {
        return Err(LineError::TooLong);
    }
    writer.write_all(&line).await?;
    writer.flush().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(text: &[u8]) -> Result<String, LineError> {
        read_line(&mut &text[..]).await
    }

    #[tokio::test]
    async fn what_was_written_is_read() {
        let mut line = Vec::new();
        write_line(&mut line, &"two\nlines").await.unwrap();
        assert_eq!(line, b"{\"longhaul\":1,\"body\":\"two\\nlines\"}\n");
        assert_eq!(read(&line).await.unwrap(), "two\nlines");
    }

    #[tokio::test]
    async fn another_version_is_named_whatever_its_body() {
        let line = b"{\"longhaul\":7,\"payload\":[1,2]}\n";
        assert!(matches!(read(line).await, Err(LineError::Version { theirs: 7 })));
    }

    #[tokio::test]
    async fn the_limit_holds_on_both_sides() {
        let frame = "{\"longhaul\":1,\"body\":\"\"}\n".len();
        let mut line = Vec::new();
        let fits = "x".repeat(LINE_BYTES_MAX - frame);
        write_line(&mut line, &fits).await.unwrap();
        assert_eq!(line.len(), LINE_BYTES_MAX);
        assert_eq!(read(&line).await.unwrap(), fits);
        let over = write_line(&mut Vec::new(), &format!("{fits}x")).await;
        assert!(matches!(over, Err(LineError::TooLong)));
        let endless = vec![b' '; LINE_BYTES_MAX + 1];
        assert!(matches!(read(&endless).await, Err(LineError::TooLong)));
    }

    #[tokio::test]
    async fn a_cut_line_is_a_closed_connection() {
        assert!(matches!(read(b"").await, Err(LineError::Closed)));
        assert!(matches!(read(b"{\"longhaul\":1").await, Err(LineError::Closed)));
        assert!(matches!(read(b"nonsense\n").await, Err(LineError::Malformed(_))));
    }
}

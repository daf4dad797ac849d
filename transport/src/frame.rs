//! The bytes on the wire: the greeting, control frames, and the head of a batch.
//!
//! Invariant: a length is checked against its named limit before anything is allocated for it, and
//! no input makes a decoder panic. Integers are little-endian. `PROTOCOL.md` has the layouts.

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::class::Class;

/// The version of everything above QUIC. Both sides must have the same one: a migration spans two
/// agents and is cheap to refuse, while a guess about what an old peer meant is not.
pub const PROTOCOL_VERSION: u16 = 1;
/// Largest control frame, kind byte included.
pub const MAX_CONTROL_FRAME: usize = 1024 * 1024;
/// Largest batch, the caller's header included.
pub const MAX_BATCH_BYTES: usize = 16 * 1024 * 1024;
/// Longest agent version in a greeting, in bytes.
pub const MAX_AGENT_VERSION: usize = 64;
/// Largest greeting body. A later version may add fields behind those known here.
pub(crate) const MAX_HELLO: usize = 1024;

/// First bytes of a greeting, so that a stray program is recognised as such.
const HELLO_MAGIC: [u8; 4] = *b"LHUL";
/// Bytes of a greeting before the agent version.
const HELLO_FIXED: usize = 4 + 2 + 8 + 1;
/// Length of a frame's length.
pub(crate) const LENGTH_PREFIX: usize = 4;
/// The kind byte of control messages in postcard (<https://postcard.jamesmunns.com/wire-format>).
const KIND_MESSAGE: u8 = 1;
/// The kind byte of a batch.
const KIND_BATCH: u8 = 2;
/// Length of a batch's head: kind, class, length.
pub(crate) const BATCH_HEAD: usize = 1 + 1 + LENGTH_PREFIX;

/// What is wrong with bytes that came from the peer, or too large to send to it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The first bytes are not a greeting.
    #[error("the greeting does not begin as an agent's does")]
    Magic,
    /// A frame says that it is longer than its limit.
    #[error("a {what} of {length} bytes exceeds the limit of {limit}")]
    TooLarge {
        /// Which frame.
        what: &'static str,
        /// The length it claims or has.
        length: u64,
        /// The limit.
        limit: usize,
    },
    /// A frame ends before its content does.
    #[error("a {what} ends early")]
    Truncated {
        /// Which frame.
        what: &'static str,
    },
    /// More bytes follow than the frame announced.
    #[error("a {what} is followed by bytes that belong to nothing")]
    Trailing {
        /// Which frame.
        what: &'static str,
    },
    /// A kind byte that this version does not know.
    #[error("unknown kind {0} of frame")]
    UnknownKind(u8),
    /// A class byte that this version does not know.
    #[error("unknown class {0} of batch")]
    UnknownClass(u8),
    /// The agent version in a greeting is not text.
    #[error("the agent version in the greeting is not printable text")]
    AgentVersion,
    /// The message inside a whole frame does not decode as what was expected here.
    #[error("a control message does not decode")]
    Message(#[from] postcard::Error),
}

/// What each side says first on the control stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) protocol: u16,
    pub(crate) capabilities: u64,
    pub(crate) agent_version: String,
}

impl Hello {
    /// The greeting with its length in front. An agent version that is too long is cut.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let version: Vec<u8> = self
            .agent_version
            .bytes()
            .filter(|byte| byte.is_ascii_graphic() || *byte == b' ')
            .take(MAX_AGENT_VERSION)
            .collect();
        let length = HELLO_FIXED + version.len();
        let mut out = Vec::with_capacity(LENGTH_PREFIX + length);
        out.extend((length as u32).to_le_bytes());
        out.extend(HELLO_MAGIC);
        out.extend(self.protocol.to_le_bytes());
        out.extend(self.capabilities.to_le_bytes());
        out.push(version.len() as u8);
        out.extend(version);
        out
    }

    /// Length of the body that follows `prefix`.
    pub(crate) fn body_length(prefix: [u8; LENGTH_PREFIX]) -> Result<usize, FrameError> {
        checked_length("greeting", prefix, MAX_HELLO)
    }

    /// Decodes a body. Bytes behind the known fields are a later version's and are ignored, and
    /// from another version nothing but its number is taken for granted.
    pub(crate) fn decode(body: &[u8]) -> Result<Self, FrameError> {
        let truncated = FrameError::Truncated { what: "greeting" };
        let rest = body.strip_prefix(&HELLO_MAGIC).ok_or(FrameError::Magic)?;
        let (protocol, rest) = rest.split_first_chunk().ok_or_else(|| truncated.clone())?;
        let (capabilities, rest) = rest.split_first_chunk().ok_or_else(|| truncated.clone())?;
        let (&length, rest) = rest.split_first().ok_or_else(|| truncated.clone())?;
        let version = rest.get(..usize::from(length)).ok_or(truncated)?;
        let printable = version.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ');
        if !printable || version.len() > MAX_AGENT_VERSION {
            return Err(FrameError::AgentVersion);
        }
        Ok(Self {
            protocol: u16::from_le_bytes(*protocol),
            capabilities: u64::from_le_bytes(*capabilities),
            agent_version: version.iter().map(|&byte| char::from(byte)).collect(),
        })
    }
}

fn checked_length(
    what: &'static str,
    prefix: [u8; LENGTH_PREFIX],
    limit: usize,
) -> Result<usize, FrameError> {
    let length = u32::from_le_bytes(prefix);
    match usize::try_from(length) {
        Ok(length) if length <= limit => Ok(length),
        _ => Err(FrameError::TooLarge { what, length: u64::from(length), limit }),
    }
}

/// Length of the control frame that follows `prefix`.
pub(crate) fn control_length(prefix: [u8; LENGTH_PREFIX]) -> Result<usize, FrameError> {
    checked_length("control frame", prefix, MAX_CONTROL_FRAME)
}

/// A control message as a frame with its length in front.
pub(crate) fn encode_control<M: Serialize>(message: &M) -> Result<Vec<u8>, FrameError> {
    let mut out = vec![0; LENGTH_PREFIX];
    out.push(KIND_MESSAGE);
    let mut out = postcard::to_extend(message, out)?;
    let length = out.len() - LENGTH_PREFIX;
    if length > MAX_CONTROL_FRAME {
        return Err(FrameError::TooLarge {
            what: "control frame",
            length: length as u64,
            limit: MAX_CONTROL_FRAME,
        });
    }
    out[..LENGTH_PREFIX].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(out)
}

/// The message in a control frame, `frame` being what followed the length.
pub(crate) fn decode_control<M: DeserializeOwned>(frame: &[u8]) -> Result<M, FrameError> {
    let what = "control frame";
    let (&kind, body) = frame.split_first().ok_or(FrameError::Truncated { what })?;
    if kind != KIND_MESSAGE {
        return Err(FrameError::UnknownKind(kind));
    }
    let (message, rest) = postcard::take_from_bytes(body)?;
    if rest.is_empty() { Ok(message) } else { Err(FrameError::Trailing { what }) }
}

/// What stands before the bytes of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchHead {
    pub(crate) class: Class,
    /// Bytes that follow; at most [`MAX_BATCH_BYTES`].
    pub(crate) length: usize,
}

impl BatchHead {
    /// A head for `length` bytes, refused if they are too many.
    pub(crate) fn new(class: Class, length: usize) -> Result<Self, FrameError> {
        if length > MAX_BATCH_BYTES {
            let length = length as u64;
            return Err(FrameError::TooLarge { what: "batch", length, limit: MAX_BATCH_BYTES });
        }
        Ok(Self { class, length })
    }

    pub(crate) fn encode(self) -> [u8; BATCH_HEAD] {
        let [a, b, c, d] = (self.length as u32).to_le_bytes();
        [KIND_BATCH, self.class.to_byte(), a, b, c, d]
    }

    pub(crate) fn decode(head: [u8; BATCH_HEAD]) -> Result<Self, FrameError> {
        let [kind, class, length @ ..] = head;
        if kind != KIND_BATCH {
            return Err(FrameError::UnknownKind(kind));
        }
        let class = Class::from_byte(class).ok_or(FrameError::UnknownClass(class))?;
        Ok(Self { class, length: checked_length("batch", length, MAX_BATCH_BYTES)? })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello() -> Hello {
        Hello { protocol: 1, capabilities: 0x0203, agent_version: "0.1.0".into() }
    }

    #[test]
    fn bytes_are_fixed() {
        let greeting = b"\x14\0\0\0LHUL\x01\0\x03\x02\0\0\0\0\0\0\x050.1.0";
        assert_eq!(hello().encode(), greeting);
        let message = encode_control(&(7u32, "ab")).unwrap();
        assert_eq!(message, b"\x05\0\0\0\x01\x07\x02ab");
        let head = BatchHead::new(Class::Pages, 0x0001_0203).unwrap();
        assert_eq!(head.encode(), [2, 2, 3, 2, 1, 0]);
    }

    #[test]
    fn limits_hold_on_both_sides() {
        assert!(BatchHead::new(Class::Seed, MAX_BATCH_BYTES).is_ok());
        assert!(BatchHead::new(Class::Seed, MAX_BATCH_BYTES + 1).is_err());
        let prefix = |length: usize| (length as u32).to_le_bytes();
        assert_eq!(control_length(prefix(MAX_CONTROL_FRAME)), Ok(MAX_CONTROL_FRAME));
        assert!(control_length(prefix(MAX_CONTROL_FRAME + 1)).is_err());
        assert!(control_length([0xff; 4]).is_err());
        assert!(Hello::body_length(prefix(MAX_HELLO)).is_ok());
        assert!(Hello::body_length(prefix(MAX_HELLO + 1)).is_err());
        // One kind byte, and a length in front of the text in postcard.
        let fits = MAX_CONTROL_FRAME - 1 - 3;
        assert!(encode_control(&"x".repeat(fits)).is_ok());
        assert!(encode_control(&"x".repeat(fits + 1)).is_err());
    }

    #[test]
    fn a_later_greeting_is_still_read() {
        let mut body = hello().encode().split_off(LENGTH_PREFIX);
        body.extend(b"fields of version 2");
        assert_eq!(Hello::decode(&body), Ok(hello()));
    }

    #[test]
    fn trailing_and_unknown_are_refused() {
        let mut frame = encode_control(&1u8).unwrap().split_off(LENGTH_PREFIX);
        frame.push(0);
        assert_eq!(
            decode_control::<u8>(&frame),
            Err(FrameError::Trailing { what: "control frame" })
        );
        frame[0] = 9;
        assert_eq!(decode_control::<u8>(&frame), Err(FrameError::UnknownKind(9)));
        assert_eq!(BatchHead::decode([2, 5, 0, 0, 0, 0]), Err(FrameError::UnknownClass(5)));
    }

    proptest! {
        #[test]
        fn greetings_come_back(protocol: u16, capabilities: u64, version in "[ -~]{0,64}") {
            let hello = Hello { protocol, capabilities, agent_version: version };
            let bytes = hello.encode();
            let (prefix, body) = bytes.split_first_chunk().unwrap();
            prop_assert_eq!(Hello::body_length(*prefix), Ok(body.len()));
            prop_assert_eq!(Hello::decode(body), Ok(hello));
            for cut in 0..body.len() {
                prop_assert!(Hello::decode(&body[..cut]).is_err());
            }
        }

        #[test]
        fn control_messages_come_back(number: u64, text: String, bytes: Vec<u8>) {
            let message = (number, text, Some(bytes));
            let frame = encode_control(&message).unwrap();
            let (prefix, body) = frame.split_first_chunk().unwrap();
            prop_assert_eq!(control_length(*prefix), Ok(body.len()));
            prop_assert_eq!(decode_control::<(u64, String, Option<Vec<u8>>)>(body), Ok(message));
            for cut in 0..body.len() {
                prop_assert!(
                    decode_control::<(u64, String, Option<Vec<u8>>)>(&body[..cut]).is_err()
                );
            }
        }

        #[test]
        fn heads_come_back(class in 0usize..5, length in 0..=MAX_BATCH_BYTES) {
            let head = BatchHead::new(Class::ALL[class], length).unwrap();
            prop_assert_eq!(BatchHead::decode(head.encode()), Ok(head));
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, head: [u8; BATCH_HEAD], agent_version: String) {
            let _ = Hello::decode(&bytes);
            let _ = decode_control::<(String, Vec<u64>)>(&bytes);
            let _ = BatchHead::decode(head);
            let _ = Hello { agent_version, ..hello() }.encode();
        }
    }
}

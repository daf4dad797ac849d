//! The bytes on the wire: the greeting, control frames, receipts, and the head of a batch.
//!
//! Invariant: a length is checked against its named limit before anything is allocated for it, and
//! no input makes a decoder panic. Integers are little-endian. `PROTOCOL.md` has the layouts.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::class::Class;

/// The version of everything above QUIC. Both sides must have the same one: a migration spans two
/// agents and is cheap to refuse, while a guess about what an old peer meant is not.
pub const PROTOCOL_VERSION: u16 = 7;
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
/// Bytes of a greeting without the agent version.
const HELLO_FIXED: usize = 4 + 2 + 8 + 1 + 16 + 1 + 16 + 1 + 16;
/// Largest receipt; the longest one names every batch that can be on the way.
pub(crate) const MAX_RECEIPT: usize = 8 * 1024;
/// Length of a frame's length.
pub(crate) const LENGTH_PREFIX: usize = 4;
/// The kind byte of control messages in postcard (<https://postcard.jamesmunns.com/wire-format>).
const KIND_MESSAGE: u8 = 1;
/// The kind byte of a batch.
const KIND_BATCH: u8 = 2;
/// The kind byte of the frame behind which no control message follows.
const KIND_END: u8 = 3;
/// The kind byte of a receipt.
const KIND_RECEIPT: u8 = 4;
/// Length of a batch's head: kind, class, number, offset, length.
pub(crate) const BATCH_HEAD: usize = 1 + 1 + 8 + LENGTH_PREFIX + LENGTH_PREFIX;

/// What is wrong with bytes that came from the peer, or did not come, or are too large to send to it.
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
    /// A batch goes on where its first part did not end.
    #[error("batch {number} goes on at byte {offset}, which is not where it ended")]
    Offset {
        /// Its number.
        number: u64,
        /// Where it goes on.
        offset: u64,
    },
    /// The peer counts what it cannot have, or does not count what it must have.
    #[error("the peer's count of {what} cannot be")]
    Count {
        /// What is counted.
        what: &'static str,
    },
    /// Over a link that works nothing was said for longer than an agent is ever silent.
    #[error("it has said nothing for {seconds} s, over a link that works")]
    Silent {
        /// So long.
        seconds: u64,
    },
    /// The agent version in a greeting is not text.
    #[error("the agent version in the greeting is not printable text")]
    AgentVersion,
    /// The message inside a whole frame does not decode as what was expected here.
    #[error("a control message does not decode")]
    Message(#[from] postcard::Error),
}

/// Names a session for as long as it lives; chosen at random by the side that connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct SessionId(pub(crate) [u8; 16]);

/// How much of what the peer sends in order has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Seen {
    /// Control messages.
    pub(crate) messages: u64,
    /// Receipts for batches.
    pub(crate) batches: u64,
}

/// What each side says first on the control stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) protocol: u16,
    pub(crate) capabilities: u64,
    pub(crate) agent_version: String,
    pub(crate) session: SessionId,
    /// The session goes on after another connection, of which this much has arrived.
    pub(crate) goes_on: Option<Seen>,
    /// It is a lane of this session.
    pub(crate) lane_of: Option<SessionId>,
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
        out.extend(self.session.0);
        let seen = self.goes_on.unwrap_or_default();
        out.push(u8::from(self.goes_on.is_some()));
        out.extend(seen.messages.to_le_bytes());
        out.extend(seen.batches.to_le_bytes());
        out.push(u8::from(self.lane_of.is_some()));
        out.extend(self.lane_of.unwrap_or_default().0);
        out
    }

    /// Length of the body that follows `prefix`.
    pub(crate) fn body_length(prefix: [u8; LENGTH_PREFIX]) -> Result<usize, FrameError> {
        checked_length("greeting", prefix, MAX_HELLO)
    }

    /// Decodes a body. Bytes behind the known fields are a later version's and are ignored, and
    /// from another version nothing but its number is taken for granted.
    pub(crate) fn decode(body: &[u8]) -> Result<Self, FrameError> {
        let rest = body.strip_prefix(&HELLO_MAGIC).ok_or(FrameError::Magic)?;
        let (protocol, rest) = take::<2>(rest)?;
        let mut hello = Self {
            protocol: u16::from_le_bytes(protocol),
            capabilities: 0,
            agent_version: String::new(),
            session: SessionId::default(),
            goes_on: None,
            lane_of: None,
        };
        if hello.protocol == PROTOCOL_VERSION {
            hello.read_rest(rest)?;
        }
        Ok(hello)
    }

    fn read_rest(&mut self, rest: &[u8]) -> Result<(), FrameError> {
        let (capabilities, rest) = take::<8>(rest)?;
        let ([length], rest) = take::<1>(rest)?;
        let Some((version, rest)) = rest.split_at_checked(usize::from(length)) else {
            return Err(FrameError::Truncated { what: "greeting" });
        };
        let printable = version.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ');
        if !printable || version.len() > MAX_AGENT_VERSION {
            return Err(FrameError::AgentVersion);
        }
        let (session, rest) = take::<16>(rest)?;
        let ([goes_on], rest) = take::<1>(rest)?;
        let (messages, rest) = take::<8>(rest)?;
        let (batches, rest) = take::<8>(rest)?;
        let ([is_lane], rest) = take::<1>(rest)?;
        let (main, _) = take::<16>(rest)?;
        self.capabilities = u64::from_le_bytes(capabilities);
        self.agent_version = version.iter().map(|&byte| char::from(byte)).collect();
        self.session = SessionId(session);
        self.goes_on = (goes_on != 0).then(|| Seen {
            messages: u64::from_le_bytes(messages),
            batches: u64::from_le_bytes(batches),
        });
        self.lane_of = (is_lane != 0).then_some(SessionId(main));
        Ok(())
    }
}

/// The next bytes of a greeting, and those behind them.
fn take<const N: usize>(bytes: &[u8]) -> Result<([u8; N], &[u8]), FrameError> {
    let (taken, rest) =
        bytes.split_first_chunk().ok_or(FrameError::Truncated { what: "greeting" })?;
    Ok((*taken, rest))
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
    encode("control frame", KIND_MESSAGE, MAX_CONTROL_FRAME, message)
}

/// The frame behind which no control message follows.
pub(crate) const CONTROL_END: [u8; LENGTH_PREFIX + 1] = [1, 0, 0, 0, KIND_END];

/// True for the body of [`CONTROL_END`].
pub(crate) fn is_control_end(frame: &[u8]) -> bool {
    frame == [KIND_END]
}

fn encode<M: Serialize>(
    what: &'static str,
    kind: u8,
    limit: usize,
    message: &M,
) -> Result<Vec<u8>, FrameError> {
    let mut out = vec![0; LENGTH_PREFIX];
    out.push(kind);
    let mut out = postcard::to_extend(message, out)?;
    let length = out.len() - LENGTH_PREFIX;
    if length > limit {
        return Err(FrameError::TooLarge { what, length: length as u64, limit });
    }
    out[..LENGTH_PREFIX].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(out)
}

/// The message in a control frame, `frame` being what followed the length.
pub(crate) fn decode_control<M: DeserializeOwned>(frame: &[u8]) -> Result<M, FrameError> {
    decode("control frame", KIND_MESSAGE, frame)
}

fn decode<M: DeserializeOwned>(
    what: &'static str,
    expected: u8,
    frame: &[u8],
) -> Result<M, FrameError> {
    let (&kind, body) = frame.split_first().ok_or(FrameError::Truncated { what })?;
    if kind != expected {
        return Err(FrameError::UnknownKind(kind));
    }
    let (message, rest) = postcard::take_from_bytes(body)?;
    if rest.is_empty() { Ok(message) } else { Err(FrameError::Trailing { what }) }
}

/// What one end tells the other about what has arrived.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Receipt {
    /// A batch is here, whole.
    Batch(u64),
    /// How much of what is sent in order is here, and for how many milliseconds this end would be
    /// without a connection; and whether it is a core that keeps the session from going faster here.
    Seen(Seen, u64, bool),
    /// What is here of batches that are not whole: their numbers, and how many bytes. First on a
    /// connection that takes a session on.
    Parts(Vec<(u64, u32)>),
    /// A batch of which the peer has a part will not be finished.
    Dropped(u64),
}

impl Receipt {
    /// The receipt with its length in front.
    pub(crate) fn encode(&self) -> Vec<u8> {
        encode("receipt", KIND_RECEIPT, MAX_RECEIPT, self)
            .expect("a receipt names fewer batches than its limit holds")
    }

    /// Length of the receipt that follows `prefix`.
    pub(crate) fn length(prefix: [u8; LENGTH_PREFIX]) -> Result<usize, FrameError> {
        checked_length("receipt", prefix, MAX_RECEIPT)
    }

    /// Decodes what followed the length.
    pub(crate) fn decode(frame: &[u8]) -> Result<Self, FrameError> {
        decode("receipt", KIND_RECEIPT, frame)
    }
}

/// What stands before the bytes of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchHead {
    pub(crate) class: Class,
    /// Its place among the batches of one direction of the session, from 0.
    pub(crate) number: u64,
    /// Bytes that an earlier connection has brought.
    pub(crate) offset: usize,
    /// Bytes of the whole batch; at most [`MAX_BATCH_BYTES`].
    pub(crate) length: usize,
}

impl BatchHead {
    /// Refuses a batch of `length` bytes if they are too many.
    pub(crate) fn check(length: usize) -> Result<(), FrameError> {
        if length > MAX_BATCH_BYTES {
            let length = length as u64;
            return Err(FrameError::TooLarge { what: "batch", length, limit: MAX_BATCH_BYTES });
        }
        Ok(())
    }

    pub(crate) fn encode(self) -> [u8; BATCH_HEAD] {
        let mut out = [0; BATCH_HEAD];
        (out[0], out[1]) = (KIND_BATCH, self.class.to_byte());
        out[2..10].copy_from_slice(&self.number.to_le_bytes());
        out[10..14].copy_from_slice(&(self.offset as u32).to_le_bytes());
        out[14..].copy_from_slice(&(self.length as u32).to_le_bytes());
        out
    }

    pub(crate) fn decode(head: [u8; BATCH_HEAD]) -> Result<Self, FrameError> {
        let [kind, class, a, b, c, d, e, f, g, h, rest @ ..] = head;
        if kind != KIND_BATCH {
            return Err(FrameError::UnknownKind(kind));
        }
        let class = Class::from_byte(class).ok_or(FrameError::UnknownClass(class))?;
        let number = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let [a, b, c, d, length @ ..] = rest;
        let length = checked_length("batch", length, MAX_BATCH_BYTES)?;
        let offset = u32::from_le_bytes([a, b, c, d]);
        match usize::try_from(offset) {
            Ok(offset) if offset <= length => Ok(Self { class, number, offset, length }),
            _ => Err(FrameError::Offset { number, offset: offset.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello() -> Hello {
        Hello {
            protocol: PROTOCOL_VERSION,
            capabilities: 0x0203,
            agent_version: "0.1.0".into(),
            session: SessionId(*b"sixteen letters."),
            goes_on: Some(Seen { messages: 7, batches: 0x0102 }),
            lane_of: Some(SessionId(*b"and sixteen more")),
        }
    }

    fn head(class: Class, number: u64, offset: usize, length: usize) -> BatchHead {
        BatchHead { class, number, offset, length }
    }

    #[test]
    fn bytes_are_fixed() {
        let greeting = b"\x46\0\0\0LHUL\x07\0\x03\x02\0\0\0\0\0\0\x050.1.0sixteen letters.\
            \x01\x07\0\0\0\0\0\0\0\x02\x01\0\0\0\0\0\0\x01and sixteen more";
        assert_eq!(hello().encode(), greeting);
        let message = encode_control(&(7u32, "ab")).unwrap();
        assert_eq!(message, b"\x05\0\0\0\x01\x07\x02ab");
        let head = head(Class::Pages, 0x0405, 0x0607, 0x0001_0203).encode();
        assert_eq!(head, [2, 2, 5, 4, 0, 0, 0, 0, 0, 0, 7, 6, 0, 0, 3, 2, 1, 0]);
        assert_eq!(Receipt::Batch(5).encode(), b"\x03\0\0\0\x04\0\x05");
        assert_eq!(Receipt::Parts(vec![(1, 300)]).encode(), b"\x06\0\0\0\x04\x02\x01\x01\xac\x02");
    }

    #[test]
    fn limits_hold_on_both_sides() {
        assert!(BatchHead::check(MAX_BATCH_BYTES).is_ok());
        assert!(BatchHead::check(MAX_BATCH_BYTES + 1).is_err());
        assert!(BatchHead::decode(head(Class::Seed, 0, 0, MAX_BATCH_BYTES + 1).encode()).is_err());
        let beyond = BatchHead::decode(head(Class::Seed, 3, 6, 5).encode());
        assert_eq!(beyond, Err(FrameError::Offset { number: 3, offset: 6 }));
        let all = (0..u64::from(crate::MAX_UNI_STREAMS)).map(|n| (u64::MAX - n, u32::MAX));
        assert!(Receipt::Parts(all.collect()).encode().len() <= MAX_RECEIPT);
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
        body.extend(b"fields to come");
        assert_eq!(Hello::decode(&body), Ok(hello()));
        // Of another version only the number is looked at.
        let other = Hello::decode(b"LHUL\x07\x01\xff\xff").unwrap();
        assert_eq!((other.protocol, other.goes_on), (0x0107, None));
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
        let mut head = head(Class::Seed, 0, 0, 0).encode();
        head[1] = 5;
        assert_eq!(BatchHead::decode(head), Err(FrameError::UnknownClass(5)));
        let mut receipt = Receipt::Dropped(1).encode().split_off(LENGTH_PREFIX);
        receipt.push(0);
        assert_eq!(Receipt::decode(&receipt), Err(FrameError::Trailing { what: "receipt" }));
    }

    proptest! {
        #[test]
        fn greetings_come_back(
            capabilities: u64,
            version in "[ -~]{0,64}",
            session: [u8; 16],
            goes_on: Option<(u64, u64)>,
            lane_of: Option<[u8; 16]>,
        ) {
            let hello = Hello {
                protocol: PROTOCOL_VERSION,
                capabilities,
                agent_version: version,
                session: SessionId(session),
                goes_on: goes_on.map(|(messages, batches)| Seen { messages, batches }),
                lane_of: lane_of.map(SessionId),
            };
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
        fn heads_come_back(class in 0usize..5, number: u64, length in 0..=MAX_BATCH_BYTES) {
            let head = head(Class::ALL[class], number, length / 3, length);
            prop_assert_eq!(BatchHead::decode(head.encode()), Ok(head));
        }

        #[test]
        fn receipts_come_back(
            number: u64,
            parts: Vec<(u64, u32)>,
            messages: u64,
            batches: u64,
            is_full: bool,
        ) {
            for receipt in [
                Receipt::Batch(number),
                Receipt::Seen(Seen { messages, batches }, number, is_full),
                Receipt::Parts(parts),
                Receipt::Dropped(number),
            ] {
                let bytes = receipt.encode();
                let (prefix, body) = bytes.split_first_chunk().unwrap();
                prop_assert_eq!(Receipt::length(*prefix), Ok(body.len()));
                prop_assert_eq!(Receipt::decode(body), Ok(receipt));
            }
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, head: [u8; BATCH_HEAD], agent_version: String) {
            let _ = Hello::decode(&bytes);
            let _ = decode_control::<(String, Vec<u64>)>(&bytes);
            let _ = Receipt::decode(&bytes);
            let _ = BatchHead::decode(head);
            let _ = Hello { agent_version, ..hello() }.encode();
        }
    }
}

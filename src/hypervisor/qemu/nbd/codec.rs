//! NBD's bytes: handshake, requests and replies, big-endian, as in the NBD protocol document
//! (`doc/proto.md` of the NBD project), the part of it that QEMU's servers speak.
//!
//! Invariant: nothing here does I/O and nothing believes a length. Every decoder is total: any
//! bytes give a value or a [`CodecError`], and no allocation follows a number from the wire before
//! that number was compared with a limit.

/// Most bytes of an answer to an option: QEMU's longest is a name or a message of 4 KiB.
pub const OPTION_REPLY_BYTES_MAX: u32 = 16 << 10;
/// Most answers to one option before its last one.
pub const OPTION_REPLIES_MAX: usize = 64;
/// Most bytes of an export's or a context's name (NBD's own limit for strings).
pub const NAME_BYTES_MAX: usize = 4096;
/// Most extents in one answer about block status: QEMU stops at 1 MiB of them.
pub const STATUS_EXTENTS_MAX: u32 = 131_072;
/// Most bytes of an error message in a reply.
pub const MESSAGE_BYTES_MAX: u32 = 4096 + 16;
/// Largest payload that both sides take if nothing else was agreed.
pub const PAYLOAD_BYTES_DEFAULT: u32 = 32 << 20;

/// `NBDMAGIC`, the first 8 bytes of a server.
pub const MAGIC_GREETING: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, the next 8, and the start of every option.
pub const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const MAGIC_REQUEST: u32 = 0x2560_9513;
const MAGIC_SIMPLE: u32 = 0x6744_6698;
const MAGIC_STRUCTURED: u32 = 0x668e_33ef;

/// Bytes of a greeting.
pub const GREETING_BYTES: usize = 18;
/// Bytes before an option reply's data.
pub const OPTION_REPLY_HEAD_BYTES: usize = 20;
/// Bytes of a request without its payload.
pub const REQUEST_BYTES: usize = 28;
/// Bytes that a simple reply and a structured chunk have in common.
pub const REPLY_HEAD_BYTES: usize = 16;

const FLAG_FIXED_NEWSTYLE: u16 = 1;
const FLAG_NO_ZEROES: u16 = 2;

/// Transmission flag: the server takes flushes.
pub const EXPORT_FLUSH: u16 = 1 << 2;
/// Transmission flag: the export cannot be written to.
pub const EXPORT_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: the server takes trims.
pub const EXPORT_TRIM: u16 = 1 << 5;
/// Transmission flag: the server takes zeroing without data.
pub const EXPORT_WRITE_ZEROES: u16 = 1 << 6;

/// `base:allocation`: reads as zeros.
pub const ALLOCATION_ZERO: u32 = 2;
/// `qemu:dirty-bitmap:..`: written since the bitmap was enabled.
pub const BITMAP_DIRTY: u32 = 1;

/// Bytes that are not NBD, or not the NBD that was agreed on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// A magic number is wrong.
    #[error("{place} starts with {found:#x}")]
    Magic {
        /// Where.
        place: &'static str,
        /// What stood there.
        found: u64,
    },
    /// The server speaks only a handshake that was given up in 2011.
    #[error("the server does not offer the fixed newstyle handshake")]
    OldHandshake,
    /// A length is above its limit, or too short for what it holds.
    #[error("{place} has {bytes} bytes")]
    Length {
        /// Of what.
        place: &'static str,
        /// The length found.
        bytes: u64,
    },
    /// An answer to a question that was not asked.
    #[error("an answer to {place} {found} came, which was not asked")]
    Stray {
        /// What kind of question.
        place: &'static str,
        /// Its number.
        found: u64,
    },
    /// A kind of chunk that cannot answer this request.
    #[error("a chunk of type {kind:#x} came in answer to {command:?}")]
    Chunk {
        /// The chunk's type.
        kind: u16,
        /// What was asked.
        command: Command,
    },
    /// A reply covers bytes that were not asked for, some twice, or not all.
    #[error("the answer to {command:?} covers the wrong bytes at offset {offset}")]
    Coverage {
        /// What was asked.
        command: Command,
        /// Where it goes wrong.
        offset: u64,
    },
    /// The server went on answering without an end.
    #[error("more than {limit} answers to one question")]
    Endless {
        /// The limit that was hit.
        limit: usize,
    },
}

/// Options of the handshake that this client uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum HandshakeOption {
    /// Ends the handshake without an export.
    Abort = 2,
    /// Chooses the export and ends the handshake.
    Go = 7,
    /// Allows replies in chunks.
    StructuredReply = 8,
    /// Chooses the kinds of block status.
    SetMetaContext = 10,
}

/// Requests that this client makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Read bytes.
    Read = 0,
    /// Write bytes.
    Write = 1,
    /// Say good-bye; has no reply.
    Disconnect = 2,
    /// Make what was answered durable.
    Flush = 3,
    /// Give bytes up.
    Trim = 4,
    /// Make bytes read as zeros.
    WriteZeroes = 6,
    /// Ask for extents.
    BlockStatus = 7,
}

/// What a server says of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes.
    pub bytes: u64,
    /// Transmission flags, `EXPORT_..`.
    pub flags: u16,
    /// Offsets and lengths must be multiples of this power of two.
    pub block_bytes_min: u32,
    /// Most bytes in one read or write.
    pub payload_bytes_max: u32,
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from(be16(bytes, at)) << 16 | u32::from(be16(bytes, at + 2))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

/// Reads a server's greeting and gives the client's answer to it.
pub fn answer_greeting(bytes: &[u8; GREETING_BYTES]) -> Result<[u8; 4], CodecError> {
    if be64(bytes, 0) != MAGIC_GREETING {
        return Err(CodecError::Magic { place: "the greeting", found: be64(bytes, 0) });
    }
    if be64(bytes, 8) != MAGIC_OPTION {
        return Err(CodecError::Magic {
            place: "the greeting's second half",
            found: be64(bytes, 8),
        });
    }
    let offered = be16(bytes, 16);
    if offered & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(CodecError::OldHandshake);
    }
    Ok(u32::from(offered & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)).to_be_bytes())
}

/// An option with its data.
pub fn encode_option(option: HandshakeOption, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).expect("options are built here, far below 4 GiB");
    let mut out = Vec::with_capacity(16 + data.len());
    out.extend_from_slice(&MAGIC_OPTION.to_be_bytes());
    out.extend_from_slice(&(option as u32).to_be_bytes());
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(data);
    out
}

fn push_name(out: &mut Vec<u8>, name: &str) {
    let len = u32::try_from(name.len()).expect("names are checked against NAME_BYTES_MAX first");
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(name.as_bytes());
}

/// Data of [`HandshakeOption::Go`], asking for block sizes too.
pub fn go_data(export: &str) -> Vec<u8> {
    const INFO_BLOCK_SIZE: u16 = 3;
    let mut out = Vec::with_capacity(export.len() + 8);
    push_name(&mut out, export);
    out.extend_from_slice(&1u16.to_be_bytes());
    out.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
    out
}

/// Data of [`HandshakeOption::SetMetaContext`].
pub fn meta_context_data(export: &str, contexts: &[&str]) -> Vec<u8> {
    let count = u32::try_from(contexts.len()).expect("a client asks for a handful of contexts");
    let mut out = Vec::new();
    push_name(&mut out, export);
    out.extend_from_slice(&count.to_be_bytes());
    for context in contexts {
        push_name(&mut out, context);
    }
    out
}

/// The head of an answer to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHead {
    /// The kind of answer: see [`OptionReply`].
    pub kind: u32,
    /// Bytes of data that follow, within [`OPTION_REPLY_BYTES_MAX`].
    pub len: u32,
}

/// Reads the head of an answer to `option`.
pub fn decode_option_reply_head(
    bytes: &[u8; OPTION_REPLY_HEAD_BYTES],
    option: HandshakeOption,
) -> Result<OptionReplyHead, CodecError> {
    if be64(bytes, 0) != MAGIC_OPTION_REPLY {
        return Err(CodecError::Magic { place: "an option's answer", found: be64(bytes, 0) });
    }
    if be32(bytes, 8) != option as u32 {
        return Err(CodecError::Stray { place: "option", found: u64::from(be32(bytes, 8)) });
    }
    let len = be32(bytes, 16);
    if len > OPTION_REPLY_BYTES_MAX {
        return Err(CodecError::Length { place: "an option's answer", bytes: u64::from(len) });
    }
    Ok(OptionReplyHead { kind: be32(bytes, 12), len })
}

/// An answer to an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionReply {
    /// Done.
    Ack,
    /// Size and flags of the export.
    Export {
        /// Size in bytes.
        bytes: u64,
        /// Transmission flags.
        flags: u16,
    },
    /// Limits of requests.
    BlockSize {
        /// Least alignment.
        min: u32,
        /// Most bytes in one read or write.
        payload_max: u32,
    },
    /// A kind of block status was chosen.
    Context {
        /// Its number on this connection.
        id: u32,
        /// Its name.
        name: String,
    },
    /// Something that a client may skip.
    Other,
    /// The option was refused.
    Refused {
        /// NBD's error number, with the top bit.
        code: u32,
        /// The server's words.
        message: String,
    },
}

/// NBD's `NBD_REP_ERR_UNSUP`: the server does not know the option.
pub const REFUSED_UNSUPPORTED: u32 = 0x8000_0001;
/// NBD's `NBD_REP_ERR_TLS_REQD`: nothing without TLS.
pub const REFUSED_TLS_REQUIRED: u32 = 0x8000_0005;
/// NBD's `NBD_REP_ERR_UNKNOWN`: no such export.
pub const REFUSED_UNKNOWN_EXPORT: u32 = 0x8000_0006;

/// Reads the data of an answer to an option.
pub fn decode_option_reply(kind: u32, data: &[u8]) -> Result<OptionReply, CodecError> {
    let short = |place| CodecError::Length { place, bytes: data.len() as u64 };
    match kind {
        1 => Ok(OptionReply::Ack),
        3 => {
            if data.len() < 2 {
                return Err(short("an export's description"));
            }
            match be16(data, 0) {
                0 if data.len() == 12 => {
                    Ok(OptionReply::Export { bytes: be64(data, 2), flags: be16(data, 10) })
                }
                3 if data.len() == 14 => {
                    let (min, payload_max) = (be32(data, 2), be32(data, 10));
                    // A minimum that is no power of two, or above the largest payload, would make
                    // every request illegal; NBD caps it at 64 KiB.
                    if !min.is_power_of_two() || min > 65_536 || payload_max < min {
                        return Err(CodecError::Length {
                            place: "the server's block size",
                            bytes: u64::from(min),
                        });
                    }
                    Ok(OptionReply::BlockSize { min, payload_max })
                }
                0 | 3 => Err(short("an export's description")),
                _ => Ok(OptionReply::Other),
            }
        }
        4 => {
            if data.len() < 4 || data.len() > 4 + NAME_BYTES_MAX {
                return Err(short("a metadata context"));
            }
            let name = String::from_utf8_lossy(&data[4..]).into_owned();
            Ok(OptionReply::Context { id: be32(data, 0), name })
        }
        code if code & 0x8000_0000 != 0 => Ok(OptionReply::Refused {
            code,
            message: String::from_utf8_lossy(data).trim().to_owned(),
        }),
        _ => Ok(OptionReply::Other),
    }
}

/// A request's head. Lengths are the caller's to check against [`ExportInfo`].
pub fn encode_request(
    command: Command,
    flags: u16,
    cookie: u64,
    offset: u64,
    len: u32,
) -> [u8; REQUEST_BYTES] {
    let mut out = [0; REQUEST_BYTES];
    out[0..4].copy_from_slice(&MAGIC_REQUEST.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&(command as u16).to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..24].copy_from_slice(&offset.to_be_bytes());
    out[24..28].copy_from_slice(&len.to_be_bytes());
    out
}

/// Request flag: keep the space of zeroes allocated.
pub const REQUEST_NO_HOLE: u16 = 1 << 1;

/// The first [`REPLY_HEAD_BYTES`] of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHead {
    /// The whole reply but the data of a read.
    Simple {
        /// 0, or NBD's error number.
        error: u32,
        /// Which request.
        cookie: u64,
    },
    /// A chunk; its length, a big-endian `u32`, follows.
    Chunk {
        /// Whether this is the last one.
        done: bool,
        /// Its type, `CHUNK_..`.
        kind: u16,
        /// Which request.
        cookie: u64,
    },
}

/// Chunk without content.
pub const CHUNK_NONE: u16 = 0;
/// Chunk with an offset (8 bytes) and data.
pub const CHUNK_DATA: u16 = 1;
/// Chunk with an offset (8 bytes) and a length (4): zeros.
pub const CHUNK_HOLE: u16 = 2;
/// Chunk with a context's id (4 bytes) and extents.
pub const CHUNK_STATUS: u16 = 5;
/// Chunk types from here on are errors.
pub const CHUNK_ERROR: u16 = 0x8001;

/// Reads the first bytes of a reply.
pub fn decode_reply_head(bytes: &[u8; REPLY_HEAD_BYTES]) -> Result<ReplyHead, CodecError> {
    match be32(bytes, 0) {
        MAGIC_SIMPLE => Ok(ReplyHead::Simple { error: be32(bytes, 4), cookie: be64(bytes, 8) }),
        MAGIC_STRUCTURED => Ok(ReplyHead::Chunk {
            done: be16(bytes, 4) & 1 != 0,
            kind: be16(bytes, 6),
            cookie: be64(bytes, 8),
        }),
        found => Err(CodecError::Magic { place: "a reply", found: u64::from(found) }),
    }
}

/// Offset and length in a [`CHUNK_HOLE`].
pub fn decode_hole(payload: &[u8; 12]) -> (u64, u32) {
    (be64(payload, 0), be32(payload, 8))
}

/// Error number and message in an error chunk of at most [`MESSAGE_BYTES_MAX`] bytes.
pub fn decode_error(payload: &[u8]) -> Result<(u32, String), CodecError> {
    if payload.len() < 6 {
        return Err(CodecError::Length { place: "an error", bytes: payload.len() as u64 });
    }
    let message_len = usize::from(be16(payload, 4));
    // After the message an offset may follow, depending on the kind of error: not needed.
    let Some(message) = payload.get(6..6 + message_len) else {
        return Err(CodecError::Length { place: "an error's message", bytes: message_len as u64 });
    };
    // Some servers send 0 as an error; 5 is EIO.
    Ok((be32(payload, 0).max(1), String::from_utf8_lossy(message).into_owned()))
}

/// Context and extents (length, flags) in a [`CHUNK_STATUS`].
pub fn decode_status(payload: &[u8]) -> Result<(u32, Vec<(u32, u32)>), CodecError> {
    if payload.len() < 12
        || !(payload.len() - 4).is_multiple_of(8)
        || payload.len() > 4 + 8 * STATUS_EXTENTS_MAX as usize
    {
        return Err(CodecError::Length { place: "a block status", bytes: payload.len() as u64 });
    }
    let extents = payload[4..].chunks_exact(8).map(|e| (be32(e, 0), be32(e, 4))).collect();
    Ok((be32(payload, 0), extents))
}

/// NBD's name for an error number: they are Linux's.
pub fn error_name(code: u32) -> &'static str {
    match code {
        1 => "operation not permitted",
        5 => "input/output error",
        12 => "out of memory",
        22 => "invalid argument",
        28 => "no space left on the device",
        75 => "value too large",
        95 => "not supported",
        108 => "the server is shutting down",
        _ => "unknown error",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_have_the_documented_bytes() {
        let bytes = encode_request(Command::BlockStatus, 8, 0x0102, 0x1000, 0x200);
        assert_eq!(bytes[..8], [0x25, 0x60, 0x95, 0x13, 0, 8, 0, 7]);
        assert_eq!(bytes[8..16], 0x0102u64.to_be_bytes());
        assert_eq!(bytes[16..24], 0x1000u64.to_be_bytes());
        assert_eq!(bytes[24..], 0x200u32.to_be_bytes());
    }

    #[test]
    fn options_have_the_documented_bytes() {
        let bytes = encode_option(HandshakeOption::Go, &go_data("d"));
        assert_eq!(&bytes[..8], b"IHAVEOPT");
        assert_eq!(bytes[8..], [0, 0, 0, 7, 0, 0, 0, 9, 0, 0, 0, 1, b'd', 0, 1, 0, 3]);
        let data = meta_context_data("d", &["base:allocation"]);
        assert_eq!(data[..9], [0, 0, 0, 1, b'd', 0, 0, 0, 1]);
        assert_eq!(data[9..13], [0, 0, 0, 15]);
        assert_eq!(&data[13..], b"base:allocation");
    }

    #[test]
    fn greeting_without_fixed_newstyle_is_refused() {
        let mut bytes = *b"NBDMAGICIHAVEOPT\x00\x03";
        assert_eq!(answer_greeting(&bytes), Ok([0, 0, 0, 3]));
        bytes[17] = 2;
        assert_eq!(answer_greeting(&bytes), Err(CodecError::OldHandshake));
        bytes[0] = b'X';
        assert!(matches!(answer_greeting(&bytes), Err(CodecError::Magic { .. })));
    }

    #[test]
    fn an_option_answer_above_the_limit_is_refused_before_it_is_read() {
        let mut bytes = [0; OPTION_REPLY_HEAD_BYTES];
        bytes[..8].copy_from_slice(&MAGIC_OPTION_REPLY.to_be_bytes());
        bytes[8..12].copy_from_slice(&7u32.to_be_bytes());
        bytes[12..16].copy_from_slice(&1u32.to_be_bytes());
        bytes[16..].copy_from_slice(&OPTION_REPLY_BYTES_MAX.to_be_bytes());
        assert!(decode_option_reply_head(&bytes, HandshakeOption::Go).is_ok());
        bytes[16..].copy_from_slice(&(OPTION_REPLY_BYTES_MAX + 1).to_be_bytes());
        assert!(decode_option_reply_head(&bytes, HandshakeOption::Go).is_err());
        assert!(decode_option_reply_head(&bytes, HandshakeOption::Abort).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_decoder_panic(
            kind in prop_oneof![any::<u32>(), 0u32..8, 0x8000_0000u32..0x8000_0010],
            data in prop::collection::vec(any::<u8>(), 0..200),
            head in any::<[u8; 20]>(),
            first in any::<[u8; 16]>(),
        ) {
            let _ = decode_option_reply(kind, &data);
            let _ = decode_option_reply_head(&head, HandshakeOption::Go);
            let _ = decode_reply_head(&first);
            let _ = decode_error(&data);
            let _ = decode_status(&data);
        }

        #[test]
        fn block_status_is_read_as_it_was_written(
            context in any::<u32>(),
            extents in prop::collection::vec(any::<(u32, u32)>(), 1..50),
        ) {
            let mut payload = context.to_be_bytes().to_vec();
            for (len, flags) in &extents {
                payload.extend_from_slice(&len.to_be_bytes());
                payload.extend_from_slice(&flags.to_be_bytes());
            }
            prop_assert_eq!(decode_status(&payload), Ok((context, extents)));
            payload.pop();
            prop_assert!(decode_status(&payload).is_err());
        }
    }
}

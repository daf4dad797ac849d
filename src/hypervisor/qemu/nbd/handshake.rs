//! From a fresh connection to an export: greeting, chunked replies, kinds of block status, export.
//!
//! Invariant: ends in the transmission phase with exactly the contexts that were asked for, or in
//! an error; an export without one of them is never used as if it had it.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::codec::{
    self, CodecError, ExportInfo, GREETING_BYTES, HandshakeOption, NAME_BYTES_MAX,
    OPTION_REPLIES_MAX, OPTION_REPLY_HEAD_BYTES, OptionReply, PAYLOAD_BYTES_DEFAULT,
};
use super::{Command, NbdError};

/// What the handshake agreed on.
#[derive(Debug)]
pub(super) struct Agreed {
    /// The export.
    pub(super) info: ExportInfo,
    /// Ids of the contexts, in the order in which they were asked for.
    pub(super) contexts: Vec<u32>,
}

/// A connection in its handshake.
pub(super) struct Handshake<'a, S> {
    stream: &'a mut S,
    export: &'a str,
}

impl<'a, S: AsyncRead + AsyncWrite + Unpin> Handshake<'a, S> {
    pub(super) fn new(stream: &'a mut S, export: &'a str) -> Self {
        Self { stream, export }
    }

    /// Runs the handshake to its end.
    pub(super) async fn run(mut self, contexts: &[&str]) -> Result<Agreed, NbdError> {
        if contexts.iter().chain([&self.export]).any(|name| name.len() > NAME_BYTES_MAX) {
            return Err(NbdError::Illegal {
                export: self.export.to_owned(),
                command: Command::BlockStatus,
                offset: 0,
                len: 0,
                reason: "a name is longer than NBD allows",
            });
        }
        let mut greeting = [0; GREETING_BYTES];
        self.stream.read_exact(&mut greeting).await.map_err(|e| self.lost(e))?;
        let answer = codec::answer_greeting(&greeting).map_err(|e| self.broken(e))?;
        self.stream.write_all(&answer).await.map_err(|e| self.lost(e))?;

        self.ask(HandshakeOption::StructuredReply, &[]).await?;
        let mut ids = Vec::with_capacity(contexts.len());
        if !contexts.is_empty() {
            let data = codec::meta_context_data(self.export, contexts);
            let replies = self.ask(HandshakeOption::SetMetaContext, &data).await?;
            for wanted in contexts {
                // A context that the export does not have is left out without a word.
                let id = replies.iter().find_map(|reply| match reply {
                    OptionReply::Context { id, name } if name == wanted => Some(*id),
                    _ => None,
                });
                ids.push(id.ok_or_else(|| NbdError::NoContext {
                    export: self.export.to_owned(),
                    context: (*wanted).to_owned(),
                })?);
            }
        }
        let replies = self.ask(HandshakeOption::Go, &codec::go_data(self.export)).await?;
        let mut size = None;
        let mut limits = (1, PAYLOAD_BYTES_DEFAULT);
        for reply in replies {
            match reply {
                OptionReply::Export { bytes, flags } => size = Some((bytes, flags)),
                OptionReply::BlockSize { min, payload_max } => limits = (min, payload_max),
                _ => {}
            }
        }
        let Some((bytes, flags)) = size else {
            return Err(self.broken(CodecError::Length { place: "the export's size", bytes: 0 }));
        };
        let (block_bytes_min, payload_bytes_max) = limits;
        let info = ExportInfo { bytes, flags, block_bytes_min, payload_bytes_max };
        Ok(Agreed { info, contexts: ids })
    }

    /// Sends an option and collects the answers before its acknowledgement.
    async fn ask(
        &mut self,
        option: HandshakeOption,
        data: &[u8],
    ) -> Result<Vec<OptionReply>, NbdError> {
        let bytes = codec::encode_option(option, data);
        self.stream.write_all(&bytes).await.map_err(|e| self.lost(e))?;
        let mut replies = Vec::new();
        while replies.len() < OPTION_REPLIES_MAX {
            let mut head = [0; OPTION_REPLY_HEAD_BYTES];
            self.stream.read_exact(&mut head).await.map_err(|e| self.lost(e))?;
            let head =
                codec::decode_option_reply_head(&head, option).map_err(|e| self.broken(e))?;
            let mut data = vec![0; head.len as usize];
            self.stream.read_exact(&mut data).await.map_err(|e| self.lost(e))?;
            match codec::decode_option_reply(head.kind, &data).map_err(|e| self.broken(e))? {
                OptionReply::Ack => return Ok(replies),
                OptionReply::Refused { code, message } => {
                    return Err(self.refused(option, code, message));
                }
                reply => replies.push(reply),
            }
        }
        Err(self.broken(CodecError::Endless { limit: OPTION_REPLIES_MAX }))
    }

    fn refused(&self, option: HandshakeOption, code: u32, message: String) -> NbdError {
        let export = self.export.to_owned();
        match code {
            codec::REFUSED_TLS_REQUIRED => NbdError::TlsRequired { export },
            codec::REFUSED_UNKNOWN_EXPORT => NbdError::NoExport { export },
            _ => NbdError::OptionRefused { export, option, code, message },
        }
    }

    fn lost(&self, source: std::io::Error) -> NbdError {
        NbdError::Lost { export: self.export.to_owned(), source: source.into() }
    }

    fn broken(&self, source: CodecError) -> NbdError {
        NbdError::Protocol { export: self.export.to_owned(), source }
    }
}

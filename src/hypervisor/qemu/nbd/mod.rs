//! A client of QEMU's NBD servers: `codec` is their bytes, `reply` puts answers together, both pure;
//! `client` and its `tasks` move the bytes.
//!
//! Invariant: what a server says is checked before it is used, and a connection that broke once
//! stays broken: every request after it fails, none is repeated behind the caller's back.

pub mod client;
pub mod codec;
mod handshake;
mod reply;
mod tasks;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

pub use client::{NbdClient, READ_BYTES_MAX, server_greets};
pub use codec::{CodecError, Command, ExportInfo};
pub use reply::Status;

use crate::hypervisor::HypervisorError;

/// Where an NBD server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdAddress {
    /// A unix socket with a path.
    Unix(PathBuf),
    /// A unix socket in Linux' abstract namespace, without the leading zero byte.
    Abstract(Vec<u8>),
    /// A TCP port.
    Tcp(SocketAddr),
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Abstract(name) => write!(f, "@{}", String::from_utf8_lossy(name)),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// Why an NBD server did not do what it was asked.
///
/// Cloneable, since one broken connection fails every request that waits on it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum NbdError {
    /// Nothing answers there.
    #[error("cannot connect to the NBD server at {address}")]
    Connect {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// The connection broke.
    #[error("the NBD connection for export {export} broke: its server died or was stopped")]
    Lost {
        /// The export.
        export: String,
        /// How.
        #[source]
        source: Arc<io::Error>,
    },
    /// The server stopped answering.
    #[error("the NBD server of export {export} did not answer within {seconds} s")]
    Silent {
        /// The export.
        export: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The server's bytes are not NBD, or not in order.
    #[error("the NBD server of export {export} does not keep to the protocol")]
    Protocol {
        /// The export.
        export: String,
        /// What is wrong.
        #[source]
        source: CodecError,
    },
    /// The server serves nobody without TLS.
    #[error(
        "the NBD server of export {export} asks for TLS, which is not supported here: stop that \
         server, or start it without tls-creds on a unix socket"
    )]
    TlsRequired {
        /// The export.
        export: String,
    },
    /// The server does not have the export.
    #[error("the NBD server has no export {export}")]
    NoExport {
        /// The export.
        export: String,
    },
    /// The server does not offer a kind of block status for the export.
    #[error("the NBD server does not offer {context} for export {export}")]
    NoContext {
        /// The export.
        export: String,
        /// The metadata context.
        context: String,
    },
    /// The server refused an option of the handshake.
    #[error("the NBD server refused {option:?} for export {export}: error {code:#x} {message}")]
    OptionRefused {
        /// The export.
        export: String,
        /// What it refused.
        option: codec::HandshakeOption,
        /// NBD's number.
        code: u32,
        /// The server's words.
        message: String,
    },
    /// The server could not do what a request asked.
    #[error(
        "{command:?} of {len} bytes at {offset} of export {export} failed: {}{}{message}",
        codec::error_name(*.code),
        if .message.is_empty() { "" } else { ": " }
    )]
    Failed {
        /// The export.
        export: String,
        /// The request.
        command: Command,
        /// Its first byte.
        offset: u64,
        /// Its length.
        len: u64,
        /// NBD's number.
        code: u32,
        /// The server's words, may be empty.
        message: String,
    },
    /// A request that the export cannot take: the caller's mistake, nothing was sent.
    #[error("{command:?} of {len} bytes at {offset} does not fit export {export}: {reason}")]
    Illegal {
        /// The export.
        export: String,
        /// The request.
        command: Command,
        /// Its first byte.
        offset: u64,
        /// Its length.
        len: u64,
        /// What is wrong.
        reason: &'static str,
    },
}

impl NbdError {
    /// Whether the server is gone, as opposed to unwilling.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::Lost { .. } | Self::Silent { .. })
    }

    /// The error in an operator's terms: `doing` what, to which VM's disk.
    pub fn of_vm(self, vm: &str, doing: &str) -> HypervisorError {
        let vm = vm.to_owned();
        match self {
            Self::TlsRequired { .. } => {
                HypervisorError::Unsupported { vm, reason: format!("{doing}: {self}") }
            }
            Self::Failed { .. } | Self::OptionRefused { .. } | Self::NoExport { .. } => {
                let detail = self.with_source();
                HypervisorError::Refused { vm, command: doing.to_owned(), detail }
            }
            _ if self.is_gone() => {
                let detail = format!("{doing}: {}", self.with_source());
                HypervisorError::Gone { vm, detail }
            }
            _ => {
                let detail = format!("{doing}: {}", self.with_source());
                HypervisorError::Unexpected { vm, detail }
            }
        }
    }

    fn with_source(&self) -> String {
        match std::error::Error::source(self) {
            Some(source) => format!("{self} ({source})"),
            None => self.to_string(),
        }
    }
}

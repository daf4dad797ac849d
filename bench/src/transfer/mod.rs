//! What a transport makes of a link: transfers through a fresh WAN, ours beside its rivals'.
//!
//! Invariant: every tool is given the same link, the same losses for the same run, the same payload
//! and the same count: what stands in a row is worked out in one place, `account`, from what the
//! relay saw and when the payload arrived.
//!
//! ```text
//!  lab link run --- [flow] ---+-- stdin: an order -- a process in a: [longhaul] [quic] [tcp] [rsync]
//!       |                     +-- stdin: an order -- a process in b: the same
//!     [wan]                            stdout: ready, then what it sent or received
//! ```
//! Each end of a flow is a process of its own, so that its CPU time can be told apart. Reading order:
//! this file, `flow`, [`link`] (one flow at a time), [`share`] (several at once), [`rows`], [`summary`].

pub(crate) mod account;
pub mod caps;
pub mod ends;
mod flow;
pub mod link;
mod longhaul;
mod meter;
mod quic;
pub mod rows;
mod rsync;
pub mod share;
pub mod summary;
mod tcp;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::netns::Side;

/// What carries the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Tool {
    /// This product's transport with its default settings.
    Longhaul,
    /// The same, yielding to whoever else is on the link.
    LonghaulBackground,
    /// The same as the first, over two connections from the start.
    #[serde(rename = "longhaul-2")]
    #[value(name = "longhaul-2")]
    Longhaul2,
    /// The same, over four.
    #[serde(rename = "longhaul-4")]
    #[value(name = "longhaul-4")]
    Longhaul4,
    /// quinn as it comes, its CUBIC.
    QuinnCubic,
    /// quinn as it comes, its BBR.
    QuinnBbr,
    /// The kernel's TCP with BBR, one stream.
    TcpBbr,
    /// The kernel's TCP with CUBIC, one stream.
    TcpCubic,
    /// The kernel's TCP with BBR, eight streams.
    #[serde(rename = "tcp-bbr-8")]
    #[value(name = "tcp-bbr-8")]
    TcpBbr8,
    /// The kernel's TCP with CUBIC, eight streams.
    #[serde(rename = "tcp-cubic-8")]
    #[value(name = "tcp-cubic-8")]
    TcpCubic8,
    /// One file by rsync to an rsync daemon, over TCP with BBR.
    Rsync,
}

/// The program behind a tool, with what differs between tools of one program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Engine {
    Longhaul,
    Quinn(quic::Control),
    Tcp { control: &'static str, streams: usize },
    Rsync,
}

impl Tool {
    /// Its name in commands and rows.
    pub fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self)
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }

    fn engine(self) -> Engine {
        match self {
            Self::Longhaul | Self::LonghaulBackground | Self::Longhaul2 | Self::Longhaul4 => {
                Engine::Longhaul
            }
            Self::QuinnCubic => Engine::Quinn(quic::Control::Cubic),
            Self::QuinnBbr => Engine::Quinn(quic::Control::Bbr),
            Self::TcpBbr => Engine::Tcp { control: "bbr", streams: 1 },
            Self::TcpCubic => Engine::Tcp { control: "cubic", streams: 1 },
            Self::TcpBbr8 => Engine::Tcp { control: "bbr", streams: 8 },
            Self::TcpCubic8 => Engine::Tcp { control: "cubic", streams: 8 },
            Self::Rsync => Engine::Rsync,
        }
    }
}

/// When a transfer is over.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// After this many bytes of payload.
    Bytes(u64),
    /// Nothing more is offered after this many seconds.
    Seconds(f64),
}

/// What one end of a flow has to do; the first line of its standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Order {
    /// `a` sends, `b` receives.
    side: Side,
    tool: Tool,
    bound: Bound,
    /// Whether what was offered is brought to its end, or dropped when the time is over.
    is_drained: bool,
    /// What this product's transport may send.
    #[serde(default)]
    caps: caps::Caps,
    /// Where the receiver listens. For the receiver itself 0: any.
    port: u16,
    /// Keys and files of this flow.
    folder: PathBuf,
    /// Largest IP packet in bytes.
    mtu: u16,
}

/// A line of an end's standard output.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    /// The receiver listens.
    Ready { port: u16 },
    /// The sender is done.
    Sent(Sent),
    /// The receiver is done.
    Received(Received),
    /// It could not be done.
    Failed { why: String },
}

/// What the sender of a flow did. Moments are microseconds of the host's monotonic clock.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Sent {
    /// When the first byte was offered; the connection was made before, except by rsync.
    began_us: u64,
    /// When nothing more was offered.
    ended_us: u64,
    offered_bytes: u64,
    /// Packets whose content was sent again, as the sender counts them; absent where it does not say.
    repeated_packets: Option<u64>,
    /// CPU seconds from the connection on.
    cpu_s: f64,
}

/// What the receiver of a flow saw.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Received {
    /// When payload arrived last.
    last_us: u64,
    payload_bytes: u64,
    /// CPU seconds from the connection on.
    cpu_s: f64,
    /// One every [`meter::SAMPLE_PERIOD`].
    samples: Vec<Sample>,
}

/// What had arrived at a moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Sample {
    at_us: u64,
    /// IP bytes of this flow, without repetitions where the tool does not count them.
    flow_bytes: u64,
    /// IP bytes of everybody, as the device of this end counts them.
    device_bytes: u64,
}

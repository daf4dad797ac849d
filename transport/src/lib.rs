#![doc = include_str!("../PROTOCOL.md")]

mod accept;
mod bit_rate;
mod class;
mod close;
mod congestion;
mod control;
mod dial;
mod driver;
mod endpoint;
mod errors;
mod fingerprint;
mod frame;
#[cfg(fuzzing)]
pub mod fuzzing;
mod greeting;
mod home;
mod identity;
mod inbox;
mod keeper;
mod kept;
mod lanes;
mod link;
mod load;
mod outbox;
mod pace;
mod rate;
mod receipts;
mod reset;
mod session;
mod socket;
mod stats;
mod timer;
mod tls;
mod trust;
mod tuning;
mod watched;

pub use bit_rate::{BitRate, ParseBitRateError};
pub use class::Class;
pub use close::CloseReason;
pub use control::{ControlReceiver, ControlSender};
pub use endpoint::{ACCEPT_BACKLOG, Endpoint, HANDSHAKE_TIMEOUT, MAX_PENDING_HANDSHAKES};
pub use errors::{BindError, ConnectError};
pub use fingerprint::{Fingerprint, ParseFingerprintError};
pub use frame::{
    FrameError, MAX_AGENT_VERSION, MAX_BATCH_BYTES, MAX_CONTROL_FRAME, PROTOCOL_VERSION,
};
pub use identity::{Identity, IdentityError, KEY_FILE};
pub use inbox::{Batch, INBOUND_BULK_BYTES, INBOUND_URGENT_BYTES};
pub use keeper::MAX_SESSIONS_OF_A_PEER;
pub use lanes::LANES_MAX;
pub use rate::{BURST, JobRate, RateLimiter};
pub use receipts::STALL_TIMEOUT;
pub use session::{PeerInfo, RecvError, SendError, Session, SessionView};
pub use stats::{ClassBytes, IPV4_UDP_HEADER, IPV6_UDP_HEADER, PathStats};
pub use tls::TlsError;
pub use trust::{Trust, TrustedPeers};
pub use tuning::{
    CONNECTION_WINDOW, Congestion, ETHERNET_PAYLOAD, IDLE_TIMEOUT, IDLE_TIMEOUT_MAX,
    IDLE_TIMEOUT_MIN, KEEP_ALIVE, MAX_UNI_STREAMS, MIN_PAYLOAD, SOCKET_BUFFER, STREAM_WINDOW,
    Tuning,
};

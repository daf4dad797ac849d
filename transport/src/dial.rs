//! Connecting to an agent: the first time, and again for a session whose connection is lost.
//!
//! Invariant: whoever answers has proved the key that was asked for, every time anew.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, ConnectionError, TransportConfig, TransportErrorCode};
use tokio::time::timeout;

use crate::close::{CloseCode, CloseReason, readable};
use crate::endpoint::{HANDSHAKE_TIMEOUT, Shared};
use crate::errors::ConnectError;
use crate::fingerprint::Fingerprint;
use crate::frame::{Hello, Seen, SessionId};
use crate::greeting::{self, Greeted, GreetingError};
use crate::identity::CERTIFICATE_NAME;
use crate::link::Line;
use crate::pace::Place;
use crate::tls::{self, Expect, Presented};

/// How long one try waits for an answer when a connection is made again. Short: while the link is
/// down every one of them fails, and the first one after it decides how long the session stands.
const AGAIN: Duration = Duration::from_secs(2);

/// Where a session's peer is, and what it is told.
#[derive(Clone)]
pub(crate) struct Dial {
    pub(crate) shared: Arc<Shared>,
    pub(crate) addr: SocketAddr,
    pub(crate) expected: Fingerprint,
    pub(crate) session: SessionId,
}

impl Dial {
    /// The greeting of this session.
    pub(crate) fn hello(&self, goes_on: Option<Seen>) -> Hello {
        self.shared.hello_of(self.session, goes_on)
    }

    /// What to tell of a try that failed.
    pub(crate) fn failed(&self, presented: &Presented, error: GreetingError) -> ConnectError {
        self.shared.connect_error(self.addr, Some(self.expected), presented, error)
    }

    /// To the same peer, under another name.
    pub(crate) fn another(&self) -> Self {
        Self { session: SessionId(rand::random()), ..self.clone() }
    }

    /// Connects for the first time.
    pub(crate) async fn first(&self) -> Result<(Connection, Arc<Place>), ConnectError> {
        self.connect(self.shared.transport.clone()).await
    }

    /// Connects for the first time and greets, as a lane of the session `lane_of` if it is to be one.
    pub(crate) async fn greet(
        &self,
        lane_of: Option<SessionId>,
    ) -> Result<((Connection, Arc<Place>), Greeted), ConnectError> {
        let attempt = async {
            let made = self.first().await?;
            let hello = Hello { lane_of, ..self.hello(None) };
            match greeting::connect(&made.0, &hello).await {
                Ok(greeted) => Ok((made, greeted)),
                Err(error) => Err(self.failed(&Presented::default(), error)),
            }
        };
        let greeted = timeout(HANDSHAKE_TIMEOUT, attempt).await;
        greeted.unwrap_or(Err(ConnectError::Unreachable { addr: self.addr }))
    }

    /// Tries once to connect anew, with what is known of the path from `line`.
    pub(crate) async fn again(
        &self,
        line: &Line,
    ) -> Result<(Connection, Arc<Place>), ConnectError> {
        let [_, bandwidth] = line.pacing.rates();
        let path = line.connection.stats().path;
        let transport = self.shared.tuning.transport_after(bandwidth, path.min_rtt);
        let connecting = self.connect(Arc::new(transport));
        let connected = timeout(AGAIN.max(3 * path.rtt), connecting).await;
        connected.unwrap_or(Err(ConnectError::Unreachable { addr: self.addr }))
    }

    async fn connect(
        &self,
        transport: Arc<TransportConfig>,
    ) -> Result<(Connection, Arc<Place>), ConnectError> {
        let presented = Presented::default();
        let expect = Expect::Key(self.expected);
        let (connecting, place) =
            self.shared.start(self.addr, expect, presented.clone(), transport)?;
        match connecting.await {
            Ok(connection) => Ok((connection, place)),
            Err(error) => Err(self.failed(&presented, GreetingError::Lost(error))),
        }
    }
}

impl Shared {
    /// Begins a connection; with its place at the socket.
    pub(crate) fn start(
        &self,
        addr: SocketAddr,
        expect: Expect,
        presented: Presented,
        transport: Arc<TransportConfig>,
    ) -> Result<(quinn::Connecting, Arc<Place>), ConnectError> {
        let crypto = tls::client(&self.identity, expect, presented)?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(transport);
        let (connecting, place) =
            Place::of_new(|| self.quic.connect_with(config, addr, CERTIFICATE_NAME));
        let connecting = connecting.map_err(|source| ConnectError::Local { addr, source })?;
        Ok((connecting, place))
    }

    /// What to tell of a try that failed.
    pub(crate) fn connect_error(
        &self,
        addr: SocketAddr,
        expected: Option<Fingerprint>,
        presented: &Presented,
        error: GreetingError,
    ) -> ConnectError {
        let error = match error {
            GreetingError::Version { theirs } => {
                return ConnectError::Version { addr, ours: self.hello.protocol, theirs };
            }
            GreetingError::Frame(error) => {
                return ConnectError::NotAnAgent { addr, detail: error.to_string() };
            }
            GreetingError::Stream => {
                let detail = "it ended the greeting early".to_owned();
                return ConnectError::NotAnAgent { addr, detail };
            }
            GreetingError::Lost(error) => error,
        };
        if let (Some(expected), Some(presented)) = (expected, presented.get())
            && expected != presented
        {
            return ConnectError::WrongKey { addr, expected, presented };
        }
        let no_alpn = TransportErrorCode::crypto(tls::ALERT_NO_APPLICATION_PROTOCOL);
        match &error {
            ConnectionError::TimedOut => ConnectError::Unreachable { addr },
            ConnectionError::ConnectionClosed(close)
                if close.error_code == TransportErrorCode::CONNECTION_REFUSED =>
            {
                ConnectError::Busy { addr }
            }
            ConnectionError::ConnectionClosed(close) if close.error_code == no_alpn => {
                let detail = "it does not speak this application protocol".to_owned();
                ConnectError::NotAnAgent { addr, detail }
            }
            ConnectionError::VersionMismatch => {
                let detail = "it speaks another version of QUIC".to_owned();
                ConnectError::NotAnAgent { addr, detail }
            }
            ConnectionError::ApplicationClosed(close)
                if close.error_code == CloseCode::Busy.value() =>
            {
                ConnectError::Busy { addr }
            }
            ConnectionError::ApplicationClosed(close) => {
                ConnectError::Refused { addr, reason: readable(&close.reason) }
            }
            other => match CloseReason::from_quic(other, None) {
                CloseReason::NotPaired => {
                    ConnectError::NotPaired { addr, ours: self.identity.fingerprint() }
                }
                reason => ConnectError::Failed { addr, reason },
            },
        }
    }
}

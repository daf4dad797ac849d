//! The endpoint: one UDP socket that connects to agents and is connected to.
//!
//! Invariant: what an endpoint has opened ends with it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::{AsyncUdpSocket, EndpointConfig};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::accept::accept_all;
use crate::close::CloseCode;
use crate::dial::Dial;
use crate::errors::{BindError, ConnectError};
use crate::fingerprint::Fingerprint;
use crate::frame::{Hello, PROTOCOL_VERSION, Seen, SessionId};
use crate::greeting::GreetingError;
use crate::home::Home;
use crate::identity::Identity;
use crate::keeper::{Registry, Role};
use crate::link::Line;
use crate::pace::{PacedSocket, Place};
use crate::reset::{self, ResetKey};
use crate::session::Session;
use crate::socket;
use crate::tls::{self, Expect, Presented};
use crate::trust::Trust;
use crate::tuning::Tuning;

/// Handshakes of incoming connections that run at a time; more are refused.
pub const MAX_PENDING_HANDSHAKES: usize = 64;
/// Sessions that wait for [`Endpoint::accept`].
pub const ACCEPT_BACKLOG: usize = 16;
/// Time for a handshake and the greetings, on either side.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time given to peers to learn that the endpoint closes.
const CLOSE_TIME: Duration = Duration::from_secs(2);

/// What accepting and connecting need; shared with the tasks.
pub(crate) struct Shared {
    pub(crate) quic: quinn::Endpoint,
    pub(crate) identity: Identity,
    pub(crate) trust: Arc<dyn Trust>,
    /// The greeting, without a session.
    pub(crate) hello: Hello,
    pub(crate) server: quinn::ServerConfig,
    pub(crate) transport: Arc<quinn::TransportConfig>,
    pub(crate) tuning: Tuning,
    pub(crate) registry: Arc<Registry>,
    pub(crate) home: Arc<Home>,
}

struct Inner {
    shared: Arc<Shared>,
    local_addr: SocketAddr,
    accepted: tokio::sync::Mutex<mpsc::Receiver<Session>>,
    accepting: Mutex<Option<JoinHandle<()>>>,
}

impl Inner {
    fn stop_accepting(&self) {
        let task = self.accepting.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            task.abort();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop_accepting();
    }
}

/// One agent's presence on the network. Cheap to clone; all clones are the same socket.
#[derive(Clone)]
pub struct Endpoint(Arc<Inner>);

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("local_addr", &self.0.local_addr).finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Opens a UDP socket on `addr` (port 0: any) and starts to answer peers that `trust` knows. What
    /// has to do with packets runs on a thread of the endpoint's own, until the endpoint and all its
    /// sessions are dropped. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The socket cannot be opened, the thread cannot be started, or the identity cannot be used for
    /// TLS.
    pub fn bind(
        addr: SocketAddr,
        identity: &Identity,
        trust: Arc<dyn Trust>,
        tuning: Tuning,
    ) -> Result<Self, BindError> {
        let (home, tenant) = Home::on_thread().map_err(BindError::Endpoint)?;
        let socket = socket::bind(addr, tuning.socket_buffer, &home.runtime())
            .map_err(|source| BindError::Socket { addr, source })?;
        let endpoint = Self::build(socket, home, identity, trust, tuning, PROTOCOL_VERSION)?;
        tenant.moves_in(endpoint.0.shared.quic.clone());
        Ok(endpoint)
    }

    /// As [`bind`](Self::bind), on a socket that is there already: another transport than the
    /// host's UDP, or a link that is simulated in virtual time. Runs in the runtime that calls it.
    ///
    /// # Errors
    /// As `bind`.
    pub fn on_socket(
        socket: Arc<dyn AsyncUdpSocket>,
        identity: &Identity,
        trust: Arc<dyn Trust>,
        tuning: Tuning,
    ) -> Result<Self, BindError> {
        Self::build(socket, Home::here(), identity, trust, tuning, PROTOCOL_VERSION)
    }

    pub(crate) fn build(
        socket: Arc<dyn AsyncUdpSocket>,
        home: Arc<Home>,
        identity: &Identity,
        trust: Arc<dyn Trust>,
        tuning: Tuning,
        protocol: u16,
    ) -> Result<Self, BindError> {
        let transport = Arc::new(tuning.transport());
        // Checked here once, so that a handshake can fail only by the peer's doing.
        let crypto = tls::server(identity, trust.clone(), Presented::default())?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        server.transport_config(transport.clone()).max_incoming(MAX_PENDING_HANDSHAKES);

        let max_payload = tuning.payload_limit();
        let mut config = EndpointConfig::new(Arc::new(ResetKey::of(identity)));
        let of_any_life = identity.clone();
        config.cid_generator(move || Box::new(reset::connection_ids(&of_any_life)));
        config
            .max_udp_payload_size(max_payload)
            .expect("the tuning keeps the payload between 1200 and 65507 bytes");
        config.rng_seed(tuning.simulation_seed.map(|seed| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&seed.to_le_bytes());
            bytes
        }));
        let socket = PacedSocket::new(socket, max_payload);
        let quic = quinn::Endpoint::new_with_abstract_socket(
            config,
            Some(server.clone()),
            socket,
            Arc::new(home.runtime()),
        )
        .map_err(BindError::Endpoint)?;
        let local_addr = quic.local_addr().map_err(BindError::Endpoint)?;
        let shared = Arc::new(Shared {
            quic,
            identity: identity.clone(),
            trust,
            hello: Hello {
                protocol,
                capabilities: tuning.capabilities,
                agent_version: tuning.agent_version.clone(),
                session: SessionId::default(),
                goes_on: None,
                lane_of: None,
            },
            server,
            transport,
            tuning,
            registry: Arc::default(),
            home,
        });
        let (sessions, accepted) = mpsc::channel(ACCEPT_BACKLOG);
        let accepting = shared.home.spawn(accept_all(shared.clone(), sessions));
        Ok(Self(Arc::new(Inner {
            shared,
            local_addr,
            accepted: tokio::sync::Mutex::new(accepted),
            accepting: Mutex::new(Some(accepting)),
        })))
    }

    /// The address of the socket.
    pub fn local_addr(&self) -> SocketAddr {
        self.0.local_addr
    }

    /// Connects to the agent at `addr`, which must prove that it has the key of `expected`.
    ///
    /// # Errors
    /// Each way to fail has its own variant, because each asks for something else to be done.
    pub async fn connect(
        &self,
        addr: SocketAddr,
        expected: Fingerprint,
    ) -> Result<Session, ConnectError> {
        let dial = self.dial(addr, expected);
        let (made, (send, recv, theirs)) = dial.greet(None).await?;
        let shared = &self.0.shared;
        Ok(shared.session(made, expected, &theirs, (send, recv), Role::Dialer(dial)))
    }

    /// Where a new session is to be, and its name.
    pub(crate) fn dial(&self, addr: SocketAddr, expected: Fingerprint) -> Dial {
        let session = SessionId(rand::random());
        Dial { shared: self.0.shared.clone(), addr, expected, session }
    }

    /// Learns the fingerprint of the agent at `addr`, for an operator to compare before pairing.
    /// The peer has proved that it holds the key; that it is the right agent only the comparison
    /// says. Nothing is told about this agent.
    ///
    /// # Errors
    /// No agent answers there.
    pub async fn probe(&self, addr: SocketAddr) -> Result<Fingerprint, ConnectError> {
        let shared = &self.0.shared;
        let presented = Presented::default();
        let transport = shared.transport.clone();
        let (connecting, _) = shared.start(addr, Expect::Probe, presented.clone(), transport)?;
        let error = match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => {
                connection.close(CloseCode::Done.value(), b"probed");
                return presented.get().ok_or(ConnectError::Unreachable { addr });
            }
            Ok(Err(error)) => error,
            Err(_) => return Err(ConnectError::Unreachable { addr }),
        };
        // The verifier leaves by failing the handshake once the key is proved.
        presented
            .get()
            .ok_or_else(|| shared.connect_error(addr, None, &presented, GreetingError::Lost(error)))
    }

    /// The next session that a paired peer has opened; `None` once the endpoint is closed.
    pub async fn accept(&self) -> Option<Session> {
        self.0.accepted.lock().await.recv().await
    }

    /// Ends all sessions and stops to answer. Waits a short time for the peers to hear of it.
    pub async fn close(&self) {
        self.0.stop_accepting();
        self.0.shared.quic.close(CloseCode::Shutdown.value(), b"the agent stops");
        if tokio::time::timeout(CLOSE_TIME, self.0.shared.quic.wait_idle()).await.is_err() {
            tracing::debug!("some peers did not acknowledge that this agent stops");
        }
    }
}

impl Shared {
    /// The greeting of a session.
    pub(crate) fn hello_of(&self, session: SessionId, goes_on: Option<Seen>) -> Hello {
        Hello { session, goes_on, ..self.hello.clone() }
    }

    /// Makes a session of a connection whose greeting is done.
    pub(crate) fn session(
        &self,
        (connection, place): (quinn::Connection, Arc<Place>),
        peer: Fingerprint,
        theirs: &Hello,
        control: (quinn::SendStream, quinn::RecvStream),
        role: Role,
    ) -> Session {
        let line = Arc::new(Line::first(connection, place));
        Session::begin(self, line, peer, theirs, control, role)
    }
}

#[cfg(test)]
mod tests {
    use quinn::TokioRuntime;

    use super::*;
    use crate::trust::TrustedPeers;

    #[tokio::test]
    async fn different_versions_are_told_apart_on_both_sides() {
        let home = tempfile::tempdir().unwrap();
        let ids = ["a", "b"].map(|name| Identity::load_or_create(&home.path().join(name)).unwrap());
        let trust = Arc::new(TrustedPeers::new(ids.iter().map(Identity::fingerprint)));
        let at = "127.0.0.1:0".parse().unwrap();
        let agent = |id: &Identity, protocol| {
            let tuning = Tuning::default();
            let socket = socket::bind(at, 1 << 20, &TokioRuntime).unwrap();
            Endpoint::build(socket, Home::here(), id, trust.clone(), tuning, protocol).unwrap()
        };
        let (old, new) = (agent(&ids[0], 1), agent(&ids[1], 2));
        for (from, to, key) in [(&old, &new, &ids[1]), (&new, &old, &ids[0])] {
            let error = from.connect(to.local_addr(), key.fingerprint()).await.unwrap_err();
            let (ours, theirs) = (from.0.shared.hello.protocol, to.0.shared.hello.protocol);
            assert!(
                matches!(error, ConnectError::Version { ours: o, theirs: t, .. }
                    if (o, t) == (ours, theirs)),
                "{error}"
            );
            let text = error.to_string();
            assert!(text.contains("version 1") && text.contains("version 2"), "{text}");
            assert!(!text.contains('\n'));
        }
        old.close().await;
        new.close().await;
        assert!(new.accept().await.is_none(), "no session came of it");
    }
}

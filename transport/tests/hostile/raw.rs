//! A paired peer that speaks QUIC and TLS as it must, and beyond that says what it likes.
//!
//! Invariant: made of what `PROTOCOL.md` says and nothing of the crate's own, so that the two are held
//! against each other.

use std::path::Path;
use std::sync::Arc;

use longhaul_transport::{KEY_FILE, PROTOCOL_VERSION};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, ConnectionError, RecvStream, SendStream};
use rcgen::{CertificateParams, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, Error, SignatureScheme};

/// Believes any server.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// What a peer with the identity in `home` connects with.
pub(crate) fn config(home: &Path) -> ClientConfig {
    let pem = std::fs::read_to_string(home.join(KEY_FILE)).unwrap();
    let key = KeyPair::from_pem(&pem).unwrap();
    let certificate = CertificateParams::new(vec![]).unwrap().self_signed(&key).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_client_auth_cert(
            vec![certificate.der().clone()],
            PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        )
        .unwrap();
    tls.alpn_protocols = vec![b"longhaul".to_vec()];
    let mut transport = quinn::TransportConfig::default();
    transport.keep_alive_interval(Some(longhaul_transport::KEEP_ALIVE));
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    config.transport_config(Arc::new(transport));
    config
}

/// A greeting that begins the session `name`, or a lane of the session `of`.
pub(crate) fn greeting(name: u8, of: Option<u8>) -> Vec<u8> {
    let mut body = b"LHUL".to_vec();
    body.extend(PROTOCOL_VERSION.to_le_bytes());
    body.extend([0; 8]);
    body.extend(b"\x03raw");
    body.extend([name; 16]);
    body.extend([0; 1 + 16]);
    body.push(u8::from(of.is_some()));
    body.extend([of.unwrap_or_default(); 16]);
    [&(body.len() as u32).to_le_bytes()[..], &body].concat()
}

/// The head of a batch.
pub(crate) fn head(class: u8, number: u64, length: u32) -> Vec<u8> {
    let mut head = vec![2, class];
    head.extend(number.to_le_bytes());
    head.extend(0u32.to_le_bytes());
    head.extend(length.to_le_bytes());
    head
}

/// The receipt that says that nothing has come and that there is no patience.
pub(crate) const SEEN_NOTHING: [u8; 10] = [6, 0, 0, 0, 4, 1, 0, 0, 0, 0];

/// A session that the other end takes for one.
pub(crate) struct Raw {
    pub(crate) connection: Connection,
    pub(crate) control: (SendStream, RecvStream),
}

impl Raw {
    /// Greets as the session `name`.
    pub(crate) async fn greet(connection: Connection, name: u8) -> Self {
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        send.write_all(&greeting(name, None)).await.unwrap();
        let mut length = [0; 4];
        recv.read_exact(&mut length).await.unwrap();
        let mut answer = vec![0; u32::from_le_bytes(length) as usize];
        recv.read_exact(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"LHUL"));
        Self { connection, control: (send, recv) }
    }

    /// Opens a stream and sends `bytes` on it.
    pub(crate) async fn stream(&self, bytes: &[u8]) -> SendStream {
        let mut stream = self.connection.open_uni().await.unwrap();
        // The other end may have closed already, for this is what is tried here.
        let _ = stream.write_all(bytes).await;
        stream
    }
}

/// With which code and words the other end has closed.
pub(crate) async fn end(connection: &Connection) -> (u64, String) {
    match connection.closed().await {
        ConnectionError::ApplicationClosed(close) => {
            (close.error_code.into_inner(), String::from_utf8_lossy(&close.reason).into_owned())
        }
        other => panic!("not closed with a reason: {other}"),
    }
}

//! TLS 1.3 with pinned public keys, in both directions. The only file that knows rustls.
//!
//! Invariant: no handshake completes unless the peer has signed with the private key of a
//! fingerprint that this side trusts at that moment. Names, issuers and dates prove nothing here
//! and are not looked at; sessions are never resumed, because resumption would skip the question.

use std::sync::{Arc, Mutex, PoisonError};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, Resumption};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, ServerConfig};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible,
    SignatureScheme,
};
use thiserror::Error;

use crate::fingerprint::Fingerprint;
use crate::identity::Identity;
use crate::trust::Trust;

/// The application protocol both sides must name (RFC 7301). It never changes with the version:
/// versions are settled by the greeting, which can say in words what does not fit.
const ALPN: &[u8] = b"longhaul";
/// TLS alert 49, `access_denied` (RFC 8446, section 6.2): how an untrusted key is refused.
pub(crate) const ALERT_ACCESS_DENIED: u8 = 49;
/// TLS alert 120, `no_application_protocol` (RFC 7301): the other program is no agent.
pub(crate) const ALERT_NO_APPLICATION_PROTOCOL: u8 = 120;

/// The cryptographic library refused this agent's own key or certificate.
#[derive(Debug, Error)]
#[error("this agent's key cannot be used for TLS 1.3")]
pub struct TlsError(#[source] Box<dyn std::error::Error + Send + Sync>);

impl TlsError {
    fn new(source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self(Box::new(source))
    }
}

/// What one handshake has seen of the peer; filled by the verifier, read by whoever waits for the
/// handshake, also when it failed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Presented(Arc<Mutex<Option<Fingerprint>>>);

impl Presented {
    /// The fingerprint of the certificate that the peer sent, if it came that far.
    pub(crate) fn get(&self) -> Option<Fingerprint> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, fingerprint: Fingerprint) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(fingerprint);
    }
}

/// What the side that connects wants of the key it meets.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Expect {
    /// Exactly this key.
    Key(Fingerprint),
    /// Any key: learn it, see it proved, and leave before saying who we are.
    Probe,
}

/// Configuration for one accepted connection.
pub(crate) fn server(
    identity: &Identity,
    trust: Arc<dyn Trust>,
    presented: Presented,
) -> Result<QuicServerConfig, TlsError> {
    let provider = provider();
    let verifier = Arc::new(PairedClient { trust, presented, provider: provider.clone() });
    let (chain, key) = credentials(identity);
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::new)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(TlsError::new)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    QuicServerConfig::try_from(config).map_err(TlsError::new)
}

/// Configuration for one outgoing connection.
pub(crate) fn client(
    identity: &Identity,
    expect: Expect,
    presented: Presented,
) -> Result<QuicClientConfig, TlsError> {
    let provider = provider();
    let verifier = Arc::new(PinnedServer { expect, presented, provider: provider.clone() });
    let (chain, key) = credentials(identity);
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::new)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(chain, key)
        .map_err(TlsError::new)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    QuicClientConfig::try_from(config).map_err(TlsError::new)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn credentials(identity: &Identity) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let chain = vec![CertificateDer::from(identity.certificate().to_vec())];
    (chain, PrivatePkcs8KeyDer::from(identity.key().to_vec()).into())
}

fn fingerprint_of(certificate: &CertificateDer<'_>) -> Result<Fingerprint, Error> {
    let spki = ParsedCertificate::try_from(certificate)?.subject_public_key_info();
    Ok(Fingerprint::of_public_key(&spki))
}

fn refused() -> Error {
    Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

/// TLS 1.2 is not offered; an answer for it would be dead code that accepts something.
fn only_tls13() -> Error {
    Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered)
}

/// The listening side's check: the client's key must be paired now.
struct PairedClient {
    trust: Arc<dyn Trust>,
    presented: Presented,
    provider: Arc<CryptoProvider>,
}

impl std::fmt::Debug for PairedClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PairedClient").field("presented", &self.presented).finish_non_exhaustive()
    }
}

impl ClientCertVerifier for PairedClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let fingerprint = fingerprint_of(end_entity)?;
        self.presented.set(fingerprint);
        if self.trust.is_trusted(&fingerprint) {
            Ok(ClientCertVerified::assertion())
        } else {
            Err(refused())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The connecting side's check: the server's key must be the one that was asked for.
#[derive(Debug)]
struct PinnedServer {
    expect: Expect,
    presented: Presented,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let fingerprint = fingerprint_of(end_entity)?;
        match self.expect {
            Expect::Key(expected) => {
                self.presented.set(fingerprint);
                if fingerprint != expected {
                    return Err(refused());
                }
            }
            // Reported only once it is proved, after the signature.
            Expect::Probe => {}
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let valid = verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )?;
        match self.expect {
            Expect::Key(_) => Ok(valid),
            Expect::Probe => {
                self.presented.set(fingerprint_of(cert)?);
                Err(refused())
            }
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

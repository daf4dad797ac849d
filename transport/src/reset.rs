//! What an endpoint that was restarted tells peers of its earlier life: that their connections are
//! gone.
//!
//! Invariant: both keys are functions of the identity, so a restart changes neither; nobody without
//! the identity can make a reset that its peers believe.
//!
//! QUIC's stateless reset (RFC 9000, section 10.3) needs connection ids that the new life still
//! recognises as its own, and tokens that the old life announced. Without it a peer of a killed
//! agent would wait for the idle timeout, its guest paused in the worst case.

use quinn_proto::HashedConnectionIdGenerator;
use quinn_proto::crypto::{CryptoError, HmacKey};

use crate::identity::Identity;

/// Separates the keys from each other and from every other use of the identity.
const TOKEN_CONTEXT: &str = "longhaul v1 stateless reset token";
const CONNECTION_ID_CONTEXT: &str = "longhaul v1 connection id";

/// Makes and recognises reset tokens.
pub(crate) struct ResetKey([u8; 32]);

impl ResetKey {
    pub(crate) fn of(identity: &Identity) -> Self {
        Self(blake3::derive_key(TOKEN_CONTEXT, identity.key()))
    }
}

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        let signature = blake3::keyed_hash(&self.0, data);
        signature_out.copy_from_slice(signature.as_bytes());
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        // In constant time: blake3's hashes compare so.
        let signature: [u8; blake3::OUT_LEN] = signature.try_into().map_err(|_| CryptoError)?;
        if blake3::keyed_hash(&self.0, data) == signature { Ok(()) } else { Err(CryptoError) }
    }
}

/// Makes connection ids that every life of this identity knows for its own.
pub(crate) fn connection_ids(identity: &Identity) -> HashedConnectionIdGenerator {
    let key = blake3::derive_key(CONNECTION_ID_CONTEXT, identity.key());
    let mut word = [0; 8];
    word.copy_from_slice(&key[..8]);
    HashedConnectionIdGenerator::from_key(u64::from_le_bytes(word))
}

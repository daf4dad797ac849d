//! Items as they are applied: bundles unpacked, their pieces hashed and their grains found, on other
//! threads while those before them are written.
//!
//! Invariant: an item is what came; what is wrong with it is said when it is applied, in its turn.

use bytes::Bytes;
use longhaul_dedup::bundle::{BundleError, BundlePart, ChunkBundle};
use longhaul_dedup::recipe::GrainSample;

use super::super::message::BulkHeader;
use super::receive::grains_at;

/// Payload in one bundle that is believed.
const BUNDLE_PAYLOAD_MAX: usize = 8 << 20;

/// An item that is ready to be applied.
pub(in super::super) struct Unpacked {
    pub(super) header: BulkHeader,
    pub(super) content: Content,
}

pub(super) enum Content {
    /// Of anything but a bundle.
    Body(Bytes),
    Bundle(Result<Bundle, BundleError>),
}

/// A bundle that was unpacked.
pub(super) struct Bundle {
    pub(super) disk: u16,
    /// With the samples of the grains of each piece.
    pub(super) parts: Vec<(BundlePart, Vec<GrainSample>)>,
}

impl Unpacked {
    /// Unpacks an item.
    pub(in super::super) async fn of(header: BulkHeader, body: Bytes) -> Self {
        let content = match header {
            BulkHeader::Chunks { .. } => {
                let unpacking = tokio::task::spawn_blocking(move || unpack(&body));
                Content::Bundle(unpacking.await.expect("unpacking does not panic"))
            }
            _ => Content::Body(body),
        };
        Self { header, content }
    }
}

fn unpack(body: &Bytes) -> Result<Bundle, BundleError> {
    let ChunkBundle { disk, parts } = ChunkBundle::decode(body, BUNDLE_PAYLOAD_MAX)?;
    let with_grains = |part: BundlePart| {
        let grains = match &part {
            BundlePart::Chunk { offset, chunk } => grains_at(*offset, chunk.data()),
            _ => Vec::new(),
        };
        (part, grains)
    };
    Ok(Bundle { disk, parts: parts.into_iter().map(with_grains).collect() })
}

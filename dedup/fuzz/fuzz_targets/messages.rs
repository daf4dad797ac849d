//! Decoders of messages about disks: the first byte chooses which one.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use longhaul_dedup::{
    bundle::{BundlePart, ChunkBundle},
    compress::{Packed, decompress},
    delta::{self, Delta},
    id::ChunkId,
    offer::{Offer, Want},
};

const MAX_UNPACKED: usize = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let Some((choice, message)) = input.split_first() else { return };
    let bytes = Bytes::copy_from_slice(message);
    match choice % 5 {
        0 => {
            if let Ok(offer) = Offer::decode(message) {
                assert_eq!(offer.encode(), bytes);
            }
        }
        1 => {
            if let Ok(want) = Want::decode(message) {
                assert_eq!(Want::decode(&want.encode()), Ok(want));
            }
        }
        2 => {
            if let Ok(bundle) = ChunkBundle::decode(&bytes, MAX_UNPACKED) {
                for part in &bundle.parts {
                    assert!(!part.range().is_empty());
                    if let BundlePart::Chunk { chunk, .. } = part {
                        assert_eq!(ChunkId::of(chunk.data()), chunk.id());
                    }
                }
            }
        }
        3 => {
            if let Ok(packed) = Packed::decode(&bytes)
                && let Ok(data) = decompress(&packed, MAX_UNPACKED)
            {
                assert_eq!(data.len(), packed.unpacked_len());
            }
        }
        _ => {
            if let Ok(delta) = Delta::decode(&bytes) {
                let mut again = Vec::new();
                delta.encode_into(&mut again);
                assert_eq!(again, message);
                delta::apply(&mut [0; 4096], &delta);
            }
        }
    }
});

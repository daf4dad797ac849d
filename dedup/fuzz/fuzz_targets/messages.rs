//! Decoders of messages about disks: the first byte chooses which one.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use longhaul_dedup::{
    blocks::piece_id,
    bundle::{BundlePart, ChunkBundle},
    compress::{Packed, decompress},
    delta::{self, Delta},
    offer::{Answer, Bases, BlockList, Offer},
    patch::{Base, Patch},
    summary::Summaries,
};

const MAX_UNPACKED: usize = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let Some((choice, message)) = input.split_first() else { return };
    let bytes = Bytes::copy_from_slice(message);
    match choice % 9 {
        0 => {
            if let Ok(offer) = Offer::decode(message) {
                assert_eq!(offer.encode(), bytes);
            }
        }
        1 => {
            let Some((count, answer)) = message.split_first() else { return };
            let count = usize::from(*count) * 17;
            if let Ok(answer) = Answer::decode(answer, count) {
                assert_eq!(answer.0.len(), count);
                assert_eq!(Answer::decode(&answer.encode(), count), Ok(answer));
            }
        }
        2 => {
            if let Ok(bundle) = ChunkBundle::decode(&bytes, MAX_UNPACKED) {
                for part in &bundle.parts {
                    assert!(!part.range().is_empty());
                    if let BundlePart::Chunk { chunk, .. } = part {
                        assert_eq!(piece_id(chunk.data()), chunk.id());
                    }
                }
            }
        }
        3 => {
            if let Ok(summaries) = Summaries::decode(message) {
                assert_eq!(summaries.encode(), bytes);
            }
        }
        4 => {
            if let Ok(list) = BlockList::decode(message) {
                assert_eq!(list.encode(), bytes);
            }
        }
        5 => {
            if let Ok(packed) = Packed::decode(&bytes)
                && let Ok(data) = decompress(&packed, MAX_UNPACKED)
            {
                assert_eq!(data.len(), packed.unpacked_len());
            }
        }
        6 => {
            let Some((pieces, bases)) = message.split_first() else { return };
            if let Ok(found) = Bases::decode(bases, usize::from(*pieces)) {
                assert_eq!(found.encode(), bases);
            }
        }
        7 => {
            // What it is made of: some bytes, which blocks are wanted, and a patch.
            let Some(wanted) = message.first() else { return };
            let wanted: Vec<bool> = (0..8).map(|bit| wanted >> bit & 1 == 1).collect();
            let base = Base::of(&[bytes.clone(), Bytes::from(vec![7; 3000])]);
            if let Ok(patch) = Patch::decode(&bytes.slice(1..)) {
                assert_eq!(Patch::decode(&patch.encode()), Ok(patch.clone()));
                for len in [4096, 30_000, 32_768] {
                    if let Ok(blocks) = patch.apply(&base, len, &wanted) {
                        assert!(blocks.len() <= 8);
                    }
                }
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

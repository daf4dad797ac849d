//! Every codec of a message: what goes in comes out, and nothing else is let in.
//!
//! Decoders get three kinds of wrong input: garbage, cut messages, and messages with changed bytes.
//! They may refuse or accept, but never panic; what they accept they must write the same way again
//! (where the encoder has no choice), so that no two messages mean one thing.

use bytes::Bytes;
use longhaul_dedup::{
    blocks::{ShortId, piece_id},
    bundle::{BundlePart, ChunkBundle, MAX_BUNDLE_BYTES},
    chunk::RawChunk,
    compress::{Compressor, Level, Packed, decompress},
    grains::GrainId,
    id::ChunkId,
    lzma::Effort,
    offer::{Answer, BlockList, Offer},
    recipe::RecipeEntry,
    summary::{Summaries, Summary},
};
use proptest::prelude::*;

fn level() -> impl Strategy<Value = Level> {
    prop_oneof![
        Just(Level::Store),
        (-5_i32..6).prop_map(Level::Zstd),
        Just(Level::Lzma(Effort::Quick)),
        Just(Level::Lzma(Effort::Thorough)),
    ]
}

/// Data that compresses, that does not, and in between.
fn data(max: usize) -> impl Strategy<Value = Vec<u8>> {
    (0_u8..4, any::<u64>(), 0..max).prop_map(|(kind, seed, len)| {
        let mut bytes = vec![0; len];
        if kind > 0 {
            blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        }
        if kind > 1 {
            bytes.iter_mut().for_each(|byte| *byte %= kind);
        }
        bytes
    })
}

fn mutations() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)
}

fn mutate(bytes: &[u8], mutations: &[(prop::sample::Index, u8)]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (at, byte) in mutations {
        let at = at.index(bytes.len());
        bytes[at] = *byte;
    }
    bytes
}

fn offer() -> impl Strategy<Value = Offer> {
    let gaps = prop::collection::vec((0_u64..1 << 28, 1_u32..=64, any::<[u8; 32]>()), 0..200);
    (any::<u16>(), gaps, 0_u32..4096).prop_map(|(disk, parts, short)| {
        let mut offset = 0;
        let mut entries: Vec<RecipeEntry> = parts
            .into_iter()
            .map(|(gap, blocks, id)| {
                offset += gap * 4096;
                let entry = RecipeEntry { offset, len: blocks * 4096, id: ChunkId::from_bytes(id) };
                offset += u64::from(entry.len);
                entry
            })
            .collect();
        if let Some(last) = entries.last_mut() {
            last.len -= short;
        }
        Offer { disk, entries }
    })
}

fn summaries() -> impl Strategy<Value = Summaries> {
    let parcel = prop_oneof![Just(Summary::Zeros), any::<[u8; 32]>().prop_map(Summary::Pieces),];
    (any::<u16>(), any::<u64>(), prop::collection::vec(parcel, 0..100))
        .prop_map(|(disk, first, parcels)| Summaries { disk, first, parcels })
}

fn answer() -> impl Strategy<Value = Answer> {
    let run = (any::<bool>(), 1_usize..300).prop_map(|(wanted, len)| vec![wanted; len]);
    let bits = prop::collection::vec(any::<bool>(), 0..100);
    prop::collection::vec(prop_oneof![run, bits], 0..6).prop_map(|parts| Answer(parts.concat()))
}

fn bundle() -> impl Strategy<Value = ChunkBundle> {
    let zero =
        (0_u64..1 << 40, 1_u64..1 << 40).prop_map(|(offset, len)| BundlePart::Zero { offset, len });
    let chunk = (0_u64..1 << 40, data(20_000).prop_filter("a chunk has bytes", |d| !d.is_empty()))
        .prop_map(|(offset, data)| BundlePart::Chunk {
            offset,
            chunk: RawChunk::new(data.into()).hash(),
        });
    let blocks = (0_u64..1 << 40, data(20_000).prop_filter("blocks have bytes", |d| !d.is_empty()))
        .prop_map(|(offset, data)| BundlePart::Blocks { offset, data: data.into() });
    (any::<u16>(), prop::collection::vec(prop_oneof![zero, chunk, blocks], 0..12))
        .prop_map(|(disk, parts)| ChunkBundle { disk, parts })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn packed_data_comes_back(level in level(), data in data(200_000)) {
        let data = Bytes::from(data);
        let packed = Compressor::new().compress(level, data.clone());
        prop_assert!(packed.packed_len() <= data.len());
        let mut bytes = Vec::new();
        packed.encode_into(&mut bytes);
        let again = Packed::decode(&bytes.into()).unwrap();
        prop_assert_eq!(&again, &packed);
        prop_assert_eq!(decompress(&again, data.len()).unwrap(), data.clone());
        if !data.is_empty() {
            prop_assert!(decompress(&again, data.len() - 1).is_err());
        }
    }

    #[test]
    fn changed_packed_data_is_refused_or_has_the_stated_length(
        data in data(20_000),
        mutations in mutations(),
    ) {
        let mut bytes = Vec::new();
        Compressor::new().compress(Level::Zstd(1), data.into()).encode_into(&mut bytes);
        if let Ok(packed) = Packed::decode(&mutate(&bytes, &mutations).into())
            && let Ok(data) = decompress(&packed, 1 << 20)
        {
            prop_assert_eq!(data.len(), packed.unpacked_len());
        }
    }

    #[test]
    fn messages_of_the_exchange_come_back(
        offer in offer(),
        summaries in summaries(),
        answer in answer(),
        list in (
            any::<u64>(),
            prop::collection::vec(any::<[u8; 8]>(), 0..100),
            prop::collection::vec(any::<[u8; 5]>(), 0..20),
        ),
    ) {
        prop_assert_eq!(&Offer::decode(&offer.encode()).unwrap(), &offer);
        prop_assert_eq!(&Summaries::decode(&summaries.encode()).unwrap(), &summaries);
        prop_assert_eq!(&Answer::decode(&answer.encode(), answer.0.len()).unwrap(), &answer);
        let blocks = list.1.into_iter().map(ShortId::from_bytes).collect();
        let samples = (0..).zip(list.2).map(|(n, id)| (n * 77, GrainId::from_bytes(id))).collect();
        let list = BlockList { offer: list.0, blocks, samples };
        prop_assert_eq!(&BlockList::decode(&list.encode()).unwrap(), &list);
    }

    #[test]
    fn a_changed_message_is_refused_or_says_something_else(
        offer in offer(),
        summaries in summaries(),
        answer in answer(),
        mutations in mutations(),
    ) {
        let bytes = mutate(&offer.encode(), &mutations);
        if let Ok(changed) = Offer::decode(&bytes) {
            prop_assert_eq!(&changed.encode()[..], &bytes[..]);
        }
        let whole = offer.encode();
        prop_assert!((0..whole.len()).all(|len| Offer::decode(&whole[..len]).is_err()));
        let bytes = mutate(&summaries.encode(), &mutations);
        if let Ok(changed) = Summaries::decode(&bytes) {
            prop_assert_eq!(&changed.encode()[..], &bytes[..]);
        }
        let whole = summaries.encode();
        prop_assert!((0..whole.len()).all(|len| Summaries::decode(&whole[..len]).is_err()));
        let (whole, count) = (answer.encode(), answer.0.len());
        if let Ok(changed) = Answer::decode(&mutate(&whole, &mutations), count) {
            prop_assert_eq!(changed.0.len(), count);
        }
        prop_assert!((0..whole.len()).all(|len| Answer::decode(&whole[..len], count).is_err()));
    }

    #[test]
    fn bundles_come_back(bundle in bundle(), level in level()) {
        let bytes = bundle.clone().encode(&mut Compressor::new(), level);
        prop_assert_eq!(ChunkBundle::decode(&bytes, MAX_BUNDLE_BYTES).unwrap(), bundle);
    }

    /// Offsets and zeros are not hashed; the bytes of a chunk are.
    #[test]
    fn a_changed_bundle_never_has_a_chunk_of_other_bytes(
        bundle in bundle(),
        level in level(),
        mutations in mutations(),
        cut in any::<prop::sample::Index>(),
    ) {
        let bytes = bundle.clone().encode(&mut Compressor::new(), level);
        if let Ok(changed) = ChunkBundle::decode(&mutate(&bytes, &mutations).into(), 1 << 20) {
            for part in changed.parts {
                if let BundlePart::Chunk { chunk, .. } = part {
                    prop_assert_eq!(piece_id(chunk.data()), chunk.id());
                }
            }
        }
        let cut = bytes.slice(..cut.index(bytes.len()));
        prop_assert!(ChunkBundle::decode(&cut, 1 << 20).is_err());
    }

    #[test]
    fn garbage_is_no_message(garbage in prop::collection::vec(any::<u8>(), 0..400), version: bool) {
        let mut bytes = garbage;
        if version && let Some(first) = bytes.first_mut() {
            *first = 2;
        }
        let _ = Offer::decode(&bytes);
        let _ = BlockList::decode(&bytes);
        let _ = Answer::decode(&bytes, 100);
        let _ = Summaries::decode(&bytes);
        let bytes = Bytes::from(bytes);
        let _ = ChunkBundle::decode(&bytes, 1 << 20);
        if let Ok(packed) = Packed::decode(&bytes) {
            let _ = decompress(&packed, 1 << 20);
        }
    }
}

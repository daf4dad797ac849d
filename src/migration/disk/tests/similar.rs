//! What is similar at the target and equal nowhere: patches, and what becomes of mistaken ones.

use longhaul_dedup::offer::Bases;
use longhaul_dedup::patch::Patch;
use longhaul_dedup::recipe::GrainSample;

use super::*;

/// Bytes in, bytes out, bytes changed, all over: few blocks stay as they were.
fn edited(old: &[u8]) -> Vec<u8> {
    let mut new = Vec::new();
    for (n, part) in old.chunks(20_000).enumerate() {
        match n % 3 {
            0 => new.extend_from_slice(&part[..part.len() - 13]),
            1 => new.extend([part, b"forty-one"].concat()),
            _ => new.extend(part.iter().enumerate().map(|(at, byte)| byte ^ u8::from(at == 9_999))),
        }
    }
    new.resize(old.len(), 1);
    new
}

/// An image beside the one that arrives, with its record.
pub(super) fn sibling(ends: &Ends, data: &[u8]) -> ImageFile {
    let path = ends.dir.path().join("sibling.raw");
    fs::write(&path, data).unwrap();
    let mut log = RecipeLog::create(&RecipeLog::path_for(&path), data.len() as u64).unwrap();
    let scan = blocks::scan(&[(0, data.to_vec().into())]);
    super::super::record::note(&mut log, &scan, &[]).unwrap();
    let sample = |(at, id)| GrainSample { offset: at as u64, id };
    let grains: Vec<_> = longhaul_dedup::grains::samples(data).map(sample).collect();
    log.append_grains(&grains).unwrap();
    ImageFile { path, format: ImageFormat::Raw }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_what_is_similar_only_the_rest_is_sent() {
    let old = noise(1, 8 * MIB);
    let new = edited(&old);
    // In its own place, where the target must read it first.
    let round = send(Some(&old), &new, How::Offer, false).await;
    assert!(round.sent < MIB as u64, "{} bytes", round.sent);
    assert_eq!(round.sent + round.known, new.len() as u64);
    // In an image beside it, elsewhere.
    let ends = ends().await;
    let old = [noise(2, 3 * MIB), old].concat();
    let known = vec![sibling(&ends, &old)];
    let (ends, round) = ends.send(&Guest::new(&new), How::Offer, known, false).await;
    assert!(ends.has() == new, "the image is another");
    assert!(round.sent < 2 * MIB as u64, "{} bytes", round.sent);
    assert!(round.wire < 2 * MIB as u64, "{} bytes on the wire", round.wire);
}

/// What was written in one seed is similar to what comes in the next.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_is_found_similar_later() {
    let old = noise(1, 6 * MIB);
    let (ends, _) = ends().await.send(&Guest::new(&old), How::Offer, Vec::new(), false).await;
    // Moved by a third of the image and some bytes.
    let new = edited(&[&old[2 * MIB + 77..], &old[..2 * MIB + 77]].concat());
    let (ends, round) =
        ends_in(ends.dir).await.send(&Guest::new(&new), How::Offer, Vec::new(), false).await;
    assert!(ends.has() == new, "the image is another");
    assert!(round.sent < 2 * MIB as u64, "{} bytes", round.sent);
}

/// A record that lies about an image costs bytes and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn a_stale_record_of_grains_does_no_harm() {
    let old = noise(1, 4 * MIB);
    let ends = ends().await;
    let known = vec![sibling(&ends, &old)];
    fs::write(ends.dir.path().join("sibling.raw"), noise(3, 4 * MIB)).unwrap();
    let new = edited(&old);
    let (ends, round) = ends.send(&Guest::new(&new), How::Offer, known, false).await;
    assert!(ends.has() == new, "the image is another");
    assert_eq!(round.sent, new.len() as u64);
}

/// Names are short: what a patch makes may be anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_mistaken_patch_is_asked_for_again_whole() {
    let ends = ends().await;
    let old = noise(1, 4 * BLOCK_BYTES);
    let mut new = old.clone();
    new[5000] ^= 1;
    let mut other = old.clone();
    other[6000] ^= 1;
    fs::write(ends.image(), &old).unwrap();
    let wanted = [false, true, false, false];
    let entry = RecipeEntry { offset: 0, len: new.len() as u32, id: piece_id(&new) };
    let blocks: Vec<ShortId> = hash_blocks(&new).iter().map(ShortId::of).collect();
    let longer = [&noise(3, 30_000), &old[3000..10_000]].concat();
    let behind: [bool; 10] = std::array::from_fn(|block| block == 8);
    for (piece, made_for, comes_together) in
        [(&new, &wanted[..], true), (&other, &wanted, false), (&longer, &behind, false)]
    {
        let (mut receiver, _) = ends.receiver(new.len() as u64, Vec::new()).await;
        let offer = Offer { disk: 0, entries: vec![entry] }.encode();
        receiver.apply(Unpacked::of(BulkHeader::Offer { item: 0 }, offer).await).await.unwrap();
        let list = BlockList { offer: 0, blocks: blocks.clone(), samples: Vec::new() }.encode();
        let answer =
            receiver.apply(Unpacked::of(BulkHeader::Blocks { item: 1 }, list).await).await.unwrap();
        let Some(ToSource::Want { wanted: bits, bases, .. }) = answer else { panic!("{answer:?}") };
        assert_eq!(Answer::decode(&bits, 4).unwrap().0, wanted);
        let bases = Bases::decode(&bases, 1).unwrap().0;
        let patch = Patch::make(piece, made_for, &bases[0].1).unwrap().encode();
        let part = BundlePart::Patch { offset: 0, data: patch };
        receiver
            .apply(Unpacked::of(BulkHeader::Chunks { item: 2 }, bundle(part)).await)
            .await
            .unwrap();
        let end = BulkHeader::End { item: 3, disk: 0 };
        let lacking = receiver.apply(Unpacked::of(end, Bytes::new()).await).await.unwrap();
        let Some(ToSource::Lacking { pieces, .. }) = lacking else { panic!("{lacking:?}") };
        assert_eq!(pieces.is_empty(), comes_together);
        assert_eq!(ends.has() == new, comes_together);
        fs::write(ends.image(), &old).unwrap();
        fs::remove_file(RecipeLog::path_for(&ends.image())).unwrap();
    }
}

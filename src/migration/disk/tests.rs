//! Disks from a sender to a receiver over a real session on loopback, onto real files.
//!
//! Invariant: whatever the target has, damaged or not, its image is the source's in the end, and what
//! lay there already does not cross the link.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use longhaul_dedup::blocks::{self, BLOCK_BYTES, ShortId, hash_blocks, piece_id};
use longhaul_dedup::bundle::{BundlePart, ChunkBundle};
use longhaul_dedup::chunk::RawChunk;
use longhaul_dedup::compress::{Compressor, Level};
use longhaul_dedup::offer::{Answer, BlockList, Offer};
use longhaul_dedup::recipe::{RecipeEntry, RecipeLog};
use longhaul_transport::{Class, Endpoint, Identity, Session, TrustedPeers, Tuning};
use proptest::prelude::*;
use tempfile::TempDir;
use tokio::sync::oneshot;

mod damage;
mod index;
mod ranges;
mod recalled;
mod similar;

use super::super::coding::Coding;
use super::super::known::Known;
use super::super::link::Link;
use super::super::message::{BulkHeader, ToSource};
use super::super::meter::Meter;
use super::super::report::Phase;
use super::{DiskReceiver, DiskSender, How, ImageRecord, Unpacked};
use crate::hypervisor::spec::ImageFormat;
use crate::hypervisor::{
    DiskImage, DiskInfo, DiskView, Extent, HypervisorError, ImageFile, IncomingDisk,
};

const MIB: usize = 1 << 20;

/// A file as an image; which bytes of it were written, and how many read, is kept.
struct FileImage {
    file: File,
    bytes: u64,
    touched: Arc<Touched>,
}

#[derive(Default)]
struct Touched {
    written: Mutex<Vec<(u64, u64)>>,
    read: AtomicUsize,
}

#[async_trait]
impl DiskImage for FileImage {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, HypervisorError> {
        let mut data = vec![0; len as usize];
        self.touched.read.fetch_add(data.len(), Ordering::Relaxed);
        self.file.read_exact_at(&mut data, offset).unwrap();
        Ok(data.into())
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), HypervisorError> {
        self.touched.written.lock().unwrap().push((offset, data.len() as u64));
        self.file.write_all_at(&data, offset).unwrap();
        Ok(())
    }

    async fn zero(&self, offset: u64, len: u64) -> Result<(), HypervisorError> {
        self.file.write_all_at(&vec![0; len as usize], offset).unwrap();
        Ok(())
    }

    async fn extents(&self) -> Result<Vec<Extent>, HypervisorError> {
        Ok(vec![Extent { offset: 0, len: self.bytes, zero: false }])
    }

    async fn flush(&self) -> Result<(), HypervisorError> {
        Ok(())
    }

    async fn close(self: Box<Self>) -> Result<(), HypervisorError> {
        Ok(())
    }
}

/// A disk that a guest writes to: one byte, at a place that moves on, before some of the reads.
struct Guest {
    info: DiskInfo,
    data: Mutex<Vec<u8>>,
    extents: Vec<Extent>,
    /// Every so many reads; 0 for never.
    writes: usize,
    reads: AtomicUsize,
}

impl Guest {
    fn new(data: &[u8]) -> Self {
        let info = DiskInfo { id: "disk".into(), bytes: data.len() as u64 };
        let extents = vec![Extent { offset: 0, len: data.len() as u64, zero: false }];
        let data = Mutex::new(data.to_vec());
        Self { info, data, extents, writes: 0, reads: AtomicUsize::new(0) }
    }
}

#[async_trait]
impl DiskView for Guest {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    async fn extents(&self) -> Result<Vec<Extent>, HypervisorError> {
        Ok(self.extents.clone())
    }

    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, HypervisorError> {
        let mut data = self.data.lock().unwrap();
        let range = offset as usize..offset as usize + len as usize;
        let reads = self.reads.fetch_add(1, Ordering::Relaxed);
        if self.writes > 0 && reads % self.writes == 1 {
            data[range.start + reads * 997 % range.len()] ^= 0x5a;
        }
        Ok(Bytes::copy_from_slice(&data[range]))
    }

    async fn close(self: Box<Self>) -> Result<(), HypervisorError> {
        Ok(())
    }
}

/// Something that befalls the target.
type Harm = Box<dyn FnOnce() + Send>;

struct Ends {
    dir: TempDir,
    /// What befalls it once it has applied so many items.
    harm: Option<(u64, Harm)>,
    /// Kept: they carry the session.
    _endpoints: [Endpoint; 2],
    source: Session,
    target: Session,
}

/// What a round came to.
struct Round {
    /// Disk payload that was sent, and that was known.
    sent: u64,
    known: u64,
    wire: u64,
    /// Items, among them questions.
    items: u64,
    /// Bytes of the target's image that were written, and read.
    written: u64,
    read: usize,
}

async fn ends() -> Ends {
    ends_in(tempfile::tempdir().unwrap()).await
}

/// A new session to the target that has what lies in this folder.
async fn ends_in(dir: TempDir) -> Ends {
    let identity = |name: &str| {
        let home = dir.path().join(name);
        fs::create_dir_all(&home).unwrap();
        Identity::load_or_create(&home).unwrap()
    };
    let (one, two) = (identity("one"), identity("two"));
    let bind = |own: &Identity, other: &Identity| {
        let trust = Arc::new(TrustedPeers::new([other.fingerprint()]));
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Endpoint::bind(any, own, trust, Tuning::default()).unwrap()
    };
    let endpoints = [bind(&one, &two), bind(&two, &one)];
    let connecting = endpoints[0].connect(endpoints[1].local_addr(), two.fingerprint());
    let (source, target) = tokio::join!(connecting, endpoints[1].accept());
    Ends {
        dir,
        harm: None,
        source: source.unwrap(),
        target: target.unwrap(),
        _endpoints: endpoints,
    }
}

impl Ends {
    fn image(&self) -> PathBuf {
        self.dir.path().join("disk.raw")
    }

    fn has(&self) -> Vec<u8> {
        fs::read(self.image()).unwrap()
    }

    /// The target's half, on its image as it is now.
    async fn receiver(&self, bytes: u64, known: impl Into<Known>) -> (DiskReceiver, Arc<Touched>) {
        let fresh = !self.image().exists();
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(false);
        let file = file.open(self.image()).unwrap();
        file.set_len(bytes).unwrap();
        let touched = Arc::<Touched>::default();
        let image = Box::new(FileImage { file, bytes, touched: Arc::clone(&touched) });
        let incoming = IncomingDisk {
            image,
            path: self.image(),
            format: ImageFormat::Raw,
            fresh,
            begins_as: None,
        };
        let info = DiskInfo { id: "disk".into(), bytes };
        (
            DiskReceiver::open("peer", vec![info], vec![incoming], known.into()).await.unwrap(),
            touched,
        )
    }

    /// Sends a disk, once; the target keeps it as a complete seed.
    async fn send(
        self,
        guest: &Guest,
        how: How,
        known: impl Into<Known>,
        forgetful: bool,
    ) -> (Self, Round) {
        self.send_recorded(guest, how, known, forgetful, ImageRecord::new(vec![None])).await
    }

    async fn send_recorded(
        mut self,
        guest: &Guest,
        how: How,
        known: impl Into<Known>,
        forgetful: bool,
        record: ImageRecord,
    ) -> (Self, Round) {
        let (mut receiver, touched) = self.receiver(guest.info.bytes, known).await;
        let (said, _hears) = self.target.control().unwrap();
        let (all, mut counted) = oneshot::channel();
        let target = self.target.clone();
        let mut harm = self.harm.take();
        let receiving = tokio::spawn(async move {
            let mut items = None;
            while items != Some(receiver.items()) {
                let batch = tokio::select! {
                    count = &mut counted, if items.is_none() => {
                        items = Some(count.unwrap());
                        continue;
                    }
                    batch = target.recv_batch() => batch.unwrap(),
                };
                let (header, body) = BulkHeader::decode(batch.body).unwrap();
                if let Some((_, harm)) = harm.take_if(|(item, _)| *item <= receiver.items()) {
                    harm();
                }
                if let Some(answer) =
                    receiver.apply(Unpacked::of(header, body).await).await.unwrap()
                {
                    said.send(&answer).await.unwrap();
                }
            }
            receiver.round_done().await.unwrap();
            receiver.keep(1).await.unwrap();
        });
        let link = Link::new("peer", self.source.clone()).unwrap();
        let meter = Meter::new("vm", "peer", Phase::Seed);
        let coding = Coding::default();
        let sender = DiskSender::new(&link, &meter, &coding, &record);
        let sender = if forgetful { sender.forgetful() } else { sender };
        sender.send(0, guest, how, Class::Seed).await.unwrap();
        all.send(link.disk_items()).unwrap();
        receiving.await.unwrap();
        let report = meter.complete(1, link.wire_bytes(), None);
        let zeros = report.saved.disk_zero_bytes;
        let known = report.saved.disk_known_bytes;
        let sent = report.payload_bytes - zeros - known;
        let written = touched.written.lock().unwrap().iter().map(|(_, len)| len).sum();
        let read = touched.read.load(Ordering::Relaxed);
        let (wire, items) = (report.wire_bytes, link.disk_items());
        let round = Round { sent, known, wire, items, written, read };
        (self, round)
    }
}

/// A new session over which a disk goes to a target that has `old`, with no record of it.
async fn send(old: Option<&[u8]>, new: &[u8], how: How, forgetful: bool) -> Round {
    let ends = ends().await;
    if let Some(old) = old {
        fs::write(ends.image(), old).unwrap();
    }
    let (ends, round) = ends.send(&Guest::new(new), how, Vec::new(), forgetful).await;
    assert!(ends.has() == new, "the image is another");
    // And what is said of it is true.
    let recipe = RecipeLog::load(&RecipeLog::path_for(&ends.image())).unwrap();
    for entry in recipe.entries() {
        let range = entry.offset as usize..(entry.offset + u64::from(entry.len)) as usize;
        assert_eq!(piece_id(&new[range]), entry.id);
    }
    for sample in recipe.samples() {
        let at = sample.offset as usize;
        let block = &new[at..new.len().min(at + BLOCK_BYTES)];
        assert_eq!(ShortId::of(&hash_blocks(block)[0]), sample.id);
    }
    assert!(recipe.zeros().flatten().all(|at| new[at as usize] == 0));
    round
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_there_is_not_sent_and_not_written() {
    let image = [noise(1, 20 * MIB), vec![0; 20 * MIB], noise(2, 3 * MIB + 512)].concat();
    let round = send(Some(&image), &image, How::Offer, false).await;
    assert_eq!((round.sent, round.known, round.written), (0, 23 * MIB as u64 + 512, 0));
    assert!(round.wire < 32 << 10, "{} bytes on the wire", round.wire);

    let mut changed = image.clone();
    changed[5 * MIB + 100] ^= 1;
    let round = send(Some(&image), &changed, How::Offer, false).await;
    // Of the block only what its neighbourhood does not have.
    assert_eq!(round.written, 4096);
    assert!(round.sent < 2048, "{} bytes", round.sent);
    assert!(round.wire < 64 << 10, "{} bytes on the wire", round.wire);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_without_anything_gets_everything_once() {
    let half = noise(1, 10 * MIB);
    let image = [&half[..], &vec![0; 30 * MIB], &half].concat();
    for (how, forgetful) in [(How::Offer, false), (How::Offer, true), (How::Push, false)] {
        let round = send(None, &image, how, forgetful).await;
        let twice = u64::from(how == How::Push);
        // A piece at the seam may differ.
        assert!(round.sent >= (10 + 10 * twice) * MIB as u64, "{how:?}");
        assert!(round.sent <= (11 + 10 * twice) * MIB as u64, "{how:?} {}", round.sent);
        assert_eq!(round.sent + round.known, 20 * MIB as u64);
    }
}

/// What stood at one place stands at another: each must be read before it is written over.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_that_change_places_do_no_harm() {
    let old = noise(1, 4 * MIB);
    let block = |n: usize| n * BLOCK_BYTES..(n + 1) * BLOCK_BYTES;
    let mut new = old.clone();
    for (one, other) in [(3, 700), (100, 101), (400, 20), (401, 21), (402, 22)] {
        new[block(one)].copy_from_slice(&old[block(other)]);
        new[block(other)].copy_from_slice(&old[block(one)]);
    }
    send(Some(&old), &new, How::Offer, false).await;
    // Whole halves, which are found as pieces.
    let new = [&old[2 * MIB..], &old[..2 * MIB]].concat();
    let round = send(Some(&old), &new, How::Offer, false).await;
    assert!(round.sent < MIB as u64 / 4, "{} bytes", round.sent);
    // All of it, moved on by three blocks.
    let new = [&noise(2, 3 * BLOCK_BYTES), &old[..old.len() - 3 * BLOCK_BYTES]].concat();
    let round = send(Some(&old), &new, How::Offer, false).await;
    assert!(round.sent < MIB as u64 / 4, "{} bytes", round.sent);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_beside_it_is_copied_from_by_pieces_and_blocks() {
    let ends = ends().await;
    let other = noise(1, 8 * MIB);
    let path = ends.dir.path().join("sibling.raw");
    fs::write(&path, &other).unwrap();
    let mut log = RecipeLog::create(&RecipeLog::path_for(&path), other.len() as u64).unwrap();
    let scan = blocks::scan(&[(0, other.clone().into())]);
    super::record::note(&mut log, &scan, &[]).unwrap();
    drop(log);
    // Moved, and with a new block here and there.
    let mut new = [noise(9, 5 * BLOCK_BYTES), other].concat();
    for at in (0..new.len()).step_by(MIB) {
        new[at] ^= 1;
    }
    let known = vec![ImageFile { path, format: ImageFormat::Raw }];
    let (ends, round) = ends.send(&Guest::new(&new), How::Offer, known, false).await;
    assert!(ends.has() == new);
    assert!(round.sent < 60 * BLOCK_BYTES as u64, "{} bytes", round.sent);
}

/// A record whose pieces and blocks are all at other places than it says.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_lies_costs_bytes_and_nothing_else() {
    let ends = ends().await;
    let old = noise(1, 2 * MIB);
    fs::write(ends.image(), &old).unwrap();
    let new = noise(2, 2 * MIB);
    let scan = blocks::scan(&[(0, new.clone().into())]);
    let log = RecipeLog::create(&RecipeLog::path_for(&ends.image()), new.len() as u64);
    super::record::note(&mut log.unwrap(), &scan, &[]).unwrap();
    let (ends, round) = ends.send(&Guest::new(&new), How::Offer, Vec::new(), false).await;
    assert!(ends.has() == new);
    assert_eq!(round.sent, new.len() as u64);
}

/// A guest that writes between the reads: what was offered is no longer there to be sent.
#[tokio::test(flavor = "multi_thread")]
async fn what_changes_while_it_is_sent_comes_as_it_is_or_not_at_all() {
    let old = noise(1, 6 * MIB);
    // Twice, so that pieces are waited for which never come as they were offered.
    let half = noise(2, 3 * MIB);
    let new = [&half[..], &half].concat();
    for writes in [2, 3, 17] {
        let ends = ends().await;
        fs::write(ends.image(), &old).unwrap();
        let guest = Guest { writes, ..Guest::new(&new) };
        let (ends, _) = ends.send(&guest, How::Offer, Vec::new(), true).await;
        let recipe = RecipeLog::load(&RecipeLog::path_for(&ends.image())).unwrap();
        // The target has at every place what the guest had there at some time: what it recorded.
        let has = ends.has();
        let mut bytes = 0;
        for entry in recipe.entries() {
            let range = entry.offset as usize..(entry.offset + u64::from(entry.len)) as usize;
            assert_eq!(piece_id(&has[range]), entry.id);
            bytes += entry.len as usize;
        }
        assert_eq!(bytes, new.len(), "something never came");
        let now = guest.data.lock().unwrap();
        let differing = now.iter().zip(&has).filter(|(now, has)| now != has).count();
        assert!(differing <= guest.reads.load(Ordering::Relaxed), "{differing} bytes differ");
    }
}

fn bundle(part: BundlePart) -> Bytes {
    ChunkBundle { disk: 0, parts: vec![part] }.encode(&mut Compressor::new(), Level::Store)
}

/// A block that is named like one that lies here, and is not that: 64 bits are not enough to be sure.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_of_one_short_id_are_told_apart_by_the_piece() {
    let ends = ends().await;
    let (old, new) = (noise(1, 4 * BLOCK_BYTES), noise(2, 4 * BLOCK_BYTES));
    fs::write(ends.image(), &old).unwrap();
    let entry = RecipeEntry { offset: 0, len: new.len() as u32, id: piece_id(&new) };
    let here: Vec<ShortId> = hash_blocks(&old).iter().map(ShortId::of).collect();
    let there: Vec<ShortId> = hash_blocks(&new).iter().map(ShortId::of).collect();
    let partly = vec![here[0], there[1], there[2], there[3]];
    for (blocks, expected) in [(here, vec![true; 4]), (partly, vec![false, true, true, true])] {
        let (mut receiver, _) = ends.receiver(new.len() as u64, Vec::new()).await;
        let offer = Offer { disk: 0, entries: vec![entry] }.encode();
        receiver.apply(Unpacked::of(BulkHeader::Offer { item: 0 }, offer).await).await.unwrap();
        let list = BlockList { offer: 0, blocks, samples: Vec::new() }.encode();
        let answer =
            receiver.apply(Unpacked::of(BulkHeader::Blocks { item: 1 }, list).await).await.unwrap();
        let Some(ToSource::Want { wanted, .. }) = answer else { panic!("{answer:?}") };
        assert_eq!(Answer::decode(&wanted, 4).unwrap().0, expected);
        let partial = !expected[0];
        if partial {
            let data = Bytes::copy_from_slice(&new[BLOCK_BYTES..]);
            let part = BundlePart::Blocks { offset: BLOCK_BYTES as u64, data };
            receiver
                .apply(Unpacked::of(BulkHeader::Chunks { item: 2 }, bundle(part)).await)
                .await
                .unwrap();
            assert_eq!(ends.has(), old, "nothing unproven is written");
        }
        let end = BulkHeader::End { item: 2 + u64::from(partial), disk: 0 };
        let lacking = receiver.apply(Unpacked::of(end, Bytes::new()).await).await.unwrap();
        let Some(ToSource::Lacking { pieces, .. }) = lacking else { panic!("{lacking:?}") };
        assert_eq!(pieces, [(0, new.len() as u32)]);
        let chunk = RawChunk::new(new.clone().into()).hash();
        let part = BundlePart::Chunk { offset: 0, chunk };
        receiver
            .apply(Unpacked::of(BulkHeader::Chunks { item: 4 }, bundle(part)).await)
            .await
            .unwrap();
        assert_eq!(ends.has(), new);
        fs::write(ends.image(), &old).unwrap();
        fs::remove_file(RecipeLog::path_for(&ends.image())).unwrap();
    }
}

/// An end may come before what was sent before it.
#[tokio::test(flavor = "multi_thread")]
async fn an_end_waits_for_what_it_is_the_end_of() {
    let ends = ends().await;
    let data = noise(1, 2 * BLOCK_BYTES);
    let (mut receiver, _) = ends.receiver(data.len() as u64, Vec::new()).await;
    let end = BulkHeader::End { item: 1, disk: 0 };
    assert_eq!(receiver.apply(Unpacked::of(end, Bytes::new()).await).await.unwrap(), None);
    let chunk = RawChunk::new(data.into()).hash();
    let part = bundle(BundlePart::Chunk { offset: 0, chunk });
    let answer =
        receiver.apply(Unpacked::of(BulkHeader::Chunks { item: 0 }, part).await).await.unwrap();
    assert_eq!(answer, Some(ToSource::Lacking { item: 1, pieces: Vec::new() }));
}

/// What a peer must not say.
#[tokio::test(flavor = "multi_thread")]
async fn questions_and_blocks_out_of_bounds_are_refused() {
    let ends = ends().await;
    let (mut receiver, _) = ends.receiver(64 << 10, Vec::new()).await;
    let id = piece_id(b"");
    let offer = |disk, offset| {
        let entry = RecipeEntry { offset, len: 4096, id };
        (BulkHeader::Offer { item: 0 }, Offer { disk, entries: vec![entry] }.encode())
    };
    let data = Bytes::from(vec![1; BLOCK_BYTES]);
    let blocks = bundle(BundlePart::Blocks { offset: 0, data: data.clone() });
    let patch = bundle(BundlePart::Patch { offset: 0, data });
    let list = BlockList { offer: 0, blocks: Vec::new(), samples: Vec::new() }.encode();
    let summaries = longhaul_dedup::summary::Summaries {
        disk: 0,
        first: 1,
        parcels: vec![longhaul_dedup::summary::Summary::Zeros],
    };
    for (header, body) in [
        offer(1, 0),
        offer(0, 64 << 10),
        (BulkHeader::Chunks { item: 0 }, blocks),
        (BulkHeader::Chunks { item: 0 }, patch),
        (BulkHeader::Blocks { item: 0 }, list),
        (BulkHeader::Summaries { item: 0 }, summaries.encode()),
        (BulkHeader::range(0, 0, 1, &summaries.parcels), Bytes::new()),
        (BulkHeader::range(0, 0, u64::MAX, &summaries.parcels), Bytes::new()),
        (BulkHeader::range(0, 1, 0, &summaries.parcels), Bytes::new()),
        (BulkHeader::End { item: 0, disk: 1 }, Bytes::new()),
    ] {
        assert!(
            receiver.apply(Unpacked::of(header.clone(), body).await).await.is_err(),
            "{header:?}"
        );
    }
    assert_eq!(receiver.items(), 0);
}

/// How a new image came of an old one.
#[derive(Debug, Clone)]
enum Edit {
    Change(usize, u8),
    Move { from: usize, to: usize, blocks: usize },
    Zero(usize, usize),
    Fresh(usize, usize, u64),
}

fn edit(blocks: usize) -> impl Strategy<Value = Edit> {
    let len = 1..blocks / 4;
    prop_oneof![
        (0..blocks, 1_u8..).prop_map(|(at, by)| Edit::Change(at, by)),
        (0..blocks, 0..blocks, len.clone()).prop_map(|(from, to, blocks)| Edit::Move {
            from,
            to,
            blocks
        }),
        (0..blocks, len.clone()).prop_map(|(at, len)| Edit::Zero(at, len)),
        (0..blocks, 1_usize..20, any::<u64>())
            .prop_map(|(at, len, seed)| Edit::Fresh(at, len, seed)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn any_image_becomes_any_other(
        edits in prop::collection::vec(edit(1500), 0..8),
        tail in 0_usize..9,
        forgetful: bool,
    ) {
        let old = [noise(1, 700 * BLOCK_BYTES), vec![0; 100 * BLOCK_BYTES], noise(2, 700 * BLOCK_BYTES + tail * 512)]
            .concat();
        let mut new = old.clone();
        let mut fresh = 0;
        for edit in edits {
            let clip = |at: usize, len: usize| {
                let start = at * BLOCK_BYTES;
                start..new.len().min(start + len * BLOCK_BYTES)
            };
            match edit {
                Edit::Change(at, by) => {
                    new[at * BLOCK_BYTES] ^= by;
                    fresh += 1;
                }
                Edit::Move { from, to, blocks } => {
                    let (from, to) = (clip(from, blocks), clip(to, blocks));
                    let len = from.len().min(to.len());
                    new.copy_within(from.start..from.start + len, to.start);
                    // At its ends blocks of pieces stand alone.
                    fresh += 2;
                }
                Edit::Zero(at, len) => {
                    let range = clip(at, len);
                    new[range].fill(0);
                }
                Edit::Fresh(at, len, seed) => {
                    let range = clip(at, len);
                    new[range.clone()].copy_from_slice(&noise(seed, range.len()));
                    fresh += len;
                }
            }
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let round = runtime.block_on(send(Some(&old), &new, How::Offer, forgetful));
        // A block that moved is missed if none of its neighbours is sampled, or it was written over.
        let most = (fresh + 1) as u64 * 64 * BLOCK_BYTES as u64 / 4 + round.written / 2;
        prop_assert!(round.sent <= most, "{} bytes sent, {} written", round.sent, round.written);
        let again = runtime.block_on(send(Some(&new), &new, How::Offer, forgetful));
        prop_assert_eq!((again.sent, again.written), (0, 0));
    }
}

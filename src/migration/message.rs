//! What two agents say to each other about one attempt: control messages and bulk items.
//!
//! Invariant: a message is data of bounded size and says nothing that its receiver may believe
//! unchecked. Control messages are `postcard` in the transport's frames. A bulk item is a `u16` (LE)
//! header length, a `postcard` [`BulkHeader`], and a body that the header's kind defines. New
//! variants go to the end of an enum; anything else is a new protocol version.

use std::fmt;
use std::str::FromStr;

use bytes::{Buf, Bytes};
use longhaul_dedup::summary::Summary;
use serde::{Deserialize, Serialize};

use super::handover::{Standing, Verdict};
use crate::hypervisor::{DiskInfo, MemoryLayout};

/// No bulk header is longer: the longest is a memory layout of [`MAX_REGIONS`] long names.
const MAX_HEADER_BYTES: usize = 32 * 1024;
/// Regions of memory in one VM; QEMU guests have about ten.
pub const MAX_REGIONS: usize = 64;
/// Pieces in one [`ToSource::Lacking`].
pub const MAX_LACKING: usize = 1024;
/// Disks of one VM.
pub const MAX_DISKS: usize = 64;

/// One attempt to seed or move one VM; drawn at random by the source.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct JobId([u8; 16]);

impl JobId {
    /// A fresh id.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JobId({self})")
    }
}

/// Text that is no job id.
#[derive(Debug, thiserror::Error)]
#[error("a job id is 32 hex digits")]
pub struct NotAJobId;

impl FromStr for JobId {
    type Err = NotAJobId;

    fn from_str(text: &str) -> Result<Self, NotAJobId> {
        if text.len() != 32 || !text.is_ascii() {
            return Err(NotAJobId);
        }
        let mut id = [0; 16];
        for (byte, digits) in id.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| NotAJobId)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| NotAJobId)?;
        }
        Ok(Self(id))
    }
}

/// What the source wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Disks only, ahead of time.
    Seed,
    /// The VM, whole.
    Migrate,
    /// Nothing yet: whether the target would take it.
    Check,
}

/// A disk as the source offers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOffer {
    /// Id in the description.
    pub id: String,
    /// Size that the guest sees.
    pub bytes: u64,
    /// The generation that this source tracked writes against, if it did.
    pub since: Option<u64>,
}

impl DiskOffer {
    /// The size and name alone.
    pub fn info(&self) -> DiskInfo {
        DiskInfo { id: self.id.clone(), bytes: self.bytes }
    }
}

/// The first message of an attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// The attempt.
    pub job: JobId,
    /// What for.
    pub purpose: Purpose,
    /// The VM, as `VmSpec::to_peer` writes it: without anything local to the source.
    pub vm: Vec<u8>,
    /// Its disks, in the description's order.
    pub disks: Vec<DiskOffer>,
}

/// The first message of an attempt that sends an image without a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenImage {
    /// The attempt.
    pub job: JobId,
    /// The target's pool that it is for.
    pub pool: String,
    /// Its file name there.
    pub file: String,
    /// Size that a guest would see.
    pub bytes: u64,
    /// An image of that name may be replaced.
    pub replace: bool,
}

/// The token: sent behind the last byte, by a source that has durably delegated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// The attempt.
    pub job: JobId,
    /// Disk items sent in the whole attempt.
    pub disk_items: u64,
    /// Memory items sent in the whole attempt.
    pub memory_items: u64,
    /// The guest is to run; `false` if its owner had paused it.
    pub run: bool,
}

/// From source to target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToTarget {
    /// Begin.
    Open(Box<Open>),
    /// All disk items of this round were sent; `items` counts those of the whole attempt.
    RoundEnd {
        /// The round, from 1.
        round: u32,
        /// Disk items so far.
        items: u64,
    },
    /// Start the hypervisor that will receive the memory.
    Prepare,
    /// The hand-over.
    Token(Token),
    /// This attempt is over; the guest stays at the source.
    Abort {
        /// Why.
        reason: String,
    },
    /// What does your journal say about this attempt?
    Ask {
        /// The attempt.
        job: JobId,
        /// How the source stands.
        standing: Standing,
    },
    /// The seed is complete: keep it under this generation.
    Keep {
        /// Names the state of the disks at the target from here on.
        generation: u64,
    },
    /// Your decision is durable here: this attempt is over.
    Confirm {
        /// The attempt.
        job: JobId,
    },
    /// Begin, with an image instead of a VM.
    OpenImage(Box<OpenImage>),
    /// A question about no attempt; its language is the agents' own.
    Question(Vec<u8>),
}

/// How the time at the target went, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct TargetTimes {
    /// Token received to last item applied.
    pub drain_ms: f64,
    /// To all of it handed to the hypervisor, and the disks durable.
    pub check_ms: f64,
    /// To the hypervisor having loaded the state.
    pub load_ms: f64,
    /// To the acceptance durable.
    pub journal_ms: f64,
    /// To the guest observed running.
    pub start_ms: f64,
    /// Last item of data received to the guest observed running.
    pub since_last_ms: f64,
}

/// From target to source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToSource {
    /// Go ahead. For each disk: whether the target holds it at the offered generation.
    Accepted {
        /// In the order of [`Open::disks`].
        at_generation: Vec<bool>,
        /// For each disk: whether pages of memory may go as names of its blocks.
        readable: Vec<bool>,
    },
    /// It cannot be; nothing was changed.
    Refused {
        /// Each in a sentence.
        reasons: Vec<String>,
    },
    /// The answer to summaries, an offer or a list of blocks: one bit for each.
    Want {
        /// The disk item that asked.
        item: u64,
        /// Encoded by `dedup::offer`: which of them differ, or are not here.
        wanted: Vec<u8>,
        /// To summaries: this disk need not be asked by them any more. To an offer: send the wanted
        /// pieces whole, nothing is here that their blocks could be found in.
        plain: bool,
        /// To a list of blocks: what seems to be similar to its pieces, encoded by `dedup::offer`.
        bases: Vec<u8>,
    },
    /// The answer to the end of a disk: pieces that did not come together, each with its first byte
    /// and its length. They are wanted whole; with none the disk is as it was offered.
    Lacking {
        /// The disk item that was the end.
        item: u64,
        /// At most [`MAX_LACKING`] of them; more are told at the next end.
        pieces: Vec<(u64, u32)>,
    },
    /// Everything of this round is written.
    RoundDone {
        /// The round.
        round: u32,
    },
    /// The hypervisor is there and waits for memory.
    Prepared,
    /// Memory items applied, in order.
    MemoryApplied {
        /// How many.
        items: u64,
    },
    /// This memory item names blocks that do not hold what its pages are to become: its named pages
    /// are wanted in full. Nothing behind it is applied before.
    Unproven {
        /// The item.
        item: u64,
    },
    /// What the target's journal says.
    Verdict {
        /// The attempt.
        job: JobId,
        /// The decision.
        verdict: Verdict,
        /// Why, for a refusal.
        reason: Option<String>,
        /// How long the target's part took.
        times: TargetTimes,
    },
    /// The attempt failed at the target.
    Failed {
        /// Why.
        reason: String,
    },
    /// The seed is kept.
    Kept,
    /// What the source confirmed is noted.
    Noted,
    /// The answer to a [`ToTarget::Question`].
    Answer(Vec<u8>),
}

/// What a bulk item is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum BulkHeader {
    /// Parcels of a disk in a hash each. Body: `dedup::summary::Summaries`.
    Summaries {
        /// Number of this disk item.
        item: u64,
    },
    /// Parcels side by side as one: `dedup::summary::Summary::of_many`. No body.
    Range {
        /// Number of this disk item.
        item: u64,
        /// The disk.
        disk: u16,
        /// The first parcel.
        first: u64,
        /// That parcel and those behind it.
        parcels: u32,
        /// The hash; `None` if all of it is zeros.
        hash: Option<[u8; 32]>,
    },
    /// Pieces that the source could send. Body: `dedup::offer::Offer`.
    Offer {
        /// Number of this disk item in the attempt, from 0.
        item: u64,
    },
    /// Blocks of those that are wanted. Body: `dedup::offer::BlockList`.
    Blocks {
        /// Number of this disk item.
        item: u64,
    },
    /// Everything that was asked for of a disk has been sent. No body.
    End {
        /// Number of this disk item.
        item: u64,
        /// The disk.
        disk: u16,
    },
    /// Pieces, blocks and zero stretches. Body: `dedup::bundle::ChunkBundle`.
    Chunks {
        /// Number of this disk item.
        item: u64,
    },
    /// Memory, to be applied in the order of `item`.
    Memory {
        /// Number of this memory item, from 0.
        item: u64,
        /// What the body is.
        kind: MemoryKind,
    },
}

/// What a memory item carries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryKind {
    /// The regions. No body.
    Layout(MemoryLayout),
    /// Body: `dedup::pagebatch`.
    Pages,
    /// The pages that an earlier item named by blocks, in its order. Body: `dedup::compress`.
    Named {
        /// That item.
        of: u64,
    },
    /// Bytes for the hypervisor, verbatim. Body: `dedup::compress`.
    Opaque,
    /// No body.
    LastPass,
    /// No body.
    PagesDone,
    /// No body; opaque items follow.
    NotUnderstood {
        /// What the source's parser met.
        reason: String,
    },
}

/// A bulk item that is none.
#[derive(Debug, thiserror::Error)]
#[error("the peer sent a bulk item that is not understood")]
pub struct BadBulk;

impl BulkHeader {
    /// A question about parcels side by side as one.
    pub fn range(item: u64, disk: u16, first: u64, parcels: &[Summary]) -> Self {
        let hash = match Summary::of_many(parcels) {
            Summary::Zeros => None,
            Summary::Pieces(hash) => Some(hash),
        };
        Self::Range { item, disk, first, parcels: parcels.len() as u32, hash }
    }

    /// The bytes in front of the body.
    pub fn encode(&self) -> Vec<u8> {
        let header = postcard::to_stdvec(self).expect("plain data always has a postcard form");
        let len = u16::try_from(header.len()).expect("headers are shorter than MAX_HEADER_BYTES");
        let mut bytes = Vec::with_capacity(2 + header.len());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&header);
        bytes
    }

    /// Splits an item into its header and body.
    pub fn decode(mut item: Bytes) -> Result<(Self, Bytes), BadBulk> {
        if item.len() < 2 {
            return Err(BadBulk);
        }
        let len = usize::from(item.get_u16_le());
        if len > MAX_HEADER_BYTES || len > item.len() {
            return Err(BadBulk);
        }
        let header = item.split_to(len);
        let (header, rest) = postcard::take_from_bytes(&header).map_err(|_| BadBulk)?;
        if rest.is_empty() { Ok((header, item)) } else { Err(BadBulk) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn job_ids_survive_text() {
        let job = JobId::random();
        assert_eq!(job.to_string().parse::<JobId>().unwrap(), job);
        assert!("xyz".parse::<JobId>().is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = BulkHeader::decode(Bytes::from(bytes));
        }

        #[test]
        fn headers_survive(item: u64, body in proptest::collection::vec(any::<u8>(), 0..50)) {
            let header = BulkHeader::Chunks { item };
            let mut bytes = header.encode();
            bytes.extend_from_slice(&body);
            let (back, rest) = BulkHeader::decode(Bytes::from(bytes)).unwrap();
            prop_assert_eq!(back, header);
            prop_assert_eq!(&rest[..], &body[..]);
        }
    }
}

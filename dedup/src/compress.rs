//! Compression of whole batches, and its strict inverse.
//!
//! Batches should hold 64 KiB or more: a 4 KiB page alone compresses 20 % worse and half as fast
//! as in the company of 15 others.
//!
//! Invariant: [`decompress`] allocates no more than its caller allows, whatever the input says, and
//! gives exactly as many bytes as the input states.
//!
//! Serialized [`Packed`]: coding (`u8`: 0 stored, 1 one Zstandard frame, 2 raw [LZMA](crate::lzma)),
//! unpacked length (varint), then the body up to the end of the input. The frame carries its content
//! size and no checksum (hashes above this layer prove the bytes); skippable and further frames are
//! refused.

use bytes::Bytes;
use zstd::zstd_safe::{self, CParameter};

use crate::cursor::{Cursor, DecodeError, put_varint};
use crate::lzma::{self, Effort};

/// The most that one [`Packed`] may unpack to, in bytes. Callers allow less.
pub const MAX_UNPACKED_BYTES: usize = 32 << 20;

/// How hard to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Not at all.
    Store,
    /// Zstandard at this level; beyond [`Level::MIN_ZSTD`] and [`Level::MAX_ZSTD`] the nearest.
    Zstd(i32),
    /// LZMA: denser than Zstandard for the same time, from its level 16 on.
    Lzma(Effort),
}

impl Level {
    /// The fastest Zstandard level that is used.
    pub const MIN_ZSTD: i32 = -7;
    /// The slowest one; those above need hundreds of MiB for a context.
    pub const MAX_ZSTD: i32 = 19;
}

impl Default for Level {
    /// Zstandard's own default, for when nothing was measured yet.
    fn default() -> Self {
        Self::Zstd(3)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Coding {
    Stored,
    Zstd,
    Lzma,
}

/// Bytes, compressed if that was worth it, with the length that they unpack to.
#[derive(Clone, PartialEq, Eq)]
pub struct Packed {
    coding: Coding,
    unpacked_len: u32,
    body: Bytes,
}

/// Packed bytes that cannot be unpacked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnpackError {
    /// The input is not what [`Packed::encode_into`] writes.
    #[error("packed data: {0}")]
    Malformed(#[from] DecodeError),
    /// It states a length beyond what the caller allows.
    #[error("packed data states {stated} bytes, the limit is {limit}")]
    TooLarge {
        /// The stated length.
        stated: usize,
        /// What the caller allows.
        limit: usize,
    },
    /// The body is not exactly what packing gives of so many bytes.
    #[error("packed data is not one frame of {stated} bytes")]
    BadFrame {
        /// The stated length.
        stated: usize,
    },
}

impl Packed {
    fn stored(data: Bytes) -> Self {
        Self { coding: Coding::Stored, unpacked_len: data.len() as u32, body: data }
    }

    /// Reads what [`encode_into`](Self::encode_into) wrote; `bytes` holds nothing else.
    pub fn decode(bytes: &Bytes) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        let coding = match cursor.u8("coding")? {
            0 => Coding::Stored,
            1 => Coding::Zstd,
            2 => Coding::Lzma,
            _ => return Err(DecodeError::Invalid { what: "coding" }),
        };
        let unpacked_len = cursor.count(MAX_UNPACKED_BYTES, "unpacked length")? as u32;
        Ok(Self { coding, unpacked_len, body: bytes.slice_ref(cursor.rest()) })
    }

    /// Appends the serialized form to `out`.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        out.push(match self.coding {
            Coding::Stored => 0,
            Coding::Zstd => 1,
            Coding::Lzma => 2,
        });
        put_varint(out, u64::from(self.unpacked_len));
        out.extend_from_slice(&self.body);
    }

    /// Bytes that it states to unpack to.
    pub fn unpacked_len(&self) -> usize {
        self.unpacked_len as usize
    }

    /// Bytes that it takes, but for a header of at most 6.
    pub fn packed_len(&self) -> usize {
        self.body.len()
    }

    /// Whether compression was not worth it.
    pub fn is_stored(&self) -> bool {
        self.coding == Coding::Stored
    }
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packed")
            .field("coding", &self.coding)
            .field("unpacked_len", &self.unpacked_len)
            .field("packed_len", &self.body.len())
            .finish()
    }
}

/// Compresses batches, one after the other, in one reused context.
pub struct Compressor {
    context: zstd::bulk::Compressor<'static>,
    /// The level that `context` is set to.
    level: Option<i32>,
    /// Output of the last call: fresh memory for each batch would cost as much as level -5.
    scratch: Vec<u8>,
    samples: Vec<u8>,
}

/// Compressed data must be smaller by 1/32, or unpacking is not worth the target's time.
const WORTHWHILE_SHIFT: usize = 5;
/// Faster levels than this skip over incompressible data about as fast as a probe would.
const PROBE_FROM_LEVEL: Level = Level::Zstd(2);
/// Below this, the probe would look at most of the data.
const PROBE_FROM_BYTES: usize = 64 << 10;
/// A sample: long enough for the entropy coder to see skewed bytes, and for text to repeat.
const SAMPLE_BYTES: usize = 2 << 10;
/// One sample in each stretch of this length.
const SAMPLE_STRIDE: usize = 32 << 10;
const PROBE_LEVEL: i32 = 1;

/// As long as compressed data may be at most, or a little more.
fn worthwhile(data: &[u8]) -> usize {
    data.len() - (data.len() >> WORTHWHILE_SHIFT)
}

impl Compressor {
    /// A compressor; its memory grows with the level that it is used at (about 1 MiB at level 1,
    /// 90 MiB at level 19).
    pub fn new() -> Self {
        Self {
            context: zstd::bulk::Compressor::default(),
            level: None,
            scratch: Vec::new(),
            samples: Vec::new(),
        }
    }

    /// Packs `data`; stores it as it is where compression is not worth it.
    ///
    /// Incompressible data is recognised by samples and costs little more than those.
    ///
    /// # Panics
    /// If `data` is longer than [`MAX_UNPACKED_BYTES`].
    pub fn compress(&mut self, level: Level, data: Bytes) -> Packed {
        assert!(data.len() <= MAX_UNPACKED_BYTES, "batches are bounded by their codecs");
        if level >= PROBE_FROM_LEVEL
            && data.len() >= PROBE_FROM_BYTES
            && !self.samples_compress(&data)
        {
            return Packed::stored(data);
        }
        let coded = match level {
            Level::Store => None,
            Level::Zstd(level) => self
                .frame(level.clamp(Level::MIN_ZSTD, Level::MAX_ZSTD), &data)
                .map(|frame| (Coding::Zstd, Bytes::copy_from_slice(frame))),
            Level::Lzma(effort) => lzma::pack(effort, &data)
                .filter(|body| body.len() < worthwhile(&data))
                .map(|body| (Coding::Lzma, body.into())),
        };
        match coded {
            Some((coding, body)) => Packed { coding, unpacked_len: data.len() as u32, body },
            None => Packed::stored(data),
        }
    }

    fn samples_compress(&mut self, data: &[u8]) -> bool {
        let mut samples = std::mem::take(&mut self.samples);
        samples.clear();
        for stretch in data.chunks_exact(SAMPLE_STRIDE) {
            samples.extend_from_slice(&stretch[..SAMPLE_BYTES]);
        }
        let worthwhile = self.frame(PROBE_LEVEL, &samples).is_some();
        self.samples = samples;
        worthwhile
    }

    /// One frame in `scratch`, or nothing if it is not worth it. A failing encoder (out of memory)
    /// counts as that: the data goes as it is.
    fn frame(&mut self, level: i32, data: &[u8]) -> Option<&[u8]> {
        let worthwhile = worthwhile(data);
        // With room for no more than that, the encoder gives up as soon as it is exceeded.
        self.scratch.clear();
        self.scratch.reserve(worthwhile);
        if self.level != Some(level) {
            self.context.set_parameter(CParameter::CompressionLevel(level)).ok()?;
            self.level = Some(level);
        }
        let len = self.context.compress_to_buffer(data, &mut self.scratch).ok()?;
        // The vector may have room for more than was asked for.
        (len < worthwhile).then_some(&self.scratch[..len])
    }
}

impl Default for Compressor {
    fn default() -> Self {
        Self::new()
    }
}

/// Unpacks at most `max_len` bytes.
///
/// All lengths are compared before anything is allocated; a body of another length than stated,
/// with anything behind it or none at all, is refused.
pub fn decompress(packed: &Packed, max_len: usize) -> Result<Bytes, UnpackError> {
    let stated = packed.unpacked_len();
    if stated > max_len {
        return Err(UnpackError::TooLarge { stated, limit: max_len });
    }
    let bad_frame = UnpackError::BadFrame { stated };
    match packed.coding {
        Coding::Stored if packed.body.len() == stated => return Ok(packed.body.clone()),
        Coding::Stored => return Err(bad_frame),
        Coding::Lzma => {
            return lzma::unpack(&packed.body, stated).map(Bytes::from).ok_or(bad_frame);
        }
        Coding::Zstd => {}
    }
    let frame = &packed.body[..];
    let is_one_frame = frame.starts_with(&zstd_safe::MAGICNUMBER.to_le_bytes())
        && matches!(zstd_safe::get_frame_content_size(frame), Ok(Some(len)) if len == stated as u64)
        && zstd_safe::find_frame_compressed_size(frame) == Ok(frame.len());
    if !is_one_frame {
        return Err(bad_frame);
    }
    let mut data = Vec::with_capacity(stated);
    match zstd::bulk::Decompressor::default().decompress_to_buffer(frame, &mut data) {
        Ok(len) if len == stated => Ok(data.into()),
        _ => Err(bad_frame),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Bytes {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes.into()
    }

    fn text(len: usize) -> Bytes {
        let words = (0_u32..).flat_map(|n| format!("line {n} of a log\n").into_bytes());
        words.take(len).collect::<Vec<u8>>().into()
    }

    fn frame_of(level: Level, data: Bytes) -> Packed {
        let packed = Compressor::new().compress(level, data);
        assert!(!packed.is_stored());
        packed
    }

    #[test]
    fn noise_is_stored_and_text_is_not() {
        let mut compressor = Compressor::new();
        let levels = [-5, 1, 3, 9].map(Level::Zstd);
        for level in levels.into_iter().chain([Level::Lzma(Effort::Careful)]) {
            for len in [0, 1, 100, 4096, 100_000, 1 << 20] {
                let packed = compressor.compress(level, noise(len));
                assert!(packed.is_stored(), "{level:?} {len}");
                assert_eq!(decompress(&packed, len).unwrap(), noise(len));
            }
            for len in [4096, 100_000, 1 << 20] {
                let packed = compressor.compress(level, text(len));
                assert!(packed.packed_len() * 2 < len, "{level:?} {len}");
                assert_eq!(decompress(&packed, len).unwrap(), text(len));
            }
        }
        assert!(compressor.compress(Level::Store, text(4096)).is_stored());
    }

    #[test]
    fn half_noise_is_compressed() {
        let mut data = noise(1 << 19).to_vec();
        data.extend_from_slice(&text(1 << 19));
        assert!(frame_of(Level::Zstd(3), data.into()).packed_len() < 700_000);
    }

    #[test]
    fn a_bomb_is_refused_before_it_is_unpacked() {
        let packed = frame_of(Level::Zstd(3), vec![0; MAX_UNPACKED_BYTES].into());
        assert!(packed.packed_len() < 10_000);
        assert_eq!(
            decompress(&packed, 1 << 20),
            Err(UnpackError::TooLarge { stated: MAX_UNPACKED_BYTES, limit: 1 << 20 })
        );
        // The outer length lies, the frame does not.
        let liar = Packed { unpacked_len: 1000, ..packed };
        assert_eq!(decompress(&liar, 1 << 20), Err(UnpackError::BadFrame { stated: 1000 }));
    }

    #[test]
    fn garbage_around_the_frame_is_refused() {
        let packed = frame_of(Level::Zstd(3), text(5000));
        let with_body =
            |body: Vec<u8>| decompress(&Packed { body: body.into(), ..packed.clone() }, 5000);
        let frame = packed.body.to_vec();
        let bad = Err(UnpackError::BadFrame { stated: 5000 });
        assert!(with_body(frame.clone()).is_ok());
        assert_eq!(with_body([&frame[..], &[0]].concat()), bad);
        assert_eq!(with_body([&frame[..], &frame[..]].concat()), bad);
        // A skippable frame of no bytes before it.
        assert_eq!(with_body([&[0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0], &frame[..]].concat()), bad);
        for len in 0..frame.len() {
            assert_eq!(with_body(frame[..len].to_vec()), bad);
        }
    }

    #[test]
    fn a_frame_without_its_length_is_refused() {
        let mut compressor = Compressor::new();
        compressor.context.set_parameter(CParameter::ContentSizeFlag(false)).unwrap();
        let packed = compressor.compress(Level::Zstd(3), text(5000));
        assert_eq!(decompress(&packed, 5000), Err(UnpackError::BadFrame { stated: 5000 }));
    }

    #[test]
    fn the_serialized_form_is_coding_length_body() {
        let mut bytes = Vec::new();
        Packed::stored(Bytes::from_static(&[9; 300])).encode_into(&mut bytes);
        assert_eq!(bytes[..3], [0, 0xac, 0x02]);
        assert_eq!(bytes[3..], [9; 300]);
        bytes[0] = 3;
        assert!(Packed::decode(&bytes.into()).is_err());
    }
}

//! Puts a reply together from its chunks, in whatever order they come.
//!
//! Invariant: a read is complete only if every byte that was asked for was answered exactly once,
//! so that a byte nobody sent can never pass for a zero. Pure; the client moves the bytes.

use bytes::{Bytes, BytesMut};

use super::codec::{CodecError, Command};

/// Most chunks in the answer to one read: one for every sector of the largest read and then some.
const READ_CHUNKS_MAX: usize = 65_536;

/// The bytes of a read as they arrive.
#[derive(Debug)]
pub(super) struct ReadReply {
    offset: u64,
    buffer: BytesMut,
    /// Answered stretches relative to `offset`, ascending, never touching each other.
    covered: Vec<(usize, usize)>,
    chunks: usize,
}

impl ReadReply {
    /// A reply to a read of `len` bytes at `offset`; `len` is the caller's own number.
    pub(super) fn new(offset: u64, len: u32) -> Self {
        // Zeroed memory comes from the kernel for free, and holes then need no work.
        let buffer = BytesMut::zeroed(len as usize);
        Self { offset, buffer, covered: Vec::new(), chunks: 0 }
    }

    /// Where the `len` bytes at `offset` of the disk go; they count as answered.
    pub(super) fn data(&mut self, offset: u64, len: u32) -> Result<&mut [u8], CodecError> {
        let (start, end) = self.cover(offset, len)?;
        Ok(&mut self.buffer[start..end])
    }

    /// Notes that `len` bytes at `offset` of the disk are zeros.
    pub(super) fn hole(&mut self, offset: u64, len: u32) -> Result<(), CodecError> {
        self.cover(offset, len).map(|_| ())
    }

    fn cover(&mut self, offset: u64, len: u32) -> Result<(usize, usize), CodecError> {
        let wrong = CodecError::Coverage { command: Command::Read, offset };
        self.chunks += 1;
        if self.chunks > READ_CHUNKS_MAX {
            return Err(CodecError::Endless { limit: READ_CHUNKS_MAX });
        }
        let start = offset.checked_sub(self.offset).and_then(|s| usize::try_from(s).ok());
        let Some(start) = start.filter(|s| *s < self.buffer.len()) else { return Err(wrong) };
        let end = start.saturating_add(len as usize);
        if len == 0 || end > self.buffer.len() {
            return Err(wrong);
        }
        let at = self.covered.partition_point(|(s, _)| *s < start);
        let joins_left = at > 0 && self.covered[at - 1].1 == start;
        let joins_right = self.covered.get(at).is_some_and(|(s, _)| *s == end);
        if at > 0 && self.covered[at - 1].1 > start {
            return Err(wrong);
        }
        if self.covered.get(at).is_some_and(|(s, _)| *s < end) {
            return Err(wrong);
        }
        match (joins_left, joins_right) {
            (true, true) => {
                self.covered[at - 1].1 = self.covered[at].1;
                self.covered.remove(at);
            }
            (true, false) => self.covered[at - 1].1 = end,
            (false, true) => self.covered[at].0 = start,
            (false, false) => self.covered.insert(at, (start, end)),
        }
        Ok((start, end))
    }

    /// The bytes, if all of them were answered.
    pub(super) fn finish(self) -> Result<Bytes, CodecError> {
        if self.covered == [(0, self.buffer.len())] {
            return Ok(self.buffer.freeze());
        }
        let gap = match self.covered.first() {
            Some((0, end)) => *end as u64,
            _ => 0,
        };
        Err(CodecError::Coverage { command: Command::Read, offset: self.offset + gap })
    }
}

/// A stretch of a disk as one metadata context sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// First byte.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// The context's flags.
    pub flags: u32,
}

/// Turns an answer about block status into extents, cut at the end of what was asked.
///
/// They may end early: the server says as much as it likes, at least one extent.
pub(super) fn place_status(
    offset: u64,
    len: u32,
    extents: &[(u32, u32)],
) -> Result<Vec<Status>, CodecError> {
    let end = offset + u64::from(len);
    let mut at = offset;
    let mut out: Vec<Status> = Vec::with_capacity(extents.len());
    for (extent_len, flags) in extents {
        if *extent_len == 0 || at >= end {
            return Err(CodecError::Coverage { command: Command::BlockStatus, offset: at });
        }
        let len = u64::from(*extent_len).min(end - at);
        match out.last_mut() {
            Some(last) if last.flags == *flags => last.len += len,
            _ => out.push(Status { offset: at, len, flags: *flags }),
        }
        at += len;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn chunks_in_any_order_with_holes_give_the_bytes() {
        let mut reply = ReadReply::new(1000, 100);
        reply.data(1060, 40).unwrap().fill(3);
        reply.hole(1010, 50).unwrap();
        reply.data(1000, 10).unwrap().fill(1);
        let bytes = reply.finish().unwrap();
        assert_eq!(bytes[..10], [1; 10]);
        assert_eq!(bytes[10..60], [0; 50]);
        assert_eq!(bytes[60..], [3; 40]);
    }

    #[test]
    fn a_byte_that_nobody_sent_is_not_a_zero() {
        let mut reply = ReadReply::new(0, 100);
        reply.data(0, 50).unwrap();
        reply.hole(51, 49).unwrap();
        let wrong = CodecError::Coverage { command: Command::Read, offset: 50 };
        assert_eq!(reply.finish(), Err(wrong));
    }

    #[test]
    fn overlaps_and_bytes_outside_are_refused() {
        let mut reply = ReadReply::new(4096, 100);
        reply.data(4106, 10).unwrap();
        for (offset, len) in
            [(4106, 1), (4100, 7), (4115, 1), (4096, 101), (4095, 1), (4196, 1), (u64::MAX, 1)]
        {
            assert!(reply.data(offset, len).is_err(), "{offset}+{len}");
        }
        assert!(reply.hole(4106, 0).is_err());
    }

    #[test]
    fn status_is_cut_at_the_end_and_equal_neighbours_join() {
        let placed = place_status(10, 100, &[(20, 0), (20, 0), (4_000_000_000, 3)]).unwrap();
        assert_eq!(
            placed,
            [Status { offset: 10, len: 40, flags: 0 }, Status { offset: 50, len: 60, flags: 3 }]
        );
        assert!(place_status(0, 10, &[(10, 0), (1, 0)]).is_err());
        assert!(place_status(0, 10, &[(0, 0)]).is_err());
    }

    proptest! {
        #[test]
        fn any_cutting_of_a_read_is_put_together(
            cuts in prop::collection::btree_set(1usize..4096, 0..40),
            order in any::<u64>(),
        ) {
            let content: Vec<u8> = (0..4096u32).map(|i| (i * 7 + i / 256) as u8).collect();
            let mut edges = vec![0];
            edges.extend(cuts);
            edges.push(4096);
            let mut pieces: Vec<(usize, usize)> = edges.windows(2).map(|w| (w[0], w[1])).collect();
            pieces.sort_by_key(|(s, _)| (*s as u64 + 1).wrapping_mul(order | 1));
            let mut reply = ReadReply::new(7 << 30, 4096);
            for (start, end) in pieces {
                let slot = reply.data((7 << 30) + start as u64, (end - start) as u32).unwrap();
                slot.copy_from_slice(&content[start..end]);
            }
            prop_assert_eq!(reply.finish().unwrap(), content);
        }
    }
}

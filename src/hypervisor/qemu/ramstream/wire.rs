//! The numbers of QEMU's migration stream and a cursor that never reads past what arrived.
//!
//! Invariant: a cursor either yields a whole field or says [`Stop::More`]; nothing is consumed until
//! the caller has a whole token. All integers are big-endian. Source: QEMU's `migration/savevm.h`,
//! `migration/ram.c` and `migration/savevm.c`, which agree from 7.2 to 10.2.

use super::doubt::Doubt;

/// "QEVM".
pub(super) const MAGIC: u32 = 0x5145_564D;
/// The only stream version that QEMU still writes.
pub(super) const VERSION: u32 = 3;

pub(super) const EOF: u8 = 0x00;
pub(super) const START: u8 = 0x01;
pub(super) const PART: u8 = 0x02;
pub(super) const END: u8 = 0x03;
pub(super) const FULL: u8 = 0x04;
pub(super) const SUBSECTION: u8 = 0x05;
pub(super) const VMDESC: u8 = 0x06;
pub(super) const CONFIG: u8 = 0x07;
pub(super) const COMMAND: u8 = 0x08;
pub(super) const FOOTER: u8 = 0x7E;

pub(super) const COMMAND_OPEN_RETURN_PATH: u16 = 1;
pub(super) const COMMAND_PING: u16 = 2;
pub(super) const COMMAND_SWITCHOVER_START: u16 = 11;

/// The memory handler's name, instance and version.
pub(super) const MEMORY_ID: &[u8] = b"ram";
pub(super) const MEMORY_INSTANCE: u32 = 0;
pub(super) const MEMORY_VERSION: u32 = 4;

/// A record's first word: flags below, byte offset in its region above.
pub(super) const FLAG_BITS: u64 = 0xFFF;
pub(super) const FLAG_ZERO: u64 = 0x002;
pub(super) const FLAG_MEM_SIZE: u64 = 0x004;
pub(super) const FLAG_PAGE: u64 = 0x008;
pub(super) const FLAG_EOS: u64 = 0x010;
pub(super) const FLAG_CONTINUE: u64 = 0x020;

/// `target-page-bits` of every guest whose pages are 4096 bytes.
pub(super) const PAGE_BITS: u32 = 12;

/// The machine type's name is a short word; anything longer is not a stream that we know.
pub(super) const MACHINE_NAME_MAX: u32 = 255;

/// Why a token was not taken.
#[derive(Debug)]
pub(super) enum Stop {
    /// It has not arrived as a whole.
    More,
    /// It is not what a memory stream has here.
    Doubt(Doubt),
}

impl From<Doubt> for Stop {
    fn from(doubt: Doubt) -> Self {
        Self::Doubt(doubt)
    }
}

/// Reads fields from the front of what arrived.
pub(super) struct Cursor<'a> {
    input: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(input: &'a [u8]) -> Self {
        Self { input, at: 0 }
    }

    /// Bytes taken so far.
    pub(super) fn taken(&self) -> usize {
        self.at
    }

    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Stop> {
        let rest = &self.input[self.at..];
        let field = rest.get(..len).ok_or(Stop::More)?;
        self.at += len;
        Ok(field)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stop> {
        let field = self.bytes(N)?;
        Ok(field.try_into().expect("bytes(N) gives N bytes"))
    }

    pub(super) fn u8(&mut self) -> Result<u8, Stop> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, Stop> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, Stop> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Stop> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// A name with its length in one byte before it.
    pub(super) fn name(&mut self) -> Result<&'a [u8], Stop> {
        let len = self.u8()?;
        self.bytes(usize::from(len))
    }
}

/// Begins a section of the memory handler: [`PART`] or [`END`].
pub(super) fn put_section(out: &mut Vec<u8>, kind: u8, id: u32) {
    out.push(kind);
    out.extend_from_slice(&id.to_be_bytes());
}

/// Ends a body of page records.
pub(super) fn put_eos(out: &mut Vec<u8>) {
    out.extend_from_slice(&FLAG_EOS.to_be_bytes());
}

/// Ends a section.
pub(super) fn put_footer(out: &mut Vec<u8>, id: u32) {
    put_section(out, FOOTER, id);
}

/// One page record: zeros without `content`. `name` is absent if the region is that of the record
/// before.
pub(super) fn put_record(
    out: &mut Vec<u8>,
    name: Option<&[u8]>,
    page: u64,
    content: Option<&[u8]>,
) {
    let kind = if content.is_some() { FLAG_PAGE } else { FLAG_ZERO };
    let same = if name.is_none() { FLAG_CONTINUE } else { 0 };
    out.extend_from_slice(&((page << PAGE_BITS) | kind | same).to_be_bytes());
    if let Some(name) = name {
        let len = u8::try_from(name.len()).expect("a layout's names have at most 255 bytes");
        out.push(len);
        out.extend_from_slice(name);
    }
    match content {
        Some(content) => out.extend_from_slice(content),
        None => out.push(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_written_as_qemu_writes_them() {
        let mut out = Vec::new();
        put_section(&mut out, PART, 2);
        put_record(&mut out, Some(b"pc.ram"), 1, None);
        put_record(&mut out, None, 0x12345, None);
        put_eos(&mut out);
        put_footer(&mut out, 2);
        let golden = [
            &[0x02, 0, 0, 0, 2][..],
            &[0, 0, 0, 0, 0, 0, 0x10, 0x02, 6],
            b"pc.ram\0",
            &[0, 0, 0, 0, 0x12, 0x34, 0x50, 0x22, 0],
            &[0, 0, 0, 0, 0, 0, 0, 0x10],
            &[0x7E, 0, 0, 0, 2],
        ]
        .concat();
        assert_eq!(out, golden);
    }

    #[test]
    fn a_cursor_waits_for_whole_fields() {
        let mut cursor = Cursor::new(&[3, b'a', b'b']);
        assert!(matches!(cursor.name(), Err(Stop::More)));
        assert!(matches!(Cursor::new(&[1, 2, 3]).u32(), Err(Stop::More)));
        assert_eq!(Cursor::new(&[1, 2]).u16().ok(), Some(0x0102));
    }
}

//! A second opinion for the tests: a loader with QEMU's rules, and a composer of streams.
//!
//! Invariant: shares no code with the parser or the writer. The loader keeps exactly the state that
//! QEMU's keeps (the current region across sections, a page map), and panics at what QEMU refuses.
//! Other handlers' bodies are made up here: `u16` length and that many bytes of anything.

use std::collections::BTreeMap;

/// A region's name and its pages.
pub(super) const REGIONS: [(&str, u64); 3] = [("pc.ram", 64), ("pc.bios", 8), ("/rom@a", 2)];
pub(super) const MEMORY: u32 = 2;
/// A handler with live state of its own.
pub(super) const VFIO: u32 = 5;

/// What a stream left behind.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Loaded {
    /// First byte of each page that was ever written; pages of the tests are of one byte.
    pub(super) pages: BTreeMap<(u16, u64), u8>,
    /// Bodies of other handlers and commands, in order.
    pub(super) others: Vec<Vec<u8>>,
    pub(super) tail: Vec<u8>,
}

/// Something to compose a stream of.
#[derive(Debug, Clone)]
pub(super) enum Piece {
    /// A PART section of memory.
    Pages(Vec<(u16, u64, u8)>),
    /// A PART section of another handler.
    Other(Vec<u8>),
    /// A command without arguments.
    Command,
}

#[derive(Default)]
pub(super) struct Composer {
    pub(super) bytes: Vec<u8>,
    current: Option<u16>,
}

impl Composer {
    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    fn name(&mut self, name: &str) -> &mut Self {
        self.put(&[name.len() as u8]).put(name.as_bytes())
    }

    fn footer(&mut self, id: u32) -> &mut Self {
        self.put(&[0x7E]).put(&id.to_be_bytes())
    }

    fn pages(&mut self, kind: u8, records: &[(u16, u64, u8)]) {
        self.put(&[kind]).put(&MEMORY.to_be_bytes());
        for (region, page, fill) in records {
            let same = self.current == Some(*region);
            let flags = if *fill == 0 { 2 } else { 8 } | if same { 0x20 } else { 0 };
            self.put(&((page * 4096) | flags).to_be_bytes());
            if !same {
                self.name(REGIONS[usize::from(*region)].0);
            }
            if *fill == 0 {
                self.put(&[0])
            } else {
                self.put(&[*fill; 4096])
            };
            self.current = Some(*region);
        }
        self.put(&0x10u64.to_be_bytes()).footer(MEMORY);
    }

    fn other(&mut self, kind: u8, body: &[u8]) {
        self.put(&[kind]).put(&VFIO.to_be_bytes());
        if kind == 1 {
            self.name("0000:00:02.0/vfio").put(&[0; 4]).put(&1u32.to_be_bytes());
        }
        self.put(&(body.len() as u16).to_be_bytes()).put(body).footer(VFIO);
    }

    /// A whole stream as QEMU orders it.
    pub(super) fn stream(
        setup: &[u8],
        pieces: &[Piece],
        last: &[(u16, u64, u8)],
        tail: &[u8],
    ) -> Vec<u8> {
        let mut to = Self::default();
        to.put(b"QEVM").put(&3u32.to_be_bytes());
        to.put(&[7]).put(&10u32.to_be_bytes()).put(b"pc-q35-7.2");
        to.put(&[5]).name("configuration/uuid").put(&1u32.to_be_bytes()).put(&[0xAB; 16]);
        to.put(&[1]).put(&MEMORY.to_be_bytes()).name("ram");
        to.put(&0u32.to_be_bytes()).put(&4u32.to_be_bytes());
        let total: u64 = REGIONS.iter().map(|(_, pages)| pages * 4096).sum();
        to.put(&(total | 4).to_be_bytes());
        for (name, pages) in REGIONS {
            to.name(name).put(&(pages * 4096).to_be_bytes());
        }
        to.put(&0x10u64.to_be_bytes()).footer(MEMORY);
        to.other(1, setup);
        for piece in pieces {
            match piece {
                Piece::Pages(records) => to.pages(2, records),
                Piece::Other(body) => to.other(2, body),
                Piece::Command => {
                    to.put(&[8, 0, 11, 0, 0]);
                }
            }
        }
        to.pages(3, last);
        // After memory, as handlers that were registered later have it.
        to.other(3, b"other end");
        to.put(tail).put(&[0x7E, 0, 0, 0, 9, 0, 6]);
        let description = br#"{"page_size": 4096, "devices": []}"#;
        to.put(&(description.len() as u32).to_be_bytes()).put(description);
        to.bytes
    }
}

/// Loads a stream as QEMU would.
pub(super) fn load(stream: &[u8]) -> Loaded {
    let mut from = Loader { rest: stream, current: None, loaded: Loaded::default() };
    assert_eq!(from.take(8), b"QEVM\0\0\0\x03");
    assert_eq!(from.take(1), [7]);
    let name = from.be32();
    from.take(name as usize);
    let mut ended = false;
    while !ended {
        match from.take(1)[0] {
            5 => {
                let len = from.take(1)[0];
                from.take(usize::from(len) + 20);
            }
            8 => {
                let body = from.take(4).to_vec();
                from.loaded.others.push(body);
            }
            kind @ 1..=3 => {
                let id = from.be32();
                if kind == 1 {
                    let len = from.take(1)[0];
                    from.take(usize::from(len) + 8);
                }
                match id {
                    MEMORY => from.memory(),
                    VFIO => {
                        let len = u16::from_be_bytes(from.take(2).try_into().unwrap());
                        let body = from.take(usize::from(len)).to_vec();
                        from.loaded.others.push(body);
                    }
                    other => panic!("unknown section {other}"),
                }
                assert_eq!(from.take(1), [0x7E], "no footer of section {id}");
                assert_eq!(from.be32(), id);
                ended = kind == 3 && id == MEMORY && !from.another_end();
            }
            other => panic!("unknown element {other:#x}"),
        }
    }
    from.loaded.tail = from.rest.to_vec();
    from.loaded
}

struct Loader<'a> {
    rest: &'a [u8],
    current: Option<u16>,
    loaded: Loaded,
}

impl<'a> Loader<'a> {
    fn take(&mut self, len: usize) -> &'a [u8] {
        let (field, rest) = self.rest.split_at(len);
        self.rest = rest;
        field
    }

    fn be32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    /// Whether memory goes on after an END section, as it does after the parser gave up in one.
    fn another_end(&self) -> bool {
        self.rest.starts_with(&[3, 0, 0, 0, MEMORY as u8])
            || self.rest.starts_with(&[2, 0, 0, 0, MEMORY as u8])
    }

    fn memory(&mut self) {
        loop {
            let head = u64::from_be_bytes(self.take(8).try_into().unwrap());
            let (addr, flags) = (head & !0xFFF, head & 0xFFF);
            match flags {
                0x10 => return,
                4 => {
                    let mut left = addr;
                    while left > 0 {
                        let len = self.take(1)[0];
                        self.take(usize::from(len));
                        left -= u64::from_be_bytes(self.take(8).try_into().unwrap());
                    }
                }
                0x02 | 0x22 | 0x08 | 0x28 => {
                    if flags & 0x20 == 0 {
                        let len = self.take(1)[0];
                        let name = self.take(usize::from(len));
                        let index = REGIONS.iter().position(|(known, _)| known.as_bytes() == name);
                        self.current = Some(index.expect("a known region") as u16);
                    }
                    let region = self.current.expect("a record continues no region");
                    assert!(addr / 4096 < REGIONS[usize::from(region)].1, "beyond the region");
                    let fill = if flags & 8 != 0 {
                        let content = self.take(4096);
                        assert!(content.iter().all(|byte| *byte == content[0]));
                        content[0]
                    } else {
                        assert_eq!(self.take(1), [0]);
                        0
                    };
                    self.loaded.pages.insert((region, addr / 4096), fill);
                }
                other => panic!("flags {other:#x}"),
            }
        }
    }
}

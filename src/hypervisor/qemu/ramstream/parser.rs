//! QEMU's outgoing stream, taken apart into [`MemoryEvent`]s as its bytes arrive.
//!
//! Invariant: nothing is lost or invented. A writer that is given all events, in order, writes a
//! stream that leaves the same guest behind as the bytes that went in: page records are the only
//! bytes that are not kept verbatim, and the moment anything else is unclear, all that follows is.
//!
//! ```text
//! Head -> Config -> Element <-> Foreign     (other handlers' START: verbatim, to its footer)
//!                     |  ^
//!                     |  +---- Setup         (START of memory: verbatim, gives the layout)
//!                     v  |
//!                   Memory -> MemoryFooter   (PART: back to Element)
//!                                  |
//!                                  v
//!                                Tail        (END: device state, verbatim, to the end)
//! any doubt, anywhere -> Verbatim            (everything, verbatim, to the end)
//! ```
//!
//! # Why giving up in the middle is legal
//!
//! QEMU's loader keeps one thing from record to record that the stream does not spell out: the
//! region that a record without a name continues. The target's writer makes its own sections in its
//! own order, so its "current region" is not the source's. Before bytes are passed on verbatim, the
//! parser therefore repeats the last record that it read, with its region's name. That page was
//! written already with this very content, as all pages before were, so nothing changes but the
//! current region: raw records that follow continue the right one, and those that build on earlier
//! content (XBZRLE) find it.
//! - Between sections the repetition is a section of its own.
//! - Inside a section the writer has closed its own section (or has none open), so the section is
//!   begun anew with the header that the source gave it, then the repetition, then the raw rest,
//!   which brings the end of the section. The loader treats the END type like PART, and any number
//!   of either is legal.
//!
//! Both insert bytes, and a place for them must be certain. Sections of other handlers have no
//! length, so where one ends is a good guess only. Before the first page that does not matter: there
//! is nothing to insert. After it, another handler's section (a VFIO device sends such) is a reason
//! to give up before the section, not within it.

mod opening;

use std::collections::HashMap;

use bytes::Bytes;

use opening::Setup;

use super::doubt::{Doubt, StreamCut};
use super::ending::Ending;
use super::layout::Regions;
use super::wire::{self, Cursor, Stop};
use crate::hypervisor::{MemoryEvent, PAGE_BYTES};

/// Bytes in one [`MemoryEvent::Opaque`] at most.
pub const OPAQUE_BYTES_MAX: usize = 64 << 10;

/// Takes a stream apart. Holds back at most one token, never more than about 5 KiB.
#[derive(Debug)]
pub struct Parser {
    state: State,
    /// The beginning of a token whose end has not arrived.
    carry: Vec<u8>,
    /// Verbatim bytes not yet given out; empty between calls.
    opaque: Vec<u8>,
    /// Other handlers' sections and their names.
    others: HashMap<u32, String>,
    regions: Option<Regions>,
    /// The last record: its region is the one that the next may continue.
    last: Option<Record>,
    ending: Ending,
    bytes: u64,
    /// Tokens before the parser gives up by itself; see [`Self::give_up_after`].
    tokens_left: u64,
}

#[derive(Debug)]
struct Record {
    region: u16,
    page: u64,
    content: Option<Bytes>,
}

#[derive(Debug)]
enum State {
    Head,
    Config,
    ConfigSubsections,
    Element,
    Setup(Setup),
    Memory { kind: u8 },
    MemoryFooter { kind: u8 },
    Foreign { id: u32, left: usize },
    Tail,
    Verbatim,
}

impl Default for Parser {
    fn default() -> Self {
        Self::new()
    }
}

impl Parser {
    /// A parser at the first byte of a stream.
    pub fn new() -> Self {
        Self::give_up_after(u64::MAX)
    }

    /// A parser that stops understanding after so many tokens (a record, a header, a footer, ..).
    /// With 0 it relays the stream as it is; other numbers show that giving up is safe anywhere.
    pub fn give_up_after(tokens: u64) -> Self {
        Self {
            state: State::Head,
            carry: Vec::new(),
            opaque: Vec::new(),
            others: HashMap::new(),
            regions: None,
            last: None,
            ending: Ending::default(),
            bytes: 0,
            tokens_left: tokens,
        }
    }

    /// Takes the next bytes of the stream and appends what they say to `out`. How the stream is cut
    /// into calls changes nothing but where one [`MemoryEvent::Opaque`] ends and the next begins.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<MemoryEvent>) {
        self.bytes += bytes.len() as u64;
        if self.carry.is_empty() {
            let taken = self.run(bytes, out);
            self.carry.extend_from_slice(&bytes[taken..]);
        } else {
            let mut carry = std::mem::take(&mut self.carry);
            carry.extend_from_slice(bytes);
            let taken = self.run(&carry, out);
            carry.drain(..taken);
            self.carry = carry;
        }
        self.flush(out);
    }

    /// Ends the stream: an error unless it ended where its sender ended it.
    pub fn finish(self) -> Result<(), StreamCut> {
        let place = match self.state {
            State::Tail | State::Verbatim if self.ending.is_complete() => return Ok(()),
            State::Tail => "in the device state",
            State::Verbatim => "in a part that was passed through",
            State::Head | State::Config | State::ConfigSubsections => "in its head",
            _ => "before all memory was sent",
        };
        Err(StreamCut { place, bytes: self.bytes })
    }

    /// Takes as many whole tokens as there are; gives the bytes taken.
    fn run(&mut self, input: &[u8], out: &mut Vec<MemoryEvent>) -> usize {
        let mut at = 0;
        while at < input.len() {
            let rest = &input[at..];
            let bounded =
                !matches!(self.state, State::Foreign { .. } | State::Tail | State::Verbatim);
            if bounded && self.tokens_left == 0 {
                self.give_up(&Doubt::Told, out);
                continue;
            }
            match self.token(rest, out) {
                Ok(taken) => {
                    at += taken;
                    if bounded {
                        self.tokens_left -= 1;
                    }
                }
                Err(Stop::More) => break,
                Err(Stop::Doubt(doubt)) => self.give_up(&doubt, out),
            }
        }
        at
    }

    /// Takes one token, or none of it.
    fn token(&mut self, rest: &[u8], out: &mut Vec<MemoryEvent>) -> Result<usize, Stop> {
        match self.state {
            State::Memory { kind } => self.record(rest, kind, out),
            State::MemoryFooter { kind } => self.memory_footer(rest, kind, out),
            State::Element => self.element(rest, out),
            State::Foreign { id, left } => self.foreign(rest, id, left, out),
            State::Setup(_) => self.setup(rest, out),
            State::Head => self.head(rest, out),
            State::Config => self.config(rest, out),
            State::ConfigSubsections => self.config_subsection(rest, out),
            State::Tail | State::Verbatim => {
                self.ending.feed(rest);
                self.keep(rest, out);
                Ok(rest.len())
            }
        }
    }

    fn element(&mut self, rest: &[u8], out: &mut Vec<MemoryEvent>) -> Result<usize, Stop> {
        let mut token = Cursor::new(rest);
        match token.u8()? {
            kind @ (wire::PART | wire::END) => {
                let id = token.u32()?;
                if self.is_memory(id) {
                    if kind == wire::END {
                        self.flush(out);
                        out.push(MemoryEvent::LastPass);
                    }
                    self.state = State::Memory { kind };
                    return Ok(token.taken());
                }
                Err(match self.others.get(&id) {
                    Some(name) => Doubt::OtherPart(name.clone()).into(),
                    None => Doubt::UnknownSection(id).into(),
                })
            }
            kind @ (wire::START | wire::FULL) => {
                let id = token.u32()?;
                let name = token.name()?;
                let (instance, version) = (token.u32()?, token.u32()?);
                if kind == wire::START && name == wire::MEMORY_ID {
                    return self.memory_start(rest, token, (id, instance, version), out);
                }
                let next = self.start_other(id, name)?;
                self.take(rest, token, next, out)
            }
            wire::COMMAND => {
                let command = token.u16()?;
                // Any other one announces a format or a flow that is not ours (postcopy, COLO), or
                // is newer than this parser and may do so.
                let (wire::COMMAND_OPEN_RETURN_PATH
                | wire::COMMAND_PING
                | wire::COMMAND_SWITCHOVER_START) = command
                else {
                    return Err(Doubt::Command(command).into());
                };
                let len = token.u16()?;
                if len > 4 {
                    return Err(Doubt::Command(command).into());
                }
                token.bytes(usize::from(len))?;
                self.take(rest, token, State::Element, out)
            }
            wire::EOF => Err(Doubt::EarlyEnd.into()),
            other => Err(Doubt::Element(other).into()),
        }
    }

    fn record(&mut self, rest: &[u8], kind: u8, out: &mut Vec<MemoryEvent>) -> Result<usize, Stop> {
        let mut token = Cursor::new(rest);
        let head = token.u64()?;
        if head == wire::FLAG_EOS {
            self.state = State::MemoryFooter { kind };
            return Ok(token.taken());
        }
        let (flags, addr) = (head & wire::FLAG_BITS, head & !wire::FLAG_BITS);
        let has_content = match flags & !wire::FLAG_CONTINUE {
            wire::FLAG_PAGE => true,
            wire::FLAG_ZERO => false,
            _ => return Err(Doubt::Record(flags).into()),
        };
        let regions = self.regions.as_ref().expect("memory sections come after the layout");
        let region = if flags & wire::FLAG_CONTINUE != 0 {
            self.last.as_ref().ok_or(Doubt::NoRegion)?.region
        } else {
            let name = token.name()?;
            regions.by_name(name).ok_or_else(|| Doubt::UnknownRegion(text(name)))?
        };
        let page = addr >> wire::PAGE_BITS;
        if !regions.contains(region, page) {
            return Err(Doubt::OutsideRegion { region, addr }.into());
        }
        let content = if has_content {
            // An allocation of its own: a page may wait for long, and must not keep the whole
            // buffer alive that it was read into.
            Some(Bytes::copy_from_slice(token.bytes(PAGE_BYTES)?))
        } else {
            match token.u8()? {
                0 => None,
                other => return Err(Doubt::Fill(other).into()),
            }
        };
        self.flush(out);
        out.push(match &content {
            Some(content) => MemoryEvent::Page { region, page, content: content.clone() },
            None => MemoryEvent::Zero { region, page },
        });
        self.last = Some(Record { region, page, content });
        Ok(token.taken())
    }

    fn memory_footer(
        &mut self,
        rest: &[u8],
        kind: u8,
        out: &mut Vec<MemoryEvent>,
    ) -> Result<usize, Stop> {
        let mut token = Cursor::new(rest);
        if (token.u8()?, token.u32()?) != (wire::FOOTER, self.section_id()) {
            return Err(Doubt::NoFooter.into());
        }
        if kind == wire::END {
            self.flush(out);
            out.push(MemoryEvent::PagesDone);
            self.state = State::Tail;
        } else {
            self.state = State::Element;
        }
        Ok(token.taken())
    }

    /// Stops understanding: what has arrived and not been taken, and all that follows, is verbatim.
    fn give_up(&mut self, doubt: &Doubt, out: &mut Vec<MemoryEvent>) {
        self.flush(out);
        out.push(MemoryEvent::NotUnderstood { reason: doubt.to_string() });
        match self.state {
            State::Memory { kind } => self.reopen(kind),
            State::MemoryFooter { kind } => {
                self.reopen(kind);
                wire::put_eos(&mut self.opaque);
            }
            _ => self.repeat_between_sections(),
        }
        self.state = State::Verbatim;
    }

    /// Repeats the last record in a section of its own.
    fn repeat_between_sections(&mut self) {
        if self.last.is_none() {
            return;
        }
        let id = self.section_id();
        wire::put_section(&mut self.opaque, wire::PART, id);
        self.repeat_record();
        wire::put_eos(&mut self.opaque);
        wire::put_footer(&mut self.opaque, id);
    }

    /// Begins the section anew that is being read, and repeats the last record.
    fn reopen(&mut self, kind: u8) {
        let id = self.section_id();
        wire::put_section(&mut self.opaque, kind, id);
        self.repeat_record();
    }

    fn repeat_record(&mut self) {
        if let (Some(last), Some(regions)) = (&self.last, &self.regions) {
            let name = Some(regions.name(last.region));
            wire::put_record(&mut self.opaque, name, last.page, last.content.as_deref());
        }
    }

    fn is_memory(&self, id: u32) -> bool {
        self.regions.as_ref().is_some_and(|regions| regions.section_id() == id)
    }

    fn section_id(&self) -> u32 {
        self.regions.as_ref().expect("memory sections come after the layout").section_id()
    }

    /// Keeps a whole token verbatim and goes on in `next`.
    fn take(
        &mut self,
        rest: &[u8],
        token: Cursor<'_>,
        next: State,
        out: &mut Vec<MemoryEvent>,
    ) -> Result<usize, Stop> {
        self.state = next;
        self.keep(&rest[..token.taken()], out);
        Ok(token.taken())
    }

    fn keep(&mut self, bytes: &[u8], out: &mut Vec<MemoryEvent>) {
        for piece in bytes.chunks(OPAQUE_BYTES_MAX) {
            if self.opaque.len() + piece.len() > OPAQUE_BYTES_MAX {
                self.flush(out);
            }
            self.opaque.extend_from_slice(piece);
        }
    }

    fn flush(&mut self, out: &mut Vec<MemoryEvent>) {
        if !self.opaque.is_empty() {
            out.push(MemoryEvent::Opaque(Bytes::copy_from_slice(&self.opaque)));
            self.opaque.clear();
        }
    }
}

/// Bytes for a message, of which a peer may have chosen any.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

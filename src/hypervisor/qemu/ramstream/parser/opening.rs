//! What comes before the first page: the head, the configuration, and what handlers start with.
//!
//! Invariant: everything in here is verbatim and nothing is ever inserted, so a misjudgement costs
//! that later bytes are passed through, no more. The layout is given out only after the section that
//! announces it has ended as it should.

use super::{Parser, State, text};
use crate::hypervisor::qemu::ramstream::doubt::{Doubt, LayoutFault};
use crate::hypervisor::qemu::ramstream::layout::{REGIONS_MAX, Regions};
use crate::hypervisor::qemu::ramstream::wire::{self, Cursor, Stop};
use crate::hypervisor::{MemoryEvent, MemoryLayout, Region};

/// Sections of other handlers that may start. Only those with live state (VFIO, virtio-mem, bitmaps)
/// start before memory is sent; a machine has a few.
const SECTIONS_MAX: usize = 4096;

/// Bytes in the START of another handler: virtio-mem has one bit per 2 MiB of memory there.
const FOREIGN_BYTES_MAX: usize = 1 << 20;

/// The START section of memory while it is read.
#[derive(Debug)]
pub(super) struct Setup {
    id: u32,
    want: SetupToken,
    /// Bytes of regions that the total announces and the list has not had yet.
    left: u64,
    regions: Vec<Region>,
}

#[derive(Debug, Clone, Copy)]
enum SetupToken {
    Total,
    Region,
    Eos,
    Footer,
}

impl Parser {
    pub(super) fn head(&mut self, rest: &[u8], out: &mut Vec<MemoryEvent>) -> Result<usize, Stop> {
        let mut token = Cursor::new(rest);
        let (magic, version) = (token.u32()?, token.u32()?);
        if (magic, version) != (wire::MAGIC, wire::VERSION) {
            return Err(Doubt::Head { magic, version }.into());
        }
        self.take(rest, token, State::Config, out)
    }

    pub(super) fn config(
        &mut self,
        rest: &[u8],
        out: &mut Vec<MemoryEvent>,
    ) -> Result<usize, Stop> {
        let mut token = Cursor::new(rest);
        let kind = token.u8()?;
        if kind != wire::CONFIG {
            return Err(Doubt::NoConfig(kind).into());
        }
        let len = token.u32()?;
        if len > wire::MACHINE_NAME_MAX {
            return Err(Doubt::MachineName(len).into());
        }
        token.bytes(len as usize)?;
        self.take(rest, token, State::ConfigSubsections, out)
    }

    pub(super) fn config_subsection(
        &mut self,
        rest: &[u8],
        out: &mut Vec<MemoryEvent>,
    ) -> Result<usize, Stop> {
        let mut token = Cursor::new(rest);
        if token.u8()? != wire::SUBSECTION {
            self.state = State::Element;
            return Ok(0);
        }
        let name = token.name()?;
        let _version = token.u32()?;
        match name {
            b"configuration/target-page-bits" => {
                let bits = token.u32()?;
                if bits != wire::PAGE_BITS {
                    return Err(Doubt::PageBits(bits).into());
                }
            }
            b"configuration/uuid" => {
                token.bytes(16)?;
            }
            // `configuration/capabilities` is sent only with those that change the memory records.
            other => return Err(Doubt::ConfigSubsection(text(other)).into()),
        }
        self.take(rest, token, State::ConfigSubsections, out)
    }

    pub(super) fn start_other(&mut self, id: u32, name: &[u8]) -> Result<State, Doubt> {
        if self.is_memory(id) || self.others.contains_key(&id) {
            return Err(Doubt::SecondStart(id));
        }
        if self.last.is_some() {
            return Err(Doubt::LateStart(text(name)));
        }
        if self.others.len() == SECTIONS_MAX {
            return Err(Doubt::TooManySections(SECTIONS_MAX));
        }
        self.others.insert(id, text(name));
        Ok(State::Foreign { id, left: FOREIGN_BYTES_MAX })
    }

    pub(super) fn memory_start(
        &mut self,
        rest: &[u8],
        token: Cursor<'_>,
        (id, instance, version): (u32, u32, u32),
        out: &mut Vec<MemoryEvent>,
    ) -> Result<usize, Stop> {
        if self.regions.is_some() || self.others.contains_key(&id) {
            return Err(Doubt::SecondStart(id).into());
        }
        if (instance, version) != (wire::MEMORY_INSTANCE, wire::MEMORY_VERSION) {
            return Err(Doubt::MemoryVersion { instance, version }.into());
        }
        let setup = Setup { id, want: SetupToken::Total, left: 0, regions: Vec::new() };
        self.take(rest, token, State::Setup(setup), out)
    }

    pub(super) fn setup(&mut self, rest: &[u8], out: &mut Vec<MemoryEvent>) -> Result<usize, Stop> {
        let State::Setup(setup) = &mut self.state else {
            unreachable!("called in this state only")
        };
        let mut token = Cursor::new(rest);
        let fault = |fault| Stop::Doubt(Doubt::Layout(fault));
        match setup.want {
            SetupToken::Total => {
                let head = token.u64()?;
                if head & wire::FLAG_BITS != wire::FLAG_MEM_SIZE {
                    return Err(fault(LayoutFault::NoTotal(head & wire::FLAG_BITS)));
                }
                setup.left = head & !wire::FLAG_BITS;
                setup.want = if setup.left > 0 { SetupToken::Region } else { SetupToken::Eos };
            }
            SetupToken::Region => {
                let name = std::str::from_utf8(token.name()?);
                let name = name.map_err(|_| fault(LayoutFault::Name))?;
                let bytes = token.u64()?;
                let left =
                    setup.left.checked_sub(bytes).ok_or_else(|| fault(LayoutFault::Sizes))?;
                if setup.regions.len() == REGIONS_MAX {
                    return Err(fault(LayoutFault::TooMany(REGIONS_MAX)));
                }
                setup.regions.push(Region { name: name.to_owned(), bytes });
                setup.left = left;
                if left == 0 {
                    setup.want = SetupToken::Eos;
                }
            }
            SetupToken::Eos => {
                if token.u64()? != wire::FLAG_EOS {
                    return Err(fault(LayoutFault::NoEnd));
                }
                setup.want = SetupToken::Footer;
            }
            SetupToken::Footer => {
                if (token.u8()?, token.u32()?) != (wire::FOOTER, setup.id) {
                    return Err(Doubt::NoFooter.into());
                }
                let regions = std::mem::take(&mut setup.regions);
                let layout = MemoryLayout { section_id: setup.id, regions };
                self.regions = Some(Regions::check(&layout).map_err(fault)?);
                let taken = self.take(rest, token, State::Element, out)?;
                self.flush(out);
                out.push(MemoryEvent::Layout(layout));
                return Ok(taken);
            }
        }
        self.keep(&rest[..token.taken()], out);
        Ok(token.taken())
    }

    /// A body without a length: verbatim up to a footer after which the stream makes sense.
    pub(super) fn foreign(
        &mut self,
        rest: &[u8],
        id: u32,
        left: usize,
        out: &mut Vec<MemoryEvent>,
    ) -> Result<usize, Stop> {
        if left == 0 {
            return Err(Doubt::Endless(self.others.get(&id).cloned().unwrap_or_default()).into());
        }
        let [a, b, c, d] = id.to_be_bytes();
        let footer = [wire::FOOTER, a, b, c, d];
        let found = rest.iter().take(left).enumerate().find_map(|(at, byte)| {
            let tail = &rest[at..];
            (*byte == wire::FOOTER && footer.starts_with(&tail[..tail.len().min(5)])).then_some(at)
        });
        let taken = match found.map(|at| (at, rest.get(at + 5..))) {
            None => rest.len().min(left),
            Some((at, after)) => {
                match after.map_or(Err(Stop::More), |after| self.is_element(after)) {
                    Ok(()) => {
                        self.keep(&rest[..at + 5], out);
                        self.state = State::Element;
                        return Ok(at + 5);
                    }
                    Err(Stop::Doubt(_)) => at + 1,
                    Err(Stop::More) if at == 0 => return Err(Stop::More),
                    Err(Stop::More) => at,
                }
            }
        };
        self.keep(&rest[..taken], out);
        self.state = State::Foreign { id, left: left - taken };
        Ok(taken)
    }

    /// Whether an element that is legal here begins `after`.
    fn is_element(&self, after: &[u8]) -> Result<(), Stop> {
        let mut token = Cursor::new(after);
        let kind = token.u8()?;
        match kind {
            wire::PART | wire::END => {
                let id = token.u32()?;
                if self.is_memory(id) {
                    let head = token.u64()?;
                    let flags = head & wire::FLAG_BITS & !wire::FLAG_CONTINUE;
                    let is_record = flags == wire::FLAG_PAGE || flags == wire::FLAG_ZERO;
                    if !is_record && head != wire::FLAG_EOS {
                        return Err(Doubt::Record(flags).into());
                    }
                } else if !self.others.contains_key(&id) {
                    return Err(Doubt::UnknownSection(id).into());
                }
            }
            wire::START | wire::FULL => {
                let id = token.u32()?;
                let name = token.name()?;
                let printable = name.iter().all(|byte| (b' '..=b'~').contains(byte));
                if self.others.contains_key(&id) || name.is_empty() || !printable {
                    return Err(Doubt::SecondStart(id).into());
                }
            }
            wire::COMMAND => {
                let (command, len) = (token.u16()?, token.u16()?);
                if !(1..=wire::COMMAND_SWITCHOVER_START).contains(&command) || len > 4 {
                    return Err(Doubt::Command(command).into());
                }
            }
            other => return Err(Doubt::Element(other).into()),
        }
        Ok(())
    }
}

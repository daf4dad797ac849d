//! Writes a stream that QEMU loads, from [`MemoryEvent`]s of a source that need not be trusted.
//!
//! Invariant: what has been written is at every moment the beginning of a legal stream. Pages only
//! ever stand in memory sections, inside the announced regions; everything else goes out verbatim and
//! only between sections.
//!
//! ```text
//! Head --Layout--> Passes --LastPass--> LastPass --PagesDone--> Tail
//!   |                 |                    |                      ^
//!   +-----------------+---NotUnderstood----+----------------------+
//! ```
//!
//! Pages before the last pass go into PART sections that end with the call they came in, so that
//! between calls no section is open and anything may follow. The last pass is one END section, open
//! from [`MemoryEvent::LastPass`] to [`MemoryEvent::PagesDone`], empty or not. The loader takes
//! pages in any order, the last version of each wins.

use super::doubt::{StreamCut, WriteError};
use super::ending::Ending;
use super::layout::Regions;
use super::wire;
use crate::hypervisor::{MemoryEvent, PAGE_BYTES};

/// Records in one PART section at most: 16 MiB, so that the loader comes by its event loop.
pub const SECTION_RECORDS_MAX: u32 = 4096;

/// Writes one stream.
#[derive(Debug)]
pub struct Writer {
    stage: Stage,
    regions: Option<Regions>,
    ending: Ending,
    bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Head,
    Passes,
    /// The END section is open; the region of its last record.
    LastPass {
        current: Option<u16>,
    },
    Tail,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Head => "before its layout",
            Self::Passes => "between its layout and the last pass",
            Self::LastPass { .. } => "within the last pass",
            Self::Tail => "after its pages",
        }
    }
}

/// A PART section that is open: the region of its last record, and how many it has.
#[derive(Default)]
struct Part {
    current: Option<u16>,
    records: u32,
}

impl Default for Writer {
    fn default() -> Self {
        Self::new()
    }
}

impl Writer {
    /// A writer at the beginning of a stream.
    pub fn new() -> Self {
        Self { stage: Stage::Head, regions: None, ending: Ending::default(), bytes: 0 }
    }

    /// Appends the bytes of these events to `out`. After an error the stream is void: what was
    /// appended must not be sent, and nothing more can be.
    pub fn encode(&mut self, events: &[MemoryEvent], out: &mut Vec<u8>) -> Result<(), WriteError> {
        let before = out.len();
        let mut part = None;
        for event in events {
            self.event(event, &mut part, out)?;
        }
        self.close_part(&mut part, out);
        self.bytes += (out.len() - before) as u64;
        Ok(())
    }

    /// Ends the stream: an error unless all of it was written, up to its own end mark.
    pub fn finish(self) -> Result<(), WriteError> {
        if self.stage == Stage::Tail && self.ending.is_complete() {
            return Ok(());
        }
        Err(StreamCut { place: self.stage.name(), bytes: self.bytes }.into())
    }

    fn event(
        &mut self,
        event: &MemoryEvent,
        part: &mut Option<Part>,
        out: &mut Vec<u8>,
    ) -> Result<(), WriteError> {
        match (event, self.stage) {
            (
                MemoryEvent::Page { region, page, content },
                Stage::Passes | Stage::LastPass { .. },
            ) => {
                if content.len() != PAGE_BYTES {
                    let (region, page, bytes) = (*region, *page, content.len());
                    return Err(WriteError::PageBytes { region, page, bytes });
                }
                self.record(*region, *page, Some(content), part, out)
            }
            (MemoryEvent::Zero { region, page }, Stage::Passes | Stage::LastPass { .. }) => {
                self.record(*region, *page, None, part, out)
            }
            (MemoryEvent::Opaque(bytes), Stage::Head | Stage::Passes | Stage::Tail) => {
                self.close_part(part, out);
                if self.stage == Stage::Tail {
                    self.ending.feed(bytes);
                }
                out.extend_from_slice(bytes);
                Ok(())
            }
            (MemoryEvent::Layout(layout), Stage::Head) => {
                self.regions = Some(Regions::check(layout).map_err(WriteError::Layout)?);
                self.stage = Stage::Passes;
                Ok(())
            }
            (MemoryEvent::LastPass, Stage::Passes) => {
                self.close_part(part, out);
                wire::put_section(out, wire::END, self.section_id());
                self.stage = Stage::LastPass { current: None };
                Ok(())
            }
            (MemoryEvent::PagesDone, Stage::LastPass { .. }) => {
                self.close_section(out);
                self.stage = Stage::Tail;
                Ok(())
            }
            (MemoryEvent::NotUnderstood { .. }, Stage::Head | Stage::Passes) => {
                self.close_part(part, out);
                self.stage = Stage::Tail;
                Ok(())
            }
            (MemoryEvent::NotUnderstood { .. }, Stage::LastPass { .. }) => {
                self.close_section(out);
                self.stage = Stage::Tail;
                Ok(())
            }
            (event, stage) => {
                Err(WriteError::OutOfOrder { event: event_name(event), stage: stage.name() })
            }
        }
    }

    fn record(
        &mut self,
        region: u16,
        page: u64,
        content: Option<&[u8]>,
        part: &mut Option<Part>,
        out: &mut Vec<u8>,
    ) -> Result<(), WriteError> {
        let regions = self.regions.as_ref().expect("pages are taken only after the layout");
        if !regions.contains(region, page) {
            return Err(WriteError::OutsideLayout { region, page });
        }
        let current = if let Stage::LastPass { current } = &mut self.stage {
            current
        } else {
            if part.as_ref().is_some_and(|part| part.records == SECTION_RECORDS_MAX) {
                *part = None;
                wire::put_eos(out);
                wire::put_footer(out, regions.section_id());
            }
            let part = part.get_or_insert_with(|| {
                wire::put_section(out, wire::PART, regions.section_id());
                Part::default()
            });
            part.records += 1;
            &mut part.current
        };
        let name = (*current != Some(region)).then(|| regions.name(region));
        wire::put_record(out, name, page, content);
        *current = Some(region);
        Ok(())
    }

    fn close_part(&mut self, part: &mut Option<Part>, out: &mut Vec<u8>) {
        if part.take().is_some() {
            self.close_section(out);
        }
    }

    fn close_section(&mut self, out: &mut Vec<u8>) {
        wire::put_eos(out);
        wire::put_footer(out, self.section_id());
    }

    fn section_id(&self) -> u32 {
        self.regions.as_ref().expect("sections are written only after the layout").section_id()
    }
}

fn event_name(event: &MemoryEvent) -> &'static str {
    match event {
        MemoryEvent::Layout(_) => "a layout",
        MemoryEvent::Opaque(_) => "bytes that are not pages",
        MemoryEvent::Zero { .. } | MemoryEvent::Page { .. } => "a page",
        MemoryEvent::LastPass => "a beginning of the last pass",
        MemoryEvent::PagesDone => "an end of all pages",
        MemoryEvent::NotUnderstood { .. } => "a part that is not understood",
    }
}

//! What can be wrong with a stream or with events, in words for the operator.
//!
//! Invariant: a [`Doubt`] never loses anything (the stream goes on verbatim); a [`WriteError`] or a
//! [`StreamCut`] ends the migration attempt.

/// Something in the stream that the parser does not know: from there on it passes bytes through.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Doubt {
    /// The first bytes are not a migration stream's.
    #[error("the stream begins with magic {magic:#010x} version {version}")]
    Head {
        /// First word.
        magic: u32,
        /// Second word.
        version: u32,
    },
    /// No configuration section follows the head: a machine type of before 2.4.
    #[error("byte {0:#04x} stands where the configuration section is expected")]
    NoConfig(u8),
    /// The machine type's name is longer than any.
    #[error("the machine type's name is said to have {0} bytes")]
    MachineName(u32),
    /// A part of the configuration that changes the stream's format, or that we do not know.
    #[error("the configuration has a subsection {0:?}")]
    ConfigSubsection(String),
    /// The guest's pages are not 4096 bytes.
    #[error("the guest's pages have 2^{0} bytes")]
    PageBits(u32),
    /// A command that changes what follows, or that we do not know.
    #[error("the stream has command {0}")]
    Command(u16),
    /// A byte that begins no element.
    #[error("byte {0:#04x} begins no element of the stream")]
    Element(u8),
    /// The stream ends before memory was sent.
    #[error("the stream ends before the last pass over memory")]
    EarlyEnd,
    /// A section that no start announced.
    #[error("section {0} was never started")]
    UnknownSection(u32),
    /// Another handler sends state between the passes over memory: where it ends cannot be told.
    #[error("{0} sends live state beside memory")]
    OtherPart(String),
    /// The end of another handler's start was not found.
    #[error("the end of what {0} starts with cannot be found")]
    Endless(String),
    /// Another handler starts after memory was begun.
    #[error("{0} starts after the first pages")]
    LateStart(String),
    /// Two sections have one id, or memory starts twice.
    #[error("section {0} starts twice")]
    SecondStart(u32),
    /// More sections than any machine has.
    #[error("the stream has more than {0} sections before the last pass")]
    TooManySections(usize),
    /// The memory handler is not the one we know.
    #[error("memory has instance {instance} version {version}")]
    MemoryVersion {
        /// Its instance.
        instance: u32,
        /// Its version.
        version: u32,
    },
    /// The list of regions does not begin, add up or end as it should.
    #[error("the list of memory regions is not as expected: {0}")]
    Layout(LayoutFault),
    /// A record of a kind that we do not read (XBZRLE, compressed, multifd) or not in this place.
    #[error("a memory record has flags {0:#05x}")]
    Record(u64),
    /// A record that continues the region of none before it.
    #[error("the first memory record names no region")]
    NoRegion,
    /// A record of a region that is not in the list.
    #[error("a memory record is of region {0:?}, which was not announced")]
    UnknownRegion(String),
    /// A record outside its region.
    #[error("a memory record is at byte {addr:#x} of region {region}, beyond its end")]
    OutsideRegion {
        /// Index of the region.
        region: u16,
        /// Byte offset.
        addr: u64,
    },
    /// A page of equal bytes that are not zeros: not written by any QEMU that we know.
    #[error("a memory record fills a page with {0:#04x}")]
    Fill(u8),
    /// A section of memory is not ended by its footer.
    #[error("a section of memory has no footer")]
    NoFooter,
    /// The parser was told to stop here.
    #[error("the parser was told to stop here")]
    Told,
}

/// What is wrong with a list of regions.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutFault {
    /// It does not begin with the total size.
    #[error("flags {0:#05x} instead of the total size")]
    NoTotal(u64),
    /// A region's name is empty, longer than 255 bytes or not text.
    #[error("a region has no usable name")]
    Name,
    /// Two regions have one name.
    #[error("region {0:?} is there twice")]
    Twice(String),
    /// There are more than any machine has.
    #[error("there are more than {0} regions")]
    TooMany(usize),
    /// The sizes do not add up to the total, or to more than 2^63 bytes.
    #[error("the regions' sizes do not add up")]
    Sizes,
    /// Something follows the list.
    #[error("the list is not followed by its end")]
    NoEnd,
}

/// A stream that ended before its end: whatever was read of it must never run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the memory stream was cut off {place} after {bytes} bytes: the attempt is void, start again"
)]
pub struct StreamCut {
    /// Where, in words.
    pub place: &'static str,
    /// Bytes that had come.
    pub bytes: u64,
}

/// Events from which no legal stream can be written; the stream written so far is void.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// An event that cannot come now.
    #[error("the memory stream has {event} {stage}")]
    OutOfOrder {
        /// The event.
        event: &'static str,
        /// Where the stream was.
        stage: &'static str,
    },
    /// The announced regions are not acceptable.
    #[error("the memory layout is refused: {0}")]
    Layout(LayoutFault),
    /// A page of a region that was not announced, or beyond its region's end.
    #[error("page {page} of region {region} is outside the memory layout")]
    OutsideLayout {
        /// Index of the region.
        region: u16,
        /// Page number.
        page: u64,
    },
    /// A page of another size than pages have.
    #[error("page {page} of region {region} has {bytes} bytes instead of 4096")]
    PageBytes {
        /// Index of the region.
        region: u16,
        /// Page number.
        page: u64,
        /// What it has.
        bytes: usize,
    },
    /// The events ended before the stream did.
    #[error(transparent)]
    Unfinished(#[from] StreamCut),
}

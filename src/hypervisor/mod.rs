//! What a migration asks of a hypervisor, in the hypervisor's own terms but nobody's dialect.
//!
//! `migration` knows these traits only; [`qemu`] is the first to answer them. Every call returns what
//! the hypervisor was observed to do, not what it was told to do. Nothing in here decides anything:
//! when to pause, when to go on and who may run are the caller's.

pub mod qemu;
pub mod spec;

use std::path::{Path, PathBuf};
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;

pub use spec::VmSpec;

/// Bytes in a page of guest memory on every architecture that Longhaul knows.
pub const PAGE_BYTES: usize = 4096;

/// A failure at the hypervisor's side, in a sentence that an operator can act upon.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// The hypervisor process is gone or does not answer.
    #[error("{vm}: the hypervisor does not answer: {detail}")]
    Gone {
        /// The VM's name.
        vm: String,
        /// What was tried and how it failed.
        detail: String,
    },
    /// The hypervisor answered with an error of its own.
    #[error("{vm}: {command} was refused: {detail}")]
    Refused {
        /// The VM's name.
        vm: String,
        /// What it was asked to do.
        command: String,
        /// The hypervisor's own words.
        detail: String,
    },
    /// The hypervisor's answer or stream makes no sense to us.
    #[error("{vm}: unexpected answer from the hypervisor: {detail}")]
    Unexpected {
        /// The VM's name.
        vm: String,
        /// What was unexpected.
        detail: String,
    },
    /// Something around the hypervisor failed: a file, a socket, a process.
    #[error("{doing}")]
    Io {
        /// What was being done, to which VM or file.
        doing: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The VM cannot be described, started or moved as it is; the text says why.
    #[error("{vm}: {reason}")]
    Unsupported {
        /// The VM's name.
        vm: String,
        /// Why, and what to change.
        reason: String,
    },
}

/// Why an arrived VM does not run, and what that leaves open.
#[derive(Debug, thiserror::Error)]
pub enum NotRunning {
    /// Its CPUs never ran: the hypervisor was not told, or has refused.
    #[error(transparent)]
    NeverDid(HypervisorError),
    /// They may have run for a time: it was told, and was not seen to run.
    #[error(transparent)]
    MayHave(HypervisorError),
}

impl NotRunning {
    /// The cause.
    pub fn into_error(self) -> HypervisorError {
        match self {
            Self::NeverDid(error) | Self::MayHave(error) => error,
        }
    }
}

/// Whether the guest's CPUs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// The guest runs.
    Running,
    /// Its owner paused it.
    Paused,
    /// Stopped, its state sent elsewhere: only a deliberate rollback makes it run again.
    Parked,
    /// It waits for incoming state, or holds it and was never started.
    Incoming,
    /// It shut down, crashed or stopped on an I/O error: the hypervisor's word for it.
    Stopped,
}

/// A stretch of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// Reads as zeros and need not be read; a hole or a zeroed stretch.
    pub zero: bool,
}

/// One disk of a VM as its guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskInfo {
    /// The disk's id in the [`VmSpec`].
    pub id: String,
    /// Size that the guest sees, in bytes.
    pub bytes: u64,
}

/// Read access to one disk, or to what was written to it in one round.
///
/// The set of extents is fixed when the view is made. Reads of a running guest's disk may be newer
/// than the view or torn: whatever is written after the view was made is in the next one.
#[async_trait]
pub trait DiskView: Send + Sync {
    /// Which disk.
    fn info(&self) -> &DiskInfo;
    /// What the view covers, ascending and without overlap. A full view covers the whole disk; a
    /// delta only what was written. Holes come with `zero` set.
    async fn extents(&self) -> Result<Vec<Extent>, HypervisorError>;
    /// Reads `len` bytes (at most 4 MiB) at `offset`. Concurrent calls are pipelined.
    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, HypervisorError>;
    /// Ends the view, whose content has arrived, and frees what it holds at the hypervisor. A delta
    /// that is dropped instead is part of the next one, also after a restart; a full view that is
    /// dropped instead ends the tracking.
    async fn close(self: Box<Self>) -> Result<(), HypervisorError>;
}

/// What the hypervisor reports while memory moves.
#[derive(Debug, Clone, Default)]
pub struct MemoryProgress {
    /// Bytes of memory that it still has to hand to us, by its own count.
    pub remaining_bytes: u64,
    /// Pages dirtied a second, by its own count; 0 if unknown.
    pub dirty_pages_per_s: u64,
    /// Passes over memory so far.
    pub passes: u64,
    /// It has paused the guest for the switchover, allowed to or not: the guest stands still until
    /// the switchover is done or rolled back.
    pub paused: bool,
}

/// A region of guest memory, named by the hypervisor (`pc.ram`, `vga.vram`, ..).
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Region {
    /// The hypervisor's name, opaque to us, at most 255 bytes.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// How the memory stream names itself, so that the target can write an equal one.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MemoryLayout {
    /// The memory section's id in this stream.
    pub section_id: u32,
    /// Regions in stream order; their index is a page's `region`.
    pub regions: Vec<Region>,
}

/// One thing that the hypervisor's memory stream says, in stream order.
///
/// `Opaque` bytes keep their order among everything else; pages may be reordered among pages as
/// long as the last version of each one wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemoryEvent {
    /// The regions; precedes every page. Its bytes come in an `Opaque` event of their own.
    Layout(MemoryLayout),
    /// Bytes that are not pages: the target's stream has them verbatim.
    Opaque(Bytes),
    /// A page of zeros.
    Zero {
        /// Index into [`MemoryLayout::regions`].
        region: u16,
        /// Page number within the region.
        page: u64,
    },
    /// A page with content.
    Page {
        /// Index into [`MemoryLayout::regions`].
        region: u16,
        /// Page number within the region.
        page: u64,
        /// Exactly [`PAGE_BYTES`] bytes. It may wait for long: an allocation of its own, lest it
        /// keep a whole read buffer alive.
        content: Bytes,
    },
    /// The last pass began: the guest is paused and every page from here on is final.
    LastPass,
    /// All pages were seen; only `Opaque` events (device state) follow.
    PagesDone,
    /// The stream is not understood from here on: the rest comes as `Opaque`, up to its end. All
    /// pages before it must have been written before the bytes after it.
    NotUnderstood {
        /// What the parser met.
        reason: String,
    },
}

/// A running (or paused) VM that may leave this host.
///
/// The order of calls is: [`check`](Self::check), [`disk_full`](Self::disk_full), any number of
/// [`disk_delta`](Self::disk_delta), [`start_memory`](Self::start_memory) (while deltas go on),
/// [`allow_switchover`](Self::allow_switchover), [`wait_paused`](Self::wait_paused), one last
/// delta, [`finish_memory`](Self::finish_memory), [`wait_parked`](Self::wait_parked), then either
/// [`destroy`](Self::destroy) or [`rollback`](Self::rollback). `rollback` is legal at any point and
/// `cleanup` must end every path.
#[async_trait]
pub trait SourceVm: Send + Sync {
    /// The description of this VM.
    fn spec(&self) -> &VmSpec;
    /// Reasons why this VM cannot move now; empty if it can.
    async fn check(&self) -> Result<Vec<String>, HypervisorError>;
    /// Whether its CPUs run.
    async fn run_state(&self) -> Result<RunState, HypervisorError>;
    /// Its disks, in the order of the description.
    async fn disks(&self) -> Result<Vec<DiskInfo>, HypervisorError>;
    /// Where each disk's image lies, if it is a file in a pool of this host's: the place beside it is
    /// ours to write to.
    fn images(&self) -> Vec<Option<PathBuf>>;
    /// Starts to track writes to every disk (anew if it did already) and then gives a full view of
    /// each, in the order of [`disks`](Self::disks).
    async fn disk_full(&self) -> Result<Vec<Box<dyn DiskView>>, HypervisorError>;
    /// Whether writes have been tracked without a gap since `disk_full` or the last delta.
    async fn is_tracking(&self) -> Result<bool, HypervisorError>;
    /// Views of what was written since `disk_full` or the last `disk_delta`, for every disk, and
    /// the start of the next such period, in one atomic step over all disks.
    async fn disk_delta(&self) -> Result<Vec<Box<dyn DiskView>>, HypervisorError>;
    /// Bytes that the next `disk_delta` would cover now.
    async fn disk_delta_bytes(&self) -> Result<u64, HypervisorError>;
    /// Starts to send memory; pages follow in the source that is returned. The VM runs on, and is
    /// not paused before [`allow_switchover`](Self::allow_switchover), unless the stream is read so
    /// fast and the guest writes so little that the hypervisor has nothing left to send.
    async fn start_memory(&self) -> Result<Box<dyn MemorySource>, HypervisorError>;
    /// What an operator should know of how memory moves, once it is started; none as a rule.
    async fn memory_note(&self) -> Option<String>;
    /// What the hypervisor says of the memory pass.
    async fn memory_progress(&self) -> Result<MemoryProgress, HypervisorError>;
    /// Limits how fast the hypervisor hands us memory.
    async fn set_memory_rate(&self, bytes_per_s: u64) -> Result<(), HypervisorError>;
    /// Lets the hypervisor pause the VM as soon as it can.
    async fn allow_switchover(&self) -> Result<(), HypervisorError>;
    /// Returns once the VM is paused by the switchover and its disks can no longer change; gives the
    /// instant at which it last stopped, which is long ago if its owner paused it.
    async fn wait_paused(&self) -> Result<Instant, HypervisorError>;
    /// Lets the hypervisor send the last pages and the device state. The memory source must be read
    /// all the while, and from its last pass on at full speed until it ends.
    async fn finish_memory(&self) -> Result<(), HypervisorError>;
    /// Returns once the hypervisor has sent everything and is parked: it never resumes by itself.
    async fn wait_parked(&self) -> Result<(), HypervisorError>;
    /// Gives the guest back to its owner as it was before the migration: running if it `ran`, else
    /// paused. Legal at any point; returns once that is observed.
    async fn rollback(&self, ran: bool) -> Result<(), HypervisorError>;
    /// Ends the parked VM's process: it runs elsewhere now. Its disks stay.
    async fn destroy(&self) -> Result<(), HypervisorError>;
    /// Removes everything of ours from the hypervisor (exports, servers that we started, sockets),
    /// and write tracking too unless `keep_tracking`. Idempotent; what is its owner's stays.
    async fn cleanup(&self, keep_tracking: bool) -> Result<(), HypervisorError>;
}

/// The memory stream at its source.
#[async_trait]
pub trait MemorySource: Send {
    /// Appends the next events to `events`: at least one, unless the stream ended (then `false`).
    /// Not calling this is how the hypervisor is slowed down.
    async fn next(&mut self, events: &mut Vec<MemoryEvent>) -> Result<bool, HypervisorError>;
    /// Bytes read from the hypervisor so far.
    fn bytes_read(&self) -> u64;
}

/// A VM that is arriving at this host, started but not running.
#[async_trait]
pub trait TargetVm: Send + Sync {
    /// Opens the memory stream into the hypervisor.
    async fn open_memory(&self) -> Result<Box<dyn MemorySink>, HypervisorError>;
    /// Returns once the hypervisor has accepted the whole state; on failure, with its own words.
    async fn wait_loaded(&self) -> Result<(), HypervisorError>;
    /// The one call that makes an arrived VM run. Only the hand-over's `run` effect may call it.
    /// Returns once the guest was observed to run, after it has announced itself on its networks.
    async fn run(&self) -> Result<(), NotRunning>;
    /// Whether its CPUs run.
    async fn run_state(&self) -> Result<RunState, HypervisorError>;
    /// Ends the process; the disks stay.
    async fn destroy(&self) -> Result<(), HypervisorError>;
}

/// The memory stream at its target.
#[async_trait]
pub trait MemorySink: Send {
    /// Writes events to the hypervisor, in order. Pages are grouped into legal sections.
    async fn apply(&mut self, events: Vec<MemoryEvent>) -> Result<(), HypervisorError>;
    /// Ends the stream.
    async fn finish(self: Box<Self>) -> Result<(), HypervisorError>;
}

/// Random access to a disk image on this host that no hypervisor runs.
#[async_trait]
pub trait DiskImage: Send + Sync {
    /// Size that a guest would see, in bytes.
    fn bytes(&self) -> u64;
    /// Reads `len` bytes (at most 4 MiB); holes read as zeros.
    async fn read(&self, offset: u64, len: u32) -> Result<Bytes, HypervisorError>;
    /// Writes `data` (at most 4 MiB).
    async fn write(&self, offset: u64, data: Bytes) -> Result<(), HypervisorError>;
    /// Makes a stretch read as zeros, as a hole where the image can have one.
    async fn zero(&self, offset: u64, len: u64) -> Result<(), HypervisorError>;
    /// Extents that hold data or zeros, ascending; covers the whole image.
    async fn extents(&self) -> Result<Vec<Extent>, HypervisorError>;
    /// Returns once everything written is durable.
    async fn flush(&self) -> Result<(), HypervisorError>;
    /// Flushes and gives the image up: another process may open it.
    async fn close(self: Box<Self>) -> Result<(), HypervisorError>;
}

/// An image file of this host's, by a path that this host's operator allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFile {
    /// Where it lies.
    pub path: PathBuf,
    /// How it is encoded.
    pub format: spec::ImageFormat,
}

/// A disk on its way to this host.
pub struct IncomingDisk {
    /// Access to the image, which has the right size.
    pub image: Box<dyn DiskImage>,
    /// Where it lies; beside it lies the record of what was written to it.
    pub path: PathBuf,
    /// How it is encoded.
    pub format: spec::ImageFormat,
    /// Whether it was made just now and holds nothing but zeros.
    pub fresh: bool,
    /// The image that it is until it is first written to: until then nothing lies at `path`.
    pub begins_as: Option<PathBuf>,
}

impl IncomingDisk {
    /// The image, if a byte of it is a byte of the disk.
    pub fn raw(&self) -> Option<PathBuf> {
        (self.format == spec::ImageFormat::Raw).then(|| self.path.clone())
    }
}

/// This host, as one that VMs leave and arrive at.
#[async_trait]
pub trait Host: Send + Sync {
    /// A VM of this host.
    async fn source(&self, vm: &str) -> Result<std::sync::Arc<dyn SourceVm>, HypervisorError>;
    /// Whether this host has such a VM, running or not.
    fn knows(&self, vm: &str) -> bool;
    /// Whether a VM of this host has a hypervisor process, whatever that is doing; false if this
    /// host has no such VM.
    async fn runs(&self, vm: &str) -> bool;
    /// The VM runs elsewhere now: it is no longer one of this host's. Its images stay.
    async fn departed(&self, vm: &str) -> Result<(), HypervisorError>;
    /// Why this host cannot take a VM, each reason in a sentence; empty if it can. The description
    /// is a peer's and is believed in nothing.
    async fn refusals(
        &self,
        vm: &VmSpec,
        disks: &[DiskInfo],
    ) -> Result<Vec<String>, HypervisorError>;
    /// Opens the images of an arriving VM, or makes them; in the order of `disks`. They are not
    /// mistaken for complete ones by anybody until [`settle`](Self::settle).
    async fn incoming_disks(
        &self,
        vm: &VmSpec,
        disks: &[DiskInfo],
    ) -> Result<Vec<IncomingDisk>, HypervisorError>;
    /// Images here that may hold what is about to arrive.
    async fn known_images(&self) -> Result<Vec<ImageFile>, HypervisorError>;
    /// An image that nobody runs, whole; its format goes by its name.
    async fn image(&self, path: &Path) -> Result<Box<dyn DiskView>, HypervisorError>;
    /// Opens what there is of an image of `bytes` bytes that arrives without a VM, or begins it. The
    /// place is a peer's word and is believed in nothing. What lies under its name stays as it is
    /// until [`settle_image`](Self::settle_image), and refuses this unless it may be replaced.
    async fn incoming_image(
        &self,
        place: &spec::ImageLocation,
        bytes: u64,
        replace: bool,
    ) -> Result<IncomingDisk, HypervisorError>;
    /// Gives an image that is complete and closed its name, in one step; returns where it lies.
    async fn settle_image(
        &self,
        place: &spec::ImageLocation,
        replace: bool,
    ) -> Result<PathBuf, HypervisorError>;
    /// Starts a hypervisor that waits for the VM's memory, on the images of `incoming_disks`.
    async fn prepare(&self, vm: &VmSpec) -> Result<std::sync::Arc<dyn TargetVm>, HypervisorError>;
    /// A hypervisor that an earlier life of this agent prepared, if it still lives.
    async fn prepared(
        &self,
        vm: &str,
    ) -> Result<Option<std::sync::Arc<dyn TargetVm>>, HypervisorError>;
    /// The VM has arrived for good: it is one of this host's, its images are complete.
    async fn settle(&self, vm: &VmSpec) -> Result<(), HypervisorError>;
    /// A VM that departed is one of this host's again; it does not run.
    async fn reclaim(&self, vm: &str) -> Result<(), HypervisorError>;
    /// Stops the CPUs of a VM of this host's, or of one that has arrived and is not in the book yet;
    /// returns once that is observed, or if it has no hypervisor process.
    async fn pause(&self, vm: &str) -> Result<(), HypervisorError>;
}

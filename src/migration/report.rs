//! What is said about a migration: while it runs (`Progress`) and when it ended (`Completed`).
//!
//! Invariant: these types hold numbers that were measured, never a clock; who measures passes them
//! in. They are the JSON that `--json` prints, so a field is added, never renamed.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The phases of a migration, in their order. One spelling everywhere: logs, journal, command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The disk goes ahead of time while the VM runs.
    Seed,
    /// What the guest wrote since, in rounds.
    Sync,
    /// Memory while the VM runs.
    PreCopy,
    /// Pause, the rest, the hand-over, run.
    Switchover,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Seed => "seed",
            Self::Sync => "sync",
            Self::PreCopy => "pre-copy",
            Self::Switchover => "switchover",
        })
    }
}

/// A moment of a running seed or migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The VM.
    pub vm: String,
    /// The peer's name at this host.
    pub peer: String,
    /// Where it is.
    pub phase: Phase,
    /// Round within the phase, from 1.
    pub round: u32,
    /// Payload bytes of this phase dealt with so far: sent, or found at the target.
    pub payload_bytes: u64,
    /// Payload bytes that this phase will deal with, as far as is known now.
    pub payload_bytes_total: u64,
    /// Bytes on the wire since the start, both directions, overhead included.
    pub wire_bytes: u64,
    /// Wire rate over the last seconds, in bits per second.
    pub rate_bits_per_s: u64,
    /// Milliseconds since the start.
    pub elapsed_ms: u64,
    /// Expected milliseconds to the end of the whole run, if there is ground for a forecast.
    pub forecast_left_ms: Option<u64>,
    /// Something an operator wants to know now ("link down for 3 s, trying again").
    pub note: Option<String>,
    /// What the link does; absent before there is one.
    #[serde(default)]
    pub link: Option<Box<LinkReport>>,
}

/// What a link has carried and cost, and how it is at the moment of the report.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LinkReport {
    /// Bytes sent, with all headers down to IP's, repetitions included.
    pub wire_bytes_sent: u64,
    /// Bytes received, counted alike.
    pub wire_bytes_received: u64,
    /// Of those sent, taken for lost and sent again.
    pub repeated_bytes: u64,
    /// Packets sent.
    pub packets_sent: u64,
    /// Of those, taken for lost.
    pub packets_lost: u64,
    /// Smoothed round trip.
    pub rtt_ms: f64,
    /// Lowest round trip seen.
    pub min_rtt_ms: f64,
    /// What a packet waits beyond that: the queue, ours and that of others.
    pub queueing_ms: f64,
    /// Bytes that may be under way.
    pub window_bytes: u64,
    /// Bits a second at which packets leave at most; 0 if that is not known.
    pub pacing_bits_per_s: u64,
    /// Bits a second that the path is thought to deliver; 0 if that is not known.
    pub bandwidth_bits_per_s: u64,
    /// Whether it takes only what others leave.
    #[serde(default)]
    pub background: bool,
    /// Connections side by side: more than one where a core was the limit.
    #[serde(default)]
    pub connections: u32,
    /// How often the session has gone on over another connection.
    pub reconnects: u64,
    /// For how long the link has been down now; 0 if it is up.
    pub down_ms: u64,
    /// Payload by class, the most urgent first.
    pub classes: Vec<ClassReport>,
}

/// Payload of one class on a link.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassReport {
    /// Its name.
    pub class: String,
    /// Bytes sent, each once.
    pub sent_bytes: u64,
    /// Of these, known to be at the peer.
    pub arrived_bytes: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Bits of those that arrived, a second: of the last seconds while the job runs, of all its time in
    /// its report.
    #[serde(default)]
    pub goodput_bits_per_s: u64,
}

/// What moved in one phase.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PhaseReport {
    /// How long it took.
    pub duration_ms: u64,
    /// Rounds it took.
    pub rounds: u32,
    /// Bytes that the guest would have us move.
    pub payload_bytes: u64,
    /// Bytes that crossed the WAN for it, all overhead included.
    pub wire_bytes: u64,
}

/// Downtime in its parts, as DESIGN's model has them; their sum is `total_ms`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Downtime {
    /// From the pause at the source to the guest observed running at the target.
    pub total_ms: f64,
    /// Pause to the last disk blocks and pages collected.
    pub collect_ms: f64,
    /// Sending them and the device state.
    pub drain_ms: f64,
    /// The source hypervisor's own end: last byte to parked.
    pub park_ms: f64,
    /// The token's way: half a round trip.
    pub token_ms: f64,
    /// Target: everything handed to its hypervisor, disks durable.
    #[serde(default)]
    pub check_ms: f64,
    /// The target hypervisor's own: load of the device state.
    pub load_ms: f64,
    /// The two journals: delegation and acceptance.
    #[serde(default)]
    pub journal_ms: f64,
    /// `run` given to the guest observed running.
    pub start_ms: f64,
    /// What of it is the hand-over: from the last byte of data sent, whose way is half a round trip,
    /// to the guest observed running. Not a part of its own.
    #[serde(default)]
    pub hand_over_ms: f64,
}

impl Downtime {
    /// The parts that were measured: all but the token's way.
    pub fn known_parts_ms(&self) -> f64 {
        self.collect_ms
            + self.drain_ms
            + self.park_ms
            + self.check_ms
            + self.load_ms
            + self.journal_ms
            + self.start_ms
    }
}

/// What was saved, by means; payload bytes that did not have to be sent as they are.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    /// Holes and zero blocks of disks.
    pub disk_zero_bytes: u64,
    /// Chunks that the target had.
    pub disk_known_bytes: u64,
    /// Compression of disk chunks.
    pub disk_compressed_bytes: u64,
    /// Zero pages.
    pub memory_zero_bytes: u64,
    /// Pages with repeated contents.
    pub memory_repeated_bytes: u64,
    /// Pages that the target took from its disks.
    #[serde(default)]
    pub memory_on_disk_bytes: u64,
    /// Older versions of pages that were never sent.
    pub memory_superseded_bytes: u64,
    /// Pages sent as differences.
    pub memory_delta_bytes: u64,
    /// Compression of pages.
    pub memory_compressed_bytes: u64,
}

/// The report of a seed or migration that reached its end.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Completed {
    /// The VM.
    pub vm: String,
    /// The peer's name at this host.
    pub peer: String,
    /// Whole time.
    pub total_ms: u64,
    /// Downtime; absent after a seed.
    pub downtime: Option<Downtime>,
    /// Per phase, in order; a phase that did not run is absent.
    pub phases: Vec<(String, PhaseReport)>,
    /// What was saved by which means.
    pub saved: Saved,
    /// All wire bytes, both directions.
    pub wire_bytes: u64,
    /// All payload bytes.
    pub payload_bytes: u64,
    /// Things an operator should know ("the stream was not understood and passed through").
    pub notes: Vec<String>,
    /// What the link has carried and cost.
    #[serde(default)]
    pub link: Option<Box<LinkReport>>,
    /// What a pushed image is called at the peer; absent for a VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

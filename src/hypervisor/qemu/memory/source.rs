//! What the source's QEMU is told while its memory leaves.
//!
//! Invariant: with the settings that [`SourceMemory::start`] makes, QEMU never resumes a VM that it
//! has parked: without a return path it has no one to ask and nothing to wait for. The only calls
//! that make a VM run again are in [`SourceMemory::rollback`].
//!
//! ```text
//! start -> Active --allow_switchover--> PreSwitchover --finish--> Device -> Completed (parked)
//!             |                              |                                 |
//!             +--------- rollback: migrate_cancel ---------+     rollback: cont, if it ran before
//! ```
//!
//! A QEMU that misses writes (see [`again`](super::again)) goes through this twice: the first stream
//! is broken off while it is active, the VM is paused, and the second one goes on from there.
//!
//! ```text
//! start -> Active --allow_switchover--> Cancelled --wait_paused--> Active, paused --finish--> ..
//! ```
//!
//! What we did is kept where it outlives this process and cannot outlive QEMU's: in QEMU's
//! `downtime-limit`, which has a value of its own for each of the few things to know.
//!
//! Commands and states are those of QEMU's `qapi/migration.json`, from 7.2 on.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex;
use tokio::sync::broadcast::{Receiver, error::TryRecvError};
use tokio::time::{Instant, timeout_at};

use super::again::{Teller, pair};

use super::status::{
    Kvm, Migration, Phase, Status, Wait, downtime_limit, set_capabilities, set_parameters, typed,
    unexpected,
};
use super::{QemuMemorySource, check_socket_path};
use crate::hypervisor::qemu::qmp::{Qmp, QmpEvent};
use crate::hypervisor::qemu::ramstream::Parser;
use crate::hypervisor::{HypervisorError, MemoryProgress};

/// How long QEMU may take to connect after it was told to.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// How long it may take to pause after it was allowed to: it finishes the pass that it is in, as
/// fast as it is read.
const PAUSE_WITHIN: Duration = Duration::from_secs(600);

/// How long the last pages and the device state may take: as fast as they are read.
const PARK_WITHIN: Duration = Duration::from_secs(600);

/// How long a cancelled migration may take to give the VM back.
const ROLLBACK_WITHIN: Duration = Duration::from_secs(180);

/// The smallest downtime limit: QEMU then pauses the VM only if almost nothing is left to send. With
/// 0 it would finish without looking for dirty pages once more.
const HOLD_MS: u64 = 1;

/// As small, and the mark of a VM that was running and that we have paused.
const PAUSED_MS: u64 = 2;

/// The mark of a VM that was given back to its owner; as good as QEMU's default of 300 for whatever
/// its owner does next.
const GIVEN_BACK_MS: u64 = 299;

/// The first QEMU that can be told the bandwidth of a switchover. It is to measure it, whatever its
/// owner had set: held at next to nothing, a guest that writes little would never be looked at again.
const CAN_BE_TOLD: (u32, u32, u32) = (8, 2, 0);

/// The largest downtime limit that QEMU accepts: it then pauses the VM at once.
const RELEASE_MS: u64 = 2_000_000;

/// A rate that no memory has. QEMU is slowed down by not reading its socket.
const UNLIMITED_BYTES_PER_S: u64 = 1 << 50;

/// The lowest rate that QEMU is given: it divides by ten and takes 0 for no limit.
const RATE_MIN_BYTES_PER_S: u64 = 64 << 10;

/// The first QEMU that sees every write under TCG too.
const SEES_ALL_WRITES: (u32, u32, u32) = (9, 0, 0);

/// Where migration left a VM that it stopped and did not resume.
const LEFT_STOPPED: [&str; 2] = ["finish-migrate", "postmigrate"];

/// The memory half of a VM that leaves.
#[derive(Debug, Clone)]
pub struct SourceMemory {
    qmp: Qmp,
    socket: PathBuf,
    /// While memory moves out of a QEMU that misses writes.
    again: Arc<Mutex<Option<Again>>>,
}

/// A stream that has to be told again.
#[derive(Debug)]
struct Again {
    teller: Teller,
    /// Since before the stream began.
    events: Receiver<QmpEvent>,
    /// Whether the guest ran while memory was sent: only then something was missed.
    ran: bool,
}

impl Again {
    /// Whether the guest ran since the beginning, or the last call.
    fn was_resumed(&mut self) -> bool {
        loop {
            match self.events.try_recv() {
                Ok(event) if event.name != "RESUME" => {}
                Ok(_) | Err(TryRecvError::Lagged(_)) => return true,
                Err(TryRecvError::Empty | TryRecvError::Closed) => return false,
            }
        }
    }
}

impl SourceMemory {
    /// Will have the QEMU behind `qmp` connect to a socket that is made at `socket`.
    pub fn new(qmp: Qmp, socket: PathBuf) -> Self {
        Self { qmp, socket, again: Arc::default() }
    }

    /// Starts to send memory. The VM runs on; it is held back from pausing as far as QEMU can be,
    /// that is unless it has less to send than it sends in a millisecond.
    ///
    /// # Errors
    ///
    /// `Refused` with QEMU's words if the VM cannot be migrated now, `Gone` if QEMU does not
    /// connect. The VM is unaffected.
    pub async fn start(&self) -> Result<QemuMemorySource, HypervisorError> {
        self.start_with(Parser::new()).await
    }

    /// As [`start`](Self::start), with a parser of the caller's.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub async fn start_with(&self, parser: Parser) -> Result<QemuMemorySource, HypervisorError> {
        let vm = self.qmp.vm();
        check_socket_path(vm, &self.socket)?;
        set_capabilities(&self.qmp, &["events", "pause-before-switchover"]).await?;
        let mut parameters = vec![
            ("max-bandwidth", json!(UNLIMITED_BYTES_PER_S)),
            ("downtime-limit", json!(HOLD_MS)),
            // The socket never leaves this host; a key of the owner's would only stop us.
            ("tls-creds", json!("")),
            ("tls-hostname", json!("")),
        ];
        if self.qmp.version() >= CAN_BE_TOLD {
            parameters.push(("avail-switchover-bandwidth", json!(0)));
        }
        set_parameters(&self.qmp, &parameters).await?;

        let events = self.qmp.events();
        let is_again = self.misses_writes().await?;
        let status: Status = self.ask("query-status").await?;
        let memory = QemuMemorySource::new(vm, self.connect().await?, parser);
        let mut again = self.again.lock().await;
        if !is_again {
            *again = None;
            return Ok(memory);
        }
        let (teller, listener) = pair();
        *again = Some(Again { teller, events, ran: status.running });
        Ok(memory.until_told_again(listener))
    }

    /// Whether this QEMU does not send everything that a running guest writes. Which of its
    /// accelerators but KVM are affected is not known for all; a second stream harms none.
    async fn misses_writes(&self) -> Result<bool, HypervisorError> {
        if self.qmp.version() >= SEES_ALL_WRITES {
            return Ok(false);
        }
        let kvm: Kvm = self.ask("query-kvm").await?;
        Ok(!kvm.enabled)
    }

    /// What an operator should know of how this VM's memory moves, after
    /// [`start`](Self::start); none as a rule.
    pub async fn note(&self) -> Option<String> {
        let (major, minor, _) = self.qmp.version();
        let is_again = self.again.lock().await.as_ref().is_some_and(|again| again.ran);
        is_again.then(|| {
            format!(
                "QEMU {major}.{minor} without KVM misses some writes of a running guest: its memory \
                 is read a second time while it is paused, which adds to the downtime (QEMU 9.0 \
                 and newer need not)"
            )
        })
    }

    /// Has QEMU connect to us and migrate.
    async fn connect(&self) -> Result<UnixStream, HypervisorError> {
        let vm = self.qmp.vm();
        let listener = self.listen().map_err(|source| HypervisorError::Io {
            doing: format!("{vm}: making the socket {} for its memory", self.socket.display()),
            source,
        })?;
        let uri = format!("unix:{}", self.socket.display());
        let connected = match self.qmp.execute("migrate", json!({"uri": uri})).await {
            Ok(_) => self.accept(&listener).await,
            Err(error) => Err(error),
        };
        self.remove_socket();
        connected
    }

    fn listen(&self) -> io::Result<UnixListener> {
        match std::fs::remove_file(&self.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&self.socket)?;
        std::fs::set_permissions(&self.socket, std::fs::Permissions::from_mode(0o600))?;
        // A QEMU that runs as another user must still be able to connect, and nobody else.
        if let Some(pid) = self.qmp.peer_pid()
            && let Ok(process) = std::fs::metadata(format!("/proc/{pid}"))
            && process.uid() != std::fs::metadata(&self.socket)?.uid()
        {
            chown(&self.socket, Some(process.uid()), None)?;
        }
        Ok(listener)
    }

    /// Waits for QEMU to connect; others that may (root) are sent away.
    async fn accept(&self, listener: &UnixListener) -> Result<UnixStream, HypervisorError> {
        let vm = self.qmp.vm();
        let deadline = Instant::now() + CONNECT_WITHIN;
        loop {
            let accepted = timeout_at(deadline, listener.accept()).await;
            let stream = match accepted {
                Ok(Ok((stream, _))) => stream,
                Ok(Err(source)) => {
                    let doing = format!("{vm}: waiting for its memory");
                    return Err(HypervisorError::Io { doing, source });
                }
                Err(_) => {
                    // The VM must not stay in a migration that nobody reads.
                    if let Err(error) = self.qmp.execute("migrate_cancel", json!({})).await {
                        tracing::warn!(vm, %error, "the migration could not be cancelled");
                    }
                    let migration = self.query().await?;
                    return Err(unexpected(&self.qmp, &migration, "connected to us"));
                }
            };
            let peer = stream.peer_cred().ok().and_then(|cred| cred.pid());
            if peer.is_none() || self.qmp.peer_pid().is_none() || peer == self.qmp.peer_pid() {
                return Ok(stream);
            }
            tracing::warn!(vm, peer, "another process connected to the memory socket");
        }
    }

    /// What QEMU says of the memory pass.
    ///
    /// # Errors
    ///
    /// As QEMU's monitor has them; an answer is no error even if the migration has failed.
    pub async fn progress(&self) -> Result<MemoryProgress, HypervisorError> {
        let Migration { status, ram, .. } = self.query().await?;
        // A VM that had nothing left to send is paused already: QEMU's last count of what it dirties
        // is none that lasts.
        let is_paused = status == Phase::PreSwitchover;
        Ok(MemoryProgress {
            remaining_bytes: ram.remaining,
            dirty_pages_per_s: if is_paused { 0 } else { ram.dirty_pages_rate },
            passes: ram.dirty_sync_count,
            paused: is_paused,
        })
    }

    /// Limits how fast QEMU sends memory; it counts in windows of 100 ms.
    ///
    /// # Errors
    ///
    /// As QEMU's monitor has them.
    pub async fn set_rate(&self, bytes_per_s: u64) -> Result<(), HypervisorError> {
        let rate = bytes_per_s.clamp(RATE_MIN_BYTES_PER_S, UNLIMITED_BYTES_PER_S);
        set_parameters(&self.qmp, &[("max-bandwidth", json!(rate))]).await
    }

    /// Lets QEMU pause the VM as soon as it can; one that misses writes sends nothing more before.
    ///
    /// # Errors
    ///
    /// As QEMU's monitor has them; `Unexpected` if nobody reads a stream that has to be told again.
    pub async fn allow_switchover(&self) -> Result<(), HypervisorError> {
        let mut again = self.again.lock().await;
        if let Some(stream) = again.as_mut() {
            stream.ran |= stream.was_resumed();
            if stream.ran {
                return self.break_off(stream).await;
            }
            // It stood still all along: nothing was missed.
            *again = None;
        }
        let rate = ("max-bandwidth", json!(UNLIMITED_BYTES_PER_S));
        set_parameters(&self.qmp, &[rate, ("downtime-limit", json!(RELEASE_MS))]).await
    }

    /// Ends the first stream while the VM runs: QEMU calls a VM that it finds paused then migrated,
    /// and refuses to migrate it again.
    async fn break_off(&self, again: &mut Again) -> Result<(), HypervisorError> {
        // Before the stream ends: its reader must not take that for a failure.
        if !again.teller.announce() {
            return Err(self.nobody_reads());
        }
        self.qmp.execute("migrate_cancel", json!({})).await?;
        let mut wait = Wait::begin(&self.qmp, "the first stream to end", ROLLBACK_WITHIN);
        loop {
            let migration = wait.migration().await?;
            match migration.status {
                Phase::Cancelled => return Ok(()),
                Phase::None | Phase::Failed | Phase::Completed => {
                    return Err(unexpected(&self.qmp, &migration, "broken off"));
                }
                _ => wait.again().await?,
            }
        }
    }

    /// Pauses the VM and begins the second stream, which misses nothing.
    async fn tell_again(&self, again: &mut Again) -> Result<(), HypervisorError> {
        let rate = ("max-bandwidth", json!(UNLIMITED_BYTES_PER_S));
        // First the mark: who finds the VM paused without it takes that for its owner's doing.
        set_parameters(&self.qmp, &[rate, ("downtime-limit", json!(PAUSED_MS))]).await?;
        self.qmp.execute("stop", json!({})).await?;
        again.was_resumed();
        let stream = self.connect().await?;
        if again.teller.hand_over(stream) { Ok(()) } else { Err(self.nobody_reads()) }
    }

    fn nobody_reads(&self) -> HypervisorError {
        HypervisorError::Unexpected {
            vm: self.qmp.vm().to_owned(),
            detail: "its memory has to be told again and nobody reads it".to_owned(),
        }
    }

    /// Returns once the VM is paused by the switchover: its CPUs stand still and its disks are
    /// flushed. Gives when they stopped: a QEMU with nothing left to send does that unasked, and the
    /// question came later. A VM that its owner had paused gets there too, though nothing then stops.
    ///
    /// # Errors
    ///
    /// `Unexpected`, with QEMU's words, if the migration ended instead; `Gone` after a time.
    pub async fn wait_paused(&self) -> Result<std::time::Instant, HypervisorError> {
        match self.again.lock().await.as_mut() {
            Some(again) if again.teller.is_announced() => self.tell_again(again).await?,
            _ => self.wait_pre_switchover().await?,
        }
        self.check_paused().await?;
        Ok(self.qmp.stopped_at().unwrap_or_else(Instant::now).into_std())
    }

    async fn wait_pre_switchover(&self) -> Result<(), HypervisorError> {
        let mut wait = Wait::begin(&self.qmp, "the VM to pause for the switchover", PAUSE_WITHIN);
        loop {
            let migration = wait.migration().await?;
            match migration.status {
                Phase::PreSwitchover => return Ok(()),
                Phase::Setup | Phase::Active | Phase::Other => wait.again().await?,
                _ => return Err(unexpected(&self.qmp, &migration, "paused before the switchover")),
            }
        }
    }

    async fn check_paused(&self) -> Result<(), HypervisorError> {
        let status: Status = self.ask("query-status").await?;
        if status.running {
            return Err(HypervisorError::Unexpected {
                vm: self.qmp.vm().to_owned(),
                detail: format!("it is {} in the pause before the switchover", status.status),
            });
        }
        Ok(())
    }

    /// Lets QEMU send the last pages and the device state. Read at full speed once it returns: QEMU
    /// answers nothing while it waits for its reader. A second stream is read to its last pass first,
    /// while this waits.
    ///
    /// # Errors
    ///
    /// `Refused` if the VM is not paused before the switchover, `Unexpected` if it was resumed
    /// meanwhile.
    pub async fn finish(&self) -> Result<(), HypervisorError> {
        if let Some(again) = self.again.lock().await.as_mut() {
            self.wait_pre_switchover().await?;
            if again.was_resumed() {
                return Err(HypervisorError::Unexpected {
                    vm: self.qmp.vm().to_owned(),
                    detail: "it was resumed while its memory was read in the pause".to_owned(),
                });
            }
        }
        self.qmp.execute("migrate-continue", json!({"state": "pre-switchover"})).await?;
        Ok(())
    }

    /// Returns once QEMU has sent everything and is parked: it never resumes by itself.
    ///
    /// # Errors
    ///
    /// `Unexpected`, with QEMU's words, if the migration ended otherwise; `Gone` after a time.
    pub async fn wait_parked(&self) -> Result<(), HypervisorError> {
        let mut wait = Wait::begin(&self.qmp, "the VM to be parked", PARK_WITHIN);
        loop {
            let migration = wait.migration().await?;
            match migration.status {
                // The run state follows a moment after.
                Phase::Completed => match wait.status().await? {
                    status if status.status == "postmigrate" => return Ok(()),
                    status if status.running => {
                        return Err(HypervisorError::Unexpected {
                            vm: self.qmp.vm().to_owned(),
                            detail: "it was resumed behind our back".to_owned(),
                        });
                    }
                    _ => {}
                },
                Phase::PreSwitchover | Phase::Device | Phase::Active | Phase::Other => {}
                _ => return Err(unexpected(&self.qmp, &migration, "completed")),
            }
            wait.again().await?;
        }
    }

    /// Ends the migration, wherever it is, and gives the VM back as it was: running if it `ran`
    /// before [`start`](Self::start), else stopped. Returns once that is observed. A VM that stopped
    /// for a reason of its own meanwhile (its owner, a shutdown, a disk error) stays so.
    ///
    /// A parked VM that did not run before stays in QEMU's state `postmigrate`, but is no longer
    /// parked (see [`is_given_back`]): nothing but its
    /// owner's resuming it can change that without running the guest, and until then QEMU refuses
    /// another migration.
    ///
    /// Only for a VM of which this host is the owner: a parked one resumes. Drop the memory source
    /// first, or go on reading it: QEMU in the device phase answers nothing while nobody reads.
    ///
    /// # Errors
    ///
    /// `Refused` with QEMU's words if the VM cannot be resumed, `Gone` if it was not observed in
    /// time. Calling again is safe.
    pub async fn rollback(&self, ran: bool) -> Result<(), HypervisorError> {
        // A reader that waits for a second stream learns that none comes.
        *self.again.lock().await = None;
        let mut wait = Wait::begin(&self.qmp, "the VM to be given back", ROLLBACK_WITHIN);
        let (mut cancelled, mut resumed) = (false, false);
        loop {
            match wait.migration().await?.status {
                Phase::None => break,
                Phase::Cancelling => {}
                Phase::Cancelled | Phase::Failed | Phase::Completed => {
                    let status = wait.status().await?;
                    let by_us =
                        status.status == "paused" && downtime_limit(&self.qmp).await? == PAUSED_MS;
                    let is_left = by_us || LEFT_STOPPED.contains(&status.status.as_str());
                    if status.running || !is_left {
                        break;
                    }
                    // QEMU tells that a migration has ended before it takes the VM out of
                    // `finish-migrate`, which is nobody's to resume.
                    let is_settled = by_us || status.status == "postmigrate";
                    if !ran && is_settled {
                        break;
                    }
                    if ran && is_settled && !resumed {
                        resumed = true;
                        self.qmp.execute("cont", json!({})).await?;
                        continue;
                    }
                }
                _ if cancelled => {}
                _ => {
                    cancelled = true;
                    self.qmp.execute("migrate_cancel", json!({})).await?;
                    continue;
                }
            }
            wait.again().await?;
        }
        if [HOLD_MS, PAUSED_MS, RELEASE_MS].contains(&downtime_limit(&self.qmp).await?) {
            set_parameters(&self.qmp, &[("downtime-limit", json!(GIVEN_BACK_MS))]).await?;
        }
        self.remove_socket();
        Ok(())
    }

    async fn query(&self) -> Result<Migration, HypervisorError> {
        self.ask("query-migrate").await
    }

    async fn ask<T: DeserializeOwned>(&self, command: &str) -> Result<T, HypervisorError> {
        typed(&self.qmp, command, self.qmp.execute(command, json!({})).await?)
    }

    /// Best effort: the next attempt removes a socket that is left.
    fn remove_socket(&self) {
        let socket: &Path = &self.socket;
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(socket = %socket.display(), %error, "a socket could not be removed");
            }
            _ => {}
        }
    }
}

/// Whether a VM in QEMU's state `postmigrate` is its owner's: the migration that left it there did
/// not succeed, or was one of ours that was rolled back.
///
/// # Errors
///
/// As QEMU's monitor has them.
pub(in crate::hypervisor::qemu) async fn is_given_back(qmp: &Qmp) -> Result<bool, HypervisorError> {
    let command = "query-migrate";
    let migration: Migration = typed(qmp, command, qmp.execute(command, json!({})).await?)?;
    match migration.status {
        Phase::Cancelled | Phase::Failed => Ok(true),
        Phase::Completed => Ok(downtime_limit(qmp).await? == GIVEN_BACK_MS),
        _ => Ok(false),
    }
}

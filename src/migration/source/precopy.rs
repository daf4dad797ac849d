//! Steering pre-copy: measure, let [`converge`](super::super::converge) decide, sync disks beside it.
//!
//! Invariant: nothing is decided here; the hypervisor is held back until the decision, unless it paused
//! its guest by itself.

use std::time::Instant;

use longhaul_transport::Class;
use tokio::sync::watch;

use super::super::converge::{Budget, Convergence, Decision, Measured};
use super::super::error::MigrationError;
use super::super::memory::{SendState, Stage};
use super::{Attempt, SYNC_ENOUGH_BYTES, TICK};
use crate::hypervisor::PAGE_BYTES;

/// Share of the downtime that is asked for which may go into pages that wait here.
const WAITING_SHARE: f64 = 0.25;

impl Attempt<'_> {
    /// Rounds of memory and disk, until the switchover would fit.
    pub(super) async fn precopy(
        &self,
        stage: &Stage,
        state: &watch::Receiver<SendState>,
    ) -> Result<(), MigrationError> {
        let (enough, stop) = watch::channel(false);
        let deciding = async {
            let decided = self.until_convergence(stage, state).await;
            enough.send_replace(true);
            decided
        };
        let syncing = async {
            // The guest writes its disks on while memory moves.
            while !*stop.borrow() {
                if self.vm.disk_delta_bytes().await? > SYNC_ENOUGH_BYTES {
                    self.unseen_delta_round(Class::Blocks).await?;
                } else {
                    tokio::time::sleep(TICK).await;
                }
            }
            Ok(())
        };
        tokio::try_join!(deciding, syncing).map(|_| ())
    }

    async fn until_convergence(
        &self,
        stage: &Stage,
        state: &watch::Receiver<SendState>,
    ) -> Result<(), MigrationError> {
        let options = &self.job.options;
        let mut convergence = Convergence::new(Budget {
            target_ms: options.downtime_target_ms,
            max_ms: options.downtime_max_ms,
            deadline_ms: options.deadline_ms,
        });
        let began = Instant::now();
        let mut synced = (0, Instant::now());
        let mut ticks = tokio::time::interval(TICK);
        let mut crossed = false;
        loop {
            ticks.tick().await;
            if !crossed && stage.first_pass_done() {
                crossed = true;
                let ms = began.elapsed().as_millis();
                tracing::info!(vm = self.job.vm, ms, "memory has crossed once");
            }
            let hypervisor = self.vm.memory_progress().await?;
            if hypervisor.paused {
                // Held back as far as it can be, it may still find that it has next to nothing
                // left. Its guest stands still: every moment from here on is downtime.
                stage.open();
                tracing::info!(vm = self.job.vm, "the hypervisor paused the guest by itself");
                return Ok(());
            }
            if hypervisor.passes != synced.0 {
                synced = (hypervisor.passes, Instant::now());
            }
            self.meter.ahead(
                hypervisor.remaining_bytes + stage.bytes(),
                u32::try_from(hypervisor.passes).unwrap_or(u32::MAX),
            );
            let dirty_bytes_per_s = hypervisor.dirty_pages_per_s * PAGE_BYTES as u64;
            // Its count of what remains is as of its last look at the dirty pages.
            let since = (dirty_bytes_per_s as f64 * synced.1.elapsed().as_secs_f64()) as u64;
            let sending = *state.borrow();
            let path = self.link.stats();
            let measured = Measured {
                at_ms: began.elapsed().as_millis() as u64,
                first_pass_done: stage.first_pass_done(),
                remaining_bytes: hypervisor.remaining_bytes + since,
                staged_bytes: stage.bytes(),
                unapplied_wire_bytes: sending.unapplied_bytes,
                disk_bytes: self.vm.disk_delta_bytes().await?,
                dirty_bytes_per_s,
                wire_per_page_byte: sending.wire_per_page_byte,
                link_bytes_per_s: self.link.bytes_per_s(),
                rtt_ms: path.rtt.as_secs_f64() * 1000.0,
            };
            stage.link_takes(measured.page_bytes_in(options.downtime_target_ms * WAITING_SHARE));
            // From here on the hypervisor may pause its guest: what is under way must fit first.
            if measured.first_pass_done
                && measured.disk_bytes <= 4 * SYNC_ENOUGH_BYTES
                && measured.under_way_ms() <= options.downtime_target_ms
            {
                stage.open();
            }
            match convergence.decide(&measured) {
                Decision::Continue => {}
                Decision::Switch { forecast_ms, within_target } => {
                    tracing::info!(vm = self.job.vm, forecast_ms, ?measured, "switching over");
                    if !within_target {
                        self.meter.note(format!(
                            "the guest stays too busy for a downtime of {:.0} ms: switched over \
                             at a local minimum with {forecast_ms:.0} ms expected",
                            options.downtime_target_ms
                        ));
                    }
                    return Ok(());
                }
                Decision::GiveUp { reason } => {
                    return Err(MigrationError::DoesNotConverge {
                        vm: self.job.vm.clone(),
                        reason,
                    });
                }
            }
        }
    }
}

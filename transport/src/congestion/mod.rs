//! Congestion control for long, lossy paths: a model of the path instead of a reaction to losses.
//!
//! Invariant: what a controller decides reaches the wire: its window through quinn, its pacing rate
//! through [`crate::pace`], because quinn 0.11 paces at 1.25 x window / smoothed round trip whatever
//! a controller says. Both see the same [`PathView`], which outlives neither.
//!
//! `bbr` is the model and its states, `cycle` its probing, `round_trip` the length of the path,
//! `delivery` what arrives; `rivals` is how it shares with others, `background` how it yields to them.

mod background;
mod bbr;
mod cycle;
mod delivery;
mod full_pipe;
mod rivals;
mod round_trip;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;

use self::bbr::Bbr;
pub(crate) use self::bbr::carried;

/// Window before anything is known, in bytes.
pub(crate) const INITIAL_WINDOW: u64 = 32 * 1200;

/// What the controller of a path knows and wants, for others to see at any time.
#[derive(Debug, Default)]
pub(crate) struct PathView {
    /// Bytes a second that may leave, headers of QUIC included; 0: as many as there are.
    pub(crate) pacing_rate: AtomicU64,
    /// What the path is thought to deliver, in bytes a second.
    pub(crate) bandwidth: AtomicU64,
    /// A cap has held something back since this was last looked at: what then arrives says nothing
    /// about the path.
    pub(crate) is_capped: AtomicBool,
    /// What is sent here yields to others.
    pub(crate) background: AtomicBool,
}

impl PathView {
    /// The view of a connection's path now; none if its controller is not one of ours.
    pub(crate) fn of(connection: &quinn::Connection) -> Option<Arc<Self>> {
        let controller = connection.congestion_state().into_any().downcast::<PathController>();
        controller.ok().map(|controller| controller.view)
    }
}

/// Builds a controller for every path.
#[derive(Debug, Clone)]
pub(crate) struct PathControllerConfig {
    /// Bytes in flight before anything is known of the path.
    pub(crate) initial_window: u64,
}

impl ControllerFactory for PathControllerConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let initial_window = self.initial_window.max(INITIAL_WINDOW);
        let model = Bbr::new(initial_window, now, u64::from(current_mtu));
        Box::new(PathController { model, view: Arc::default(), acked: Acked::default() })
    }
}

/// What a batch of acknowledgements has said so far.
#[derive(Debug, Clone, Copy, Default)]
struct Acked {
    bytes: u64,
    newest_sent: Option<Instant>,
}

/// Joins quinn's calls to the model.
#[derive(Debug, Clone)]
struct PathController {
    model: Bbr,
    view: Arc<PathView>,
    acked: Acked,
}

impl PathController {
    fn show(&self) {
        self.view.pacing_rate.store(self.model.pacing_rate(), Ordering::Relaxed);
        self.view.bandwidth.store(self.model.bandwidth(), Ordering::Relaxed);
    }
}

impl Controller for PathController {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        self.model.on_sent(now, bytes);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        _app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        self.model.on_ack(now, sent, bytes);
        self.acked.bytes += bytes;
        self.acked.newest_sent = self.acked.newest_sent.max(Some(sent));
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        let Acked { bytes, newest_sent } = std::mem::take(&mut self.acked);
        let rtt = newest_sent.map(|sent| now.saturating_duration_since(sent));
        let app_limited = app_limited || self.view.is_capped.swap(false, Ordering::Relaxed);
        self.model.set_background(now, self.view.background.load(Ordering::Relaxed));
        self.model.on_acks(
            now,
            bytes,
            rtt.filter(|rtt| *rtt > Duration::ZERO),
            in_flight,
            app_limited,
        );
        self.show();
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        if is_persistent_congestion {
            self.model.on_dead_path(now);
        } else if lost_bytes == 0 {
            self.model.on_mark();
        } else {
            self.model.on_lost(now, sent, lost_bytes);
        }
        self.show();
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.model.on_mtu(u64::from(new_mtu));
    }

    fn window(&self) -> u64 {
        self.model.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = ControllerMetrics::default();
        metrics.congestion_window = self.model.window();
        metrics.pacing_rate = Some(self.model.pacing_rate().saturating_mul(8));
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.model.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_loss_changes_nothing_and_a_dead_path_starts_anew() {
        let now = Instant::now();
        let config = Arc::new(PathControllerConfig { initial_window: 1 << 20 });
        let mut controller = config.build(now, 1200);
        controller.on_sent(now, 1200, 1);
        controller.on_congestion_event(now, now, false, 1200);
        assert_eq!(controller.window(), 1 << 20);
        controller.on_congestion_event(now, now, true, 1200);
        assert_eq!(controller.window(), INITIAL_WINDOW);
    }
}

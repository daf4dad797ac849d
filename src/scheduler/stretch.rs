//! A VM's data over a link for as long as both keep their rates.
//!
//! Invariant: what is left is never less than nothing and never more than all, if it was not before.
//!
//! What is left is R of D MiB; a guest that dirties d MiB a second spoils only what was sent, so
//! dR/dt = d (1 - R/D) - b on a link of b MiB a second, until one pause can send the rest. With
//! constant rates this has a closed form.

/// Below so many MiB a second a guest changes nothing that counts.
const STILL: f64 = 1e-6;

/// Rates that are constant for a while.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stretch {
    whole: f64,
    rate: f64,
    dirty: f64,
    span_s: f64,
    /// One pause can send so much.
    enough: f64,
    /// What the distance to rest shrinks to by its end.
    decay: f64,
}

/// What comes of sending.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Step {
    /// All has crossed, the pause included.
    Ends {
        /// After so many seconds.
        took_s: f64,
        /// MiB that have crossed by then.
        mib: f64,
    },
    /// So much is left at the end.
    Left(f64),
}

impl Stretch {
    /// `whole` MiB of which `dirty` change a second, over `rate` MiB a second for `span_s` seconds.
    pub(crate) fn new(whole: f64, rate: f64, dirty: f64, span_s: f64, enough: f64) -> Self {
        let decay = if dirty < STILL { 1.0 } else { (-dirty / whole * span_s).exp() };
        Self { whole, rate, dirty, span_s, enough, decay }
    }

    /// Sends all the time.
    pub(crate) fn send(&self, left: f64) -> Step {
        let (rate, enough) = (self.rate, self.enough);
        let ends = |took: f64| {
            // The rest crosses in the pause.
            let took_s = took + if rate > 0.0 { left.min(enough) / rate } else { 0.0 };
            Step::Ends { took_s, mib: rate * took_s }
        };
        if left <= enough {
            return ends(0.0);
        }
        if self.dirty < STILL {
            let after = left - rate * self.span_s;
            return if after <= enough && rate > 0.0 {
                ends((left - enough) / rate)
            } else {
                Step::Left(after)
            };
        }
        // Where it would come to rest.
        let rest = self.whole * (self.dirty - rate) / self.dirty;
        let after = rest + (left - rest) * self.decay;
        if after <= enough && left > rest && enough > rest {
            let took = -((enough - rest) / (left - rest)).ln() * self.whole / self.dirty;
            return ends(took.clamp(0.0, self.span_s));
        }
        Step::Left(after)
    }

    /// MiB that cross if it sends all the time.
    pub(crate) fn mib(&self) -> f64 {
        self.rate * self.span_s
    }

    /// The share of what crosses that is not spoiled meanwhile; below zero where more is.
    pub(crate) fn useful(&self, left: f64) -> f64 {
        1.0 - self.dirty * (1.0 - left / self.whole) / self.rate.max(f64::MIN_POSITIVE)
    }

    /// Sends nothing: what was sent is spoiled bit by bit.
    pub(crate) fn hold(&self, left: f64) -> f64 {
        self.whole + (left - self.whole) * self.decay
    }
}

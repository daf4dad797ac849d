//! What a series is expected to do, by the predictor that was best on it lately.
//!
//! Invariant: a forecast knows its own error: each predictor's forecasts of the past are held against
//! what came, at the distance that they were made for, and the best one speaks, with that error as its
//! deviation. A [`Forecaster`] is of fixed size, whatever it has seen, and ignores samples that are no
//! number or do not come after the last one.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Samples ahead of the distant forecast.
const LATER: usize = 12;
/// How fast errors of the past are forgotten, once there are some.
const FORGET: f64 = 0.04;
/// Samples that what is known of other series counts as.
const PRIOR_SAMPLES: f64 = 3.0;
/// How fast the averages follow.
const FOLLOW: [f64; 3] = [0.5, 0.15, 0.04];
const PREDICTORS: usize = 5;
const HOURS: usize = 24;

/// What predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Predictor {
    /// It stays as it is.
    Last,
    /// An average of the last few samples.
    Fast,
    /// An average of an hour or so.
    Medium,
    /// An average of several hours.
    Slow,
    /// What it was at this hour of the days before.
    HourOfDay,
}

const ALL: [Predictor; PREDICTORS] =
    [Predictor::Last, Predictor::Fast, Predictor::Medium, Predictor::Slow, Predictor::HourOfDay];

/// A value to come: its mean, and its deviation by the error of such forecasts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Band {
    /// Expected.
    pub mean: f64,
    /// Root of the mean squared error.
    pub deviation: f64,
}

/// What a VM is expected to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// When a migration that starts now has ended.
    pub soon: Band,
    /// Over the time after that.
    pub later: Band,
    /// Who says so of `later`.
    pub predictor: Predictor,
}

/// The running knowledge of one series.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Forecaster {
    count: u64,
    last_at_s: i64,
    last: f64,
    averages: [f64; FOLLOW.len()],
    hours: [Option<f64>; HOURS],
    /// What each predictor said at the last samples, oldest first.
    said: VecDeque<[f64; PREDICTORS]>,
    soon: Errors,
    later: Errors,
}

/// Mean squared error of each predictor.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
struct Errors {
    count: f64,
    squared: [f64; PREDICTORS],
}

impl Errors {
    fn enter(&mut self, said: &[f64; PREDICTORS], came: f64) {
        self.count += 1.0;
        let weight = FORGET.max(1.0 / self.count);
        for (squared, said) in self.squared.iter_mut().zip(said) {
            *squared += weight * ((came - said).powi(2) - *squared);
        }
    }

    fn best(&self) -> usize {
        let least = (0..PREDICTORS).min_by(|a, b| self.squared[*a].total_cmp(&self.squared[*b]));
        if self.count > 0.0 { least.unwrap_or(0) } else { 0 }
    }

    /// The best one's error, while there are few with what other series teach.
    fn deviation(&self, prior: f64) -> f64 {
        let seen = self.squared[self.best()] * self.count;
        ((seen + prior * prior * PRIOR_SAMPLES) / (self.count + PRIOR_SAMPLES)).sqrt()
    }
}

impl Default for Forecaster {
    fn default() -> Self {
        Self {
            count: 0,
            last_at_s: i64::MIN,
            last: 0.0,
            averages: [0.0; FOLLOW.len()],
            hours: [None; HOURS],
            said: VecDeque::new(),
            soon: Errors::default(),
            later: Errors::default(),
        }
    }
}

fn hour(at_s: i64) -> usize {
    (at_s.div_euclid(3600)).rem_euclid(HOURS as i64) as usize
}

impl Forecaster {
    /// Takes the next sample. Samples come at equal distances; a gap counts as none.
    pub fn observe(&mut self, at_s: i64, value: f64) {
        if !value.is_finite() || value < 0.0 || (self.count > 0 && at_s <= self.last_at_s) {
            return;
        }
        if let Some(newest) = self.said.back() {
            self.soon.enter(newest, value);
        }
        if self.said.len() == LATER {
            if let Some(oldest) = self.said.pop_front() {
                self.later.enter(&oldest, value);
            }
        } else if let Some(oldest) = self.said.front() {
            // Until there are forecasts of the full distance, the longest ones that there are.
            self.later.enter(oldest, value);
        }
        self.count += 1;
        self.last_at_s = at_s;
        self.last = value;
        for (average, follow) in self.averages.iter_mut().zip(FOLLOW) {
            *average += follow.max(1.0 / self.count as f64) * (value - *average);
        }
        let of_hour = self.hours[hour(at_s)].get_or_insert(value);
        *of_hour += 0.1 * (value - *of_hour);
        self.said.push_back(self.say());
    }

    /// Samples so far.
    pub fn samples(&self) -> u64 {
        self.count
    }

    fn say(&self) -> [f64; PREDICTORS] {
        let [fast, medium, slow] = self.averages;
        // The hour to come: of yesterday, or the average when it was not seen.
        let of_day = self.hours[(hour(self.last_at_s) + 1) % HOURS].unwrap_or(slow);
        [self.last, fast, medium, slow, of_day]
    }

    /// The deviation so far of the best predictor at the longer distance, if there is one.
    pub fn deviation(&self) -> Option<f64> {
        let errors = &self.later;
        (errors.count > 0.0).then(|| errors.squared[errors.best()].sqrt())
    }

    /// What is expected; `prior` is the deviation of series like this one, used while it is young.
    pub fn forecast(&self, prior: f64) -> Forecast {
        let said = self.say();
        let band = |errors: &Errors| Band {
            mean: said[errors.best()],
            deviation: errors.deviation(prior),
        };
        let predictor = ALL[self.later.best()];
        Forecast { soon: band(&self.soon), later: band(&self.later), predictor }
    }
}

/// Forecasts of many VMs, the young ones with the deviation that the others of their size have.
///
/// `sizes` are the VMs' CPU sizes; a VM that never asked for anything is expected to ask for nothing.
pub fn forecast_all(forecasters: &[&Forecaster], sizes: &[f64], cold: f64) -> Vec<Forecast> {
    // Pooled over all: the mean squared deviation as a share of the size.
    let (mut sum, mut count) = (cold * cold * PRIOR_SAMPLES, PRIOR_SAMPLES);
    for (forecaster, size) in forecasters.iter().zip(sizes) {
        if let Some(deviation) = forecaster.deviation() {
            sum += (deviation / size).powi(2);
            count += 1.0;
        }
    }
    let pooled = (sum / count).sqrt();
    forecasters.iter().zip(sizes).map(|(one, size)| one.forecast(pooled * size)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(values: impl IntoIterator<Item = f64>) -> Forecast {
        let mut forecaster = Forecaster::default();
        for (at, value) in (0..).zip(values) {
            forecaster.observe(at * 300, value);
        }
        forecaster.forecast(0.1)
    }

    #[test]
    fn a_level_is_expected_to_stay_and_the_error_falls() {
        let level = after([5.0; 200]);
        assert!((level.later.mean - 5.0).abs() < 1e-9 && level.later.deviation < 0.02, "{level:?}");
    }

    #[test]
    fn noise_is_averaged_and_a_walk_is_followed() {
        let noise = after((0..300).map(|at| f64::from(at * at % 101 % 11)));
        assert_ne!(noise.predictor, Predictor::Last);
        assert!((noise.later.mean - 5.0).abs() < 1.5, "{noise:?}");
        let steps = after((0..300).map(|at| f64::from(at / 100)));
        assert!((steps.soon.mean - 2.0).abs() < 1e-3, "{steps:?}");
    }

    #[test]
    fn days_that_repeat_are_learned() {
        let days = after((0..288 * 12).map(|at| if (at / 12) % 24 < 12 { 1.0 } else { 9.0 }));
        // The last sample is of hour 23, at 9; the next hour of a day like this begins at 1.
        assert_eq!(days.predictor, Predictor::HourOfDay);
        assert!((days.later.mean - 1.0).abs() < 0.1, "{days:?}");
    }

    #[test]
    fn what_is_no_sample_changes_nothing() {
        let mut forecaster = Forecaster::default();
        forecaster.observe(300, 1.0);
        let before = forecaster.clone();
        for (at_s, value) in [(600, f64::NAN), (600, -1.0), (600, f64::INFINITY), (300, 2.0)] {
            forecaster.observe(at_s, value);
        }
        assert_eq!(forecaster, before);
    }
}

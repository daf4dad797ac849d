//! The planner: from what was seen, forecast and allowed to what should move, and why.
//!
//! Invariant: [`plan`] is data in, data out. It reads no clock, draws no lot that its seed does not
//! decide, and acts on nothing: the same input gives the same plan to the last bit, so live runs, dry
//! runs, simulation and replay are one call, and without a component that acts nothing can move.
//!
//! Reading order: [`state`] (what is known), [`forecast`] and [`season`] (what is expected), [`policy`] (what is
//! allowed), [`decision`] (what comes out), `what_if` (the hosts as a plan would leave them), then the
//! goals: `balance` and `consolidate`. Apart from them, with a deadline instead of a policy:
//! [`evacuate`] (who gets out of a site before it fails) and [`timing`] (when one VM should cross, over
//! [`courses`] that its days may take).

mod balance;
mod consolidate;
pub mod courses;
pub mod decision;
pub mod evacuate;
pub mod forecast;
pub mod policy;
pub mod season;
pub mod state;
mod stretch;
pub mod timing;
mod what_if;

use self::decision::Plan;
use self::forecast::Forecast;
use self::policy::{Goal, Policy};
use self::state::{InvalidState, State};
use self::what_if::WhatIf;

/// Decides what moves now, with a reason for each move and for each host where nothing is done.
///
/// `forecasts` has one entry for each of the state's VMs, in their order. `seed` only breaks ties
/// between hosts that are equal in everything.
///
/// # Errors
///
/// When the state contradicts itself: an index that leads nowhere, a size that is no number. Samples
/// that are old or cannot be true are no error: they freeze their host, and the plan says so.
pub fn plan(
    state: &State,
    forecasts: &[Forecast],
    policy: &Policy,
    now_s: i64,
    seed: u64,
) -> Result<Plan, InvalidState> {
    state.check()?;
    policy.check()?;
    if forecasts.len() != state.vms.len() {
        return Err(InvalidState::Forecasts { vms: state.vms.len(), forecasts: forecasts.len() });
    }
    let mut what_if = WhatIf::new(state, forecasts, policy, now_s, seed);
    let mut plan = Plan { now_s, seed, decisions: what_if.frozen_decisions() };
    plan.decisions.extend(balance::drain(&mut what_if));
    plan.decisions.extend(match policy.goal {
        Goal::Balance => balance::balance(&mut what_if),
        Goal::Consolidate => consolidate::consolidate(&mut what_if),
    });
    Ok(plan)
}

#[cfg(test)]
mod tests;

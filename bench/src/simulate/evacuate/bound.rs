//! More weight than any order over one link can save: proven, not searched.
//!
//! Invariant: every step errs to the side of more. Any prices of the link's seconds give a bound: who
//! goes pays at least the least that it can pay for a start at any time, and all together cannot
//! pay more than the whole link costs. Weights are whole, so of each sum of weights the least that
//! it can cost is found exactly; prices are fitted, and a bad fit only makes the bound higher.

use super::world::{PAUSE_S, SLOT_S, World};

/// Starts are told apart by so many seconds.
const GRID_S: usize = 2;
/// Parts of the time that have a price each.
const WINDOWS: usize = 24;
/// Fittings in vain before the bound is taken as it is.
const TRIES: usize = 60;
/// How far the sums of floating point and the world's seconds may err, in MiB for each VM.
const ERROR_MIB: f64 = 1.0;

/// A weight that no order exceeds; `found` is one that some order reaches.
pub(super) fn bound(world: &World, found: u32) -> u32 {
    let deadline = world.deadline_s;
    let mut sent = vec![0.0; deadline + 1];
    for at in 0..deadline {
        sent[at + 1] = sent[at] + world.rate(at);
    }
    let ends: Vec<Vec<u32>> = (0..world.vms.len()).map(|vm| ends(world, vm)).collect();
    let window = |at: usize| (at * WINDOWS / deadline.max(1)).min(WINDOWS - 1);
    let mut capacity = [0.0; WINDOWS];
    for at in 0..deadline {
        capacity[window(at)] += world.rate(at);
    }
    let mut prices = [1.0; WINDOWS];
    let mut bound: u32 = world.vms.iter().map(|vm| vm.weight).sum();
    let mut tries = 0;
    while bound > found && tries < TRIES {
        // What the link costs up to each second.
        let mut cost = vec![0.0; deadline + 1];
        for at in 0..deadline {
            cost[at + 1] = cost[at] + prices[window(at)] * world.rate(at);
        }
        let dearest = prices.iter().copied().fold(0.0, f64::max);
        let items: Vec<Option<(f64, usize)>> = ends
            .iter()
            .map(|ends| {
                cheapest(ends, &cost)
                    .map(|(price, at)| ((price - ERROR_MIB * dearest).max(0.0), at))
            })
            .collect();
        let (least, chosen) = least_cost(world, &items, bound);
        // The most that a set can weigh without costing more than there is.
        let now = (0..=bound as usize).rev().find(|&weight| least[weight] <= cost[deadline]);
        let now = now.unwrap_or(0) as u32;
        if now < bound {
            (bound, tries) = (now, 0);
            continue;
        }
        tries += 1;
        // What the cheapest set of this weight asks of each window.
        let mut asked = [0.0; WINDOWS];
        for (vm, at) in chosen {
            let (from, to) = (at * GRID_S, ends[vm][at] as usize);
            for second in from..to.min(deadline) {
                asked[window(second)] += world.rate(second);
            }
        }
        let total = sent[deadline].max(1.0);
        let step = 0.3 / (1.0 + tries as f64 / 10.0);
        for ((price, asked), capacity) in prices.iter_mut().zip(asked).zip(capacity) {
            let over = (asked - capacity) / (total / WINDOWS as f64);
            *price = (*price * (step * over.clamp(-2.0, 2.0)).exp()).clamp(1e-3, 1e3);
        }
        let mean = prices.iter().zip(capacity).map(|(price, has)| price * has).sum::<f64>() / total;
        prices.iter_mut().for_each(|price| *price /= mean);
    }
    bound
}

/// For each start on the grid the second in which a VM arrives; past the deadline if it does not.
fn ends(world: &World, vm: usize) -> Vec<u32> {
    let starts = world.deadline_s.div_ceil(GRID_S);
    let mut ends = vec![u32::MAX; starts];
    // Whoever starts earlier does not arrive later: the last end holds for starts before it.
    for (at, end) in ends.iter_mut().enumerate() {
        if let Some(found) = end_of(world, vm, at * GRID_S) {
            *end = found as u32;
        } else {
            break;
        }
    }
    ends
}

/// In which second a VM arrives that starts with one, slot by slot.
fn end_of(world: &World, vm: usize, start: usize) -> Option<usize> {
    let whole = world.vms[vm].whole;
    let (mut left, mut now) = (whole, start);
    while now < world.deadline_s {
        let (rate, dirty) = (world.rate(now), world.dirty(vm, now));
        let mut until = ((now / SLOT_S + 1) * SLOT_S).min(world.deadline_s);
        if let Some((from, to)) = world.shock {
            for edge in [from, to] {
                if now < edge && edge < until {
                    until = edge;
                }
            }
        }
        // left' = keep * left + dirty - rate, each second.
        let keep = 1.0 - dirty / whole;
        let after = |seconds: usize| {
            if dirty < 1e-9 {
                return left - rate * seconds as f64;
            }
            let rest = (dirty - rate) * whole / dirty;
            rest + (left - rest) * keep.powi(seconds as i32)
        };
        let enough = rate * PAUSE_S;
        if after(until - now) <= enough {
            // The first second in which it is so: what is left falls all the while.
            let (mut low, mut high) = (1, until - now);
            while low < high {
                let middle = usize::midpoint(low, high);
                if after(middle) <= enough { high = middle } else { low = middle + 1 }
            }
            return Some(now + low);
        }
        left = after(until - now).clamp(0.0, whole);
        now = until;
    }
    None
}

/// The least that a VM can pay, and at which start: one between two of the grid arrives no earlier than
/// the first of them and pays from the second of them on.
fn cheapest(ends: &[u32], cost: &[f64]) -> Option<(f64, usize)> {
    let last = cost.len() - 1;
    let pays = |(at, end): (usize, &u32)| {
        let price = cost[(*end as usize - 1).min(last)] - cost[((at + 1) * GRID_S).min(last)];
        (price.max(0.0), at)
    };
    ends.iter()
        .enumerate()
        .filter(|(_, end)| **end != u32::MAX)
        .map(pays)
        .min_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)))
}

/// Of each weight up to `most` the least that a set of at least that weight costs, and the cheapest set
/// of `most` with its starts.
fn least_cost(
    world: &World,
    items: &[Option<(f64, usize)>],
    most: u32,
) -> (Vec<f64>, Vec<(usize, usize)>) {
    let most = most as usize;
    let mut least = vec![f64::INFINITY; most + 1];
    least[0] = 0.0;
    let mut takes = vec![vec![false; most + 1]; items.len()];
    for (vm, item) in items.iter().enumerate() {
        let Some((price, _)) = item else { continue };
        let weight = world.vms[vm].weight as usize;
        for sum in (1..=most).rev() {
            let with = least[sum.saturating_sub(weight)] + price;
            if with < least[sum] {
                least[sum] = with;
                takes[vm][sum] = true;
            }
        }
    }
    let mut chosen = Vec::new();
    let mut sum = most;
    for vm in (0..items.len()).rev() {
        if let Some((_, at)) = items[vm].filter(|_| takes[vm][sum]) {
            chosen.push((vm, at));
            sum = sum.saturating_sub(world.vms[vm].weight as usize);
        }
    }
    (least, chosen)
}

#[cfg(test)]
mod tests {
    use super::super::world::tests::quiet;
    use super::*;

    #[test]
    fn of_quiet_guests_the_bound_is_the_knapsack() {
        // 10,000 MiB: two of three.
        let mut world = quiet(&[5000.0, 4800.0, 5300.0], 1000);
        assert_eq!(bound(&world, 0), 2);
        world.vms[2].weight = 3;
        world.vms[0].dirty.fill(2.0);
        // The third with the second does not fit, and the first is larger than it looks.
        assert_eq!(bound(&world, 0), 3);
    }
}

//! Who goes and in which order: several first drafts, the best of them improved until a budget is spent.
//!
//! Invariant: the budget is counted in slots looked at, not in time, so the same input takes the same
//! way; and a VM that was promised never gives its place to one that was not, or to a lighter one.

use super::draft::{Draft, Problem};

/// Slots that may be looked at for a first plan, and for one that follows another.
const STEPS_FIRST: u64 = 16_000_000;
const STEPS_AGAIN: u64 = 300_000;
/// Changes in vain after which there is nothing more to find, for each VM and in all.
const VAIN_PER_VM: u64 = 400;
const VAIN: u64 = 4_000;
/// How much of the capacity the sets of the knapsack fill: what changes is known only by the order.
const FILLS: [f64; 5] = [1.0, 0.97, 0.94, 0.9, 1.04];
/// Sizes that the knapsack tells apart, and most of its cells.
const SIZES: usize = 2_000;
const CELLS: usize = 4_000_000;
/// Outsiders that are tried after each change.
const TRIED: usize = 6;

/// Numbers that a seed decides (splitmix64).
#[derive(Debug)]
struct Lots(u64);

impl Lots {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }

    /// One below `end`, small ones more often.
    fn low(&mut self, end: usize) -> usize {
        let (a, b) = (self.below(end), self.below(end));
        a.min(b)
    }
}

/// The best draft that was found. `hint` are items as the plan before had them, lane by lane.
pub(super) fn search(problem: &Problem<'_>, hint: &[Vec<usize>], seed: u64) -> Draft {
    let mut steps = 0;
    let by_density = by_density(problem);
    let held = held(problem, &mut steps);
    let is_again = hint.iter().any(|lane| !lane.is_empty());
    let budget = if is_again { STEPS_AGAIN } else { STEPS_FIRST };
    let mut best = held.clone();
    let mut consider = |mut draft: Draft, then: &[usize], steps: &mut u64| {
        append(problem, &mut draft, then, steps);
        append(problem, &mut draft, &by_density, steps);
        squeeze_in(problem, &mut draft, &by_density, budget / 2, steps);
        if is_better(problem, &draft, &best) {
            best = draft;
        }
    };
    if is_again {
        consider(as_before(problem, hint, &held, &mut steps), &[], &mut steps);
    }
    let mut going_on = held.clone();
    go_on(problem, &mut going_on, &mut steps);
    // The plan before is good already where there is one.
    let fills = if is_again { &FILLS[..1] } else { &FILLS[..] };
    let starts = if is_again { &[&going_on][..] } else { &[&held, &going_on][..] };
    let chosen: Vec<Vec<usize>> = fills
        .iter()
        .map(|fill| {
            let chosen = knapsack(problem, *fill);
            by_density.iter().copied().filter(|&item| chosen[item]).collect()
        })
        .collect();
    for start in starts {
        consider(Draft::clone(start), &[], &mut steps);
        for chosen in &chosen {
            consider(Draft::clone(start), chosen, &mut steps);
        }
    }
    improve(problem, best, &by_density, seed, budget.saturating_sub(steps))
}

fn by_density(problem: &Problem<'_>) -> Vec<usize> {
    let mut order: Vec<usize> = (0..problem.items.len()).collect();
    let density = |item: usize| problem.items[item].density;
    order.sort_by(|&a, &b| density(b).total_cmp(&density(a)).then(a.cmp(&b)));
    order
}

/// More weight, or the same in less time.
fn is_better(problem: &Problem<'_>, one: &Draft, other: &Draft) -> bool {
    let more = one.weight - other.weight;
    let noise = 1e-9 * one.weight.max(other.weight);
    more > noise || (more >= -noise && problem.slack(one) > problem.slack(other))
}

/// Those that were promised: as many as arrive in time, the weightiest first.
fn held(problem: &Problem<'_>, steps: &mut u64) -> Draft {
    let mut held: Vec<usize> =
        (0..problem.items.len()).filter(|&item| problem.items[item].is_held).collect();
    held.sort_by(|&a, &b| {
        let (a_of, b_of) = (&problem.items[a], &problem.items[b]);
        b_of.weight.total_cmp(&a_of.weight).then(b_of.density.total_cmp(&a_of.density))
    });
    let mut by_weight = Draft::new(problem);
    append(problem, &mut by_weight, &held, steps);
    squeeze_in(problem, &mut by_weight, &held, u64::MAX, steps);
    // Those under way go on, if nobody who is promised loses by it.
    let mut going_on = Draft::new(problem);
    for &item in &held {
        if let Some(going) = problem.items[item].under_way {
            let at = (going.lane, going_on.order[going.lane].len());
            going_on.insert(problem, at, item, steps);
        }
    }
    append(problem, &mut going_on, &held, steps);
    squeeze_in(problem, &mut going_on, &held, u64::MAX, steps);
    if held.iter().all(|&item| going_on.goes(item) || !by_weight.goes(item)) {
        going_on
    } else {
        by_weight
    }
}

/// Puts those under way first on their lanes, where they fit.
fn go_on(problem: &Problem<'_>, draft: &mut Draft, steps: &mut u64) {
    for (item, of) in problem.items.iter().enumerate() {
        if let Some(going) = of.under_way.filter(|_| !draft.goes(item)) {
            draft.insert(problem, (going.lane, 0), item, steps);
        }
    }
}

/// The plan before, as far as it still holds, with the promised ones of `held` that it lacks.
fn as_before(problem: &Problem<'_>, hint: &[Vec<usize>], held: &Draft, steps: &mut u64) -> Draft {
    let mut draft = Draft::new(problem);
    for (lane, items) in hint.iter().enumerate() {
        for &item in items {
            if !draft.goes(item) && problem.items[item].lanes.contains(&lane) {
                let at = (lane, draft.order[lane].len());
                draft.insert(problem, at, item, steps);
            }
        }
    }
    let keeps = (0..problem.items.len()).all(|item| draft.goes(item) || !held.goes(item));
    if keeps { draft } else { held.clone() }
}

/// Puts items behind the others, each on the lane where it arrives first.
fn append(problem: &Problem<'_>, draft: &mut Draft, items: &[usize], steps: &mut u64) {
    for &item in items {
        if draft.goes(item) {
            continue;
        }
        let mut lanes: Vec<(f64, usize)> = Vec::new();
        for &lane in &problem.items[item].lanes {
            if let Some(sent) = problem.send(lane, item, draft.end(problem, lane), steps) {
                lanes.push((sent.end, lane));
            }
        }
        lanes.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        for (_, lane) in lanes {
            let at = (lane, draft.order[lane].len());
            if draft.insert(problem, at, item, steps) {
                break;
            }
        }
    }
}

/// Tries a few places of every lane for those that did not fit behind the others, within a budget.
fn squeeze_in(
    problem: &Problem<'_>,
    draft: &mut Draft,
    items: &[usize],
    budget: u64,
    steps: &mut u64,
) {
    for &item in items {
        if *steps > budget {
            return;
        }
        for &lane in &problem.items[item].lanes {
            let len = draft.order[lane].len();
            for quarter in 0..4 {
                if draft.goes(item) {
                    break;
                }
                draft.insert(problem, (lane, len * quarter / 4), item, steps);
            }
        }
    }
}

/// The set of most weight whose bytes fit in a share of what all lanes carry.
fn knapsack(problem: &Problem<'_>, fill: f64) -> Vec<bool> {
    let clock = &problem.clock;
    let carried = |link: &[f64]| -> f64 {
        let slot = |(slot, rate): (usize, &f64)| {
            let from = (slot as f64 * clock.slot_s).max(clock.now);
            let to = ((slot + 1) as f64 * clock.slot_s).min(clock.deadline);
            rate * (to - from).max(0.0)
        };
        link.iter().enumerate().map(slot).sum()
    };
    let capacity: f64 = problem.lanes.iter().map(|lane| carried(&lane.link)).sum::<f64>() * fill;
    let count = problem.items.len();
    let sizes = (CELLS / count.max(1)).clamp(32, SIZES);
    let size = |item: usize| {
        ((problem.items[item].mib / capacity.max(f64::MIN_POSITIVE) * sizes as f64).round())
            .clamp(1.0, (sizes + 1) as f64) as usize
    };
    let mut worth = vec![0.0_f64; sizes + 1];
    let mut takes = vec![false; count * (sizes + 1)];
    for item in 0..count {
        for room in (size(item)..=sizes).rev() {
            let with = worth[room - size(item)] + problem.items[item].weight;
            if with > worth[room] {
                worth[room] = with;
                takes[item * (sizes + 1) + room] = true;
            }
        }
    }
    let mut chosen = vec![false; count];
    let mut room = sizes;
    for item in (0..count).rev() {
        if takes[item * (sizes + 1) + room] {
            chosen[item] = true;
            room -= size(item);
        }
    }
    chosen
}

/// Changes a draft by lot and keeps what is not worse, until the budget is spent.
fn improve(
    problem: &Problem<'_>,
    mut best: Draft,
    by_density: &[usize],
    seed: u64,
    budget: u64,
) -> Draft {
    let mut lots = Lots(seed);
    let (mut steps, mut vain) = (0, 0);
    let vain_max = VAIN + VAIN_PER_VM * problem.items.len() as u64;
    // Copying a draft costs as well.
    let copying = 20 + problem.items.len() as u64 / 10;
    while steps < budget && vain < vain_max {
        steps += copying;
        let mut draft = best.clone();
        if !change(problem, &mut draft, by_density, &mut lots, &mut steps) {
            vain += 1;
        } else if is_better(problem, &draft, &best) {
            vain = if draft.weight > best.weight { 0 } else { vain + 1 };
            best = draft;
        } else {
            vain += 1;
        }
    }
    best
}

/// Takes someone out or elsewhere, and lets others in; false if someone promised lost by it.
fn change(
    problem: &Problem<'_>,
    draft: &mut Draft,
    by_density: &[usize],
    lots: &mut Lots,
    steps: &mut u64,
) -> bool {
    if problem.lanes.is_empty() || problem.items.is_empty() {
        return false;
    }
    let lane = lots.below(problem.lanes.len());
    let mut out = Vec::new();
    let moves_only = lots.below(2) == 0;
    let count = if moves_only { 1 + lots.below(2) } else { 1 + lots.below(3) };
    for _ in 0..count {
        if let len @ 1.. = draft.order[lane].len() {
            let at = lots.below(len);
            out.push(draft.remove(problem, (lane, at), steps));
        }
    }
    if !moves_only {
        // Outsiders first, the dense ones more often.
        let outsiders: Vec<usize> = by_density
            .iter()
            .copied()
            .filter(|&item| !draft.goes(item) && !out.contains(&item))
            .collect();
        for _ in 0..TRIED.min(outsiders.len()) {
            let item = outsiders[lots.low(outsiders.len())];
            let lanes = &problem.items[item].lanes;
            let into = if lanes.contains(&lane) { lane } else { lanes[lots.below(lanes.len())] };
            let at = lots.below(draft.order[into].len() + 1);
            if !draft.goes(item) {
                draft.insert(problem, (into, at), item, steps);
            }
        }
    }
    for item in out {
        let lanes = &problem.items[item].lanes;
        let elsewhere = lanes[lots.below(lanes.len())];
        let into = if lots.below(3) == 0 { elsewhere } else { lane };
        let at = lots.below(draft.order[into].len() + 1);
        let is_back = draft.insert(problem, (into, at), item, steps)
            || draft.insert(problem, (lane, draft.order[lane].len()), item, steps);
        if !is_back && (problem.items[item].is_held || moves_only) {
            return false;
        }
    }
    true
}

/// The dense ones first, and those that were promised before them where that makes them safer, as long
/// as everyone still arrives: whatever comes, the least is lost then.
pub(super) fn settle(problem: &Problem<'_>, draft: &mut Draft) {
    let mut steps = 0;
    for lane in 0..problem.lanes.len() {
        let mut sorted = draft.order[lane].clone();
        let of = |item: usize| &problem.items[item];
        let goes_on = |item: usize| of(item).under_way.is_some_and(|going| going.lane == lane);
        sorted.sort_by(|&a, &b| {
            goes_on(b)
                .cmp(&goes_on(a))
                .then(of(b).is_held.cmp(&of(a).is_held))
                .then(of(b).density.total_cmp(&of(a).density))
        });
        if draft.reorder(problem, lane, &sorted, &mut steps) {
            continue;
        }
        // Not all at once: one place at a time.
        for at in 1..draft.order[lane].len() {
            let mut order = draft.order[lane].clone();
            let item = order[at];
            let denser = |other: usize| of(item).density > of(other).density && !goes_on(other);
            let mut to = at;
            while to > 0 && denser(order[to - 1]) {
                to -= 1;
            }
            if to < at {
                order.remove(at);
                order.insert(to, item);
                draft.reorder(problem, lane, &order, &mut steps);
            }
        }
    }
}

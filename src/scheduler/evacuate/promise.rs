//! Who is promised: those that arrive although the link gives less and the guests change more.
//!
//! Invariant: a promise rests on the cautious forecasts, for the VM and for everyone before it on its
//! lane; one that was made before is kept while its VM arrives by them, the reserve spent if need be.

use super::draft::{Draft, Problem};

/// Which items are promised. Those go before the others where everyone still arrives.
pub(super) fn promise(problem: &Problem<'_>, draft: &mut Draft, reserve_s: f64) -> Vec<bool> {
    let mut promised = vec![false; problem.items.len()];
    for lane in 0..problem.lanes.len() {
        secure(problem, draft, lane);
        // Who could be promised if the others stood back, and whether they can.
        let able = sure(problem, &draft.order[lane], lane, reserve_s, true);
        let order = &draft.order[lane];
        let is_first = |at: usize| able[at] || (at == 0 && goes_on(problem, order[0], lane));
        let (first, rest): (Vec<usize>, Vec<usize>) =
            (0..order.len()).partition(|&at| is_first(at));
        let order: Vec<usize> = first.into_iter().chain(rest).map(|at| order[at]).collect();
        let stands = draft.reorder(problem, lane, &order, &mut 0);
        let sure = sure(problem, &draft.order[lane], lane, reserve_s, stands);
        for (item, sure) in draft.order[lane].iter().zip(sure) {
            promised[*item] = sure;
        }
    }
    promised
}

fn goes_on(problem: &Problem<'_>, item: usize, lane: usize) -> bool {
    problem.items[item].under_way.is_some_and(|going| going.lane == lane)
}

/// Which of an order arrive by the cautious forecasts. One that does not is passed over if it
/// `stands_back`; else nobody after it is sure. One that is under way takes its time in any case.
fn sure(
    problem: &Problem<'_>,
    order: &[usize],
    lane: usize,
    reserve_s: f64,
    stands_back: bool,
) -> Vec<bool> {
    let mut now = Some(problem.clock.now);
    let mut arrives = |item: usize| {
        let start = now?;
        let reserve_s = if problem.items[item].is_held { 0.0 } else { reserve_s };
        let cautious = problem.send_cautious(lane, item, start);
        let sent = cautious.filter(|sent| sent.end + reserve_s <= problem.clock.deadline);
        if start <= problem.clock.now && goes_on(problem, item, lane) {
            now = cautious.or_else(|| problem.send(lane, item, start, &mut 0)).map(|sent| sent.end);
        } else if sent.is_some() || !stands_back {
            now = sent.map(|sent| sent.end);
        }
        sent
    };
    order.iter().map(|&item| arrives(item).is_some()).collect()
}

/// Lets those that were promised before go first as far as they need it to arrive by the cautious
/// forecasts, the weightiest before all; whoever is not promised may lose its place by that.
fn secure(problem: &Problem<'_>, draft: &mut Draft, lane: usize) {
    let is_held = |item: usize| problem.items[item].is_held;
    let late = |order: &[usize]| {
        let sure = sure(problem, order, lane, 0.0, false);
        order.iter().zip(sure).any(|(&item, sure)| is_held(item) && !sure)
    };
    if !late(&draft.order[lane]) {
        return;
    }
    let (as_they_are, rest): (Vec<usize>, Vec<usize>) =
        draft.order[lane].iter().partition(|&&item| is_held(item));
    let mut by_weight = as_they_are.clone();
    by_weight.sort_by(|&a, &b| problem.items[b].weight.total_cmp(&problem.items[a].weight));
    for held in [&as_they_are, &by_weight] {
        let order = [&**held, &*rest].concat();
        if !late(&order) && draft.reorder(problem, lane, &order, &mut 0) {
            return;
        }
    }
    // Someone else has to stay: without the others first, then those of them that still fit.
    for at in (0..draft.order[lane].len()).rev() {
        if !is_held(draft.order[lane][at]) {
            draft.remove(problem, (lane, at), &mut 0);
        }
    }
    if late(&as_they_are) {
        draft.reorder(problem, lane, &by_weight, &mut 0);
    }
    for item in rest {
        let at = (lane, draft.order[lane].len());
        draft.insert(problem, at, item, &mut 0);
    }
}

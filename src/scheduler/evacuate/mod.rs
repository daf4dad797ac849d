//! The evacuation of a site: who gets out before a deadline, in which order, and who does not.
//!
//! Invariant: [`evacuate`] is data in, data out, like [`crate::plan`]. Over one stream of a path VMs go one
//! after the other; everyone who goes is expected to arrive in time and to find room; whoever was
//! promised before is dropped only for someone weightier who was promised too, or when nothing lets it
//! arrive.
//!
//! Reading order: [`need`] (what is known), [`departure`] (what comes out), `transfer` (how long one VM
//! takes), `draft` (orders in the making), `search` (which order), then this file.

pub mod departure;
mod draft;
pub mod need;
mod promise;
mod search;
mod transfer;

use self::departure::{Departure, Goes, Left, SavedBy, Stays};
use self::draft::{Draft, Going, Item, Lane, Problem};
use self::need::{Evacuation, Guest};
use self::transfer::{Clock, at};
use crate::state::InvalidState;

/// Starts at which a VM's bytes are predicted, to know its density.
const STARTS: usize = 8;
/// Points of the curve.
const CURVE: i64 = 10;

/// Plans an evacuation, or what is left of one.
///
/// To plan anew after a shock, give the new forecasts, what was sent so far, and the plan before as
/// [`Evacuation::previous`]. `seed` decides which changes of an order are tried.
///
/// # Errors
///
/// When the input contradicts itself. A deadline that has passed is no error: everyone stays, and the
/// plan says why.
pub fn evacuate(need: &Evacuation, now_s: i64, seed: u64) -> Result<Departure, InvalidState> {
    need.check(now_s)?;
    let since = |time_s: i64| (time_s - need.slots_from_s) as f64;
    let clock = Clock {
        slot_s: f64::from(need.slot_s),
        now: since(now_s),
        deadline: since(need.deadline_s).max(0.0),
        pause_s: need.pause_s,
    };
    let mut problem =
        Problem { clock, lanes: lanes(need, &clock), items: Vec::new(), room: room(need) };
    let mut stays = Vec::new();
    let held = |guest: &Guest| {
        need.previous.as_ref().is_some_and(|before| before.promised.contains(&guest.name))
    };
    for (number, guest) in need.guests.iter().enumerate() {
        match item(need, &problem, number, held(guest)) {
            Ok(item) => problem.items.push(item),
            Err(because) => stays.push(stay(guest, because)),
        }
    }
    let hint = hint(need, &problem);
    let mut draft = search::search(&problem, &hint, seed);
    search::settle(&problem, &mut draft);
    let promised = promise::promise(&problem, &mut draft, f64::from(need.reserve_s));
    for (number, of) in problem.items.iter().enumerate().filter(|(number, _)| !draft.goes(*number))
    {
        stays.push(stay(&need.guests[of.guest], outweighed(&problem, &draft, number)));
    }
    stays.sort_by(|a, b| b.weight.total_cmp(&a.weight).then(a.vm.cmp(&b.vm)));
    Ok(departure(need, (now_s, seed), (&problem, &draft, &promised), stays))
}

/// The streams of all paths; a path without time is none.
fn lanes<'a>(need: &'a Evacuation, clock: &Clock) -> Vec<Lane> {
    let mut lanes = Vec::new();
    let first = (clock.now / clock.slot_s) as usize;
    for (number, path) in need.paths.iter().enumerate() {
        let parts = path.streams as f64;
        let part = |rates: &'a [f64]| rates.iter().map(|rate| rate / parts).collect::<Vec<_>>();
        let link = part(&path.leftover_mib_s);
        let cautious = match &*path.cautious_mib_s {
            [] => link.clone(),
            rates => part(rates),
        };
        let fastest = link.iter().skip(first).copied().fold(0.0, f64::max);
        let leads_to =
            |(at, target): (usize, &need::Target)| (target.site == path.to).then_some(at);
        let targets: Vec<usize> = need.targets.iter().enumerate().filter_map(leads_to).collect();
        lanes.extend((0..path.streams).map(|stream| {
            let (link, cautious, targets) = (link.clone(), cautious.clone(), targets.clone());
            Lane { path: number, stream, link, cautious, fastest, targets }
        }));
    }
    lanes
}

fn room(need: &Evacuation) -> Vec<(u64, f64)> {
    need.targets.iter().map(|target| (target.memory_mib, target.cpu)).collect()
}

/// A VM as the search sees it, or why it cannot be saved whatever the order.
fn item<'a>(
    need: &'a Evacuation,
    problem: &Problem<'_>,
    number: usize,
    is_held: bool,
) -> Result<Item<'a>, Left> {
    let (guest, clock) = (&need.guests[number], &problem.clock);
    if guest.is_pinned {
        return Err(Left::Pinned);
    }
    if clock.deadline <= clock.now {
        return Err(Left::Late);
    }
    let leads = |lane: &Lane| need.paths[lane.path].from == guest.site;
    let mut lanes: Vec<usize> =
        (0..problem.lanes.len()).filter(|&lane| leads(&problem.lanes[lane])).collect();
    if lanes.is_empty() {
        return Err(Left::NoPath);
    }
    let takes = |&target: &usize| {
        problem.room[target].0 >= guest.memory_mib && problem.room[target].1 >= guest.cpu
    };
    lanes.retain(|&lane| problem.lanes[lane].targets.iter().any(takes));
    if lanes.is_empty() {
        return Err(Left::NoHost);
    }
    let whole = guest.memory_mib.saturating_add(guest.disk_mib) as f64;
    let high = &guest.dirty_high_mib_s;
    let mut item = Item {
        guest: number,
        weight: guest.weight,
        whole,
        memory_mib: guest.memory_mib,
        cpu: guest.cpu,
        dirty: &guest.dirty_mib_s,
        high: if high.is_empty() { &guest.dirty_mib_s } else { high },
        lanes: Vec::new(),
        density: 0.0,
        mib: f64::INFINITY,
        is_held,
        under_way: going(need, problem, guest),
    };
    lanes.retain(|&lane| {
        let sent = |start| send_one(problem, &item, lane, start);
        let Some(first) = sent(clock.now) else { return false };
        let step = (clock.deadline - clock.now) / STARTS as f64;
        let later = (1..STARTS).filter_map(|at| sent(clock.now + at as f64 * step));
        let least = later.fold(first, f64::min);
        item.mib = item.mib.min(least);
        true
    });
    if lanes.is_empty() {
        return Err(too_slow(problem, &item, need));
    }
    item.density = item.weight / item.mib.max(1.0);
    item.lanes = lanes;
    Ok(item)
}

/// MiB that an item sends over a lane from a time on, if it arrives.
fn send_one(problem: &Problem<'_>, item: &Item<'_>, lane: usize, start: f64) -> Option<f64> {
    let left = match item.under_way {
        Some(going) if going.lane == lane && start <= problem.clock.now => going.left,
        _ => item.whole,
    };
    let load = transfer::Load { whole: item.whole, left, dirty: item.dirty };
    transfer::send(&problem.clock, &problem.lanes[lane].link, load, start, &mut 0)
        .map(|sent| sent.mib)
}

/// Which stream a migration that runs has: the first of its path's that no VM before it has.
fn going(need: &Evacuation, problem: &Problem<'_>, guest: &Guest) -> Option<Going> {
    let under_way = guest.under_way.as_ref()?;
    let mut lanes =
        (0..problem.lanes.len()).filter(|&lane| problem.lanes[lane].path == under_way.path);
    let is_taken = |lane: &usize| {
        let has = |item: &Item<'_>| item.under_way.is_some_and(|going| going.lane == *lane);
        problem.items.iter().any(has)
    };
    let lane = lanes.find(|lane| !is_taken(lane))?;
    let whole = guest.memory_mib.saturating_add(guest.disk_mib) as f64;
    let left = (whole - under_way.sent_mib).max(0.0);
    (under_way.target < need.targets.len()).then_some(Going {
        lane,
        target: under_way.target,
        left,
    })
}

/// Why an item does not arrive even if it goes first.
fn too_slow(problem: &Problem<'_>, item: &Item<'_>, need: &Evacuation) -> Left {
    let clock = &problem.clock;
    let first = (clock.now / clock.slot_s) as usize;
    let end = (clock.deadline / clock.slot_s).ceil() as usize;
    let lanes = || {
        problem
            .lanes
            .iter()
            .filter(|lane| need.paths[lane.path].from == need.guests[item.guest].site)
    };
    let rates = |slot: usize| lanes().map(move |lane| at(&lane.link, slot)).fold(0.0, f64::max);
    let dirty = (first..end).map(|slot| at(item.dirty, slot)).fold(f64::INFINITY, f64::min);
    let is_never_quiet = (first..end).all(|slot| at(item.dirty, slot) >= rates(slot));
    if is_never_quiet {
        let leftover_mib_s = (first..end).map(rates).fold(0.0, f64::max);
        return Left::NeverQuiet { dirty_mib_s: dirty, leftover_mib_s };
    }
    let left_s = (clock.deadline - clock.now) as i64;
    Left::TooBig { mib: item.whole as u64, left_s }
}

fn outweighed(problem: &Problem<'_>, draft: &Draft, number: usize) -> Left {
    let clock = &problem.clock;
    let lanes = &problem.items[number].lanes;
    let alone = |&lane: &usize| problem.send(lane, number, clock.now, &mut 0);
    let soonest =
        lanes.iter().filter_map(alone).map(|sent| sent.end).fold(clock.deadline, f64::min);
    let left = lanes.iter().map(|&lane| clock.deadline - draft.end(problem, lane));
    Left::Outweighed {
        needs_s: (soonest - clock.now).ceil() as i64,
        left_s: left.fold(0.0, f64::max) as i64,
    }
}

fn stay(guest: &Guest, because: Left) -> Stays {
    Stays { vm: guest.name.clone(), host: guest.host.clone(), weight: guest.weight, because }
}

/// The plan before, as items of each lane.
fn hint(need: &Evacuation, problem: &Problem<'_>) -> Vec<Vec<usize>> {
    let mut hint = vec![Vec::new(); problem.lanes.len()];
    let Some(before) = &need.previous else { return hint };
    let named = |item: usize| &*need.guests[problem.items[item].guest].name;
    let mut by_name: Vec<usize> = (0..problem.items.len()).collect();
    by_name.sort_by_key(|&item| named(item));
    for goes in &before.goes {
        let lane = problem
            .lanes
            .iter()
            .position(|lane| lane.stream == goes.stream && need.paths[lane.path].name == goes.path);
        let item = by_name.binary_search_by_key(&&*goes.vm, |&item| named(item));
        if let (Some(lane), Ok(at)) = (lane, item) {
            hint[lane].push(by_name[at]);
        }
    }
    // Whoever is under way goes on first.
    for (lane, items) in hint.iter_mut().enumerate() {
        let goes_on =
            |item: usize| problem.items[item].under_way.is_some_and(|going| going.lane == lane);
        items.sort_by_key(|&item| !goes_on(item));
    }
    hint
}

fn departure(
    need: &Evacuation,
    (now_s, seed): (i64, u64),
    (problem, draft, promised): (&Problem<'_>, &Draft, &[bool]),
    stays: Vec<Stays>,
) -> Departure {
    let mut goes = Vec::new();
    for (lane, order) in draft.order.iter().enumerate() {
        let of_lane = &problem.lanes[lane];
        let path = &need.paths[of_lane.path];
        for (place, &item) in order.iter().enumerate() {
            let of = &problem.items[item];
            let guest = &need.guests[of.guest];
            let start = draft.start(problem, lane, place);
            let sent = problem.send(lane, item, start, &mut 0);
            let (Some(sent), Some(target)) = (sent, draft.target_of[item]) else { continue };
            let end_s = need.slots_from_s + sent.end.ceil() as i64;
            goes.push(Goes {
                vm: guest.name.clone(),
                from: guest.host.clone(),
                to: need.targets[target].name.clone(),
                path: path.name.clone(),
                stream: of_lane.stream,
                share: 1.0 / path.streams as f64,
                start_s: need.slots_from_s + start.floor() as i64,
                end_s: end_s.min(need.deadline_s),
                mib: sent.mib.ceil() as u64,
                weight: of.weight,
                is_promised: promised[item],
                spare_s: (need.deadline_s - end_s).max(0),
                is_under_way: place == 0 && of.under_way.is_some_and(|going| going.lane == lane),
            });
        }
    }
    let mut sure: Vec<&Goes> = goes.iter().filter(|goes| goes.is_promised).collect();
    sure.sort_by(|a, b| b.weight.total_cmp(&a.weight).then(a.vm.cmp(&b.vm)));
    let promised: Vec<String> = sure.into_iter().map(|goes| goes.vm.clone()).collect();
    let before = need.previous.iter().flat_map(|before| &before.promised);
    let is_left = |vm: &&String| need.guests.iter().any(|guest| guest.name == **vm);
    let broken = before.filter(|vm| !promised.contains(vm)).filter(is_left).cloned().collect();
    let span = need.deadline_s - now_s;
    let point = |at: i64| {
        let at_s = now_s + span * at / CURVE;
        let arrived = || goes.iter().filter(move |goes| goes.end_s <= at_s);
        SavedBy {
            at_s,
            weight: sum(arrived().map(|goes| goes.weight)),
            promised: sum(arrived().filter(|goes| goes.is_promised).map(|goes| goes.weight)),
        }
    };
    Departure {
        now_s,
        deadline_s: need.deadline_s,
        seed,
        saved_weight: sum(goes.iter().map(|goes| goes.weight)),
        weight: sum(need.guests.iter().map(|guest| guest.weight)),
        promised,
        broken,
        curve: if span > 0 { (1..=CURVE).map(point).collect() } else { Vec::new() },
        goes,
        stays,
    }
}

/// Of nothing it is 0, where the standard one is -0, which people would read.
fn sum(weights: impl Iterator<Item = f64>) -> f64 {
    weights.fold(0.0, |sum, weight| sum + weight)
}

#[cfg(test)]
mod tests;

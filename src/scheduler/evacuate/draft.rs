//! Orders in the making: who goes over which lane, one after the other, and the room at the targets.
//!
//! Invariant: a draft only ever holds orders in which everyone arrives in time and finds room: changes
//! that would break that are refused and leave it as it was.

use super::transfer::{Clock, Load, Sent, send};

/// A stream of a path.
#[derive(Debug, Clone)]
pub(super) struct Lane {
    /// Index of its path.
    pub(super) path: usize,
    /// Which of the path's streams.
    pub(super) stream: usize,
    /// Its part of the path's expected leftover.
    pub(super) link: Vec<f64>,
    /// The same, cautiously.
    pub(super) cautious: Vec<f64>,
    /// Most of `link` from now on.
    pub(super) fastest: f64,
    /// Targets at its end.
    pub(super) targets: Vec<usize>,
}

/// A VM that may go.
#[derive(Debug, Clone)]
pub(super) struct Item<'a> {
    /// Index of its guest.
    pub(super) guest: usize,
    pub(super) weight: f64,
    pub(super) whole: f64,
    pub(super) memory_mib: u64,
    pub(super) cpu: f64,
    pub(super) dirty: &'a [f64],
    pub(super) high: &'a [f64],
    /// Lanes on which it arrives in time if it goes first.
    pub(super) lanes: Vec<usize>,
    /// Weight for each MiB that it is expected to send.
    pub(super) density: f64,
    /// MiB that it is expected to send.
    pub(super) mib: f64,
    /// Was promised by the plan before.
    pub(super) is_held: bool,
    pub(super) under_way: Option<Going>,
}

/// Where a VM is going now.
#[derive(Debug, Clone, Copy)]
pub(super) struct Going {
    pub(super) lane: usize,
    pub(super) target: usize,
    pub(super) left: f64,
}

/// What drafts are made of.
#[derive(Debug)]
pub(super) struct Problem<'a> {
    pub(super) clock: Clock,
    pub(super) lanes: Vec<Lane>,
    pub(super) items: Vec<Item<'a>>,
    /// Free memory and CPU of each target.
    pub(super) room: Vec<(u64, f64)>,
}

impl Problem<'_> {
    /// Sends an item over a lane from `start` on. One under way goes on only if it goes first.
    pub(super) fn send(
        &self,
        lane: usize,
        item: usize,
        start: f64,
        steps: &mut u64,
    ) -> Option<Sent> {
        let of = &self.items[item];
        let load = Load { whole: of.whole, left: self.left(lane, item, start), dirty: of.dirty };
        send(&self.clock, &self.lanes[lane].link, load, start, steps)
    }

    /// The same by the cautious forecasts.
    pub(super) fn send_cautious(&self, lane: usize, item: usize, start: f64) -> Option<Sent> {
        let of = &self.items[item];
        let load = Load { whole: of.whole, left: self.left(lane, item, start), dirty: of.high };
        send(&self.clock, &self.lanes[lane].cautious, load, start, &mut 0)
    }

    fn left(&self, lane: usize, item: usize, start: f64) -> f64 {
        let of = &self.items[item];
        match of.under_way {
            Some(going) if going.lane == lane && start <= self.clock.now => going.left,
            _ => of.whole,
        }
    }

    /// Seconds between the ends of lanes and the deadline, summed.
    pub(super) fn slack(&self, draft: &Draft) -> f64 {
        (0..self.lanes.len()).map(|lane| self.clock.deadline - draft.end(self, lane)).sum()
    }
}

/// Orders of all lanes.
#[derive(Debug, Clone)]
pub(super) struct Draft {
    /// Items of each lane, in the order of their going.
    pub(super) order: Vec<Vec<usize>>,
    /// When each of them arrives.
    ends: Vec<Vec<f64>>,
    /// The target of each item that goes.
    pub(super) target_of: Vec<Option<usize>>,
    room: Vec<(u64, f64)>,
    pub(super) weight: f64,
}

impl Draft {
    pub(super) fn new(problem: &Problem<'_>) -> Self {
        Self {
            order: vec![Vec::new(); problem.lanes.len()],
            ends: vec![Vec::new(); problem.lanes.len()],
            target_of: vec![None; problem.items.len()],
            room: problem.room.clone(),
            weight: 0.0,
        }
    }

    pub(super) fn goes(&self, item: usize) -> bool {
        self.target_of[item].is_some()
    }

    /// When the last one of a lane arrives.
    pub(super) fn end(&self, problem: &Problem<'_>, lane: usize) -> f64 {
        self.ends[lane].last().copied().unwrap_or(problem.clock.now)
    }

    /// When the one at a position of a lane starts.
    pub(super) fn start(&self, problem: &Problem<'_>, lane: usize, at: usize) -> f64 {
        if at == 0 { problem.clock.now } else { self.ends[lane][at - 1] }
    }

    /// The target with the least memory left of those that take the item.
    fn target(&self, problem: &Problem<'_>, lane: usize, item: usize) -> Option<usize> {
        let of = &problem.items[item];
        let fits =
            |target: usize| self.room[target].0 >= of.memory_mib && self.room[target].1 >= of.cpu;
        if let Some(going) = of.under_way.filter(|going| going.lane == lane && fits(going.target)) {
            return Some(going.target);
        }
        problem.lanes[lane].targets.iter().copied().filter(|&target| fits(target)).min_by(
            |&a, &b| {
                let (a, b) = (self.room[a], self.room[b]);
                a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
            },
        )
    }

    /// Times of a lane anew from a position on; false, and the draft unusable, if someone is late.
    fn retime(&mut self, problem: &Problem<'_>, lane: usize, from: usize, steps: &mut u64) -> bool {
        self.ends[lane].truncate(from);
        let mut now = self.start(problem, lane, from);
        for at in from..self.order[lane].len() {
            let Some(sent) = problem.send(lane, self.order[lane][at], now, steps) else {
                return false;
            };
            self.ends[lane].push(sent.end);
            now = sent.end;
        }
        true
    }

    /// Puts an item into a lane, if everyone still arrives in time and it finds room.
    pub(super) fn insert(
        &mut self,
        problem: &Problem<'_>,
        (lane, at): (usize, usize),
        item: usize,
        steps: &mut u64,
    ) -> bool {
        *steps += 1;
        let of = &problem.items[item];
        let left = of.under_way.map_or(of.whole, |going| going.left.min(of.whole));
        let least = left / problem.lanes[lane].fastest.max(f64::MIN_POSITIVE);
        // Nobody is faster than the fastest slot, and the pause sends a little.
        if self.end(problem, lane) + least > problem.clock.deadline + problem.clock.pause_s {
            return false;
        }
        let Some(target) = self.target(problem, lane, item) else { return false };
        let before = self.ends[lane].clone();
        self.order[lane].insert(at, item);
        if !self.retime(problem, lane, at, steps) {
            self.order[lane].remove(at);
            self.ends[lane] = before;
            return false;
        }
        self.room[target].0 -= of.memory_mib;
        self.room[target].1 -= of.cpu;
        self.target_of[item] = Some(target);
        self.weight += of.weight;
        true
    }

    /// Takes the item at a position out. The others move up, so nobody becomes late.
    pub(super) fn remove(
        &mut self,
        problem: &Problem<'_>,
        (lane, at): (usize, usize),
        steps: &mut u64,
    ) -> usize {
        let item = self.order[lane].remove(at);
        let of = &problem.items[item];
        if let Some(target) = self.target_of[item].take() {
            self.room[target].0 += of.memory_mib;
            self.room[target].1 += of.cpu;
        }
        self.weight -= of.weight;
        while !self.retime(problem, lane, at, steps) {
            // Only rounding gets here: the one that it made late goes.
            let late = self.ends[lane].len();
            let item = self.order[lane].remove(late);
            if let Some(target) = self.target_of[item].take() {
                self.room[target].0 += problem.items[item].memory_mib;
                self.room[target].1 += problem.items[item].cpu;
            }
            self.weight -= problem.items[item].weight;
        }
        item
    }

    /// Gives a lane another order of the same items, if all of them still arrive in time.
    pub(super) fn reorder(
        &mut self,
        problem: &Problem<'_>,
        lane: usize,
        order: &[usize],
        steps: &mut u64,
    ) -> bool {
        let same = self.order[lane].iter().zip(order).take_while(|(a, b)| a == b).count();
        let old = std::mem::replace(&mut self.order[lane], order.to_vec());
        let ends = self.ends[lane].clone();
        if self.retime(problem, lane, same, steps) {
            return true;
        }
        self.order[lane] = old;
        self.ends[lane] = ends;
        false
    }
}

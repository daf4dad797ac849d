//! "Never neither able": from every state that can be reached, what the agents do by themselves leads
//! to a guest that runs at one side.
//!
//! Invariant: a way out has no fault in it, and no decision of anybody's; the link works on it. The
//! space is the same that the checker explores, walked once more and kept as a graph.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;

use longhaul::migration::handover::TargetRecord;
use stateright::Model;

use super::world::{Qemu, World};
use super::{HandOver, Step};

/// A state from which nothing leads out, and how it is reached.
pub struct Stuck {
    pub steps: Vec<Step>,
    pub world: World,
}

/// Walks the whole space; gives its size, and the nearest state from which nothing leads out.
pub fn find_stuck(model: &HandOver) -> (usize, Option<Stuck>) {
    // Two hashes of 64 bits together are not met twice by chance.
    let hashers = (hasher(1), hasher(2));
    let key = |world: &World| (hashers.0.hash_one(world), hashers.1.hash_one(world));
    let mut known = HashMap::new();
    let mut parents: Vec<(u32, Option<Step>)> = Vec::new();
    let mut good = Vec::new();
    // For each state, those that lead to it by themselves.
    let mut before: Vec<Vec<u32>> = Vec::new();
    let mut queue = VecDeque::new();
    for world in model.init_states() {
        known.insert(key(&world), 0);
        parents.push((0, None));
        good.push(is_good(&world));
        before.push(Vec::new());
        queue.push_back((0, world));
    }
    let mut steps = Vec::new();
    while let Some((from, world)) = queue.pop_front() {
        steps.clear();
        model.actions(&world, &mut steps);
        for &step in &steps {
            let Some(next) = model.next_state(&world, step) else { continue };
            let new = parents.len() as u32;
            let to = *known.entry(key(&next)).or_insert(new);
            if to == new {
                parents.push((from, Some(step)));
                good.push(is_good(&next));
                before.push(Vec::new());
                queue.push_back((to, next));
            }
            if step.is_by_itself() {
                before[to as usize].push(from);
            }
        }
    }
    let mut able = good.clone();
    let mut queue: VecDeque<u32> =
        (0..able.len() as u32).filter(|&nth| able[nth as usize]).collect();
    while let Some(to) = queue.pop_front() {
        for &from in &before[to as usize] {
            if !std::mem::replace(&mut able[from as usize], true) {
                queue.push_back(from);
            }
        }
    }
    let stuck = able.iter().position(|&able| !able).map(|nth| way_to(model, &parents, nth as u32));
    (parents.len(), stuck)
}

fn hasher(seed: u64) -> impl BuildHasher {
    struct Seeded(u64);
    impl BuildHasher for Seeded {
        type Hasher = std::collections::hash_map::DefaultHasher;
        fn build_hasher(&self) -> Self::Hasher {
            let mut hasher = Self::Hasher::new();
            std::hash::Hasher::write_u64(&mut hasher, self.0);
            hasher
        }
    }
    Seeded(seed)
}

fn way_to(model: &HandOver, parents: &[(u32, Option<Step>)], mut nth: u32) -> Stuck {
    let mut steps = Vec::new();
    while let (parent, Some(step)) = parents[nth as usize] {
        steps.push(step);
        nth = parent;
    }
    steps.reverse();
    let mut world = model.init_states().remove(0);
    for &step in &steps {
        world = model.next_state(&world, step).unwrap();
    }
    Stuck { steps, world }
}

/// The guest runs at one side; or it has crashed, and one side alone may start it from its disks.
fn is_good(world: &World) -> bool {
    let runs = [world.source.qemu, world.target.qemu].map(|qemu| qemu == Qemu::Running);
    match runs {
        [true, false] | [false, true] => true,
        [true, true] => false,
        [false, false] => {
            let may_start = [
                world.source.book && world.source.ended,
                world.target.book
                    && world.target.read == Some(TargetRecord::Settled)
                    && world.target.machine.is_none(),
            ];
            world.past.crashed && may_start[0] != may_start[1]
        }
    }
}

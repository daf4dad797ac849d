//! What is sent in order, kept until the peer says how much of it has arrived.
//!
//! Invariant: an item is let go only when the peer has counted it, so whatever a lost connection
//! took with it can be sent again; a count that goes back, or beyond what was sent, is an error of
//! the peer's.

use std::collections::VecDeque;

use crate::frame::FrameError;

/// Items by their number, from 0. Pure: whoever sends them keeps their own place.
#[derive(Debug)]
pub(crate) struct Kept<T> {
    /// Names the items in errors.
    what: &'static str,
    /// Items that the peer has.
    seen: u64,
    items: VecDeque<T>,
}

impl<T> Kept<T> {
    pub(crate) fn new(what: &'static str) -> Self {
        Self { what, seen: 0, items: VecDeque::new() }
    }

    /// Adds an item and returns how many there are with it, since the beginning.
    pub(crate) fn push(&mut self, item: T) -> u64 {
        self.items.push_back(item);
        self.seen + self.items.len() as u64
    }

    /// Items that the peer has, since the beginning.
    pub(crate) fn seen(&self) -> u64 {
        self.seen
    }

    /// Items that the peer is not known to have.
    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    /// The item of that number, if it is still needed and there already.
    pub(crate) fn get(&self, number: u64) -> Option<&T> {
        let place = number.checked_sub(self.seen)?;
        self.items.get(usize::try_from(place).ok()?)
    }

    /// The items that the peer is not known to have.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.items.iter()
    }

    /// The peer has the first `count` items: lets go of them, and returns those let go now.
    ///
    /// # Errors
    /// That cannot be.
    pub(crate) fn let_go(
        &mut self,
        count: u64,
    ) -> Result<impl Iterator<Item = T> + '_, FrameError> {
        let error = FrameError::Count { what: self.what };
        let more = count.checked_sub(self.seen).and_then(|more| usize::try_from(more).ok());
        let more = more.filter(|more| *more <= self.items.len()).ok_or(error)?;
        self.seen = count;
        Ok(self.items.drain(..more))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_let_go_and_nothing_else() {
        let mut kept = Kept::new("letters");
        for (count, letter) in (1..).zip("abcd".chars()) {
            assert_eq!(kept.push(letter), count);
        }
        assert_eq!(kept.let_go(2).unwrap().collect::<String>(), "ab");
        assert_eq!((kept.seen(), kept.len()), (2, 2));
        assert_eq!(
            [1, 2, 3, 4].map(|number| kept.get(number).copied()),
            [None, Some('c'), Some('d'), None]
        );
        assert_eq!(kept.iter().collect::<String>(), "cd");
        for wrong in [0, 1, 5, u64::MAX] {
            let error = kept.let_go(wrong).map(drop);
            assert_eq!(error, Err(FrameError::Count { what: "letters" }));
        }
        assert_eq!(kept.let_go(4).unwrap().count(), 2);
        assert_eq!(kept.push('e'), 5);
    }
}

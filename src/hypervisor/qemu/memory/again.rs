//! Memory told a second time: how a reader goes over from a stream to its successor.
//!
//! Invariant: what the reader gives out is one stream. The head, which every stream begins with,
//! comes once, and only if both say the same; a first stream that said more than a head and pages
//! has no successor. Which of a page's versions wins needs no care: the successor has every page.
//!
//! # Why
//!
//! QEMU before 9.0 under TCG misses writes: a page that the guest writes to just after its dirty
//! mark was taken may stay unmarked (fixed by "physmem: Fix migration dirty bitmap coherency with
//! TCG memory access"). What is sent while the guest runs may so be stale for good. From a VM that
//! is paused from the start to the end of a stream everything is sent as it is. So the first stream,
//! sent while the guest runs, is broken off, the VM is paused, and a second one has it all. Nearly
//! every page in it is what the first one said, and so costs no more than reading it: one pass over
//! memory, at this host's own speed, is added to the downtime.

use tokio::net::UnixStream;
use tokio::sync::oneshot::{Receiver, Sender, channel};

use crate::hypervisor::{MemoryEvent, MemoryLayout};

/// The longest head that is kept: a few hundred bytes but for devices that KVM's users have.
const HEAD_BYTES_MAX: usize = 16 << 20;

/// Announces that there will be a successor, and hands it over.
#[derive(Debug)]
pub(super) struct Teller {
    announce: Option<Sender<Receiver<UnixStream>>>,
    hand: Option<Sender<UnixStream>>,
}

impl Teller {
    /// From now on the reader leaves the first stream alone and waits. False if nobody reads.
    pub(super) fn announce(&mut self) -> bool {
        let (hand, taken) = channel();
        self.hand = Some(hand);
        self.announce.take().is_some_and(|announce| announce.send(taken).is_ok())
    }

    /// Whether that has been done and the successor is not there yet.
    pub(super) fn is_announced(&self) -> bool {
        self.hand.is_some()
    }

    /// The successor is there. False if nobody reads, or it was not announced.
    pub(super) fn hand_over(&mut self, stream: UnixStream) -> bool {
        self.hand.take().is_some_and(|hand| hand.send(stream).is_ok())
    }
}

/// A reader's side: whether there will be a successor, and what it must agree with.
#[derive(Debug)]
pub(super) struct Listener {
    announced: Option<Receiver<Receiver<UnixStream>>>,
    successor: Option<Receiver<UnixStream>>,
    head: Head,
}

/// Both sides.
pub(super) fn pair() -> (Teller, Listener) {
    let (announce, announced) = channel();
    let teller = Teller { announce: Some(announce), hand: None };
    (teller, Listener { announced: Some(announced), successor: None, head: Head::default() })
}

impl Listener {
    /// Returns once a successor is announced; never if none will be. May be dropped while it waits.
    pub(super) async fn announced(&mut self) {
        let told = match &mut self.announced {
            Some(announced) => announced.await,
            None => std::future::pending().await,
        };
        self.announced = None;
        match told {
            Ok(successor) => self.successor = Some(successor),
            Err(_) => std::future::pending().await,
        }
    }

    /// Whether a successor is announced and has not come.
    pub(super) fn is_announced(&mut self) -> bool {
        if let Some(announced) = &mut self.announced
            && let Ok(successor) = announced.try_recv()
        {
            self.announced = None;
            self.successor = Some(successor);
        }
        self.successor.is_some()
    }

    /// Waits for the announced successor; `None` if it will not come. May be dropped while it waits.
    pub(super) async fn successor(&mut self) -> Option<UnixStream> {
        let stream = match &mut self.successor {
            Some(successor) => successor.await.ok(),
            None => None,
        };
        self.successor = None;
        stream
    }

    /// The stream that comes now is the second one.
    pub(super) fn begin_again(&mut self) -> Result<(), &'static str> {
        self.head.begin_again()
    }

    /// Looks at the events from `from` on, and takes out those that were given out before.
    pub(super) fn filter(
        &mut self,
        events: &mut Vec<MemoryEvent>,
        from: usize,
    ) -> Result<(), &'static str> {
        self.head.filter(events, from)
    }
}

/// What came before the first page.
#[derive(Debug, Default)]
struct Head {
    bytes: Vec<u8>,
    layout: Option<MemoryLayout>,
    /// Pages came: what follows is no head.
    is_over: bool,
    /// In the second stream: how many of `bytes` it has repeated, and whether the layout.
    repeated: Option<(usize, bool)>,
    /// Why the first stream can have no successor.
    spoilt: Option<&'static str>,
}

const DIFFERS: &str = "the stream that was begun anew does not begin like the first one";

impl Head {
    fn begin_again(&mut self) -> Result<(), &'static str> {
        self.repeated = Some((0, false));
        self.is_over = false;
        self.spoilt.map_or(Ok(()), Err)
    }

    fn filter(&mut self, events: &mut Vec<MemoryEvent>, from: usize) -> Result<(), &'static str> {
        match &mut self.repeated {
            None => {
                events[from..].iter().for_each(|event| self.keep(event));
                Ok(())
            }
            Some(_) if self.is_over => self.spoilt.map_or(Ok(()), Err),
            Some(_) => {
                let new: Vec<MemoryEvent> = events.drain(from..).collect();
                for event in new {
                    match self.compare(event) {
                        Ok(event) => events.extend(event),
                        Err(reason) => {
                            // For every further call too.
                            (self.is_over, self.spoilt) = (true, Some(reason));
                            return Err(reason);
                        }
                    }
                }
                Ok(())
            }
        }
    }

    /// The first stream.
    fn keep(&mut self, event: &MemoryEvent) {
        match event {
            MemoryEvent::Zero { .. } | MemoryEvent::Page { .. } => self.is_over = true,
            MemoryEvent::Layout(layout) => self.layout = Some(layout.clone()),
            MemoryEvent::Opaque(_) if self.is_over => {
                self.spoilt = Some("its stream has more than pages where only pages are expected");
            }
            MemoryEvent::Opaque(bytes) if self.bytes.len() + bytes.len() > HEAD_BYTES_MAX => {
                self.spoilt = Some("its stream has too much before the first page");
            }
            MemoryEvent::Opaque(bytes) => self.bytes.extend_from_slice(bytes),
            MemoryEvent::NotUnderstood { .. } => {
                self.spoilt = Some("its stream is not understood and cannot be begun anew");
            }
            MemoryEvent::LastPass | MemoryEvent::PagesDone => {
                self.spoilt = Some("its stream ended before it could be begun anew");
            }
        }
    }

    /// The second stream: what of an event is new.
    fn compare(&mut self, event: MemoryEvent) -> Result<Option<MemoryEvent>, &'static str> {
        let Some((at, has_layout)) = &mut self.repeated else { return Ok(Some(event)) };
        if self.is_over {
            return Ok(Some(event));
        }
        match event {
            MemoryEvent::Opaque(mut bytes) => {
                let first = &self.bytes[*at..];
                let again = bytes.split_to(bytes.len().min(first.len()));
                if !first.starts_with(&again) {
                    return Err(DIFFERS);
                }
                *at += again.len();
                Ok((!bytes.is_empty()).then_some(MemoryEvent::Opaque(bytes)))
            }
            MemoryEvent::Layout(layout) => match &self.layout {
                Some(first) if *first == layout => {
                    *has_layout = true;
                    Ok(None)
                }
                Some(_) => Err(DIFFERS),
                None => {
                    *has_layout = true;
                    Ok(Some(MemoryEvent::Layout(layout)))
                }
            },
            event => {
                self.is_over = true;
                if *at < self.bytes.len() || (self.layout.is_some() && !*has_layout) {
                    return Err(DIFFERS);
                }
                Ok(Some(event))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::hypervisor::Region;

    fn opaque(text: &str) -> MemoryEvent {
        MemoryEvent::Opaque(Bytes::copy_from_slice(text.as_bytes()))
    }

    fn layout(bytes: u64) -> MemoryEvent {
        let regions = vec![Region { name: "pc.ram".into(), bytes }];
        MemoryEvent::Layout(MemoryLayout { section_id: 2, regions })
    }

    fn zero(page: u64) -> MemoryEvent {
        MemoryEvent::Zero { region: 0, page }
    }

    /// What comes out of both streams together, the second one in single events.
    fn told(
        first: &[MemoryEvent],
        second: &[MemoryEvent],
    ) -> Result<Vec<MemoryEvent>, &'static str> {
        let (mut head, mut out) = (Head::default(), first.to_vec());
        head.filter(&mut out, 0)?;
        head.begin_again()?;
        for event in second {
            let from = out.len();
            out.push(event.clone());
            head.filter(&mut out, from)?;
        }
        Ok(out)
    }

    #[test]
    fn a_head_comes_once_wherever_the_first_stream_broke_off() {
        let whole = [opaque("ab"), layout(8192), opaque("cd"), zero(0), zero(1)];
        let second = [opaque("a"), opaque("b"), layout(8192), opaque("cd"), zero(0), zero(1)];
        let after = [MemoryEvent::LastPass, MemoryEvent::PagesDone, opaque("device")];
        for broken_off in 0..=whole.len() {
            let first = &whole[..broken_off];
            let out = told(first, &[&second[..], &after].concat()).unwrap();
            let mut bytes = Vec::new();
            for event in &out {
                if let MemoryEvent::Opaque(some) = event {
                    bytes.extend_from_slice(some);
                }
            }
            assert_eq!(bytes, b"abcddevice", "{out:?}");
            assert_eq!(out.iter().filter(|event| **event == layout(8192)).count(), 1);
            assert_eq!(out[out.len() - 5..], [&[zero(0), zero(1)][..], &after].concat());
        }
    }

    #[test]
    fn another_head_is_refused() {
        let first = [opaque("ab"), layout(8192), zero(0)];
        assert_eq!(told(&first, &[opaque("ax")]), Err(DIFFERS));
        assert_eq!(told(&first, &[opaque("ab"), layout(4096)]), Err(DIFFERS));
        assert_eq!(told(&first, &[opaque("ab"), zero(0)]), Err(DIFFERS));
        assert_eq!(told(&first, &[opaque("a"), layout(8192), zero(0)]), Err(DIFFERS));
    }

    #[test]
    fn a_stream_of_more_than_a_head_and_pages_has_no_successor() {
        let not_understood = MemoryEvent::NotUnderstood { reason: String::new() };
        for event in [opaque("x"), not_understood, MemoryEvent::LastPass] {
            assert!(told(&[opaque("ab"), layout(8192), zero(0), event], &[]).is_err());
        }
    }

    #[tokio::test]
    async fn a_successor_is_waited_for_once_it_is_announced() {
        let (mut teller, mut listener) = pair();
        assert!(!listener.is_announced());
        assert!(teller.announce());
        listener.announced().await;
        assert!(listener.is_announced());
        drop(teller);
        assert!(listener.successor().await.is_none(), "it will not come");
        assert!(!listener.is_announced());

        let (mut teller, mut listener) = pair();
        let (stream, _other) = UnixStream::pair().unwrap();
        assert!(teller.announce() && teller.hand_over(stream));
        assert!(listener.is_announced());
        assert!(listener.successor().await.is_some());

        let (mut teller, listener) = pair();
        drop(listener);
        assert!(!teller.announce());
    }
}

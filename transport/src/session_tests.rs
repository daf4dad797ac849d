//! A paired peer that breaks the protocol: raw bytes on the streams of a real connection.

use std::sync::Arc;

use quinn::Connection;

use crate::frame::{BATCH_HEAD, BatchHead, MAX_BATCH_BYTES, MAX_CONTROL_FRAME, Receipt, Seen};
use crate::{Endpoint, Identity, RecvError, TrustedPeers, Tuning, greeting};

use super::*;

/// Two endpoints of one identity, which they trust.
fn ends() -> (Fingerprint, [Endpoint; 2]) {
    let home = tempfile::tempdir().unwrap();
    let identity = Identity::load_or_create(home.path()).unwrap();
    let trust = Arc::new(TrustedPeers::new([identity.fingerprint()]));
    let open = || {
        let addr = "127.0.0.1:0".parse().unwrap();
        Endpoint::bind(addr, &identity, trust.clone(), Tuning::default()).unwrap()
    };
    (identity.fingerprint(), [open(), open()])
}

/// Two ends of one session and the endpoints that keep them.
async fn session() -> (Session, Session, [Endpoint; 2]) {
    let (key, ends) = ends();
    let (from, to) = tokio::join!(ends[0].connect(ends[1].local_addr(), key), ends[1].accept());
    (from.unwrap(), to.unwrap(), ends)
}

/// A peer that has greeted and does what it likes with its streams.
struct Raw {
    connection: Connection,
    control: SendStream,
    _recv: RecvStream,
    /// The other end.
    to: Session,
    ends: [Endpoint; 2],
}

async fn raw() -> Raw {
    let (key, ends) = ends();
    let dialing = async {
        let dial = ends[0].dial(ends[1].local_addr(), key);
        let (connection, _place) = dial.first().await.unwrap();
        let (send, recv, _) = greeting::connect(&connection, &dial.hello(None)).await.unwrap();
        (connection, send, recv)
    };
    let ((connection, control, _recv), to) = tokio::join!(dialing, ends[1].accept());
    Raw { connection, control, _recv, to: to.unwrap(), ends }
}

/// Sends `bytes` as a batch stream and expects the receiver to end the session with `expected`.
async fn refused(bytes: &[u8], expected: FrameError) {
    let Raw { connection, to, .. } = &raw().await;
    let mut stream = connection.open_uni().await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream.finish().unwrap();
    let detail = expected.to_string();
    assert_eq!(to.closed().await, CloseReason::Violation { detail: detail.clone() });
    let reason = CloseReason::from_quic(&connection.closed().await, None);
    assert_eq!(reason, CloseReason::Refused { reason: detail.clone() });
    let error = to.recv_batch().await.unwrap_err();
    assert_eq!(error, RecvError::Closed(CloseReason::Violation { detail }));
}

fn head(kind: u8, class: u8, length: usize) -> [u8; BATCH_HEAD] {
    let mut head = BatchHead { class: Class::Seed, number: 0, offset: 0, length }.encode();
    (head[0], head[1]) = (kind, class);
    head
}

#[tokio::test]
async fn a_batch_that_claims_too_much_is_refused_by_its_head() {
    let length = MAX_BATCH_BYTES + 1;
    let limit = MAX_BATCH_BYTES;
    let expected = FrameError::TooLarge { what: "batch", length: length as u64, limit };
    refused(&head(2, 0, length), expected).await;
}

#[tokio::test]
async fn a_malformed_batch_is_refused() {
    let what = "batch";
    refused(&head(7, 0, 0), FrameError::UnknownKind(7)).await;
    refused(&head(2, 99, 0), FrameError::UnknownClass(99)).await;
    refused(&[2, 0], FrameError::Truncated { what }).await;
    refused(&head(2, 0, 1), FrameError::Truncated { what }).await;
    refused(&[&head(2, 0, 1)[..], b"ab"].concat(), FrameError::Trailing { what }).await;
}

#[tokio::test]
async fn a_batch_that_goes_on_where_nothing_was_is_refused() {
    let head = BatchHead { class: Class::Seed, number: 3, offset: 1, length: 2 };
    refused(&head.encode(), FrameError::Offset { number: 3, offset: 1 }).await;
}

#[tokio::test]
async fn a_control_frame_that_claims_too_much_is_refused_by_its_length() {
    let mut raw = raw().await;
    let (_, mut incoming) = raw.to.control().unwrap();
    let length = MAX_CONTROL_FRAME + 1;
    raw.control.write_all(&(length as u32).to_le_bytes()).await.unwrap();
    let limit = MAX_CONTROL_FRAME;
    let error = FrameError::TooLarge { what: "control frame", length: length as u64, limit };
    assert_eq!(incoming.recv::<u8>().await, Err(RecvError::Frame(error)));
    let reason = CloseReason::from_quic(&raw.connection.closed().await, None);
    assert!(matches!(reason, CloseReason::Refused { .. }));
}

#[tokio::test]
async fn a_control_stream_that_ends_in_a_frame_is_refused() {
    let mut raw = raw().await;
    let (_, mut incoming) = raw.to.control().unwrap();
    raw.control.write_all(&[9, 0, 0, 0, 1, 2]).await.unwrap();
    raw.control.finish().unwrap();
    let error = FrameError::Truncated { what: "control stream" };
    assert_eq!(incoming.recv::<u8>().await, Err(RecvError::Frame(error)));
}

#[tokio::test]
async fn a_receive_that_is_dropped_loses_nothing() {
    let mut raw = raw().await;
    let (_, mut incoming) = raw.to.control().unwrap();
    let frame = crate::frame::encode_control(&"a message in two halves").unwrap();
    let (first, second) = frame.split_at(9);
    raw.control.write_all(first).await.unwrap();
    // The reader has the first half in its hands when it is dropped.
    let half = tokio::time::timeout(Duration::from_millis(100), incoming.recv::<String>());
    assert!(half.await.is_err());
    raw.control.write_all(second).await.unwrap();
    let whole = incoming.recv::<String>().await.unwrap();
    assert_eq!(whole.as_deref(), Some("a message in two halves"));
}

#[tokio::test]
async fn who_looks_at_a_session_does_not_keep_it() {
    let (from, to, _ends) = session().await;
    let view = from.view();
    from.send_batch_acked(Class::Pages, b"", vec![Bytes::from_static(b"page")]).await.unwrap();
    let before = view.stats();
    assert_eq!(before.class(Class::Pages), from.stats().class(Class::Pages));
    drop(from);
    assert!(matches!(view.closed().await, CloseReason::Local { .. }));
    to.closed().await;
    let after = view.stats();
    assert_eq!(after.class(Class::Pages), before.class(Class::Pages));
    assert!(after.wire_bytes_sent >= before.wire_bytes_sent);
}

#[tokio::test]
async fn counts_that_cannot_be_are_refused() {
    for receipt in [
        Receipt::Seen(Seen { messages: 1, batches: 0 }, 0, false),
        Receipt::Seen(Seen { messages: 0, batches: u64::MAX }, 0, false),
        Receipt::Parts(vec![(0, 0)]),
    ] {
        let raw = raw().await;
        let (mut send, _recv) = raw.connection.open_bi().await.unwrap();
        send.write_all(&receipt.encode()).await.unwrap();
        assert!(matches!(raw.to.closed().await, CloseReason::Violation { .. }), "{receipt:?}");
    }
}

#[tokio::test]
async fn a_session_that_nobody_knows_is_not_taken_on() {
    let raw = raw().await;
    let dial = raw.ends[0].dial(raw.ends[1].local_addr(), raw.to.peer());
    let (connection, _place) = dial.first().await.unwrap();
    let greeted = greeting::connect(&connection, &dial.hello(Some(Seen::default()))).await;
    assert!(greeted.is_err());
    let reason = CloseReason::from_quic(&connection.closed().await, None);
    assert_eq!(reason, CloseReason::Forgotten);
    assert_eq!(raw.to.close_reason(), None, "the other session is not touched");
}

/// What a peer announces is not believed: memory is taken from a budget, batch by batch.
#[tokio::test]
async fn announcements_cost_no_more_than_the_budget() {
    let raw = raw().await;
    let mut streams = Vec::new();
    for number in 0..200 {
        let length = MAX_BATCH_BYTES;
        let head = BatchHead { class: Class::Seed, number, offset: 0, length };
        let mut stream = raw.connection.open_uni().await.unwrap();
        stream.write_all(&[&head.encode()[..], b"x"].concat()).await.unwrap();
        streams.push(stream);
    }
    let inbox = &raw.to.0.link.inbox;
    while inbox.bulk_room() > 0 {
        tokio::task::yield_now().await;
    }
    // What is left over for the urgent is left to them.
    let head = BatchHead { class: Class::HandOver, number: 200, offset: 0, length: 3 };
    let mut stream = raw.connection.open_uni().await.unwrap();
    stream.write_all(&[&head.encode()[..], b"now"].concat()).await.unwrap();
    stream.finish().unwrap();
    assert_eq!(raw.to.recv_batch().await.unwrap().body, "now");
    drop(streams);
}

#[tokio::test]
async fn a_peer_has_so_many_sessions_and_no_more() {
    let (key, ends) = ends();
    let connect = || ends[0].connect(ends[1].local_addr(), key);
    let mut sessions = Vec::new();
    for _ in 0..crate::MAX_SESSIONS_OF_A_PEER {
        let (from, to) = tokio::join!(connect(), ends[1].accept());
        sessions.push((from.unwrap(), to.unwrap()));
    }
    assert!(matches!(connect().await, Err(ConnectError::Busy { .. })));
    let (from, to) = sessions.pop().unwrap();
    from.close("done");
    to.closed().await;
    // Its place is free once nothing of it runs any more.
    while Arc::strong_count(&to.0.link) > 1 {
        tokio::task::yield_now().await;
    }
    let (again, accepted) = tokio::join!(connect(), ends[1].accept());
    again.unwrap();
    accepted.unwrap();
}

#[tokio::test]
async fn a_slow_stream_does_not_hold_up_the_others() {
    let (from, to, _ends) = session().await;
    let mut slow = Vec::new();
    for _ in 0..10 {
        let connection = &from.0.link.line().connection;
        let mut stream = connection.open_uni().await.unwrap();
        stream.write_all(&head(2, 0, 1000)).await.unwrap();
        slow.push(stream);
    }
    for number in 0..20u8 {
        from.send_batch(Class::Seed, &[number], vec![]).await.unwrap();
    }
    let mut seen: Vec<u8> = Vec::new();
    for _ in 0..20 {
        seen.extend(&to.recv_batch().await.unwrap().body);
    }
    seen.sort_unstable();
    assert!(seen.iter().copied().eq(0..20));
}

#[tokio::test]
async fn bulk_that_nobody_takes_leaves_room_for_the_urgent() {
    let (from, to, _ends) = session().await;
    let bulk = tokio::spawn({
        let from = from.clone();
        async move {
            let body = Bytes::from(vec![0; MAX_BATCH_BYTES]);
            loop {
                let sent = from.send_batch(Class::Blocks, b"", vec![body.clone()]);
                if sent.await.is_err() {
                    return;
                }
            }
        }
    });
    // Wait until the budget for bulk is used up and the rest stands in QUIC's windows.
    let full = crate::INBOUND_BULK_BYTES / MAX_BATCH_BYTES;
    while to.stats().class(Class::Blocks).received < (full * MAX_BATCH_BYTES) as u64 {
        tokio::task::yield_now().await;
    }
    from.send_batch_acked(Class::HandOver, b"now", vec![]).await.unwrap();
    let batch = to.recv_batch().await.unwrap();
    assert_eq!(batch.class, Class::HandOver, "the urgent comes out first");
    assert_eq!(batch.body, "now");
    from.close("done");
    bulk.await.unwrap();
}

//! A paired peer that breaks the protocol: raw bytes on the streams of a real connection.

use std::sync::Arc;

use crate::frame::{BATCH_HEAD, MAX_BATCH_BYTES, MAX_CONTROL_FRAME};
use crate::{Endpoint, Identity, TrustedPeers, Tuning};

use super::*;

/// Two ends of one session and the endpoints that keep them.
async fn session() -> (Session, Session, [Endpoint; 2]) {
    let home = tempfile::tempdir().unwrap();
    let identity = Identity::load_or_create(home.path()).unwrap();
    let trust = Arc::new(TrustedPeers::new([identity.fingerprint()]));
    let open = || {
        let addr = "127.0.0.1:0".parse().unwrap();
        Endpoint::bind(addr, &identity, trust.clone(), Tuning::default()).unwrap()
    };
    let ends = [open(), open()];
    let (from, to) = tokio::join!(
        ends[0].connect(ends[1].local_addr(), identity.fingerprint()),
        ends[1].accept()
    );
    (from.unwrap(), to.unwrap(), ends)
}

/// Sends `bytes` as a batch stream and expects the receiver to end the session with `expected`.
async fn refused(bytes: &[u8], expected: FrameError) {
    let (from, to, _ends) = session().await;
    let mut stream = from.0.connection.open_uni().await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream.finish().unwrap();
    let detail = expected.to_string();
    assert_eq!(to.closed().await, CloseReason::Violation { detail: detail.clone() });
    assert_eq!(from.closed().await, CloseReason::Refused { reason: detail.clone() });
    let error = to.recv_batch().await.unwrap_err();
    assert_eq!(error, RecvError::Closed(CloseReason::Violation { detail }));
}

fn head(kind: u8, class: u8, length: usize) -> [u8; BATCH_HEAD] {
    let [a, b, c, d] = (length as u32).to_le_bytes();
    [kind, class, a, b, c, d]
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
async fn a_control_frame_that_claims_too_much_is_refused_by_its_length() {
    let (from, to, _ends) = session().await;
    let (mut raw, _recv) = from.0.control.lock().unwrap().take().unwrap();
    let (_, mut incoming) = to.control().unwrap();
    let length = MAX_CONTROL_FRAME + 1;
    raw.write_all(&(length as u32).to_le_bytes()).await.unwrap();
    let limit = MAX_CONTROL_FRAME;
    let error = FrameError::TooLarge { what: "control frame", length: length as u64, limit };
    assert_eq!(incoming.recv::<u8>().await, Err(RecvError::Frame(error)));
    assert!(matches!(from.closed().await, CloseReason::Refused { .. }));
}

#[tokio::test]
async fn a_control_stream_that_ends_in_a_frame_is_refused() {
    let (from, to, _ends) = session().await;
    let (mut raw, _recv) = from.0.control.lock().unwrap().take().unwrap();
    let (_, mut incoming) = to.control().unwrap();
    raw.write_all(&[9, 0, 0, 0, 1, 2]).await.unwrap();
    raw.finish().unwrap();
    let error = FrameError::Truncated { what: "control stream" };
    assert_eq!(incoming.recv::<u8>().await, Err(RecvError::Frame(error)));
}

#[tokio::test]
async fn a_receive_that_is_dropped_loses_nothing() {
    let (from, to, _ends) = session().await;
    let (mut raw, _recv) = from.0.control.lock().unwrap().take().unwrap();
    let (_, mut incoming) = to.control().unwrap();
    let frame = crate::frame::encode_control(&"a message in two halves").unwrap();
    let (first, second) = frame.split_at(9);
    raw.write_all(first).await.unwrap();
    // The reader has the first half in its hands when it is dropped.
    let half =
        tokio::time::timeout(std::time::Duration::from_millis(100), incoming.recv::<String>());
    assert!(half.await.is_err());
    raw.write_all(second).await.unwrap();
    let whole = incoming.recv::<String>().await.unwrap();
    assert_eq!(whole.as_deref(), Some("a message in two halves"));
}

#[tokio::test]
async fn a_slow_stream_does_not_hold_up_the_others() {
    let (from, to, _ends) = session().await;
    let mut slow = Vec::new();
    for _ in 0..10 {
        let mut stream = from.0.connection.open_uni().await.unwrap();
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

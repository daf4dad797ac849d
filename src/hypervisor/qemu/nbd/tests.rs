//! The client against servers that lie, break off or answer out of order.

use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::codec::CodecError;
use super::{Command, NbdClient, NbdError};

const GREETING: &[u8; 18] = b"NBDMAGICIHAVEOPT\x00\x03";
const MIB: u64 = 1 << 20;

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out
}

/// A handshake that offers 1 MiB, writable, with one context of id 7.
async fn shake_hands(server: &mut DuplexStream) {
    server.write_all(GREETING).await.unwrap();
    server.read_u32().await.unwrap();
    loop {
        let mut head = [0; 16];
        server.read_exact(&mut head).await.unwrap();
        let option = u32::from_be_bytes(head[8..12].try_into().unwrap());
        let len = u32::from_be_bytes(head[12..16].try_into().unwrap());
        let mut data = vec![0; len as usize];
        server.read_exact(&mut data).await.unwrap();
        if option == 10 {
            let context = [&7u32.to_be_bytes()[..], b"base:allocation"].concat();
            server.write_all(&option_reply(10, 4, &context)).await.unwrap();
        }
        if option == 7 {
            let export = [&[0, 0][..], &MIB.to_be_bytes(), &0xdedu16.to_be_bytes()].concat();
            server.write_all(&option_reply(7, 3, &export)).await.unwrap();
        }
        server.write_all(&option_reply(option, 1, &[])).await.unwrap();
        if option == 7 {
            return;
        }
    }
}

async fn connected() -> (NbdClient, DuplexStream) {
    let (client, mut server) = tokio::io::duplex(1 << 20);
    let connecting = NbdClient::over(client, "disk", &["base:allocation"]);
    let (client, ()) = tokio::join!(connecting, shake_hands(&mut server));
    (client.unwrap(), server)
}

/// Cookie, offset and length of the next request.
async fn next_request(server: &mut DuplexStream) -> (u64, u64, u32) {
    let mut head = [0; 28];
    server.read_exact(&mut head).await.unwrap();
    (
        u64::from_be_bytes(head[8..16].try_into().unwrap()),
        u64::from_be_bytes(head[16..24].try_into().unwrap()),
        u32::from_be_bytes(head[24..28].try_into().unwrap()),
    )
}

fn chunk(cookie: u64, kind: u16, done: bool, payload: &[u8]) -> Vec<u8> {
    let mut out = 0x668e_33efu32.to_be_bytes().to_vec();
    out.extend(u16::from(done).to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend((payload.len() as u32).to_be_bytes());
    out.extend(payload);
    out
}

fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes()[..], bytes].concat()
}

#[tokio::test]
async fn replies_out_of_order_reach_who_asked() {
    let (client, mut server) = connected().await;
    let serve = async {
        let mut requests = Vec::new();
        for _ in 0..16 {
            requests.push(next_request(&mut server).await);
        }
        for (cookie, offset, len) in requests.into_iter().rev() {
            let content = vec![(offset / 512) as u8; len as usize];
            server.write_all(&chunk(cookie, 1, true, &data(offset, &content))).await.unwrap();
        }
    };
    let ask = async {
        let mut reads = Vec::new();
        for i in 0..16u64 {
            let client = client.clone();
            reads.push(tokio::spawn(async move { client.read(i * 512, 512).await }));
        }
        for (i, read) in reads.into_iter().enumerate() {
            assert_eq!(read.await.unwrap().unwrap(), vec![i as u8; 512]);
        }
    };
    tokio::join!(serve, ask);
}

#[tokio::test]
async fn a_seventeenth_request_waits_for_a_place() {
    let (client, mut server) = connected().await;
    let mut flushes = Vec::new();
    for _ in 0..17 {
        let client = client.clone();
        flushes.push(tokio::spawn(async move { client.flush().await }));
    }
    let mut cookies = Vec::new();
    for _ in 0..16 {
        cookies.push(next_request(&mut server).await.0);
    }
    tokio::task::yield_now().await;
    let mut more = [0; 28];
    let early =
        tokio::time::timeout(std::time::Duration::from_millis(50), server.read_exact(&mut more));
    assert!(early.await.is_err(), "a request beyond the limit was sent");
    // Its bytes, if any, would have been lost with the read above; the next one is whole.
    server.write_all(&chunk(cookies[0], 0, true, &[])).await.unwrap();
    cookies[0] = next_request(&mut server).await.0;
    for cookie in cookies {
        server.write_all(&chunk(cookie, 0, true, &[])).await.unwrap();
    }
    for flush in flushes {
        flush.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_request_whose_caller_left_does_not_disturb_the_others() {
    let (client, mut server) = connected().await;
    let left = {
        let client = client.clone();
        tokio::spawn(async move { client.read(0, 512).await })
    };
    let (first, ..) = next_request(&mut server).await;
    left.abort();
    assert!(left.await.unwrap_err().is_cancelled());
    let serve = async {
        let (second, ..) = next_request(&mut server).await;
        server.write_all(&chunk(first, 1, true, &data(0, &[1; 512]))).await.unwrap();
        server.write_all(&chunk(second, 1, true, &data(512, &[2; 512]))).await.unwrap();
    };
    let (bytes, ()) = tokio::join!(client.read(512, 512), serve);
    assert_eq!(bytes.unwrap(), vec![2; 512]);
}

#[tokio::test]
async fn an_error_in_the_middle_of_a_read_is_that_reads_error_only() {
    let (client, mut server) = connected().await;
    let serve = async {
        let (cookie, ..) = next_request(&mut server).await;
        server.write_all(&chunk(cookie, 1, false, &data(0, &[1; 512]))).await.unwrap();
        let error = [&5u32.to_be_bytes()[..], &4u16.to_be_bytes(), b"oops"].concat();
        server.write_all(&chunk(cookie, 0x8001, true, &error)).await.unwrap();
        let (cookie, ..) = next_request(&mut server).await;
        server
            .write_all(&chunk(cookie, 2, true, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]))
            .await
            .unwrap();
    };
    let ask = async {
        let error = client.read(0, 1024).await.unwrap_err();
        assert!(error.to_string().contains("input/output error: oops"), "{error}");
        assert_eq!(client.read(0, 512).await.unwrap(), vec![0; 512]);
    };
    tokio::join!(serve, ask);
}

#[tokio::test]
async fn a_lost_server_fails_everyone_who_waits_and_everyone_after() {
    let (client, mut server) = connected().await;
    let reads: Vec<_> = (0..3)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.read(0, 512).await })
        })
        .collect();
    for _ in 0..3 {
        next_request(&mut server).await;
    }
    drop(server);
    for read in reads {
        assert!(matches!(read.await.unwrap(), Err(NbdError::Lost { .. })));
    }
    assert!(matches!(client.flush().await, Err(NbdError::Lost { .. })));
}

#[tokio::test]
async fn a_read_that_is_not_wholly_answered_is_no_read() {
    let (client, mut server) = connected().await;
    let serve = async {
        let (cookie, ..) = next_request(&mut server).await;
        server.write_all(&chunk(cookie, 1, true, &data(0, &[1; 511]))).await.unwrap();
    };
    let (read, ()) = tokio::join!(client.read(0, 512), serve);
    let wrong = CodecError::Coverage { command: Command::Read, offset: 511 };
    assert!(matches!(read, Err(NbdError::Protocol { source, .. }) if source == wrong));
}

#[tokio::test]
async fn a_chunk_longer_than_asked_for_is_refused_before_it_is_stored() {
    let (client, mut server) = connected().await;
    let serve = async {
        let (cookie, ..) = next_request(&mut server).await;
        let mut bytes = chunk(cookie, 1, true, &data(0, &[]));
        bytes[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
        server.write_all(&bytes).await.unwrap();
    };
    let (read, ()) = tokio::join!(client.read(0, 512), serve);
    assert!(matches!(read, Err(NbdError::Protocol { .. })));
}

#[tokio::test]
async fn requests_that_do_not_fit_are_never_sent() {
    let (client, server) = connected().await;
    let illegal = |result: Result<(), NbdError>| {
        assert!(matches!(result, Err(NbdError::Illegal { .. })), "{result:?}");
    };
    illegal(client.read(MIB, 1).await.map(drop));
    illegal(client.read(0, 0).await.map(drop));
    illegal(client.read(0, super::READ_BYTES_MAX + 1).await.map(drop));
    illegal(client.write(MIB - 1, Bytes::from_static(b"ab")).await);
    illegal(client.write_zeroes(u64::MAX, 2, false).await);
    illegal(client.status(1, 0, 1, |_| {}).await);
    drop(server);
}

#[tokio::test]
async fn block_status_that_stops_early_is_asked_for_again() {
    let (client, mut server) = connected().await;
    let serve = async {
        let mut at = 0;
        for part in [MIB / 4, MIB / 4, MIB] {
            let (cookie, offset, len) = next_request(&mut server).await;
            assert_eq!((offset, u64::from(len)), (at, MIB - at));
            let status =
                [7u32.to_be_bytes(), (part as u32).to_be_bytes(), 3u32.to_be_bytes()].concat();
            server.write_all(&chunk(cookie, 5, true, &status)).await.unwrap();
            at += part;
        }
    };
    let mut covered = 0;
    let asked = client.status(0, 0, MIB, |status| {
        assert_eq!((status.offset, status.flags), (covered, 3));
        covered += status.len;
    });
    let (asked, ()) = tokio::join!(asked, serve);
    asked.unwrap();
    assert_eq!(covered, MIB);
}

#[tokio::test]
async fn a_server_that_wants_tls_is_named_as_such() {
    let (client, mut server) = tokio::io::duplex(1 << 16);
    let serve = async {
        server.write_all(GREETING).await.unwrap();
        let mut bytes = [0; 20];
        server.read_exact(&mut bytes).await.unwrap();
        server.write_all(&option_reply(8, 0x8000_0005, b"TLS please")).await.unwrap();
    };
    let (client, ()) = tokio::join!(NbdClient::over(client, "disk", &[]), serve);
    assert!(matches!(client, Err(NbdError::TlsRequired { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever a server sends, after any part of a true handshake, the client ends with an error.
    #[test]
    fn garbage_ends_in_an_error(
        true_parts in 0usize..4,
        garbage in prop::collection::vec(any::<u8>(), 0..2000),
        chunked in any::<bool>(),
        kind in prop_oneof![0u16..8, 0x8001u16..0x8004, any::<u16>()],
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            if true_parts < 3 {
                let (client, mut server) = tokio::io::duplex(1 << 20);
                let mut bytes = Vec::new();
                if true_parts > 0 {
                    bytes.extend(GREETING);
                }
                if true_parts > 1 {
                    bytes.extend(option_reply(8, 1, &[]));
                }
                bytes.extend(&garbage);
                server.write_all(&bytes).await.unwrap();
                server.shutdown().await.unwrap();
                assert!(NbdClient::over(client, "disk", &[]).await.is_err());
                return;
            }
            let (client, mut server) = connected().await;
            let client = Arc::new(client);
            let serve = async {
                let (cookie, ..) = next_request(&mut server).await;
                if chunked {
                    // A plausible head: the garbage is the payload.
                    server.write_all(&chunk(cookie, kind, true, &garbage)).await.unwrap();
                } else {
                    server.write_all(&garbage).await.unwrap();
                }
                server.shutdown().await.unwrap();
            };
            let ask = async { client.read(0, 65_536).await };
            let (answer, ()) = tokio::join!(ask, serve);
            assert!(answer.is_err());
        });
    }
}

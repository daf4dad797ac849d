//! The UDP socket below QUIC: large buffers, and no more segments a call than UDP can carry.
//!
//! Invariant: segments x payload size never exceeds [`MAX_UDP_PAYLOAD`]. quinn 0.11 hands up to ten
//! segments to the kernel in one call whatever their size; with jumbo frames that is more than one
//! UDP message holds, the kernel refuses, quinn drops the packets without a word, takes it for an
//! MTU black hole and falls back to 1200 bytes for a minute.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use quinn::{AsyncUdpSocket, Runtime};
use socket2::{Domain, Protocol, Socket, Type};

/// Largest payload of one UDP message over IPv4: 65535 - 20 - 8.
pub(crate) const MAX_UDP_PAYLOAD: u16 = 65_507;

/// Opens a UDP socket on `addr` with buffers of `buffer` bytes each, as far as the kernel lets it.
/// An IPv6 address without a host part also serves IPv4.
pub(crate) fn bind(
    addr: SocketAddr,
    buffer: usize,
    runtime: &dyn Runtime,
) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    if addr.is_ipv6() && addr.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    // Failing to enlarge a buffer costs speed, not correctness: said once, not fatal.
    let received = socket
        .set_recv_buffer_size(buffer)
        .and_then(|()| socket.recv_buffer_size())
        .inspect_err(|error| tracing::warn!(%error, "cannot enlarge the receive buffer"));
    warn_if_capped("receive", "net.core.rmem_max", buffer, received.ok());
    let sent = socket
        .set_send_buffer_size(buffer)
        .and_then(|()| socket.send_buffer_size())
        .inspect_err(|error| tracing::warn!(%error, "cannot enlarge the send buffer"));
    warn_if_capped("send", "net.core.wmem_max", buffer, sent.ok());
    socket.bind(&addr.into())?;
    runtime.wrap_udp_socket(socket.into())
}

/// Linux doubles what it is asked for and answers with the doubled size, so an answer below what
/// was asked for means that less than half of it was granted.
fn warn_if_capped(buffer: &str, setting: &str, asked: usize, granted: Option<usize>) {
    if let Some(granted) = granted.filter(|&granted| granted < asked) {
        tracing::warn!(
            buffer,
            asked,
            granted,
            "the kernel caps a UDP buffer, fast or distant peers will lose packets here: \
             run `sysctl -w {setting}={asked}`"
        );
    }
}

/// How many segments of up to `max_payload` bytes each may be handed to `socket` in one message.
pub(crate) fn segments_in_a_message(socket: &dyn AsyncUdpSocket, max_payload: u16) -> usize {
    let fitting = usize::from(MAX_UDP_PAYLOAD / max_payload.max(1));
    socket.max_transmit_segments().min(fitting).max(1)
}

#[cfg(test)]
mod tests {
    use quinn::TokioRuntime;

    use super::*;

    #[tokio::test]
    async fn segments_fit_into_one_message() {
        let socket = bind("127.0.0.1:0".parse().unwrap(), 1 << 16, &TokioRuntime).unwrap();
        let inner = socket.max_transmit_segments();
        for payload in [1200, 1452, 6550, 6600, 8952, 65_507] {
            let segments = segments_in_a_message(&*socket, payload);
            assert!(segments * usize::from(payload) <= usize::from(MAX_UDP_PAYLOAD));
            assert!(segments == inner || (segments + 1) * usize::from(payload) > 65_507);
        }
    }
}

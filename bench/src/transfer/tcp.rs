//! A flow over the kernel's TCP: one stream or several, with the congestion control of a name.
//!
//! Invariant: a stream that cannot go on is dropped by its own thread, within one look at the clock.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SocketType, sockopt};

use super::meter::{LOOK_PERIOD, Meter, Stop, Supply, payload_block};
use super::{Answer, Order, ends};
use crate::netns::Side;

/// Bytes of one write, and what one read takes at most.
const PIECE_BYTES: usize = 128 * 1024;
const READ_BYTES: usize = 512 * 1024;

/// Sends until there is nothing more to offer and the receiver has closed.
pub(super) fn send(order: &Order, control: &str, streams: usize, supply: &Supply) -> Result<()> {
    let target = SocketAddrV4::new(Side::B.address(), order.port);
    let connect = |_| connect(&target, control).context("while connecting through the WAN");
    let streams = (0..streams).map(connect).collect::<Result<Vec<_>>>()?;
    let block = payload_block(PIECE_BYTES);
    supply.begin();
    std::thread::scope(|scope| {
        let send = |stream| scope.spawn(|| send_stream(stream, &block, supply, order.is_drained));
        let threads: Vec<_> = streams.into_iter().map(send).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(sent) => sent.context("while sending through the WAN"),
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

fn connect(target: &SocketAddrV4, control: &str) -> Result<TcpStream> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    sockopt::set_tcp_congestion(&socket, control)
        .with_context(|| format!("this kernel has no congestion control {control:?}"))?;
    rustix::net::connect(&socket, target)?;
    let stream = TcpStream::from(socket);
    stream.set_write_timeout(Some(LOOK_PERIOD))?;
    stream.set_read_timeout(Some(LOOK_PERIOD))?;
    Ok(stream)
}

fn send_stream(
    mut stream: TcpStream,
    block: &[u8],
    supply: &Supply,
    is_drained: bool,
) -> std::io::Result<()> {
    loop {
        let bytes = supply.take(block.len());
        if bytes == 0 {
            break;
        }
        let mut rest = &block[..bytes];
        while !rest.is_empty() {
            match stream.write(rest) {
                Ok(len) => rest = &rest[len..],
                Err(error) if is_only_slow(&error) && !supply.is_cut_short() => {}
                Err(error) if is_only_slow(&error) => return give_up(&stream),
                Err(error) => return Err(error),
            }
        }
    }
    if !is_drained {
        return give_up(&stream);
    }
    stream.shutdown(Shutdown::Write)?;
    // Nothing comes back but the end, once the receiver has read everything.
    loop {
        match stream.read(&mut [0; 64]) {
            Ok(_) => return Ok(()),
            Err(error) if is_only_slow(&error) && !supply.is_cut_short() => {}
            Err(error) if is_only_slow(&error) => return give_up(&stream),
            Err(error) => return Err(error),
        }
    }
}

/// Drops what the kernel still holds, with the stream.
fn give_up(stream: &TcpStream) -> std::io::Result<()> {
    Ok(sockopt::set_socket_linger(stream, Some(Duration::ZERO))?)
}

fn is_only_slow(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// Receives until every stream has ended.
pub(super) fn receive(streams: usize, meter: &Meter, stop: &Stop) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    ends::say(&Answer::Ready { port: listener.local_addr()?.port() })?;
    let accept = |_| -> Result<TcpStream> {
        let (stream, _) = listener.accept().context("while waiting for a stream")?;
        stream.set_read_timeout(Some(LOOK_PERIOD))?;
        Ok(stream)
    };
    let streams = (0..streams).map(accept).collect::<Result<Vec<_>>>()?;
    meter.begin();
    std::thread::scope(|scope| {
        for stream in streams {
            scope.spawn(move || receive_stream(stream, meter, stop));
        }
    });
    Ok(())
}

fn receive_stream(mut stream: TcpStream, meter: &Meter, stop: &Stop) {
    let mut buffer = vec![0; READ_BYTES];
    while !stop.is_set() {
        match stream.read(&mut buffer) {
            // A sender that gives up resets its stream: what came before counts.
            Ok(0) => return,
            Ok(len) => meter.add(len),
            Err(error) if is_only_slow(&error) => {}
            Err(_) => return,
        }
    }
}

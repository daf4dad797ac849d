//! What gets through a WAN: round trips, TCP and UDP rates, and the relay's own cost.
//!
//! Invariant: every socket of a measurement is closed and every thread joined when it returns.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::netns::{Side, inside};

/// How long a measurement waits for a single packet or connection.
const ANSWER_WAIT: Duration = Duration::from_secs(5);
/// Bytes of one TCP write.
const WRITE_BYTES: usize = 128 * 1024;
/// How often a paced UDP sender sends what is due.
const UDP_TICK: Duration = Duration::from_micros(500);
/// UDP payload that makes an IP packet of 1500 bytes.
pub const UDP_PAYLOAD_BYTES: usize = 1472;

/// Round trips, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Rtt {
    /// The fastest one.
    pub min_ms: f64,
    /// Half of them are faster.
    pub median_ms: f64,
    /// The slowest one.
    pub max_ms: f64,
    /// Requests without an answer.
    pub lost: u32,
}

/// A rate over a time.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Rate {
    /// Bytes of payload that arrived.
    pub bytes: u64,
    /// Seconds from the first to the last of them.
    pub seconds: f64,
    /// Payload rate in Mbit/s.
    pub mbit_per_s: f64,
}

impl Rate {
    fn new(bytes: u64, time: Duration) -> Self {
        let seconds = time.as_secs_f64();
        let mbit_per_s = if seconds > 0.0 { bytes as f64 * 8e-6 / seconds } else { 0.0 };
        Self { bytes, seconds, mbit_per_s }
    }
}

fn any_port() -> SocketAddr {
    (Ipv4Addr::UNSPECIFIED, 0).into()
}

/// Measures `count` UDP round trips from side a through the WAN `name`, one after another.
///
/// # Errors
///
/// When the WAN is not up or nothing comes back at all.
pub fn rtt(name: &str, count: u32) -> Result<Rtt> {
    let echo = inside(name, Side::B, || Ok(UdpSocket::bind(any_port())?))?;
    let socket = inside(name, Side::A, || Ok(UdpSocket::bind(any_port())?))?;
    let target = (Side::B.address(), echo.local_addr()?.port());
    socket.set_read_timeout(Some(ANSWER_WAIT.min(Duration::from_secs(2))))?;
    echo.set_read_timeout(Some(Duration::from_millis(100)))?;
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let mut times = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(|| {
            let mut buffer = [0; 64];
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                if let Ok((len, from)) = echo.recv_from(&mut buffer) {
                    let _ = echo.send_to(&buffer[..len], from);
                }
            }
        });
        let result = (|| {
            for number in 0..count {
                let sent = Instant::now();
                socket.send_to(&number.to_le_bytes(), target)?;
                let mut buffer = [0; 64];
                // Late answers to an earlier request are not this one's.
                while let Ok((len, _)) = socket.recv_from(&mut buffer) {
                    if buffer[..len] == number.to_le_bytes() {
                        times.push(sent.elapsed().as_secs_f64() * 1e3);
                        break;
                    }
                }
            }
            Ok(())
        })();
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        result
    })?;
    times.sort_by(f64::total_cmp);
    let lost = count - u32::try_from(times.len()).unwrap_or(u32::MAX);
    let (Some(min_ms), Some(max_ms)) = (times.first().copied(), times.last().copied()) else {
        anyhow::bail!("none of {count} requests through the WAN {name} was answered");
    };
    Ok(Rtt { min_ms, median_ms: times[times.len() / 2], max_ms, lost })
}

/// Sends over one TCP connection from `from` to the other side for `time`, and gives what arrived.
/// The first `warm_up` of it is not counted.
///
/// # Errors
///
/// When the WAN is not up or the connection breaks.
pub fn tcp(name: &str, from: Side, warm_up: Duration, time: Duration) -> Result<Rate> {
    let listener = inside(name, from.other(), || Ok(TcpListener::bind(any_port())?))?;
    let target = SocketAddr::from((from.other().address(), listener.local_addr()?.port()));
    let mut sender = inside(name, from, || {
        TcpStream::connect_timeout(&target, ANSWER_WAIT).context("while connecting through the WAN")
    })?;
    let (mut receiver, _) = listener.accept()?;
    receiver.set_read_timeout(Some(ANSWER_WAIT))?;
    sender.set_write_timeout(Some(ANSWER_WAIT))?;
    std::thread::scope(|scope| {
        let end = Instant::now() + warm_up + time;
        scope.spawn(move || {
            let data = vec![0x5a; WRITE_BYTES];
            while Instant::now() < end && sender.write_all(&data).is_ok() {}
        });
        let (mut buffer, mut bytes, mut begin) = (vec![0; 4 * WRITE_BYTES], 0_u64, None);
        let started = Instant::now();
        while Instant::now() < end {
            let len = receiver.read(&mut buffer).context("while receiving through the WAN")?;
            ensure!(len > 0, "the connection through the WAN ended early");
            if begin.is_some() {
                bytes += len as u64;
            } else if started.elapsed() >= warm_up {
                begin = Some(Instant::now());
            }
        }
        let time = begin.map_or(Duration::ZERO, |begin| begin.elapsed());
        // Closing with data unread resets the connection: the sender ends at once, too.
        drop(receiver);
        Ok(Rate::new(bytes, time))
    })
}

/// Sends UDP packets of 1500 IP bytes at `rate_bits_per_s` (of IP bytes) from `from` for `time`.
///
/// # Errors
///
/// When the WAN is not up or nothing arrives.
pub fn udp(name: &str, from: Side, rate_bits_per_s: u64, time: Duration) -> Result<Rate> {
    let receiver = inside(name, from.other(), || Ok(UdpSocket::bind(any_port())?))?;
    let sender = inside(name, from, || Ok(UdpSocket::bind(any_port())?))?;
    sender.connect((from.other().address(), receiver.local_addr()?.port()))?;
    receiver.set_read_timeout(Some(Duration::from_millis(500)))?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let packet = [0x5a; UDP_PAYLOAD_BYTES];
            let packet_ns = 1500 * 8 * 1_000_000_000 / u128::from(rate_bits_per_s.max(1));
            let (started, mut sent) = (Instant::now(), 0_u128);
            while started.elapsed() < time {
                while sent * packet_ns < started.elapsed().as_nanos() {
                    let _ = sender.send(&packet);
                    sent += 1;
                }
                std::thread::sleep(UDP_TICK);
            }
        });
        let (mut buffer, mut bytes) = ([0; 2048], 0_u64);
        let (mut first, mut last) = (None, Instant::now());
        // The first packet may take long; after the last one a silence ends the measurement.
        let deadline = Instant::now() + ANSWER_WAIT + time;
        while Instant::now() < deadline {
            match receiver.recv(&mut buffer) {
                Ok(len) => {
                    last = Instant::now();
                    if first.is_some() {
                        bytes += len as u64;
                    } else {
                        first = Some(last);
                    }
                }
                Err(_) if first.is_some() => break,
                Err(_) => {}
            }
        }
        let first = first.context("no packet came through the WAN")?;
        Ok(Rate::new(bytes, last - first))
    })
}

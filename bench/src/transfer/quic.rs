//! A flow over quinn as it comes: its default settings, windows and socket, several streams.
//!
//! Invariant: nothing is tuned but which of quinn's own congestion controllers is used.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use quinn::congestion::{BbrConfig, CubicConfig};
use quinn::{ClientConfig, Connection, Endpoint, ServerConfig, TransportConfig};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::task::JoinSet;

use super::meter::{LOOK_PERIOD, Meter, Stop, Supply, payload_block};
use super::{Answer, Order, ends};
use crate::netns::Side;

/// Streams that carry the payload side by side.
const STREAMS: usize = 8;
/// Bytes that a stream is given at a time.
const PIECE_BYTES: usize = 128 * 1024;
/// The server's name in its certificate.
const SERVER_NAME: &str = "lab";
/// Bytes of an IPv4 and a UDP header.
const UDP_HEADERS: u64 = 28;

/// Which of quinn's congestion controllers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Control {
    Cubic,
    Bbr,
}

impl Control {
    fn transport(self) -> Arc<TransportConfig> {
        let mut transport = TransportConfig::default();
        match self {
            Self::Cubic => {
                transport.congestion_controller_factory(Arc::new(CubicConfig::default()))
            }
            Self::Bbr => transport.congestion_controller_factory(Arc::new(BbrConfig::default())),
        };
        Arc::new(transport)
    }
}

/// Makes the server's certificate.
pub(super) fn prepare(folder: &Path) -> Result<()> {
    let made = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()])?;
    std::fs::write(folder.join("certificate"), made.cert.der())?;
    std::fs::write(folder.join("key"), made.signing_key.serialize_der())?;
    Ok(())
}

fn certificate(folder: &Path) -> Result<CertificateDer<'static>> {
    Ok(std::fs::read(folder.join("certificate"))?.into())
}

fn any_port() -> SocketAddr {
    (Ipv4Addr::UNSPECIFIED, 0).into()
}

/// Sends until there is nothing more to offer and the receiver has it all; gives the packets whose
/// content was sent again.
pub(super) async fn send(order: &Order, control: Control, supply: &Arc<Supply>) -> Result<u64> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate(&order.folder)?)?;
    let mut config = ClientConfig::with_root_certificates(Arc::new(roots))?;
    config.transport_config(control.transport());
    let endpoint = Endpoint::client(any_port())?;
    let address = SocketAddr::from((Side::B.address(), order.port));
    let connection = endpoint.connect_with(config, address, SERVER_NAME)?.await?;
    supply.begin();
    let done = tokio::select! {
        done = send_all(&connection, supply) => done,
        () = supply.cut_short() => Ok(()),
    };
    let repeated = connection.stats().path.lost_packets;
    connection.close(0_u8.into(), b"over");
    endpoint.wait_idle().await;
    done.map(|()| repeated)
}

async fn send_all(connection: &Connection, supply: &Arc<Supply>) -> Result<()> {
    let block = payload_block(PIECE_BYTES);
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        let mut stream = connection.open_uni().await?;
        let (supply, block) = (supply.clone(), block.clone());
        streams.spawn(async move {
            loop {
                let bytes = supply.take(PIECE_BYTES);
                if bytes == 0 {
                    break;
                }
                stream.write_chunk(block.slice(..bytes)).await?;
            }
            stream.finish()?;
            // All of it is acknowledged then.
            stream.stopped().await?;
            anyhow::Ok(())
        });
    }
    while let Some(stream) = streams.join_next().await {
        stream.context("a sender panicked")??;
    }
    // The receiver closes once it has read everything.
    connection.closed().await;
    Ok(())
}

/// Receives until all streams have ended.
pub(super) async fn receive(
    order: &Order,
    control: Control,
    meter: &Arc<Meter>,
    stop: &Stop,
) -> Result<()> {
    let key = PrivatePkcs8KeyDer::from(std::fs::read(order.folder.join("key"))?);
    let mut config = ServerConfig::with_single_cert(vec![certificate(&order.folder)?], key.into())?;
    config.transport_config(control.transport());
    let endpoint = Endpoint::server(config, any_port())?;
    ends::say(&Answer::Ready { port: endpoint.local_addr()?.port() })?;
    let incoming = endpoint.accept().await.context("the endpoint closed")?;
    let connection = incoming.await?;
    meter.begin();
    let counting = async {
        loop {
            count_wire(&connection, meter);
            tokio::time::sleep(LOOK_PERIOD).await;
        }
    };
    tokio::select! {
        received = receive_all(&connection, meter) => received?,
        () = counting => {}
        () = stop.wait() => {}
    }
    count_wire(&connection, meter);
    connection.close(0_u8.into(), b"received");
    endpoint.wait_idle().await;
    Ok(())
}

fn count_wire(connection: &Connection, meter: &Meter) {
    let received = connection.stats().udp_rx;
    meter.set_wire(received.bytes + received.datagrams * UDP_HEADERS);
}

async fn receive_all(connection: &Connection, meter: &Arc<Meter>) -> Result<()> {
    let mut streams = JoinSet::new();
    for _ in 0..STREAMS {
        // A sender that gives up early has not opened all of them.
        let Ok(mut stream) = connection.accept_uni().await else { break };
        let meter = meter.clone();
        streams.spawn(async move {
            while let Ok(Some(chunk)) = stream.read_chunk(usize::MAX, true).await {
                meter.add(chunk.bytes.len());
            }
        });
    }
    while let Some(stream) = streams.join_next().await {
        stream.context("a receiver panicked")?;
    }
    Ok(())
}

//! One end of a flow, in a process of its own: takes an order, does it, says what it did.
//!
//! Invariant: it ends when its standard input does, so none outlives the lab.

use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::meter::{self, Meter, Sampler, Supply};
use super::{Answer, Engine, Order, longhaul, quic, rsync, tcp};
use crate::netns::Side;

/// Does what the first line of standard input asks for.
///
/// # Errors
///
/// When there is no order, or nobody to hear the answer. What goes wrong in a transfer is an answer.
pub fn run() -> Result<()> {
    let (order, stop) = meter::take_order()?;
    let done = match order.side {
        Side::A => send(&order, Supply::new(&order, stop)),
        Side::B => receive(&order, &stop),
    };
    say(&done.unwrap_or_else(|error| Answer::Failed { why: format!("{error:#}") }))
}

/// Prints an answer.
pub(super) fn say(answer: &Answer) -> Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let mut output = std::io::stdout().lock();
    output.write_all(&line).and_then(|()| output.flush()).context("nobody hears the answer")
}

fn send(order: &Order, supply: Supply) -> Result<Answer> {
    let supply = Arc::new(supply);
    let repeated_packets = match order.tool.engine() {
        Engine::Longhaul => runtime()?.block_on(longhaul::send(order, &supply)).map(Some),
        Engine::Quinn(control) => {
            runtime()?.block_on(quic::send(order, control, &supply)).map(Some)
        }
        Engine::Tcp { control, streams } => {
            tcp::send(order, control, streams, &supply).map(|()| None)
        }
        Engine::Rsync => rsync::send(order, &supply).map(|()| None),
    }?;
    Ok(Answer::Sent(supply.sent(repeated_packets)))
}

fn receive(order: &Order, stop: &meter::Stop) -> Result<Answer> {
    let meter = Arc::new(Meter::default());
    let sampler = Sampler::start(meter.clone(), order.mtu);
    match order.tool.engine() {
        Engine::Longhaul => runtime()?.block_on(longhaul::receive(order, &meter, stop)),
        Engine::Quinn(control) => runtime()?.block_on(quic::receive(order, control, &meter, stop)),
        Engine::Tcp { streams, .. } => tcp::receive(streams, &meter, stop),
        Engine::Rsync => rsync::receive(order, &meter, stop),
    }?;
    Ok(Answer::Received(sampler.finish()))
}

/// As the product has it: a thread for each core.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("while starting the runtime")
}

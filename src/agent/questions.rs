//! What peers' agents may ask of this one: the planner's for its load and for moves of its VMs, those that
//! this host serves for images.
//!
//! Invariant: only peers that this host's operator named (`scheduler.obeys`, `agent.serves`) are answered,
//! and only what is listed in [`may_ask`], or in `pulling`: everything else that a command can do stays
//! with who is on this host.
//! The language is that of commands; an order is admitted by the same rules as a command's.

use std::sync::{Arc, OnceLock, Weak};

use async_trait::async_trait;
use tokio::io::BufReader;

use super::answer::{Desk, Reaction};
use super::dial::Dialer;
use crate::control::{
    Failure, MoveRequest, Reply, Request, Response, chain, read_line, write_line,
};
use crate::migration::job::Dial as _;
use crate::migration::{self, Answers};

/// Answers what peers ask, once the agent is whole.
#[derive(Default)]
pub struct Questions {
    desk: OnceLock<Weak<Desk>>,
}

impl Questions {
    /// From now on `desk` answers.
    pub(super) fn open(&self, desk: &Arc<Desk>) {
        // There is one desk in the life of an agent.
        let _ = self.desk.set(Arc::downgrade(desk));
    }

    async fn reply(&self, peer: &str, mut question: &[u8]) -> Result<Reply, Failure> {
        let desk = self.desk.get().and_then(Weak::upgrade);
        let Some(desk) = desk else {
            return Err(Failure::refused("this agent starts or stops just now", "ask again"));
        };
        let mut reader = BufReader::new(&mut question);
        let request = read_line::<Request>(&mut reader).await.map_err(|error| {
            let next = "are both agents of the same version?";
            Failure::refused(format!("this is no request: {}", chain(&error)), next)
        })?;
        let request = match request {
            Request::Fetch(wish) => Request::Push(desk.fetched(peer, wish)?),
            Request::Job(question) => {
                return Ok(Reply::Job(Box::new(desk.job_to(peer, question)?)));
            }
            request => {
                must_obey(&desk, peer)?;
                may_ask(request)?
            }
        };
        match desk.react(request).await {
            Reaction::Answer(answer) => *answer,
            Reaction::Follow(_) | Reaction::Work(_) => {
                Err(Failure::refused("a peer cannot watch a job", "ask for the load"))
            }
        }
    }
}

fn must_obey(desk: &Desk, peer: &str) -> Result<(), Failure> {
    if desk.config.scheduler.obeys.as_deref() == Some(peer) {
        return Ok(());
    }
    let name = &desk.config.name;
    let next = format!("on {name} set scheduler.obeys to its name for that peer");
    tracing::warn!(peer, "a peer that this host does not obey asked for something");
    Err(Failure::refused(format!("{name} does not obey this agent"), next))
}

/// What a planner may ask, as it is carried out: a job that it starts is not watched.
fn may_ask(request: Request) -> Result<Request, Failure> {
    match request {
        Request::Load { .. } | Request::Cancel { .. } => Ok(request),
        Request::Seed(wish) => Ok(Request::Seed(MoveRequest { detach: true, ..wish })),
        Request::Migrate(wish) => {
            Ok(Request::Migrate(MoveRequest { detach: true, windows: None, ..wish }))
        }
        _ => Err(Failure::refused("a peer may not ask for that", "do it on that host")),
    }
}

#[async_trait]
impl Answers for Questions {
    async fn answer(&self, peer: &str, question: &[u8]) -> Vec<u8> {
        let response = match self.reply(peer, question).await {
            Ok(reply) => Response::Done(reply),
            Err(failure) => Response::Failed(failure),
        };
        let mut line = Vec::new();
        if write_line(&mut line, &response).await.is_err() {
            line.clear();
            let failure = Failure::failed("the answer is too long", "", "");
            // It is short, and writing to memory does not fail.
            let _ = write_line(&mut line, &Response::Failed(failure)).await;
        }
        line
    }
}

/// Asks a peer's agent.
///
/// # Errors
/// The peer's own words, or that it could not be asked.
pub(super) async fn ask(peer: &str, dialer: &Dialer, request: &Request) -> Result<Reply, Failure> {
    let unreachable = |detail: String| {
        let next = "look at the link and at its agent";
        Failure::failed(detail, "", next)
    };
    let mut question = Vec::new();
    let written = write_line(&mut question, request).await;
    written.map_err(|error| unreachable(chain(&error)))?;
    let session = dialer.dial().await.map_err(unreachable)?;
    let answer = migration::ask(peer, session, question).await;
    let answer = answer.map_err(|error| unreachable(chain(&error)))?;
    match read_line::<Response>(&mut BufReader::new(&answer[..])).await {
        Ok(Response::Done(reply)) => Ok(reply),
        Ok(Response::Failed(failure)) => Err(failure),
        Err(error) => Err(unreachable(format!("its answer is no answer: {}", chain(&error)))),
    }
}

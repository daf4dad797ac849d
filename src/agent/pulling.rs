//! Images that this host asks a peer for. The peer pushes; this side asks for it, and follows its job.
//!
//! Invariant: a peer gets images only if this host's operator has named it (`agent.serves`), and then
//! sees or ends only pushes to itself. What arrives here is written by the rules for any push.

use std::time::Duration;

use tokio::sync::watch;

use super::admission::Wish;
use super::answer::{Desk, Reaction, problem_failure};
use super::cancel::CancelToken;
use super::dial::Dialer;
use super::jobs::MoveOptions;
use super::questions::ask;
use crate::control::{
    Failure, FailureKind, FetchRequest, JobKind, JobOutcome, JobQuestion, JobStand, PullRequest,
    PushRequest, Reply, Request,
};
use crate::hypervisor::spec::ImageLocation;
use crate::migration::{Completed, Progress};

/// Between two looks at the peer's job.
const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// Looks in a row that may fail: the peer's own job outlives a link that is down for a while.
const BLIND_LOOKS_MAX: u32 = 300;

/// Has the peer push, and follows that to its end.
///
/// # Errors
/// The peer's own words, or that it cannot be reached.
pub(super) async fn pull(
    name: &str,
    wish: FetchRequest,
    dialer: &Dialer,
    progress: &watch::Sender<Progress>,
    cancel: &CancelToken,
) -> Result<Completed, Failure> {
    let peer = dialer.peer();
    let id = match ask(peer, dialer, &Request::Fetch(wish)).await? {
        Reply::Started(job) => job.id,
        other => return Err(unexpected(peer, &other)),
    };
    let mut blind = 0;
    loop {
        tokio::select! {
            () = tokio::time::sleep(LOOK_PERIOD) => {}
            _ = cancel.cancelled() => {
                let end = Request::Job(JobQuestion { id, cancel: true });
                // It ends there in any case, as soon as it can be told.
                let told = ask(peer, dialer, &end).await;
                return Err(cancelled(name, peer, told.err()));
            }
        }
        match ask(peer, dialer, &Request::Job(JobQuestion { id, cancel: false })).await {
            Ok(Reply::Job(stand)) => {
                blind = 0;
                match *stand {
                    JobStand::Runs(job) => {
                        let vm = name.to_owned();
                        progress.send_replace(Progress {
                            vm,
                            peer: peer.to_owned(),
                            ..job.progress
                        });
                    }
                    JobStand::Ended(record) => match record.outcome {
                        JobOutcome::Completed(completed) => {
                            return Ok(Completed { vm: name.to_owned(), ..*completed });
                        }
                        JobOutcome::Failed(failure) => {
                            let what = format!("{peer} could not send it: {}", failure.what);
                            return Err(Failure { what, ..failure });
                        }
                    },
                }
            }
            Ok(other) => return Err(unexpected(peer, &other)),
            Err(failure) if failure.kind == FailureKind::Refused || blind == BLIND_LOOKS_MAX => {
                return Err(Failure {
                    state: "what has arrived stays here for the next try".to_owned(),
                    ..failure
                });
            }
            Err(failure) => {
                blind += 1;
                progress.send_modify(|progress| progress.note = Some(failure.what));
            }
        }
    }
}

fn unexpected(peer: &str, reply: &Reply) -> Failure {
    tracing::warn!(peer, ?reply, "an answer to another question");
    Failure::failed(format!("{peer} answers something else"), "", "are both of the same version?")
}

fn cancelled(name: &str, peer: &str, not_told: Option<Failure>) -> Failure {
    let state = match not_told {
        None => "what has arrived stays here for the next try".to_owned(),
        Some(why) => format!("{peer} could not be told, and goes on sending: {}", why.what),
    };
    let what = format!("the pull of {name} was cancelled");
    Failure::of_kind(FailureKind::Cancelled, what, state, "")
}

impl Desk {
    /// Starts a pull.
    pub(super) fn pull(&self, wish: PullRequest) -> Result<Reaction, Failure> {
        let PullRequest { from, fetch, deadline_s, detach } = wish;
        let peer = self.peers.get(&from).map_err(problem_failure)?;
        let name = format!("{from}:{}", fetch.image);
        let options = MoveOptions {
            downtime_limit_ms: 0,
            deadline_s,
            rate: None,
            background: false,
            image: None,
            fetch: Some(fetch),
        };
        let wish = Wish { kind: JobKind::Pull, vm: name, vm_known: true, in_doubt: false };
        self.start_job(&wish, peer, options, detach)
    }

    /// The push that a peer asks for, if it is served.
    pub(super) fn fetched(&self, peer: &str, wish: FetchRequest) -> Result<PushRequest, Failure> {
        self.must_serve(peer)?;
        let name = &self.config.name;
        let FetchRequest { image, to, replace, rate, background } = wish;
        let next = "`longhaul index` on that host shows its images";
        let location = ImageLocation::Pool { pool: image.pool, file: image.file };
        let image =
            self.config.host.in_pool(&location).map_err(|why| Failure::refused(why, next))?;
        let Some(image) = image.to_str().filter(|_| image.is_file()).map(str::to_owned) else {
            return Err(Failure::refused(format!("{name} has no image {location}"), next));
        };
        Ok(PushRequest {
            image,
            to: peer.to_owned(),
            pool: to.pool,
            file: to.file,
            replace,
            deadline_s: None,
            rate,
            background,
            detach: true,
        })
    }

    fn must_serve(&self, peer: &str) -> Result<(), Failure> {
        if self.config.serves.iter().any(|served| served == peer) {
            return Ok(());
        }
        let name = &self.config.name;
        tracing::warn!(peer, "a peer that this host does not serve asked for an image");
        let next = format!("on {name} add its name for that peer to agent.serves");
        Err(Failure::refused(format!("{name} does not serve this agent"), next))
    }

    /// How a push to `peer` stands; it is told to end if that is wished.
    pub(super) fn job_to(&self, peer: &str, question: JobQuestion) -> Result<JobStand, Failure> {
        self.must_serve(peer)?;
        let is_theirs = |kind: JobKind, to: &str| kind == JobKind::Push && to == peer;
        let stand = self.jobs.stand(question.id).filter(|stand| match stand {
            JobStand::Runs(job) => is_theirs(job.kind, &job.peer),
            JobStand::Ended(job) => is_theirs(job.kind, &job.peer),
        });
        let Some(stand) = stand else {
            let what = format!("{} has no job {} for this agent", self.config.name, question.id);
            return Err(Failure::refused(what, "start it again"));
        };
        if let (JobStand::Runs(job), true) = (&stand, question.cancel) {
            self.jobs.cancel(&job.vm)?;
        }
        Ok(stand)
    }
}

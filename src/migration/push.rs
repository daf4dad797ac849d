//! An image that goes to a peer's pool without a VM: both halves.
//!
//! Invariant: the image has its name at the target only once every byte of it was checked there, and
//! is durable; whatever ends an attempt earlier leaves what has arrived for the next one.
//!
//! ```text
//!  source                          target
//!  open ------------------------>  enter, open what there is of it
//!  offers, chunks -------------->  DiskReceiver
//!  end of the round ------------>  written, durable
//!  keep ------------------------>  mark its record complete, give it its name
//! ```

use std::fs;
use std::future::Future;
use std::path::Path;
use std::pin::pin;
use std::time::{Duration, Instant};

use longhaul_dedup::recipe::{ImageIdentity, RecipeLog};
use longhaul_transport::{Class, ControlReceiver, ControlSender, Session};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::attempts::{Attempts, Entered};
use super::coding::Coding;
use super::disk::{DiskReceiver, DiskSender, How, ImageRecord};
use super::error::{MigrationError, chain};
use super::items::{self, DiskWork, QUEUED_ITEMS_MAX, Received, queue};
use super::job::{ImageJob, Site};
use super::known::Known;
use super::link::Link;
use super::message::{JobId, OpenImage, ToSource, ToTarget};
use super::meter::Meter;
use super::report::{Completed, Phase, Progress};
use crate::hypervisor::spec::ImageLocation;
use crate::hypervisor::{DiskInfo, DiskView};

/// How often progress is published.
const TICK: Duration = Duration::from_millis(100);

/// Sends an image over `session`. To drop this is to end the attempt: what has arrived stays.
///
/// # Errors
///
/// How the attempt ended; the image here is only ever read.
pub async fn push(
    site: &Site,
    job: &ImageJob,
    session: Session,
    coding: &Coding,
    progress: &watch::Sender<Progress>,
) -> Result<Completed, MigrationError> {
    let view = site.host.image(&job.image).await?;
    let name = job.image.display().to_string();
    let attempt = Attempt {
        job,
        coding,
        link: Link::new(&job.peer, session)?,
        meter: Meter::new(&name, &job.peer, Phase::Seed),
        name,
        start: Instant::now(),
    };
    attempt.link.set_patience(site.link_patience);
    let ended = attempt.watched(attempt.send(&*view), progress).await;
    let closed = view.close().await;
    match ended {
        Ok(()) => {
            closed?;
            attempt.link.close("the image has arrived");
            Ok(attempt.complete())
        }
        Err(error) => {
            let abort = ToTarget::Abort { reason: error.to_string() };
            let _ = attempt.link.tell(&abort).await;
            let error = attempt.link.explain(error);
            attempt.link.close("the attempt was given up");
            Err(error)
        }
    }
}

struct Attempt<'a> {
    job: &'a ImageJob,
    coding: &'a Coding,
    link: Link,
    meter: Meter,
    name: String,
    start: Instant,
}

impl Attempt<'_> {
    async fn watched(
        &self,
        work: impl Future<Output = Result<(), MigrationError>>,
        progress: &watch::Sender<Progress>,
    ) -> Result<(), MigrationError> {
        let mut work = pin!(work);
        let mut ticks = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                ended = &mut work => return ended,
                lost = self.link.lost() => return Err(lost),
                _ = ticks.tick() => {
                    let mut now = self.meter.progress(self.at_ms(), self.link.wire_bytes());
                    now.link = Some(Box::new(self.link.report(now.elapsed_ms)));
                    progress.send_replace(now);
                }
            }
        }
    }

    async fn send(&self, view: &dyn DiskView) -> Result<(), MigrationError> {
        let ImageJob { pool, file, replace, .. } = self.job;
        let open = OpenImage {
            job: JobId::random(),
            pool: pool.clone(),
            file: file.clone(),
            bytes: view.info().bytes,
            replace: *replace,
        };
        self.link.tell(&ToTarget::OpenImage(Box::new(open))).await?;
        match self.link.reply().await? {
            ToSource::Accepted { .. } => {}
            ToSource::Refused { reasons } => {
                let (vm, peer) = (self.name.clone(), self.job.peer.clone());
                return Err(MigrationError::Refused { vm, peer, reasons });
            }
            other => return Err(self.unexpected(&other)),
        }
        self.meter.round();
        let record = ImageRecord::at_rest(vec![Some(self.job.image.clone())]);
        record.begin(&[view.info().bytes], true);
        let sender = DiskSender::new(&self.link, &self.meter, self.coding, &record);
        sender.send(0, view, How::Offer, Class::Seed).await?;
        let round = self.link.next_round();
        self.link.tell(&ToTarget::RoundEnd { round, items: self.link.disk_items() }).await?;
        self.link.until(|applied| applied.round >= round).await?;
        self.link.tell(&ToTarget::Keep { generation: rand::random() }).await?;
        match self.link.reply().await? {
            ToSource::Kept => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    fn complete(&self) -> Completed {
        let report = self.meter.complete(self.at_ms(), self.link.wire_bytes(), None);
        let link = Some(Box::new(self.link.report(report.total_ms)));
        let image = Some(format!("{}/{}", self.job.pool, self.job.file));
        Completed { link, image, ..report }
    }

    fn at_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    fn unexpected(&self, reply: &ToSource) -> MigrationError {
        MigrationError::protocol(&self.job.peer, format!("this answer was not expected: {reply:?}"))
    }
}

/// Receives an image of a paired peer's, of whose opening message nothing is believed.
pub(super) async fn receive(
    site: &Site,
    attempts: &Attempts,
    peer: &str,
    open: &OpenImage,
    session: Session,
    control: &ControlSender,
    messages: &mut ControlReceiver,
) -> Result<(), MigrationError> {
    let name = format!("{}/{}", open.pool, open.file);
    // No VM's name has a space in it.
    let entered = attempts.begin(open.job, &format!("image {name}"), peer).await;
    let arrival = Arrival {
        site,
        peer,
        place: ImageLocation::Pool { pool: open.pool.clone(), file: open.file.clone() },
        open,
        session,
        control,
        tasks: JoinSet::new(),
    };
    let begun = match &entered {
        Ok(_) => arrival.begin().await.map_err(|error| chain(&error)),
        Err(reason) => Err(reason.clone()),
    };
    let (disks, entered) = match (begun, entered) {
        (Ok(disks), Ok(entered)) => (disks, entered),
        (Err(reason), _) | (_, Err(reason)) => {
            tracing::info!(peer, image = name, reason, "an image was refused");
            return arrival.tell(&ToSource::Refused { reasons: vec![reason] }).await;
        }
    };
    let outcome = arrival.run(messages, disks, &entered).await;
    if let Err(error) = &outcome {
        tracing::warn!(peer, image = name, %error, "an image did not arrive");
        let _ = control.send(&ToSource::Failed { reason: chain(error) }).await;
    }
    outcome
}

struct Arrival<'a> {
    site: &'a Site,
    peer: &'a str,
    place: ImageLocation,
    open: &'a OpenImage,
    session: Session,
    control: &'a ControlSender,
    tasks: JoinSet<Result<(), MigrationError>>,
}

impl Arrival<'_> {
    /// Opens what there is of the image.
    async fn begin(&self) -> Result<DiskReceiver, MigrationError> {
        let OpenImage { bytes, replace, .. } = *self.open;
        let incoming = self.site.host.incoming_image(&self.place, bytes, replace).await?;
        if let Some(old) = &incoming.begins_as {
            take_over_record(old, &incoming.path);
        }
        let known = self.site.host.known_images().await?;
        let known = Known::of(known, self.site.index.clone()).await;
        let info = DiskInfo { id: "image".to_owned(), bytes };
        DiskReceiver::open(self.peer, vec![info], vec![incoming], known).await
    }

    async fn run(
        mut self,
        messages: &mut ControlReceiver,
        disks: DiskReceiver,
        entered: &Entered,
    ) -> Result<(), MigrationError> {
        self.session.set_patience(self.site.link_patience);
        self.tell(&ToSource::Accepted { at_generation: vec![false], readable: vec![false] })
            .await?;
        let (disk_work, disk_queue) = mpsc::channel(QUEUED_ITEMS_MAX);
        // Nobody takes memory: an item of it is the peer's fault and ends the attempt.
        let (memory_work, _) = mpsc::channel(1);
        let (items_in, mut items) = watch::channel(0);
        let (wants_in, mut wants) = mpsc::channel(QUEUED_ITEMS_MAX);
        let (received, _received) = watch::channel(Received::nothing());
        self.tasks.spawn(items::write_disks(disks, disk_queue, items_in, wants_in));
        let (peer, session) = (self.peer.to_owned(), self.session.clone());
        self.tasks.spawn(items::sort(peer, session, disk_work.clone(), memory_work, received));
        let mut round: Option<(u32, u64)> = None;
        let (mut is_together, mut is_over) = (false, false);
        loop {
            if let Some((number, sent)) = round
                && *items.borrow() >= sent
            {
                round = None;
                is_over = true;
                queue(&disk_work, DiskWork::RoundDone, self.peer).await?;
                self.tell(&ToSource::RoundDone { round: number }).await?;
            }
            tokio::select! {
                message = messages.recv::<ToTarget>() => {
                    match message.map_err(MigrationError::receiving(self.peer))? {
                        Some(ToTarget::RoundEnd { round: number, items }) => {
                            round = Some((number, items));
                        }
                        Some(ToTarget::Keep { generation }) if is_over && is_together => {
                            return self.keep(generation, &disk_work).await;
                        }
                        Some(ToTarget::Abort { reason }) => {
                            let detail = format!("it ended the attempt: {reason}");
                            return Err(MigrationError::cut(self.peer, detail));
                        }
                        Some(other) => return Err(self.bad(&format!("{other:?} was not expected"))),
                        None => return Err(MigrationError::cut(self.peer, "it closed the session")),
                    }
                }
                () = entered.asked_to_give_way() => {
                    return Err(MigrationError::cut(self.peer, "it has given this attempt up"));
                }
                Some(want) = wants.recv() => {
                    if let ToSource::Lacking { pieces, .. } = &want {
                        is_together = pieces.is_empty();
                    }
                    self.tell(&want).await?;
                }
                Ok(()) = items.changed() => {}
                Some(ended) = self.tasks.join_next() => match ended {
                    Ok(ended) => ended?,
                    Err(error) => return Err(self.bad(&error.to_string())),
                },
            }
        }
    }

    /// It is all here: durable first, then recorded as complete, then named.
    async fn keep(
        &self,
        generation: u64,
        disk_work: &mpsc::Sender<DiskWork>,
    ) -> Result<(), MigrationError> {
        let (done, kept) = oneshot::channel();
        queue(disk_work, DiskWork::Keep(generation, done), self.peer).await?;
        kept.await.map_err(|_| self.bad("the disk task is gone"))??;
        let settled = self.site.host.settle_image(&self.place, self.open.replace).await?;
        tracing::info!(peer = self.peer, image = %settled.display(), "an image has arrived");
        self.tell(&ToSource::Kept).await
    }

    async fn tell(&self, message: &ToSource) -> Result<(), MigrationError> {
        self.control.send(message).await.map_err(MigrationError::sending(self.peer))
    }

    fn bad(&self, detail: &str) -> MigrationError {
        MigrationError::protocol(self.peer, detail)
    }
}

/// What begins as an image has the record of it; without one, or if anything is not as it should be, the
/// image is read instead.
fn take_over_record(old: &Path, own: &Path) {
    let (from, to) = (RecipeLog::path_for(old), RecipeLog::path_for(own));
    let holds = || {
        let kept = RecipeLog::load(&from).ok()?.complete()?;
        Some(ImageIdentity::of(&fs::metadata(old).ok()?) == kept.image)
    };
    if holds() != Some(true) || fs::copy(&from, &to).is_err() {
        let _ = fs::remove_file(to);
    }
}

//! Jobs under a mover that does what its VM's name says.

use longhaul_transport::Fingerprint;

use super::*;

/// Ends as the name of the VM says.
struct ByName;

#[async_trait]
impl Mover for ByName {
    async fn seed(
        &self,
        job: Job,
        progress: watch::Sender<Progress>,
        cancel: CancelToken,
    ) -> Result<Completed, Failure> {
        self.migrate(job, progress, cancel).await
    }

    async fn migrate(
        &self,
        job: Job,
        progress: watch::Sender<Progress>,
        cancel: CancelToken,
    ) -> Result<Completed, Failure> {
        progress.send_modify(|progress| progress.payload_bytes = 7);
        match job.vm.as_str() {
            "quick" => Ok(Completed { vm: job.vm, ..Completed::default() }),
            "broken" => panic!("a defect"),
            _ => {
                cancel.cancelled().await;
                let state = format!("{} runs on here", job.vm);
                Err(Failure::of_kind(FailureKind::Cancelled, "cancelled", state, ""))
            }
        }
    }

    async fn push(
        &self,
        job: Job,
        progress: watch::Sender<Progress>,
        cancel: CancelToken,
    ) -> Result<Completed, Failure> {
        self.migrate(job, progress, cancel).await
    }

    async fn pull(
        &self,
        job: Job,
        progress: watch::Sender<Progress>,
        cancel: CancelToken,
    ) -> Result<Completed, Failure> {
        self.migrate(job, progress, cancel).await
    }

    async fn verify(&self, image: &Path, _: mpsc::Sender<Event>) -> Result<VerifySummary, Failure> {
        Err(Failure::refused(format!("{} is none", image.display()), ""))
    }

    async fn serve(&self, session: Session, _: Peer, _: CancelToken) {
        session.refuse("not in this test");
    }

    async fn obstacles_at(&self, _: &VmSpec, _: &Peer) -> Result<Vec<String>, Failure> {
        Ok(Vec::new())
    }

    async fn resolve(&self, vm: &str, _: Choice) -> Result<String, Failure> {
        Err(Failure::refused(format!("{vm} is not in doubt"), ""))
    }

    async fn in_doubt(&self) -> Vec<InDoubt> {
        Vec::new()
    }

    fn seeded(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    fn conflicts(&self, _: Conflict) -> u64 {
        0
    }

    async fn forget_seed(&self, _: &str) -> Result<bool, Failure> {
        Ok(false)
    }
}

fn jobs(dir: &Path) -> Arc<Jobs> {
    let history = History::load(&dir.join("history.jsonl")).unwrap();
    Arc::new(Jobs::new(Arc::new(ByName), history))
}

fn start(jobs: &Arc<Jobs>, vm: &str, deadline_s: Option<u64>) -> Result<Follow, Failure> {
    let wish = Wish { kind: JobKind::Migrate, vm: vm.to_owned(), vm_known: true, in_doubt: false };
    let fingerprint = Fingerprint::from_bytes([1; 32]);
    let peer = Peer { name: "lyon".into(), address: "192.0.2.1:4873".into(), fingerprint };
    let options = MoveOptions {
        downtime_limit_ms: 300,
        deadline_s,
        rate: None,
        background: false,
        image: None,
        fetch: None,
    };
    jobs.start(&wish, peer, options)
}

fn failure(outcome: JobOutcome) -> Failure {
    match outcome {
        JobOutcome::Failed(failure) => failure,
        JobOutcome::Completed(completed) => panic!("it completed: {completed:?}"),
    }
}

#[tokio::test]
async fn a_job_ends_with_one_record_whether_or_not_it_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = jobs(dir.path());
    drop(start(&jobs, "quick", None).unwrap());
    let mut idle = jobs.count.subscribe();
    idle.wait_for(|count| *count == 0).await.unwrap();
    let mut second = start(&jobs, "quick", None).unwrap();
    assert!(matches!(second.outcome().await, JobOutcome::Completed(_)));
    assert_eq!(second.summary().progress.payload_bytes, 7);
    let ids: Vec<u64> = jobs.recent(9).iter().map(|record| record.id).collect();
    assert_eq!(ids, [2, 1]);
    let again = self::jobs(dir.path());
    assert_eq!(again.recent(9), jobs.recent(9));
    assert_eq!(start(&again, "quick", None).unwrap().summary().id, 3);
}

#[tokio::test]
async fn a_vm_has_one_job_until_that_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = jobs(dir.path());
    let mut first = start(&jobs, "db1", None).unwrap();
    let refused = start(&jobs, "db1", None).unwrap_err();
    assert!(refused.what.contains("moves it already"), "{refused:?}");
    assert_eq!(jobs.follow("db1").unwrap().summary().id, 1);
    jobs.cancel("db1").unwrap();
    let failure = failure(first.outcome().await);
    assert_eq!(failure.kind, FailureKind::Cancelled);
    assert_eq!(failure.what, "the migration of db1 was cancelled");
    assert_eq!(failure.state, "db1 runs on here");
    // Whoever saw the end may start the next one at once.
    start(&jobs, "db1", None).unwrap();
    assert!(jobs.cancel("db2").is_err() && jobs.follow("db2").is_err());
    assert_eq!(jobs.stop(Duration::from_secs(60)).await, 0);
}

#[tokio::test]
async fn a_deadline_is_a_failure_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = jobs(dir.path());
    let mut follow = start(&jobs, "db1", Some(0)).unwrap();
    let failure = failure(follow.outcome().await);
    assert_eq!(failure.kind, FailureKind::Failed);
    assert_eq!(failure.what, "the migration of db1 reached its deadline");
}

#[tokio::test]
async fn a_defect_costs_the_job_and_promises_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = jobs(dir.path());
    let failure = failure(start(&jobs, "broken", None).unwrap().outcome().await);
    assert_eq!(failure.kind, FailureKind::InDoubt);
    assert!(failure.next.contains("restart the agent"));
    assert!(matches!(
        start(&jobs, "quick", None).unwrap().outcome().await,
        JobOutcome::Completed(_)
    ));
}

#[tokio::test]
async fn stopping_ends_all_jobs_and_admits_none() {
    let dir = tempfile::tempdir().unwrap();
    let jobs = jobs(dir.path());
    let mut running = start(&jobs, "db1", None).unwrap();
    start(&jobs, "db2", None).unwrap();
    assert_eq!(jobs.stop(Duration::from_secs(60)).await, 0);
    assert!(failure(running.outcome().await).what.contains("because the agent stops"));
    assert!(start(&jobs, "db3", None).unwrap_err().what.contains("is stopping"));
}

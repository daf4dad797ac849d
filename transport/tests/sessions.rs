//! Sessions over real UDP on loopback: who gets in, what is refused, what arrives.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in what its cases share")]

use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use longhaul_transport::{
    Class, CloseReason, ConnectError, Endpoint, FrameError, Identity, MAX_BATCH_BYTES,
    MAX_CONTROL_FRAME, MAX_PENDING_HANDSHAKES, RecvError, SendError, Session, TrustedPeers, Tuning,
};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// No answer on loopback takes this long; a test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(20);

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

struct Agent {
    endpoint: Endpoint,
    identity: Identity,
    trust: Arc<TrustedPeers>,
}

impl Agent {
    fn start() -> Self {
        let home = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_create(home.path()).unwrap();
        let trust = Arc::new(TrustedPeers::default());
        let endpoint =
            Endpoint::bind(loopback(), &identity, trust.clone(), Tuning::default()).unwrap();
        Self { endpoint, identity, trust }
    }

    fn addr(&self) -> SocketAddr {
        self.endpoint.local_addr()
    }

    async fn connect(&self, to: &Self) -> Result<Session, ConnectError> {
        let connecting = self.endpoint.connect(to.addr(), to.identity.fingerprint());
        tokio::time::timeout(PATIENCE, connecting).await.expect("an answer in time")
    }

    async fn accept(&self) -> Session {
        let accepting = tokio::time::timeout(PATIENCE, self.endpoint.accept());
        accepting.await.expect("a session in time").expect("an open endpoint")
    }
}

/// Two agents, paired both ways.
fn paired() -> (Agent, Agent) {
    let (one, two) = (Agent::start(), Agent::start());
    one.trust.add(two.identity.fingerprint());
    two.trust.add(one.identity.fingerprint());
    (one, two)
}

async fn session() -> (Agent, Agent, Session, Session) {
    let (one, two) = paired();
    let (from, to) = tokio::join!(one.connect(&two), two.accept());
    (one, two, from.unwrap(), to)
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Message {
    Question { id: u64, text: String },
    Answer(Vec<u8>),
}

#[tokio::test]
async fn paired_agents_talk_both_ways() {
    let (one, two, from, to) = session().await;
    assert_eq!(from.peer(), two.identity.fingerprint());
    assert_eq!(to.peer(), one.identity.fingerprint());
    assert_eq!(from.remote_addr(), two.addr());
    assert_eq!(to.peer_info().agent_version, Tuning::default().agent_version);

    let (ask, mut answers) = from.control().unwrap();
    assert!(from.control().is_none(), "the control stream is given out once");
    let (answer, mut questions) = to.control().unwrap();
    for id in 0..100 {
        ask.send(&Message::Question { id, text: "x".repeat(id as usize) }).await.unwrap();
    }
    for expected in 0..100 {
        let Some(Message::Question { id, text }) = questions.recv().await.unwrap() else {
            panic!("a question")
        };
        assert_eq!((id, text.len() as u64), (expected, expected));
    }
    answer.send(&Message::Answer(vec![7; 500_000])).await.unwrap();
    answer.finish().await.unwrap();
    assert_eq!(answers.recv().await.unwrap(), Some(Message::Answer(vec![7; 500_000])));
    assert_eq!(answers.recv::<Message>().await.unwrap(), None);
    assert_eq!(answer.send(&0u8).await, Err(SendError::Finished));

    from.close("all done");
    assert_eq!(to.closed().await, CloseReason::Clean { reason: "all done".into() });
    assert_eq!(from.closed().await, CloseReason::Local { reason: "all done".into() });
}

#[tokio::test]
async fn an_unpaired_agent_is_refused_and_named_in_one_warning() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_ansi(false)
        .with_writer(log.clone())
        .finish();
    // The endpoints' threads log where they were made.
    let _guard = tracing::subscriber::set_default(subscriber);

    let (stranger, host) = (Agent::start(), Agent::start());
    let error = stranger.connect(&host).await.unwrap_err();
    let ours = stranger.identity.fingerprint();
    assert!(matches!(error, ConnectError::NotPaired { ours: o, .. } if o == ours), "{error}");
    let text = error.to_string();
    assert!(text.contains("longhaul pair") && text.contains(&ours.to_string()), "{text}");

    // Pairing takes effect at the next handshake, without a restart.
    host.trust.add(ours);
    let (from, to) = tokio::join!(stranger.connect(&host), host.accept());
    assert_eq!(to.peer(), ours);
    from.unwrap().close("done");
    host.trust.remove(&ours);
    assert!(stranger.connect(&host).await.is_err());

    log.has_lines(2).await;
    let text = log.text();
    let lines: Vec<&str> = text.lines().filter(|line| line.contains("not paired")).collect();
    assert_eq!(lines.len(), 2, "one a refusal:\n{text}");
    for line in lines {
        assert!(line.contains(&ours.to_string()), "{line}");
        assert!(line.contains(&stranger.addr().to_string()), "{line}");
    }
}

#[tokio::test]
async fn a_wrong_key_is_shown_beside_the_expected_one() {
    let (one, two) = paired();
    let expected = one.identity.fingerprint();
    let presented = two.identity.fingerprint();
    let error = one.endpoint.connect(two.addr(), expected).await.unwrap_err();
    assert!(
        matches!(error, ConnectError::WrongKey { expected: e, presented: p, .. }
            if (e, p) == (expected, presented)),
        "{error}"
    );
    let text = error.to_string();
    assert!(text.contains(&expected.to_string()) && text.contains(&presented.to_string()));
}

#[tokio::test]
async fn a_probe_learns_the_key_and_tells_nothing() {
    let (prober, host) = (Agent::start(), Agent::start());
    let seen = prober.endpoint.probe(host.addr()).await.unwrap();
    assert_eq!(seen, host.identity.fingerprint());
    host.endpoint.close().await;
    assert!(host.endpoint.accept().await.is_none(), "a probe is no session");
}

#[tokio::test(start_paused = true)]
async fn nobody_there_is_said_in_time() {
    let agent = Agent::start();
    // A socket that is open and never answers.
    let silent = std::net::UdpSocket::bind(loopback()).unwrap();
    let addr = silent.local_addr().unwrap();
    let error = agent.endpoint.connect(addr, agent.identity.fingerprint()).await.unwrap_err();
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
    assert!(error.is_retryable());
    assert!(matches!(agent.endpoint.probe(addr).await, Err(ConnectError::Unreachable { .. })));
}

#[tokio::test]
async fn handshakes_that_hang_do_not_keep_others_out() {
    let (one, two) = paired();
    // The first packets of many clients, sent on from addresses at which nobody answers. One
    // client after the other, because a burst of them would overflow the catching socket.
    let catcher = tokio::net::UdpSocket::bind(loopback()).await.unwrap();
    let caught_at = catcher.local_addr().unwrap();
    let stranger = Agent::start();
    let mut probing = tokio::task::JoinSet::new();
    let mut clients = std::collections::BTreeSet::new();
    let mut silent = Vec::new();
    let mut packet = vec![0; 2048];
    for client in 0..2 * MAX_PENDING_HANDSHAKES {
        let endpoint = stranger.endpoint.clone();
        probing.spawn(async move { endpoint.probe(caught_at).await.map(drop) });
        while clients.len() == client {
            let received = tokio::time::timeout(PATIENCE, catcher.recv_from(&mut packet));
            let (length, _) = received.await.expect("a packet of this client").unwrap();
            // The connection id that the client chose (RFC 9000, section 17.2).
            if clients.insert(packet[6..6 + usize::from(packet[5])].to_vec()) {
                let sender = tokio::net::UdpSocket::bind(loopback()).await.unwrap();
                sender.send_to(&packet[..length], two.addr()).await.unwrap();
                silent.push(sender);
            }
        }
    }
    let (from, _to) = tokio::join!(one.connect(&two), two.accept());
    from.unwrap();
}

#[tokio::test]
async fn batches_of_all_classes_arrive_whole() {
    let (_one, _two, from, to) = session().await;
    let mut sent = Vec::new();
    let mut senders = tokio::task::JoinSet::new();
    for number in 0..60u32 {
        let class = Class::ALL[number as usize % Class::ALL.len()];
        let length = [0, 1, 4096, 70_000, 2_000_000][number as usize % 4];
        let body: Vec<u8> = (0..length).map(|i: u32| (i ^ number) as u8).collect();
        let header = number.to_le_bytes();
        sent.push((class, [&header[..], &body].concat()));
        let from = from.clone();
        senders.spawn(async move {
            let pieces = body.chunks(50_000).map(Bytes::copy_from_slice).collect();
            from.send_batch_acked(class, &header, pieces).await.unwrap();
        });
    }
    let mut received = Vec::new();
    for _ in 0..sent.len() {
        let batch = to.recv_batch().await.unwrap();
        received.push((batch.class, batch.body.to_vec()));
    }
    senders.join_all().await;
    received.sort();
    sent.sort();
    assert!(received == sent, "the same batches, in whatever order");

    let (near, far) = (from.stats(), to.stats());
    let payload: usize = sent.iter().map(|(_, body)| body.len()).sum();
    let sum = |each: fn(&longhaul_transport::ClassBytes) -> u64, stats: &[_; 5]| {
        stats.iter().map(each).sum::<u64>()
    };
    assert_eq!(sum(|class| class.sent, &near.classes), payload as u64);
    assert_eq!(sum(|class| class.acked, &near.classes), payload as u64);
    assert_eq!(sum(|class| class.received, &far.classes), payload as u64);
    assert!(near.wire_bytes_sent > payload as u64);
    assert!(far.wire_bytes_received > payload as u64);
    assert!(near.mtu >= 1200 && near.sent_packets > 0);
}

#[tokio::test]
async fn an_abandoned_batch_leaves_nothing() {
    let (_one, _two, from, to) = session().await;
    let large = || vec![Bytes::from(vec![1; MAX_BATCH_BYTES])];
    let limiter = longhaul_transport::RateLimiter::new();
    let job = limiter.job();
    job.set_job(Some("1M".parse().unwrap()));
    from.set_rate(job.clone());
    let sending = from.send_batch(Class::Pages, b"", large());
    let cut_short = tokio::time::timeout(Duration::from_millis(100), sending).await;
    assert!(cut_short.is_err(), "16 MiB at 1 Mbit/s");
    job.set_job(None);
    from.send_batch(Class::Seed, b"next", vec![]).await.unwrap();
    assert_eq!(to.recv_batch().await.unwrap().body, "next");
    assert_eq!(from.close_reason(), None);
}

#[tokio::test]
async fn what_is_too_large_is_refused_before_it_is_sent() {
    let (_one, _two, from, to) = session().await;
    let body = vec![Bytes::from(vec![0; MAX_BATCH_BYTES])];
    let error = from.send_batch(Class::Pages, b"x", body.clone()).await.unwrap_err();
    assert!(matches!(error, SendError::Frame(FrameError::TooLarge { .. })), "{error}");
    let (control, _) = from.control().unwrap();
    let error = control.send(&"x".repeat(MAX_CONTROL_FRAME)).await.unwrap_err();
    assert!(matches!(error, SendError::Frame(FrameError::TooLarge { .. })), "{error}");
    // The largest that is allowed still passes.
    from.send_batch(Class::Pages, b"", body).await.unwrap();
    assert_eq!(to.recv_batch().await.unwrap().body.len(), MAX_BATCH_BYTES);
}

#[tokio::test]
async fn an_unexpected_message_ends_the_session() {
    let (_one, _two, from, to) = session().await;
    let (control, _answers) = from.control().unwrap();
    let (_, mut questions) = to.control().unwrap();
    control.send(&u64::MAX).await.unwrap();
    let error = questions.recv::<Message>().await.unwrap_err();
    assert!(matches!(error, RecvError::Frame(_)), "{error}");
    assert!(matches!(to.closed().await, CloseReason::Violation { .. }));
    assert!(matches!(from.closed().await, CloseReason::Refused { .. }));
    assert!(!from.closed().await.is_retryable());
}

/// A session takes up its path's pace while its packets leave already, on another thread. When each of
/// the two held what the other waited for, three of four runs over 6000 sessions hung on a busy host.
/// Sends batches of a MiB for as long as `more` says, and has them taken at the other end; how many.
async fn pour(from: &Session, to: &Session, more: impl Fn(u64) -> bool) -> u64 {
    let taking = {
        let to = to.clone();
        tokio::spawn(async move {
            let mut count = 0;
            while to.recv_batch().await.is_ok() {
                count += 1;
            }
            count
        })
    };
    let body = Bytes::from(vec![0x5a; 1 << 20]);
    let mut sent = 0;
    while more(sent) {
        let four = [(); 4].map(|()| from.send_batch_acked(Class::Pages, b"", vec![body.clone()]));
        let [a, b, c, d] = four;
        let (a, b, c, d) = tokio::join!(a, b, c, d);
        [a, b, c, d].into_iter().for_each(|one| one.unwrap());
        sent += 4;
    }
    from.close("done");
    assert_eq!(taking.await.unwrap(), sent);
    sent
}

#[tokio::test]
async fn lanes_run_on_threads_of_their_own() {
    let (_one, _two, from, to) = session().await;
    for _ in 0..2 {
        from.widen().await.unwrap();
    }
    pour(&from, &to, |sent| sent < 64).await;
    let stats = from.stats();
    // On a slow machine it may have opened one more by itself.
    assert!(stats.connections >= 3, "{stats:?}");
    assert_eq!(stats.class(Class::Pages).acked, 64 << 20);
}

/// Fills a core for as long as it takes until that is noticed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "real time: needs two cores that nobody else uses"]
async fn a_core_that_is_the_limit_brings_a_lane() {
    let (_one, _two, from, to) = session().await;
    let began = std::time::Instant::now();
    pour(&from, &to, |_| from.stats().connections == 1 && began.elapsed() < PATIENCE).await;
    println!("{} connections after {:?}", from.stats().connections, began.elapsed());
    assert!(from.stats().connections > 1, "none in {PATIENCE:?}");
}

#[tokio::test]
async fn sessions_begin_while_their_packets_leave() {
    let (one, two) = paired();
    for _ in 0..1_000 {
        let (from, to) = tokio::join!(one.connect(&two), two.accept());
        from.unwrap().close("done");
        to.closed().await;
    }
}

#[tokio::test]
async fn each_way_to_leave_is_told_apart() {
    let (_one, _two, from, to) = session().await;
    from.refuse("the disk is full");
    assert_eq!(to.closed().await, CloseReason::Refused { reason: "the disk is full".into() });

    let (_one, _two, from, to) = session().await;
    drop(from);
    assert!(matches!(to.closed().await, CloseReason::Shutdown { .. }));

    let (one, _two, from, to) = session().await;
    one.endpoint.close().await;
    assert!(matches!(to.closed().await, CloseReason::Shutdown { .. }));
    assert!(matches!(from.closed().await, CloseReason::Local { .. }));
    assert!(to.recv_batch().await.is_err());
}

#[tokio::test]
async fn a_half_of_the_control_stream_keeps_the_session() {
    let (_one, _two, from, to) = session().await;
    let (control, answers) = from.control().unwrap();
    drop((from, answers));
    let (_, mut questions) = to.control().unwrap();
    control.send(&5u8).await.unwrap();
    assert_eq!(questions.recv::<u8>().await.unwrap(), Some(5));
    drop(control);
    assert!(matches!(to.closed().await, CloseReason::Shutdown { .. }));
}

/// Collects what is logged.
#[derive(Clone, Default)]
struct Log {
    bytes: Arc<Mutex<Vec<u8>>>,
    written: Arc<Notify>,
}

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.bytes.lock().unwrap().clone()).unwrap()
    }

    /// Returns once there are so many lines. A host writes of a refusal when it learns of it, which
    /// may be after the refused one does.
    async fn has_lines(&self, lines: usize) {
        let waiting = async {
            loop {
                let written = self.written.notified();
                if self.text().lines().count() >= lines {
                    break;
                }
                written.await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(10), waiting).await;
        waited.unwrap_or_else(|_| panic!("not {lines} lines:\n{}", self.text()));
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.bytes.lock().unwrap().extend(bytes);
        self.written.notify_waiters();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> tracing_subscriber::fmt::MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

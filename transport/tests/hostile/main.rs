//! What peers that mean harm can cost, measured: each is a process of its own with a key that is
//! trusted, and attacks an endpoint in this process over UDP.
//!
//! Invariant: this process's memory grows by no more than `PROTOCOL.md` says, who breaks the protocol
//! is told how, and an honest session beside the attack does not notice.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test may panic, also in what its cases share")]

mod raw;

use std::io::{BufRead, BufReader, Lines};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use longhaul_transport::{
    CONNECTION_WINDOW, Class, Endpoint, INBOUND_BULK_BYTES, INBOUND_URGENT_BYTES, Identity,
    MAX_BATCH_BYTES, MAX_UNI_STREAMS, Session, TrustedPeers, Tuning,
};
use raw::{Raw, SEEN_NOTHING, config, end, greeting, head};
use tokio::sync::{Mutex, MutexGuard, watch};
use tokio::task::JoinHandle;

const MIB: u64 = 1024 * 1024;
/// What a session may hold of a peer's bytes.
const SESSION_BYTES: u64 = (INBOUND_BULK_BYTES + INBOUND_URGENT_BYTES) as u64 + CONNECTION_WINDOW;
/// What is allowed beyond bytes of the peer's: QUIC's own books, an allocator's gaps.
const OVERHEAD: u64 = 32 * MIB;
/// No step of these tests takes this long.
const PATIENCE: Duration = Duration::from_secs(60);
/// What one batch of the honest session may take, on a busy machine.
const UNDISTURBED: Duration = Duration::from_secs(3);
/// Streams that are opened and abandoned in a flood.
const FLOOD: u64 = 20_000;
/// Where an attacker is told where to go, and who it is.
const TO: &str = "LONGHAUL_TEST_ATTACK";
/// What an attacker prints before its news.
const NEWS: &str = "news: ";

/// Only one attack at a time is measured.
static TURN: Mutex<()> = Mutex::const_new(());

/// This process's memory now, and at most since it was last asked, in bytes.
fn memory() -> [u64; 2] {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = |name| status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    let bytes = |name| line(name).trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024;
    let memory = ["VmRSS:", "VmHWM:"].map(bytes);
    // Begins the maximum anew (proc(5)).
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    memory
}

/// The endpoint under attack, with an honest session that talks all the time.
struct Host {
    homes: tempfile::TempDir,
    endpoint: Endpoint,
    honest: JoinHandle<Duration>,
    stop: watch::Sender<bool>,
    _turn: MutexGuard<'static, ()>,
}

impl Host {
    async fn start() -> Self {
        let turn = TURN.lock().await;
        let homes = tempfile::tempdir().unwrap();
        let identity = |name| Identity::load_or_create(&homes.path().join(name)).unwrap();
        let (own, friend, foe) = (identity("own"), identity("friend"), identity("foe"));
        let keys = [&own, &friend, &foe].map(Identity::fingerprint);
        let trust = Arc::new(TrustedPeers::new(keys));
        let open = |identity| {
            let any = SocketAddr::from(([127, 0, 0, 1], 0));
            Endpoint::bind(any, identity, trust.clone(), Tuning::default()).unwrap()
        };
        let (endpoint, near) = (open(&own), open(&friend));
        let connecting = near.connect(endpoint.local_addr(), own.fingerprint());
        let (from, to) = tokio::join!(connecting, endpoint.accept());
        take_all(to.unwrap());
        let (stop, stopped) = watch::channel(false);
        let honest = tokio::spawn(async move {
            let (_near, from) = (near, from.unwrap());
            let mut longest = Duration::ZERO;
            while !*stopped.borrow() {
                let began = Instant::now();
                let body = vec![Bytes::from(vec![1; 64 * 1024])];
                from.send_batch_acked(Class::Pages, b"", body).await.unwrap();
                longest = longest.max(began.elapsed());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            longest
        });
        Self { homes, endpoint, honest, stop, _turn: turn }
    }

    fn attack(&self, kind: &str) -> Attack {
        let to = format!(
            "{kind} {} {}",
            self.endpoint.local_addr(),
            self.homes.path().join("foe").display()
        );
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "attacker", "--nocapture", "--test-threads=1"])
            .env(TO, to)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let news = BufReader::new(child.stdout.take().unwrap()).lines();
        Attack { child, news: Some(news) }
    }

    async fn accept(&self) -> Session {
        tokio::time::timeout(PATIENCE, self.endpoint.accept()).await.unwrap().unwrap()
    }

    /// The longest that the honest session has waited for a batch of its own.
    async fn end(self) -> Duration {
        self.stop.send(true).unwrap();
        let longest = tokio::time::timeout(PATIENCE, self.honest).await.unwrap().unwrap();
        assert!(longest < UNDISTURBED, "{longest:?}");
        longest
    }
}

/// Takes all batches of a session, as an agent does.
fn take_all(session: Session) {
    tokio::spawn(async move { while session.recv_batch().await.is_ok() {} });
}

/// A process that attacks.
struct Attack {
    child: Child,
    news: Option<Lines<BufReader<ChildStdout>>>,
}

impl Attack {
    /// The next that it has to say.
    async fn news(&mut self) -> String {
        let mut lines = self.news.take().unwrap();
        let reading = tokio::task::spawn_blocking(move || {
            let news = lines.find_map(|line| Some(line.unwrap().split_once(NEWS)?.1.to_owned()));
            (news.expect("an attacker that lives"), lines)
        });
        let (news, lines) = tokio::time::timeout(PATIENCE, reading).await.unwrap().unwrap();
        self.news = Some(lines);
        news
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the attacks do, each with how the endpoint closes; none: it does not.
const GARBAGE: [(&str, Option<(u64, &str)>); 9] = [
    (
        "garbage as a greeting",
        Some((3, "a greeting of 3735928559 bytes exceeds the limit of 1024")),
    ),
    ("another program's greeting", Some((3, "the greeting does not begin as an agent's does"))),
    ("the greeting of nobody's lane", Some((6, "no session here wants this lane"))),
    (
        "garbage on control",
        Some((3, "a control frame of 3735928559 bytes exceeds the limit of 1048576")),
    ),
    ("garbage as a batch", Some((3, "unknown kind 239 of frame"))),
    ("garbage as receipts", Some((3, "a receipt of 3735928559 bytes exceeds the limit of 8192"))),
    ("a batch of 4 GiB", Some((3, "a batch of 4294967295 bytes exceeds the limit of 16777216"))),
    ("256 batches of 16 MiB announced", None),
    ("20,000 streams opened and abandoned", None),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_floods_cost_next_to_nothing_and_are_named() {
    let host = Host::start().await;
    for (kind, expected) in GARBAGE {
        let [before, _] = memory();
        let mut attack = host.attack(kind);
        let session = match kind.contains("greeting") {
            true => None,
            false => Some(host.accept().await),
        };
        session.iter().cloned().for_each(take_all);
        let news = attack.news().await;
        let [_, most] = memory();
        let grown = most.saturating_sub(before);
        println!("{kind}: {news}; {:.1} MiB", grown as f64 / MIB as f64);
        let named = |(code, why)| format!("{code} {why}");
        assert_eq!(news, expected.map_or_else(|| "done".to_owned(), named));
        assert!(grown < OVERHEAD, "{kind}: {grown} bytes");
        if let (None, Some(session)) = (expected, &session) {
            assert_eq!(session.close_reason(), None);
        }
    }
    println!("the honest session waited for {:?} at most", host.end().await);
}

/// Everything that a session holds is used up: unfinished batches have the memory for batches but for a
/// byte each, and what follows them fills QUIC's window. Then nothing more comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_that_are_never_finished_cost_what_is_stated() {
    let host = Host::start().await;
    let [before, _] = memory();
    let mut attacks = Vec::new();
    for count in 1..=2 {
        let mut attack = host.attack("batches that are never finished");
        let session = host.accept().await;
        take_all(session.clone());
        let sent: u64 = attack.news().await.parse().unwrap();
        let stated = SESSION_BYTES;
        assert!((stated * 9 / 10..stated).contains(&sent), "{sent} of {stated}");
        let began = Instant::now();
        while session.stats().wire_bytes_received < sent {
            assert!(began.elapsed() < PATIENCE, "{:?}", session.stats());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        attacks.push((attack, session));
        let [_, most] = memory();
        let grown = most.saturating_sub(before);
        println!(
            "{count} sessions hold {} MiB each: {:.1} MiB in all",
            sent / MIB,
            grown as f64 / MIB as f64
        );
        assert!(grown < count * (SESSION_BYTES + OVERHEAD), "{grown} bytes of {count} sessions");
    }
    println!("the honest session waited for {:?} at most", host.end().await);
}

/// Not a test: an attacker's process.
#[test]
fn attacker() {
    let Ok(to) = std::env::var(TO) else { return };
    let mut words = to.rsplitn(3, ' ');
    let (home, addr, kind) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
    let (home, addr) = (PathBuf::from(home), addr.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(attack(kind, addr, &home));
}

async fn attack(kind: &str, addr: SocketAddr, home: &Path) {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let endpoint = quinn::Endpoint::client(any).unwrap();
    let connection = endpoint.connect_with(config(home), addr, "any").unwrap().await.unwrap();
    let garbage = [0xef, 0xbe, 0xad, 0xde].repeat(256);
    if kind.contains("greeting") {
        let (mut send, _recv) = connection.open_bi().await.unwrap();
        let another = [&64u32.to_le_bytes()[..], &[b'G'; 64]].concat();
        let bytes = match kind {
            "garbage as a greeting" => garbage,
            "the greeting of nobody's lane" => greeting(1, Some(2)),
            _ => another,
        };
        send.write_all(&bytes).await.unwrap();
        return tell_end(&connection).await;
    }
    let mut raw = Raw::greet(connection, std::process::id() as u8).await;
    match kind {
        "garbage on control" => raw.control.0.write_all(&garbage).await.unwrap(),
        "garbage as a batch" => drop(raw.stream(&garbage).await),
        "a batch of 4 GiB" => drop(raw.stream(&head(0, 0, u32::MAX)).await),
        "garbage as receipts" => {
            let (mut send, _recv) = raw.connection.open_bi().await.unwrap();
            send.write_all(&garbage).await.unwrap();
            return tell_end(&raw.connection).await;
        }
        _ => {
            let (mut send, _recv) = raw.connection.open_bi().await.unwrap();
            send.write_all(&SEEN_NOTHING).await.unwrap();
            return hold(kind, &raw).await;
        }
    }
    tell_end(&raw.connection).await;
}

/// What breaks no rule at once.
async fn hold(kind: &str, raw: &Raw) {
    let largest = MAX_BATCH_BYTES as u32;
    let mut streams = Vec::new();
    match kind {
        "256 batches of 16 MiB announced" => {
            for number in 0..u64::from(MAX_UNI_STREAMS) {
                streams.push(raw.stream(&head(0, number, largest)).await);
            }
            println!("{NEWS}done");
        }
        "20,000 streams opened and abandoned" => {
            for number in 0..FLOOD {
                let mut stream = raw.stream(&[&head(0, number, largest)[..], b"x"].concat()).await;
                stream.reset(1u32.into()).unwrap();
            }
            println!("{NEWS}done");
        }
        "batches that are never finished" => {
            let mut sent = 0;
            let almost = vec![0x5a; MAX_BATCH_BYTES - 1];
            let classes = [(0, INBOUND_BULK_BYTES), (4, INBOUND_URGENT_BYTES)];
            for (class, budget) in classes {
                for _ in 0..budget / MAX_BATCH_BYTES {
                    let number = streams.len() as u64;
                    let bytes = [&head(class, number, largest)[..], &almost].concat();
                    streams.push(raw.stream(&bytes).await);
                    sent += bytes.len();
                }
            }
            // For these there is no room: they stay in QUIC's window. quinn widens it in eighths.
            let left = MAX_UNI_STREAMS as usize - streams.len();
            let each = CONNECTION_WINDOW as usize / 8 * 7 / left;
            for _ in 0..left {
                let number = streams.len() as u64;
                let bytes = [&head(0, number, largest)[..], &almost[..each]].concat();
                streams.push(raw.stream(&bytes).await);
                sent += bytes.len();
            }
            println!("{NEWS}{sent}");
        }
        other => panic!("no attack is called {other}"),
    }
    // Until this process is ended.
    raw.connection.closed().await;
}

async fn tell_end(connection: &quinn::Connection) {
    let (code, reason) = end(connection).await;
    println!("{NEWS}{code} {reason}");
}

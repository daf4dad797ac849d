//! The client against a scripted peer: what a real QEMU cannot be made to do on demand.

use tokio::io::AsyncBufReadExt;

use super::*;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7},
 "package": "x"}, "capabilities": ["oob"], "new-field": 1}}"#;

struct Peer {
    read: BufReader<OwnedReadHalf>,
    write: OwnedWriteHalf,
}

impl Peer {
    async fn say(&mut self, line: &str) {
        let line = line.replace('\n', " ") + "\r\n";
        self.write.write_all(line.as_bytes()).await.unwrap();
    }

    async fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.read.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

async fn pair() -> (Qmp, Peer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (read, write) = theirs.into_split();
    let mut peer = Peer { read: BufReader::new(read), write };
    let (qmp, peer) = tokio::join!(Qmp::over(ours, "vm1"), async move {
        peer.say(GREETING).await;
        let hello = peer.hear().await;
        assert_eq!(hello["execute"], "qmp_capabilities");
        peer.say(&json!({ "return": {}, "id": hello["id"] }).to_string()).await;
        peer
    });
    (qmp.unwrap(), peer)
}

#[tokio::test]
async fn answers_find_their_commands_in_any_order() {
    let (qmp, mut peer) = pair().await;
    assert_eq!(qmp.version(), (7, 2, 22));
    let script = async {
        let (one, two) = (peer.hear().await, peer.hear().await);
        peer.say(r#"{"return": {"late": true}, "id": 999999}"#).await;
        peer.say(r#"{"event": "NEW_THING", "timestamp": {"seconds": -1, "microseconds": -1}}"#)
            .await;
        for asked in [two, one] {
            let echo = json!({ "return": asked["execute"], "id": asked["id"], "extra": [] });
            peer.say(&echo.to_string()).await;
        }
    };
    let (one, two, ()) =
        tokio::join!(qmp.execute("one", Value::Null), qmp.execute("two", json!({})), script);
    assert_eq!((one.unwrap(), two.unwrap()), (json!("one"), json!("two")));
}

#[tokio::test]
async fn an_error_carries_the_hypervisors_words() {
    let (qmp, mut peer) = pair().await;
    let script = async {
        let asked = peer.hear().await;
        let error = json!({ "class": "CommandNotFound", "desc": "no such thing" });
        peer.say(&json!({ "error": error, "id": asked["id"] }).to_string()).await;
    };
    let (answer, ()) = tokio::join!(qmp.execute("do-it", json!({})), script);
    assert_eq!(
        answer.unwrap_err().to_string(),
        "vm1: do-it was refused: no such thing (CommandNotFound)"
    );
}

#[tokio::test]
async fn a_closed_socket_ends_every_wait_and_stays_closed() {
    let (qmp, peer) = pair().await;
    let mut events = qmp.events();
    let waiting = qmp.execute("query-status", json!({}));
    let event = qmp.wait_event(&mut events, |_| true, Duration::from_secs(60));
    let (answer, event, ()) = tokio::join!(waiting, event, async { drop(peer) });
    assert!(matches!(answer, Err(HypervisorError::Gone { .. })), "{answer:?}");
    assert!(matches!(event, Err(HypervisorError::Gone { .. })), "{event:?}");
    assert!(qmp.is_closed());
    let again = qmp.execute("query-status", json!({})).await;
    assert!(matches!(again, Err(HypervisorError::Gone { .. })), "{again:?}");
    let late = qmp.wait_event(&mut qmp.events(), |_| true, Duration::from_secs(60)).await;
    assert!(matches!(late, Err(HypervisorError::Gone { .. })), "{late:?}");
}

#[tokio::test]
async fn an_event_before_the_answer_is_not_lost() {
    let (qmp, mut peer) = pair().await;
    let mut events = qmp.events();
    let script = async {
        let asked = peer.hear().await;
        peer.say(
            r#"{"event": "STOP", "timestamp": {"seconds": 3, "microseconds": 5}, "data": {"a": 1}}"#,
        )
        .await;
        peer.say(&json!({ "return": {}, "id": asked["id"] }).to_string()).await;
    };
    let (answer, ()) = tokio::join!(qmp.execute("stop", json!({})), script);
    answer.unwrap();
    let event =
        qmp.wait_event(&mut events, |e| e.name == "STOP", Duration::from_secs(60)).await.unwrap();
    assert_eq!((event.data, event.at_us), (json!({ "a": 1 }), Some(3_000_005)));
}

/// A QEMU with nothing left to send pauses its guest unasked: the downtime has begun then, and not
/// when somebody asks. Measured from the question it came out 150 ms short of what the guest saw.
#[tokio::test]
async fn when_the_vm_stopped_is_known_however_late_somebody_asks() {
    let (qmp, mut peer) = pair().await;
    assert_eq!(qmp.stopped_at(), None);
    let mut events = qmp.events();
    let mut instants = Vec::new();
    for event in ["RESUME", "STOP", "MIGRATION"] {
        instants.push(Instant::now());
        peer.say(&json!({ "event": event }).to_string()).await;
        qmp.wait_event(&mut events, |e| e.name == event, Duration::from_secs(60)).await.unwrap();
    }
    let stopped = qmp.stopped_at().unwrap();
    assert!(instants[1] <= stopped && stopped <= instants[2]);
}

#[tokio::test]
async fn a_silent_monitor_times_out_and_the_connection_lives_on() {
    let (qmp, mut peer) = pair().await;
    let mut events = qmp.events();
    let none = qmp.wait_event(&mut events, |_| true, Duration::from_millis(10)).await;
    assert!(matches!(none, Err(HypervisorError::Gone { .. })), "{none:?}");
    let unanswered = qmp.execute_within("query-status", json!({}), Duration::from_millis(10)).await;
    assert!(unanswered.unwrap_err().to_string().contains("query-status had no answer in 10ms"));
    let script = async {
        let late = peer.hear().await;
        peer.say(&json!({ "return": "late", "id": late["id"] }).to_string()).await;
        let asked = peer.hear().await;
        peer.say(&json!({ "return": "mine", "id": asked["id"] }).to_string()).await;
    };
    let (answer, ()) = tokio::join!(qmp.execute("query-name", json!({})), script);
    assert_eq!(answer.unwrap(), json!("mine"));
}

#[tokio::test]
async fn long_lines_work_up_to_the_cap() {
    let (qmp, mut peer) = pair().await;
    let script = async {
        let asked = peer.hear().await;
        let big = "x".repeat(1 << 20);
        peer.say(&json!({ "return": big, "id": asked["id"] }).to_string()).await;
        peer
    };
    let (answer, mut peer) = tokio::join!(qmp.execute("query-qmp-schema", json!({})), script);
    assert_eq!(answer.unwrap().as_str().unwrap().len(), 1 << 20);

    let flood = async move {
        let chunk = vec![b'x'; 1 << 20];
        // The client hangs up on the way: the writes fail then.
        while peer.write.write_all(&chunk).await.is_ok() {}
    };
    let (answer, ()) = tokio::join!(qmp.execute("query-qmp-schema", json!({})), flood);
    assert!(answer.unwrap_err().to_string().contains("more than 16777216 bytes"));
}

#[tokio::test]
async fn a_stranger_on_the_socket_is_told_apart() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (read, write) = theirs.into_split();
    let mut peer = Peer { read: BufReader::new(read), write };
    let (qmp, ()) = tokio::join!(Qmp::over(ours, "vm1"), async move {
        peer.say("220 mail ready").await;
    });
    assert!(matches!(qmp, Err(HypervisorError::Unexpected { .. })), "{qmp:?}");
    let nobody = Qmp::connect(Path::new("/nonexistent/qmp"), "vm1").await;
    assert!(matches!(nobody, Err(HypervisorError::Gone { .. })), "{nobody:?}");
}

/// A QEMU that ends while it starts may close its socket at any step of a connect.
#[tokio::test]
async fn a_monitor_that_goes_before_it_accepts_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    for turn in 0..300 {
        let path = dir.path().join(turn.to_string());
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let closing = std::thread::spawn(move || drop(listener));
        let gone = Qmp::connect(&path, "vm1").await;
        assert!(matches!(gone, Err(HypervisorError::Gone { .. })), "turn {turn}: {gone:?}");
        closing.join().unwrap();
    }
}

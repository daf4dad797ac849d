//! The agent's numbers as monitoring takes them: printed, scraped, and asked for by nobody's friend.
//!
//! Invariant: [`parsed`] takes nothing that Prometheus' text format 0.0.4 does not allow.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use super::*;

/// Values by name and labels, as they stand in the text.
type Values = BTreeMap<String, f64>;

fn is_name(text: &str) -> bool {
    let starts_well = text.starts_with(|c: char| c.is_ascii_lowercase());
    starts_well && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

/// Reads `a="b",c="d"}` and gives what follows the brace.
fn after_labels(mut text: &str) -> &str {
    loop {
        let (name, rest) = text.split_once("=\"").unwrap();
        assert!(is_name(name), "{text}");
        let mut chars = rest.char_indices();
        let end = loop {
            match chars.next().unwrap() {
                (_, '\\') => assert!(matches!(chars.next().unwrap().1, '\\' | '"' | 'n'), "{text}"),
                (end, '"') => break end,
                _ => {}
            }
        };
        text = &rest[end + 1..];
        match text.strip_prefix(',') {
            Some(more) => text = more,
            None => return text.strip_prefix('}').unwrap(),
        }
    }
}

pub(super) fn parsed(text: &str) -> Values {
    assert!(text.ends_with('\n'));
    let (mut values, mut kinds) = (Values::new(), BTreeMap::new());
    let mut current = ("", "");
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').unwrap();
            assert!(
                is_name(name) && name.starts_with("longhaul_") && help.ends_with('.'),
                "{line}"
            );
            let kind = lines.next().unwrap().strip_prefix(&format!("# TYPE {name} ")).unwrap();
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            assert!(matches!(kind, "counter" | "gauge"), "{kind}");
            assert_eq!(kinds.insert(name, kind), None, "{name} comes twice");
            current = (name, kind);
            continue;
        }
        let (name, kind) = current;
        let rest = line.strip_prefix(name).unwrap();
        let value = match rest.strip_prefix('{') {
            Some(labels) => after_labels(labels),
            None => rest,
        };
        let value: f64 = value.strip_prefix(' ').unwrap().parse().unwrap();
        assert!(value.is_finite() && (kind == "gauge" || value >= 0.0), "{line}");
        let series = line.rsplit_once(' ').unwrap().0.to_owned();
        assert_eq!(values.insert(series, value), None, "{line} comes twice");
    }
    values
}

/// An agent that serves its numbers, and where.
fn served() -> (Agent, SocketAddr) {
    let mut agent = Agent::start("paris");
    assert_eq!(agent.stop(), Some(0));
    let text = std::fs::read_to_string(agent.file()).unwrap();
    let text = text.replace("# listen = \"127.0.0.1:9464\"", "listen = \"127.0.0.1:0\"");
    std::fs::write(agent.file(), text).unwrap();
    (agent.child, agent.log) = spawn(&agent.file());
    let line = agent.log.wait_for(&["metrics are served"]);
    let address = line.split("address=").nth(1).unwrap().split_whitespace().next().unwrap();
    (agent, address.parse().unwrap())
}

fn sent(address: SocketAddr, request: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request).unwrap();
    stream
}

/// Head and body of the whole answer, which ends with the connection.
fn asked(address: SocketAddr, request: &[u8]) -> (String, String) {
    let mut answer = String::new();
    sent(address, request).read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

fn scraped(address: SocketAddr) -> Values {
    let (head, body) = asked(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(
        head.starts_with("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4"),
        "{head}"
    );
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    parsed(&body)
}

/// What is scraped once it is as `enough` wants it: what was gathered is kept for a second.
fn scraped_until(address: SocketAddr, enough: impl Fn(&Values) -> bool) -> Values {
    let until = Instant::now() + PATIENCE;
    loop {
        let values = scraped(address);
        if enough(&values) {
            return values;
        }
        assert!(Instant::now() < until, "{values:#?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn an_agent_prints_its_numbers_from_the_first_moment() {
    let paris = Agent::start("paris");
    let values = parsed(&paris.ok(&["metrics"]));
    for (series, value) in [
        ("longhaul_peers", 0.0),
        ("longhaul_vms{state=\"running\"}", 0.0),
        ("longhaul_hand_overs_unsettled{blocking=\"yes\",role=\"source\"}", 0.0),
        ("longhaul_conflicts_total{conflict=\"ran-twice\"}", 0.0),
        ("longhaul_jobs_ended_total{kind=\"migrate\",outcome=\"failed\"}", 0.0),
        ("longhaul_rate_limit_info{calendar=\"unlimited\",scope=\"agent\"}", 1.0),
    ] {
        assert_eq!(values.get(series), Some(&value), "{series} in {values:#?}");
    }
    let build = format!("longhaul_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    assert_eq!(values[&build], 1.0);
    let now = jiff::Timestamp::now().as_second() as f64;
    assert!((now - values["longhaul_start_time_seconds"]).abs() < 300.0);
    assert!(!values.contains_key("longhaul_rate_limit_bytes_per_second{scope=\"agent\"}"));

    let metrics = paris.json(&["metrics"]);
    let peers = metrics.as_array().unwrap().iter().find(|m| m["name"] == "longhaul_peers").unwrap();
    assert_eq!(peers["samples"], serde_json::json!([{"labels": {}, "value": 0.0}]));
    // Nobody has asked for a socket.
    assert!(
        !paris.log.lines.lock().unwrap().iter().any(|line| line.contains("metrics are served"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn links_and_caps_are_scraped_and_counters_stay_when_a_session_ends() {
    let (paris, address) = served();
    paris.ok(&["limit", "--rate", "8M"]);
    let home = tempfile::tempdir().unwrap();
    let lyon = Identity::load_or_create(home.path()).unwrap();
    let own = paris.fingerprint().parse().unwrap();
    let trust = Arc::new(TrustedPeers::new([own]));
    let at = "127.0.0.1:0".parse().unwrap();
    let endpoint = Endpoint::bind(at, &lyon, trust, Tuning::default()).unwrap();
    paris.ok(&[
        "pair",
        "lyon",
        &endpoint.local_addr().to_string(),
        &lyon.fingerprint().to_string(),
    ]);

    let session = endpoint.connect(paris.address().parse().unwrap(), own).await.unwrap();
    const LIVING: &str = "longhaul_link_sessions{peer=\"lyon\"}";
    let values = scraped_until(address, |values| values.get(LIVING) == Some(&1.0));
    assert_eq!(values["longhaul_rate_limit_bytes_per_second{scope=\"agent\"}"], 1e6);
    assert!(values["longhaul_link_rtt_seconds{peer=\"lyon\"}"] > 0.0);
    assert!(values["longhaul_link_window_bytes{peer=\"lyon\"}"] > 0.0);
    assert_eq!(values["longhaul_link_delivered_bytes_total{class=\"pages\",peer=\"lyon\"}"], 0.0);

    session.close("seen enough");
    let after = scraped_until(address, |values| values[LIVING] == 0.0);
    assert!(!after.contains_key("longhaul_link_rtt_seconds{peer=\"lyon\"}"));
    assert_eq!(after["longhaul_link_sessions_total{peer=\"lyon\"}"], 1.0);
    let wire = "longhaul_link_wire_bytes_total{direction=\"received\",peer=\"lyon\"}";
    assert!(after[wire] > 1000.0, "{}", after[wire]);
    let counters = values.iter().filter(|(series, _)| series.contains("_total"));
    for (series, value) in counters {
        assert!(after[series] >= *value, "{series} went back from {value} to {}", after[series]);
    }
    endpoint.close().await;
}

#[test]
fn who_asks_for_something_else_is_told_so() {
    let (_paris, address) = served();
    let long = [&b"GET /metrics HTTP/1.1\r\nX: "[..], &[b'x'; 20_000]].concat();
    for (request, status) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "404 "),
        (b"GET /state/identity.key HTTP/1.1\r\n\r\n", "404 "),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", "405 "),
        (b"GET /metrics HTTP/2.0\r\n\r\n", "505 "),
        (b"\x16\x03\x01 is no HTTP\r\n\r\n", "400 "),
        (&long, "431 "),
    ] {
        let (head, body) = asked(address, request);
        assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{head}");
        assert!(head.contains("Connection: close") && body.ends_with('\n'), "{head}\n{body}");
    }
    let (head, body) = asked(address, b"HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(head.contains("200 OK") && !head.contains("Content-Length: 0"), "{head}");
    assert_eq!(body, "");
}

/// More connections than the agent has places for, all of which say nothing, half a request, or do
/// not read their answer: commands are answered meanwhile, and who scrapes well has his turn.
#[test]
fn slow_scrapers_hold_nobody_up() {
    let (paris, address) = served();
    let words = [&b""[..], b"GET /metr", b"GET /metrics HTTP/1.1\r\n\r\n"];
    let slow: Vec<TcpStream> =
        words.iter().cycle().take(18).map(|words| sent(address, words)).collect();
    let began = Instant::now();
    assert_eq!(paris.json(&["status"])["identity"]["name"], "paris");
    parsed(&paris.ok(&["metrics"]));
    // Only the wait of a scrape is theirs: two or three times the agent's patience with a request.
    scraped(address);
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());
    let mut told = String::new();
    (&slow[1]).read_to_string(&mut told).unwrap();
    assert!(told.starts_with("HTTP/1.1 408 "), "{told}");
    assert_eq!(paris.json(&["status"])["identity"]["name"], "paris");
}

#[test]
fn an_address_that_is_taken_is_refused_at_the_start() {
    let mut agent = Agent::start("paris");
    assert_eq!(agent.stop(), Some(0));
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let text = std::fs::read_to_string(agent.file()).unwrap();
    let text = text.replace("# listen = \"127.0.0.1:9464\"", &format!("listen = \"{address}\""));
    std::fs::write(agent.file(), text).unwrap();
    let output = longhaul().args(["agent", "--config"]).arg(agent.file()).output().unwrap();
    let (code, _, err) = outcome(output);
    assert_eq!(code, 2);
    let expected = format!("cannot serve metrics at {address} (metrics.listen): ");
    assert!(err.contains(&expected) && err.contains("next:"), "{err}");
}

//! The two addresses over real sockets: what they answer, and what they survive.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Instant,
};

use tower::ServiceExt as _;

use super::*;
use crate::{
    admin::{connections::MAX, readiness::Task},
    config::LogLevel,
};

/// A running server on free ports of this machine's loopback or of every address.
struct Running {
    metrics: Vec<SocketAddr>,
    health: Vec<SocketAddr>,
    task: Task,
    admin: Admin,
    stop: CancellationToken,
    runtime: Option<tokio::runtime::Runtime>,
    served: Option<tokio::task::JoinHandle<io::Result<()>>>,
}

const PATIENT: Limits = Limits {
    head: Duration::from_secs(60),
    life: Duration::from_secs(60),
    last_answer: Duration::from_secs(5),
};
const HASTY: Limits = Limits {
    head: Duration::from_millis(300),
    life: Duration::from_millis(1500),
    last_answer: Duration::from_millis(300),
};
const LONG: Duration = Duration::from_secs(20);

fn admin() -> Admin {
    Admin {
        readiness: Readiness::default(),
        liveness: Liveness::new(Duration::from_secs(60)),
        metrics: Arc::default(),
        log: LogControl::detached(LogLevel::info()),
    }
}

fn start(limits: Limits) -> Running {
    let admin = admin();
    let task = admin.readiness.task("pods-listed");
    let bound = admin.clone().bind(Listen::any(0), Listen::any(0)).unwrap();
    let (metrics, health) = bound.addresses().unwrap();
    let stop = CancellationToken::new();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let served = runtime.spawn(bound.serve_within(limits, stop.clone()));
    Running {
        metrics,
        health,
        task,
        admin,
        stop,
        runtime: Some(runtime),
        served: Some(served),
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The listener's port on a loopback address of its family.
fn reachable(at: SocketAddr) -> SocketAddr {
    let loopback = match at {
        SocketAddr::V4(_) => "127.0.0.1",
        SocketAddr::V6(_) => "::1",
    };
    SocketAddr::new(loopback.parse().unwrap(), at.port())
}

fn connect(at: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&reachable(at), LONG).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

/// One request on a connection of its own: status, head, body.
fn ask(at: SocketAddr, request: &str) -> (u16, String, String) {
    let mut stream = connect(at);
    write!(
        stream,
        "{request} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_owned(), body.to_owned())
}

#[test]
fn both_families_answer() {
    let running = start(PATIENT);
    assert_eq!(running.metrics.len(), 2, "IPv4 and IPv6");
    for at in running.metrics.iter().chain(&running.health) {
        assert_eq!(ask(*at, "GET /nothing").0, 404);
    }
    assert_eq!(running.metrics[0].port(), running.metrics[1].port());
}

#[test]
fn ready_with_reasons_as_text_and_json() {
    let running = start(PATIENT);
    let at = running.health[0];
    running.task.set_not_ready("the API server does not answer");
    let (status, _, body) = ask(at, "GET /readyz");
    assert_eq!(status, 503);
    assert!(body.contains("the API server does not answer"), "{body}");
    running.task.set_ready();
    let (status, head, body) = ask(at, "GET /readyz?format=json");
    assert_eq!(status, 200);
    assert!(
        head.to_lowercase()
            .contains("content-type: application/json"),
        "{head}"
    );
    let report: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(report["ready"], true);
    assert_eq!(report["tasks"][0]["name"], "pods-listed");
    assert_eq!(ask(at, "GET /readyz?format=xml").0, 400);
    assert_eq!(ask(at, "GET /healthz").0, 200);
    assert_eq!(ask(at, "POST /healthz").0, 405);
}

#[test]
fn metrics_are_open_metrics() {
    let running = start(PATIENT);
    running.admin.metrics.wanted_pods.set(7);
    let (status, head, body) = ask(running.metrics[0], "GET /metrics");
    assert_eq!(status, 200);
    assert!(
        head.contains("application/openmetrics-text; version=1.0.0"),
        "{head}"
    );
    assert!(body.contains("culvert_wanted_pods 7\n"), "{body}");
    assert!(body.ends_with("# EOF\n"));
}

#[test]
fn the_level_is_shown_and_changed() {
    let running = start(PATIENT);
    let at = running.metrics[0];
    assert_eq!(ask(at, "GET /loglevel").2, "info\n");
    assert_eq!(
        ask(at, "PUT /loglevel?level=info,culvert=debug").2,
        "info,culvert=debug\n"
    );
    assert_eq!(running.admin.log.level(), "info,culvert=debug");
    for wrong in [
        "PUT /loglevel?level=loud",
        "PUT /loglevel",
        "PUT /loglevel?level=",
    ] {
        let (status, _, body) = ask(at, wrong);
        assert_eq!(status, 400, "{wrong}");
        assert!(
            body.contains("PUT /loglevel?level=debug"),
            "names the cure: {body}"
        );
    }
    assert_eq!(running.admin.log.level(), "info,culvert=debug");
}

#[tokio::test]
async fn the_level_is_changed_from_the_node_alone() {
    let admin = admin();
    let ask = async |method: &str, peer: &str| {
        let request = hyper::Request::builder()
            .method(method)
            .uri("/loglevel?level=debug")
            .extension(ConnectInfo::<SocketAddr>(peer.parse().unwrap()))
            .body(axum::body::Body::empty())
            .unwrap();
        let answer = routes::metrics(admin.clone()).oneshot(request).await;
        let (head, body) = answer.unwrap().into_parts();
        let body = axum::body::to_bytes(body, 4096).await.unwrap();
        (
            head.status.as_u16(),
            String::from_utf8_lossy(&body).into_owned(),
        )
    };
    for elsewhere in [
        "10.0.0.7:40000",
        "[2001:db8::7]:40000",
        "[::ffff:10.0.0.7]:40000",
    ] {
        let (status, body) = ask("PUT", elsewhere).await;
        assert_eq!(status, 403, "{elsewhere}: {body}");
        assert!(body.contains("127.0.0.1"), "names the cure: {body}");
        assert_eq!(ask("GET", elsewhere).await, (200, "info\n".to_owned()));
    }
    for here in ["127.0.0.1:40000", "[::1]:40000", "[::ffff:127.0.0.1]:40000"] {
        assert_eq!(ask("PUT", here).await.0, 200, "{here}");
    }
}

#[test]
fn a_port_that_is_taken_is_named_with_the_cure() {
    let taken = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = admin().bind(Listen::any(port), Listen::any(0)).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("port {port} is taken")), "{text}");
    assert!(text.contains("--metrics-address"), "{text}");
    let taken6 = std::net::TcpListener::bind("[::1]:0").unwrap();
    let port = taken6.local_addr().unwrap().port();
    let error = admin().bind(Listen::any(0), Listen::any(port)).unwrap_err();
    assert!(error.to_string().contains("--health-address"), "{error}");
    let nowhere = "192.0.2.1:15014".parse::<SocketAddr>().unwrap();
    let nowhere = Listen {
        ip: Some(nowhere.ip()),
        port: 0,
    };
    let error = admin().bind(nowhere, Listen::any(0)).unwrap_err();
    assert!(
        error.to_string().contains("no interface of this node"),
        "{error}"
    );
}

/// Reads until the peer hangs up; says how long that took.
fn until_closed(mut stream: TcpStream) -> Duration {
    let started = Instant::now();
    let mut rest = Vec::new();
    // A reset is as good as an end.
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {}
        Err(e) => panic!("the connection was not closed: {e}"),
    }
    started.elapsed()
}

#[test]
fn who_sends_nothing_or_too_slowly_is_hung_up_on() {
    let running = start(HASTY);
    let silent = connect(running.health[0]);
    until_closed(silent);
    // One byte at a time, each well within any time-out between two bytes.
    let mut slow = connect(running.health[0]);
    let started = Instant::now();
    let head = "GET /healthz HTTP/1.1\r\nHost: node\r\nX-Padding: "
        .bytes()
        .chain(std::iter::repeat(b'a'));
    for byte in head {
        if slow.write_all(&[byte]).is_err() {
            break;
        }
        assert!(
            started.elapsed() < LONG,
            "a head that never ends is read for ever"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(ask(running.health[0], "GET /healthz").0, 200);
}

#[test]
fn who_asks_again_and_again_is_hung_up_on_in_the_end() {
    let running = start(HASTY);
    let mut stream = connect(running.health[0]);
    let started = Instant::now();
    let mut answers = 0;
    loop {
        assert!(started.elapsed() < LONG, "a connection lives for ever");
        if stream
            .write_all(b"GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n")
            .is_err()
        {
            break;
        }
        let mut answer = [0; 4096];
        match stream.read(&mut answer) {
            Ok(0) | Err(_) => break,
            Ok(_) => answers += 1,
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(answers > 3, "keep-alive works: {answers}");
}

#[test]
fn who_does_not_read_the_answer_holds_nothing_up() {
    let running = start(HASTY);
    let at = running.metrics[0];
    let mut deaf = connect(at);
    nix::sys::socket::setsockopt(&deaf, nix::sys::socket::sockopt::RcvBuf, &4096).unwrap();
    deaf.set_write_timeout(Some(LONG)).unwrap();
    let started = Instant::now();
    // Requests without end, answers unread: sooner or later neither side can write.
    loop {
        assert!(started.elapsed() < LONG, "a deaf peer is served for ever");
        if deaf
            .write_all(&b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n".repeat(64))
            .is_err()
        {
            break;
        }
    }
    assert_eq!(ask(at, "GET /metrics").0, 200);
}

#[test]
fn a_flood_of_hanging_connections_keeps_nobody_out() {
    let running = start(PATIENT);
    let at = running.health[0];
    let mut hanging = Vec::new();
    for _ in 0..MAX * 4 {
        let mut stream = connect(at);
        stream.write_all(b"GET /healthz HT").unwrap();
        hanging.push(stream);
    }
    let started = Instant::now();
    assert_eq!(ask(at, "GET /healthz").0, 200);
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
    // The older ones were ended, long before their time.
    let youngest_kept = hanging.split_off(MAX * 3);
    for stream in hanging {
        until_closed(stream);
    }
    drop(youngest_kept);
}

#[test]
fn nonsense_is_refused_and_harms_nobody() {
    let running = start(PATIENT);
    let at = running.health[0];
    let long_line = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(200_000));
    let many_headers = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(5_000));
    let nonsense: [&[u8]; 6] = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        long_line.as_bytes(),
        many_headers.as_bytes(),
        b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
    ];
    for bytes in nonsense {
        let mut stream = connect(at);
        // It may be hung up on before all is sent.
        let _sent = stream.write_all(bytes);
        stream
            .shutdown(std::net::Shutdown::Write)
            .unwrap_or_default();
        until_closed(stream);
    }
    let mut big = connect(at);
    big.write_all(b"PUT /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")
        .unwrap();
    let mut answer = [0; 12];
    big.read_exact(&mut answer).unwrap();
    assert_eq!(
        &answer, b"HTTP/1.1 405",
        "answered without waiting for the body"
    );
    assert_eq!(ask(at, "GET /healthz").0, 200);
}

#[test]
fn it_stops_when_told_even_while_somebody_is_connected() {
    let mut running = start(Limits {
        last_answer: Duration::from_millis(300),
        ..PATIENT
    });
    let mut hanging = connect(running.health[0]);
    hanging.write_all(b"GET /heal").unwrap();
    assert_eq!(ask(running.health[0], "GET /healthz").0, 200);
    running.stop.cancel();
    let served = running.served.take().unwrap();
    let runtime = running.runtime.as_ref().unwrap();
    let ended = runtime.block_on(async { tokio::time::timeout(LONG, served).await });
    ended.unwrap().unwrap().unwrap();
    until_closed(hanging);
    let port = reachable(running.health[0]);
    assert!(
        TcpStream::connect_timeout(&port, LONG).is_err(),
        "the port is free again"
    );
}

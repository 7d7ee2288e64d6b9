//! The server over a real socket, asked by the plugin's own client and by hand.

use std::{
    io::{Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use culvert_cni::{
    api::{Attachment, PodRef, paths},
    client::{self, Failure},
};
use tokio::sync::Notify;

use super::*;

/// Answers by the pod's name.
#[derive(Default)]
struct Scripted {
    seen: Mutex<Vec<String>>,
    broken: Option<String>,
    started: Notify,
    dropped: Arc<AtomicU32>,
}

struct CountDrop(Arc<AtomicU32>);

impl Drop for CountDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Handler for Scripted {
    async fn add(&self, request: AddRequest) -> Result<AddReply, Refusal> {
        self.seen
            .lock()
            .unwrap()
            .push(format!("add {} {}", request.pod, request.netns));
        match request.pod.name.as_str() {
            "later" => Err(Refusal::later("not yet", "wait")),
            "never" => Err(Refusal::for_good(100, "gVisor", "another runtime class")),
            "slow" => {
                let _count = CountDrop(self.dropped.clone());
                self.started.notify_one();
                std::future::pending().await
            }
            "panic" => panic!("a handler that panics"),
            _ => Ok(AddReply {
                enrolled: true,
                reason: "label".into(),
                ..AddReply::default()
            }),
        }
    }

    async fn del(&self, request: DelRequest) -> Result<(), Refusal> {
        let line = format!("del {} {}", request.container_id, request.ifname);
        self.seen.lock().unwrap().push(line);
        Ok(())
    }

    async fn check(&self, request: CheckRequest) -> Result<CheckReply, Refusal> {
        Ok(CheckReply {
            enrolled: true,
            problem: Some(format!("no rules in {}", request.netns)),
        })
    }

    async fn gc(&self, request: GcRequest) -> Result<(), Refusal> {
        let line = format!("gc {} {}", request.network, request.valid.len());
        self.seen.lock().unwrap().push(line);
        Ok(())
    }

    fn status(&self) -> StatusReply {
        StatusReply {
            version: "v".into(),
            broken: self.broken.clone(),
        }
    }
}

/// A server on a runtime of its own, ended with it.
struct Running {
    _runtime: tokio::runtime::Runtime,
    dir: PathBuf,
    handler: Arc<Scripted>,
    counters: Arc<Counters>,
    shutdown: Arc<Notify>,
    served: Option<tokio::task::JoinHandle<()>>,
}

impl Running {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("culvert-cni-{}-{name}", std::process::id()));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (handler, counters) = (Arc::<Scripted>::default(), Arc::<Counters>::default());
        let shutdown = Arc::new(Notify::new());
        let (app, stop) = (router(handler.clone(), counters.clone()), shutdown.clone());
        let guard = runtime.enter();
        let listener = Listener::bind(&dir.join("agent.sock")).unwrap();
        drop(guard);
        let served = runtime.spawn(listener.serve(app, async move { stop.notified().await }));
        Self {
            _runtime: runtime,
            dir,
            handler,
            counters,
            shutdown,
            served: Some(served),
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("agent.sock")
    }

    fn add(&self, pod: &str, budget_ms: u64) -> Result<AddReply, Failure> {
        client::post(&self.socket(), paths::ADD, &request(pod, budget_ms), soon())
    }

    fn count(&self, method: Method, code: u16) -> u64 {
        let all = self.counters.answered();
        all.filter(|(m, c, _)| (*m, *c) == (method, code))
            .map(|(_, _, count)| count)
            .sum()
    }

    /// Sends bytes and reads all that comes back.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        // The server may have heard enough before all is sent.
        let _sent = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _read = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shutdown.notify_one();
        let _gone = std::fs::remove_dir_all(&self.dir);
    }
}

fn request(pod: &str, budget_ms: u64) -> AddRequest {
    AddRequest {
        pod: PodRef {
            namespace: "ns".into(),
            name: pod.into(),
            uid: None,
        },
        container_id: "c".into(),
        ifname: "eth0".into(),
        network: "n".into(),
        netns: "/proc/1/fd/3".into(),
        addresses: Vec::new(),
        budget_ms,
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = soon();
    while !condition() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn refusal<T: std::fmt::Debug>(result: Result<T, Failure>) -> Refusal {
    match result {
        Err(Failure::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_plugins_client_and_the_server_understand_each_other() {
    let server = Running::new("talk");
    // Whatever number it gives itself.
    let add = format!("add ns/good /proc/{}/fd/3", std::process::id());
    assert!(server.add("good", 1000).unwrap().enrolled);
    let del = DelRequest {
        pod: None,
        container_id: "c".into(),
        ifname: "eth0".into(),
        network: "n".into(),
    };
    let gc = GcRequest {
        network: "n".into(),
        valid: vec![Attachment {
            container_id: "c".into(),
            ifname: "eth0".into(),
        }],
    };
    let socket = server.socket();
    client::post::<serde_json::Value>(&socket, paths::DEL, &del, soon()).unwrap();
    client::post::<serde_json::Value>(&socket, paths::GC, &gc, soon()).unwrap();
    let check = CheckRequest {
        pod: request("good", 0).pod,
        container_id: "c".into(),
        ifname: "eth0".into(),
        network: "n".into(),
        netns: "X".into(),
        addresses: Vec::new(),
    };
    let reply: CheckReply = client::post(&socket, paths::CHECK, &check, soon()).unwrap();
    assert_eq!(reply.problem.as_deref(), Some("no rules in X"));
    let status: StatusReply = client::get(&socket, paths::STATUS, soon()).unwrap();
    assert_eq!((status.version.as_str(), status.broken), ("v", None));
    assert_eq!(
        *server.handler.seen.lock().unwrap(),
        [&*add, "del c eth0", "gc n 1"]
    );
    for method in [
        Method::Add,
        Method::Del,
        Method::Check,
        Method::Gc,
        Method::Status,
    ] {
        assert_eq!(server.count(method, 200), 1, "{method:?}");
    }
    assert_eq!(server.counters.dropped(), 0);
}

#[test]
fn refusals_keep_their_code_and_cure() {
    let server = Running::new("refuse");
    let later = refusal(server.add("later", 1000));
    assert_eq!(
        (later.code, later.retry, later.cure.as_str()),
        (11, true, "wait")
    );
    let never = refusal(server.add("never", 1000));
    assert_eq!((never.code, never.retry), (100, false));
    assert_eq!(server.count(Method::Add, 503), 1);
    assert_eq!(server.count(Method::Add, 422), 1);
}

#[test]
fn a_slow_handler_is_answered_for_before_the_plugin_gives_up() {
    let server = Running::new("slow");
    let started = Instant::now();
    let refusal = refusal(server.add("slow", 700));
    assert!(started.elapsed() >= Duration::from_millis(400));
    assert!(
        refusal.retry && refusal.message.contains("500 ms"),
        "{refusal}"
    );
    assert_eq!(server.count(Method::Add, 504), 1);
    assert_eq!(server.handler.dropped.load(Ordering::SeqCst), 1);
}

#[test]
fn a_plugin_that_goes_away_drops_its_request() {
    let server = Running::new("away");
    let body = serde_json::to_vec(&request("slow", 60_000)).unwrap();
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    let head = format!(
        "POST {} HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        paths::ADD,
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&body).unwrap();
    eventually("the handler has begun", || {
        !server.handler.seen.lock().unwrap().is_empty()
    });
    assert_eq!(server.handler.dropped.load(Ordering::SeqCst), 0);
    drop(stream);
    eventually("the handler's future is dropped", || {
        server.handler.dropped.load(Ordering::SeqCst) == 1
    });
    eventually("it is counted", || server.counters.dropped() == 1);
}

#[test]
fn a_panic_costs_one_request() {
    let server = Running::new("panic");
    assert!(matches!(server.add("panic", 1000), Err(Failure::Lost(_))));
    assert!(server.add("good", 1000).unwrap().enrolled);
}

#[test]
fn by_hand_and_by_mistake() {
    let server = Running::new("hand");
    let post = |path: &str, body: &str| {
        let length = body.len();
        server.raw(
            format!(
                "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
                 content-type: application/x-www-form-urlencoded\r\ncontent-length: {length}\r\n\r\n{body}"
            )
            .as_bytes(),
        )
    };
    let form = post(
        paths::DEL,
        r#"{"container_id":"c","ifname":"i","network":"n"}"#,
    );
    assert!(
        form.starts_with("HTTP/1.1 200 OK") && form.ends_with("\r\n\r\n{}"),
        "{form}"
    );
    for (answer, status) in [
        (post(paths::ADD, "{}"), "400"),
        (post(paths::ADD, "no json"), "400"),
        (post("/nowhere", "{}"), "404"),
        (post(paths::STATUS, "{}"), "405"),
        (
            server.raw(b"GET /v1/cni/add HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"),
            "405",
        ),
    ] {
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        let refusal: Refusal = serde_json::from_str(body).unwrap();
        assert!(!refusal.cure.is_empty(), "{answer}");
    }
    let long = format!(
        "POST {} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 2000000\r\n\r\n",
        paths::ADD
    );
    let answer = server.raw(&[long.as_bytes(), &vec![b'x'; 2_000_000]].concat());
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    // Not HTTP at all, and half a request: the server lives on.
    server.raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n");
    drop(UnixStream::connect(server.socket()).unwrap());
    assert!(server.add("good", 1000).unwrap().enrolled);
}

#[test]
fn the_socket_is_private_replaces_a_stale_one_and_goes_with_its_server() {
    let server = Running::new("socket");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&server.socket()), 0o600);
    assert_eq!(mode(&server.dir), 0o700);
    let _guard = server._runtime.enter();
    // What a killed agent leaves, and what a second one finds: the path is never missing.
    let second = Listener::bind(&server.socket()).unwrap();
    let left: Vec<_> = std::fs::read_dir(&server.dir).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    server.shutdown.notify_one();
    let mut server = server;
    let served = server.served.take().unwrap();
    server._runtime.block_on(served).unwrap();
    assert!(
        server.socket().exists(),
        "the first does not take the second's away"
    );
    drop(second);
    assert!(!server.socket().exists());
}

#[test]
fn a_shutdown_does_not_wait_for_ever() {
    let mut server = Running::new("shutdown");
    let socket = server.socket();
    let asking = std::thread::spawn(move || {
        client::post::<AddReply>(&socket, paths::ADD, &request("slow", 60_000), soon())
    });
    eventually("the handler has begun", || {
        !server.handler.seen.lock().unwrap().is_empty()
    });
    let started = Instant::now();
    server.shutdown.notify_one();
    let served = server.served.take().unwrap();
    server._runtime.block_on(served).unwrap();
    assert!(started.elapsed() < Duration::from_secs(15));
    drop(server);
    assert!(matches!(asking.join().unwrap(), Err(Failure::Lost(_))));
}

#[test]
fn a_run_directory_that_cannot_be_made_is_named() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _guard = runtime.enter();
    let error = Listener::bind(Path::new("/proc/nowhere/agent.sock")).unwrap_err();
    assert!(error.to_string().contains("/proc/nowhere"), "{error}");
}

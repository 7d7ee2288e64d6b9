//! What the plugin's tests share: running the real binary, and an agent that says what a test wants.
//!
//! It speaks HTTP by hand and knows none of the library's types, so that a mistake in those shows.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

pub(crate) const POD: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=4f1c-22";

/// A directory of one test; the plugin runs in it, so that configurations can name files without a path.
pub(crate) struct Place(PathBuf);

impl Place {
    pub(crate) fn new(name: &str) -> Self {
        let dir =
            std::env::temp_dir().join(format!("culvert-plugin-{}-{name}", std::process::id()));
        let _leftover = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn log(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.path("cni.log")).unwrap_or_default();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// The variables of a call for a pod's first interface.
    pub(crate) fn call(&self, command: &str) -> Call {
        Call {
            dir: self.0.clone(),
            variables: [
                ("CNI_COMMAND", command),
                ("CNI_CONTAINERID", "c1"),
                ("CNI_NETNS", "/proc/self/ns/net"),
                ("CNI_IFNAME", "eth0"),
                ("CNI_PATH", "/opt/cni/bin"),
                ("CNI_ARGS", POD),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
            stdin: Vec::new(),
        }
    }

    pub(crate) fn decisions(&self, age: u64, change: impl FnOnce(&mut Value)) {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let mut file = json!({
            "version": 1,
            "written_at": now - age,
            "custom_selectors": false,
            "excluded": ["kube-system"],
            "namespaces": {"shop": "mesh", "lab": "opted-in", "plain": "outside"},
        });
        change(&mut file);
        fs::write(self.path("decisions.json"), file.to_string()).unwrap();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

/// A configuration with our entry's keys, as libcni hands it over.
pub(crate) fn config(version: &str) -> Value {
    json!({
        "cniVersion": version,
        "name": "podnet",
        "type": "culvert-cni",
        "socket": "agent.sock",
        "logFile": "cni.log",
        "decisionFile": "decisions.json",
        "excludedNamespaces": ["kube-system"],
    })
}

/// The same with a key of its own.
pub(crate) fn config_with(version: &str, key: &str, value: Value) -> Value {
    let mut config = config(version);
    config
        .as_object_mut()
        .unwrap()
        .insert(key.to_owned(), value);
    config
}

pub(crate) fn previous(version: &str) -> Value {
    json!({
        "cniVersion": version,
        "interfaces": [
            {"name": "veth1", "mac": "aa:bb:cc:dd:ee:01"},
            {"name": "eth0", "mac": "aa:bb:cc:dd:ee:02", "sandbox": "/var/run/netns/x", "odd": null},
        ],
        "ips": [
            {"version": "4", "interface": 1, "address": "10.1.0.5/24", "gateway": "10.1.0.1"},
            {"interface": 1, "address": "fd00::5/64"},
            {"interface": 0, "address": "169.254.1.1/32"},
        ],
        "zeta": 1, "alpha": {"kept": [1.50, true]},
        "dns": {},
    })
}

pub(crate) struct Call {
    dir: PathBuf,
    variables: Vec<(String, String)>,
    stdin: Vec<u8>,
}

pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) took: Duration,
}

impl Outcome {
    /// The error object.
    pub(crate) fn error(&self) -> Value {
        assert_eq!(self.code, Some(1), "{}", self.stdout);
        let error: Value = serde_json::from_str(&self.stdout).unwrap();
        assert!(
            error["cniVersion"].is_string() && error["msg"].is_string(),
            "{error}"
        );
        assert!(
            error["details"]
                .as_str()
                .is_some_and(|cure| cure.len() > 10),
            "no cure: {error}"
        );
        error
    }

    pub(crate) fn error_code(&self) -> u64 {
        self.error()["code"].as_u64().unwrap()
    }

    pub(crate) fn succeeded(&self) -> &str {
        assert_eq!(self.code, Some(0), "{}", self.stdout);
        self.stdout.trim_end_matches('\n')
    }
}

impl Call {
    pub(crate) fn set(mut self, name: &str, value: &str) -> Self {
        self = self.unset(name);
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn unset(mut self, name: &str) -> Self {
        self.variables.retain(|(known, _)| known != name);
        self
    }

    pub(crate) fn stdin(mut self, stdin: impl Into<Vec<u8>>) -> Self {
        self.stdin = stdin.into();
        self
    }

    pub(crate) fn config(self, config: &Value) -> Self {
        self.stdin(config.to_string())
    }

    pub(crate) fn spawn(&self) -> std::process::Child {
        #[expect(
            clippy::disallowed_methods,
            reason = "a test is the runtime here; the agent starts no processes"
        )]
        let mut child = Command::new(env!("CARGO_BIN_EXE_culvert-cni"))
            .current_dir(&self.dir)
            .env_clear()
            .envs(self.variables.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It may end before it has read all.
        let _written = child.stdin.take().unwrap().write_all(&self.stdin);
        child
    }

    pub(crate) fn run(&self) -> Outcome {
        let started = Instant::now();
        let output = self.spawn().wait_with_output().unwrap();
        let outcome = Outcome {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
            took: started.elapsed(),
        };
        assert_eq!(outcome.stderr, "", "nothing has a reason to speak there");
        outcome
    }
}

/// What the agent does with a request.
pub(crate) enum Say {
    /// A status and a JSON body.
    Json(u16, Value),
    /// These bytes, then the end.
    Raw(Vec<u8>),
    /// These bytes, one every so often.
    Drip(Vec<u8>, Duration),
    /// Nothing, until the plugin goes away.
    Nothing,
    /// The end, at once.
    Close,
}

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) line: String,
    pub(crate) body: Value,
}

type Script = dyn Fn(&Request, usize) -> Say + Send + Sync;

/// An agent at `agent.sock`.
pub(crate) struct Agent {
    path: PathBuf,
    seen: Arc<Mutex<Vec<Request>>>,
    hung_up: Arc<Mutex<usize>>,
    over: Arc<AtomicBool>,
}

impl Agent {
    /// `script` is given each request and how many came before it.
    pub(crate) fn start(
        place: &Place,
        script: impl Fn(&Request, usize) -> Say + Send + Sync + 'static,
    ) -> Self {
        let path = place.path("agent.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let agent = Self {
            path,
            seen: Arc::default(),
            hung_up: Arc::default(),
            over: Arc::default(),
        };
        let (seen, hung_up, over) = (
            agent.seen.clone(),
            agent.hung_up.clone(),
            agent.over.clone(),
        );
        let script: Arc<Script> = Arc::new(script);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let (seen, hung_up, script) = (seen.clone(), hung_up.clone(), script.clone());
                thread::spawn(move || serve(stream, &seen, &hung_up, &*script));
            }
        });
        agent
    }

    /// One that lets every pod of the mesh start.
    pub(crate) fn good(place: &Place) -> Self {
        Self::start(place, |request, _| match request.line.as_str() {
            "POST /v1/cni/add" => Say::Json(200, json!({"enrolled": true, "reason": "label"})),
            "POST /v1/cni/check" => Say::Json(200, json!({"enrolled": true})),
            "GET /v1/cni/status" => Say::Json(200, json!({"version": "0.1.0"})),
            _ => Say::Json(200, json!({})),
        })
    }

    pub(crate) fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    /// How many plugins went away without an answer.
    pub(crate) fn hung_up(&self) -> usize {
        *self.hung_up.lock().unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        let _woken = UnixStream::connect(&self.path);
        let _gone = fs::remove_file(&self.path);
    }
}

fn serve(
    mut stream: UnixStream,
    seen: &Mutex<Vec<Request>>,
    hung_up: &Mutex<usize>,
    script: &Script,
) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut first, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        if first.is_empty() {
            first = line.strip_suffix(" HTTP/1.1").unwrap().to_owned();
        }
        if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let request = Request { line: first, body };
    let before = {
        let mut seen = seen.lock().unwrap();
        seen.push(request.clone());
        seen.len() - 1
    };
    match script(&request, before) {
        Say::Json(status, body) => {
            let body = body.to_string();
            let head = format!(
                "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            let _sent = stream.write_all((head + &body).as_bytes());
        }
        Say::Raw(bytes) => {
            let _sent = stream.write_all(&bytes);
        }
        Say::Drip(bytes, pause) => {
            for byte in bytes {
                if stream.write_all(&[byte]).is_err() {
                    return;
                }
                thread::sleep(pause);
            }
        }
        Say::Nothing => {
            let _end = reader.read_to_end(&mut Vec::new());
            *hung_up.lock().unwrap() += 1;
        }
        Say::Close => {}
    }
}

/// Waits for something to become true.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Compares with a file beside the tests, or writes it when `CULVERT_BLESS` is set.
pub(crate) fn golden(name: &str, transcript: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/plugin/goldens")
        .join(name);
    if std::env::var_os("CULVERT_BLESS").is_some() {
        fs::write(&path, transcript).unwrap();
        return;
    }
    let wanted = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        wanted == transcript,
        "{name} differs; to accept: CULVERT_BLESS=1 cargo test -p culvert-cni\n--- wanted\n{wanted}\n--- got\n{transcript}"
    );
}

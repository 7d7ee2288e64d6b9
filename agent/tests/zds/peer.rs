//! A ztunnel played from a script: says and answers what a test wants, and nothing by itself.

use std::{
    io::{IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use culvert::{
    model::PodUid,
    zds::{
        Event, Options, Server, Workload,
        messages::{Ack, Request, WorkloadRequest, WorkloadResponse, ZdsHello},
    },
};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use prost::Message as _;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::sync::mpsc::UnboundedReceiver;

/// How long anything may take before a test gives up.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// A server on a path of its own.
pub(crate) struct Bench {
    pub(crate) dir: PathBuf,
    pub(crate) path: PathBuf,
    pub(crate) server: Server,
    pub(crate) events: UnboundedReceiver<Event>,
}

/// Time-outs that a test can wait for, and that a loaded machine keeps.
pub(crate) fn brisk() -> Options {
    Options {
        hello: Duration::from_secs(2),
        ack: Duration::from_secs(2),
        retry: (Duration::from_millis(100), Duration::from_millis(400)),
        remove: Duration::from_secs(10),
        uid: nix::unistd::geteuid().as_raw(),
        ..Options::default()
    }
}

impl Bench {
    /// Listening; `open` is left to the test.
    pub(crate) fn new(name: &str) -> Self {
        Self::with(name, brisk())
    }

    pub(crate) fn with(name: &str, options: Options) -> Self {
        let dir = std::env::temp_dir().join(format!("culvert-zds-{}-{name}", std::process::id()));
        let path = dir.join("run/zds.sock");
        let (server, events) = Server::bind(&path, options).unwrap();
        Self {
            dir,
            path,
            server,
            events,
        }
    }

    /// Waits for an event that fits.
    pub(crate) async fn event<T>(&mut self, mut fits: impl FnMut(&Event) -> Option<T>) -> T {
        let mut seen = Vec::new();
        loop {
            let next = tokio::time::timeout(LONG, self.events.recv());
            let Ok(Some(event)) = next.await else {
                panic!("no such event; seen: {seen:?}");
            };
            if let Some(value) = fits(&event) {
                return value;
            }
            seen.push(event);
        }
    }

    /// Waits until somebody is hung up on, and says why.
    pub(crate) async fn disconnected(&mut self) -> String {
        self.event(|event| match event {
            Event::Disconnected { reason, .. } => Some(reason.to_string()),
            _ => None,
        })
        .await
    }

    /// A ztunnel that has said hello.
    pub(crate) async fn ztunnel(&self) -> Peer {
        let peer = Peer::connect(&self.path);
        peer.hello().await;
        peer
    }

    /// A ztunnel that has had an empty snapshot.
    pub(crate) async fn synced(&mut self) -> Peer {
        let peer = self.ztunnel().await;
        assert_eq!(peer.next().await.0, SENT);
        peer.ack("").await;
        self.event(|event| matches!(event, Event::Synced { .. }).then_some(()))
            .await;
        peer
    }

    /// Adds in the background.
    pub(crate) fn adding(
        &self,
        uid: &str,
    ) -> tokio::task::JoinHandle<Result<culvert::zds::Acked, culvert::zds::AddError>> {
        self.adding_in(uid, netns())
    }

    pub(crate) fn adding_in(
        &self,
        uid: &str,
        netns: Arc<OwnedFd>,
    ) -> tokio::task::JoinHandle<Result<culvert::zds::Acked, culvert::zds::AddError>> {
        let (server, uid) = (self.server.clone(), uid.to_owned());
        tokio::spawn(async move { server.add(PodUid::from(&*uid), workload(&uid), netns).await })
    }

    pub(crate) fn removing(&self, uid: &str) -> tokio::task::JoinHandle<culvert::zds::Removed> {
        let (server, uid) = (self.server.clone(), PodUid::from(uid));
        tokio::spawn(async move { server.remove(&uid).await })
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.dir);
    }
}

/// What was said, short: `add a`, `keep a`, `del a`.
pub(crate) const SENT: &str = "sent";

pub(crate) fn workload(uid: &str) -> Workload {
    Workload {
        name: format!("{uid}-name"),
        namespace: "ns".into(),
        service_account: "sa".into(),
    }
}

/// Something with an inode of its own, to be told from others.
pub(crate) fn netns() -> Arc<OwnedFd> {
    let (one, _) = UnixStream::pair().unwrap();
    Arc::new(one.into())
}

pub(crate) fn inode(fd: &impl AsRawFd) -> u64 {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let link = std::fs::read_link(path).unwrap();
    let digits: String = link
        .to_string_lossy()
        .chars()
        .filter(char::is_ascii_digit)
        .collect();
    digits.parse().unwrap()
}

pub(crate) struct Peer(pub(crate) Socket);

impl Peer {
    pub(crate) fn connect(path: &Path) -> Self {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        socket.connect(&SockAddr::unix(path).unwrap()).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self(socket)
    }

    pub(crate) async fn say(&self, packet: &[u8]) {
        self.say_with(packet, &[]).await;
    }

    pub(crate) async fn say_with(&self, packet: &[u8], fds: &[RawFd]) {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[] } else { &rights[..] };
        sendmsg::<()>(
            self.0.as_raw_fd(),
            &[IoSlice::new(packet)],
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .unwrap();
    }

    pub(crate) async fn hello(&self) {
        self.say(&ZdsHello { version: 1 }.encode_to_vec()).await;
    }

    pub(crate) async fn ack(&self, error: &str) {
        let ack = Some(Ack {
            error: error.into(),
        });
        self.say(&WorkloadResponse { ack }.encode_to_vec()).await;
    }

    /// What it is told next, with the inode of what came beside it.
    pub(crate) async fn next(&self) -> (String, Option<u64>) {
        self.next_within(LONG)
            .await
            .unwrap_or_else(|| panic!("nothing was said within {LONG:?}"))
    }

    /// Like `next`, for a pod of another service account.
    pub(crate) async fn next_as(&self, account: &str) -> (String, Option<u64>) {
        let started = Instant::now();
        loop {
            if let Some(said) = self.try_next(account) {
                return said;
            }
            assert!(started.elapsed() < LONG, "nothing was said");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Like `next`; `None` when nothing comes. `"eof"` when the server has hung up.
    pub(crate) async fn next_within(&self, time: Duration) -> Option<(String, Option<u64>)> {
        let started = Instant::now();
        loop {
            if let Some(said) = self.try_next("sa") {
                return Some(said);
            }
            if started.elapsed() > time {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn try_next(&self, account: &str) -> Option<(String, Option<u64>)> {
        let mut packet = vec![0; 4096];
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut iov = [IoSliceMut::new(&mut packet)];
        let message = recvmsg::<()>(
            self.0.as_raw_fd(),
            &mut iov,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .ok()?;
        let mut fds = Vec::new();
        for item in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(raw) = item {
                fds.extend(raw);
            }
        }
        let length = message.bytes;
        assert!(length <= 1024, "{length} bytes: ztunnel reads 1024");
        assert!(fds.len() <= 1, "{} descriptors in one message", fds.len());
        let inode = fds.first().map(|fd| {
            let inode = inode(fd);
            nix::unistd::close(*fd).unwrap();
            inode
        });
        if length == 0 {
            return Some(("eof".into(), None));
        }
        let request = WorkloadRequest::decode(&packet[..length]).unwrap();
        let said = match request.payload.unwrap() {
            Request::Add(add) => {
                let info = add.workload_info.expect("mandatory");
                let sent = (&*info.name, &*info.namespace, &*info.service_account);
                assert_eq!(sent, (&*format!("{}-name", add.uid), "ns", account));
                format!("add {}", add.uid)
            }
            Request::Del(del) => format!("del {}", del.uid),
            Request::Keep(keep) => format!("keep {}", keep.uid),
            Request::SnapshotSent(_) => SENT.into(),
        };
        assert_eq!(
            inode.is_some(),
            said.starts_with("add "),
            "a descriptor with Add, and only with Add: {said}"
        );
        Some((said, inode))
    }

    /// Is told this, and acknowledges it.
    pub(crate) async fn obeys(&self, what: &str) {
        assert_eq!(self.next().await.0, what);
        self.ack("").await;
    }

    /// Acknowledges everything until nothing has come for a while; returns what it was.
    pub(crate) async fn obeys_all(&self, quiet: Duration) -> Vec<String> {
        let mut said = Vec::new();
        while let Some((what, _)) = self.next_within(quiet).await {
            if what == "eof" {
                break;
            }
            said.push(what);
            self.ack("").await;
        }
        said
    }
}

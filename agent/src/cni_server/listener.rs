//! The agent's socket: made, guarded, served, taken away.
//!
//! Whoever may connect can have pods captured and let go, so only root and the user the agent runs as get in, by mode and
//! by the peer's credentials. It knows no routes.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

use axum::{Router, extract::ConnectInfo};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{UnixListener, UnixStream},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use tower::Service as _;

/// How long requests in flight may go on once the agent is told to end.
const GRACE: Duration = Duration::from_secs(3);

/// For a request's head, and between two requests: whoever connects and says nothing is not waited for.
const HEAD: Duration = Duration::from_secs(10);

/// The socket could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {}: {cause}; the agent needs its run directory to itself and writable", path.display())]
pub struct BindError {
    doing: &'static str,
    path: PathBuf,
    cause: io::Error,
}

/// A socket that is listened on. Dropping it takes the path away, unless another agent has put its own there since.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode: which file there is ours.
    file: (u64, u64),
}

impl Listener {
    /// Makes the socket, in the place of whatever socket was there, and its directory. There is no moment at which the
    /// path is missing, or can be connected to and is not ours.
    ///
    /// # Errors
    ///
    /// Says which step failed, and where.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let failed = |doing, path: &Path| {
            let path = path.to_owned();
            move |cause| BindError { doing, path, cause }
        };
        if let Some(dir) = path.parent() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .map_err(failed("make", dir))?;
        }
        let temporary = path.with_extension(std::process::id().to_string());
        match fs::remove_file(&temporary) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &temporary)(cause));
            }
            _ => {}
        }
        let socket = UnixListener::bind(&temporary).map_err(failed("listen on", &temporary))?;
        let publish = || -> io::Result<(u64, u64)> {
            fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
            let data = fs::metadata(&temporary)?;
            fs::rename(&temporary, path)?;
            Ok((data.dev(), data.ino()))
        };
        match publish() {
            Ok(file) => Ok(Self {
                socket,
                path: path.to_owned(),
                file,
            }),
            Err(cause) => {
                // Its own failure would hide the one that matters.
                let _removed = fs::remove_file(&temporary);
                Err(failed("publish", path)(cause))
            }
        }
    }

    /// Serves until `shutdown` is ready, and what is in flight for a moment longer.
    pub async fn serve(self, app: Router, shutdown: impl Future<Output = ()> + Send + 'static) {
        let app = super::routes::with_fallbacks(app);
        let (stop, mut open) = (CancellationToken::new(), JoinSet::new());
        tokio::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                Some(_) = open.join_next() => {}
                (stream, peer) = self.accept() => {
                    open.spawn(converse(stream, peer, app.clone(), stop.clone()));
                }
            }
        }
        stop.cancel();
        let rest = async { while open.join_next().await.is_some() {} };
        if tokio::time::timeout(GRACE, rest).await.is_err() {
            tracing::warn!("requests of the plugin were cut off at shutdown");
        }
    }

    /// The next connection of somebody who may have one.
    async fn accept(&self) -> (UnixStream, Peer) {
        loop {
            let error = match self.socket.accept().await {
                Ok((stream, _unnamed)) => match stream.peer_cred() {
                    Ok(peer) if may_enter(peer.uid()) => {
                        let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok());
                        let pid = pid.filter(|pid| *pid != 0);
                        return (stream, Peer { pid });
                    }
                    Ok(peer) => {
                        tracing::warn!(
                            uid = peer.uid(),
                            pid = peer.pid(),
                            "turned away at the agent's socket"
                        );
                        continue;
                    }
                    Err(error) => error,
                },
                Err(error) => error,
            };
            // Out of descriptors, most likely: they come back, and spinning would not help.
            tracing::error!(%error, "cannot accept at the agent's socket");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Serves one connection. A request that is begun has to be asked in time; how long the answer takes is for the routes.
async fn converse(stream: UnixStream, peer: Peer, app: Router, stop: CancellationToken) {
    let service = hyper::service::service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(peer));
        app.clone().call(request)
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        // The peer's end of it is the peer's business.
        _ = connection.as_mut() => return,
        () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    let _ended = connection.await;
}

/// Who is at the other end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Its process, by our PID namespace's number; none where it has none there.
    pub pid: Option<u32>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|data| (data.dev(), data.ino()) == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot take the agent's socket away");
        }
    }
}

fn may_enter(uid: u32) -> bool {
    uid == 0 || uid == nix::unistd::geteuid().as_raw()
}

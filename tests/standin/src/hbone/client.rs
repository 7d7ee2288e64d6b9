//! Opening tunnels: one TLS connection from a pod to each peer, many streams on it.
//!
//! Owns the pool. Which peers there are, and when HBONE is used, is `outbound`'s business.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use http::{Method, Request, StatusCode, Uri};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::tunnel::Tunnel;
use super::{CONNECTION_WINDOW, FRAME_SIZE, STREAM_WINDOW, STREAMS};
use crate::identity::{Credentials, SpiffeId};
use crate::pod::Pod;
use crate::sockets::{self, Source};
use crate::{INBOUND_HBONE_PORT, tls};

/// For each of the handshake and the answer to CONNECT.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum HboneError {
    /// The peer's proxy cannot be reached.
    #[error("cannot reach the peer's proxy at {0}: {1}")]
    Connect(SocketAddr, #[source] io::Error),
    /// TLS failed, mostly because the peer is not who it should be.
    #[error("no TLS with {0}: {1}")]
    Tls(SocketAddr, #[source] io::Error),
    /// HTTP/2 failed.
    #[error("HTTP/2: {0}")]
    Http(#[from] h2::Error),
    /// The peer's proxy has refused, mostly because its app did.
    #[error("the peer's proxy answers {0}")]
    Refused(StatusCode),
    /// The peer's proxy is silent.
    #[error("no answer from {0} within {PATIENCE:?}")]
    Silent(SocketAddr),
    /// A bug in here, or a pod whose names make no certificate.
    #[error("cannot use the pod's own certificate: {0}")]
    Own(#[source] rustls::Error),
}

type Sender = SendRequest<Bytes>;
/// Locked while connecting, so that a burst of connections makes one handshake.
type Slot = Arc<tokio::sync::Mutex<Option<Sender>>>;

/// A pod's connections to its peers.
#[derive(Debug, Default)]
pub struct Pool(Mutex<HashMap<(IpAddr, SpiffeId), Slot>>);

impl Pool {
    /// Opens a tunnel to `to` through the proxy of the pod that has this address.
    ///
    /// # Errors
    /// When there is none to be had; nothing has been sent on behalf of the client then.
    pub async fn open(
        &self,
        pod: &Arc<Pod>,
        source: IpAddr,
        peer: &SpiffeId,
        to: SocketAddr,
    ) -> Result<Tunnel, HboneError> {
        let slot = self.slot(to.ip(), peer);
        let proxy = SocketAddr::new(to.ip(), INBOUND_HBONE_PORT);
        loop {
            let (sender, pooled) = ready_sender(&slot, pod, source, peer, proxy).await?;
            match request(sender, proxy, to).await {
                // The connection may have been about to end when it was taken. No byte of the client's is lost yet: try a new one.
                Err(HboneError::Http(error)) if pooled => {
                    tracing::debug!(%proxy, %error, "pooled connection is gone, connecting anew");
                    *slot.lock().await = None;
                }
                Err(error @ HboneError::Silent(_)) => {
                    *slot.lock().await = None;
                    return Err(error);
                }
                other => return other,
            }
        }
    }

    fn slot(&self, ip: IpAddr, peer: &SpiffeId) -> Slot {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slots.entry((ip, peer.clone())).or_default().clone()
    }
}

/// A sender that may open a stream now, and whether it was there before.
async fn ready_sender(
    slot: &Slot,
    pod: &Arc<Pod>,
    source: IpAddr,
    peer: &SpiffeId,
    proxy: SocketAddr,
) -> Result<(Sender, bool), HboneError> {
    let mut slot = slot.lock().await;
    if let Some(pooled) = slot.take()
        && let Ok(sender) = pooled.ready().await
    {
        *slot = Some(sender.clone());
        return Ok((sender, true));
    }
    let stream = sockets::connect(&pod.netns, Source::Own(source), proxy)
        .await
        .map_err(|error| HboneError::Connect(proxy, error))?;
    let (sender, connection) = handshake(stream, proxy, &pod.credentials, peer).await?;
    pod.spawn_background(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%proxy, %error, "HBONE connection ended");
        }
    });
    *slot = Some(sender.clone());
    Ok((sender, false))
}

/// TLS and HTTP/2 on a connected socket. The connection must be polled for anything to happen.
///
/// # Errors
/// When the peer is not `peer`, or does not speak HTTP/2.
pub async fn handshake(
    stream: TcpStream,
    proxy: SocketAddr,
    own: &Credentials,
    peer: &SpiffeId,
) -> Result<(Sender, Connection<TlsStream<TcpStream>, Bytes>), HboneError> {
    let config = tls::client(own, peer.clone()).map_err(HboneError::Own)?;
    let connector = TlsConnector::from(Arc::new(config));
    let shake = async {
        let stream = connector
            .connect(ServerName::from(proxy.ip()), stream)
            .await
            .map_err(|error| HboneError::Tls(proxy, error))?;
        let mut builder = h2::client::Builder::new();
        builder
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME_SIZE)
            .initial_max_send_streams(STREAMS as usize);
        Ok(builder.handshake(stream).await?)
    };
    tokio::time::timeout(PATIENCE, shake)
        .await
        .map_err(|_| HboneError::Silent(proxy))?
}

/// Asks for a tunnel to `to`.
///
/// # Errors
/// When the peer's proxy refuses or is silent.
pub async fn request(
    mut sender: Sender,
    proxy: SocketAddr,
    to: SocketAddr,
) -> Result<Tunnel, HboneError> {
    // An address and a port always make an authority.
    let uri = Uri::builder()
        .authority(to.to_string())
        .build()
        .unwrap_or_default();
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = uri;
    let (response, send) = sender.send_request(request, false)?;
    let response = tokio::time::timeout(PATIENCE, response)
        .await
        .map_err(|_| HboneError::Silent(proxy))??;
    if response.status() != StatusCode::OK {
        return Err(HboneError::Refused(response.status()));
    }
    Ok(Tunnel {
        send,
        recv: response.into_body(),
    })
}

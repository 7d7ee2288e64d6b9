//! Ending tunnels: what is accepted on 15008, delivered to the app from the client's address.
//!
//! Owns TLS, HTTP/2 and the checks on CONNECT. Only the pod's own address may be asked for: else any peer could use the pod as
//! a relay.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{Method, Request, Response, StatusCode};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use super::tunnel::Tunnel;
use super::{CONNECTION_WINDOW, FRAME_SIZE, STREAM_WINDOW, STREAMS};
use crate::identity::SpiffeId;
use crate::pod::Pod;
use crate::{ILLEGAL_PORTS, inbound, sockets, tls};

const HANDSHAKE: Duration = Duration::from_secs(10);

/// Serves one connection from another proxy until it closes or the pod drains and the last tunnel has ended.
pub async fn serve(pod: Arc<Pod>, stream: TcpStream, client: SocketAddr) {
    if let Err(error) = connection(&pod, stream, client).await {
        tracing::info!(pod = %pod.name(), %client, error = format!("{error:#}"), "HBONE: connection ended");
    }
}

async fn connection(pod: &Arc<Pod>, stream: TcpStream, client: SocketAddr) -> anyhow::Result<()> {
    let local = sockets::original_dst(&stream)?;
    let acceptor = TlsAcceptor::from(pod.tls_server.clone());
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_SIZE)
        .max_concurrent_streams(STREAMS);
    let shake = async {
        let stream = acceptor.accept(stream).await?;
        let peer = tls::peer_identity(stream.get_ref().1.peer_certificates())?;
        anyhow::Ok((peer, builder.handshake::<_, Bytes>(stream).await?))
    };
    let (peer, mut connection) = tokio::time::timeout(HANDSHAKE, shake).await??;
    tracing::debug!(pod = %pod.name(), %client, %peer, "HBONE: peer is known");

    let peer = Arc::new(peer);
    let mut draining = false;
    loop {
        let stream = tokio::select! {
            () = pod.draining(), if !draining => {
                // Told so, the peer opens its next tunnels with whoever listens by then.
                connection.graceful_shutdown();
                draining = true;
                continue;
            }
            stream = connection.accept() => stream,
        };
        match stream {
            Some(stream) => {
                let (request, respond) = stream?;
                pod.spawn(tunnel(
                    pod.clone(),
                    request,
                    respond,
                    client,
                    local,
                    peer.clone(),
                ));
            }
            None => return Ok(()),
        }
    }
}

async fn tunnel(
    pod: Arc<Pod>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    client: SocketAddr,
    local: SocketAddr,
    peer: Arc<SpiffeId>,
) {
    let app = match target(&request, local) {
        Ok(app) => app,
        Err(status) => {
            pod.counters.refused.one();
            tracing::warn!(pod = %pod.name(), %client, %peer, method = %request.method(), uri = %request.uri(), %status, "HBONE: refused");
            return refuse(&mut respond, status);
        }
    };
    let stream = match inbound::deliver(&pod, client, app).await {
        Ok(stream) => stream,
        Err(error) => {
            tracing::info!(pod = %pod.name(), %client, %peer, %app, %error, "HBONE: the app does not answer");
            return refuse(&mut respond, StatusCode::SERVICE_UNAVAILABLE);
        }
    };
    // The peer may have given up meanwhile; then there is nobody to tell.
    let Ok(send) = respond.send_response(Response::new(()), false) else {
        return;
    };
    pod.counters.hbone_in.one();
    tracing::debug!(pod = %pod.name(), %client, %peer, %app, "HBONE: delivered");
    let tunnel = Tunnel {
        send,
        recv: request.into_body(),
    };
    if let Err(error) = tunnel.carry(stream, &pod.counters.bytes).await {
        tracing::debug!(pod = %pod.name(), %client, %app, %error, "HBONE: tunnel ended");
    }
}

/// Where a request may go, given the address it was accepted on.
fn target<B>(request: &Request<B>, local: SocketAddr) -> Result<SocketAddr, StatusCode> {
    if request.method() != Method::CONNECT {
        return Err(StatusCode::METHOD_NOT_ALLOWED);
    }
    let authority = request.uri().authority().ok_or(StatusCode::BAD_REQUEST)?;
    let app: SocketAddr = authority
        .as_str()
        .parse()
        .map_err(|_| StatusCode::BAD_REQUEST)?;
    let app = sockets::canonical(app);
    if app.ip() != local.ip() || ILLEGAL_PORTS.contains(&app.port()) {
        return Err(StatusCode::FORBIDDEN);
    }
    Ok(app)
}

fn refuse(respond: &mut SendResponse<Bytes>, status: StatusCode) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    // A peer that is gone does not need the answer.
    let _ = respond.send_response(response, true);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_connect_to_the_pods_own_address_is_allowed() {
        let local = "10.0.0.2:15008".parse().unwrap();
        let ask = |method: Method, uri: &str| {
            target(
                &Request::builder().method(method).uri(uri).body(()).unwrap(),
                local,
            )
        };
        assert_eq!(
            ask(Method::CONNECT, "10.0.0.2:80"),
            Ok("10.0.0.2:80".parse().unwrap())
        );
        assert_eq!(
            ask(Method::CONNECT, "[::ffff:10.0.0.2]:80"),
            Ok("10.0.0.2:80".parse().unwrap())
        );
        assert_eq!(
            ask(Method::CONNECT, "10.0.0.3:80"),
            Err(StatusCode::FORBIDDEN)
        );
        assert_eq!(
            ask(Method::CONNECT, "127.0.0.1:80"),
            Err(StatusCode::FORBIDDEN)
        );
        assert_eq!(
            ask(Method::CONNECT, "10.0.0.2:15001"),
            Err(StatusCode::FORBIDDEN)
        );
        assert_eq!(
            ask(Method::CONNECT, "web.shop:80"),
            Err(StatusCode::BAD_REQUEST)
        );
        assert_eq!(
            ask(Method::GET, "http://10.0.0.2:80/"),
            Err(StatusCode::METHOD_NOT_ALLOWED)
        );
    }
}

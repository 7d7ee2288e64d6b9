//! gRPC's health service, as the kubelet asks it: every question is answered with SERVING.

use anyhow::Result;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response};
use tokio::net::{TcpListener, TcpStream};

/// A message that is not compressed, two bytes long: field 1 (status) is 1 (SERVING).
const SERVING: &[u8] = &[0, 0, 0, 0, 2, 0x08, 0x01];

/// Serves until it is ended.
pub(crate) async fn serve(listener: TcpListener) {
    while let Ok((stream, client)) = listener.accept().await {
        tokio::spawn(async move {
            if let Err(error) = answer(stream).await {
                println!("{client}: {error:#}");
            }
        });
    }
}

async fn answer(stream: TcpStream) -> Result<()> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(request) = connection.accept().await {
        let (_request, mut respond) = request?;
        let head = Response::builder()
            .status(200)
            .header("content-type", "application/grpc")
            .body(())?;
        let mut body = respond.send_response(head, false)?;
        body.send_data(Bytes::from_static(SERVING), false)?;
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        body.send_trailers(trailers)?;
    }
    Ok(())
}

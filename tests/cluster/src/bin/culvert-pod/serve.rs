//! The server: one line of HTTP or an echo, told apart by the first line. It understands no more of HTTP than that.

use std::net::{Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::grpc;

/// Serves until it is ended.
pub(crate) async fn run(port: u16, health: Option<u16>) -> Result<()> {
    if let Some(port) = health {
        let listener = listen(port).await?;
        tokio::spawn(grpc::serve(listener));
    }
    let listener = listen(port).await?;
    println!("serving on port {port}");
    let host = std::env::var("HOSTNAME").unwrap_or_default();
    loop {
        let (stream, client) = listener.accept().await.context("accept")?;
        let host = host.clone();
        tokio::spawn(async move {
            // One client's trouble is not the others'.
            if let Err(error) = answer(stream, client, &host).await {
                println!("{client}: {error:#}");
            }
        });
    }
}

async fn listen(port: u16) -> Result<TcpListener> {
    let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    TcpListener::bind(both)
        .await
        .with_context(|| format!("listening on {both}"))
}

async fn answer(stream: TcpStream, client: SocketAddr, host: &str) -> Result<()> {
    let _faster_at_best = stream.set_nodelay(true);
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    let mut http = false;
    while stream.read_line(&mut line).await? > 0 {
        http |= line.starts_with("GET ");
        if !http {
            stream.write_all(line.as_bytes()).await?;
        } else if line.trim().is_empty() {
            let body = format!("{host} {}\n", client.ip().to_canonical());
            let head = "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nConnection: close";
            let length = body.len();
            let text = format!("{head}\r\nContent-Length: {length}\r\n\r\n{body}");
            stream.write_all(text.as_bytes()).await?;
            return Ok(());
        }
        line.clear();
    }
    Ok(())
}

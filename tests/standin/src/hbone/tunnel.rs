//! Moving bytes between a TCP connection and an HTTP/2 stream, in either role.
//!
//! Owns flow control and the end of a tunnel: a half-close is passed on as one, anything else cuts both sides.

use std::future::poll_fn;
use std::io;

use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::counters::Counter;

/// What one read from TCP may fetch; a TLS record holds 16 KiB, a frame up to 1 MiB.
const READ: usize = 64 * 1024;

/// Both halves of an established tunnel.
#[derive(Debug)]
pub struct Tunnel {
    /// Towards the peer.
    pub send: SendStream<Bytes>,
    /// From the peer.
    pub recv: RecvStream,
}

impl Tunnel {
    /// Carries a TCP connection until both directions have ended, or one fails.
    ///
    /// # Errors
    /// The first failure; the stream is reset, and dropping the connection ends it as well.
    pub async fn carry(mut self, mut stream: TcpStream, bytes: &Counter) -> io::Result<()> {
        let (read, write) = stream.split();
        let carried = tokio::try_join!(
            up(read, &mut self.send, bytes),
            down(&mut self.recv, write, bytes)
        );
        if carried.is_err() {
            self.send.send_reset(Reason::CANCEL);
        }
        carried.map(drop)
    }
}

async fn up(
    mut from: impl AsyncRead + Unpin,
    to: &mut SendStream<Bytes>,
    bytes: &Counter,
) -> io::Result<()> {
    let mut buffer = BytesMut::with_capacity(READ);
    loop {
        buffer.reserve(READ);
        let n = tokio::select! {
            n = from.read_buf(&mut buffer) => n?,
            // The peer may give up on us while our side is silent.
            reset = poll_fn(|cx| to.poll_reset(cx)) => return Err(was_reset(reset)),
        };
        if n == 0 {
            return to.send_data(Bytes::new(), true).map_err(io::Error::other);
        }
        bytes.add(n as u64);
        send_all(to, buffer.split().freeze()).await?;
    }
}

async fn send_all(to: &mut SendStream<Bytes>, mut data: Bytes) -> io::Result<()> {
    while !data.is_empty() {
        to.reserve_capacity(data.len());
        let granted = match poll_fn(|cx| to.poll_capacity(cx)).await {
            Some(granted) => granted.map_err(io::Error::other)?,
            None => return Err(io::ErrorKind::BrokenPipe.into()),
        };
        to.send_data(data.split_to(granted.min(data.len())), false)
            .map_err(io::Error::other)?;
    }
    Ok(())
}

async fn down(
    from: &mut RecvStream,
    mut to: impl AsyncWrite + Unpin,
    bytes: &Counter,
) -> io::Result<()> {
    while let Some(data) = from.data().await {
        let data = data.map_err(io::Error::other)?;
        bytes.add(data.len() as u64);
        to.write_all(&data).await?;
        from.flow_control()
            .release_capacity(data.len())
            .map_err(io::Error::other)?;
    }
    crate::copy::finish(&mut to).await
}

fn was_reset(reset: Result<Reason, h2::Error>) -> io::Error {
    match reset {
        Ok(reason) => io::Error::new(
            io::ErrorKind::ConnectionReset,
            format!("the peer has reset the stream: {reason}"),
        ),
        Err(error) => io::Error::other(error),
    }
}

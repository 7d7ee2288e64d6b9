//! Copying between two byte streams, half-closes included.
//!
//! Owns buffers and the end of a connection; knows nothing of where the streams come from.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::counters::Counter;

/// Small enough that ten thousand idle connections are cheap.
const FIRST_BUFFER: usize = 8 * 1024;
/// Large enough that bulk transfers are not bound by system calls.
const LARGEST_BUFFER: usize = 256 * 1024;

/// Copies both ways until both ends have finished, or one fails.
///
/// # Errors
/// The first failure on either side; dropping the streams then ends both connections.
pub async fn both_ways(mut a: TcpStream, mut b: TcpStream, bytes: &Counter) -> io::Result<()> {
    let (a_read, a_write) = a.split();
    let (b_read, b_write) = b.split();
    tokio::try_join!(
        one_way(a_read, b_write, bytes),
        one_way(b_read, a_write, bytes)
    )?;
    Ok(())
}

/// Copies one way, then passes the end of the stream on.
///
/// # Errors
/// What reading or writing says.
pub async fn one_way(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    bytes: &Counter,
) -> io::Result<()> {
    let mut buffer = vec![0; FIRST_BUFFER];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return finish(&mut to).await;
        }
        // Counted first: whoever has received a byte finds it in the statistics.
        bytes.add(n as u64);
        to.write_all(&buffer[..n]).await?;
        if n == buffer.len() && n < LARGEST_BUFFER {
            buffer = vec![0; n * 4];
        }
    }
}

/// The other side may be gone already, which is no failure once everything has been said.
pub(crate) async fn finish(to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    match to.shutdown().await {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        other => other,
    }
}

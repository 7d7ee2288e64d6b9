//! The clients: one connection kept up, or many in turn. Each line that is sent has to come back.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// Between two lines of a connection that is kept up.
const PAUSE: Duration = Duration::from_millis(50);
/// How long an answer may take: the machine may be busy with other things.
const ANSWER: Duration = Duration::from_secs(20);
/// How often the clients say how far they are.
const REPORT: Duration = Duration::from_millis(500);

/// One connection, for ever. It is opened anew only until it has been open once; how many tries that took is said.
pub(crate) async fn keep(to: SocketAddr) -> Result<()> {
    let mut tries = 1;
    let mut stream = loop {
        match connect(to).await {
            Ok(stream) => break stream,
            Err(error) => println!("not yet: {error:#}"),
        }
        tries += 1;
        sleep(PAUSE).await;
    };
    println!("connected, tries {tries}");
    let mut said = Instant::now();
    for number in 0_u64.. {
        echo(&mut stream, &format!("line {number}\n"))
            .await
            .with_context(|| format!("after {number} lines"))?;
        if said.elapsed() > REPORT {
            println!("lines {number}");
            said = Instant::now();
        }
        sleep(PAUSE).await;
    }
    Ok(())
}

/// One connection after another, for ever.
pub(crate) async fn load(to: &[SocketAddr], pause: Duration) -> Result<()> {
    let (mut good, mut failed) = (0_u64, 0_u64);
    let mut said = Instant::now();
    for to in to.iter().cycle() {
        match once(*to, "hello\n").await {
            Ok(()) => good += 1,
            Err(error) => {
                failed += 1;
                println!("failed: {to}: {error:#}");
            }
        }
        if said.elapsed() > REPORT {
            println!("good {good} failed {failed}");
            said = Instant::now();
        }
        sleep(pause).await;
    }
    Ok(())
}

/// One line, until it has come back; how many tries that took is said.
pub(crate) async fn send(to: SocketAddr, line: &str) -> Result<()> {
    let line = format!("{line}\n");
    for tries in 1_u64.. {
        match once(to, &line).await {
            Ok(()) => {
                println!("sent, tries {tries}");
                break;
            }
            Err(error) => println!("again: {error:#}"),
        }
        sleep(PAUSE).await;
    }
    Ok(())
}

async fn once(to: SocketAddr, line: &str) -> Result<()> {
    echo(&mut connect(to).await?, line).await
}

async fn connect(to: SocketAddr) -> Result<BufReader<TcpStream>> {
    let stream = timeout(ANSWER, TcpStream::connect(to)).await;
    let stream = stream.context("connecting took too long")??;
    stream.set_nodelay(true)?;
    Ok(BufReader::new(stream))
}

async fn echo(stream: &mut BufReader<TcpStream>, line: &str) -> Result<()> {
    let mut answer = String::new();
    let both = async {
        stream.write_all(line.as_bytes()).await?;
        stream.read_line(&mut answer).await
    };
    let read = timeout(ANSWER, both).await.context("no answer in time")??;
    ensure!(read > 0, "the other side has closed the connection");
    ensure!(answer == line, "{answer:?} came back for {line:?}");
    Ok(())
}

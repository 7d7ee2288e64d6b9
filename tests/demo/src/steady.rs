//! Connections that stay open through a whole step: a curl of each family that asks again and again, and nginx's word that
//! it is still the same connection.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use culvert_lab::{Child, Family, Ns};

use crate::access_log::AccessLog;
use crate::stage::Stage;
use crate::{interrupt, programs};

/// Requests more that show that a connection lives.
const MORE: u64 = 3;
const PATIENCE: Duration = Duration::from_secs(10);

/// One connection of each family.
#[derive(Debug)]
pub(crate) struct Steady {
    pair: Vec<One>,
}

#[derive(Debug)]
struct One {
    curl: Child,
    uri: String,
    connection: u64,
    client: SocketAddr,
}

impl Steady {
    /// Opens both and waits for their first answers.
    pub(crate) fn open(stage: &Stage, from: &Ns, name: &str) -> Result<Self> {
        let mut pair = Vec::new();
        for family in Family::BOTH {
            let uri = format!("/{name}-{family}");
            let curl = programs::steady_curl(from, stage.web.at(family, 80)?, &uri)?;
            let first = interrupt::wait_for(PATIENCE, || {
                running(&curl)?;
                let found = stage.log.find(&uri)?;
                Ok(found
                    .first()
                    .cloned()
                    .ok_or_else(|| format!("nginx has not logged {uri}")))
            })?;
            ensure!(
                first.requests == 1,
                "nginx calls this the first request: {first:?}"
            );
            pair.push(One {
                curl,
                uri,
                connection: first.connection,
                client: first.client,
            });
        }
        Ok(Self { pair })
    }

    /// Waits until nginx has answered more requests on the very same connections, and says how many by now.
    pub(crate) fn alive(&self, log: &AccessLog) -> Result<String> {
        let mut counts = Vec::new();
        for one in &self.pair {
            let before = one.requests(log)?;
            let now = interrupt::wait_for(PATIENCE, || {
                running(&one.curl)?;
                let now = one.requests(log)?;
                Ok(if now >= before + MORE {
                    Ok(now)
                } else {
                    Err(format!(
                        "{now} requests on connection {}, {before} before",
                        one.connection
                    ))
                })
            })?;
            counts.push(format!("{now}"));
        }
        let numbers: Vec<_> = self
            .pair
            .iter()
            .map(|one| format!("*{}", one.connection))
            .collect();
        Ok(format!(
            "nginx: connections {}, {} requests so far",
            numbers.join(" "),
            counts.join(" + ")
        ))
    }

    /// Whether a packet's ends are those of one of the connections.
    pub(crate) fn owns(&self, a: SocketAddr, b: SocketAddr) -> bool {
        self.pair
            .iter()
            .any(|one| (one.client == a && b.port() == 80) || (one.client == b && a.port() == 80))
    }

    /// Ends both clients.
    pub(crate) fn close(&self) -> Result<()> {
        self.pair.iter().try_for_each(|one| one.curl.kill())
    }
}

impl One {
    /// How many requests came over the connection. Fails if any came over another.
    fn requests(&self, log: &AccessLog) -> Result<u64> {
        let found = log.find(&self.uri)?;
        if let Some(other) = found
            .iter()
            .find(|entry| entry.connection != self.connection)
        {
            bail!(
                "connection {} is gone, curl opened {other:?}",
                self.connection
            );
        }
        Ok(found.last().map_or(0, |entry| entry.requests))
    }
}

fn running(curl: &Child) -> Result<()> {
    match curl.status() {
        None => Ok(()),
        Some(status) => bail!("curl ended ({status}): {}", curl.stderr()),
    }
}

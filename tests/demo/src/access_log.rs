//! nginx's access log: whom the server has seen. Reads only.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::interrupt;

/// How long nginx may take to write a line.
const PATIENCE: Duration = Duration::from_secs(10);

/// The log.
#[derive(Debug)]
pub(crate) struct AccessLog {
    path: PathBuf,
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Whom nginx takes the client for.
    pub(crate) client: SocketAddr,
    /// nginx's number for the connection.
    pub(crate) connection: u64,
    /// Requests on that connection, this one included.
    pub(crate) requests: u64,
    status: u16,
    uri: String,
}

impl AccessLog {
    pub(crate) fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// The requests whose path begins so, oldest first.
    pub(crate) fn find(&self, uri: &str) -> Result<Vec<Entry>> {
        let text = std::fs::read_to_string(&self.path)
            .with_context(|| format!("reading {}", self.path.display()))?;
        // The last line may still be in the making.
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut found = Vec::new();
        for line in whole.lines() {
            let entry = parse(line).with_context(|| format!("nginx logged {line:?}"))?;
            if entry.uri.starts_with(uri) {
                ensure!(
                    entry.status == 200,
                    "nginx answered {}: {line}",
                    entry.status
                );
                found.push(entry);
            }
        }
        Ok(found)
    }

    /// Who asked for a page. nginx writes its line after the client has the page.
    pub(crate) fn client(&self, uri: &str) -> Result<IpAddr> {
        let entries = interrupt::wait_for(PATIENCE, || {
            let found = self.find(uri)?;
            Ok(if found.is_empty() {
                Err(format!("nginx has not logged {uri}"))
            } else {
                Ok(found)
            })
        })?;
        ensure!(
            entries.len() == 1,
            "nginx was asked {} times for {uri}",
            entries.len()
        );
        entries
            .first()
            .map(|entry| entry.client.ip())
            .context("no entry")
    }
}

fn parse(line: &str) -> Option<Entry> {
    let mut fields = line.split(' ');
    let mut next = || fields.next();
    let client = SocketAddr::new(next()?.parse().ok()?, next()?.parse().ok()?);
    Some(Entry {
        client,
        connection: next()?.parse().ok()?,
        requests: next()?.parse().ok()?,
        status: next()?.parse().ok()?,
        uri: next()?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_in_both_families() {
        let entry = parse("10.77.0.10 40000 3 17 200 /x").unwrap();
        assert_eq!(entry.client, "10.77.0.10:40000".parse().unwrap());
        assert_eq!((entry.connection, entry.requests), (3, 17));
        let entry = parse("fd77::a 1 2 3 404 /y").unwrap();
        assert_eq!(
            (entry.client.ip().to_string().as_str(), entry.status),
            ("fd77::a", 404)
        );
        assert!(parse("10.77.0.10 -").is_none());
    }
}

//! The steps of the demonstration, one file each, and what they share.

pub(crate) mod after;
pub(crate) mod before;
pub(crate) mod enrolled;
pub(crate) mod stopped;

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use culvert_lab::{Family, Ns};

use crate::programs::{self, Fetch};
use crate::stage::{Stage, both};
use crate::wire::Wire;

static SERIAL: AtomicU32 = AtomicU32::new(1);

/// The same page asked for in both families, under paths that nobody else uses.
#[derive(Debug)]
pub(crate) struct Pages {
    uris: Vec<(Family, String)>,
}

impl Pages {
    pub(crate) fn new(name: &str) -> Self {
        let uri = |family| {
            let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
            (family, format!("/{name}-{family}-secret{serial:03}"))
        };
        Self {
            uris: Family::BOTH.map(uri).into(),
        }
    }

    pub(crate) fn uris(&self) -> Vec<&str> {
        self.uris.iter().map(|(_, uri)| uri.as_str()).collect()
    }

    /// Fetches both from the server, one after the other.
    pub(crate) fn fetch(&self, stage: &Stage, from: &Ns) -> Result<String> {
        for (family, uri) in &self.uris {
            programs::fetch(from, &stage.web, *family, uri).with_context(|| family.to_string())?;
        }
        Ok("HTTP 200 over IPv4 and IPv6".to_owned())
    }

    /// Begins to fetch both.
    pub(crate) fn start(&self, stage: &Stage, from: &Ns) -> Result<Vec<Fetch>> {
        let start =
            |(family, uri): &(Family, String)| programs::start_curl(from, &stage.web, *family, uri);
        self.uris.iter().map(start).collect()
    }

    /// Fails unless nginx has been asked by these very addresses.
    pub(crate) fn logged_as(&self, stage: &Stage, client: &Ns) -> Result<String> {
        for (family, uri) in &self.uris {
            let (seen, expected) = (stage.log.client(uri)?, client.ip(*family)?);
            ensure!(
                seen == expected,
                "nginx logged {seen} instead of {expected}"
            );
        }
        both(|family| Ok(client.ip(family)?.to_string()))
    }

    /// Fails unless both requests could be read on the wire.
    pub(crate) fn plaintext(&self, stage: &Stage, wire: &Wire) -> Result<String> {
        for (family, uri) in &self.uris {
            wire.plaintext(&stage.web, *family, uri)
                .with_context(|| family.to_string())?;
        }
        let (_, uri) = self.uris.first().context("no page")?;
        Ok(format!("plaintext to port 80: \"GET {uri}\""))
    }
}

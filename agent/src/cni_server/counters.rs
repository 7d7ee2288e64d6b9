//! How many requests there were, by method and response code. Plain numbers: whoever exports metrics reads them.

use std::sync::atomic::{AtomicU64, Ordering};

use axum::http::StatusCode;

/// What was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Method {
    /// ADD.
    Add,
    /// DEL.
    Del,
    /// CHECK.
    Check,
    /// GC.
    Gc,
    /// STATUS.
    Status,
    /// A record for the log.
    Log,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Add,
        Self::Del,
        Self::Check,
        Self::Gc,
        Self::Status,
        Self::Log,
    ];

    /// As a metric's label.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Del => "del",
            Self::Check => "check",
            Self::Gc => "gc",
            Self::Status => "status",
            Self::Log => "log",
        }
    }
}

/// The response codes there are; whatever else is answered counts as the last.
const CODES: [StatusCode; 7] = [
    StatusCode::OK,
    StatusCode::BAD_REQUEST,
    StatusCode::PAYLOAD_TOO_LARGE,
    StatusCode::UNPROCESSABLE_ENTITY,
    StatusCode::SERVICE_UNAVAILABLE,
    StatusCode::GATEWAY_TIMEOUT,
    StatusCode::INTERNAL_SERVER_ERROR,
];

/// Requests answered since the agent started.
#[derive(Debug, Default)]
pub struct Counters {
    counts: [[AtomicU64; CODES.len()]; Method::ALL.len()],
    dropped: AtomicU64,
}

impl Counters {
    pub(super) fn count(&self, method: Method, code: StatusCode) {
        let column = CODES.iter().position(|known| *known == code);
        let row = self.counts.get(method as usize);
        let cell = row.and_then(|row| row.get(column.unwrap_or(CODES.len() - 1)));
        if let Some(cell) = cell {
            cell.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn count_dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// Every method and response code, with how often it was.
    pub fn answered(&self) -> impl Iterator<Item = (Method, u16, u64)> + '_ {
        Method::ALL
            .into_iter()
            .zip(&self.counts)
            .flat_map(|(method, row)| {
                CODES.into_iter().zip(row).map(move |(code, count)| {
                    (method, code.as_u16(), count.load(Ordering::Relaxed))
                })
            })
    }

    /// Requests whose plugin went away before the answer.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

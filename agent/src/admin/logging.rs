//! The daemon's log: JSON or text on stderr, its level changed while it runs.
//!
//! Under journald every line begins with its priority, so that `journalctl -p warning` works.

use std::{
    fmt,
    io::{self, IsTerminal as _},
    sync::{Arc, Mutex, PoisonError},
};

use tracing_subscriber::{
    EnvFilter, Layer as _, Registry, fmt as format, layer::SubscriberExt as _, reload,
    util::SubscriberInitExt as _,
};

use crate::config::{LogFormat, LogLevel};

/// Changes the level of a running log.
#[derive(Clone)]
pub struct LogControl {
    level: Arc<Mutex<LogLevel>>,
    reload: Option<reload::Handle<EnvFilter, Registry>>,
}

impl fmt::Debug for LogControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogControl")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

/// Why the log is not as asked.
#[derive(Debug, thiserror::Error)]
#[error("cannot {0}: {1}")]
pub struct LogError(&'static str, String);

fn filter(level: &LogLevel) -> Result<EnvFilter, LogError> {
    EnvFilter::try_new(level.as_str()).map_err(|e| LogError("use this level", e.to_string()))
}

/// Begins the process's log. Once in a process.
pub fn start(level: &LogLevel, log_format: LogFormat) -> Result<LogControl, LogError> {
    let (layer, reload) = reload::Layer::new(filter(level)?);
    let registry = tracing_subscriber::registry().with(layer);
    let journald = std::env::var_os("JOURNAL_STREAM").is_some();
    let lines = format::layer().with_writer(io::stderr);
    let started = match log_format {
        LogFormat::Json => registry
            .with(
                lines
                    .json()
                    .flatten_event(true)
                    .with_current_span(true)
                    .with_span_list(false),
            )
            .try_init(),
        // journald notes the time itself.
        LogFormat::Text if journald => registry
            .with(lines.with_ansi(false).without_time().boxed())
            .try_init(),
        LogFormat::Text => registry
            .with(lines.with_ansi(io::stderr().is_terminal()))
            .try_init(),
    };
    started.map_err(|e| LogError("begin the log", e.to_string()))?;
    Ok(LogControl {
        level: Arc::new(Mutex::new(level.clone())),
        reload: Some(reload),
    })
}

impl LogControl {
    /// For tests: a level that nothing follows.
    #[must_use]
    pub fn detached(level: LogLevel) -> Self {
        Self {
            level: Arc::new(Mutex::new(level)),
            reload: None,
        }
    }

    /// The level in force.
    #[must_use]
    pub fn level(&self) -> String {
        self.level
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_str()
            .to_owned()
    }

    /// Puts another in force.
    pub fn set(&self, level: &LogLevel) -> Result<(), LogError> {
        let mut current = self.level.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reload) = &self.reload {
            reload
                .reload(filter(level)?)
                .map_err(|e| LogError("change the level", e.to_string()))?;
        }
        *current = level.clone();
        Ok(())
    }
}

//! The daemon's log: JSON or text on stderr, its level changed while it runs.
//!
//! Under journald every line begins with its priority, so that `journalctl -p warning` works.

use std::{
    fmt,
    io::{self, IsTerminal as _},
    sync::{Arc, Mutex, PoisonError},
};

use nix::sys::stat::fstat;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    fmt::{
        self as lines, FmtContext, FormatEvent, FormatFields, MakeWriter,
        format::{DefaultFields, Format, JsonFields, Writer},
    },
    layer::SubscriberExt as _,
    registry::LookupSpan,
    reload,
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
    let (filter, reload) = reload::Layer::new(filter(level)?);
    let stderr = Stderr {
        journald: is_journal(std::env::var("JOURNAL_STREAM").ok().as_deref()),
        terminal: io::stderr().is_terminal(),
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(layer(log_format, stderr, io::stderr))
        .try_init()
        .map_err(|e| LogError("begin the log", e.to_string()))?;
    Ok(LogControl {
        level: Arc::new(Mutex::new(level.clone())),
        reload: Some(reload),
    })
}

/// What the log is written to.
#[derive(Clone, Copy, Default)]
struct Stderr {
    journald: bool,
    terminal: bool,
}

fn layer<S, W>(log_format: LogFormat, to: Stderr, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let plain = Format::default().with_ansi(to.terminal).with_target(true);
    let priority = to.journald;
    match log_format {
        LogFormat::Json => {
            let inner = Format::default()
                .json()
                .flatten_event(true)
                .with_span_list(false);
            let fields = JsonFields::new();
            lines::layer()
                .event_format(Prioritised { priority, inner })
                .fmt_fields(fields)
                .with_writer(writer)
                .boxed()
        }
        // journald notes the time itself.
        LogFormat::Text if to.journald => {
            let inner = plain.without_time();
            with_format(Prioritised { priority, inner }, to, writer)
        }
        LogFormat::Text => with_format(
            Prioritised {
                priority,
                inner: plain,
            },
            to,
            writer,
        ),
    }
}

fn with_format<S, F, W>(format: F, to: Stderr, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    F: FormatEvent<S, DefaultFields> + Send + Sync + 'static,
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    lines::layer()
        .event_format(format)
        .with_ansi(to.terminal)
        .with_writer(writer)
        .boxed()
}

/// Is stderr what systemd says it has connected to the journal (`DEVICE:INODE`)?
fn is_journal(stream: Option<&str>) -> bool {
    let Some(stderr) = fstat(io::stderr()).ok() else {
        return false;
    };
    stream == Some(&format!("{}:{}", stderr.st_dev, stderr.st_ino))
}

/// A line with its priority in front, as sd-daemon(3) has it.
struct Prioritised<F> {
    priority: bool,
    inner: F,
}

impl<S, N, F> FormatEvent<S, N> for Prioritised<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if self.priority {
            let priority = match *event.metadata().level() {
                Level::ERROR => "<3>",
                Level::WARN => "<4>",
                Level::INFO => "<6>",
                Level::DEBUG | Level::TRACE => "<7>",
            };
            writer.write_str(priority)?;
        }
        self.inner.format_event(context, writer, event)
    }
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
        drop(current);
        tracing::info!(filter = level.as_str(), "the log has another level");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Value as _;

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'w> MakeWriter<'w> for Paper {
        type Writer = Self;
        fn make_writer(&'w self) -> Self {
            self.clone()
        }
    }

    /// What is logged by `work`, and the control of that log.
    fn logged(log_format: LogFormat, to: Stderr, work: impl FnOnce(&LogControl)) -> String {
        let paper = Paper::default();
        let (filter, reload) = reload::Layer::new(filter(&LogLevel::info()).unwrap());
        let subscriber =
            tracing_subscriber::registry()
                .with(filter)
                .with(layer(log_format, to, paper.clone()));
        let control = LogControl {
            level: Arc::new(Mutex::new(LogLevel::info())),
            reload: Some(reload),
        };
        tracing::subscriber::with_default(subscriber, || work(&control));
        String::from_utf8(paper.0.lock().unwrap().clone()).unwrap()
    }

    fn enrol(_control: &LogControl) {
        let span = tracing::info_span!("enrol", pod = "default/web", uid = "42");
        let _inside = span.enter();
        tracing::warn!(error = "no \"address\"\nyet", "waits");
        tracing::debug!("not shown");
    }

    #[test]
    fn json_is_one_object_a_line_with_the_span_s_fields() {
        let text = logged(LogFormat::Json, Stderr::default(), enrol);
        assert_eq!(text.lines().count(), 1, "{text}");
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["level"], "WARN");
        assert_eq!(line["message"], "waits");
        assert_eq!(line["error"], "no \"address\"\nyet");
        assert_eq!(line["span"]["pod"], "default/web");
    }

    #[test]
    fn under_journald_lines_carry_their_priority_and_no_time() {
        let journald = Stderr {
            journald: true,
            terminal: false,
        };
        let text = logged(LogFormat::Text, journald, enrol);
        assert!(
            text.starts_with("<4> WARN enrol{pod=\"default/web\" uid=\"42\"}"),
            "{text}"
        );
        let text = logged(LogFormat::Json, journald, enrol);
        assert!(text.starts_with("<4>{"), "{text}");
        let text = logged(LogFormat::Text, Stderr::default(), enrol);
        assert!(text.starts_with("20"), "begins with the time: {text}");
        assert!(!text.contains('\u{1b}'), "no colours in a file: {text}");
    }

    #[test]
    fn the_level_changes_while_it_runs() {
        let text = logged(LogFormat::Text, Stderr::default(), |control| {
            tracing::debug!("one");
            control.set(&LogLevel::parse("debug").unwrap()).unwrap();
            tracing::debug!("two");
            control.set(&LogLevel::parse("off").unwrap()).unwrap();
            tracing::error!("three");
            assert_eq!(control.level(), "off");
        });
        assert!(
            !text.contains("one") && text.contains("two") && !text.contains("three"),
            "{text}"
        );
    }

    #[test]
    fn the_journal_is_told_from_a_file() {
        let own = fstat(io::stderr()).unwrap();
        let own = format!("{}:{}", own.st_dev, own.st_ino);
        assert!(is_journal(Some(&own)));
        assert!(!is_journal(Some("1:2")) && !is_journal(None));
    }
}

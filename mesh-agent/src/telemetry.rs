//! Logs, access lines and metrics: set up once, handed out as values.
//!
//! What happens to the agent goes to standard error through `tracing`; what happens to traffic goes to standard
//! output, one JSON line each, and into the metrics. Must not know what is being observed.

pub mod access;
pub mod fields;
pub mod metrics;

mod lines;

use std::{str::FromStr as _, sync::Arc};

use mesh_core::config::{Log, LogFormat};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{layer::SubscriberExt as _, util::SubscriberInitExt as _};

use access::AccessLog;
use metrics::Metrics;

/// Where everything that touches traffic reports. Cheap to clone.
#[derive(Clone)]
pub struct Telemetry {
    pub metrics: Arc<Metrics>,
    pub access: AccessLog,
}

/// Logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("cannot log at level `{level}`: write `error`, `warn`, `info`, `debug` or `trace` as `log.level`")]
    Level { level: String, source: tracing::metadata::ParseLevelFilterError },
    #[error("cannot set up logging: it was set up before in this process")]
    Twice { source: tracing_subscriber::util::TryInitError },
}

/// Sends `tracing` events to standard error. Once per process.
///
/// # Errors
/// The level is not one, or logging was set up before.
pub fn init(log: &Log) -> Result<(), TelemetryError> {
    let level = LevelFilter::from_str(&log.level)
        .map_err(|source| TelemetryError::Level { level: log.level.clone(), source })?;
    let registry = tracing_subscriber::registry().with(level);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match log.format {
        LogFormat::Json => registry.with(lines.json().flatten_event(true).with_current_span(false)).try_init(),
        LogFormat::Text => registry.with(lines.with_ansi(false)).try_init(),
    }
    .map_err(|source| TelemetryError::Twice { source })
}

impl Telemetry {
    /// Access lines to standard output, or nowhere.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn new(log: &Log) -> std::io::Result<Self> {
        let metrics = Arc::new(Metrics::new());
        let access = if log.access {
            AccessLog::to(std::io::stdout(), metrics.access_lines_lost.clone())?
        } else {
            AccessLog::off()
        };
        Ok(Self { metrics, access })
    }
}

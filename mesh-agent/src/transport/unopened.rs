//! Why there is a connection to another agent, but no stream on it; whatever is spoken there.
//!
//! Must not know what is tried next.

use std::{error::Error, time::Duration};

use http::StatusCode;
use mesh_common::refusal::Refusal;

/// A connection, but no stream on it.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unopened {
    #[error("the peer agent rejected our certificate: {}", .0.cause())]
    Rejected(Refusal),
    #[error("the connection was lost, or takes no more streams, before the peer agent answered")]
    Lost(#[source] Box<dyn Error + Send + Sync>),
    #[error("the peer agent reset the stream before it answered")]
    Reset(#[source] Box<dyn Error + Send + Sync>),
    #[error("the peer agent did not answer within {0:?}")]
    NoAnswer(Duration),
    #[error("the peer agent refused with {}", .0.map_or_else(|| "no refusal of ours".to_owned(), |refusal| format!("refusal {} ({})", refusal as u32, refusal.label())))]
    Refused(Option<Refusal>),
    #[error("the peer agent answered {0}")]
    Status(StatusCode),
    #[error("it cannot be asked for")]
    Authority(#[source] http::Error),
}

impl Unopened {
    /// The peer takes no new streams, and has not looked at this one.
    pub(super) fn leaving() -> Self {
        Self::Lost("the peer agent is leaving".into())
    }

    /// Whether the connection is of no more use. An agent answers sooner than we give up, so one that does not may be
    /// on a host that died; the next caller finds out with a new connection instead of waiting as long.
    pub(super) fn is_of_connection(&self) -> bool {
        match self {
            Self::Rejected(_) | Self::Lost(_) | Self::NoAnswer(_) => true,
            Self::Reset(_) | Self::Refused(_) | Self::Status(_) | Self::Authority(_) => false,
        }
    }

    /// Whether another connection may fare better, at no cost but a little time.
    pub(super) fn is_safe_to_retry(&self) -> bool {
        match self {
            Self::Rejected(_) | Self::Lost(_) => true,
            Self::NoAnswer(_) | Self::Reset(_) | Self::Refused(_) | Self::Status(_) | Self::Authority(_) => false,
        }
    }

    /// The number by which this is reported.
    pub(super) fn refusal(&self) -> Refusal {
        match self {
            Self::Rejected(refusal) | Self::Refused(Some(refusal)) => *refusal,
            Self::Status(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => Refusal::Denied,
            Self::Lost(_) => Refusal::ConnectFailed,
            Self::Reset(_) | Self::Refused(None) | Self::Status(_) | Self::Authority(_) => Refusal::TunnelRefused,
            Self::NoAnswer(_) => Refusal::ConnectTimeout,
        }
    }
}

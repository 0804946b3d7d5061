//! How much of what was written to an application's socket the application can have read, once it has ended its
//! direction in order: what its kernel has acknowledged. After a reset that is no answer; what is one then, a hook tells
//! ([`closes`](crate::sys::closes)).
//!
//! A request that is written in the same moment in which an application closes an idle connection is lost to both: the write
//! succeeds, and the next read is the end. Whether it may be sent again depends on which of the two came first. The
//! application is a task of this host, so its kernel is this one, and that does the following (`net/ipv4/tcp.c`,
//! `tcp_input.c`; RFC 9293 §3.10.4, RFC 1122 §4.2.2.13):
//!
//! - A close with octets that were received and not read sends a reset instead of an end (`__tcp_close`). So who sees an
//!   end knows that all that had been received by then was read.
//! - Each segment, the end as well, carries the acknowledgement of all that was received when it left (`__tcp_transmit_skb`), and
//!   acknowledgements are taken in before the end is (`tcp_ack` before `tcp_fin`). So when the end is read here,
//!   whatever the application had read before it is counted; how long it may delay acknowledgements does not matter.
//! - What arrives after a close, or after `shutdown` for reading, is answered by a reset and not acknowledged
//!   (`tcp_rcv_state_process`). A reset changes the count no more.
//! - An application that has shut down for writing alone may still read what arrives. That is acknowledged, up to 200 ms
//!   later (`TCP_DELACK_MAX`).
//!
//! Hence: all acknowledged, and all may have been read; a reset, and only what was acknowledged can have been. With neither, it
//! is awaited, and if nothing comes, everything counts as read. Octets that are acknowledged were perhaps not read; then a
//! request is not sent again that could have been, which is the lesser evil.
//!
//! One case is beyond this: an application that ends its answers, reads a request after that nevertheless, acts on it, and resets
//! the connection before the acknowledgement is due. It has told its client before that nothing more will be answered.
//!
//! Must not know what is spoken.

use std::{
    future::Future as _,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    net::TcpStream,
    time::{Instant, Sleep},
};

use crate::sys::{
    closes::Watched,
    socket::{self, Acknowledged},
};

/// An acknowledgement comes within 200 ms.
const PATIENCE: Duration = Duration::from_millis(300);
/// Nothing tells when it comes.
const LOOK: Duration = Duration::from_millis(1);

/// Finds out, and remembers what it waits for. Waits only where something was under way when the application ended.
#[derive(Default)]
pub(super) struct Settling(Option<Box<Waiting>>);

struct Waiting {
    until: Instant,
    look: Pin<Box<Sleep>>,
}

impl Settling {
    /// How many of the `written` octets the application may have read. It has ended its direction, and that was read.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        stream: &TcpStream,
        watched: Option<&Watched>,
        written: u64,
    ) -> Poll<u64> {
        // A socket that does not say has perhaps brought all.
        while let Ok(Acknowledged { octets, over }) = socket::acknowledged(stream) {
            if over || octets >= written {
                self.0 = None;
                let read = if over { watched.and_then(Watched::taken) } else { None };
                return Poll::Ready(octets.min(written).min(read.unwrap_or(u64::MAX)));
            }
            let now = Instant::now();
            let waiting = self.0.get_or_insert_with(|| {
                Box::new(Waiting { until: now + PATIENCE, look: Box::pin(tokio::time::sleep_until(now + LOOK)) })
            });
            if now >= waiting.until {
                break;
            }
            ready!(waiting.look.as_mut().poll(cx));
            waiting.look.as_mut().reset(now + LOOK);
        }
        self.0 = None;
        Poll::Ready(written)
    }

    /// Whether it waits.
    pub(super) fn is_under_way(&self) -> bool {
        self.0.is_some()
    }
}

#[cfg(test)]
mod tests;

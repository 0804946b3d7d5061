//! `ecs-mesh/1`: many streams on one encrypted connection between two of our own agents.
//!
//! What HBONE's HTTP/2 does for a byte stream, and nothing else, in frames of eight octets and what follows. It is
//! chosen by ALPN; with an agent that does not know it, a ztunnel for one, HBONE is spoken (ADR 13).
//!
//! | Frame | Says |
//! |---|---|
//! | `Open` | the dialling end asks for a stream to an endpoint's registered address |
//! | `Accepted`, `Refused` | the other's answer, with the number of a refusal |
//! | data, `Grant` | octets, and how many more may be sent: 1 MiB at first, and again what was consumed |
//! | `End` | this direction has ended in order, and how much of the other the application has taken |
//! | `Reset` | both have ended at once |
//! | `Ping`, `Pong` | whether the other is there |
//! | `Leave` | no stream after this one was looked at, and none is wanted |
//!
//! [`Opener`] asks for streams and [`Asked`] is one that the peer asks for; either becomes the two [`halves`]. Below them:
//! `state` holds the streams, `inbox` and `outbox` what waits, `drive` moves bytes, `frame` is what is on the wire. Must not
//! know identities, services, or what is carried.

use std::{future::poll_fn, net::SocketAddr, sync::Arc};

use mesh_common::refusal::Refusal;

use super::{tls::SecuredIo, unopened::Unopened};
use frame::Control;
use state::{Answer, Shared};

mod drive;
mod frame;
pub(super) mod halves;
mod inbox;
mod outbox;
pub(super) mod state;

#[cfg(test)]
mod tests;

use drive::Drive;
pub(super) use drive::Ended;
use halves::{Receiving, Sending};

/// Opens streams on a connection, which closes when this is dropped and its last stream has ended.
pub(super) struct Opener(Arc<Shared>);

/// A stream that the peer asks for. Dropped without an answer, it is reset.
pub(super) struct Asked {
    pub(super) target: SocketAddr,
    pub(super) elsewhere: bool,
    receiving: Receiving,
    sending: Sending,
}

/// Begins a connection at the end that has dialled it; it is to be carried by [`Dialed::run`].
pub(super) fn dialing(io: SecuredIo) -> (Opener, Dialed) {
    let shared = Shared::new(true);
    (Opener(shared.clone()), Dialed(Drive::new(shared, io)))
}

/// A connection at the end that has dialled it.
pub(super) struct Dialed(Drive);

impl Dialed {
    /// Carries the connection to its end. `removed` is called when that is known, before its streams fail.
    ///
    /// # Errors
    /// It did not end in order.
    pub(super) async fn run(mut self, removed: impl FnOnce()) -> Result<(), Ended> {
        let mut removed = Some(removed);
        // Nobody asks for a stream who was dialled.
        poll_fn(|cx| {
            self.0.poll(
                cx,
                |_asked| {},
                || {
                    if let Some(removed) = removed.take() {
                        removed()
                    }
                },
            )
        })
        .await
    }
}

/// The same at the other end.
pub(super) fn accepting(io: SecuredIo) -> Accepting {
    let shared = Shared::new(false);
    Accepting { drive: Drive::new(shared.clone(), io), shared }
}

/// A connection at the end that was dialled.
pub(super) struct Accepting {
    shared: Arc<Shared>,
    drive: Drive,
}

impl Accepting {
    /// Carries it to its end.
    ///
    /// # Errors
    /// It did not end in order.
    pub(super) async fn serve(&mut self, mut asked: impl FnMut(Asked)) -> Result<(), Ended> {
        let shared = self.shared.clone();
        poll_fn(|cx| {
            let asked = |stream: state::Asked| {
                let (receiving, sending) = halves::of(&shared, stream.stream);
                asked(Asked { target: stream.target, elsewhere: stream.elsewhere, receiving, sending });
            };
            self.drive.poll(cx, asked, || {})
        })
        .await
    }

    /// Takes no more streams; [`Accepting::serve`] returns when the last one has ended.
    pub(super) fn leave(&self) {
        self.shared.leave();
    }
}

impl Opener {
    /// Asks for a stream and waits for the answer.
    ///
    /// # Errors
    /// It was refused or reset, or the connection takes none or is lost.
    pub(super) async fn open(&self, target: SocketAddr, elsewhere: bool) -> Result<(Receiving, Sending), Unopened> {
        let stream = self.0.open(target, elsewhere)?;
        // Dropped while we wait, they reset it.
        let halves = halves::of(&self.0, stream);
        match poll_fn(|cx| self.0.poll_answer(stream, cx)).await? {
            Answer::Accepted => Ok(halves),
            Answer::Refused(number) => Err(Unopened::Refused(Refusal::from_number(number))),
            Answer::Waiting | Answer::Unseen => Err(Unopened::leaving()),
        }
    }

    /// Whether it takes streams.
    pub(super) fn takes_more(&self) -> bool {
        self.0.takes_more()
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        self.0.unwanted();
    }
}

impl Asked {
    /// Bytes may flow.
    ///
    /// # Errors
    /// `ConnectionReset`: the peer has given up meanwhile.
    pub(super) fn accept(self) -> std::io::Result<(Receiving, Sending)> {
        self.sending.answer(&Control::Accepted)?;
        Ok((self.receiving, self.sending))
    }

    pub(super) fn refuse(self, refusal: Refusal) {
        // Fails only when the peer has given up meanwhile, and then nobody wants the answer.
        drop(self.sending.answer(&Control::refused(refusal)));
    }

    /// Waits until the peer gives up.
    pub(super) async fn given_up(&self) {
        poll_fn(|cx| self.sending.poll_reset(cx)).await;
    }
}

//! The handshake of either side, up to the first record that follows it: the TLS library decides, the bytes are moved
//! here.
//!
//! The library is given one record at a time, so that it never sees what a peer sends right behind its last message: that
//! is for [`Records`] to open.
//!
//! Must not know identities, nor what the connection is for.

use std::io;

use bytes::{Buf as _, BytesMut};
use rustls::{
    CommonState, Error, InvalidMessage,
    client::{ClientConnectionData, UnbufferedClientConnection},
    server::{Acceptor, ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::records::{HEADER, Records, Schedule};

/// Read at once.
const READ: usize = 4 << 10;

/// The most that may wait for the rest of a message: twice what a chain of certificates may take.
const LARGEST: usize = 128 << 10;

/// What both sides of the TLS library have in common, by names of their own.
pub(super) trait Side {
    type Data;
    fn process<'c, 'i>(&'c mut self, received: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn state(&self) -> &CommonState;
    fn into_records(self) -> Result<Records, Error>;
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(&'c mut self, received: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(received)
    }

    fn state(&self) -> &CommonState {
        self
    }

    fn into_records(self) -> Result<Records, Error> {
        let (secrets, kernel) = self.dangerous_into_kernel_connection()?;
        Records::new(secrets, Schedule::Client(kernel))
    }
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(&'c mut self, received: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(received)
    }

    fn state(&self) -> &CommonState {
        self
    }

    fn into_records(self) -> Result<Records, Error> {
        let (secrets, kernel) = self.dangerous_into_kernel_connection()?;
        Records::new(secrets, Schedule::Server(kernel))
    }
}

/// A handshake: bytes in, bytes out.
pub(super) struct Handshake<S> {
    side: S,
    received: BytesMut,
    /// How much of `received` are whole records that the library has been given.
    whole: usize,
    /// How much it has been given in all.
    given: usize,
}

/// How far a handshake has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Progress {
    /// The peer has to say more.
    Waits,
    Done,
}

impl<S: Side> Handshake<S> {
    /// With what has been received already.
    pub(super) fn new(side: S, received: BytesMut) -> Self {
        Self { side, received, whole: 0, given: 0 }
    }

    /// What the handshake has agreed on so far.
    pub(super) fn state(&self) -> &CommonState {
        self.side.state()
    }

    /// Where more of what the peer says is to be appended.
    pub(super) fn received(&mut self) -> &mut BytesMut {
        &mut self.received
    }

    /// Goes as far as what was received leads. What the peer is to be sent is appended to `out`, also when this fails:
    /// then it is an alert.
    pub(super) fn advance(&mut self, out: &mut Vec<u8>) -> Result<Progress, Error> {
        loop {
            match self.step(out)? {
                Step::Again => {}
                Step::Done => return Ok(Progress::Done),
                Step::Waits if self.give_more() => {}
                Step::Waits if self.received.len() >= LARGEST => {
                    return Err(InvalidMessage::HandshakePayloadTooLarge.into());
                }
                Step::Waits => return Ok(Progress::Waits),
            }
        }
    }

    /// The connection, and what has been received behind the handshake.
    ///
    /// # Errors
    /// The handshake is not done.
    pub(super) fn finish(self) -> Result<(Records, BytesMut), Error> {
        Ok((self.side.into_records()?, self.received))
    }

    fn step(&mut self, out: &mut Vec<u8>) -> Result<Step, Error> {
        let given = self.received.get_mut(..self.given).unwrap_or_default();
        let UnbufferedStatus { discard, state } = self.side.process(given);
        let step = match state {
            Ok(ConnectionState::EncodeTlsData(data)) => encode(data, out).map(|()| Step::Again),
            Ok(ConnectionState::TransmitTlsData(sending)) => {
                // It is in `out`, which goes before anything that follows.
                sending.done();
                Ok(Step::Again)
            }
            Ok(ConnectionState::BlockedHandshake) => Ok(Step::Waits),
            Ok(ConnectionState::WriteTraffic(_)) => Ok(Step::Done),
            Ok(state) => Err(Error::General(format!("a handshake does not come to {state:?}"))),
            Err(error) => Err(error),
        };
        self.received.advance(discard);
        self.given -= discard;
        self.whole = self.whole.saturating_sub(discard);
        if step.is_err() {
            self.alert(out);
        }
        step
    }

    /// Takes what the library would tell the peer of an error. It is asked no further: it would meet the same error again.
    fn alert(&mut self, out: &mut Vec<u8>) {
        while self.side.state().wants_write() {
            let given = self.received.get_mut(..self.given).unwrap_or_default();
            let Ok(ConnectionState::EncodeTlsData(data)) = self.side.process(given).state else { return };
            if encode(data, out).is_err() {
                return;
            }
        }
    }

    /// One record more; or, so that the library can say early that this is none, the beginning of one. `false`: it has
    /// everything.
    fn give_more(&mut self) -> bool {
        let before = self.given;
        let rest = self.received.get(self.whole..).unwrap_or_default();
        self.given = match rest {
            [_, _, _, high, low, body @ ..] if body.len() >= length([*high, *low]) => {
                self.whole += HEADER + length([*high, *low]);
                self.whole
            }
            _ => self.received.len(),
        };
        self.given > before
    }
}

enum Step {
    Again,
    Waits,
    Done,
}

fn length(bytes: [u8; 2]) -> usize {
    usize::from(u16::from_be_bytes(bytes))
}

/// Appends what the library wants to send.
fn encode<Data>(mut data: EncodeTlsData<'_, Data>, out: &mut Vec<u8>) -> Result<(), Error> {
    let start = out.len();
    if let Err(EncodeError::InsufficientSize(needed)) = data.encode(&mut []) {
        out.resize(start + needed.required_size, 0);
        let room = out.get_mut(start..).unwrap_or_default();
        data.encode(room).map_err(|error| Error::General(error.to_string()))?;
    }
    Ok(())
}

/// Carries a handshake out over `tcp`.
///
/// # Errors
/// It fails; the peer has been told if it was for us to tell.
pub(super) async fn run<S: Side>(handshake: &mut Handshake<S>, tcp: &mut TcpStream) -> io::Result<()> {
    let mut out = Vec::new();
    loop {
        let progress = handshake.advance(&mut out);
        let sent = tcp.write_all(&out).await;
        out.clear();
        // Our own verdict comes before the peer's not waiting for it.
        match progress.map_err(invalid)? {
            Progress::Done => return sent,
            Progress::Waits => sent?,
        }
        read_more(tcp, handshake.received()).await?;
    }
}

/// Reads until the peer's first message is whole, which stays in `received`. Returns the server name that it asks for
/// (RFC 8446, section 4.1.2).
///
/// # Errors
/// The connection fails, or it is not what a TLS client says: then the peer has been told.
pub(super) async fn hello(tcp: &mut TcpStream, received: &mut BytesMut) -> io::Result<Option<String>> {
    let mut acceptor = Acceptor::default();
    let mut taken = 0;
    loop {
        while let Some(mut rest) = received.get(taken..).filter(|rest| !rest.is_empty()) {
            taken += acceptor.read_tls(&mut rest)?;
            match acceptor.accept() {
                Ok(Some(accepted)) => return Ok(accepted.client_hello().server_name().map(str::to_owned)),
                Ok(None) => {}
                Err((error, mut alert)) => {
                    let mut out = Vec::new();
                    alert.write_all(&mut out)?;
                    // That the peer does not take it changes nothing.
                    drop(tcp.write_all(&out).await);
                    return Err(invalid(error));
                }
            }
        }
        read_more(tcp, received).await?;
    }
}

async fn read_more(tcp: &mut TcpStream, received: &mut BytesMut) -> io::Result<()> {
    received.reserve(READ);
    match tcp.read_buf(received).await? {
        0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer has left in the TLS handshake")),
        _ => Ok(()),
    }
}

fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

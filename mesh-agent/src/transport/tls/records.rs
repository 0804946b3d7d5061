//! The protection of records on one established TLS 1.3 connection (RFC 8446, sections 5, 4.6 and 6): ciphertext is
//! opened where it lies, plaintext is sealed into records that wait to be sent.
//!
//! The TLS library keeps the key schedule and has the ciphers; which key, which sequence number, and what may stand in a
//! record at all is decided here. What is wrong ends the connection: the peer is told by an alert, and nothing more is
//! opened or sealed.
//!
//! Pure. Must not know sockets or tasks, who the peer is, nor what is sent.

use std::{collections::VecDeque, fmt, io::IoSlice, ops::Range};

use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets, HandshakeType, InvalidMessage,
    PeerMisbehaved, ProtocolVersion, Tls13CipherSuite,
    client::ClientConnectionData,
    crypto::cipher::{
        AeadKey, InboundOpaqueMessage, Iv, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
    },
    kernel::KernelConnection,
    server::ServerConnectionData,
};

/// Content type, version and length (RFC 8446, section 5.2).
pub(super) const HEADER: usize = 5;

/// The most plaintext that a record may hold (RFC 8446, section 5.1).
const FULL: usize = 1 << 14;

/// The most that may follow a record's header (RFC 8446, section 5.2).
const LONGEST: usize = FULL + 256;

/// What a full record is on the wire: without padding, with its inner content type and the ciphers' tag.
pub(super) const FULL_RECORD: usize = HEADER + FULL + 1 + 16;

/// The most plaintext that is taken at once.
const LARGEST_WRITE: usize = 4 * FULL;

// The limits of the TLS library, against peers that keep us busy without sending anything.
const EMPTY_RECORDS: u8 = 32;
const KEY_UPDATES: u8 = 32;
const CANCELLATIONS: u8 = 4;

/// The longest session ticket message that is skipped: what its fields can hold (RFC 8446, section 4.6.1), rounded up.
const LONGEST_TICKET: usize = 0x3_0000;

/// `update_not_requested` and `update_requested` (RFC 8446, section 4.6.3).
const NOT_REQUESTED: u8 = 0;
const REQUESTED: u8 = 1;

/// Where the next keys come from: the TLS library's key schedule, which knows which side we are.
pub(super) enum Schedule {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Schedule {
    fn suite(&self) -> Result<&'static Tls13CipherSuite, Error> {
        let suite = match self {
            Self::Client(kernel) => kernel.negotiated_cipher_suite(),
            Self::Server(kernel) => kernel.negotiated_cipher_suite(),
        };
        suite.tls13().ok_or_else(|| Error::General("not a cipher suite of TLS 1.3".into()))
    }

    fn next_to_seal(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Self::Client(kernel) => kernel.update_tx_secret(),
            Self::Server(kernel) => kernel.update_tx_secret(),
        }
    }

    fn next_to_open(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Self::Client(kernel) => kernel.update_rx_secret(),
            Self::Server(kernel) => kernel.update_rx_secret(),
        }
    }
}

/// Both directions of a connection.
pub(super) struct Records {
    suite: &'static Tls13CipherSuite,
    schedule: Schedule,
    opening: Opening,
    sealing: Sealing,
    outgoing: Outgoing,
    /// What ended the connection.
    failed: Option<Error>,
}

struct Opening {
    decrypter: Box<dyn MessageDecrypter>,
    sequence: u64,
    /// Records without content since the last one with data.
    empty: u8,
    /// Key updates since then.
    key_updates: u8,
    cancellations: u8,
    /// How much of a session ticket that spans records is still to come.
    ticket: usize,
    closed: bool,
}

struct Sealing {
    encrypter: Box<dyn MessageEncrypter>,
    sequence: u64,
    /// With how many records the key is used up (RFC 8446, section 5.5).
    limit: u64,
    /// A key update of the peer was answered since we last sent data: one answer is enough.
    answered: bool,
    /// Our last word is said: `close_notify` or a fatal alert.
    ended: bool,
}

/// What was found at the front of what was received.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Opened {
    /// Not yet a whole record.
    Partial,
    /// A record of `record` bytes; its plaintext, never empty, is now in this part of them.
    Plain { record: usize, plain: Range<usize> },
    /// A record of `record` bytes with nothing in it for the reader.
    Control { record: usize },
    /// The peer has said that it sends no more. Whatever follows is to be ignored (RFC 8446, section 6.1).
    Closed,
}

/// Why a connection must end, and what the peer is told.
struct Fatal {
    alert: Option<AlertDescription>,
    error: Error,
}

impl Fatal {
    fn told(alert: AlertDescription, error: impl Into<Error>) -> Self {
        Self { alert: Some(alert), error: error.into() }
    }

    fn unexpected(error: impl Into<Error>) -> Self {
        Self::told(AlertDescription::UnexpectedMessage, error)
    }

    fn unreadable(error: InvalidMessage) -> Self {
        Self::told(AlertDescription::DecodeError, error)
    }
}

/// Our own side fails, such as a cipher.
impl From<Error> for Fatal {
    fn from(error: Error) -> Self {
        Self::told(AlertDescription::InternalError, error)
    }
}

impl Records {
    /// Goes on where a handshake has ended, with its secrets.
    ///
    /// # Errors
    /// The handshake has not agreed on TLS 1.3.
    pub(super) fn new(secrets: ExtractedSecrets, schedule: Schedule) -> Result<Self, Error> {
        let suite = schedule.suite()?;
        let opening = Opening {
            decrypter: decrypter(suite, secrets.rx.1)?,
            sequence: secrets.rx.0,
            empty: 0,
            key_updates: 0,
            cancellations: 0,
            ticket: 0,
            closed: false,
        };
        let sealing = Sealing {
            encrypter: encrypter(suite, secrets.tx.1)?,
            sequence: secrets.tx.0,
            limit: suite.common.confidentiality_limit,
            answered: false,
            ended: false,
        };
        Ok(Self { suite, schedule, opening, sealing, outgoing: Outgoing::default(), failed: None })
    }

    /// Opens the first record of `received` in place (RFC 8446, section 5.2).
    ///
    /// # Errors
    /// The peer has sent what it must not, or an alert; the same again from then on. [`Records::outgoing`] may hold an
    /// alert for the peer.
    pub(super) fn open(&mut self, received: &mut [u8]) -> Result<Opened, Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if self.opening.closed {
            return Ok(Opened::Closed);
        }
        self.open_first(received).map_err(|fatal| self.fail(fatal))
    }

    /// Seals as much as is taken at once into full records and at most one that is not, to be sent from
    /// [`Records::outgoing`]; says how much that was.
    ///
    /// # Errors
    /// The connection has failed or was closed, or fails now; it is broken for good.
    pub(super) fn seal(&mut self, chunks: &[&[u8]]) -> Result<usize, Error> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        if self.sealing.ended {
            return Err(Error::EncryptError);
        }
        let (mut rest, _) = OutboundChunks::new(chunks).split_at(LARGEST_WRITE);
        let taken = rest.len();
        while !rest.is_empty() {
            let (payload, later) = rest.split_at(FULL);
            self.seal_data(payload).map_err(|fatal| self.fail(fatal))?;
            rest = later;
        }
        Ok(taken)
    }

    /// Says that nothing more will be sent (`close_notify`, RFC 8446, section 6.1). Only the first call does, and none
    /// after a failure.
    pub(super) fn close(&mut self) {
        if self.failed.is_none() {
            self.last_word(AlertDescription::CloseNotify);
        }
    }

    /// What is to be sent.
    pub(super) fn outgoing(&mut self) -> &mut Outgoing {
        &mut self.outgoing
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "the library adds variants in minor releases")]
    fn open_first(&mut self, received: &mut [u8]) -> Result<Opened, Fatal> {
        let Some((&mut [kind, major, _, high, low], rest)) = received.split_first_chunk_mut::<HEADER>() else {
            return Ok(Opened::Partial);
        };
        let outer = ContentType::from(kind);
        if outer == ContentType::ChangeCipherSpec {
            // Part of the handshake only (RFC 8446, section 5).
            return Err(Fatal::unexpected(PeerMisbehaved::IllegalMiddleboxChangeCipherSpec));
        }
        if matches!(outer, ContentType::Unknown(_)) {
            return Err(Fatal::unreadable(InvalidMessage::InvalidContentType));
        }
        if outer != ContentType::ApplicationData {
            return Err(Fatal::unexpected(inappropriate(outer)));
        }
        if major != 3 {
            return Err(Fatal::unreadable(InvalidMessage::UnknownProtocolVersion));
        }
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length > LONGEST {
            return Err(Fatal::told(AlertDescription::RecordOverflow, Error::PeerSentOversizedRecord));
        }
        let Some(ciphertext) = rest.get_mut(..length) else { return Ok(Opened::Partial) };
        let record = HEADER + length;

        let sequence = self.opening.sequence;
        let message = InboundOpaqueMessage::new(ContentType::ApplicationData, ProtocolVersion::TLSv1_2, ciphertext);
        let plain = self.opening.decrypter.decrypt(message, sequence).map_err(undecryptable)?;
        // Never wraps (RFC 8446, section 5.3).
        self.opening.sequence = sequence.checked_add(1).ok_or(Error::DecryptError)?;

        if self.opening.ticket > 0 && plain.typ != ContentType::Handshake {
            return Err(Fatal::unexpected(PeerMisbehaved::MessageInterleavedWithHandshakeMessage));
        }
        match plain.typ {
            ContentType::ApplicationData if plain.payload.is_empty() => {
                one_less(&mut self.opening.empty, EMPTY_RECORDS, PeerMisbehaved::TooManyEmptyFragments)?;
                Ok(Opened::Control { record })
            }
            ContentType::ApplicationData => {
                (self.opening.empty, self.opening.key_updates) = (0, 0);
                // TLS 1.3 has no explicit nonce: the content lies where its ciphertext lay.
                Ok(Opened::Plain { record, plain: HEADER..HEADER + plain.payload.len() })
            }
            ContentType::Alert => {
                let closed = self.alert(plain.payload)?;
                Ok(if closed { Opened::Closed } else { Opened::Control { record } })
            }
            ContentType::Handshake => {
                self.handshake(plain.payload)?;
                Ok(Opened::Control { record })
            }
            other => Err(Fatal::unexpected(inappropriate(other))),
        }
    }

    /// Whether it closes the stream (RFC 8446, section 6). Which level an alert claims to have says nothing.
    #[expect(clippy::wildcard_enum_match_arm, reason = "the library adds variants in minor releases")]
    fn alert(&mut self, payload: &[u8]) -> Result<bool, Fatal> {
        let &[_level, description] = payload else {
            return Err(Fatal::unreadable(InvalidMessage::MissingData("AlertMessagePayload")));
        };
        match AlertDescription::from(description) {
            AlertDescription::CloseNotify => {
                self.opening.closed = true;
                Ok(true)
            }
            AlertDescription::UserCanceled => {
                let count = &mut self.opening.cancellations;
                one_less(count, CANCELLATIONS, PeerMisbehaved::TooManyWarningAlertsReceived)?;
                Ok(false)
            }
            other => Err(Fatal { alert: None, error: Error::AlertReceived(other) }),
        }
    }

    /// What a peer may still say of the handshake's kind (RFC 8446, section 4.6): key updates, and a server session
    /// tickets, for which we have no use.
    fn handshake(&mut self, payload: &[u8]) -> Result<(), Fatal> {
        if payload.is_empty() {
            return Err(Fatal::unexpected(InvalidMessage::InvalidEmptyPayload));
        }
        let mut rest = self.skip_ticket(payload);
        while !rest.is_empty() {
            // A message's head that is split is refused: nobody who sends so short messages has a reason to.
            let Some((&[kind, a, b, c], body)) = rest.split_first_chunk::<4>() else {
                return Err(Fatal::unreadable(InvalidMessage::MessageTooShort));
            };
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            match (HandshakeType::from(kind), &self.schedule) {
                (HandshakeType::KeyUpdate, _) => {
                    return match *body {
                        [request] if length == 1 => self.key_update(request),
                        // The message before other keys is the last of its record (RFC 8446, section 5.1).
                        [_, _, ..] if length == 1 => {
                            Err(Fatal::unexpected(PeerMisbehaved::KeyEpochWithPendingFragment))
                        }
                        _ => Err(Fatal::unreadable(InvalidMessage::InvalidKeyUpdate)),
                    };
                }
                (HandshakeType::NewSessionTicket, Schedule::Client(_)) if length <= LONGEST_TICKET => {
                    self.opening.ticket = length;
                    rest = self.skip_ticket(body);
                }
                (HandshakeType::NewSessionTicket, Schedule::Client(_)) => {
                    return Err(Fatal::unreadable(InvalidMessage::HandshakePayloadTooLarge));
                }
                (got_type, _) => {
                    let expect_types = vec![HandshakeType::KeyUpdate];
                    return Err(Fatal::unexpected(Error::InappropriateHandshakeMessage { expect_types, got_type }));
                }
            }
        }
        Ok(())
    }

    /// What of `payload` is behind the ticket.
    fn skip_ticket<'a>(&mut self, payload: &'a [u8]) -> &'a [u8] {
        let skipped = self.opening.ticket.min(payload.len());
        self.opening.ticket -= skipped;
        payload.get(skipped..).unwrap_or_default()
    }

    /// The peer seals with its next keys from here on, and may want us to do the same (RFC 8446, section 4.6.3).
    fn key_update(&mut self, request: u8) -> Result<(), Fatal> {
        one_less(&mut self.opening.key_updates, KEY_UPDATES, PeerMisbehaved::TooManyKeyUpdateRequests)?;
        match request {
            NOT_REQUESTED => {}
            REQUESTED if self.sealing.answered || self.sealing.ended => {}
            REQUESTED => {
                self.update_keys(NOT_REQUESTED)?;
                self.sealing.answered = true;
            }
            _ => return Err(Fatal::told(AlertDescription::IllegalParameter, InvalidMessage::InvalidKeyUpdate)),
        }
        let (sequence, secrets) = self.schedule.next_to_open()?;
        self.opening.decrypter = decrypter(self.suite, secrets)?;
        self.opening.sequence = sequence;
        Ok(())
    }

    /// Seals with the next keys from here on.
    fn update_keys(&mut self, request: u8) -> Result<(), Fatal> {
        let message = [HandshakeType::KeyUpdate.into(), 0, 0, 1, request];
        self.seal_record(ContentType::Handshake, OutboundChunks::Single(&message))?;
        let (sequence, secrets) = self.schedule.next_to_seal()?;
        self.sealing.encrypter = encrypter(self.suite, secrets)?;
        self.sealing.sequence = sequence;
        Ok(())
    }

    fn seal_data(&mut self, payload: OutboundChunks<'_>) -> Result<(), Fatal> {
        // The update itself is the last record that a key may seal.
        if self.sealing.sequence > 0 && self.sealing.sequence.saturating_add(1) >= self.sealing.limit {
            self.update_keys(REQUESTED)?;
        }
        self.sealing.answered = false;
        self.seal_record(ContentType::ApplicationData, payload)
    }

    fn seal_record(&mut self, typ: ContentType, payload: OutboundChunks<'_>) -> Result<(), Fatal> {
        let sequence = self.sealing.sequence;
        let message = OutboundPlainMessage { typ, version: ProtocolVersion::TLSv1_2, payload };
        // A number that was used is never used again, whatever comes of it (RFC 8446, section 5.3).
        self.sealing.sequence = sequence.checked_add(1).ok_or(Error::EncryptError)?;
        self.outgoing.push(self.sealing.encrypter.encrypt(message, sequence)?.encode());
        Ok(())
    }

    fn fail(&mut self, fatal: Fatal) -> Error {
        if let Some(alert) = fatal.alert {
            self.last_word(alert);
        }
        // Also when the peer has told us: it wants no more.
        self.sealing.ended = true;
        self.failed = Some(fatal.error.clone());
        fatal.error
    }

    fn last_word(&mut self, alert: AlertDescription) {
        if self.sealing.ended {
            return;
        }
        self.sealing.ended = true;
        let level = if alert == AlertDescription::CloseNotify { 1 } else { 2 };
        let message = [level, alert.into()];
        if let Err(fatal) = self.seal_record(ContentType::Alert, OutboundChunks::Single(&message)) {
            // Then there is nothing to be said any more.
            self.failed.get_or_insert(fatal.error);
        }
    }
}

impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Nothing of keys and contents.
        f.debug_struct("Records")
            .field("suite", &self.suite.common.suite)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

fn encrypter(
    suite: &'static Tls13CipherSuite,
    secrets: ConnectionTrafficSecrets,
) -> Result<Box<dyn MessageEncrypter>, Error> {
    let (key, iv) = key_and_iv(secrets)?;
    Ok(suite.aead_alg.encrypter(key, iv))
}

fn decrypter(
    suite: &'static Tls13CipherSuite,
    secrets: ConnectionTrafficSecrets,
) -> Result<Box<dyn MessageDecrypter>, Error> {
    let (key, iv) = key_and_iv(secrets)?;
    Ok(suite.aead_alg.decrypter(key, iv))
}

fn key_and_iv(secrets: ConnectionTrafficSecrets) -> Result<(AeadKey, Iv), Error> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err(Error::General("the secrets are of a cipher that is not known here".into())),
    }
}

fn inappropriate(got_type: ContentType) -> Error {
    Error::InappropriateMessage { expect_types: vec![ContentType::ApplicationData], got_type }
}

/// What the cipher says of a record, and what the peer is told (RFC 8446, sections 5.2 and 5.4).
#[expect(clippy::wildcard_enum_match_arm, reason = "the library adds variants in minor releases")]
fn undecryptable(error: Error) -> Fatal {
    let alert = match &error {
        Error::DecryptError => AlertDescription::BadRecordMac,
        Error::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
        Error::PeerMisbehaved(_) => AlertDescription::UnexpectedMessage,
        _ => AlertDescription::InternalError,
    };
    Fatal::told(alert, error)
}

/// Counts what a peer may do `limit` times.
fn one_less(count: &mut u8, limit: u8, otherwise: PeerMisbehaved) -> Result<(), Fatal> {
    if *count >= limit {
        return Err(Fatal::unexpected(otherwise));
    }
    *count += 1;
    Ok(())
}

/// Sealed records that wait to be sent, in order.
#[derive(Default)]
pub(super) struct Outgoing {
    records: VecDeque<Vec<u8>>,
    /// How much of the first one has gone.
    sent: usize,
}

impl Outgoing {
    pub(super) fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// The beginning of what is to be sent, and how many of `slices` it fills.
    pub(super) fn front<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut skip = self.sent;
        let mut count = 0;
        for (slice, record) in slices.iter_mut().zip(&self.records) {
            *slice = IoSlice::new(record.get(skip..).unwrap_or_default());
            skip = 0;
            count += 1;
        }
        count
    }

    /// So much of it has gone.
    pub(super) fn advance(&mut self, mut gone: usize) {
        while let Some(first) = self.records.front() {
            let left = first.len().saturating_sub(self.sent);
            if gone < left {
                self.sent += gone;
                return;
            }
            gone -= left;
            self.sent = 0;
            self.records.pop_front();
        }
    }

    fn push(&mut self, record: Vec<u8>) {
        self.records.push_back(record);
    }
}

#[cfg(test)]
mod tests;

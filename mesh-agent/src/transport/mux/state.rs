//! The streams of one connection: what each may send, what has come for it, who waits. No socket, no clock.
//!
//! ```text
//! each direction:  open ──End──► ended
//! a stream:        open ──Reset, from either end──► reset, in both directions; what had come before it is still read
//!                  open ──connection lost──► reset
//! forgotten when both its halves are dropped and what it had sent is on its way; one that was not ended in both directions
//! by then is reset, behind what had been sent if that had been ended
//! ```
//!
//! A frame for a stream that was forgotten is ignored: the other end did not know yet. Must not know what is carried, nor how
//! frames get to the other end.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use mesh_common::refusal::Refusal;

use super::{
    frame::{Control, LARGEST, Malformed},
    inbox::Inbox,
    outbox::{Batch, Outbox, SMALL},
};
use crate::transport::{
    tunnel::{Payload, UNTOLD},
    unopened::Unopened,
};

/// What one stream may have in flight: enough for 8 Gbit/s at 1 ms round trip. There is no bound for all together, so that
/// nobody who does not read stops others; it bounds the memory of a connection whose readers have all stalled.
const WINDOW: u32 = 1 << 20;
/// Granted again when so much has been consumed.
const GRANT_AT: u32 = WINDOW / 2;
/// What one stream may have waiting to be sent.
const QUEUED: usize = 4 * LARGEST;
/// Small frames that wait to be sent: who has more waits.
const CROWDED: usize = 64 << 10;
/// The same with what answers the peer's frames. One that makes more and does not read it means harm.
const FLOODED: usize = 1 << 20;
/// Streams that a peer may have open. Ours open a hundred.
const ACCEPTED: usize = 1000;
/// The same with those that it has reset and that are still held here: who opens and resets faster than its resets are seen to
/// gets no more (the attack of CVE-2023-44487 on HTTP/2).
const HELD: usize = 2 * ACCEPTED;

/// A connection's streams. The halves of each, and whoever moves the connection's bytes, share it.
pub(super) struct Shared(Mutex<State>);

struct State {
    dialing: bool,
    streams: HashMap<u32, Stream, BuildHasherDefault<Same>>,
    /// The stream that was opened last. Numbers follow each other, so nobody can choose them.
    last: u32,
    outbox: Outbox,
    /// Streams that wait until the small frames have left.
    crowded: Vec<u32>,
    /// Who moves bytes, and whether it knows that there is something to do.
    driver: Option<Waker>,
    woken: bool,
    /// No new streams: the peer wants none, or we take none.
    leaving: bool,
    /// Dialling: nobody is left who would open one.
    unwanted: bool,
    over: Option<Lost>,
}

/// Why a connection is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}")]
pub(super) struct Lost {
    /// What it stands for, where TLS says.
    pub(super) refusal: Option<Refusal>,
    pub(super) what: String,
}

#[derive(Default)]
struct Stream {
    inbox: Inbox,
    /// What the peer may still send, and what was consumed of it and not granted again.
    window: u32,
    owed: u32,
    theirs_ended: bool,
    /// What the peer has said about how much was taken, and who wants to know.
    told: Option<u64>,
    taken: Option<Arc<AtomicU64>>,
    /// What we may still send.
    credit: u32,
    /// Octets and frames in the outbox's queue of the large: as long as there are any, whatever follows goes there too.
    queued: usize,
    frames: usize,
    /// It waits until the small frames have left.
    crowded: bool,
    ours_ended: bool,
    /// Both directions at once, by either end. The peer may have ended its own in order before that.
    reset: bool,
    answer: Answer,
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// Handles that are still there, and whether the receiving one is not.
    halves: u8,
    deaf: bool,
}

/// What a stream that was asked for has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Answer {
    #[default]
    Waiting,
    Accepted,
    /// By its number, 0 if none of ours was the reason.
    Refused(u32),
    /// Nobody has looked at it.
    Unseen,
}

/// A stream that the peer asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) stream: u32,
    pub(super) target: SocketAddr,
    pub(super) elsewhere: bool,
}

/// Stream numbers follow each other and need no hashing.
#[derive(Default)]
struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0 << 8 | u64::from(*byte);
        }
    }

    fn write_u32(&mut self, number: u32) {
        // The table takes its place from the low bits and tells entries apart by the high ones.
        self.0 = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

fn unopened(lost: &Lost) -> Unopened {
    // TLS 1.3 lets us send before the peer has seen our certificate, so its verdict may be what comes instead of an answer.
    lost.refusal.map_or_else(|| Unopened::Lost(lost.clone().into()), Unopened::Rejected)
}

fn reset() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

fn wait(place: &mut Option<Waker>, cx: &Context<'_>) {
    match place {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *place = Some(cx.waker().clone()),
    }
}

fn wake(place: &mut Option<Waker>) {
    if let Some(waker) = place.take() {
        waker.wake();
    }
}

impl Stream {
    fn new() -> Self {
        Self { window: WINDOW, credit: WINDOW, halves: 2, ..Self::default() }
    }

    /// The peer has said the end of its direction, or of both.
    fn end(&mut self, reset: bool, taken: Option<u64>) {
        if !self.theirs_ended {
            self.told = taken;
            if let Some(wanted) = &self.taken {
                wanted.store(taken.unwrap_or(UNTOLD), Ordering::Relaxed);
            }
        }
        self.reset |= reset;
        self.theirs_ended |= !reset;
        wake(&mut self.reader);
        if reset {
            wake(&mut self.writer);
        }
    }
}

impl State {
    /// Whoever moves bytes has something to do.
    fn kick(&mut self) {
        if !self.woken
            && let Some(driver) = &self.driver
        {
            self.woken = true;
            driver.wake_by_ref();
        }
    }

    fn control(&mut self, stream: u32, control: &Control) {
        self.outbox.control(stream, control);
        self.kick();
    }

    fn reset(&mut self, number: u32, taken: Option<u64>) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        if stream.reset {
            return;
        }
        stream.reset = true;
        wake(&mut stream.reader);
        wake(&mut stream.writer);
        let reset = Control::Reset { taken };
        if stream.frames > 0 && (stream.ours_ended || taken.is_some()) {
            // What had been sent in order is not taken back, nor is its end.
            stream.frames += 1;
            self.outbox.control_after(number, &reset);
        } else {
            (stream.queued, stream.frames) = (0, 0);
            self.outbox.forget(number);
            self.outbox.control(number, &reset);
        }
        self.kick();
    }

    fn drop_half(&mut self, number: u32) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        stream.halves -= 1;
        if stream.halves == 0 {
            if !(stream.ours_ended && stream.theirs_ended) {
                self.reset(number, None);
            }
            self.forget(number);
        }
    }

    /// Forgets a stream that nobody holds, once the last that it had to say is on its way: until then it counts.
    fn forget(&mut self, number: u32) {
        if self.streams.get(&number).is_some_and(|stream| stream.halves == 0 && stream.frames == 0) {
            self.streams.remove(&number);
            if self.is_done() {
                self.kick();
            }
        }
    }

    /// Nothing is left to be done but to close.
    fn is_done(&self) -> bool {
        self.streams.is_empty() && (self.leaving || self.unwanted)
    }
}

impl Shared {
    pub(super) fn new(dialing: bool) -> Arc<Self> {
        Arc::new(Self(Mutex::new(State {
            dialing,
            streams: HashMap::default(),
            last: 0,
            outbox: Outbox::default(),
            crowded: Vec::new(),
            driver: None,
            woken: false,
            leaving: false,
            unwanted: false,
            over: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is locked, and every state in between is a valid one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // For who uses streams.

    /// Asks for a stream, whose two halves are the caller's to drop.
    pub(super) fn open(&self, target: SocketAddr, elsewhere: bool) -> Result<u32, Unopened> {
        let mut state = self.lock();
        if let Some(lost) = &state.over {
            return Err(unopened(lost));
        }
        // Numbers are never used twice: a connection that has had them all is replaced.
        let Some(number) = state.last.checked_add(1).filter(|_| !state.leaving) else {
            return Err(Unopened::leaving());
        };
        state.last = number;
        state.streams.insert(number, Stream::new());
        state.control(number, &Control::Open { target, elsewhere });
        Ok(number)
    }

    /// Waits for the answer to [`Shared::open`].
    pub(super) fn poll_answer(&self, number: u32, cx: &Context<'_>) -> Poll<Result<Answer, Unopened>> {
        let mut state = self.lock();
        let State { streams, over, .. } = &mut *state;
        let Some(stream) = streams.get_mut(&number) else { return Poll::Ready(Err(Unopened::Reset(reset().into()))) };
        match (stream.answer, over) {
            (Answer::Waiting, Some(lost)) => Poll::Ready(Err(unopened(lost))),
            (Answer::Waiting, None) if stream.reset => Poll::Ready(Err(Unopened::Reset(reset().into()))),
            (Answer::Waiting, None) => {
                wait(&mut stream.reader, cx);
                Poll::Pending
            }
            (answer, _) => Poll::Ready(Ok(answer)),
        }
    }

    /// Answers [`Asked`]. An error means that the peer has given up.
    pub(super) fn answer(&self, number: u32, answer: &Control) -> io::Result<()> {
        let mut state = self.lock();
        let over = state.over.is_some();
        let Some(stream) = state.streams.get_mut(&number).filter(|stream| !over && !stream.reset) else {
            return Err(reset());
        };
        if matches!(answer, Control::Refused { .. }) {
            // The peer forgets it then.
            (stream.ours_ended, stream.theirs_ended) = (true, true);
        }
        state.control(number, answer);
        Ok(())
    }

    /// What comes next; `None` at the end. See [`Shared::consumed`].
    pub(super) fn poll_data(&self, number: u32, cx: &Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        let mut state = self.lock();
        let over = state.over.is_some();
        let Some(stream) = state.streams.get_mut(&number) else { return Poll::Ready(Err(reset())) };
        if let Some(piece) = stream.inbox.next() {
            return Poll::Ready(Ok(Some(piece)));
        }
        if stream.theirs_ended {
            Poll::Ready(Ok(None))
        } else if over || stream.reset {
            Poll::Ready(Err(reset()))
        } else {
            wait(&mut stream.reader, cx);
            Poll::Pending
        }
    }

    /// What has come behind that already, without waiting and without a look at how it ends.
    pub(super) fn more_data(&self, number: u32) -> Option<Bytes> {
        self.lock().streams.get_mut(&number)?.inbox.next()
    }

    /// So much of what was handed over has gone on its way: the peer may send as much again.
    pub(super) fn consumed(&self, number: u32, octets: usize) {
        let mut state = self.lock();
        let Some(stream) = state.streams.get_mut(&number) else { return };
        // Never more than the window, which is a u32.
        stream.owed += u32::try_from(octets).unwrap_or_default();
        if stream.owed >= GRANT_AT && !stream.theirs_ended && !stream.reset {
            let octets = std::mem::take(&mut stream.owed);
            stream.window += octets;
            state.control(number, &Control::Grant { octets });
        }
    }

    /// Sends as much of `payload` as there is room for, at once.
    pub(super) fn poll_send(&self, number: u32, cx: &Context<'_>, payload: Payload<'_>) -> Poll<io::Result<usize>> {
        let mut state = self.lock();
        let state = &mut *state;
        let Some(stream) = state.streams.get_mut(&number) else { return Poll::Ready(Err(reset())) };
        if stream.ours_ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if stream.reset || state.over.is_some() {
            return Poll::Ready(Err(reset()));
        }
        let wanted = payload.len();
        if wanted == 0 {
            return Poll::Ready(Ok(0));
        }
        let crowded = stream.frames == 0 && state.outbox.waiting() >= CROWDED;
        let room = wanted.min(stream.credit as usize).min(QUEUED.saturating_sub(stream.queued));
        if crowded || room == 0 {
            wait(&mut stream.writer, cx);
            if crowded && !std::mem::replace(&mut stream.crowded, true) {
                state.crowded.push(number);
            }
            return Poll::Pending;
        }
        // No more than the credit, which is a u32.
        stream.credit -= u32::try_from(room).unwrap_or_default();
        if room <= SMALL && stream.frames == 0 {
            match payload {
                Payload::Whole(data) => state.outbox.small(number, &data.split_to(room)),
                Payload::Copied(data) => state.outbox.small(number, data.get(..room).unwrap_or_default()),
            }
        } else {
            stream.queued += room;
            stream.frames += state.outbox.large(number, payload.take(room));
        }
        state.kick();
        Poll::Ready(Ok(room))
    }

    /// Ends our direction in order.
    pub(super) fn end(&self, number: u32, taken: Option<u64>) -> io::Result<()> {
        let mut state = self.lock();
        let state = &mut *state;
        let Some(stream) = state.streams.get_mut(&number) else { return Err(reset()) };
        if stream.ours_ended {
            return Ok(());
        }
        if stream.reset || state.over.is_some() {
            return Err(reset());
        }
        stream.ours_ended = true;
        let end = Control::End { taken };
        if stream.frames == 0 {
            state.outbox.control(number, &end);
        } else {
            stream.frames += 1;
            state.outbox.control_after(number, &end);
        }
        state.kick();
        Ok(())
    }

    /// Ends both directions at once.
    pub(super) fn reset(&self, number: u32, taken: Option<u64>) {
        self.lock().reset(number, taken);
    }

    /// Waits until the peer has reset the stream, or the connection is lost.
    pub(super) fn poll_reset(&self, number: u32, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.lock();
        let over = state.over.is_some();
        match state.streams.get_mut(&number) {
            Some(stream) if !over && !stream.reset => {
                wait(&mut stream.writer, cx);
                Poll::Pending
            }
            Some(_) | None => Poll::Ready(()),
        }
    }

    /// Where to look for what the peer says about how much of ours was taken; [`UNTOLD`] until then.
    pub(super) fn taken(&self, number: u32) -> Arc<AtomicU64> {
        let mut state = self.lock();
        let Some(stream) = state.streams.get_mut(&number) else { return Arc::new(AtomicU64::new(UNTOLD)) };
        let told = stream.told.unwrap_or(UNTOLD);
        stream.taken.get_or_insert_with(|| Arc::new(AtomicU64::new(told))).clone()
    }

    /// Dropped before its end, it resets the stream, also when the other half is still there.
    pub(super) fn drop_sender(&self, number: u32) {
        let mut state = self.lock();
        if state.streams.get(&number).is_some_and(|stream| !stream.ours_ended && !stream.reset) {
            state.reset(number, None);
        }
        state.drop_half(number);
    }

    /// What still comes is thrown away.
    pub(super) fn drop_receiver(&self, number: u32) {
        let mut state = self.lock();
        if let Some(stream) = state.streams.get_mut(&number) {
            stream.inbox.clear();
            stream.deaf = true;
        }
        state.drop_half(number);
    }

    /// Nobody will open another stream.
    pub(super) fn unwanted(&self) {
        let mut state = self.lock();
        state.unwanted = true;
        state.kick();
    }

    /// Whether streams can be opened.
    pub(super) fn takes_more(&self) -> bool {
        let state = self.lock();
        state.over.is_none() && !state.leaving
    }

    // For who moves bytes.

    /// The next that is to be sent; wakes `cx` when there is more. True: nothing is left, and nothing will come.
    pub(super) fn next(&self, cx: &Context<'_>, batch: &mut Batch) -> bool {
        let mut state = self.lock();
        let State { outbox, streams, crowded, woken, driver, .. } = &mut *state;
        *woken = false;
        wait(driver, cx);
        let mut said_all = Vec::new();
        outbox.next(batch, |number, length| {
            if let Some(stream) = streams.get_mut(&number) {
                stream.queued = stream.queued.saturating_sub(length);
                stream.frames = stream.frames.saturating_sub(1);
                wake(&mut stream.writer);
                if stream.halves == 0 && stream.frames == 0 {
                    said_all.push(number);
                }
            }
        });
        for number in crowded.drain(..) {
            if let Some(stream) = streams.get_mut(&number) {
                stream.crowded = false;
                wake(&mut stream.writer);
            }
        }
        for number in said_all {
            state.forget(number);
        }
        batch.is_empty() && state.is_done()
    }

    /// Data has come.
    pub(super) fn receive_data(&self, number: u32, piece: Bytes) -> Result<(), Malformed> {
        let mut state = self.lock();
        state.known(number)?;
        let Some(stream) = state.streams.get_mut(&number) else { return Ok(()) };
        if stream.theirs_ended {
            return Err(Malformed("data after the end of its stream"));
        }
        let length = u32::try_from(piece.len()).unwrap_or(u32::MAX);
        stream.window = stream.window.checked_sub(length).ok_or(Malformed("more data than was granted"))?;
        if !stream.deaf && !stream.reset {
            stream.inbox.add(piece);
            wake(&mut stream.reader);
        }
        Ok(())
    }

    /// Anything else has come.
    pub(super) fn receive(&self, number: u32, control: &Control) -> Result<Option<Asked>, Malformed> {
        let mut state = self.lock();
        if state.outbox.waiting() > FLOODED {
            return Err(Malformed("more to be answered than the peer reads"));
        }
        match *control {
            Control::Open { target, elsewhere } => return state.asked(number, target, elsewhere),
            Control::Ping => {
                state.control(0, &Control::Pong);
                return Ok(None);
            }
            Control::Leave { last } => {
                state.leaving = true;
                for (_, stream) in state.streams.iter_mut().filter(|(number, _)| **number > last) {
                    stream.answer = Answer::Unseen;
                    stream.end(true, None);
                }
                // There may be nothing to wait for.
                state.kick();
                return Ok(None);
            }
            Control::Pong | Control::Unknown => return Ok(None),
            Control::Accepted
            | Control::Refused { .. }
            | Control::End { .. }
            | Control::Reset { .. }
            | Control::Grant { .. } => {}
        }
        state.known(number)?;
        let dialing = state.dialing;
        let Some(stream) = state.streams.get_mut(&number) else { return Ok(None) };
        match *control {
            Control::Accepted | Control::Refused { .. } if !dialing || stream.answer != Answer::Waiting => {
                return Err(Malformed("an answer that nobody waits for"));
            }
            Control::Accepted => {
                stream.answer = Answer::Accepted;
                wake(&mut stream.reader);
            }
            Control::Refused { refusal } => {
                stream.answer = Answer::Refused(refusal);
                (stream.ours_ended, stream.theirs_ended) = (true, true);
                wake(&mut stream.reader);
                wake(&mut stream.writer);
            }
            Control::End { taken } if !stream.theirs_ended => stream.end(false, taken),
            Control::End { .. } => return Err(Malformed("a second end of a stream")),
            Control::Reset { taken } => {
                stream.end(true, taken);
                (stream.queued, stream.frames) = (0, 0);
                state.outbox.forget(number);
                state.forget(number);
            }
            Control::Grant { octets } => {
                stream.credit = stream.credit.checked_add(octets).ok_or(Malformed("more granted than can be"))?;
                wake(&mut stream.writer);
            }
            Control::Open { .. } | Control::Ping | Control::Pong | Control::Leave { .. } | Control::Unknown => {}
        }
        Ok(None)
    }

    /// Takes no stream from now on. Those that the peer asks for meanwhile it may ask for elsewhere.
    pub(super) fn leave(&self) {
        let mut state = self.lock();
        if !state.leaving {
            state.leaving = true;
            let last = state.last;
            state.control(0, &Control::Leave { last });
        }
    }

    pub(super) fn ping(&self) {
        self.lock().control(0, &Control::Ping);
    }

    /// The connection is over.
    pub(super) fn lose(&self, lost: Lost) {
        let mut state = self.lock();
        for stream in state.streams.values_mut() {
            wake(&mut stream.reader);
            wake(&mut stream.writer);
        }
        state.over.get_or_insert(lost);
        state.outbox = Outbox::default();
        state.driver = None;
    }
}

impl State {
    /// Whether the stream is there, or was.
    fn known(&self, number: u32) -> Result<(), Malformed> {
        if number == 0 || number > self.last {
            Err(Malformed("a frame for a stream that was never opened"))
        } else {
            Ok(())
        }
    }

    fn asked(&mut self, number: u32, target: SocketAddr, elsewhere: bool) -> Result<Option<Asked>, Malformed> {
        if self.dialing {
            return Err(Malformed("the end that was dialled opens a stream"));
        }
        if self.last.checked_add(1) != Some(number) {
            return Err(Malformed("a stream is opened out of turn"));
        }
        if self.leaving {
            // The peer learns from what we have said that nobody has looked at it.
            self.last = number;
            return Ok(None);
        }
        self.last = number;
        let open = || self.streams.values().filter(|stream| !stream.reset || stream.frames > 0).count();
        if self.streams.len() >= ACCEPTED && (self.streams.len() >= HELD || open() >= ACCEPTED) {
            self.control(number, &Control::Refused { refusal: 0 });
            return Ok(None);
        }
        self.streams.insert(number, Stream::new());
        Ok(Some(Asked { stream: number, target, elsewhere }))
    }
}

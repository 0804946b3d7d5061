//! Lines for a writer that may stall: collected in memory, written in batches by a thread of their own.
//!
//! A line costs its copy into a buffer; the thread is woken once per batch, not once per line. What does not fit is
//! refused, never waited for. Must not know what a line says.

use std::{
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Bytes that may wait: half a second at 20,000 lines a second.
const ROOM: usize = 4 << 20;
/// The first line of a batch waits so long for others.
const LINGER: Duration = Duration::from_millis(20);
/// A batch of this size waits no longer.
const BATCH: usize = 256 << 10;

/// Where lines are handed in. Clones share the writer, which ends when the last of them is dropped.
#[derive(Clone)]
pub(super) struct Lines(Arc<Handle>);

struct Handle(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Told when there is something to do at once.
    work: Condvar,
    /// Told when a batch has been written.
    done: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    writing: bool,
    hurry: bool,
    /// Nothing is taken any more.
    closed: bool,
}

impl Lines {
    /// Lines are written to `writer` by a thread called `name`.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn to(name: &str, writer: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        std::thread::Builder::new().name(name.into()).spawn(move || theirs.write_to(writer))?;
        Ok(Self(Arc::new(Handle(shared))))
    }

    /// Hands in a line, its end included; `false`: there is no room, or nobody writes any more.
    pub(super) fn push(&self, line: &[u8]) -> bool {
        let shared = &self.0.0;
        let mut state = shared.lock();
        let before = state.waiting.len();
        if state.closed || before + line.len() > ROOM {
            return false;
        }
        state.waiting.extend_from_slice(line);
        let after = state.waiting.len();
        drop(state);
        if before == 0 || (before < BATCH && after >= BATCH) {
            shared.work.notify_one();
        }
        true
    }

    /// Waits until everything handed in has been written, or for `limit`.
    pub(super) fn flush(&self, limit: Duration) {
        let shared = &self.0.0;
        let mut state = shared.lock();
        state.hurry = true;
        shared.work.notify_one();
        let busy = |state: &mut State| !state.closed && (state.writing || !state.waiting.is_empty());
        state = shared.done.wait_timeout_while(state, limit, busy).unwrap_or_else(PoisonError::into_inner).0;
        state.hurry = false;
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.work.notify_one();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is locked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes until nobody hands in lines any more, or the writer fails.
    fn write_to(&self, mut writer: impl Write) {
        let mut batch = Vec::new();
        while self.next(&mut batch) {
            let written = writer.write_all(&batch).and_then(|()| writer.flush());
            batch.clear();
            batch.shrink_to(BATCH);
            let mut state = self.lock();
            state.writing = false;
            state.closed |= written.is_err();
            drop(state);
            self.done.notify_all();
            if written.is_err() {
                return;
            }
        }
    }

    /// Takes the next batch; `false`: there is none, and there will be none.
    fn next(&self, batch: &mut Vec<u8>) -> bool {
        let idle = |state: &mut State| state.waiting.is_empty() && !state.closed;
        let mut state = self.work.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        let until = Instant::now() + LINGER;
        let alone = |state: &mut State| state.waiting.len() < BATCH && !state.hurry && !state.closed;
        let left = until.saturating_duration_since(Instant::now());
        state = self.work.wait_timeout_while(state, left, alone).unwrap_or_else(PoisonError::into_inner).0;
        std::mem::swap(&mut state.waiting, batch);
        state.writing = !batch.is_empty();
        state.writing
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Tells each batch; waits for leave before it returns, and fails when nobody gives it.
    struct Slow(Sender<Vec<u8>>, Receiver<()>);

    impl Write for Slow {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.send(data.to_vec()).map_err(io::Error::other)?;
            self.1.recv().map_err(io::Error::other)?;
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn slow() -> (Lines, Receiver<Vec<u8>>, Sender<()>) {
        let (tell, told) = channel();
        let (leave, waits) = channel();
        (Lines::to("test-lines", Slow(tell, waits)).unwrap(), told, leave)
    }

    #[test]
    fn every_line_is_written_once_and_in_order() {
        let (lines, told, leave) = slow();
        let mut wanted = Vec::new();
        for number in 0..1000 {
            let line = format!("{number}\n").into_bytes();
            assert!(lines.push(&line));
            wanted.extend(line);
            leave.send(()).unwrap();
        }
        drop(lines);
        // The sender is dropped with the writer, whose thread ends with the last batch.
        assert_eq!(told.iter().flatten().collect::<Vec<u8>>(), wanted);
    }

    #[test]
    fn a_writer_that_stalls_costs_lines_and_no_time() {
        let (lines, told, leave) = slow();
        assert!(lines.push(b"first\n"));
        assert_eq!(told.recv().unwrap(), b"first\n", "the writer is stuck with it now");
        let line = [b'x'; 1024];
        let taken = (0..ROOM / line.len() + 7).filter(|_| lines.push(&line)).count();
        assert_eq!(taken, ROOM / line.len());
        leave.send(()).unwrap();
        assert_eq!(told.recv().unwrap().len(), ROOM, "what was taken is written");
        leave.send(()).unwrap();
        lines.flush(Duration::from_secs(30));
        assert!(lines.push(b"there is room again\n"));
    }

    #[test]
    fn nothing_is_taken_for_a_writer_that_has_failed() {
        let (lines, told, leave) = slow();
        drop((told, leave));
        assert!(lines.push(b"lost\n"));
        lines.flush(Duration::from_secs(30));
        assert!(!lines.push(b"refused\n"));
    }
}

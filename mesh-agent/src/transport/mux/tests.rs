//! Two ends, byte for byte, without sockets: order, half-close, resets, credit; and whatever a peer may say.

use std::{
    collections::HashMap,
    net::SocketAddr,
    task::{Context, Poll, Waker},
};

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::{
    frame::{Control, HEAD, Head, LARGEST},
    halves::{self, Receiving, Sending},
    outbox::{Batch, PIECES},
    state::{Answer, Asked, Lost, Shared},
};
use crate::transport::tunnel::Payload;

const TARGET: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 80);

fn cx() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

/// Everything that one end has to say now.
fn said(end: &Shared) -> Vec<u8> {
    let (mut all, mut batch) = (Vec::new(), Batch::default());
    loop {
        end.next(&cx(), &mut batch);
        if batch.is_empty() {
            return all;
        }
        while !batch.is_empty() {
            let mut room = [std::io::IoSlice::new(&[]); PIECES];
            let count = batch.pieces(&mut room);
            let pieces: Vec<u8> = room[..count].iter().flat_map(|piece| piece.to_vec()).collect();
            // A socket takes what it wants to.
            let taken = pieces.len().div_ceil(2);
            all.extend_from_slice(&pieces[..taken]);
            batch.advance(taken);
        }
    }
}

/// Has an end hear it; returns what it was asked for, or what was wrong.
fn hear(end: &Shared, mut octets: &[u8]) -> Result<Vec<Asked>, &'static str> {
    let mut asked = Vec::new();
    while let Some((head, rest)) = octets.split_first_chunk::<HEAD>() {
        let head = Head::decode(*head).map_err(|malformed| malformed.0)?;
        let (body, rest) = rest.split_at(head.length);
        octets = rest;
        if head.is_data() {
            // In whatever pieces it comes.
            for piece in body.chunks(10_000) {
                end.receive_data(head.stream, Bytes::copy_from_slice(piece)).map_err(|malformed| malformed.0)?;
            }
        } else {
            let control = Control::decode(head, body).map_err(|malformed| malformed.0)?;
            asked.extend(end.receive(head.stream, &control).map_err(|malformed| malformed.0)?);
        }
    }
    assert!(octets.is_empty());
    Ok(asked)
}

/// Both ends of one stream, and of its connection.
struct Pair {
    ends: [std::sync::Arc<Shared>; 2],
    ours: (Receiving, Sending),
    theirs: (Receiving, Sending),
}

impl Pair {
    fn new() -> Self {
        let ends = [Shared::new(true), Shared::new(false)];
        let ours = halves::of(&ends[0], ends[0].open(TARGET, true).ok().unwrap());
        let asked = hear(&ends[1], &said(&ends[0])).unwrap();
        assert_eq!(asked, [Asked { stream: 1, target: TARGET, elsewhere: true }]);
        let theirs = halves::of(&ends[1], 1);
        theirs.1.answer(&Control::Accepted).unwrap();
        hear(&ends[0], &said(&ends[1])).unwrap();
        assert!(matches!(ends[0].poll_answer(1, &cx()), Poll::Ready(Ok(Answer::Accepted))));
        Self { ends, ours, theirs }
    }

    /// Until neither has more to say.
    fn talk(&self) {
        loop {
            let (there, back) = (said(&self.ends[0]), said(&self.ends[1]));
            if there.is_empty() && back.is_empty() {
                return;
            }
            hear(&self.ends[1], &there).unwrap();
            hear(&self.ends[0], &back).unwrap();
        }
    }
}

fn send(sending: &Sending, data: &[u8]) -> usize {
    match sending.poll_send(&cx(), Payload::Copied(data)) {
        Poll::Ready(sent) => sent.unwrap(),
        Poll::Pending => 0,
    }
}

/// What has come, and whether that was the end.
fn read(receiving: &Receiving) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    while let Poll::Ready(data) = receiving.poll_data(&cx()) {
        let Some(data) = data.unwrap() else { return (all, true) };
        receiving.consumed(data.len());
        all.extend_from_slice(&data);
    }
    (all, false)
}

proptest! {
    /// Pieces of any size, taken over or copied, written and read whenever there is room: all of it, in order, both ways.
    #[test]
    fn all_comes_in_order(
        steps in proptest::collection::vec((0..4u8, prop_oneof![1..200usize, 1..300_000usize]), 1..60),
    ) {
        let pair = Pair::new();
        let (mut sent, mut heard) = ([BytesMut::new(), BytesMut::new()], [Vec::new(), Vec::new()]);
        for (what, length) in steps {
            let way = usize::from(what & 1);
            let sending = [&pair.ours.1, &pair.theirs.1][way];
            let at = sent[way].len();
            let piece: Vec<u8> = (at..at + length).map(|at| (at % 251) as u8).collect();
            let mut whole = Bytes::from(piece.clone());
            let payload = if what & 2 == 0 { Payload::Copied(&piece) } else { Payload::Whole(&mut whole) };
            if let Poll::Ready(taken) = sending.poll_send(&cx(), payload) {
                sent[way].extend_from_slice(&piece[..taken.unwrap()]);
            }
            if length % 3 == 0 {
                pair.talk();
            }
            if length % 5 == 0 {
                heard[1].extend(read(&pair.ours.0).0);
                heard[0].extend(read(&pair.theirs.0).0);
            }
        }
        pair.ours.1.end(None).unwrap();
        pair.theirs.1.end(Some(7)).unwrap();
        for _ in 0..10 {
            pair.talk();
            heard[1].extend(read(&pair.ours.0).0);
            heard[0].extend(read(&pair.theirs.0).0);
        }
        prop_assert!(heard[0] == sent[0] && heard[1] == sent[1]);
        prop_assert!(read(&pair.ours.0).1 && read(&pair.theirs.0).1, "both ends were heard");
        prop_assert_eq!(pair.ours.0.taken().load(std::sync::atomic::Ordering::Relaxed), 7);
        drop((pair.ours, pair.theirs));
        prop_assert_eq!(said(&pair.ends[0]).len() + said(&pair.ends[1]).len(), 0, "a stream that has ended needs no reset");
    }

    /// A peer may say anything. It is heard or refused, and what it may have waiting stays bounded.
    #[test]
    fn no_peer_brings_it_down(
        dialing: bool,
        frames in proptest::collection::vec((0..12u8, 0..4u32, proptest::collection::vec(any::<u8>(), 0..24)), 0..200),
    ) {
        let end = Shared::new(dialing);
        let mut kept = HashMap::new();
        if dialing {
            let stream = end.open(TARGET, false).ok().unwrap();
            kept.insert(stream, halves::of(&end, stream));
        }
        for (kind, stream, body) in frames {
            let mut octets = vec![kind, 0, 0, body.len() as u8, 0, 0, 0, stream as u8];
            octets.extend(body);
            match hear(&end, &octets) {
                Ok(asked) => kept.extend(asked.iter().map(|asked| (asked.stream, halves::of(&end, asked.stream)))),
                Err(_) => break,
            }
            if kind % 3 == 0 {
                kept.remove(&stream);
            }
        }
        end.lose(Lost { refusal: None, what: "the test is over".into() });
        drop(kept);
        prop_assert!(end.open(TARGET, false).is_err());
    }
}

#[test]
fn a_reader_that_does_not_read_stops_its_writer_and_nobody_else() {
    let pair = Pair::new();
    let mut written = 0;
    loop {
        let sent = send(&pair.ours.1, &[1; 50_000]);
        if sent == 0 {
            // What waits to be sent is bounded, too.
            let before = written;
            pair.talk();
            written += send(&pair.ours.1, &[1; 50_000]);
            if written == before {
                break;
            }
            continue;
        }
        written += sent;
    }
    assert_eq!(written, 1 << 20, "one window");
    let other = halves::of(&pair.ends[0], pair.ends[0].open(TARGET, false).ok().unwrap());
    assert_eq!(hear(&pair.ends[1], &said(&pair.ends[0])).unwrap().len(), 1);
    let others = halves::of(&pair.ends[1], 2);
    assert_eq!(send(&other.1, b"through"), 7);
    pair.talk();
    assert_eq!(read(&others.0).0, b"through");
    assert_eq!(read(&pair.theirs.0).0.len(), written);
    pair.talk();
    assert!(send(&pair.ours.1, b"again") > 0, "what was read is granted again");
}

#[test]
fn a_short_message_overtakes_the_bulk_of_others_and_none_of_its_own() {
    let pair = Pair::new();
    let bulk = halves::of(&pair.ends[0], pair.ends[0].open(TARGET, false).ok().unwrap());
    drop(said(&pair.ends[0]));
    assert!(send(&bulk.1, &[1; 200_000]) == 200_000 && send(&bulk.1, b"behind") == 6);
    bulk.1.end(None).unwrap();
    assert_eq!(send(&pair.ours.1, b"short"), 5);
    let octets = said(&pair.ends[0]);
    assert_eq!(&octets[..HEAD + 5], [&Head::data(1, 5).encode()[..], b"short"].concat());
    let behind = octets.len() - HEAD - 6 - HEAD;
    assert_eq!(&octets[behind + HEAD..behind + HEAD + 6], b"behind");
    assert_eq!(octets.len(), 5 + 200_006 + HEAD * (1 + 200_000usize.div_ceil(LARGEST) + 1 + 1));
}

#[test]
fn pieces_of_one_stream_that_follow_each_other_become_one_frame() {
    let pair = Pair::new();
    for piece in [b"one", b"two"] {
        send(&pair.ours.1, piece);
    }
    assert_eq!(said(&pair.ends[0]), [&Head::data(1, 6).encode()[..], b"onetwo"].concat());
}

#[test]
fn a_stream_that_is_dropped_is_reset_and_one_that_was_reset_is_forgotten() {
    let pair = Pair::new();
    send(&pair.theirs.1, b"last words");
    pair.talk();
    drop(pair.theirs);
    let octets = said(&pair.ends[1]);
    hear(&pair.ends[0], &octets).unwrap();
    let Poll::Ready(Ok(Some(data))) = pair.ours.0.poll_data(&cx()) else { panic!("what had come before is read") };
    assert_eq!(data, b"last words"[..]);
    let Poll::Ready(Err(error)) = pair.ours.0.poll_data(&cx()) else { panic!("and then the reset") };
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(pair.ours.1.poll_reset(&cx()).is_ready());
    // What was on its way is no fault.
    hear(&pair.ends[1], &[&Head::data(1, 3).encode()[..], b"abc"].concat()).unwrap();
    assert!(hear(&pair.ends[1], &[&Head::data(2, 3).encode()[..], b"abc"].concat()).is_err(), "this one never was");
}

#[test]
fn what_was_sent_and_ended_is_not_taken_back_by_a_reset() {
    let pair = Pair::new();
    assert_eq!(send(&pair.theirs.1, &[1; 100_000]), 100_000);
    pair.theirs.1.end(None).unwrap();
    // The other direction has not ended, so this is a reset.
    drop(pair.theirs);
    hear(&pair.ends[0], &said(&pair.ends[1])).unwrap();
    let (heard, ended) = read(&pair.ours.0);
    assert_eq!((heard.len(), ended), (100_000, true), "all of it, and its end");
    assert!(pair.ours.1.poll_reset(&cx()).is_ready(), "then the reset");

    let pair = Pair::new();
    assert_eq!(send(&pair.theirs.1, &[1; 100_000]), 100_000);
    pair.theirs.1.reset(Some(3));
    hear(&pair.ends[0], &said(&pair.ends[1])).unwrap();
    let mut heard = 0;
    while let Poll::Ready(Ok(Some(data))) = pair.ours.0.poll_data(&cx()) {
        heard += data.len();
    }
    assert_eq!((heard, pair.ours.0.taken().load(std::sync::atomic::Ordering::Relaxed)), (100_000, 3));
}

#[test]
fn a_stream_counts_until_what_it_has_sent_is_on_its_way() {
    let end = Shared::new(false);
    for stream in 1..=1000 {
        let mut octets = Vec::new();
        Control::Open { target: TARGET, elsewhere: false }.encode(stream, &mut octets);
        Control::End { taken: None }.encode(stream, &mut octets);
        assert_eq!(hear(&end, &octets).unwrap().len(), 1);
        let (receiving, sending) = halves::of(&end, stream);
        assert_eq!(send(&sending, &[1; 10_000]), 10_000);
        sending.end(None).unwrap();
        drop((receiving, sending));
    }
    let mut octets = Vec::new();
    Control::Open { target: TARGET, elsewhere: false }.encode(1001, &mut octets);
    assert!(hear(&end, &octets).unwrap().is_empty(), "a peer that does not read gets no more");
    drop(said(&end));
    let mut octets = Vec::new();
    Control::Open { target: TARGET, elsewhere: false }.encode(1002, &mut octets);
    assert_eq!(hear(&end, &octets).unwrap().len(), 1);
}

#[test]
fn a_peer_that_leaves_has_not_looked_at_what_comes_after() {
    let pair = Pair::new();
    pair.ends[1].leave();
    let stream = pair.ends[0].open(TARGET, false).ok().unwrap();
    assert!(hear(&pair.ends[1], &said(&pair.ends[0])).unwrap().is_empty());
    hear(&pair.ends[0], &said(&pair.ends[1])).unwrap();
    assert!(matches!(pair.ends[0].poll_answer(stream, &cx()), Poll::Ready(Ok(Answer::Unseen))));
    assert!(pair.ends[0].open(TARGET, false).is_err() && !pair.ends[0].takes_more());
    assert_eq!(send(&pair.ours.1, b"goes on"), 7);
    pair.talk();
    assert_eq!(read(&pair.theirs.0).0, b"goes on");
    assert!(!pair.ends[1].next(&cx(), &mut Batch::default()), "a stream is left");
    drop((pair.ours, pair.theirs));
    assert!(hear(&pair.ends[1], &said(&pair.ends[0])).is_ok());
    drop(said(&pair.ends[1]));
    assert!(pair.ends[1].next(&cx(), &mut Batch::default()), "and now none");
}

#[test]
fn faults_are_told_from_what_may_happen() {
    let asks = |end: &Shared, stream: u32| {
        let mut octets = Vec::new();
        Control::Open { target: TARGET, elsewhere: false }.encode(stream, &mut octets);
        hear(end, &octets)
    };
    assert!(asks(&Shared::new(true), 1).is_err(), "who was dialled does not ask");
    let end = Shared::new(false);
    assert!(asks(&end, 2).is_err(), "numbers follow each other");
    for stream in 1..=1001 {
        assert_eq!(asks(&end, stream).unwrap().len(), usize::from(stream <= 1000), "only so many at once");
    }
    let over = |kind: &Control| {
        let mut octets = Vec::new();
        kind.encode(1, &mut octets);
        hear(&end, &octets)
    };
    assert!(over(&Control::Accepted).is_err());
    assert!(over(&Control::End { taken: None }).is_ok() && over(&Control::End { taken: None }).is_err());
    assert!(hear(&end, &[&Head::data(1, 1).encode()[..], b"x"].concat()).is_err(), "data after the end");
    assert!(over(&Control::Grant { octets: u32::MAX }).is_err());
    let mut much = Vec::new();
    for _ in 0..17 {
        much.extend(Head::data(2, LARGEST).encode());
        much.extend([0; LARGEST]);
    }
    assert_eq!(hear(&end, &much), Err("more data than was granted"));
    let mut pings = Vec::new();
    (0..200_000).for_each(|_| Control::Ping.encode(0, &mut pings));
    assert!(hear(&end, &pings).is_err(), "a flood that nobody reads the answers of");
}

//! Captures made by hand: what is TLS, what is not, and what order segments come in.

use super::*;

const CLIENT: (u8, u16) = (10, 40000);
const SERVER: (u8, u16) = (11, 15008);

fn packet(from: (u8, u16), to: (u8, u16), sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(from.1.to_be_bytes());
    tcp.extend(to.1.to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend([0; 4]);
    tcp.extend([5 << 4, flags]);
    tcp.extend([0; 6]);
    tcp.extend(payload);
    let total = u16::try_from(20 + tcp.len()).expect("a short packet");
    let mut frame = vec![0; 12];
    frame.extend([8, 0, 0x45, 0]);
    frame.extend(total.to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 90, 1, from.0, 10, 90, 1, to.0]);
    frame.extend(tcp);
    frame
}

fn capture(frames: &[Vec<u8>]) -> Pcap {
    let mut raw = Vec::new();
    raw.extend(0xa1b2_c3d4_u32.to_ne_bytes());
    raw.extend([0; 16]);
    raw.extend(1_u32.to_ne_bytes());
    for frame in frames {
        let length = u32::try_from(frame.len()).expect("a short frame");
        raw.extend([0; 8]);
        raw.extend(length.to_ne_bytes());
        raw.extend(length.to_ne_bytes());
        raw.extend(frame);
    }
    Pcap::parse(raw).expect("a capture")
}

fn record(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, 3, 3];
    bytes.extend(u16::try_from(body.len()).expect("a short record").to_be_bytes());
    bytes.extend(body);
    bytes
}

#[test]
fn records_are_recognised_over_segment_borders_in_any_order() {
    let bytes = [record(22, b"hello"), record(20, &[1]), record(23, &[7; 300])].concat();
    let (first, second) = bytes.split_at(9);
    let next = 101 + u32::try_from(first.len()).expect("short");
    let pcap = capture(&[
        packet(CLIENT, SERVER, 100, 2, b""),
        packet(SERVER, CLIENT, 900, 18, b""),
        packet(CLIENT, SERVER, next, 16, second),
        packet(CLIENT, SERVER, 101, 16, first),
        packet(CLIENT, SERVER, 101, 16, first),
    ]);
    let streams = pcap.streams();
    assert_eq!(streams.len(), 1);
    assert_eq!(streams[0].kind, StreamKind::Tls { records: 3 });
    assert_eq!((streams[0].bytes, streams[0].server_port), (bytes.len(), 15008));
}

#[test]
fn plain_text_is_not_tls_even_behind_a_record() {
    for bytes in [b"GET / HTTP/1.1\r\n\r\n".to_vec(), [record(23, b"x"), b"PING".to_vec()].concat()] {
        let pcap = capture(&[packet(CLIENT, SERVER, 1, 16, &bytes)]);
        assert_eq!(pcap.streams()[0].kind, StreamKind::Other);
    }
}

#[test]
fn a_text_is_found_and_another_is_not() {
    let pcap = capture(&[packet(CLIENT, SERVER, 1, 16, b"with marker-7 in it")]);
    assert!(pcap.contains(b"marker-7"));
    assert!(!pcap.contains(b"marker-8"));
}

#[test]
fn a_cut_file_gives_what_is_whole() {
    let mut raw = capture(&[packet(CLIENT, SERVER, 1, 16, b"one"), packet(CLIENT, SERVER, 4, 16, b"two")]).raw;
    raw.truncate(raw.len() - 1);
    let pcap = Pcap::parse(raw).expect("still a capture");
    assert_eq!(pcap.streams()[0].bytes, 3);
    assert!(Pcap::parse(vec![0; 40]).is_err());
}

//! Frames of `ecs-mesh/1` on the wire: a head of eight octets, and what follows it. Pure: octets in, frames out.
//!
//! ```text
//! 0      1                 4                     8
//! | kind | length of what follows | stream, or 0 | …
//! ```
//!
//! All numbers are big-endian. Must not know what a frame does to a stream.

use std::net::{IpAddr, SocketAddr};

use mesh_common::refusal::Refusal;

/// Octets of a head.
pub(super) const HEAD: usize = 8;
/// The most that may follow a head. Of a data frame: with its head it is exactly four full TLS records (RFC 8446, section 5.1).
pub(super) const LARGEST: usize = (64 << 10) - HEAD;
/// The most that follows the head of anything but data. More than is needed now: what a later version adds is ignored.
pub(super) const LARGEST_CONTROL: usize = 256;

const DATA: u8 = 0;
const OPEN: u8 = 1;
const ACCEPTED: u8 = 2;
const REFUSED: u8 = 3;
const END: u8 = 4;
const RESET: u8 = 5;
const GRANT: u8 = 6;
const PING: u8 = 7;
const PONG: u8 = 8;
const LEAVE: u8 = 9;

/// Flags of an opening.
const ELSEWHERE: u8 = 1;
const IPV6: u8 = 2;

/// The beginning of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    kind: u8,
    pub(super) length: usize,
    pub(super) stream: u32,
}

/// Everything but data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Control {
    /// The dialling end asks for a stream to `target`.
    Open {
        target: SocketAddr,
        elsewhere: bool,
    },
    /// The answers to it. `refusal` is 0 where none of ours was the reason.
    Accepted,
    Refused {
        refusal: u32,
    },
    /// This direction ends in order; how much of the other one the application has taken, where that was asked.
    End {
        taken: Option<u64>,
    },
    /// The stream ends at once, in both directions; likewise.
    Reset {
        taken: Option<u64>,
    },
    /// So many octets more may be sent.
    Grant {
        octets: u32,
    },
    Ping,
    Pong,
    /// No stream after this one was or will be looked at, and no new one is wanted.
    Leave {
        last: u32,
    },
    /// Of a later version; to be ignored.
    Unknown,
}

/// What cannot be a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Malformed(pub(super) &'static str);

impl Head {
    pub(super) fn data(stream: u32, length: usize) -> Self {
        Self { kind: DATA, length, stream }
    }

    pub(super) fn is_data(self) -> bool {
        self.kind == DATA
    }

    pub(super) fn encode(self) -> [u8; HEAD] {
        let [_, high, middle, low] = u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes();
        let [a, b, c, d] = self.stream.to_be_bytes();
        [self.kind, high, middle, low, a, b, c, d]
    }

    pub(super) fn decode([kind, high, middle, low, a, b, c, d]: [u8; HEAD]) -> Result<Self, Malformed> {
        let length = u32::from_be_bytes([0, high, middle, low]) as usize;
        if length > if kind == DATA { LARGEST } else { LARGEST_CONTROL } {
            return Err(Malformed("a frame is longer than frames may be"));
        }
        Ok(Self { kind, length, stream: u32::from_be_bytes([a, b, c, d]) })
    }
}

impl Control {
    /// Adds the frame to `out`.
    pub(super) fn encode(&self, stream: u32, out: &mut impl bytes::BufMut) {
        let mut put = |kind, length| out.put_slice(&Head { kind, length, stream }.encode());
        match self {
            Self::Open { target, elsewhere } => {
                put(OPEN, if target.is_ipv4() { 7 } else { 19 });
                out.put_u8(if *elsewhere { ELSEWHERE } else { 0 } | if target.is_ipv6() { IPV6 } else { 0 });
                out.put_u16(target.port());
                match target.ip() {
                    IpAddr::V4(ip) => out.put_slice(&ip.octets()),
                    IpAddr::V6(ip) => out.put_slice(&ip.octets()),
                }
            }
            Self::Accepted => put(ACCEPTED, 0),
            Self::Refused { refusal } => {
                put(REFUSED, 4);
                out.put_u32(*refusal);
            }
            Self::End { taken } | Self::Reset { taken } => {
                let kind = if matches!(self, Self::End { .. }) { END } else { RESET };
                put(kind, taken.map_or(0, |_| 8));
                if let Some(taken) = taken {
                    out.put_u64(*taken);
                }
            }
            Self::Grant { octets } => {
                put(GRANT, 4);
                out.put_u32(*octets);
            }
            Self::Ping => put(PING, 0),
            Self::Pong => put(PONG, 0),
            Self::Leave { last } => {
                put(LEAVE, 4);
                out.put_u32(*last);
            }
            Self::Unknown => {}
        }
    }

    /// What follows `head`, whole.
    pub(super) fn decode(head: Head, body: &[u8]) -> Result<Self, Malformed> {
        let number =
            || body.first_chunk().map(|octets| u32::from_be_bytes(*octets)).ok_or(Malformed("a frame is too short"));
        let taken = || match body {
            [] => Ok(None),
            _ => body
                .first_chunk()
                .map(|octets| Some(u64::from_be_bytes(*octets)))
                .ok_or(Malformed("a frame is too short")),
        };
        Ok(match head.kind {
            OPEN => open(body)?,
            ACCEPTED => Self::Accepted,
            REFUSED => Self::Refused { refusal: number()? },
            END => Self::End { taken: taken()? },
            RESET => Self::Reset { taken: taken()? },
            GRANT => Self::Grant { octets: number()? },
            PING => Self::Ping,
            PONG => Self::Pong,
            LEAVE => Self::Leave { last: number()? },
            _ => Self::Unknown,
        })
    }

    /// The refusal of the answer, by its number.
    pub(super) fn refused(refusal: Refusal) -> Self {
        Self::Refused { refusal: refusal as u32 }
    }
}

fn open(body: &[u8]) -> Result<Control, Malformed> {
    let [flags, high, low, address @ ..] = body else { return Err(Malformed("an opening names no address")) };
    let ip = if flags & IPV6 != 0 {
        address.first_chunk::<16>().map(|octets| IpAddr::from(*octets))
    } else {
        address.first_chunk::<4>().map(|octets| IpAddr::from(*octets))
    };
    let ip = ip.ok_or(Malformed("an opening names no address"))?;
    let target = SocketAddr::new(ip, u16::from_be_bytes([*high, *low]));
    Ok(Control::Open { target, elsewhere: flags & ELSEWHERE != 0 })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_control() -> impl Strategy<Value = Control> {
        let taken = || proptest::option::of(any::<u64>());
        prop_oneof![
            (any::<IpAddr>(), any::<u16>(), any::<bool>())
                .prop_map(|(ip, port, elsewhere)| Control::Open { target: SocketAddr::new(ip, port), elsewhere }),
            Just(Control::Accepted),
            any::<u32>().prop_map(|refusal| Control::Refused { refusal }),
            taken().prop_map(|taken| Control::End { taken }),
            taken().prop_map(|taken| Control::Reset { taken }),
            any::<u32>().prop_map(|octets| Control::Grant { octets }),
            Just(Control::Ping),
            Just(Control::Pong),
            any::<u32>().prop_map(|last| Control::Leave { last }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(control in any_control(), stream: u32) {
            let mut out = Vec::new();
            control.encode(stream, &mut out);
            let (head, body) = out.split_first_chunk().unwrap();
            let head = Head::decode(*head).unwrap();
            prop_assert_eq!((head.stream, head.length, head.is_data()), (stream, body.len(), false));
            prop_assert_eq!(Control::decode(head, body).unwrap(), control);
        }

        #[test]
        fn no_octets_bring_it_down(head: [u8; HEAD], body in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(head) = Head::decode(head) {
                prop_assert!(head.length <= LARGEST);
                drop(Control::decode(head, &body));
            }
        }
    }

    #[test]
    fn a_data_frame_with_its_head_is_four_full_records() {
        assert_eq!(LARGEST + HEAD, 4 * (1 << 14));
        let head = Head::data(7, LARGEST);
        assert_eq!(Head::decode(head.encode()), Ok(head));
        assert!(Head::decode(Head::data(7, LARGEST + 1).encode()).is_err());
        assert!(Head::decode([PING, 0, 1, 1, 0, 0, 0, 0]).is_err(), "control frames are short");
        assert_eq!(Control::decode(Head { kind: 99, length: 0, stream: 0 }, &[]), Ok(Control::Unknown));
    }
}

//! Size, alignment and absence of padding of every type that crosses the kernel boundary.

use crate::{addr, event, maps};

/// A type without padding is exactly as large as its fields together.
macro_rules! exact {
    ($t:ty, $size:expr, $($field:ty),+) => {
        assert_eq!(size_of::<$t>(), $size, "size of {}", stringify!($t));
        assert_eq!(size_of::<$t>(), 0 $(+ size_of::<$field>())+, "padding in {}", stringify!($t));
    };
}

#[test]
fn no_padding() {
    exact!(addr::Addr, 20, addr::Ip, [u8; 2], [u8; 2]);
    exact!(maps::Knobs, 72, u32, u32, u64, u64, [u8; 4], [u8; 4], [u8; 16], [u8; 16], u16, u16, u32);
    exact!(maps::Namespace, 8, u32, u32);
    exact!(maps::Service, 16, u32, u32, u32, u32);
    exact!(maps::EndpointKey, 8, u32, u32);
    exact!(maps::Endpoint, 20, addr::Addr);
    exact!(maps::GrantKey, 8, u32, u32);
    exact!(maps::Original, 32, addr::Addr, u32, u32, u32);
    exact!(maps::Direct, 64, u64, maps::Original, addr::Addr, u32);
    exact!(maps::FlowKey, 32, u64, addr::Ip, u64);
    exact!(maps::CloseKey, 48, u64, addr::Addr, addr::Addr);
    exact!(maps::Close, 16, u64, u64);
    exact!(maps::SocketLayout, 12, u32, u32, u32);
    exact!(event::Event, 80, u32, u32, u32, u32, addr::Addr, addr::Addr, u64, u64, u32, u32);
}

#[test]
fn event_fields_are_read_where_they_lie() {
    let mut bytes = [0u8; 80];
    for (i, byte) in (0u8..).zip(bytes.iter_mut()) {
        *byte = i;
    }
    let event = event::Event::from_bytes(&bytes).expect("80 bytes");
    assert_eq!(event.kind, u32::from_ne_bytes([0, 1, 2, 3]));
    assert_eq!(event.original.ip.0[0], 16 + u8::try_from(core::mem::offset_of!(addr::Addr, ip)).expect("small"));
    assert_eq!(core::mem::offset_of!(event::Event, original), 16);
    assert_eq!(core::mem::offset_of!(event::Event, endpoint), 36);
    assert_eq!(event.endpoint.port, [52, 53]);
    assert_eq!(core::mem::offset_of!(event::Event, bytes_sent), 56);
    assert_eq!(event.bytes_sent, u64::from_ne_bytes([56, 57, 58, 59, 60, 61, 62, 63]));
    assert_eq!(core::mem::offset_of!(event::Event, retransmits), 76);
    assert_eq!(event.retransmits, u32::from_ne_bytes([76, 77, 78, 79]));
}

#[test]
fn a_record_of_another_length_is_refused() {
    for length in (0..200).filter(|n| *n != 80) {
        assert_eq!(event::Event::from_bytes(&vec![0; length]), None);
    }
}

//! `grpc.health.v1.Health/Check`: the two messages, each with one field.
//!
//! Must not know how they are carried.

/// The path of the call.
pub const PATH: &str = "/grpc.health.v1.Health/Check";

/// The most that is read of an answer; one has 7 octets.
pub const LARGEST: usize = 1024;

/// Field 1 of the request, a string; of the answer, a number.
const SERVICE: u8 = 0x0a;
const STATUS: u8 = 0x08;
const SERVING: u8 = 1;
/// Flag and length in front of a message.
const PREFIX: usize = 5;

/// The request that asks for `service`, at most 100 octets; the empty name means the whole server.
pub fn request(service: &str) -> Vec<u8> {
    let name = &service.as_bytes()[..service.len().min(MAX_NAME)];
    let mut message = Vec::with_capacity(name.len() + 2);
    if let (false, Ok(length)) = (name.is_empty(), u8::try_from(name.len())) {
        message.extend([SERVICE, length]);
        message.extend(name);
    }
    let length = u32::try_from(message.len()).unwrap_or(0).to_be_bytes();
    [&[0][..], &length, &message].concat()
}

/// Longest name of a service: its length is one octet then.
pub const MAX_NAME: usize = 100;

/// Whether an answer's body says that it is serving.
pub fn is_serving(body: &[u8]) -> bool {
    let Some((prefix, message)) = body.split_first_chunk::<PREFIX>() else { return false };
    let [flag, length @ ..] = *prefix;
    let whole = usize::try_from(u32::from_be_bytes(length)) == Ok(message.len());
    flag == 0 && whole && message == [STATUS, SERVING]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_protocol_buffers_has_them() {
        assert_eq!(request(""), [0, 0, 0, 0, 0]);
        assert_eq!(request("ab"), [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        assert_eq!(request(&"x".repeat(300)).len(), PREFIX + 2 + MAX_NAME);
    }

    #[test]
    fn only_serving_is_well() {
        assert!(is_serving(&[0, 0, 0, 0, 2, 8, 1]));
        for other in [&[0, 0, 0, 0, 2, 8, 2][..], &[0, 0, 0, 0, 0], &[], &[1, 0, 0, 0, 2, 8, 1], &[0, 0, 0, 0, 3, 8, 1]]
        {
            assert!(!is_serving(other), "{other:?}");
        }
    }
}

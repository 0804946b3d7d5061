//! Whether the first bytes of a client begin an HTTP/1 request or HTTP/2. Pure: bytes in, verdict out.
//!
//! Biased to "no": what is taken for a byte stream still works, only without balancing by request; what is taken for
//! HTTP and is none would break. Must not know what follows from the verdict.

/// What the bytes so far mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// They begin with a whole HTTP/1 request line.
    Http,
    /// They begin with HTTP/2's preface.
    Http2,
    /// They can never become one.
    Opaque,
    /// More bytes can still make them one.
    More,
}

/// The longest request line that is waited for. A longer one makes the connection a byte stream.
pub(super) const LONGEST_LINE: usize = 16 << 10;
/// Longer than every registered method.
const LONGEST_METHOD: usize = 24;

/// Judges the first bytes of a connection.
pub(super) fn judge(bytes: &[u8]) -> Verdict {
    match begins_http2(bytes) {
        Some(true) => return Verdict::Http2,
        Some(false) => {}
        None => return Verdict::More,
    }
    // Robust servers ignore an empty line before a request (RFC 9112 §2.2), so some clients send one.
    let bytes = match bytes {
        [b'\r', b'\n', rest @ ..] => rest,
        [b'\r'] => return Verdict::More,
        _ => bytes,
    };
    let method = bytes.iter().take_while(|b| matches!(b, b'A'..=b'Z' | b'-' | b'_')).count();
    if method > LONGEST_METHOD {
        return Verdict::Opaque;
    }
    let Some(after) = bytes.get(method) else { return Verdict::More };
    if *after != b' ' || method == 0 {
        return Verdict::Opaque;
    }
    let rest = &bytes[method + 1..];
    let target = rest.iter().take_while(|b| b.is_ascii_graphic() || **b >= 0x80).count();
    let Some(after) = rest.get(target) else {
        return if bytes.len() < LONGEST_LINE { Verdict::More } else { Verdict::Opaque };
    };
    if *after != b' ' || target == 0 {
        return Verdict::Opaque;
    }
    judge_version(&rest[target + 1..])
}

/// Whether the first bytes of a server are the frame with which HTTP/2 begins (RFC 9113 §3.4): SETTINGS, no acknowledgement, on
/// no stream. Servers may send it before they have heard the client.
pub(super) fn is_http2_server(bytes: &[u8]) -> bool {
    matches!(bytes, [0, high, low, 4, 0, 0, 0, 0, 0, ..] if u16::from_be_bytes([*high, *low]).is_multiple_of(6))
}

/// Whether a connection begins with HTTP/2's preface (RFC 9113 §3.4); `None` when more bytes are needed. No HTTP/1.1
/// request begins so: the method is reserved for it.
pub(super) fn begins_http2(bytes: &[u8]) -> Option<bool> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n";
    let begun = bytes.len().min(PREFACE.len());
    match bytes[..begun] == PREFACE[..begun] {
        false => Some(false),
        true if begun == PREFACE.len() => Some(true),
        true => None,
    }
}

fn judge_version(bytes: &[u8]) -> Verdict {
    const PREFIX: &[u8] = b"HTTP/1.";
    let common = bytes.iter().zip(PREFIX).take_while(|(a, b)| a == b).count();
    if common < PREFIX.len() {
        return if common == bytes.len() { Verdict::More } else { Verdict::Opaque };
    }
    match &bytes[PREFIX.len()..] {
        [] | [b'0' | b'1'] => Verdict::More,
        [b'0' | b'1', b'\r' | b'\n', ..] => Verdict::Http,
        _ => Verdict::Opaque,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(bytes: &[u8], expected: Verdict) {
        assert_eq!(judge(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
    }

    #[test]
    fn every_prefix_of_a_request_line_waits_and_the_line_decides() {
        for line in [
            "GET / HTTP/1.1\r",
            "POST /a?b=c HTTP/1.0\n",
            "OPTIONS * HTTP/1.1\r",
            "CONNECT world:80 HTTP/1.1\r",
            "GET http://world/x HTTP/1.1\r",
            "M-SEARCH * HTTP/1.1\r",
            "\r\nGET / HTTP/1.1\r",
        ] {
            for end in 0..line.len() {
                check(&line.as_bytes()[..end], Verdict::More);
            }
            check(line.as_bytes(), Verdict::Http);
            check(format!("{line}\nHost: x\r\n\r\nbody").as_bytes(), Verdict::Http);
        }
    }

    #[test]
    fn other_protocols_are_told_at_once() {
        for bytes in [
            &b"\x16\x03\x01\x02\x00\x01"[..],
            b"*1\r\n$4\r\nPING\r\n",
            b"PING\r\n",
            b"get key\r\n",
            b"SELECT 1\r\n",
            b"EHLO world\r\n",
            b"PRI * HTTP/2.1\r\n",
            b"PRI / HTTP/2.0\r\n",
            b"GET / HTTP/2",
            b"GET / HTTP/1.5",
            b"GET /\r\n",
            b"GET  / HTTP/1.1\r\n",
            b"SSH-2.0-OpenSSH",
            b"\0\0\0\x08\x04\xd2\x16\x2f",
            b"\r\r",
            b" GET",
        ] {
            check(bytes, Verdict::Opaque);
        }
    }

    #[test]
    fn http2_is_told_by_its_preface_alone() {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        for end in 0..preface.len() {
            assert_eq!(begins_http2(&preface[..end]), (end >= 16).then_some(true), "{end}");
            check(&preface[..end], if end >= 16 { Verdict::Http2 } else { Verdict::More });
        }
        for other in ["G", "PU", "PO", "PRI / HTTP/1.1\r\n", "\r\nPRI", "PRI * HTTP/2.1\r\n"] {
            assert_eq!(begins_http2(other.as_bytes()), Some(false), "{other:?}");
        }
    }

    #[test]
    fn an_http2_server_that_speaks_first_is_told_from_others() {
        for settings in [&b"\0\0\0\x04\0\0\0\0\0"[..], b"\0\0\x12\x04\0\0\0\0\0\0\x03\0\0\0\x64"] {
            assert!(is_http2_server(settings));
            assert!(!is_http2_server(&settings[..8]));
        }
        for other in [
            // MariaDB, SSH, SMTP, an acknowledgement, a length that is no number of settings.
            &b"J\0\0\0\x0a8.0.36\0\x08"[..],
            b"SSH-2.0-OpenSSH_9",
            b"220 mail ESMTP",
            b"\0\0\0\x04\x01\0\0\0\0",
            b"\0\0\x05\x04\0\0\0\0\0",
        ] {
            assert!(!is_http2_server(other));
        }
    }

    #[test]
    fn an_endless_line_is_not_waited_for() {
        let mut line = b"GET /".to_vec();
        line.resize(LONGEST_LINE, b'a');
        check(&line, Verdict::Opaque);
        check(&[b'A'; 30], Verdict::Opaque);
    }
}

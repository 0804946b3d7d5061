//! Connection-level header fields: removed before a message is sent on (RFC 9110 §7.6.1). Pure.
//!
//! Must not know which way the message goes.

use http::{HeaderMap, HeaderName, HeaderValue, header};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const TRAILERS: HeaderValue = HeaderValue::from_static("trailers");

/// Whether the message asks to switch protocols, or agrees to.
pub(super) fn upgrades(headers: &HeaderMap) -> bool {
    headers.contains_key(header::UPGRADE) && names(headers).any(|name| name.eq_ignore_ascii_case("upgrade"))
}

/// Removes what belongs to the connection that the message came on. `switching` keeps what a change of protocol needs.
/// `Transfer-Encoding` stays: whoever writes the message frames it anew.
pub(super) fn strip(headers: &mut HeaderMap, switching: bool) {
    let trailers = headers.get(header::TE).is_some_and(accepts_trailers);
    if headers.contains_key(header::CONNECTION) {
        let listed: Vec<HeaderName> = names(headers)
            .filter_map(|name| name.parse::<HeaderName>().ok())
            // To remove these would change the meaning of the message, or how it is framed.
            .filter(|name| !matches!(*name, header::HOST | header::CONTENT_LENGTH | header::TRANSFER_ENCODING))
            .filter(|name| !(switching && name == header::UPGRADE))
            .collect();
        for name in listed {
            headers.remove(name);
        }
        headers.remove(header::CONNECTION);
    }
    headers.remove(KEEP_ALIVE);
    headers.remove(PROXY_CONNECTION);
    headers.remove(header::TE);
    if trailers {
        // We pass trailers on, so we may ask for them.
        headers.insert(header::TE, TRAILERS);
    }
    if switching {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    } else {
        headers.remove(header::UPGRADE);
    }
}

fn names(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(header::CONNECTION).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim)
}

fn accepts_trailers(te: &HeaderValue) -> bool {
    te.to_str().is_ok_and(|te| te.split(',').any(|coding| coding.trim().eq_ignore_ascii_case("trailers")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(given: &[(&str, &str)], switching: bool, expected: &[(&str, &str)]) {
        let map = |list: &[(&str, &str)]| -> HeaderMap {
            list.iter().map(|(n, v)| (n.parse().expect("a name"), v.parse().expect("a value"))).collect()
        };
        let mut headers = HeaderMap::new();
        for (name, value) in given {
            headers.append(name.parse::<HeaderName>().expect("a name"), value.parse().expect("a value"));
        }
        strip(&mut headers, switching);
        assert_eq!(headers, map(expected));
    }

    #[test]
    fn what_belongs_to_the_connection_is_removed() {
        check(&[("host", "x"), ("accept", "*/*")], false, &[("host", "x"), ("accept", "*/*")]);
        check(&[("connection", "close"), ("keep-alive", "timeout=5"), ("host", "x")], false, &[("host", "x")]);
        check(
            &[("connection", "X-One, x-two"), ("x-one", "1"), ("X-Two", "2"), ("x-three", "3")],
            false,
            &[("x-three", "3")],
        );
        check(&[("connection", "a"), ("connection", "b"), ("a", "1"), ("b", "2")], false, &[]);
        check(&[("te", "gzip, trailers"), ("connection", "te")], false, &[("te", "trailers")]);
        check(&[("upgrade", "h2c"), ("connection", "upgrade")], false, &[]);
        check(&[("proxy-connection", "keep-alive")], false, &[]);
    }

    #[test]
    fn framing_and_host_stay_whatever_the_peer_says() {
        let listed = ("connection", "host, content-length, transfer-encoding");
        check(&[listed, ("host", "x"), ("content-length", "3")], false, &[("host", "x"), ("content-length", "3")]);
        check(&[listed, ("transfer-encoding", "chunked")], false, &[("transfer-encoding", "chunked")]);
    }

    #[test]
    fn a_change_of_protocol_keeps_what_it_needs() {
        check(
            &[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket"), ("sec-websocket-key", "k")],
            true,
            &[("connection", "upgrade"), ("upgrade", "websocket"), ("sec-websocket-key", "k")],
        );
    }
}

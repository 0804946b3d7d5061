//! What a proxy says first to another proxy's own port: which port of the task the bytes are for.
//!
//! Its place in TLS is agreed on as an application protocol. It must not know who may send it.

use std::io;

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// The application protocol.
pub const PROTOCOL: &[u8] = b"transport.l5d.io/v1";
const PREFACE: &[u8] = b"transport.l5d.io/v1\r\n\r\n";
/// No header is longer than a few bytes and a name.
const LONGEST: u32 = 1024;

#[derive(Clone, PartialEq, Message)]
struct Header {
    #[prost(int32, tag = "1")]
    port: i32,
    /// Of another service, to be passed on to.
    #[prost(string, tag = "2")]
    name: String,
}

/// Says that what follows is for `port`.
///
/// # Errors
/// The other side has gone.
pub async fn write(to: &mut (impl AsyncWrite + Unpin), port: u16) -> io::Result<()> {
    let header = Header { port: port.into(), name: String::new() }.encode_to_vec();
    let length = u32::try_from(header.len()).map_err(io::Error::other)?;
    to.write_all(&[PREFACE, &length.to_be_bytes(), &header].concat()).await
}

/// The port that what follows is for.
///
/// # Errors
/// It is no header, or the other side has gone.
pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<u16> {
    let mut preface = [0; PREFACE.len()];
    from.read_exact(&mut preface).await?;
    let length = from.read_u32().await?;
    if preface != PREFACE || length > LONGEST {
        return Err(io::Error::other("what comes first is no header of a proxy"));
    }
    let mut header = vec![0; length as usize];
    from.read_exact(&mut header).await?;
    let header = Header::decode(header.as_slice()).map_err(io::Error::other)?;
    u16::try_from(header.port).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_written_is_read_and_no_more() {
        let mut wire = Vec::new();
        write(&mut wire, 21_001).await.unwrap();
        wire.extend(b"bytes");
        let mut from = wire.as_slice();
        assert_eq!(read(&mut from).await.unwrap(), 21_001);
        assert_eq!(from, b"bytes");
    }

    #[tokio::test]
    async fn it_is_as_linkerd_writes_it() {
        let mut wire = Vec::new();
        write(&mut wire, 4040).await.unwrap();
        assert_eq!(wire, b"transport.l5d.io/v1\r\n\r\n\x00\x00\x00\x03\x08\xc8\x1f");
        let mut other = b"GET / HTTP/1.1\r\nhost: called.bench.mesh\r\n\r\n".as_slice();
        assert!(read(&mut other).await.is_err());
    }
}

//! One probe of one port, by TCP, HTTP/1.1 or gRPC.
//!
//! Must not know what its outcome is for.

use std::{io, net::SocketAddr};

use bytes::Bytes;
use h2::Reason;
use http::{HeaderMap, Request, Response, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use mesh_core::readiness::{Check, Settings, grpc};
use tokio::net::{TcpSocket, TcpStream};

use crate::proxy::places::Gone;

const USER_AGENT: &str = concat!("ecs-mesh/", env!("CARGO_PKG_VERSION"));
/// What is read of an answer, so that the application need not take its end for a fault.
const LARGEST: usize = 64 << 10;

/// Asks once. The socket is one of the task's own namespace, not connected yet.
///
/// # Errors
/// It has not passed; why, in words.
pub(super) async fn probe(
    socket: io::Result<std::net::TcpStream>,
    to: SocketAddr,
    settings: &Settings,
    mut gone: Gone,
) -> Result<(), String> {
    let asked = async {
        let socket = socket.map_err(|error| format!("no socket in the task's namespace: {error}"))?;
        let connecting = TcpSocket::from_std_stream(socket).connect(to);
        let stream = connecting.await.map_err(|error| format!("no connection to {to}: {error}"))?;
        match &settings.check {
            Check::None | Check::Listen | Check::Tcp => Ok(()),
            Check::Http => {
                let path = &settings.path;
                let status = http(stream, to, path).await.map_err(|error| format!("GET {path}: {error}"))?;
                let well = settings.statuses.iter().any(|range| range.contains(&status));
                if well { Ok(()) } else { Err(format!("GET {path} was answered {status}")) }
            }
            Check::Grpc => match health(stream, to, &settings.grpc_service).await {
                Ok(true) => Ok(()),
                Ok(false) => Err(format!("{} does not say that `{}` is serving", grpc::PATH, settings.grpc_service)),
                Err(error) => Err(format!("{}: {error}", grpc::PATH)),
            },
        }
    };
    tokio::select! {
        asked = asked => asked,
        () = tokio::time::sleep(settings.timeout) => Err(format!("no answer from {to} within {:?}", settings.timeout)),
        () = gone.wait() => Err("the task has gone".to_owned()),
    }
}

async fn http(stream: TcpStream, to: SocketAddr, path: &str) -> Result<u16, Box<dyn std::error::Error + Send + Sync>> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path)
        .header(header::HOST, to.to_string())
        .header(header::USER_AGENT, USER_AGENT)
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())?;
    let exchange = async {
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        // Nobody wants it, and one that is too long or breaks off is an answer too.
        drop(Limited::new(response.into_body(), LARGEST).collect().await);
        Ok(status)
    };
    tokio::pin!(exchange);
    // The connection moves only while it is polled.
    tokio::select! {
        status = &mut exchange => status,
        _ended = connection => exchange.await,
    }
}

async fn health(
    stream: TcpStream,
    to: SocketAddr,
    service: &str,
) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
    let (sender, connection) = h2::client::handshake(stream).await?;
    let request = Request::post(format!("http://{to}{}", grpc::PATH))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(header::USER_AGENT, USER_AGENT)
        .body(())?;
    let exchange = async {
        let (answer, mut body) = sender.ready().await?.send_request(request, false)?;
        body.send_data(grpc::request(service).into(), true)?;
        let serving = serving(answer.await?).await;
        // A server that is told says nothing about a connection that was cut off.
        body.send_reset(Reason::NO_ERROR);
        serving
    };
    tokio::pin!(exchange);
    tokio::select! {
        serving = &mut exchange => serving,
        _ended = connection => exchange.await,
    }
}

async fn serving(answer: Response<h2::RecvStream>) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
    let (head, mut body) = answer.into_parts();
    let mut message = Vec::new();
    while let Some(data) = body.data().await {
        let data = data?;
        message.extend_from_slice(&data);
        if message.len() > grpc::LARGEST {
            return Ok(false);
        }
        body.flow_control().release_capacity(data.len())?;
    }
    let trailers = body.trailers().await?;
    let ok = |fields: &HeaderMap| fields.get("grpc-status").is_none_or(|status| status == "0");
    Ok(head.status.is_success() && ok(&head.headers) && trailers.as_ref().is_none_or(ok) && grpc::is_serving(&message))
}

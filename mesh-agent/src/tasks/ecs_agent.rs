//! The ECS agent's introspection endpoint: which cluster this host belongs to.
//!
//! Knows one answer of one HTTP endpoint; must not know tasks.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, StatusCode, client::conn::http1};
use hyper_util::rt::TokioIo;
use mesh_core::id::{ClusterName, InvalidName};
use serde::Deserialize;
use tokio::{net::TcpStream, time::timeout};

/// It is on this host; if it does not answer at once it is not there.
const LIMIT: Duration = Duration::from_secs(2);
/// The answer has three short fields.
const LARGEST: usize = 64 * 1024;

/// The cluster could not be learnt.
#[derive(Debug, thiserror::Error)]
pub enum EcsAgentError {
    #[error("no ECS agent at {addr}: is ecs.service running? Or name the cluster in `host.cluster`")]
    Unreachable { addr: SocketAddr, source: std::io::Error },
    #[error("the ECS agent at {addr} did not answer within {} s", LIMIT.as_secs())]
    Timeout { addr: SocketAddr },
    #[error("the ECS agent at {addr} broke off while answering")]
    Http { addr: SocketAddr, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the ECS agent at {addr} answered {status} for /v1/metadata: it may not have registered yet")]
    Status { addr: SocketAddr, status: StatusCode },
    #[error("the ECS agent at {addr} gave no metadata that can be read: is something else listening there?")]
    Malformed { addr: SocketAddr, source: serde_json::Error },
    #[error("the ECS agent at {addr} names a cluster that cannot be one")]
    Cluster { addr: SocketAddr, source: InvalidName },
}

/// `GET /v1/metadata` (ecs-agent/introspection/v1/response.go).
#[derive(Deserialize)]
struct Metadata {
    #[serde(rename = "Cluster")]
    cluster: String,
}

/// Asks for the cluster of this host.
///
/// # Errors
/// No ECS agent answers with a cluster within two seconds.
pub async fn cluster(addr: SocketAddr) -> Result<ClusterName, EcsAgentError> {
    timeout(LIMIT, ask(addr)).await.unwrap_or(Err(EcsAgentError::Timeout { addr }))
}

async fn ask(addr: SocketAddr) -> Result<ClusterName, EcsAgentError> {
    let broken = |source: Box<dyn std::error::Error + Send + Sync>| EcsAgentError::Http { addr, source };
    let stream = TcpStream::connect(addr).await.map_err(|source| EcsAgentError::Unreachable { addr, source })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken(e.into()))?;
    let request = Request::get("/v1/metadata")
        .header("host", addr.to_string())
        .body(Empty::<Bytes>::new())
        .map_err(|e| broken(e.into()))?;
    let exchange = async {
        let answer = sender.send_request(request).await.map_err(|e| broken(e.into()))?;
        let status = answer.status();
        if status != StatusCode::OK {
            return Err(EcsAgentError::Status { addr, status });
        }
        Ok(Limited::new(answer.into_body(), LARGEST).collect().await.map_err(broken)?.to_bytes())
    };
    // The connection moves only while it is polled.
    tokio::pin!(exchange);
    tokio::pin!(connection);
    let body = tokio::select! {
        body = &mut exchange => body?,
        _ = &mut connection => exchange.await?,
    };
    let metadata: Metadata =
        serde_json::from_slice(&body).map_err(|source| EcsAgentError::Malformed { addr, source })?;
    // Older agents give the whole ARN.
    let name = metadata.cluster.rsplit('/').next().unwrap_or_default();
    name.parse().map_err(|source| EcsAgentError::Cluster { addr, source })
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    /// A server on loopback that answers one request with these bytes, and the request's first line.
    async fn check(answer: &'static str) -> (Result<ClusterName, EcsAgentError>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let server = async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8(request).unwrap().lines().next().unwrap().to_owned()
        };
        tokio::join!(cluster(addr), server)
    }

    #[tokio::test]
    async fn the_cluster_is_read_from_what_an_agent_answers() {
        let (cluster, request) = check(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n\
             {\"Cluster\":\"demo\",\"ContainerInstanceArn\":\"arn:aws:ecs:eu-west-1:123456789012:container-instance/demo/\
             4d1c0d1e0a5b4f0c9e2f3a4b5c6d7e8f\",\"Version\":\"Amazon ECS Agent - v1.105.1 (*8dfceca1)\"}",
        )
        .await;
        assert_eq!(request, "GET /v1/metadata HTTP/1.1");
        assert_eq!(cluster.unwrap().as_str(), "demo");
    }

    #[tokio::test]
    async fn an_arn_is_cut_down_to_the_name() {
        let body = "HTTP/1.0 200 OK\r\n\r\n{\"Cluster\":\"arn:aws:ecs:eu-west-1:123456789012:cluster/prod\"}";
        assert_eq!(check(body).await.0.unwrap().as_str(), "prod");
    }

    #[tokio::test]
    async fn other_answers_are_told_apart() {
        let status = check("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await.0;
        assert!(matches!(status, Err(EcsAgentError::Status { status: StatusCode::NOT_FOUND, .. })), "{status:?}");
        let text = check("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").await.0;
        assert!(matches!(text, Err(EcsAgentError::Malformed { .. })), "{text:?}");
        let name = check("HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{\"Cluster\":\"a b\"}").await.0;
        assert!(matches!(name, Err(EcsAgentError::Cluster { .. })), "{name:?}");
        let broken = check("HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{").await.0;
        assert!(matches!(broken, Err(EcsAgentError::Http { .. })), "{broken:?}");
    }

    #[tokio::test]
    async fn nobody_there_is_said_at_once() {
        let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        assert!(matches!(cluster(free).await, Err(EcsAgentError::Unreachable { .. })));
    }
}

//! The four gRPC services on one port. What they answer is decided by the other modules.
//!
//! Streams say once what there is and stay open, as nothing ever changes. It must not know what is measured.

use std::{convert::Infallible, future::Ready, net::SocketAddr, sync::Arc};

use anyhow::{Context as _, Result};
use futures_util::{
    StreamExt as _,
    stream::{self, Chain, Once, Pending},
};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use linkerd2_proxy_api::{
    destination::{
        DestinationProfile, GetDestination, Update,
        destination_server::{self, Destination, DestinationServer},
    },
    identity::{
        CertifyRequest, CertifyResponse,
        identity_server::{self, Identity, IdentityServer},
    },
    inbound::{
        PortSpec, Server,
        inbound_server_policies_server::{self, InboundServerPolicies, InboundServerPoliciesServer},
    },
    outbound::{
        OutboundPolicy, TrafficSpec,
        outbound_policies_server::{self, OutboundPolicies, OutboundPoliciesServer},
        traffic_spec::Target,
    },
};
use tokio::net::TcpListener;
use tonic::{Request, Response, Status, codegen::Service as _};

use crate::{World, destination, identity::Signer, inbound, outbound, world::Port};

/// Said once, then silence.
type Told<T> = Chain<Once<Ready<Result<T, Status>>>, Pending<Result<T, Status>>>;

/// All of it, for one proxy.
#[derive(Clone)]
pub struct Plane(Arc<Known>);

struct Known {
    world: World,
    signer: Signer,
}

impl Plane {
    /// Puts the proxy's key, request and token where it looks for them, and is ready to be asked.
    ///
    /// # Errors
    /// The CA cannot be read, or the files cannot be written.
    pub fn new(world: World) -> Result<Self> {
        let signer = Signer::make(&world)?;
        Ok(Self(Arc::new(Known { world, signer })))
    }

    /// Answers until it is dropped.
    ///
    /// # Errors
    /// No more connections can be accepted.
    pub async fn serve(self, listener: TcpListener) -> Result<Infallible> {
        loop {
            let (connection, _) = listener.accept().await.context("cannot accept a connection of the proxy")?;
            let plane = self.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request| plane.clone().answer(request));
                let server = http2::Builder::new(TokioExecutor::new());
                // The proxy ends its connections as it likes, and asks again.
                server.serve_connection(TokioIo::new(connection), service).await.ok();
            });
        }
    }

    async fn answer(self, request: http::Request<Incoming>) -> Result<http::Response<tonic::body::Body>, Infallible> {
        match request.uri().path().split('/').nth(1).unwrap_or_default() {
            identity_server::SERVICE_NAME => IdentityServer::new(self).call(request).await,
            destination_server::SERVICE_NAME => DestinationServer::new(self).call(request).await,
            outbound_policies_server::SERVICE_NAME => OutboundPoliciesServer::new(self).call(request).await,
            inbound_server_policies_server::SERVICE_NAME => InboundServerPoliciesServer::new(self).call(request).await,
            other => Ok(Status::unimplemented(format!("there is no service {other:?} here")).into_http()),
        }
    }

    fn inbound_policy(&self, port: u32) -> Result<Server, Status> {
        let port =
            u16::try_from(port).map_err(|fault| Status::invalid_argument(format!("{port} is no port: {fault}")))?;
        let known = self.0.world.inbound.iter().find(|each| each.port == port);
        // The proxy asks for its own ports too.
        Ok(inbound::server(known.copied().unwrap_or(Port { port, opaque: false })))
    }

    fn outbound_policy(&self, asked: TrafficSpec) -> Result<OutboundPolicy, Status> {
        let path = match asked.target {
            Some(Target::Addr(address)) => SocketAddr::try_from(address)
                .map_err(|fault| Status::invalid_argument(format!("this is no address: {fault}")))?
                .to_string(),
            Some(Target::Authority(name)) => name,
            None => return Err(Status::invalid_argument("no target is named")),
        };
        let service = destination::find(&self.0.world.outbound, &path);
        service.map(outbound::policy).ok_or_else(|| Status::not_found(format!("there is no service at {path}")))
    }
}

fn told<T>(what: T) -> Response<Told<T>> {
    Response::new(stream::once(std::future::ready(Ok(what))).chain(stream::pending()))
}

#[tonic::async_trait]
impl Identity for Plane {
    async fn certify(&self, request: Request<CertifyRequest>) -> Result<Response<CertifyResponse>, Status> {
        self.0.signer.certify(request.get_ref()).map(Response::new)
    }
}

#[tonic::async_trait]
impl Destination for Plane {
    type GetStream = Told<Update>;
    type GetProfileStream = Told<DestinationProfile>;

    async fn get(&self, request: Request<GetDestination>) -> Result<Response<Self::GetStream>, Status> {
        let service = destination::find(&self.0.world.outbound, &request.get_ref().path);
        Ok(told(service.map_or_else(destination::nowhere, destination::endpoints)))
    }

    async fn get_profile(&self, request: Request<GetDestination>) -> Result<Response<Self::GetProfileStream>, Status> {
        let path = &request.get_ref().path;
        // To the proxy this code says that there is no profile; others it would ask again.
        let service = destination::find(&self.0.world.outbound, path)
            .ok_or_else(|| Status::invalid_argument(format!("there is no service at {path}")))?;
        Ok(told(destination::profile(service)))
    }
}

#[tonic::async_trait]
impl OutboundPolicies for Plane {
    type WatchStream = Told<OutboundPolicy>;

    async fn get(&self, request: Request<TrafficSpec>) -> Result<Response<OutboundPolicy>, Status> {
        self.outbound_policy(request.into_inner()).map(Response::new)
    }

    async fn watch(&self, request: Request<TrafficSpec>) -> Result<Response<Self::WatchStream>, Status> {
        self.outbound_policy(request.into_inner()).map(told)
    }
}

#[tonic::async_trait]
impl InboundServerPolicies for Plane {
    type WatchPortStream = Told<Server>;

    async fn get_port(&self, request: Request<PortSpec>) -> Result<Response<Server>, Status> {
        self.inbound_policy(request.get_ref().port).map(Response::new)
    }

    async fn watch_port(&self, request: Request<PortSpec>) -> Result<Response<Self::WatchPortStream>, Status> {
        self.inbound_policy(request.get_ref().port).map(told)
    }
}

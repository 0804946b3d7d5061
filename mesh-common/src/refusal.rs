//! The numbered reasons for which traffic is refused, in the kernel and in the agent alike.
//!
//! Access log, metric label, HTTP answer, kernel event and `docs/refusals.md` come from this list. A number is never
//! used again, even when its reason is gone. Must not know who refuses.

/// Who has to act on a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The task that connected.
    Client,
    /// The task or host that was to be reached.
    Upstream,
    /// Whoever wrote the mesh's configuration or policy.
    Operator,
    /// The agent or the kernel programs.
    Mesh,
}

macro_rules! refusals {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $label:literal, $blame:ident, $next:literal;)+) => {
        /// Why a connection or request was not served.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Refusal { $($(#[doc = $doc])+ $name = $number,)+ }

        impl Refusal {
            /// Every refusal, in order of its number.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// The refusal with this number.
            pub const fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)+ _ => None }
            }

            /// A stable label for logs and metrics.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)+ }
            }

            /// Who has to act.
            pub const fn blame(self) -> Blame {
                match self { $(Self::$name => Blame::$blame,)+ }
            }

            /// What happened, in a sentence.
            pub const fn cause(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)+ }
            }

            /// What an operator should do next.
            pub const fn next_step(self) -> &'static str {
                match self { $(Self::$name => $next,)+ }
            }
        }
    };
}

refusals! {
    /// The virtual address has no such port.
    UnknownPort = 1, "unknown_port", Client, "list the service's ports with `mesh-agent services`; add the port to the service's definition or correct the client";
    /// The service has no endpoint.
    NoEndpoint = 2, "no_endpoint", Upstream, "start a task of the service, or check its registration with `mesh-agent services`";
    /// The service has endpoints, but none is healthy.
    NoHealthyEndpoint = 3, "no_healthy_endpoint", Upstream, "look at the health checks of the service's tasks";
    /// The agent is dead or hung and the service is configured to fail closed.
    AgentAwayFailClosed = 4, "agent_away_fail_closed", Mesh, "restart mesh-agent; its log and `mesh-agent check` say why it stopped";
    /// A kernel map has no room for another entry.
    MapFull = 5, "map_full", Mesh, "the host carries more tasks, services or half-open connections than the kernel maps hold; see `mesh_kernel_map_entries`";
    /// No policy allows the source to call this service.
    Denied = 6, "denied", Operator, "`mesh-agent explain` names the deciding rule; add an allow rule if the call is meant to work";
    /// The service requires mTLS and the endpoint can only be reached in plaintext.
    PlaintextForbidden = 7, "plaintext_forbidden", Operator, "install the agent on the endpoint's host, or set `tls = \"permissive\"` on the service while it migrates";
    /// No connection to the endpoint could be made.
    ConnectFailed = 8, "connect_failed", Upstream, "the endpoint refused the connection or is unreachable: check that the application listens and that security groups allow it";
    /// The endpoint did not answer the connection attempt in time.
    ConnectTimeout = 9, "connect_timeout", Upstream, "the endpoint's host does not answer: check that it is up and that security groups allow port 15008 between the hosts";
    /// The other end's certificate does not chain to the trust bundle.
    UntrustedPeer = 10, "untrusted_peer", Operator, "the peer uses another CA: compare `mesh-agent status` on both hosts and share one CA bundle";
    /// The other end's certificate has expired or is not valid yet.
    ExpiredPeer = 11, "expired_peer", Upstream, "check the clock of both hosts, and the peer agent's log for failed renewals";
    /// The other end's certificate is valid, but names another identity than the one expected.
    UnexpectedIdentity = 12, "unexpected_identity", Operator, "the address is now used by another service: refresh the registry, or correct the identity in the service's definition";
    /// The TLS handshake failed for another reason.
    HandshakeFailed = 13, "handshake_failed", Upstream, "the peer does not speak TLS 1.3 with a client certificate and, by ALPN, ecs-mesh/1 or h2 on this port";
    /// The other agent refused the tunnel.
    TunnelRefused = 14, "tunnel_refused", Upstream, "the peer agent's access log names its reason for the same moment";
    /// The tunnel asked for a destination that is no endpoint of this host.
    NotLocal = 15, "not_local", Upstream, "the caller's registry is stale: the task has left this host";
    /// The peer sent something that is not the protocol it must speak here.
    BadProtocol = 16, "bad_protocol", Client, "look at what connects to this port: only mesh agents may";
    /// The agent has no certificate for the source workload.
    NoIdentity = 17, "no_identity", Mesh, "the CA did not issue a certificate: `mesh-agent status` shows the last error";
    /// The kernel did not record where the connection was meant to go.
    OriginalLost = 18, "original_lost", Mesh, "a process connected straight to the agent's port, or the flow map is full; see `mesh_kernel_map_full_total`";
    /// The agent is stopping.
    Draining = 19, "draining", Mesh, "retry: another endpoint or the restarted agent will answer";
    /// The destination task has gone away.
    TaskGone = 20, "task_gone", Upstream, "none: the endpoint was withdrawn as its task stopped";
    /// The request's head is malformed or too large.
    BadRequest = 21, "bad_request", Client, "the client sends HTTP that cannot be forwarded safely (RFC 9112)";
    /// The endpoint closed the connection before it had answered the request.
    UpstreamReset = 22, "upstream_reset", Upstream, "the application crashed or closed the connection in the middle of an answer";
    /// The task is not ready any more, and the caller can go elsewhere.
    NotReady = 23, "not_ready", Upstream, "none if another endpoint answered: the caller's registry had not heard yet that the task is stopping or unhealthy";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_stable() {
        let list: Vec<_> = Refusal::ALL.iter().map(|r| (*r as u32, r.label())).collect();
        assert!(list.windows(2).all(|w| w[0].0 < w[1].0), "in order, each number once");
        assert_eq!(list[0], (1, "unknown_port"));
        assert_eq!(list[21], (22, "upstream_reset"), "append only; a number is never used again");
    }

    #[test]
    fn a_number_finds_its_refusal() {
        for refusal in Refusal::ALL {
            assert_eq!(Refusal::from_number(*refusal as u32), Some(*refusal));
            assert!(refusal.cause().ends_with('.'), "{refusal:?}");
            assert!(!refusal.next_step().is_empty());
        }
        assert_eq!(Refusal::from_number(0), None);
    }
}

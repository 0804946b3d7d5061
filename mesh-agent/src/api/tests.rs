//! Golden documents: what scripts read must not change by accident.

use std::{sync::Arc, time::Duration};

use mesh_common::addr::{Addr, Ip};
use mesh_core::{
    addr::Vip,
    model::{Destination, EndpointId, Health, OnAgentDeath, Protocol, Reach, ServicePort, Target, TlsMode, Workload},
};
use serde_json::{Value, json};

use super::*;

/// A service `world` with one endpoint of each kind on port 80, and a task `web-1`.
pub(crate) fn snapshot() -> Snapshot {
    let id = |name: &str| format!("spiffe://demo.mesh/ns/demo/sa/{name}").parse().expect("a valid SPIFFE ID");
    let endpoint = |addr: &str, reach, identity| {
        Arc::new(model::Endpoint {
            id: EndpointId::of(addr.parse().expect("a valid address")),
            reach,
            identity,
            health: Health::Healthy,
            weight: 100,
            zone: Some("a".into()),
            attributes: Arc::default(),
        })
    };
    let local = Reach::Local {
        task: "world-1".parse().expect("a valid task id"),
        deliver: ([172, 17, 0, 3], 8080).into(),
        direct: true,
    };
    let service = model::Service {
        name: "world".parse().expect("a valid name"),
        vip: Vip { v4: [240, 240, 0, 7].into(), v6: [0xfd65, 0x6373, 0x6d65, 0x7368, 0, 0, 0, 7].into() },
        ports: vec![ServicePort {
            id: 1,
            port: 80,
            protocol: Protocol::Http,
            endpoints: vec![
                endpoint("10.90.1.10:32768", local, Some(id("world"))),
                endpoint(
                    "10.90.1.11:32768",
                    Reach::Tunnel { agent: ([10, 90, 1, 11], 15008).into() },
                    Some(id("world")),
                ),
                endpoint("10.90.1.12:80", Reach::Plaintext, None),
            ],
        }],
        tls: TlsMode::Permissive,
        on_agent_death: OnAgentDeath::Closed,
        owners: None,
    };
    let workload = Arc::new(Workload {
        number: 1,
        task: "web-1".parse().expect("a valid task id"),
        service: "web".parse().expect("a valid name"),
        identity: id("web"),
        mode: NetworkMode::Bridge,
    });
    let target = Target::Service { service: service.name.clone(), port: 80 };
    let destination = Arc::new(Destination { number: 1, target });
    let vips = [IpAddr::from(service.vip.v4), service.vip.v6.into()];
    Snapshot {
        generation: 9,
        by_address: vips.map(|ip| (Addr::from(SocketAddr::new(ip, 80)), destination.clone())).into_iter().collect(),
        by_vip: vips.map(|ip| (Ip::from(ip), service.name.clone())).into_iter().collect(),
        services: [(service.name.clone(), Arc::new(service))].into_iter().collect(),
        by_number: [(1_u32, workload.clone())].into_iter().collect(),
        workloads: [(workload.task.clone(), workload)].into_iter().collect(),
        ..Snapshot::default()
    }
}

/// The load of an endpoint that was used, and failed, a little while ago.
pub(crate) fn load(_: &EndpointId) -> Load {
    Load {
        rtt: Duration::from_micros(1500),
        at: Duration::from_secs(1),
        in_flight: 2,
        failures: 1,
        ejected_until: Duration::from_secs(3),
    }
}

/// A status with every field filled.
pub(crate) fn status() -> Status {
    Status {
        version: "0.1.0".into(),
        abi: 1,
        pid: 4242,
        uptime_seconds: 60,
        host: Some([10, 90, 1, 10].into()),
        cluster: "demo".into(),
        trust_domain: "demo.mesh".into(),
        generation: 9,
        ready: false,
        waiting_for: vec!["docker".into()],
        agent: AgentHealth { alive: true, heartbeat_age_ms: Some(100), heartbeat_limit_ms: 3000 },
        tasks: vec![Task {
            id: "web-1".into(),
            family: "web".into(),
            service: "web".into(),
            mode: mode(NetworkMode::Awsvpc).into(),
            identity: "spiffe://demo.mesh/ns/demo/sa/web".into(),
            armed: true,
            ports: vec![LocalPort { port: 80, ready: false, seconds: 12, reason: Some("no connection".into()) }],
        }],
        kernel: Kernel::of(&[0, 1, 2, 3, 4, 5, 6, 7]),
        certificates: vec![Certificate {
            identity: "spiffe://demo.mesh/ns/demo/sa/web".into(),
            not_after: timestamp(SystemTime::UNIX_EPOCH + Duration::from_millis(1_800_000_000_999)),
            last_error: None,
        }],
        sources: vec![Source {
            name: "docker".into(),
            state: None,
            last_load: None,
            last_error: Some("cannot connect".into()),
        }],
    }
}

/// `document` is written as `golden`, and read back as itself.
fn check<T: Serialize + for<'a> Deserialize<'a> + PartialEq + std::fmt::Debug>(document: &T, golden: Value) {
    let written = serde_json::to_value(document).expect("documents can be written");
    assert_eq!(written, golden, "written:\n{}", serde_json::to_string_pretty(&written).unwrap_or_default());
    assert_eq!(serde_json::from_value::<T>(golden).expect("documents can be read"), *document);
}

#[test]
fn status_is_golden() {
    let golden = json!({
        "version": "0.1.0",
        "abi": 1,
        "pid": 4242,
        "uptime_seconds": 60,
        "host": "10.90.1.10",
        "cluster": "demo",
        "trust_domain": "demo.mesh",
        "generation": 9,
        "ready": false,
        "waiting_for": ["docker"],
        "agent": { "alive": true, "heartbeat_age_ms": 100, "heartbeat_limit_ms": 3000 },
        "tasks": [{
            "id": "web-1",
            "family": "web",
            "service": "web",
            "mode": "awsvpc",
            "identity": "spiffe://demo.mesh/ns/demo/sa/web",
            "armed": true,
            "ports": [{ "port": 80, "ready": false, "seconds": 12, "reason": "no connection" }]
        }],
        "kernel": {
            "redirected": 0, "direct": 1, "failed_open": 2, "refused": 3,
            "dns": 4, "map_full": 5, "event_lost": 6, "passed": 7
        },
        "certificates": [{
            "identity": "spiffe://demo.mesh/ns/demo/sa/web",
            "not_after": "2027-01-15T08:00:00Z",
            "last_error": null
        }],
        "sources": [{ "name": "docker", "state": null, "last_load": null, "last_error": "cannot connect" }]
    });
    check(&status(), golden);
}

#[test]
fn services_are_golden() {
    let load_at = |ejected: bool| json!({ "rtt_us": 1500, "in_flight": 2, "failures": 1, "ejected": ejected });
    let golden = |ejected: bool| {
        json!({
            "generation": 9,
            "services": [{
                "name": "world",
                "vip4": "240.240.0.7",
                "vip6": "fd65:6373:6d65:7368::7",
                "tls": "permissive",
                "on_agent_death": "closed",
                "ports": [{
                    "port": 80,
                    "protocol": "http",
                    "endpoints": [
                        {
                            "address": "10.90.1.10:32768", "reach": "local", "agent": null,
                            "deliver": "172.17.0.3:8080", "identity": "spiffe://demo.mesh/ns/demo/sa/world",
                            "health": "healthy", "zone": "a", "weight": 100, "task": "world-1", "load": load_at(ejected)
                        },
                        {
                            "address": "10.90.1.11:32768", "reach": "tunnel", "agent": "10.90.1.11:15008",
                            "deliver": null, "identity": "spiffe://demo.mesh/ns/demo/sa/world",
                            "health": "healthy", "zone": "a", "weight": 100, "task": null, "load": load_at(ejected)
                        },
                        {
                            "address": "10.90.1.12:80", "reach": "plaintext", "agent": null,
                            "deliver": null, "identity": null,
                            "health": "healthy", "zone": "a", "weight": 100, "task": null, "load": load_at(ejected)
                        }
                    ]
                }]
            }]
        })
    };
    check(&Services::of(&snapshot(), &load, Duration::from_secs(2)), golden(true));
    check(&Services::of(&snapshot(), &load, Duration::from_secs(3)), golden(false));
}

#[test]
fn explanations_are_golden() {
    let explain = |verdict| Explain {
        question: Question {
            source: "web-1".into(),
            source_service: "web".into(),
            source_identity: "spiffe://demo.mesh/ns/demo/sa/web".into(),
            to: "world".into(),
            destination: Some(([240, 240, 0, 7], 80).into()),
        },
        generation: 9,
        verdict,
        reasons: vec!["because".into()],
    };
    let with = |verdict: Value| {
        let mut golden = json!({
            "question": {
                "source": "web-1",
                "source_service": "web",
                "source_identity": "spiffe://demo.mesh/ns/demo/sa/web",
                "to": "world",
                "destination": "240.240.0.7:80"
            },
            "generation": 9,
            "reasons": ["because"]
        });
        let verdict = verdict.as_object().expect("verdicts are objects").clone();
        golden.as_object_mut().expect("an object").extend(verdict);
        golden
    };
    let snapshot = snapshot();
    let service = snapshot.services.values().next().expect("there is one").clone();
    let plan = plan::Plan {
        endpoint: service.ports[0].endpoints[1].clone(),
        service,
        port: 0,
        delivery: plan::Delivery::Tunnel {
            agent: ([10, 90, 1, 11], 15008).into(),
            authority: ([10, 90, 1, 11], 32768).into(),
            from: "spiffe://demo.mesh/ns/demo/sa/web".parse().expect("valid"),
            expect: "spiffe://demo.mesh/ns/demo/sa/world".parse().expect("valid"),
        },
        elsewhere: true,
        reasons: vec![],
    };
    check(
        &explain(Verdict::plan(&plan)),
        with(json!({
            "verdict": "plan",
            "service": "world",
            "port": 80,
            "protocol": "http",
            "endpoint": "10.90.1.11:32768",
            "delivery": {
                "kind": "tunnel",
                "agent": "10.90.1.11:15008",
                "authority": "10.90.1.11:32768",
                "from": "spiffe://demo.mesh/ns/demo/sa/web",
                "expect": "spiffe://demo.mesh/ns/demo/sa/world"
            }
        })),
    );
    check(
        &explain(Verdict::refusal(Refusal::ConnectTimeout)),
        with(json!({
            "verdict": "refusal",
            "number": 9,
            "label": "connect_timeout",
            "blame": "upstream",
            "cause": Refusal::ConnectTimeout.cause(),
            "next_step": Refusal::ConnectTimeout.next_step()
        })),
    );
    check(
        &explain(Verdict::Direct {
            service: "cache".into(),
            port: 6379,
            endpoints: vec![([172, 17, 0, 3], 6379).into()],
        }),
        with(json!({ "verdict": "direct", "service": "cache", "port": 6379, "endpoints": ["172.17.0.3:6379"] })),
    );
    check(&explain(Verdict::Pass), with(json!({ "verdict": "pass" })));
    check(&explain(Verdict::NoSuchName), with(json!({ "verdict": "no_such_name" })));
}

#[test]
fn findings_and_failures_are_golden() {
    let finding = Finding { name: "clock".into(), verdict: "ok".into(), found: "synchronised".into(), remedy: None };
    check(
        &Check { passed: true, findings: vec![finding] },
        json!({
            "passed": true,
            "findings": [{ "name": "clock", "verdict": "ok", "found": "synchronised", "remedy": null }]
        }),
    );
    check(
        &Failure { error: "no path /".into(), remedy: "ask".into() },
        json!({ "error": "no path /", "remedy": "ask" }),
    );
}

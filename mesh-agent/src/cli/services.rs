//! `services`: what the mesh can reach.
//!
//! Must not know where services come from.

use anyhow::bail;

use super::{Out, Outcome, Socket, client, table::table};
use crate::api::{Endpoint, Service, Services};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this service, with its endpoints.
    name: Option<String>,
    #[command(flatten)]
    socket: Socket,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Prints all services, or one with its endpoints.
///
/// # Errors
/// No agent answers, or there is no such service.
pub fn run(args: &Args, out: &mut Out) -> anyhow::Result<Outcome> {
    let text = client::get(&args.socket.socket, "/v1/services")?;
    let mut services: Services = client::document(&text)?;
    if let Some(name) = &args.name {
        services.services.retain(|service| service.name == *name);
        if services.services.is_empty() {
            bail!("the mesh knows no service `{name}`; `mesh-agent services` lists those that it knows");
        }
    }
    match (&args.name, args.json) {
        (None, true) => out.raw(&text)?,
        (Some(_), true) => out.json(&services)?,
        (None, false) if services.services.is_empty() => out.line("the mesh knows no service")?,
        (None, false) => out.line(list(&services))?,
        (Some(_), false) => {
            for service in &services.services {
                out.line(describe(service))?;
            }
        }
    }
    Ok(Outcome::Good)
}

fn list(services: &Services) -> String {
    let row = |service: &Service| {
        let ports: Vec<_> = service.ports.iter().map(|port| format!("{}/{}", port.port, port.protocol)).collect();
        let endpoints = || service.ports.iter().flat_map(|port| &port.endpoints);
        let healthy = endpoints().filter(|endpoint| endpoint.health == "healthy").count();
        [
            service.name.clone(),
            ports.join(","),
            format!("{healthy}/{}", endpoints().count()),
            service.vip4.to_string(),
            service.vip6.to_string(),
            service.tls.clone(),
            service.on_agent_death.clone(),
        ]
    };
    table(
        ["SERVICE", "PORTS", "HEALTHY", "VIP", "VIP6", "TLS", "ON AGENT DEATH"],
        services.services.iter().map(row).collect(),
    )
}

fn describe(service: &Service) -> String {
    let row = |port: u16, endpoint: &Endpoint| {
        let through = endpoint.agent.or(endpoint.deliver).map(|addr| addr.to_string());
        let health = if endpoint.load.ejected { "ejected" } else { &endpoint.health };
        [
            port.to_string(),
            endpoint.address.to_string(),
            endpoint.reach.clone(),
            through.unwrap_or_default(),
            health.to_owned(),
            endpoint.zone.clone().unwrap_or_default(),
            endpoint.weight.to_string(),
            format!("{:.1} ms", std::time::Duration::from_micros(endpoint.load.rtt_us).as_secs_f64() * 1e3),
            endpoint.load.in_flight.to_string(),
            endpoint.task.clone().unwrap_or_default(),
            endpoint.identity.clone().unwrap_or_default(),
        ]
    };
    let rows = service.ports.iter().flat_map(|port| port.endpoints.iter().map(move |it| row(port.port, it)));
    format!(
        "{}: {}, {}; TLS {}, on agent death {}\n{}",
        service.name,
        service.vip4,
        service.vip6,
        service.tls,
        service.on_agent_death,
        table(
            [
                "PORT",
                "ENDPOINT",
                "REACH",
                "THROUGH",
                "HEALTH",
                "ZONE",
                "WEIGHT",
                "RTT",
                "IN FLIGHT",
                "TASK",
                "IDENTITY"
            ],
            rows.collect(),
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{EndpointLoad, Port};

    fn services() -> Services {
        let endpoint = Endpoint {
            address: ([10, 90, 1, 11], 32768).into(),
            reach: "tunnel".into(),
            agent: Some(([10, 90, 1, 11], 15008).into()),
            deliver: None,
            identity: Some("spiffe://demo.mesh/ns/demo/sa/world".into()),
            health: "healthy".into(),
            zone: Some("a".into()),
            weight: 100,
            task: None,
            load: EndpointLoad { rtt_us: 1540, in_flight: 2, failures: 0, ejected: false },
        };
        let draining = Endpoint { health: "draining".into(), ..endpoint.clone() };
        Services {
            generation: 1,
            services: vec![Service {
                name: "world".into(),
                vip4: [240, 240, 0, 7].into(),
                vip6: [0xfd65, 0x6373, 0x6d65, 0x7368, 0, 0, 0, 7].into(),
                tls: "strict".into(),
                on_agent_death: "open".into(),
                ports: vec![Port { port: 80, protocol: "http".into(), endpoints: vec![endpoint, draining] }],
            }],
        }
    }

    #[test]
    fn services_are_listed() {
        let expected = "\
SERVICE  PORTS    HEALTHY  VIP          VIP6                    TLS     ON AGENT DEATH
world    80/http  1/2      240.240.0.7  fd65:6373:6d65:7368::7  strict  open";
        assert_eq!(list(&services()), expected);
    }

    #[test]
    fn endpoints_are_described() {
        let text = describe(&services().services[0]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "world: 240.240.0.7, fd65:6373:6d65:7368::7; TLS strict, on agent death open");
        let words: Vec<_> = lines[2].split_whitespace().collect();
        let id = "spiffe://demo.mesh/ns/demo/sa/world";
        assert_eq!(words[..5], ["80", "10.90.1.11:32768", "tunnel", "10.90.1.11:15008", "healthy"]);
        assert_eq!(words[5..], ["a", "100", "1.5", "ms", "2", "-", id]);
    }
}

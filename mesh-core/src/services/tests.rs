//! The static file as an operator writes it: what is accepted, and how every fault is named.

use super::*;

const FILE: &str = r#"
[[service]]
name = "world"
families = ["world-v1"]
tls = "strict"
on_agent_death = "open"
ports = [ { port = 80, target = 8080, protocol = "http" } ]
[[service.endpoint]]
address = "10.90.1.11:32768"
agent = "10.90.1.11:15008"
[[service.endpoint]]
address = "[::ffff:10.90.1.12]:32768"
port = 80
agent = "10.90.1.12:15008"
identity = "spiffe://demo.mesh/ns/demo/sa/other"
weight = 5
zone = "a"
[[service]]
name = "cache"
ports = [ { port = 6379 }, { port = 6380, protocol = "tcp" } ]
[[service.endpoint]]
address = "[fd00::1]:6379"
port = 6379
[policy]
default = "allow"
[[policy.rule]]
name = "only-web-calls-cache"
effect = "deny"
from = ["spiffe://demo.mesh/ns/demo/sa/batch", "spiffe://demo.mesh/ns/other/*"]
to = ["cache"]
"#;

fn faults(text: &str) -> Vec<String> {
    match parse(text) {
        Ok(_) => Vec::new(),
        Err(faults) => faults.iter().map(ToString::to_string).collect(),
    }
}

#[test]
fn the_documented_form_parses() {
    let set = parse(FILE).expect("parses");
    let world = &set.services["world"];
    assert_eq!(world.name.as_str(), "world");
    assert_eq!(world.families, ["world-v1"]);
    assert_eq!((world.tls, world.on_agent_death), (Some(TlsMode::Strict), Some(OnAgentDeath::Open)));
    assert_eq!(world.ports, [PortEntry { port: 80, target: Some(8080), protocol: Some(Protocol::Http) }]);
    assert_eq!(
        world.endpoints[0],
        EndpointEntry {
            port: None,
            endpoint: Arc::new(Endpoint::listed(
                "10.90.1.11:32768".parse().expect("a literal"),
                Some("10.90.1.11:15008".parse().expect("a literal")),
                None,
            )),
            alias: false,
            assumed: false,
        }
    );
    let second = &world.endpoints[1];
    assert_eq!(second.endpoint.addr().to_string(), "10.90.1.12:32768", "a mapped address is the plain one");
    assert_eq!((second.port, second.endpoint.weight, second.endpoint.zone.as_deref()), (Some(80), 5, Some("a")));
    assert_eq!(set.services["cache"].ports[1].protocol, Some(Protocol::Tcp));
    assert_eq!(set.services["cache"].tls, None);
    let policy = set.policy.expect("has one");
    assert_eq!((policy.default, policy.rules.len()), (Effect::Allow, 1));
    assert_eq!((policy.rules[0].effect, policy.rules[0].to[0].as_str()), (Effect::Deny, "cache"));
    assert_eq!(parse(""), Ok(ServiceSet::default()));
}

#[test]
fn each_rule_holds() {
    let world = "[[service]]\nname = \"world\"\n";
    let one = format!("{world}ports = [{{ port = 80 }}]\n");
    let rule = "[[policy.rule]]\nname = \"r\"\neffect = \"deny\"\n";
    for (text, expected) in [
        ("[[service]]\n".to_owned(), "service[0].name: is missing"),
        ("[[service]]\nname = \"World\"\n".to_owned(), "service[World].name: service name `World` is not valid"),
        (format!("{world}{world}"), "service[world]: is there twice"),
        (format!("{world}ports = [{{ port = 0 }}]\n"), "service[world].ports[0].port: 0 is out of range"),
        (format!("{world}ports = [{{ target = 1 }}]\n"), "service[world].ports[0].port: is missing"),
        (format!("{world}ports = [80]\n"), "service[world].ports[0]: is a whole number and not a table"),
        (format!("{world}ports = [{{ port = 80, protocol = \"udp\" }}]\n"), "service[world].ports[0].protocol"),
        (
            format!("{world}ports = [{{ port = 80 }}, {{ port = 80 }}]\n"),
            "service[world].ports: port 80 is there twice",
        ),
        (format!("{world}families = [\"\"]\n"), "service[world].families[0]"),
        (format!("{world}tls = \"none\"\n"), "service[world].tls"),
        (format!("{world}endpoints = []\n"), "service[world].endpoints: is not known; did you mean `endpoint`?"),
        (format!("{one}[[service.endpoint]]\n"), "service[world].endpoint[0].address: is missing"),
        (
            format!("{one}[[service.endpoint]]\naddress = \"world:80\"\n"),
            "service[world].endpoint[0].address: `world:80`",
        ),
        (
            format!("{one}[[service.endpoint]]\naddress = \"0.0.0.0:80\"\n"),
            "service[world].endpoint[0].address: nothing",
        ),
        (
            format!("{one}[[service.endpoint]]\naddress = \"10.0.0.1:0\"\n"),
            "service[world].endpoint[0].address: nothing",
        ),
        (
            format!("{one}[[service.endpoint]]\naddress = \"10.0.0.1:1\"\nport = 81\n"),
            "service[world].endpoint[0].port: the service has no port 81",
        ),
        (
            format!("{world}[[service.endpoint]]\naddress = \"10.0.0.1:1\"\n"),
            "service[world].endpoint[0].port: is missing",
        ),
        (
            format!("{one}[[service.endpoint]]\naddress = \"10.0.0.1:1\"\nweight = -1\n"),
            "service[world].endpoint[0].weight",
        ),
        (
            format!("{one}[[service.endpoint]]\naddress = \"10.0.0.1:1\"\nidentity = \"spiffe://a/b\"\n"),
            "service[world].endpoint[0].identity: there is no agent",
        ),
        (
            format!(
                "{one}[[service.endpoint]]\naddress = \"10.0.0.1:1\"\n[[service.endpoint]]\naddress = \"10.0.0.1:1\"\n"
            ),
            "service[world].endpoint: 10.0.0.1:1 is there twice",
        ),
        (
            "[[service]]\nname = \"a\"\nfamilies = [\"f\"]\n[[service]]\nname = \"b\"\nfamilies = [\"f\"]\n".to_owned(),
            "service[b].families: `f` belongs to a",
        ),
        ("[policy]\ndefault = \"maybe\"\n".to_owned(), "policy.default"),
        ("[[policy.rule]]\neffect = \"deny\"\n".to_owned(), "policy.rule[0].name: is missing"),
        ("[[policy.rule]]\nname = \"r\"\n".to_owned(), "policy.rule[r].effect: is missing"),
        (format!("{rule}from = []\n"), "policy.rule[r].from: is an empty list"),
        (format!("{rule}to = [\"A\"]\n"), "policy.rule[r].to[0]"),
        (format!("{rule}from = [\"*\"]\n"), "policy.rule[r].from[0]"),
        (format!("{rule}from = [\"spiffe://demo.mesh*\"]\n"), "policy.rule[r].from[0]"),
        (format!("{rule}from = [\"spiffe://a/*/b\"]\n"), "policy.rule[r].from[0]"),
        (format!("{rule}{rule}"), "policy.rule[r]: is there twice"),
        ("services = []\n".to_owned(), "services: is not known; did you mean `service`?"),
    ] {
        let found = faults(&text);
        assert!(found.len() == 1 && found[0].starts_with(expected), "{text}\n{found:?}");
    }
    for good in ["spiffe://a/*", "spiffe://a/ns/b*", "spiffe://a/ns/b/sa/c", "spiffe://a"] {
        assert_eq!(faults(&format!("{rule}from = [\"{good}\"]\n")), [""; 0], "{good}");
    }
}

#[test]
fn all_faults_are_reported_together() {
    let text = "[[service]]\nname = \"A\"\ntls = 3\n[[service]]\nname = \"b\"\nports = [{ port = 1, targe = 2 }]\n[policy]\ndefalt = 1\n";
    let found = faults(text);
    assert_eq!(found.len(), 4, "{found:?}");
}

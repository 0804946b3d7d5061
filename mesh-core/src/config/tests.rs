//! The configuration as an operator writes it: what is accepted, and how every fault is named.

use super::*;

const REQUIRED: &str = "[identity]\ntrust_domain = \"example.mesh\"\nca_bundle = \"/etc/ecs-mesh/ca-bundle.pem\"\n\
    join_token_file = \"/etc/ecs-mesh/join-token\"\n";

fn faults(text: &str) -> Vec<String> {
    match parse(text) {
        Ok(_) => Vec::new(),
        Err(faults) => faults.iter().map(ToString::to_string).collect(),
    }
}

#[test]
fn the_example_shows_the_defaults() {
    assert_eq!(parse(EXAMPLE).expect("parses"), parse(REQUIRED).expect("parses"));
    assert_eq!(example(), EXAMPLE);
}

#[test]
fn the_example_shows_every_key() {
    let lines: Vec<_> = EXAMPLE
        .lines()
        .map(|line| {
            let key = line.strip_prefix("# ").unwrap_or(line);
            let is_key = key
                .split_once(" = ")
                .is_some_and(|(name, _)| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'));
            if is_key { key } else { line }
        })
        .collect();
    // A certificate is of no use without TLS.
    let text = lines.join("\n").replace("http://", "https://");
    let config = parse(&text).expect("the commented keys parse too");
    assert!(config.host.cluster.is_some() && config.host.address.is_some() && config.host.zone.is_some());
    assert!(config.kernel.cgroup_root.is_some() && config.services_file.is_some());
    // Asking for an unknown key names all known ones; each must be in the example.
    for section in [
        "host",
        "enrol",
        "readiness",
        "docker",
        "kernel",
        "proxy",
        "dns",
        "vip",
        "identity",
        "services",
        "discovery",
        "discovery.consul",
        "discovery.consul.tls",
        "discovery.consul.registration",
        "discovery.ecs",
        "discovery.cloud_map",
        "discovery.cloud_map.registration",
        "admin",
        "log",
    ] {
        let fault = faults(&format!("[{section}]\nqqqqqqqqqq = 1\n"))
            .into_iter()
            .find(|fault| fault.contains("qqqqqqqqqq"))
            .expect("an unknown key is refused");
        let (_, known) = fault.split_once("known here: ").expect("lists the known ones");
        let here: Vec<_> = EXAMPLE
            .split(&format!("\n[{section}]\n"))
            .nth(1)
            .expect("shown")
            .lines()
            .take_while(|line| !line.starts_with('['))
            .collect();
        for key in known.split(", ").filter(|key| !EXAMPLE.contains(&format!("[{section}.{key}]"))) {
            let shown = here.iter().any(|line| line.trim_start_matches("# ").starts_with(&format!("{key} = ")));
            assert!(shown, "{section}.{key} is missing in the example");
        }
    }
}

#[test]
fn an_empty_file_says_what_is_required() {
    assert_eq!(
        faults(""),
        [
            "identity.trust_domain: is missing; name it, such as `example.mesh`; the same on all hosts",
            "identity.ca_bundle: is missing; make one with `mesh-agent ca init` and give its path",
            "identity.join_token_file: is missing; give the path of the file with the token that opens the CA bundle",
        ]
    );
}

#[test]
fn bad_syntax_has_a_line_and_a_column() {
    let found = faults("[host]\nzone = \n");
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("line 2, column "), "{found:?}");
    assert!(faults("[host]\n[host]\n")[0].starts_with("line 2, column "));
}

#[test]
fn all_faults_are_reported_together() {
    let text = "[enroll]\ndefault = true\n[dns]\nttl = \"5 seconds\"\nport = 15001\nsufixes = []\n[log]\nlevel = \"loud\"\n\
        [admin]\nmetrics = \"0.0.0.0:15020\"\n";
    let found = faults(text).join("\n");
    for part in [
        "dns.ttl: `5 seconds` is not a duration",
        "dns.port: port 15001 is also that of proxy.outbound_port",
        "dns.sufixes: is not known; did you mean `suffixes`?",
        "log.level: `loud` is not known; use \"error\" or",
        "admin.metrics: 0.0.0.0:15020 can be reached from elsewhere",
        "identity.trust_domain: is missing",
        "enroll: is not known; did you mean `enrol`?",
    ] {
        assert!(found.contains(part), "{part}\n---\n{found}");
    }
}

#[test]
fn each_rule_holds() {
    for (section, line, expected) in [
        ("host", "address = \"0.0.0.0\"", "host.address"),
        ("host", "zone = \"\"", "host.zone"),
        ("host", "state_dir = \"var\"", "host.state_dir"),
        ("host", "cluster = \"a b\"", "host.cluster"),
        ("enrol", "exclude = [\" \"]", "enrol.exclude[0]"),
        ("enrol", "tls = \"off\"", "enrol.tls"),
        ("kernel", "heartbeat_limit = \"1ms\"", "kernel.heartbeat_limit"),
        ("proxy", "outbound_port = 70000", "proxy.outbound_port"),
        ("proxy", "outbound_port = 40000", "proxy.outbound_port: port 40000 lies in the range"),
        ("proxy", "outbound_port = 22", "proxy.outbound_port: port 22 belongs"),
        ("proxy", "tunnel_listen = \"0.0.0.0:0\"", "proxy.tunnel_listen: port 0"),
        ("proxy", "tunnel_listen = 15008", "proxy.tunnel_listen: is a whole number"),
        ("dns", "ttl = \"1500ms\"", "dns.ttl: DNS knows whole seconds"),
        ("dns", "suffixes = []", "dns.suffixes"),
        ("dns", "suffixes = [\"mesh\", \"Mesh.\"]", "dns.suffixes: `mesh` is there twice"),
        ("dns", "suffixes = [\"a..b\"]", "dns.suffixes[0]"),
        ("vip", "v4 = \"127.1.0.0/16\"", "vip.v4: 127.1.0.0/16 overlaps 127.0.0.0/8 (loopback)"),
        ("vip", "v4 = \"169.254.0.0/16\"", "vip.v4"),
        ("vip", "v4 = \"239.0.0.0/16\"", "vip.v4"),
        ("vip", "v4 = \"240.240.0.1/16\"", "vip.v4: 240.240.0.1/16 has bits"),
        ("vip", "v4 = \"240.240.0.0/30\"", "vip.v4"),
        ("vip", "v6 = \"fe80::/64\"", "vip.v6"),
        ("vip", "v6 = \"ff00::/64\"", "vip.v6"),
        ("vip", "v6 = \"::/96\"", "vip.v6"),
        ("vip", "v6 = \"fd00::/16\"", "vip.v6: fd00::/16 overlaps fd00:ec2::/32"),
        ("vip", "v6 = \"fd65::/120\"", "vip.v6: fd65::/120 has fewer addresses"),
        ("services", "file = \"services.toml\"", "services.file"),
        ("admin", "metrics = \"10.0.0.1:15020\"", "admin.metrics"),
        ("log", "format = \"xml\"", "log.format"),
    ] {
        let found = faults(&format!("{REQUIRED}[{section}]\n{line}\n"));
        assert!(found.len() == 1 && found[0].starts_with(expected), "{line}: {found:?}");
    }
    let found = faults(&format!("{REQUIRED}leaf_ttl = \"25h\"\n"));
    assert!(found.len() == 1 && found[0].starts_with("identity.leaf_ttl"), "{found:?}");
}

#[test]
fn values_arrive() {
    let config = parse(&format!(
        "{REQUIRED}leaf_ttl = \"1h30m\"\n[dns]\nsuffixes = [\"Mesh.\", \"a.b\"]\n[host]\naddress = \"::ffff:10.0.0.1\"\n\
         [enrol]\ntls = \"permissive\"\non_agent_death = \"closed\"\nexclude = [\"x\"]\n[log]\nformat = \"text\"\n"
    ))
    .expect("parses");
    assert_eq!(config.identity.leaf_ttl, Duration::from_secs(5400));
    assert_eq!(config.dns.suffixes, ["mesh", "a.b"]);
    assert_eq!(config.host.address, Some("10.0.0.1".parse().expect("a literal")));
    assert_eq!((config.enrol.tls, config.enrol.on_agent_death), (TlsMode::Permissive, OnAgentDeath::Closed));
    assert_eq!(config.log.format, LogFormat::Text);
}

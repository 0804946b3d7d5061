//! Names as applications ask for them, and what the mesh answers.

use std::time::Duration;

use super::*;
use crate::{arb::World, services};

const FILE: &str = r#"
[[service]]
name = "world"
ports = [ { port = 80, protocol = "http" }, { port = 5432 } ]
[[service]]
name = "localhost"
ports = [ { port = 80 } ]
"#;

/// Asks; answers in one line, with `V4` and `V6` for the addresses of `world`.
fn ask(ipv6: bool, name: &str, question: Question) -> String {
    let snapshot = World { sets: vec![services::parse(FILE).expect("parses")], ..World::default() }.snapshot();
    let suffixes = ["mesh".to_owned(), "service.consul".to_owned(), "demo".to_owned()];
    let naming = Naming { suffixes: &suffixes, datacenters: &[], ttl: Duration::from_secs(5), ipv6 };
    let vip = snapshot.services["world"].vip;
    let octets = vip.v4.octets();
    let reverse4 = format!("{}.{}.{}.{}.in-addr.arpa", octets[3], octets[2], octets[1], octets[0]);
    let digits: Vec<_> = format!("{:032x}", u128::from(vip.v6)).chars().rev().map(String::from).collect();
    let name = name.replace("PTR4", &reverse4).replace("PTR6", &format!("{}.ip6.arpa", digits.join(".")));
    let expected = |ttl: Duration| assert_eq!(ttl, naming.ttl);
    match answer(&snapshot, &naming, &name, question) {
        Answer::Forward => "forward".into(),
        Answer::NoData { ttl } => {
            expected(ttl);
            "no data".into()
        }
        Answer::NoSuchName { ttl } => {
            expected(ttl);
            "no such name".into()
        }
        Answer::Addresses { ttl, addresses } => {
            expected(ttl);
            let shown = addresses.iter().map(|ip| match ip {
                IpAddr::V4(ip) if *ip == vip.v4 => "V4",
                IpAddr::V6(ip) if *ip == vip.v6 => "V6",
                IpAddr::V4(_) | IpAddr::V6(_) => "?",
            });
            shown.collect::<Vec<_>>().join(" ")
        }
        Answer::Services { ttl, records } => {
            expected(ttl);
            let shown = records.iter().map(|(p, w, port, target)| format!("{p} {w} {port} {target}"));
            shown.collect::<Vec<_>>().join(", ")
        }
        Answer::Name { ttl, name } => {
            expected(ttl);
            name
        }
    }
}

#[test]
fn names_and_answers() {
    use Question::{A, Aaaa, Other, Ptr, Srv};
    let both = "0 0 80 world.mesh, 0 0 5432 world.mesh";
    for (name, question, expected) in [
        ("world", A, "V4"),
        ("WORLD.", A, "V4"),
        ("world.mesh", A, "V4"),
        ("World.Mesh.", A, "V4"),
        ("world.service.consul", A, "V4"),
        ("world.demo", A, "V4"),
        ("world", Aaaa, "no data"),
        ("world.mesh", Other, "no data"),
        ("world.mesh", Ptr, "no data"),
        ("nobody", A, "forward"),
        ("nobody.mesh", A, "no such name"),
        ("a.world.mesh", A, "no such name"),
        ("nobody.service.consul", A, "forward"),
        ("nobody.demo", A, "forward"),
        ("mesh", A, "forward"),
        ("worldmesh", A, "forward"),
        ("world.eu-central-1.compute.internal", A, "forward"),
        ("world.example.com", A, "forward"),
        ("localhost", A, "forward"),
        ("", A, "forward"),
        (".", A, "forward"),
        ("world.mesh", Srv, both),
        ("_http._tcp.world.mesh", Srv, "0 0 80 world.mesh"),
        ("_HTTP._TCP.world", Srv, "0 0 80 world.mesh"),
        ("_5432._tcp.world.demo", Srv, "0 0 5432 world.mesh"),
        ("_world._tcp.service.consul", Srv, both),
        ("_grpclb._tcp.world.mesh", Srv, "no data"),
        ("_http._tcp.world.mesh", A, "no data"),
        ("_http._udp.world.mesh", Srv, "no such name"),
        ("_http._tcp.nobody.mesh", Srv, "no such name"),
        ("_http._tcp.example.com", Srv, "forward"),
        ("PTR4", Ptr, "world.mesh"),
        ("PTR6.", Ptr, "world.mesh"),
        ("1.0.0.10.in-addr.arpa", Ptr, "forward"),
        ("0.10.in-addr.arpa", Ptr, "forward"),
        ("1.2.3.4.5.in-addr.arpa", Ptr, "forward"),
        ("300.0.0.10.in-addr.arpa", Ptr, "forward"),
        ("PTR4", A, "forward"),
    ] {
        assert_eq!(ask(false, name, question), expected, "{name} {question:?}");
    }
    assert_eq!(ask(true, "world.mesh", Aaaa), "V6");
    assert_eq!(ask(true, "world.mesh", A), "V4");
}

#[test]
fn a_name_stands_for_a_service() {
    let snapshot = World { sets: vec![services::parse(FILE).expect("parses")], ..World::default() }.snapshot();
    let naming = Naming { suffixes: &["svc.mesh".to_owned()], datacenters: &[], ttl: Duration::ZERO, ipv6: false };
    let found = |name| service(&snapshot, &naming, name).map(|service| service.name.as_str());
    assert_eq!(found("World.svc.mesh."), Some("world"));
    assert_eq!((found("world.mesh"), found("svc.mesh"), found("")), (None, None, None));
    assert_eq!(answer(&snapshot, &naming, "svc.mesh", Question::A), Answer::NoData { ttl: Duration::ZERO });
}

proptest::proptest! {
    #[test]
    fn no_question_makes_it_panic(name in proptest::prelude::any::<String>(), digits in "[0-9a-f.]{0,70}") {
        let snapshot = World { sets: vec![services::parse(FILE).expect("parses")], ..World::default() }.snapshot();
        let naming = Naming { suffixes: &["mesh".to_owned()], datacenters: &[], ttl: Duration::ZERO, ipv6: true };
        for name in [name.clone(), format!("{name}.mesh"), format!("_{name}._tcp.mesh"), format!("{digits}.ip6.arpa"), format!("{digits}.in-addr.arpa")] {
            for question in [Question::A, Question::Ptr, Question::Srv] {
                let _answer = answer(&snapshot, &naming, &name, question);
            }
        }
    }
}

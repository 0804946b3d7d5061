//! Names as applications ask for them, and what the mesh answers.

use std::time::Duration;

use super::*;
use crate::{arb::World, services};

const FILE: &str = r#"
[[service]]
name = "world"
ports = [ { port = 80, protocol = "http" }, { port = 5432 } ]
[[service]]
name = "world--tag-v2"
ports = [ { port = 80 }, { port = 81 } ]
[[service]]
name = "localhost"
ports = [ { port = 80 } ]
"#;

fn snapshot(world: &World) -> Snapshot {
    World { sets: vec![services::parse(FILE).expect("parses")], ..world.clone() }.snapshot()
}

/// Asks; answers in one line, with `V4` and `V6` for the addresses of `world`.
fn ask(ipv6: bool, name: &str, question: Question) -> String {
    let world = World::default();
    let snapshot = snapshot(&world);
    let suffixes = ["mesh".to_owned(), "service.consul".to_owned(), "demo".to_owned(), "in.mesh".to_owned()];
    let naming = Naming { suffixes: &suffixes, datacenters: &[], vip: &world.vips, ttl: Duration::from_secs(5), ipv6 };
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
        Answer::Services { ttl, records, addresses } => {
            expected(ttl);
            assert!(records.iter().all(|(_, _, _, target)| {
                let of_target = answer(&snapshot, &naming, target, Question::Any);
                of_target == Answer::Addresses { ttl, addresses: addresses.clone() }
            }));
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
    use Question::{A, Aaaa, Any, Other, Ptr, Srv};
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
        ("world", Any, "V4"),
        ("v2.world.service.consul", Srv, "0 0 80 world--tag-v2.mesh, 0 0 81 world--tag-v2.mesh"),
        ("_world._v2.service.consul", Srv, "0 0 80 world--tag-v2.mesh, 0 0 81 world--tag-v2.mesh"),
        ("_World._V2.mesh", Any, "0 0 80 world--tag-v2.mesh, 0 0 81 world--tag-v2.mesh"),
        ("_world._v3.service.consul", Srv, "forward"),
        ("_world._v3.mesh", Srv, "no such name"),
        ("_tcp.world.mesh", A, "no data"),
        ("_tcp.nobody.mesh", A, "no such name"),
        ("in.mesh", A, "no data"),
        ("world.in.mesh", A, "V4"),
        ("out.mesh", A, "no such name"),
        ("_http._udp.world.mesh", Srv, "no such name"),
        ("_http._tcp.nobody.mesh", Srv, "no such name"),
        ("_http._tcp.example.com", Srv, "forward"),
        ("PTR4", Ptr, "world.mesh"),
        ("PTR6.", Ptr, "world.mesh"),
        ("1.0.0.10.in-addr.arpa", Ptr, "forward"),
        ("0.10.in-addr.arpa", Ptr, "forward"),
        ("PTR4", Any, "world.mesh"),
        ("PTR4", A, "no data"),
        ("254.255.240.240.in-addr.arpa", Ptr, "no such name"),
        ("255.240.240.in-addr.arpa", Ptr, "no data"),
        ("240.240.IN-ADDR.arpa", Other, "no data"),
        ("240.in-addr.arpa", Ptr, "forward"),
        ("01.0.240.240.in-addr.arpa", Ptr, "forward"),
        ("x.0.240.240.in-addr.arpa", Ptr, "forward"),
        (".240.240.in-addr.arpa", Ptr, "forward"),
        ("in-addr.arpa", Ptr, "forward"),
        ("f.0.PTR6", Ptr, "forward"),
        ("1.2.3.4.5.in-addr.arpa", Ptr, "forward"),
        ("300.0.0.10.in-addr.arpa", Ptr, "forward"),
    ] {
        assert_eq!(ask(false, name, question), expected, "{name} {question:?}");
    }
    assert_eq!(ask(true, "world.mesh", Aaaa), "V6");
    assert_eq!(ask(true, "world.mesh", A), "V4");
    assert_eq!(ask(true, "world.mesh", Any), "V4 V6");
    assert_eq!(ask(true, "world", Srv), both);
}

#[test]
fn what_may_become_a_name_of_the_mesh() {
    let suffixes = ["mesh".to_owned(), "service.consul".to_owned()];
    let datacenters = [("service.dc2.consul".to_owned(), "dc2".to_owned())];
    let world = World::default();
    let naming =
        Naming { suffixes: &suffixes, datacenters: &datacenters, vip: &world.vips, ttl: Duration::ZERO, ipv6: false };
    for name in ["later", "Later.", "later.mesh", "later.Service.Consul.", "v2.later.service.dc2.consul"] {
        assert!(may_appear(&naming, name), "{name}");
    }
    for name in ["", ".", "localhost", "service.consul", "example.com", "latermesh.com", "node.consul"] {
        assert!(!may_appear(&naming, name), "{name}");
    }
}

#[test]
fn a_mesh_name_with_a_search_domain_behind_it_is_known_for_what_it_is() {
    let suffixes = ["mesh".to_owned(), "service.consul".to_owned()];
    let world = World::default();
    let snapshot = snapshot(&world);
    let naming = Naming { suffixes: &suffixes, datacenters: &[], vip: &world.vips, ttl: Duration::ZERO, ipv6: false };
    let searched = ["eu.internal".to_owned(), "Corp.Example.".to_owned(), String::new(), ".".to_owned()];
    let is = |name: &str| is_searched(&snapshot, &naming, &searched, name);
    for name in [
        "world.eu.internal",
        "WORLD.corp.example.",
        "world.mesh.eu.internal",
        "v2.world.mesh.eu.internal",
        "_http._tcp.world.corp.example",
    ] {
        assert!(is(name), "{name}");
    }
    for name in ["eu.internal", ".eu.internal", "nobody.eu.internal", "worldeu.internal", "world.example.com", "world"]
    {
        assert!(!is(name), "{name}");
    }
    assert!(!is_searched(&snapshot, &naming, &[], "world.eu.internal"));
}

#[test]
fn a_name_stands_for_a_service() {
    let world = World::default();
    let snapshot = snapshot(&world);
    let suffixes = ["svc.mesh".to_owned()];
    let naming = Naming { suffixes: &suffixes, datacenters: &[], vip: &world.vips, ttl: Duration::ZERO, ipv6: false };
    let found = |name| service(&snapshot, &naming, name).map(|service| service.name.as_str());
    assert_eq!(found("World.svc.mesh."), Some("world"));
    assert_eq!((found("world.mesh"), found("svc.mesh"), found("")), (None, None, None));
    assert_eq!(answer(&snapshot, &naming, "svc.mesh", Question::A), Answer::NoData { ttl: Duration::ZERO });
}

proptest::proptest! {
    #[test]
    fn no_question_makes_it_panic(name in proptest::prelude::any::<String>(), digits in "[0-9a-f.]{0,70}") {
        let world = World::default();
        let snapshot = snapshot(&world);
        let suffixes = ["mesh".to_owned()];
        let naming =
            Naming { suffixes: &suffixes, datacenters: &[], vip: &world.vips, ttl: Duration::ZERO, ipv6: true };
        let forms = [name.clone(), format!("{name}.mesh"), format!("_{name}._tcp.mesh"), format!("_world._{name}.mesh")];
        for name in forms.into_iter().chain([format!("{digits}.ip6.arpa"), format!("{digits}.in-addr.arpa")]) {
            for question in [Question::A, Question::Ptr, Question::Srv, Question::Any] {
                let _answer = answer(&snapshot, &naming, &name, question);
            }
            let _searched = is_searched(&snapshot, &naming, &[name.clone(), digits.clone()], &name);
            let _may = may_appear(&naming, &name);
        }
    }

    #[test]
    fn every_address_and_its_name_are_one(v4: [u8; 4], v6: [u8; 16]) {
        let (v4, v6) = (Ipv4Addr::from(v4), Ipv6Addr::from(v6));
        let octets = v4.octets();
        let name = format!("{}.{}.{}.{}.in-addr.arpa", octets[3], octets[2], octets[1], octets[0]);
        proptest::prop_assert_eq!(reverse(&name), Some(IpNet::from(IpAddr::from(v4))));
        let digits: Vec<_> = format!("{:032x}", u128::from(v6)).chars().rev().map(String::from).collect();
        let name = format!("{}.ip6.arpa", digits.join("."));
        proptest::prop_assert_eq!(reverse(&name), Some(IpNet::from(IpAddr::from(v6))));
    }
}

//! Names as real resolvers ask for them: glibc, musl, c-ares, Java's, busybox and dig, in a namespace with the kernel's
//! hooks, the agent's own DNS server and a resolver of the task that is an unmodified dnsmasq.
//!
//! Needs programs that may be loaded into the kernel as well; then it is as quick as the rest of this tier.

mod bed;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use mesh_tests::{tier, until::Checks};

use bed::{Bed, Client, RESOLVER, SECOND};

/// Virtual addresses, and what the resolver of the task says.
const WORLD: &str = "240.240.0.1";
const TAGGED: &str = "240.240.0.2";
const ELSEWHERE: &str = "10.90.0.9";

/// A client that gives a resolver up itself does so later.
const OWN_TIMEOUT: Duration = Duration::from_secs(4);

#[test]
fn every_resolver_finds_every_name() -> Result<()> {
    let Some(bed) = Bed::new()? else { return Ok(()) };
    bed.resolv_conf(&[RESOLVER], "search corp.test")?;
    let mut checks = Checks::default();
    for client in bed.clients() {
        for (name, expected) in [
            ("world", WORLD),
            ("world.mesh", WORLD),
            ("world.mesh.", WORLD),
            ("WoRLd.Mesh", WORLD),
            ("world.service.consul", WORLD),
            ("v2.world.service.consul", TAGGED),
            ("world--tag-v2", TAGGED),
            ("elsewhere.example", ELSEWHERE),
            (bed::LONG, ELSEWHERE),
            ("nobody.mesh", "no such name"),
            ("nobody.example", "no such name"),
            ("nobody", "no such name"),
        ] {
            checks.run(&format!("{client}: {name}"), || {
                let said = bed.look_up(client, name)?;
                ensure!(said == expected, "{said:?} and not {expected:?}");
                Ok(())
            });
        }
        checks.run(&format!("{client}: a hundred addresses, which do not fit a datagram"), || {
            let found = bed.look_up(client, "many.example")?.split(' ').filter(|it| it.starts_with("10.91.")).count();
            // musl before 1.2.4 knows no TCP: it is content with what there is room for.
            ensure!(found == 100 || client == Client::Musl && found > 0, "{found}");
            Ok(())
        });
        if client.tells_no_data_apart() {
            for name in ["world", "world.mesh", "elsewhere.example"] {
                checks.run(&format!("{client}: {name} exists, without an address of IPv6"), || {
                    let said = bed.look_up_v6(client, name)?;
                    ensure!(said == "no data", "{said:?}");
                    Ok(())
                });
            }
            checks.run(&format!("{client}: what does not exist has none of IPv6 either"), || {
                let said = bed.look_up_v6(client, "nobody.mesh")?;
                ensure!(said == "no such name", "{said:?}");
                Ok(())
            });
        }
    }
    reverse_and_services(&bed, &mut checks);
    checks.run("a hundred clients at once", || bed.crowd(100, "world", WORLD));
    checks.done()
}

/// PTR and SRV, for those who ask for them.
fn reverse_and_services(bed: &Bed, checks: &mut Checks) {
    let node = "const dns = require('dns').promises; const show = it => console.log(JSON.stringify(it));";
    let asks: &[(&str, &[&str], &str)] = &[
        ("glibc: PTR", &["getent", "hosts", WORLD], "world.mesh"),
        ("musl: PTR", &["MUSL", "ptr", WORLD], "world.mesh"),
        ("dig: PTR", &["dig", "+short", "-x", TAGGED], "world--tag-v2.mesh.\n"),
        ("dig: PTR of nobody", &["dig", "-x", "240.240.9.9"], "status: NXDOMAIN"),
        ("dig: PTR of the resolver's own", &["dig", "+short", "-x", ELSEWHERE], "elsewhere.example.\n"),
        ("dig: SRV", &["dig", "+short", "SRV", "_http._tcp.world"], "0 0 80 world.mesh.\n"),
        ("dig: SRV as Consul has it", &["dig", "+short", "SRV", "world.service.consul"], "0 0 80 world.mesh.\n"),
        ("dig: SRV of a tag", &["dig", "+short", "SRV", "_world._v2.service.consul"], "0 0 80 world--tag-v2.mesh.\n"),
        ("dig: the target's address comes along", &["dig", "SRV", "world.mesh"], "ADDITIONAL: 2"),
        ("dig: TCP", &["dig", "+tcp", "+short", "v2.world.service.consul"], "240.240.0.2\n"),
        ("dig: ANY", &["dig", "+short", "ANY", "world.mesh"], "240.240.0.1\n"),
        ("dig: case", &["dig", "wORLD.MEsh"], "wORLD.MEsh.\t\t5\tIN\tA\t240.240.0.1"),
        ("dig: EDNS is answered", &["dig", "world.mesh"], "EDNS: version: 0, flags:; udp: 1232"),
        ("dig: without EDNS many come over TCP", &["dig", "+noedns", "many.example"], "ANSWER: 100"),
        ("dig: and what does not fit says so", &["dig", "+noedns", "+ignore", "many.example"], " tc "),
        ("dig: who says no", &["dig", "nobody.mesh"], "AUTHORITY: 1"),
        ("dig: for how long", &["dig", "nobody.mesh"], "mesh.\t\t\t5\tIN\tSOA"),
        ("dig: the answer seems to come from whom it asked", &["dig", "world"], "SERVER: 10.53.0.1#53"),
        ("busybox", &["busybox", "nslookup", "world.mesh"], WORLD),
        (
            "c-ares: SRV",
            &["node", "-e", &format!("{node} dns.resolveSrv('_http._tcp.world.mesh').then(show)")],
            r#"[{"name":"world.mesh","port":80,"priority":0,"weight":0}]"#,
        ),
        ("c-ares: PTR", &["node", "-e", &format!("{node} dns.reverse('{WORLD}').then(show)")], r#"["world.mesh"]"#),
        (
            "c-ares: by TTL",
            &["node", "-e", &format!("{node} dns.resolve4('world.mesh', {{ttl: true}}).then(show)")],
            r#"[{"address":"240.240.0.1","ttl":5}]"#,
        ),
    ];
    for (what, argv, expected) in asks {
        checks.run(what, || {
            let said = bed.run(argv)?;
            ensure!(said.contains(expected), "{said}");
            Ok(())
        });
    }
}

#[test]
fn search_domains_and_options_lead_to_the_same_names() -> Result<()> {
    let Some(bed) = Bed::new()? else { return Ok(()) };
    let mut checks = Checks::default();
    for (options, clients) in [
        ("", &[Client::Glibc, Client::Musl][..]),
        ("search corp.test\noptions ndots:1", &[Client::Glibc, Client::Musl, Client::Node]),
        ("search corp.test eu.internal\noptions ndots:5", &[Client::Glibc, Client::Musl, Client::Node]),
        ("search corp.test\noptions edns0 trust-ad", &[Client::Glibc]),
        ("search corp.test\noptions single-request", &[Client::Glibc]),
        ("search corp.test\noptions single-request-reopen", &[Client::Glibc]),
        ("search corp.test\noptions use-vc", &[Client::Glibc]),
        ("search corp.test\noptions timeout:1 attempts:1", &[Client::Glibc, Client::Musl]),
    ] {
        bed.resolv_conf(&[RESOLVER], options)?;
        for client in clients.iter().filter(|client| bed.clients().contains(client)) {
            checks.run(&format!("{client}: {options:?}"), || {
                for (name, expected) in [
                    ("world", WORLD),
                    ("world.mesh", WORLD),
                    ("elsewhere.example", ELSEWHERE),
                    ("nobody", "no such name"),
                ] {
                    let said = bed.look_up(*client, name)?;
                    ensure!(said == expected, "{name}: {said:?} and not {expected:?}");
                }
                Ok(())
            });
        }
    }
    bed.resolv_conf(&[RESOLVER], "search corp.test")?;
    checks.run("a name that the search domain has is the search domain's", || {
        let said = bed.look_up(Client::Glibc, "taken")?;
        ensure!(said == ELSEWHERE, "{said:?}: `taken` is a service too, but `taken.corp.test` comes first");
        Ok(())
    });
    checks.done()
}

#[test]
fn mesh_names_outlive_the_tasks_resolver() -> Result<()> {
    let Some(mut bed) = Bed::new()? else { return Ok(()) };
    let mut checks = Checks::default();
    for silent in [false, true] {
        let _held = bed.kill_resolver(silent)?;
        let how = if silent { "silent" } else { "gone" };
        let mut slowest = Duration::ZERO;
        for options in ["", "search corp.test", "search corp.test eu.internal\noptions ndots:5"] {
            bed.resolv_conf(&[RESOLVER], options)?;
            for (client, name) in bed.clients().into_iter().flat_map(|it| [(it, "world"), (it, "world.mesh")]) {
                checks.run(&format!("{client}: {name} while the resolver is {how}, {options:?}"), || {
                    let begun = Instant::now();
                    let said = bed.look_up(client, name)?;
                    let took = begun.elapsed();
                    slowest = slowest.max(took);
                    ensure!(said == WORLD && took < OWN_TIMEOUT, "{said:?} after {took:?}");
                    Ok(())
                });
            }
        }
        tier::figure(&format!("dns_mesh_name_while_resolver_{how}_slowest"), slowest.as_secs_f64(), "s");
        checks.run(&format!("other names fail while it is {how}, and say that it may pass"), || {
            bed.resolv_conf(&[RESOLVER], "options timeout:1 attempts:1")?;
            let said = bed.look_up(Client::Python, "elsewhere.example")?;
            ensure!(said == "try again", "{said:?}");
            Ok(())
        });
    }
    checks.done()
}

#[test]
fn one_of_two_resolvers_is_enough() -> Result<()> {
    let Some(bed) = Bed::new()? else { return Ok(()) };
    let _silent = bed.silent(SECOND)?;
    let mut checks = Checks::default();
    if bed.clients().contains(&Client::Musl) {
        bed.resolv_conf(&[RESOLVER, SECOND], "")?;
        checks.run("musl, heard only when it has asked all", || {
            let begun = Instant::now();
            // A and AAAA of both.
            let said = bed.run_unheard(4, &["MUSL", "4", "elsewhere.example"])?;
            // It asks again after 2.5 s.
            ensure!(said.trim() == ELSEWHERE && begun.elapsed() < Duration::from_secs(2), "{said:?}");
            Ok(())
        });
    }
    // glibc asks the first; musl asks both at once from one socket, of which the hook knows only the last.
    for servers in [[RESOLVER, SECOND], [SECOND, RESOLVER]] {
        bed.resolv_conf(&servers, "options timeout:1")?;
        for client in bed.clients().into_iter().filter(|it| matches!(it, Client::Musl | Client::Glibc)) {
            checks.run(&format!("{client} with {servers:?}"), || {
                for (name, expected) in [("elsewhere.example", ELSEWHERE), ("world", WORLD)] {
                    let begun = Instant::now();
                    let said = bed.look_up(client, name)?;
                    ensure!(said == expected, "{name}: {said:?}");
                    ensure!(
                        client != Client::Musl || begun.elapsed() < Duration::from_secs(1),
                        "{:?}",
                        begun.elapsed()
                    );
                }
                Ok(())
            });
        }
    }
    checks.done()
}

#[test]
fn without_the_agent_a_task_has_its_own_resolver() -> Result<()> {
    let Some(mut bed) = Bed::new()? else { return Ok(()) };
    bed.resolv_conf(&[RESOLVER], "search corp.test\noptions timeout:1 attempts:1")?;
    let mut checks = Checks::default();
    let mut look = |bed: &Bed, when: &str, world: &str| {
        for client in bed.clients() {
            checks.run(&format!("{client}: {when}"), || {
                for (name, expected) in [("elsewhere.example", ELSEWHERE), ("world", world)] {
                    let said = bed.look_up(client, name)?;
                    ensure!(said == expected, "{name}: {said:?} and not {expected:?}");
                }
                Ok(())
            });
        }
    };
    look(&bed, "the agent lives", WORLD);
    bed.hang_agent(true)?;
    look(&bed, "it hangs", "no such name");
    bed.hang_agent(false)?;
    look(&bed, "it is back", WORLD);
    bed.end_agent();
    look(&bed, "it has died", "no such name");
    checks.done()
}

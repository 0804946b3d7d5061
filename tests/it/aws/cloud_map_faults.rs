//! What moto does not do: pages, throttling, silence, garbage, refusals, a service that is only half there.
//!
//! The double speaks AWS's protocol, and AWS's own description of the API judges what it was asked and what it said.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use mesh_tests::{
    aws::{
        Api,
        double::{Double, Said},
    },
    tier::{Tier, figure, require},
    until::until,
};
use serde_json::{Value, json};

use super::running::{LIMIT, Running};

const NAMESPACE: &str = "namespaces = [\"my.demo\"]\n";

fn namespaces(names: &[&str]) -> Said {
    let one = |name: &&str| json!({ "Id": format!("ns-{name}"), "Name": name, "Type": "HTTP", "CreateDate": 1.79e9 });
    Said::Ok(json!({ "Namespaces": names.iter().map(one).collect::<Vec<_>>() }))
}

fn services<'a>(names: impl IntoIterator<Item = &'a str>) -> Said {
    let one = |name: &str| json!({ "Id": format!("srv-{name}"), "Name": name, "Type": "HTTP" });
    Said::Ok(json!({ "Services": names.into_iter().map(one).collect::<Vec<_>>() }))
}

fn instances(namespace: &str, service: &str, last: &[u8]) -> Said {
    let one = |n: &u8| {
        json!({
            "InstanceId": format!("i-{n}"), "NamespaceName": namespace, "ServiceName": service,
            "HealthStatus": "HEALTHY",
            "Attributes": { "AWS_INSTANCE_IPV4": format!("10.0.0.{n}"), "AWS_INSTANCE_PORT": "80" },
        })
    };
    Said::Ok(json!({ "Instances": last.iter().map(one).collect::<Vec<_>>(), "InstancesRevision": 1 }))
}

/// One namespace, one service, one instance.
fn usual(action: &str, request: &Value) -> Said {
    match action {
        "ListNamespaces" => namespaces(&["my.demo"]),
        "ListServices" => services(["server"]),
        _ => instances(text(request, "NamespaceName"), text(request, "ServiceName"), &[1]),
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

const SEEN: &[(&str, &[&str])] = &[("server", &["80 10.0.0.1:80"])];

#[test]
fn every_page_is_read_and_namespaces_are_told_apart() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let double = Double::start(Api::CloudMap, |action, request| match action {
        // The second page has what is looked for.
        "ListNamespaces" if request["NextToken"].is_null() => {
            Said::Ok(json!({ "Namespaces": [{ "Id": "ns-x", "Name": "x" }], "NextToken": "more" }))
        }
        "ListNamespaces" => namespaces(&["my.demo", "other.demo"]),
        "ListServices" => {
            let (page, next) = match request["NextToken"].as_str() {
                None => (0, Some("1")),
                Some("1") => (1, Some("2")),
                Some(_) => (2, None),
            };
            // Both namespaces have a `server`, and the second one nothing else.
            let of_first = request["Filters"][0]["Values"][0] == "ns-my.demo";
            let names =
                if of_first { vec![format!("page-{page}"), "server".to_owned()] } else { vec!["server".into()] };
            let Said::Ok(mut said) = services(names.iter().map(String::as_str)) else { return Said::Nothing };
            if let Some(next) = next {
                said["NextToken"] = next.into();
            }
            Said::Ok(said)
        }
        _ => {
            let namespace = text(request, "NamespaceName");
            instances(namespace, text(request, "ServiceName"), &[if namespace == "my.demo" { 1 } else { 2 }])
        }
    })?;
    let running = Running::cloud_map(&double.address(), "namespaces = [\"my.demo\", \"other.demo\"]\nrate = 50")?;
    let first: &[&str] = &["80 10.0.0.1:80"];
    running.await_seen(&[
        ("page-0", first),
        ("page-1", first),
        ("page-2", first),
        ("server", first),
        ("server--dc-other-demo", &["80 10.0.0.2:80"]),
    ])?;
    running.await_well()?;
    double.judge()
}

#[test]
fn throttling_is_answered_by_asking_less() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let double = Double::start(Api::CloudMap, usual)?;
    let running = Running::cloud_map(&double.address(), &format!("{NAMESPACE}rate = 20"))?;
    running.await_seen(SEEN)?;
    for (status, code) in [(400, "RequestLimitExceeded"), (400, "ThrottlingException"), (429, "Whatever")] {
        double.change(move |_, _| Said::Error(status, code, "Rate exceeded"));
        running.await_error("AWS says that it is asked too often (")?;
        running.await_seen(SEEN)?;
        double.change(usual);
        running.await_well()?;
    }
    // A span of time is what is measured here: each refusal makes the next question wait longer.
    double.change(|_, _| Said::Error(400, "RequestLimitExceeded", ""));
    running.await_error("RequestLimitExceeded")?;
    let before = double.asked().len();
    thread::sleep(Duration::from_secs(4));
    let asked = double.asked().len() - before;
    figure("cloud_map_questions_in_4s_while_throttled", f64::from(u32::try_from(asked)?), "");
    ensure!((1..=16).contains(&asked), "{asked} questions in four seconds, where 20 a second are configured");
    double.change(usual);
    running.await_well()?;
    double.judge()
}

/// AWS has a quota of its own for the instances: lists that are asked for too often say nothing about it.
#[test]
fn throttled_lists_leave_health_fresh() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let double = Double::start(Api::CloudMap, usual)?;
    let running = Running::cloud_map(&double.address(), NAMESPACE)?;
    running.await_seen(SEEN)?;
    running.uses.note(&"server".parse()?);
    let asked = |action: &str| double.asked().iter().filter(|it| it.action == action).count();
    let throttled = |ill: bool| {
        move |action: &str, request: &Value| match (action, usual(action, request)) {
            ("ListServices", _) => Said::Error(400, "ThrottlingException", "Rate exceeded"),
            ("DiscoverInstances", Said::Ok(mut said)) if ill => {
                said["Instances"][0]["HealthStatus"] = "UNHEALTHY".into();
                Said::Ok(said)
            }
            (_, said) => said,
        }
    };
    double.change(throttled(false));
    running
        .await_error("AWS says that it is asked too often (ThrottlingException for servicediscovery:ListServices)")?;
    let before = asked("ListServices");
    until(LIMIT, "lists are asked for less and less", || {
        let times = asked("ListServices") - before;
        Ok(if times >= 3 { Ok(()) } else { Err(times) })
    })?;
    for ill in [true, false] {
        let began = Instant::now();
        double.change(throttled(ill));
        running.await_seen(if ill { &[("server", &[])] } else { SEEN })?;
        let took = began.elapsed();
        figure("cloud_map_health_while_lists_are_throttled", took.as_secs_f64(), "s");
        ensure!(took < Duration::from_secs(2), "{took:?}, with an interval of 1 s");
    }
    ensure!(running.error().is_some_and(|error| error.contains("ListServices")), "{:?}", running.error());
    double.change(usual);
    running.await_well()?;
    double.judge()
}

#[test]
fn each_plane_has_an_endpoint_of_its_own() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let (control, data) = (Double::start(Api::CloudMap, usual)?, Double::start(Api::CloudMap, usual)?);
    let running =
        Running::cloud_map(&control.address(), &format!("{NAMESPACE}data_endpoint = \"{}\"", data.address()))?;
    running.await_seen(SEEN)?;
    let all = |double: &Double| double.asked().into_iter().map(|it| it.action).collect::<BTreeSet<_>>();
    ensure!(all(&control).iter().eq(["ListNamespaces", "ListServices"]), "{:?}", all(&control));
    ensure!(all(&data).iter().eq(["DiscoverInstances"]), "{:?}", all(&data));
    control.judge()?;
    data.judge()
}

#[test]
fn pages_of_a_list_keep_the_rate() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let double = Double::start(Api::CloudMap, |action, request| match action {
        "ListServices" => {
            let page = request["NextToken"].as_str().and_then(|page| page.parse::<u32>().ok()).unwrap_or(0);
            let Said::Ok(mut said) = services([format!("s{page:02}").as_str()]) else { return Said::Nothing };
            if page < 19 {
                said["NextToken"] = (page + 1).to_string().into();
            }
            Said::Ok(said)
        }
        _ => usual(action, request),
    })?;
    let running = Running::cloud_map(&double.address(), &format!("{NAMESPACE}rate = 5"))?;
    until(LIMIT, "all are known", || {
        let seen = running.seen().len();
        Ok(if seen == 20 { Ok(()) } else { Err(format!("{seen}; {:?}", running.error())) })
    })?;
    for action in ["List", "DiscoverInstances"] {
        let asked: Vec<_> = double.asked().into_iter().filter(|it| it.action.starts_with(action)).collect();
        for (n, first) in asked.iter().enumerate() {
            let within = asked[n..].iter().filter(|it| it.at < first.at + Duration::from_secs(1)).count();
            // A burst of eight, and the rate; one that was asked late because the machine is busy counts later.
            ensure!(within <= 8 + 5 + 2, "{within} questions {action}… in a second");
        }
    }
    double.judge()
}

#[test]
fn the_rate_is_kept_with_many_services() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let names: Vec<String> = (0..60).map(|n| format!("s{n:02}")).collect();
    let double = Double::start(Api::CloudMap, move |action, request| match action {
        "ListServices" => services(names.iter().map(String::as_str)),
        _ => usual(action, request),
    })?;
    let began = Instant::now();
    let more = format!("{NAMESPACE}rate = 20\n");
    let running = Running::cloud_map(&double.address(), &more)?;
    until(LIMIT, "all are known", || {
        let seen = running.seen().len();
        Ok(if seen == 60 { Ok(()) } else { Err(format!("{seen}; {:?}", running.error())) })
    })?;
    figure("cloud_map_60_services_at_20_per_second", began.elapsed().as_secs_f64(), "s");
    running.await_answers(60)?;
    let asked: Vec<_> = double.asked().into_iter().filter(|it| it.action == "DiscoverInstances").collect();
    for (n, first) in asked.iter().enumerate() {
        let within = asked[n..].iter().filter(|it| it.at < first.at + Duration::from_secs(1)).count();
        // A burst of the rate, and the rate; a question that was asked late because the machine is busy counts later.
        ensure!(within <= 20 + 20 + 4, "{within} questions in a second");
    }
    double.judge()
}

#[test]
fn what_tasks_use_is_asked_for_often() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let double = Double::start(Api::CloudMap, |action, request| match action {
        "ListServices" => services(["idle", "used"]),
        _ => usual(action, request),
    })?;
    let running = Running::cloud_map(&double.address(), &format!("{NAMESPACE}idle_interval = \"1h\""))?;
    running.await_seen(&[("idle", &["80 10.0.0.1:80"]), ("used", &["80 10.0.0.1:80"])])?;
    running.uses.note(&"used".parse()?);
    let asked = |name: &str| double.asked().iter().filter(|it| text(&it.body, "ServiceName") == name).count();
    until(LIMIT, "it is asked for again and again", || {
        let times = asked("used");
        Ok(if times >= 4 { Ok(()) } else { Err(times) })
    })?;
    ensure!(asked("idle") == 1, "{}", asked("idle"));
    double.judge()
}

#[test]
fn whatever_is_wrong_is_named_and_nothing_is_lost() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let double = Double::start(Api::CloudMap, usual)?;
    let running = Running::cloud_map(&double.address(), NAMESPACE)?;
    running.await_seen(SEEN)?;
    type Wrong = (fn(&str, &Value) -> Said, &'static str);
    let wrongs: [Wrong; 10] = [
        (
            |action, request| match action {
                "DiscoverInstances" => Said::Error(
                    400,
                    "AccessDeniedException",
                    "User: arn:aws:sts::1:assumed-role/agent is not authorized to perform: servicediscovery:DiscoverInstances",
                ),
                _ => usual(action, request),
            },
            "the agent's role needs the IAM action servicediscovery:DiscoverInstances",
        ),
        (
            |action, request| match action {
                "ListServices" => Said::Error(400, "AccessDeniedException", "no"),
                _ => usual(action, request),
            },
            "the agent's role needs the IAM action servicediscovery:ListServices",
        ),
        (
            |_, _| Said::Error(400, "UnrecognizedClientException", "The security token is invalid"),
            "agent's credentials",
        ),
        (|_, _| Said::Error(400, "ExpiredTokenException", "The security token expired"), "agent's credentials"),
        (|_, _| Said::Error(403, "RequestTimeTooSkewed", "The difference is too large"), "set this host's clock"),
        (
            |_, _| Said::Error(400, "InvalidSignatureException", "Signature expired: 20260101T000000Z is now earlier"),
            "set this host's clock",
        ),
        (|_, _| Said::Error(500, "InternalFailure", "oops"), "InternalFailure: oops"),
        (|_, _| Said::Raw(200, "<html>hello</html>"), "is not what AWS gives"),
        (|_, _| Said::Raw(200, "{}"), "is not what AWS gives"),
        (
            |_, _| Said::Raw(200, "{\"Instances\":[{\"InstanceId\":7}],\"Services\":7,\"Namespaces\":7}"),
            "is not what AWS",
        ),
    ];
    for (wrong, expected) in wrongs {
        double.change(wrong);
        running.await_error(expected)?;
        running.await_seen(SEEN)?;
        double.change(usual);
        running.await_well()?;
        running.await_seen(SEEN)?;
    }
    Ok(())
}

#[test]
fn silence_is_noticed() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let double = Double::start(Api::CloudMap, usual)?;
    let running = Running::cloud_map(&double.address(), NAMESPACE)?;
    running.await_seen(SEEN)?;
    double.change(|_, _| Said::Nothing);
    running.await_error("did not answer servicediscovery:")?;
    running.await_seen(SEEN)?;
    double.change(usual);
    running.await_well()
}

#[test]
fn a_service_that_is_half_deleted_stays_until_the_list_says_so() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let listed = Arc::new(AtomicBool::new(true));
    let (told, is_listed) = (Arc::new(AtomicUsize::new(0)), listed.clone());
    let count = told.clone();
    let double = Double::start(Api::CloudMap, usual)?;
    let running = Running::cloud_map(&double.address(), NAMESPACE)?;
    running.await_seen(SEEN)?;
    double.change(move |action, request| match action {
        "ListServices" if !is_listed.load(Ordering::Relaxed) => services([]),
        "DiscoverInstances" => {
            count.fetch_add(1, Ordering::Relaxed);
            Said::Error(400, "ServiceNotFound", "server")
        }
        _ => usual(action, request),
    });
    running.await_error("AWS does not know what servicediscovery:DiscoverInstances asked for")?;
    until(LIMIT, "it was asked for again", || {
        let times = told.load(Ordering::Relaxed);
        Ok(if times >= 2 { Ok(()) } else { Err(times) })
    })?;
    running.await_seen(SEEN)?;
    listed.store(false, Ordering::Relaxed);
    running.await_seen(&[])?;
    running.await_well()
}

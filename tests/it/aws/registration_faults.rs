//! A Cloud Map that is late, throttles, refuses or says nothing, and what becomes of the registrations.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use mesh_core::task::{ContainerHealth, Task};
use mesh_tests::{
    aws::{
        Api,
        double::{Double, Said},
    },
    tier::{Tier, figure, require},
    until::until,
};
use serde_json::{Value, json};

use super::registration::start;
use crate::registering::{LIMIT, task};

/// One namespace and one service, and what is in it. Requests are carried out after `late`.
#[derive(Clone, Default)]
struct Cloud(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    late: Duration,
    /// By id: attributes, health, and since when that is seen.
    instances: BTreeMap<String, (Value, &'static str, Instant)>,
    removed: BTreeMap<String, (Value, &'static str, Instant)>,
}

impl Cloud {
    fn late(late: Duration) -> Self {
        Self(Arc::new(Mutex::new(State { late, ..State::default() })))
    }

    fn answer(&self, action: &str, request: &Value) -> Said {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let at = now + state.late;
        let id = request["InstanceId"].as_str().unwrap_or_default().to_owned();
        let operation = Said::Ok(json!({ "OperationId": "op-1" }));
        match action {
            "ListNamespaces" => {
                Said::Ok(json!({ "Namespaces": [{ "Id": "ns-1", "Name": "my.demo", "Type": "HTTP" }] }))
            }
            "ListServices" => Said::Ok(json!({ "Services": [{
                "Id": "srv-world", "Name": "world", "Type": "HTTP", "HealthCheckCustomConfig": { "FailureThreshold": 1 },
            }] })),
            "RegisterInstance" => {
                state.instances.insert(id, (request["Attributes"].clone(), "HEALTHY", at));
                operation
            }
            "DeregisterInstance" => match state.instances.remove(&id) {
                Some((attributes, health, _)) => {
                    state.removed.insert(id, (attributes, health, at));
                    operation
                }
                None => Said::Error(400, "InstanceNotFound", "no such instance"),
            },
            "UpdateInstanceCustomHealthStatus" => {
                let health = if request["Status"] == "HEALTHY" { "HEALTHY" } else { "UNHEALTHY" };
                match state.instances.get_mut(&id) {
                    Some(instance) => {
                        instance.1 = health;
                        Said::Ok(Value::Null)
                    }
                    None => Said::Error(400, "InstanceNotFound", "no such instance"),
                }
            }
            "DiscoverInstances" => {
                let there = state.instances.iter().filter(|(_, (.., since))| *since <= now);
                let still = state.removed.iter().filter(|(_, (.., until))| *until > now);
                let one = |(id, (attributes, health, _)): (&String, &(Value, &'static str, Instant))| {
                    json!({ "InstanceId": id, "NamespaceName": "my.demo", "ServiceName": "world",
                            "HealthStatus": health, "Attributes": attributes })
                };
                let all: Vec<Value> = there.chain(still).map(one).collect();
                Said::Ok(json!({ "Instances": all, "InstancesRevision": 1 }))
            }
            other => panic!("{other} is not expected"),
        }
    }

    fn script(&self) -> impl FnMut(&str, &Value) -> Said + Send + 'static {
        let cloud = self.clone();
        move |action, request| cloud.answer(action, request)
    }

    /// `id health` of everything that is there, also what is not seen yet.
    fn instances(&self) -> Vec<String> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.instances.iter().map(|(id, (_, health, _))| format!("{id} {health}")).collect()
    }

    fn await_instances(&self, expected: &[&str]) -> Result<()> {
        until(LIMIT, &format!("{expected:?}"), || {
            let found = self.instances();
            Ok(if found == expected { Ok(()) } else { Err(format!("{found:?}")) })
        })
    }
}

fn count(double: &Double, action: &str) -> usize {
    double.asked().iter().filter(|it| it.action == action).count()
}

fn ill(task: &Task) -> Task {
    let mut task = task.clone();
    task.containers[0].health = Some(ContainerHealth::Unhealthy);
    task
}

const ONE: &str = "ecs-mesh:10.90.1.10:32768:t1 HEALTHY";

#[test]
fn what_comes_late_is_asked_for_once() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let cloud = Cloud::late(Duration::from_millis(800));
    let double = Double::start(Api::CloudMap, cloud.script())?;
    let one = task("t1", "world", 32768);
    let host = start(&double.address(), "rate = 20", std::slice::from_ref(&one))?;
    cloud.await_instances(&[ONE])?;
    let looks = |more: usize| {
        let goal = count(&double, "DiscoverInstances") + more;
        until(LIMIT, "it has looked again", || {
            let now = count(&double, "DiscoverInstances");
            Ok(if now >= goal { Ok(()) } else { Err(now) })
        })
    };
    looks(4)?;
    ensure!(count(&double, "RegisterInstance") == 1, "{:?}", double.asked());
    host.show(&[ill(&one)]);
    cloud.await_instances(&[&ONE.replace("HEALTHY", "UNHEALTHY")])?;
    looks(3)?;
    host.await_well()?;
    ensure!(count(&double, "UpdateInstanceCustomHealthStatus") == 1, "{:?}", double.asked());
    host.show(&[]);
    cloud.await_instances(&[])?;
    looks(1)?;
    // What is asked for is what is of this host, and nothing else.
    let own = |it: &mesh_tests::aws::double::Question| {
        it.action != "DiscoverInstances" || it.body["QueryParameters"]["ecs-mesh-owner"] == "ecs-mesh@10.90.1.10"
    };
    ensure!(double.asked().iter().all(own));
    host.leave()?;
    ensure!(count(&double, "DeregisterInstance") == 1, "{:?}", double.asked());
    double.judge()
}

#[test]
fn what_is_not_true_any_more_is_put_right() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let cloud = Cloud::default();
    // As an agent left it that crashed, and what looks the same and is another host's.
    let left = |owner: &str| {
        let attributes = json!({ "AWS_INSTANCE_IPV4": "10.90.1.9", "ecs-mesh-owner": owner });
        (attributes, "UNHEALTHY", Instant::now())
    };
    let (id, other) = ("ecs-mesh:10.90.1.10:32768:t1", "ecs-mesh:10.90.1.11:32768:t1");
    {
        let mut state = cloud.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.instances.insert(id.to_owned(), left("ecs-mesh@10.90.1.10"));
        state.instances.insert(other.to_owned(), left("ecs-mesh@10.90.1.11"));
    }
    let double = Double::start(Api::CloudMap, cloud.script())?;
    let host = start(&double.address(), "rate = 20", &[task("t1", "world", 32768)])?;
    cloud.await_instances(&[ONE, &format!("{other} UNHEALTHY")])?;
    host.await_well()?;
    let address = |id: &str| {
        let state = cloud.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.instances.get(id).map(|(attributes, ..)| attributes["AWS_INSTANCE_IPV4"].clone())
    };
    until(LIMIT, "its address is right", || {
        let found = address(id);
        Ok(if found == Some(json!("10.90.1.10")) { Ok(()) } else { Err(format!("{found:?}")) })
    })?;
    ensure!(address(other) == Some(json!("10.90.1.9")));
    host.leave()?;
    cloud.await_instances(&[&format!("{other} UNHEALTHY")])?;
    double.judge()
}

#[test]
fn throttling_is_answered_by_asking_less_and_nothing_is_lost() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let cloud = Cloud::default();
    let double = Double::start(Api::CloudMap, cloud.script())?;
    let tasks: Vec<Task> = (0..20).map(|n| task(&format!("t{n:02}"), "world", 32768 + n)).collect();
    let host = start(&double.address(), "rate = 20", &[])?;
    host.await_well()?;
    double.change(|_, _| Said::Error(400, "ThrottlingException", "Rate exceeded"));
    let before = double.asked().len();
    host.show(&tasks);
    host.await_error("AWS says that it is asked too often (ThrottlingException for servicediscovery:")?;
    // A span of time is what is measured here: each refusal makes the next request wait longer.
    thread::sleep(Duration::from_secs(4));
    let asked = double.asked().len() - before;
    figure("cloud_map_requests_in_4s_while_throttled", f64::from(u32::try_from(asked)?), "");
    // Those that were under way at once, and a few.
    ensure!((1..=20).contains(&asked), "{asked} requests in four seconds, where 20 a second are configured");
    let usual = cloud.clone();
    double.change(usual.script());
    until(LIMIT * 2, "all are registered", || {
        let found = cloud.instances().len();
        Ok(if found == 20 { Ok(()) } else { Err(found) })
    })?;
    host.await_well()?;
    ensure!(host.status.borrow().count == 20);
    for (n, first) in double.asked().iter().enumerate() {
        let within = double.asked()[n..].iter().filter(|it| it.at < first.at + Duration::from_secs(1)).count();
        ensure!(within <= 20 + 20 + 4, "{within} requests in a second");
    }
    host.leave()?;
    ensure!(cloud.instances().is_empty(), "{:?}", cloud.instances());
    double.judge()
}

#[test]
fn a_permission_that_is_missing_is_named() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let cloud = Cloud::default();
    let double = Double::start(Api::CloudMap, cloud.script())?;
    let one = task("t1", "world", 32768);
    let host = start(&double.address(), "rate = 20", &[])?;
    host.await_well()?;
    let refuse = |refused: &'static str| {
        let cloud = cloud.clone();
        double.change(move |action, request| match action {
            action if action == refused => Said::Error(400, "AccessDeniedException", "is not authorized"),
            _ => cloud.answer(action, request),
        });
    };
    let steps: [(&str, Vec<Task>, Vec<&str>); 3] = [
        ("RegisterInstance", vec![one.clone()], vec![ONE]),
        ("UpdateInstanceCustomHealthStatus", vec![ill(&one)], vec!["ecs-mesh:10.90.1.10:32768:t1 UNHEALTHY"]),
        ("DeregisterInstance", vec![], vec![]),
    ];
    for (action, tasks, expected) in steps {
        refuse(action);
        host.show(&tasks);
        host.await_error(&format!("the agent's role needs the IAM action servicediscovery:{action}"))?;
        refuse("nothing");
        cloud.await_instances(&expected)?;
        host.await_well()?;
    }
    double.judge()
}

#[test]
fn an_answer_that_never_comes_does_not_leave_an_instance_behind() -> Result<()> {
    if !require(Tier::Aws) {
        return Ok(());
    }
    let cloud = Cloud::default();
    let double = Double::start(Api::CloudMap, cloud.script())?;
    let host = start(&double.address(), "rate = 20", &[])?;
    host.await_well()?;
    // It is carried out, and the answer is lost.
    let other = cloud.clone();
    double.change(move |action, request| {
        let said = other.answer(action, request);
        if action == "RegisterInstance" { Said::Raw(502, "Bad gateway") } else { said }
    });
    host.show(&[task("t1", "world", 32768)]);
    cloud.await_instances(&[ONE])?;
    host.await_error("servicediscovery:RegisterInstance with status 502")?;
    host.leave()?;
    ensure!(cloud.instances().is_empty(), "{:?}", cloud.instances());
    Ok(())
}

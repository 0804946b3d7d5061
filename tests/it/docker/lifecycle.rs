//! Changes while tasks run: the file of services, tasks that come and go, labels; nothing is restarted.

use std::{collections::BTreeSet, fs, thread, time::Instant};

use anyhow::{Context as _, Result, ensure};
use mesh_lab::Mode;
use mesh_tests::{
    mesh::{LIMIT, Mesh, Placed, Service},
    tier::{Tier, figure, require},
    until::{Checks, until},
};

#[test]
fn changes_reach_running_tasks() -> Result<()> {
    if !require(Tier::Docker) {
        return Ok(());
    }
    let mut mesh = Mesh::up()?;
    mesh.configure(1, "[enrol]\ndefault = false\n")?;
    let client = mesh.task(0, mesh.idle("client"))?;
    let far = |answer: &str| mesh.task(1, mesh.nginx("api", answer, 8080).label("ecs-mesh.enabled", "true"));
    let apis = [far("one")?, far("two")?];
    mesh.services(&[api(&[&apis[0]])], "")?;
    mesh.start()?;
    mesh.await_endpoints(0, "api", 1)?;

    let mut checks = Checks::default();
    checks.run("an endpoint is added to the file", || {
        expect(&mesh, &client, "http://api/", &["one"])?;
        mesh.services(&[api(&[&apis[0], &apis[1]])], "")?;
        mesh.await_endpoints(0, "api", 2)?;
        expect(&mesh, &client, "http://api/", &["one", "two"])
    });
    checks.run("a file with faults changes nothing and is reported", || {
        mesh.write_services(0, "[[service]]\nname = \"api\"\nports = [ { prot = 80 } ]\n[[service]\n")?;
        let error = until(LIMIT, "the status shows the error", || {
            let status = mesh.document(0, &["status"])?;
            let errors = status["sources"].as_array().into_iter().flatten().map(|source| source["last_error"].clone());
            let error = errors.filter_map(|error| error.as_str().map(str::to_owned)).next();
            Ok(error.ok_or("no error"))
        })?;
        ensure!(error.contains("line"), "{error}");
        expect(&mesh, &client, "http://api/", &["one", "two"])?;
        let semantic = "[[service]]\nname = \"api\"\nports = [ { port = 0 } ]\n";
        mesh.write_services(0, semantic)?;
        until(LIMIT, "the status shows the next error", || {
            let status = mesh.document(0, &["status"])?["sources"].to_string();
            Ok(if status.contains("ports") && status.contains("port") && !status.contains(&error) {
                Ok(())
            } else {
                Err(status)
            })
        })?;
        expect(&mesh, &client, "http://api/", &["one", "two"])
    });
    checks.run("the next good file is taken, without the removed endpoint", || {
        mesh.services(&[api(&[&apis[1]])], "")?;
        mesh.await_endpoints(0, "api", 1)?;
        expect(&mesh, &client, "http://api/", &["two"])?;
        let status = mesh.document(0, &["status"])?;
        ensure!(
            status["sources"].as_array().is_some_and(|all| all.iter().all(|one| one["last_error"].is_null())),
            "{status}"
        );
        Ok(())
    });
    let victims =
        [Service::new("victim-bridge", 8080, 8080, "http"), Service::new("victim-awsvpc", 8080, 8080, "http")];
    mesh.services(&[&[api(&[&apis[1]])], &victims[..]].concat(), "")?;
    let before = descriptors(&mut mesh)?;
    checks.run("a task of a new service is reached by its family's name", || {
        let task = mesh.task(0, mesh.nginx("fresh", "fresh", 80))?;
        let script = "until curl -sf --max-time 1 http://fresh/; do :; done";
        let said = mesh.run(&client, &["timeout", "20", "sh", "-c", script])?;
        figure("new_service_reached_after_docker_run", task.task.started.elapsed().as_secs_f64() * 1000.0, "ms");
        ensure!(said.trim() == "fresh", "{said:?}");
        mesh.host(0).stop_task(&task.task)?;
        let gone = mesh.exec(&client, &["curl", "-sS", "--max-time", "5", "http://fresh/"])?;
        ensure!(!gone.ok() || gone.stdout.contains("refused"), "a stopped service still answers: {gone:?}");
        Ok(())
    });
    checks.run("a stopped task gets no connection afterwards, and none fails", || {
        let [stays, goes] = ["stays", "goes"].map(|answer| mesh.task(0, mesh.nginx("pool", answer, 80)));
        let (stays, goes) = (stays?, goes?);
        mesh.await_endpoints(0, "pool", 2)?;
        expect(&mesh, &client, "http://pool/", &["stays", "goes"])?;
        mesh.host(0).stop_task(&goes.task)?;
        let script = "for n in $(seq 20); do curl -sS --max-time 5 http://pool/ 2>&1; done";
        let said = mesh.run(&client, &["sh", "-c", script])?;
        ensure!(said.lines().count() == 20 && said.lines().all(|line| line == "stays"), "{said}");
        mesh.host(0).stop_task(&stays.task)
    });
    checks.run("the label `ecs-mesh.enabled=false` keeps a task out", || {
        let task = mesh.task(0, mesh.idle("outsider").label("ecs-mesh.enabled", "false"))?;
        is_outside(&mesh, &task)?;
        mesh.host(0).stop_task(&task.task)
    });
    checks.run("where enrolment is by choice, only a labelled task is in", || {
        let without = mesh.task(1, mesh.idle("plain"))?;
        is_outside(&mesh, &without)?;
        let with = mesh.task(1, mesh.idle("chosen").label("ecs-mesh.enabled", "true"))?;
        await_task(&mesh, 1, &with)?;
        let said = mesh.run(&with, &["curl", "-sS", "--max-time", "5", "http://api/"])?;
        ensure!(["one", "two"].contains(&said.trim()), "{said:?}");
        [without, with].iter().try_for_each(|placed| mesh.host(1).stop_task(&placed.task))
    });
    checks.run("the label `ecs-mesh.service` names the service", || {
        let task = mesh.task(0, mesh.nginx("some-family", "named", 80).label("ecs-mesh.service", "renamed"))?;
        await_task(&mesh, 0, &task)?;
        expect(&mesh, &client, "http://renamed/", &["named"])?;
        let family = mesh.exec(&client, &["curl", "-sS", "--max-time", "5", "http://some-family/"])?;
        ensure!(!family.ok(), "the family is a name too: {family:?}");
        mesh.host(0).stop_task(&task.task)
    });
    for mode in [Mode::Bridge, Mode::Awsvpc] {
        checks.run(&format!("a {mode:?} task killed in the middle of requests is forgotten wholly"), || {
            killed(&mesh, &client, mode)
        });
    }
    checks.run("the agent keeps no file open for tasks that are gone", || {
        until(LIMIT, "as many files are open as before", || {
            let now = descriptors(&mut mesh)?;
            Ok(if now <= before { Ok(()) } else { Err(format!("{now} files are open, {before} were")) })
        })
    });
    mesh.down()?;
    checks.done()
}

#[test]
fn a_task_is_armed_before_its_first_instruction() -> Result<()> {
    if !require(Tier::Docker) {
        return Ok(());
    }
    let mut mesh = Mesh::up()?;
    let world = mesh.task(1, mesh.nginx("world", "world", 8080))?;
    mesh.services(&[Service::new("world", 80, 8080, "http").at(&world)], "")?;
    mesh.start()?;
    mesh.await_endpoints(0, "world", 1)?;
    let mut checks = Checks::default();
    let mesh_ref = &mesh;
    let all: Vec<_> = thread::scope(|scope| {
        // At the same time, so that they are in each other's way.
        let modes = [Mode::Bridge, Mode::Awsvpc, Mode::Host]
            .map(|mode| (mode, scope.spawn(move || first_instruction(mesh_ref, mode))));
        modes.into_iter().map(|(mode, each)| (mode, each.join())).collect()
    });
    for (mode, done) in all {
        checks.run(&format!("ten {mode:?} tasks whose first act is a request are answered"), || {
            done.unwrap_or_else(|_| anyhow::bail!("it panicked"))
        });
    }
    mesh.down()?;
    checks.done()
}

fn first_instruction(mesh: &Mesh, mode: Mode) -> Result<()> {
    let mut failed = Vec::new();
    for number in 0..10 {
        let family = format!("eager-{mode:?}-{number}").to_lowercase();
        let spec = mesh.spec(&family, &["curl", "-sS", "--max-time", "10", "http://world/"]).mode(mode);
        let task = mesh.task(0, spec)?;
        mesh.host(0).docker(&["wait", &task.task.container])?;
        let said = mesh.host(0).docker_output(&["logs", &task.task.container])?;
        if said.stdout.trim() != "world" {
            failed.push(format!("{number}: {}{}", said.stdout, said.stderr));
        }
        mesh.host(0).stop_task(&task.task)?;
    }
    ensure!(failed.is_empty(), "{} of 10 failed: {failed:?}", failed.len());
    Ok(())
}

fn api<'a>(at: &[&'a Placed]) -> Service<'a> {
    at.iter().fold(Service::new("api", 80, 8080, "http"), |api, placed| api.at(placed))
}

/// Requests are answered by exactly these. The balancer stays away for a moment from one that was slow.
fn expect(mesh: &Mesh, client: &Placed, url: &str, answers: &[&str]) -> Result<()> {
    let script = format!("for n in $(seq 24); do curl -sS --max-time 5 {url} 2>&1; done");
    let wanted: BTreeSet<String> = answers.iter().map(|answer| (*answer).to_owned()).collect();
    let mut found = BTreeSet::new();
    for _round in 0..5 {
        found.extend(mesh.run(client, &["sh", "-c", &script])?.lines().map(str::to_owned));
        ensure!(found.is_subset(&wanted), "expected {answers:?}, but {found:?} answered");
        if found == wanted {
            return Ok(());
        }
    }
    anyhow::bail!("expected {answers:?}, but only {found:?} answered")
}

fn await_task(mesh: &Mesh, host: usize, placed: &Placed) -> Result<()> {
    until(LIMIT, "the task is armed", || Ok(if is_armed(mesh, host, placed)? { Ok(()) } else { Err("not yet") }))
}

fn is_armed(mesh: &Mesh, host: usize, placed: &Placed) -> Result<bool> {
    let status = mesh.document(host, &["status"])?;
    let mut tasks = status["tasks"].as_array().into_iter().flatten();
    Ok(tasks.any(|task| task["id"] == placed.task.id.as_str() && task["armed"] == true))
}

/// The task knows no name of the mesh, and the agent does not list it.
fn is_outside(mesh: &Mesh, placed: &Placed) -> Result<()> {
    let said = mesh.exec(placed, &["curl", "-sS", "--max-time", "5", "http://api/"])?;
    ensure!(said.stderr.contains("resolve host"), "{said:?}");
    let status = mesh.document(placed.host, &["status"])?["tasks"].to_string();
    ensure!(!status.contains(&placed.task.id), "it is listed: {status}");
    Ok(())
}

/// `docker kill` while requests to the task, and one of its own, hang.
fn killed(mesh: &Mesh, client: &Placed, mode: Mode) -> Result<()> {
    let family = format!("victim-{mode:?}").to_lowercase();
    let victim = mesh.task(0, mesh.peer(&family, "hangs", 8080).mode(mode))?;
    await_task(mesh, 0, &victim)?;
    mesh.await_endpoints(0, &family, 1)?;
    let url = format!("http://{family}:8080/");
    let mut curl = mesh.host(0).command_in(&client.task, &["curl", "-sS", "--max-time", "15", &url])?;
    let hanging = thread::spawn(move || mesh_lab::output(&mut curl));
    until(LIMIT, "the request hangs in the victim", || {
        let load = mesh.endpoints(0, &family)?;
        let open = load.iter().any(|endpoint| endpoint["load"]["in_flight"].as_u64() > Some(0));
        Ok(if open { Ok(()) } else { Err(format!("{load:?}")) })
    })?;
    let began = Instant::now();
    mesh.host(0).docker(&["kill", &victim.task.container])?;
    let said = hanging.join().map_err(|_| anyhow::anyhow!("it panicked"))??;
    ensure!(began.elapsed() < LIMIT / 2, "the client was told after {:?}: {said:?}", began.elapsed());
    ensure!(said.stdout.contains("upstream_reset") || said.stdout.contains("task_gone") || !said.ok(), "{said:?}");
    mesh.host(0).stop_task(&victim.task)?;
    until(LIMIT, "the agent forgets it", || {
        let status = mesh.document(0, &["status"])?.to_string();
        let services = mesh.document(0, &["services"])?.to_string();
        let known = status.contains(&victim.task.id) || services.contains(&victim.task.id);
        Ok(if known { Err(status) } else { Ok(()) })
    })?;
    if mode == Mode::Awsvpc {
        // The two ends of its interface die with its namespace, and only with it.
        let port = format!("port-eni{}", victim.task.address.octets()[3]);
        until(LIMIT, "the namespace is gone", || {
            let links = mesh_lab::output(mesh.cluster.vpc().command("ip").args(["-br", "link"]))?.stdout;
            Ok(if links.contains(&port) { Err(links) } else { Ok(()) })
        })?;
    }
    Ok(())
}

/// Files that the agent of host 1 has open.
fn descriptors(mesh: &mut Mesh) -> Result<usize> {
    let pid = mesh.agent(0)?.pid()?;
    Ok(fs::read_dir(format!("/proc/{pid}/fd")).context("the agent runs")?.count())
}

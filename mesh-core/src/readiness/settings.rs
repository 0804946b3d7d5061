//! Which probe a task has to pass, and how often: from the configuration and from its labels.
//!
//! Labels win over the service's section, that over the defaults. What is wrong with a label is reported, and then none
//! of the task's labels about readiness counts. Must not know what a probe came to.

use std::{collections::BTreeMap, ops::RangeInclusive, time::Duration};

use super::grpc;
use crate::{
    document::{Section, duration},
    id::ServiceName,
    registration,
    task::Task,
};

/// What is asked of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Nothing.
    None,
    /// That it accepts a connection; not asked again when it did. A server that takes a connection without a word for a
    /// fault, as MySQL does, sees one in its life.
    Listen,
    /// That it accepts a connection, again and again.
    Tcp,
    /// That it answers a GET with one of some statuses.
    Http,
    /// That `grpc.health.v1` says that it is serving.
    Grpc,
}

impl Check {
    /// Whether it is asked again after it has passed.
    pub fn goes_on(&self) -> bool {
        match self {
            Self::None | Self::Listen => false,
            Self::Tcp | Self::Http | Self::Grpc => true,
        }
    }
}

/// How a task is probed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub check: Check,
    /// What HTTP asks for.
    pub path: String,
    pub statuses: Vec<RangeInclusive<u16>>,
    /// What gRPC asks for; empty: the whole server.
    pub grpc_service: String,
    /// The container port that speaks for the whole task; `None`: each port for itself.
    pub port: Option<u16>,
    pub interval: Duration,
    pub timeout: Duration,
    /// Probes in a row that must pass.
    pub successes: u32,
    /// Probes in a row that must fail before a task that was ready is no longer.
    pub failures: u32,
    /// The task is stopped, so that ECS replaces it, when it has not been ready for so long.
    pub stop_after: Option<Duration>,
    /// Somebody has asked for this check, so it counts beside a health check of the container's own.
    pub chosen: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            check: Check::Listen,
            path: "/".into(),
            statuses: vec![200..=399],
            grpc_service: String::new(),
            port: None,
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(1),
            successes: 1,
            failures: 3,
            stop_after: None,
            chosen: false,
        }
    }
}

/// The configuration's `[readiness]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    pub default: Settings,
    pub services: BTreeMap<ServiceName, Settings>,
}

impl Readiness {
    /// What counts for a container port of a task of `service`, and what is wrong with its labels.
    pub fn of(&self, task: &Task, service: &ServiceName, port: u16) -> (Settings, Option<String>) {
        let configured = self.services.get(service).unwrap_or(&self.default);
        let labels: BTreeMap<&str, &str> = task
            .labels
            .iter()
            .filter_map(|(key, value)| Some((key.strip_prefix(label::PREFIX)?, value.trim())))
            .collect();
        let stop_after = task.labels.get(label::STOP_AFTER).map(|text| text.trim());
        let settings = conventional(configured, task, port)
            .and_then(|(conventional, ignored)| Ok((labelled(&conventional, &labels, stop_after)?, ignored)));
        let settings = settings.unwrap_or_else(|problem| (configured.clone(), Some(problem)));
        let own_health = task.containers.iter().any(|container| container.health.is_some());
        match settings {
            // Its own health check is what speaks for it.
            (settings, problem) if own_health && !settings.chosen => {
                (Settings { check: Check::None, ..settings }, problem)
            }
            settings => settings,
        }
    }
}

/// Docker labels of a task about its readiness, without what all of them begin with.
pub mod label {
    pub const PREFIX: &str = "ecs-mesh.ready";
    /// `ecs-mesh.ready`: the check.
    pub const CHECK: &str = "";
    pub const PORT: &str = ".port";
    pub const PATH: &str = ".path";
    pub const STATUSES: &str = ".statuses";
    pub const GRPC_SERVICE: &str = ".grpc-service";
    pub const INTERVAL: &str = ".interval";
    pub const TIMEOUT: &str = ".timeout";
    pub const SUCCESSES: &str = ".successes";
    pub const FAILURES: &str = ".failures";
    pub const ALL: [&str; 9] = [CHECK, PORT, PATH, STATUSES, GRPC_SERVICE, INTERVAL, TIMEOUT, SUCCESSES, FAILURES];
    /// By itself: how long a task may be unhealthy before it is stopped.
    pub const STOP_AFTER: &str = "ecs-mesh.stop-unhealthy-after";
}

const WORDS: [(&str, Check); 5] = [
    ("none", Check::None),
    ("listen", Check::Listen),
    ("tcp", Check::Tcp),
    ("http", Check::Http),
    ("grpc", Check::Grpc),
];
const INTERVAL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(600));
const TIMEOUT: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(60));
/// A task that needs some seconds to start must not be stopped for that.
const STOP_AFTER: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(24 * 3600));
const MOST: u32 = 100;

fn labelled(
    configured: &Settings,
    labels: &BTreeMap<&str, &str>,
    stop_after: Option<&str>,
) -> Result<Settings, String> {
    let mut settings = configured.clone();
    if let Some(unknown) = labels.keys().find(|key| !label::ALL.contains(key)) {
        return Err(format!("label `{}{}` is not known", label::PREFIX, unknown.escape_debug()));
    }
    let get = |key: &str| labels.get(key).copied();
    let wrong = |key: &str, text: &str, wanted: &str| {
        format!("label `{}{key}` is `{}`; write {wanted}", label::PREFIX, text.escape_debug())
    };
    if let Some(word) = get(label::CHECK) {
        settings.check = check(word).ok_or_else(|| wrong(label::CHECK, word, &words()))?;
        settings.chosen = true;
    }
    if let Some(text) = get(label::PORT) {
        let port = text.parse::<u16>().ok().filter(|port| *port != 0);
        settings.port = Some(port.ok_or_else(|| wrong(label::PORT, text, "a container port"))?);
    }
    if let Some(text) = get(label::PATH) {
        settings.path = path(text).map_err(|wanted| wrong(label::PATH, text, &wanted))?;
    }
    if let Some(text) = get(label::STATUSES) {
        settings.statuses = statuses(text).map_err(|wanted| wrong(label::STATUSES, text, &wanted))?;
    }
    if let Some(text) = get(label::GRPC_SERVICE) {
        settings.grpc_service = grpc_service(text).map_err(|wanted| wrong(label::GRPC_SERVICE, text, &wanted))?;
    }
    let span = |key: &str, limits: (Duration, Duration), into: &mut Duration| match get(key) {
        None => Ok(()),
        Some(text) => within(text, limits).map(|span| *into = span).map_err(|wanted| wrong(key, text, &wanted)),
    };
    span(label::INTERVAL, INTERVAL, &mut settings.interval)?;
    span(label::TIMEOUT, TIMEOUT, &mut settings.timeout)?;
    let count = |key: &str, into: &mut u32| match get(key) {
        None => Ok(()),
        Some(text) => match text.parse::<u32>().ok().filter(|count| (1..=MOST).contains(count)) {
            Some(count) => {
                *into = count;
                Ok(())
            }
            None => Err(wrong(key, text, &format!("a number of 1 to {MOST}"))),
        },
    };
    count(label::SUCCESSES, &mut settings.successes)?;
    count(label::FAILURES, &mut settings.failures)?;
    match stop_after {
        Some("never") => settings.stop_after = None,
        Some(text) => {
            let after = within(text, STOP_AFTER).map_err(|wanted| {
                format!("label `{}` is `{}`; write `never` or {wanted}", label::STOP_AFTER, text.escape_debug())
            })?;
            settings.stop_after = Some(after);
        }
        None => {}
    }
    Ok(settings)
}

/// As registrator's labels say, and which of them nobody heeds: what runs a program in the container, and what is not
/// a probe. Labels of ours come after.
fn conventional(configured: &Settings, task: &Task, port: u16) -> Result<(Settings, Option<String>), String> {
    const HEEDED: [&str; 4] = ["HTTP", "TCP", "INTERVAL", "TIMEOUT"];
    let mut settings = configured.clone();
    let wrong = |(label, text): (&str, &str), wanted: &str| {
        format!("label `{label}` is `{}`; write {wanted}", text.escape_debug())
    };
    let said = |key: &str| registration::said(task, port, &format!("CHECK_{key}"));
    if let Some((label, text)) = said("HTTP") {
        settings.check = Check::Http;
        settings.path = path(text).map_err(|wanted| wrong((label, text), &wanted))?;
        settings.chosen = true;
    } else if said("TCP").is_some_and(|(_, text)| text.eq_ignore_ascii_case("true") || text == "1") {
        settings.check = Check::Tcp;
        settings.chosen = true;
    }
    for (key, limits, into) in
        [("INTERVAL", INTERVAL, &mut settings.interval), ("TIMEOUT", TIMEOUT, &mut settings.timeout)]
    {
        if let Some(said) = said(key) {
            *into = within(said.1, limits).map_err(|wanted| wrong(said, &wanted))?;
        }
    }
    let ignored = registration::about(task, port, "CHECK_").find(|(_, key)| !HEEDED.contains(key));
    let ignored = ignored.map(|(label, _)| {
        format!("label `{label}` is ignored: only HTTP, TCP, INTERVAL and TIMEOUT are heeded; see `{}`", label::PREFIX)
    });
    Ok((settings, ignored))
}

fn within(text: &str, (min, max): (Duration, Duration)) -> Result<Duration, String> {
    let span = duration(text).filter(|span| (min..=max).contains(span));
    span.ok_or_else(|| format!("a duration of {min:?} to {max:?}, such as `15s`"))
}

fn check(word: &str) -> Option<Check> {
    WORDS.iter().find(|(known, _)| *known == word).map(|(_, check)| *check)
}

fn words() -> String {
    format!("one of {}", WORDS.map(|(word, _)| word).join(", "))
}

/// What may stand in a request line.
fn path(text: &str) -> Result<String, String> {
    let valid = text.starts_with('/') && text.len() <= 1024 && text.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
    valid.then(|| text.to_owned()).ok_or_else(|| "a path such as `/healthz`".to_owned())
}

/// `200`, `200-299`, `200,204,300-399`
fn statuses(text: &str) -> Result<Vec<RangeInclusive<u16>>, String> {
    let one = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<u16>().ok()?, last.trim().parse::<u16>().ok()?);
        (100 <= first && first <= last && last <= 599).then_some(first..=last)
    };
    let all: Option<Vec<_>> = text.split(',').map(one).collect();
    all.ok_or_else(|| "statuses such as `200` or `200-399`".to_owned())
}

fn grpc_service(text: &str) -> Result<String, String> {
    let valid = text.len() <= grpc::MAX_NAME && text.bytes().all(|b| b.is_ascii_graphic());
    valid.then(|| text.to_owned()).ok_or_else(|| "the name of a gRPC service, such as `shop.Cart`".to_owned())
}

/// The configuration's section.
pub(crate) fn readiness(s: &mut Section<'_>) -> Readiness {
    let default = settings(s, &Settings::default());
    let default = Settings { chosen: false, ..default };
    let mut services = BTreeMap::new();
    let entries = s.sections("service", |s| {
        s.require("name", "name the service that this is about, such as `world`");
        let name: Option<ServiceName> = s.parsed("name", "world");
        let settings = settings(s, &default);
        Some((name?, settings))
    });
    for (name, settings) in entries {
        if services.insert(name.clone(), settings).is_some() {
            s.fault(&format!("service[{name}]"), "is there twice", "join the two");
        }
    }
    Readiness { default, services }
}

fn settings(s: &mut Section<'_>, default: &Settings) -> Settings {
    let chosen = s.has("check");
    let check = s.choice("check", &WORDS).unwrap_or(default.check);
    let mut text = |key: &'static str, valid: &dyn Fn(&str) -> Result<(), String>| {
        let text = s.text(key)?;
        match valid(&text) {
            Ok(()) => Some(text),
            Err(wanted) => {
                s.fault(key, format!("`{}` cannot be used", text.escape_debug()), format!("write {wanted}"));
                None
            }
        }
    };
    let path = text("path", &|text| path(text).map(drop));
    let found = text("statuses", &|text| statuses(text).map(drop)).and_then(|text| statuses(&text).ok());
    let service = text("grpc_service", &|text| grpc_service(text).map(drop));
    let stop_after = s.duration("stop_unhealthy_after", STOP_AFTER.0, STOP_AFTER.1).or(default.stop_after);
    Settings {
        check,
        path: path.unwrap_or_else(|| default.path.clone()),
        statuses: found.unwrap_or_else(|| default.statuses.clone()),
        grpc_service: service.unwrap_or_else(|| default.grpc_service.clone()),
        port: s.port("port").or(default.port),
        interval: s.duration("interval", INTERVAL.0, INTERVAL.1).unwrap_or(default.interval),
        timeout: s.duration("timeout", TIMEOUT.0, TIMEOUT.1).unwrap_or(default.timeout),
        successes: s.number("successes", 1, MOST).unwrap_or(default.successes),
        failures: s.number("failures", 1, MOST).unwrap_or(default.failures),
        stop_after,
        chosen: chosen || default.chosen,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{arb::bridge_task, config, task::ContainerHealth};

    fn parse(text: &str) -> Result<Readiness, Vec<String>> {
        let required = "[identity]\ntrust_domain = \"example.mesh\"\nca_bundle = \"/x\"\njoin_token_file = \"/x\"\n";
        let parsed = config::parse(&format!("{required}{text}\n"));
        parsed.map(|config| config.readiness).map_err(|faults| faults.iter().map(ToString::to_string).collect())
    }

    fn of(readiness: &Readiness, labels: &[(&str, &str)]) -> (Settings, Option<String>) {
        let mut task = bridge_task("t1", "web", "172.17.0.2", &[80]);
        task.labels = labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        readiness.of(&task, &"web".parse().expect("valid"), 80)
    }

    #[test]
    fn without_a_word_a_port_must_listen() {
        assert_eq!(parse("").expect("parses"), Readiness::default());
        assert_eq!(of(&Readiness::default(), &[]), (Settings::default(), None));
        assert_eq!(Settings::default().check, Check::Listen);
    }

    #[test]
    fn labels_win_over_the_service_and_that_over_the_defaults() {
        let text = "[readiness]\ninterval = \"7s\"\nfailures = 5\n[[readiness.service]]\nname = \"web\"\ncheck = \"http\"\n\
            path = \"/up\"\nstatuses = \"200,300-302\"\nfailures = 2\nstop_unhealthy_after = \"1m\"";
        let readiness = parse(text).expect("parses");
        let (settings, problem) = of(&readiness, &[]);
        assert_eq!((settings.interval, settings.failures, problem), (Duration::from_secs(7), 2, None));
        assert_eq!((settings.check, settings.path.as_str()), (Check::Http, "/up"));
        assert_eq!(settings.statuses, [200..=200, 300..=302]);
        let labels = [
            ("ecs-mesh.ready.path", "/ok?x=1"),
            ("ecs-mesh.ready.port", "8081"),
            ("ecs-mesh.stop-unhealthy-after", "never"),
            ("ecs-mesh.ready.interval", " 500ms "),
        ];
        let (settings, problem) = of(&readiness, &labels);
        assert_eq!((settings.check, settings.path.as_str()), (Check::Http, "/ok?x=1"));
        assert_eq!((settings.port, settings.stop_after, problem), (Some(8081), None, None));
        assert_eq!(settings.interval, Duration::from_millis(500));
        let (settings, _) = of(&readiness, &[("ecs-mesh.ready", "grpc"), ("ecs-mesh.ready.grpc-service", "a.B")]);
        assert_eq!((settings.check, settings.grpc_service.as_str()), (Check::Grpc, "a.B"));
    }

    #[test]
    fn a_faulty_label_is_told_and_none_counts() {
        for (key, value, part) in [
            ("ecs-mesh.ready", "htp", "one of none, listen, tcp, http, grpc"),
            ("ecs-mesh.ready.port", "0", "a container port"),
            ("ecs-mesh.ready.interval", "1ms", "100ms to 600s"),
            ("ecs-mesh.ready.failures", "-1", "1 to 100"),
            ("ecs-mesh.stop-unhealthy-after", "1s", "10s to"),
            ("ecs-mesh.ready.pth", "/", "is not known"),
        ] {
            let (settings, problem) = of(&Readiness::default(), &[("ecs-mesh.ready.timeout", "2s"), (key, value)]);
            assert_eq!(settings, Settings::default());
            assert!(problem.as_ref().is_some_and(|it| it.contains(part) && it.contains(key)), "{problem:?}");
        }
        let http = [("ecs-mesh.ready", "http"), ("ecs-mesh.ready.path", "healthz")];
        assert!(of(&Readiness::default(), &http).1.is_some_and(|it| it.contains("`/healthz`")));
    }

    #[test]
    fn labels_of_registrator_are_a_probe() {
        let readiness = parse("[readiness]\nfailures = 5").expect("parses");
        let labels = [
            ("SERVICE_CHECK_HTTP", "/all"),
            ("SERVICE_80_CHECK_HTTP", "/health?a=1"),
            ("SERVICE_81_CHECK_HTTP", "/other"),
            ("SERVICE_CHECK_INTERVAL", "15s"),
            ("SERVICE_80_CHECK_TIMEOUT", "2s"),
        ];
        let (settings, problem) = of(&readiness, &labels);
        assert_eq!((settings.check, settings.path.as_str(), problem), (Check::Http, "/health?a=1", None));
        assert_eq!((settings.interval, settings.timeout), (Duration::from_secs(15), Duration::from_secs(2)));
        assert!(settings.chosen && settings.failures == 5);
        assert_eq!(of(&readiness, &labels[..1]).0.path, "/all");
        assert_eq!(of(&readiness, &[("SERVICE_CHECK_TCP", "true")]).0.check, Check::Tcp);
        assert_eq!(of(&readiness, &[("SERVICE_CHECK_TCP", "false")]).0.check, Check::Listen);
        // Ours win.
        let both = [("SERVICE_CHECK_HTTP", "/all"), ("ecs-mesh.ready", "tcp"), ("ecs-mesh.ready.interval", "1s")];
        assert_eq!(of(&readiness, &both).0.check, Check::Tcp);
        // What is not heeded is told, and the rest counts.
        for label in ["SERVICE_CHECK_SCRIPT", "SERVICE_80_CHECK_HTTPS", "SERVICE_CHECK_TTL"] {
            let (settings, problem) = of(&readiness, &[(label, "x"), ("SERVICE_CHECK_TCP", "true")]);
            assert_eq!(settings.check, Check::Tcp);
            assert!(problem.is_some_and(|it| it.starts_with(&format!("label `{label}` is ignored"))), "{label}");
        }
        assert_eq!(of(&readiness, &[("SERVICE_81_CHECK_SCRIPT", "x")]).1, None, "another port's");
        for (label, text) in [("SERVICE_CHECK_HTTP", "up"), ("SERVICE_80_CHECK_INTERVAL", "often")] {
            let (settings, problem) = of(&readiness, &[(label, text), ("SERVICE_CHECK_TCP", "true")]);
            assert_eq!(settings.check, Check::Listen);
            assert!(problem.is_some_and(|it| it.starts_with(&format!("label `{label}` is `{text}`; write"))));
        }
    }

    #[test]
    fn a_health_check_of_its_own_speaks_for_a_task_that_says_nothing_else() {
        let mut task = bridge_task("t1", "web", "172.17.0.2", &[80]);
        task.containers[0].health = Some(ContainerHealth::Healthy);
        let service = "web".parse().expect("valid");
        assert_eq!(Readiness::default().of(&task, &service, 80).0.check, Check::None);
        task.labels.insert("ecs-mesh.ready".into(), "tcp".into());
        assert_eq!(Readiness::default().of(&task, &service, 80).0.check, Check::Tcp);
    }

    #[test]
    fn faults_name_the_key_and_a_remedy() {
        for (text, expected) in [
            ("[readiness]\ncheck = \"ping\"", "readiness.check: `ping` is not known; use \"none\" or"),
            ("[readiness]\npath = \"up\"", "readiness.path: `up` cannot be used; write a path such as"),
            (
                "[[readiness.service]]\nname = \"a\"\ncheck = \"http\"\nstatuses = \"600\"",
                "readiness.service[a].statuses: `600` cannot be used",
            ),
            ("[[readiness.service]]\ncheck = \"tcp\"", "readiness.service[0].name: is missing"),
            (
                "[[readiness.service]]\nname = \"a\"\n[[readiness.service]]\nname = \"a\"",
                "readiness.service[a]: is there twice",
            ),
        ] {
            let found = parse(text).expect_err(text);
            assert!(found.len() == 1 && found[0].starts_with(expected), "{text}: {found:?}");
        }
    }
}

//! AWS without AWS: moto as a server on loopback, and a double for what moto lacks.
//!
//! Ports and data are each server's own; it dies with its value. It must not know the agent.

pub mod double;

use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::{consul::free_port, until::until};

/// Python starts within seconds, on a machine that does other work too.
const LIMIT: Duration = Duration::from_secs(60);
pub const REGION: &str = "eu-central-1";

/// Where moto is: as `cargo xtask test` says. The credentials of the tests come from there too.
///
/// # Errors
/// It is not there; the text says how to get it.
pub fn place() -> Result<PathBuf, String> {
    match env::var_os("MESH_MOTO").map(PathBuf::from) {
        Some(place) if place.is_dir() => Ok(place),
        _ => Err("there is no moto: `cargo xtask test` fetches it".to_owned()),
    }
}

/// Python with moto and botocore, and nothing of the machine's own settings.
///
/// # Errors
/// It is not there.
pub fn python() -> Result<Command> {
    let place = place().map_err(anyhow::Error::msg)?;
    let mut command = Command::new("python3");
    command.env_clear().env("PYTHONPATH", place).env("PATH", "/usr/bin:/bin").stdin(Stdio::null());
    for (key, value) in
        [("AWS_ACCESS_KEY_ID", "testing"), ("AWS_SECRET_ACCESS_KEY", "testing"), ("AWS_EC2_METADATA_DISABLED", "true")]
    {
        command.env(key, value);
    }
    Ok(command)
}

/// An API, as its requests name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    CloudMap,
    Ecs,
    Ec2,
    Iam,
}

impl Api {
    fn target(self, action: &str) -> String {
        match self {
            Self::CloudMap => format!("Route53AutoNaming_v20170314.{action}"),
            Self::Ecs => format!("AmazonEC2ContainerServiceV20141113.{action}"),
            Self::Ec2 | Self::Iam => action.to_owned(),
        }
    }

    /// What makes a request one for this API and action.
    #[must_use]
    pub fn headers(self, action: &str) -> [(&'static str, String); 3] {
        let credential = format!(
            "AWS4-HMAC-SHA256 Credential=testing/20260101/{REGION}/{}/aws4_request, SignedHeaders=host, Signature=0",
            self.name()
        );
        [
            ("Authorization", credential),
            ("X-Amz-Target", self.target(action)),
            ("Content-Type", "application/x-amz-json-1.1".to_owned()),
        ]
    }

    /// The name by which requests are signed, and by which botocore knows its description.
    pub fn name(self) -> &'static str {
        match self {
            Self::CloudMap => "servicediscovery",
            Self::Ecs => "ecs",
            Self::Ec2 => "ec2",
            Self::Iam => "iam",
        }
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Moto {
    process: Option<Child>,
    folder: PathBuf,
    port: u16,
    authorize: bool,
}

impl Moto {
    /// A server that knows nothing, and forgets everything when it ends.
    ///
    /// # Errors
    /// It does not answer in time.
    pub fn start() -> Result<Self> {
        Self::start_as(false)
    }

    /// One that looks at the caller's policy once [`Moto::authorize`] is told.
    ///
    /// # Errors
    /// It does not answer in time.
    pub fn start_as(authorize: bool) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = env::temp_dir().join(format!("mesh-test-{}-moto-{number}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let mut moto = Self { process: None, folder, port: free_port()?, authorize };
        moto.up()?;
        Ok(moto)
    }

    /// Starts it again after [`Moto::kill`], on the same port and with nothing in it.
    ///
    /// # Errors
    /// It does not answer in time.
    pub fn up(&mut self) -> Result<()> {
        let log = fs::File::create(self.folder.join("log"))?;
        let mut command = python()?;
        command.args(["-m", "moto.server", "-H", "127.0.0.1", "-p"]).arg(self.port.to_string());
        command.stdout(log.try_clone()?).stderr(log).process_group(0);
        self.process = Some(command.spawn().context("cannot start moto")?);
        until(LIMIT, "moto answers", || {
            Ok(match http(self.port, "GET", "/moto-api/", &[], "") {
                Ok((200, _)) => Ok(()),
                Ok((status, said)) => Err(format!("{status} {said}")),
                Err(error) => Err(format!("{error:#}; {}", self.last_words())),
            })
        })?;
        self.open()
    }

    /// From now on anybody may do anything.
    ///
    /// # Errors
    /// Moto refuses.
    pub fn open(&self) -> Result<()> {
        self.reset_auth(u32::MAX)
    }

    /// From now on callers need a policy that permits what they do.
    ///
    /// # Errors
    /// Moto refuses.
    pub fn authorize(&self) -> Result<()> {
        self.reset_auth(0)
    }

    fn reset_auth(&self, count: u32) -> Result<()> {
        if !self.authorize {
            return Ok(());
        }
        let (status, said) = http(self.port, "POST", "/moto-api/reset-auth", &[], &count.to_string())?;
        ensure!(status == 200, "{status} {said}");
        Ok(())
    }

    /// Its base address.
    #[must_use]
    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// A folder that goes with it.
    #[must_use]
    pub fn folder(&self) -> &std::path::Path {
        &self.folder
    }

    /// Ends it at once.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("moto does not run")?;
        process.kill()?;
        process.wait()?;
        Ok(())
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        log.lines().rev().take(5).collect::<Vec<_>>().join(" | ")
    }

    /// One call that must be answered well, and its answer.
    ///
    /// # Errors
    /// It is not.
    pub fn call(&self, api: Api, action: &str, body: &Value) -> Result<Value> {
        let headers = api.headers(action);
        let headers = headers.each_ref().map(|(key, value)| (*key, value.as_str()));
        let (status, said) = http(self.port, "POST", "/", &headers, &body.to_string())?;
        ensure!(status == 200, "{action} {body}: {status} {said}; {}", self.last_words());
        Ok(serde_json::from_str(&said).unwrap_or(Value::Null))
    }

    /// A call of the query protocol, and its answer as it is.
    ///
    /// # Errors
    /// It is not answered well.
    pub fn query(&self, api: Api, parameters: &str) -> Result<String> {
        let credential = format!(
            "AWS4-HMAC-SHA256 Credential=testing/20260101/{REGION}/{}/aws4_request, SignedHeaders=host, Signature=0",
            api.name()
        );
        let headers = [("Authorization", credential.as_str()), ("Content-Type", "application/x-www-form-urlencoded")];
        let (status, said) = http(self.port, "POST", "/", &headers, parameters)?;
        ensure!(status == 200, "{parameters}: {status} {said}");
        Ok(said)
    }

    /// From now on ECS tasks stay in the state they are in, where moto would let each question move them on.
    ///
    /// # Errors
    /// Moto refuses.
    pub fn hold_tasks(&self) -> Result<()> {
        let body = json!({ "model_name": "ecs::task", "transition": { "progression": "time", "seconds": 86400 } });
        let json = [("Content-Type", "application/json")];
        let (status, said) =
            http(self.port, "POST", "/moto-api/state-manager/set-transition", &json, &body.to_string())?;
        ensure!(status < 300, "{status} {said}");
        Ok(())
    }

    /// Makes a Cloud Map namespace; returns its id.
    ///
    /// # Errors
    /// Moto refuses.
    pub fn namespace(&self, name: &str, dns: bool) -> Result<String> {
        let (action, body) = match dns {
            true => ("CreatePrivateDnsNamespace", json!({ "Name": name, "Vpc": "vpc-1" })),
            false => ("CreateHttpNamespace", json!({ "Name": name })),
        };
        self.call(Api::CloudMap, action, &body)?;
        let listed = self.call(Api::CloudMap, "ListNamespaces", &json!({}))?;
        let all = listed["Namespaces"].as_array().context("a list")?;
        let found = all.iter().find(|it| it["Name"] == name).context("it is made")?;
        Ok(found["Id"].as_str().context("an id")?.to_owned())
    }

    /// Makes a Cloud Map service whose health the caller says; returns its id.
    ///
    /// # Errors
    /// Moto refuses.
    pub fn service(&self, namespace: &str, name: &str) -> Result<String> {
        let body =
            json!({ "Name": name, "NamespaceId": namespace, "HealthCheckCustomConfig": { "FailureThreshold": 1 } });
        let made = self.call(Api::CloudMap, "CreateService", &body)?;
        Ok(made["Service"]["Id"].as_str().context("an id")?.to_owned())
    }

    /// Registers an instance at an address, as ECS does.
    ///
    /// # Errors
    /// Moto refuses.
    pub fn register(&self, service: &str, id: &str, address: &str, port: u16, more: &Value) -> Result<()> {
        let mut attributes = json!({ "AWS_INSTANCE_IPV4": address, "AWS_INSTANCE_PORT": port.to_string() });
        for (key, value) in more.as_object().into_iter().flatten() {
            attributes[key] = value.clone();
        }
        let body = json!({ "ServiceId": service, "InstanceId": id, "Attributes": attributes });
        self.call(Api::CloudMap, "RegisterInstance", &body).map(drop)
    }

    /// # Errors
    /// Moto refuses.
    pub fn deregister(&self, service: &str, id: &str) -> Result<()> {
        let body = json!({ "ServiceId": service, "InstanceId": id });
        self.call(Api::CloudMap, "DeregisterInstance", &body).map(drop)
    }

    /// # Errors
    /// Moto refuses.
    pub fn set_health(&self, service: &str, id: &str, status: &str) -> Result<()> {
        let body = json!({ "ServiceId": service, "InstanceId": id, "Status": status });
        self.call(Api::CloudMap, "UpdateInstanceCustomHealthStatus", &body).map(drop)
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended by itself.
            process.kill().ok();
            process.wait().ok();
        }
        fs::remove_dir_all(&self.folder).ok();
    }
}

fn http(port: u16, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(LIMIT))?;
    let headers: String = headers.iter().map(|(key, value)| format!("{key}: {value}\r\n")).collect();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer has a head")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("an answer has a status")?;
    Ok((status, body.to_owned()))
}

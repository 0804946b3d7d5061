//! A real Consul server on loopback, and what an operator or another host tells it.
//!
//! Ports and data are this server's own; it dies with its value. It must not know the agent.

use std::{
    env, fs, io,
    net::{Ipv4Addr, TcpListener},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::until::until;

/// A server elects itself within seconds, on a machine that does other work too.
const LIMIT: Duration = Duration::from_secs(30);

/// Where the program is: as `cargo xtask test` says, else where it puts it.
///
/// # Errors
/// It is not there; the text says how to get it.
pub fn program() -> Result<PathBuf, String> {
    let beside = || {
        let test = env::current_exe().ok()?;
        let target = test.ancestors().find(|folder| folder.join("packages").is_dir())?;
        Some(target.join("packages/consul/root/usr/bin/consul"))
    };
    let place = env::var_os("MESH_CONSUL").map(PathBuf::from).or_else(beside);
    match place {
        Some(place) if place.is_file() => Ok(place),
        _ => Err("there is no Consul: `cargo xtask test` fetches it".to_owned()),
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Server {
    process: Option<Child>,
    folder: PathBuf,
    ports: [u16; 4],
    more: Vec<String>,
    pub token: Option<String>,
}

impl Server {
    /// A server that keeps nothing when it ends.
    ///
    /// # Errors
    /// It does not lead in time.
    pub fn start() -> Result<Self> {
        Self::start_with("", &[])
    }

    /// The same with a configuration file (JSON) and further arguments.
    ///
    /// # Errors
    /// It does not lead in time.
    pub fn start_with(configuration: &str, more: &[&str]) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = env::temp_dir().join(format!("mesh-test-{}-consul-{number}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let mut more: Vec<String> = more.iter().map(|one| (*one).to_owned()).collect();
        if !configuration.is_empty() {
            let file = folder.join("more.json");
            fs::write(&file, configuration)?;
            more.extend(["-config-file".to_owned(), file.display().to_string()]);
        }
        let mut server = Self { process: None, folder, ports: free_ports()?, more, token: None };
        server.up()?;
        Ok(server)
    }

    /// Its base address.
    #[must_use]
    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[0])
    }

    /// The port at which other datacenters' servers meet it.
    #[must_use]
    pub fn wan(&self) -> u16 {
        self.ports[2]
    }

    /// A folder that goes with it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Starts it again after [`Server::kill`], on the same ports and with nothing in it.
    ///
    /// # Errors
    /// It does not lead in time.
    pub fn up(&mut self) -> Result<()> {
        self.launch()?;
        until(LIMIT, "Consul leads", || {
            Ok(match self.ask("GET", "/v1/status/leader", None) {
                Ok((200, Value::String(leader))) if !leader.is_empty() => Ok(()),
                Ok((status, said)) => Err(format!("{status} {said}")),
                Err(error) => Err(format!("{error:#}; {}", self.last_words())),
            })
        })
    }

    fn launch(&mut self) -> Result<()> {
        let program = program().map_err(anyhow::Error::msg)?;
        let [http, lan, wan, server] = self.ports;
        let log = fs::File::create(self.folder.join("log"))?;
        let mut command = Command::new(program);
        command.args([
            "agent",
            "-dev",
            "-bind",
            "127.0.0.1",
            "-client",
            "127.0.0.1",
            "-node",
            "lab",
            "-log-level",
            "warn",
        ]);
        for (option, port) in [("http", http), ("serf-lan", lan), ("serf-wan", wan), ("server", server)] {
            command.arg(format!("-{option}-port={port}"));
        }
        command.args(["-dns-port=-1", "-grpc-port=-1"]).args(&self.more);
        command.env_clear().stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        self.process = Some(command.spawn().context("cannot start Consul")?);
        Ok(())
    }

    /// Ends it at once, as a machine that is switched off.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("Consul does not run")?;
        process.kill()?;
        process.wait()?;
        Ok(())
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        log.lines().rev().take(5).collect::<Vec<_>>().join(" | ")
    }

    /// One request, and status and document of its answer.
    ///
    /// # Errors
    /// There is no answer.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value)> {
        request(&self.address(), method, path, self.token.as_deref(), body)
    }

    /// A request that must be taken.
    ///
    /// # Errors
    /// It is refused.
    pub fn tell(&self, path: &str, body: &Value) -> Result<()> {
        let (status, said) = self.ask("PUT", path, Some(body))?;
        ensure!(status == 200, "{path}: {status} {said}");
        Ok(())
    }

    /// Registers an instance on a node of its own, as another host's agent does. `more` is merged into the service.
    ///
    /// # Errors
    /// Consul refuses.
    pub fn register(&self, name: &str, id: &str, address: &str, port: u16, status: &str, more: &Value) -> Result<()> {
        let mut service = json!({ "ID": id, "Service": name, "Address": address, "Port": port });
        for (key, value) in more.as_object().into_iter().flatten() {
            service[key] = value.clone();
        }
        let check = json!({ "CheckID": format!("c:{id}"), "Name": "health", "ServiceID": id, "Status": status });
        let node = json!({ "Node": "elsewhere", "Address": "10.1.1.9", "Service": service, "Check": check });
        self.tell("/v1/catalog/register", &node)
    }

    /// Changes the health of such an instance.
    ///
    /// # Errors
    /// Consul refuses.
    pub fn set_health(&self, id: &str, status: &str) -> Result<()> {
        let check = json!({ "CheckID": format!("c:{id}"), "Name": "health", "ServiceID": id, "Status": status });
        self.tell(
            "/v1/catalog/register",
            &json!({
                "Node": "elsewhere", "Address": "10.1.1.9", "SkipNodeUpdate": true, "Check": check
            }),
        )
    }

    /// Removes such an instance.
    ///
    /// # Errors
    /// Consul refuses.
    pub fn deregister(&self, id: &str) -> Result<()> {
        self.tell("/v1/catalog/deregister", &json!({ "Node": "elsewhere", "ServiceID": id }))
    }

    /// The instances of a service as Consul lists them.
    ///
    /// # Errors
    /// It does not answer.
    pub fn instances(&self, name: &str) -> Result<Vec<Value>> {
        match self.ask("GET", &format!("/v1/health/service/{name}"), None)? {
            (200, Value::Array(instances)) => Ok(instances),
            (status, said) => bail!("{status} {said}"),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended by itself.
            process.kill().ok();
            process.wait().ok();
        }
        fs::remove_dir_all(&self.folder).ok();
    }
}

/// One request to any Consul agent.
///
/// # Errors
/// There is no answer.
pub fn request(
    base: &str,
    method: &str,
    path: &str,
    token: Option<&str>,
    body: Option<&Value>,
) -> Result<(u16, Value)> {
    use std::io::{Read as _, Write as _};
    let host = base.trim_start_matches("http://");
    let mut stream = std::net::TcpStream::connect(host)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let token = token.map(|token| format!("X-Consul-Token: {token}\r\n")).unwrap_or_default();
    write!(stream, "{method} {path} HTTP/1.0\r\nHost: {host}\r\n{token}Content-Length: {}\r\n\r\n{body}", body.len())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer has a head")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("an answer has a status")?;
    let document = serde_json::from_str(body.trim()).unwrap_or_else(|_text| Value::String(body.trim().to_owned()));
    Ok((status, document))
}

/// A folder with a certificate authority of Consul's own making, and certificates of a server and of a client:
/// `consul-agent-ca.pem`, `dc1-server-consul-0.pem` and `-key.pem`, and the same for `client`.
///
/// # Errors
/// Consul's own command fails.
pub fn certificates(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    for arguments in ["ca create", "cert create -server", "cert create -client"] {
        let mut command = Command::new(program().map_err(anyhow::Error::msg)?);
        command.arg("tls").args(arguments.split(' ')).current_dir(folder).env_clear().stdin(Stdio::null());
        let output = command.output().context("cannot start Consul")?;
        ensure!(output.status.success(), "consul tls {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// A port that nobody has at this moment.
///
/// # Errors
/// Nothing can be bound on loopback.
pub fn free_port() -> io::Result<u16> {
    free_ports::<1>().map(|[port]| port)
}

/// Ports that nobody has at this moment, below those that the kernel gives to outgoing connections.
fn free_ports<const N: usize>() -> io::Result<[u16; N]> {
    static LAST: AtomicU32 = AtomicU32::new(0);
    let mut held = Vec::with_capacity(N);
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = loop {
            let number = std::process::id().wrapping_mul(131) + LAST.fetch_add(1, Ordering::Relaxed);
            let candidate = 20_000 + u16::try_from(number % 12_000).unwrap_or_default();
            match TcpListener::bind((Ipv4Addr::LOCALHOST, candidate)) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                bound => break bound?,
            }
        };
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}

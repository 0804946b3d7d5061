//! A namespace with the kernel's hooks, a DNS server as the agent runs it, a dnsmasq for the task, and clients.

use std::{
    fmt, fs,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, mpsc},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use mesh_agent::{
    dns::{self, DnsCounters, Listeners, Originals},
    state,
    sys::{netns::Netns, socket},
};
use mesh_common::addr::Ip;
use mesh_core::{
    addr::Vip,
    config,
    model::{OnAgentDeath, Protocol, Service, ServicePort, Snapshot, TlsMode},
};
use mesh_tests::{
    tier::{Tier, require},
    until::until,
};
use tokio::runtime::Runtime;

use crate::kernel::{DNS, Scene};

/// The task's resolver, and a second one that no program serves.
pub(super) const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 53, 0, 1);
pub(super) const SECOND: Ipv4Addr = Ipv4Addr::new(10, 53, 0, 2);
/// As long as a name may be: 253 characters.
pub(super) const LONG: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.\
     bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb.\
     ccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc.\
     ddddddddddddddddddddddddddddddddddddddddddddddddddddd.example";
const LIMIT: Duration = Duration::from_secs(10);

/// Who looks names up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Client {
    Glibc,
    /// glibc too, but it tells why there is nothing.
    Python,
    Musl,
    /// c-ares.
    Node,
    /// glibc in threads.
    NodeLookup,
    Java,
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Glibc => "glibc",
            Self::Python => "python",
            Self::Musl => "musl",
            Self::Node => "c-ares",
            Self::NodeLookup => "node",
            Self::Java => "java",
        })
    }
}

impl Client {
    pub(super) fn tells_no_data_apart(self) -> bool {
        matches!(self, Self::Python | Self::Node)
    }
}

const PYTHON: &str = "
import socket, sys
why = {socket.EAI_NONAME: 'no such name', socket.EAI_NODATA: 'no data', socket.EAI_AGAIN: 'try again'}
family = socket.AF_INET6 if sys.argv[2] == '6' else socket.AF_UNSPEC
try:
    print(' '.join(sorted({it[4][0] for it in socket.getaddrinfo(sys.argv[1], 80, family)})))
except socket.gaierror as error:
    print(why.get(error.errno, error))
";

const NODE: &str = "
const dns = require('dns'), [how, name, family] = process.argv.slice(1);
const why = {ENOTFOUND: 'no such name', ENODATA: 'no data', ESERVFAIL: 'try again', EAI_AGAIN: 'try again'};
const show = (error, found) => console.log(error ? why[error.code] || error.code : found.sort().join(' '));
if (how === 'lookup') dns.lookup(name, {all: true}, (error, found) => show(error, (found || []).map(it => it.address)));
else if (family === '6') dns.resolve6(name, show);
else dns.resolve4(name, show);
";

/// As NODE's `resolve4`, which knows no search domains, but with the library's own search.
const MUSL: &str = r#"
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
int main(int count, char **words) {
    struct addrinfo hints, *found, *it;
    char text[NI_MAXHOST], last[NI_MAXHOST] = "";
    int failed;
    if (count != 3) return 2;
    if (strcmp(words[1], "ptr") == 0) {
        struct sockaddr_in at = {.sin_family = AF_INET};
        if (inet_pton(AF_INET, words[2], &at.sin_addr) != 1) return 2;
        failed = getnameinfo((struct sockaddr *)&at, sizeof at, text, sizeof text, 0, 0, NI_NAMEREQD);
        puts(failed ? gai_strerror(failed) : text);
        return 0;
    }
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_family = strcmp(words[1], "6") == 0 ? AF_INET6 : AF_UNSPEC;
    failed = getaddrinfo(words[2], 0, &hints, &found);
    if (failed) {
        puts(failed == EAI_NONAME ? "no such name" : failed == EAI_NODATA ? "no data"
             : failed == EAI_AGAIN ? "try again" : gai_strerror(failed));
        return 0;
    }
    for (it = found; it; it = it->ai_next) {
        getnameinfo(it->ai_addr, it->ai_addrlen, text, sizeof text, 0, 0, NI_NUMERICHOST);
        if (strcmp(text, last) != 0) printf("%s%s", it == found ? "" : " ", text);
        strcpy(last, text);
    }
    puts("");
    return 0;
}
"#;

const JAVA: &str = "
public class Names {
    public static void main(String[] words) {
        try {
            var found = new java.util.TreeSet<String>();
            for (var it : java.net.InetAddress.getAllByName(words[0])) found.add(it.getHostAddress());
            System.out.println(String.join(\" \", found));
        } catch (java.net.UnknownHostException error) {
            System.out.println(error.getMessage().contains(\"Temporary\") ? \"try again\" : \"no such name\");
        }
    }
}
";

/// Runs in a mount namespace of its own, when it is told to. It is never in the mesh before it is in its cgroup.
const INSIDE: &str = r#"
read _ || exit 1
folder=$1
shift
for file in resolv.conf nsswitch.conf hosts; do
    mount --bind "$folder/$file" "/etc/$file" || exit 1
done
exec timeout 60 "$@"
"#;

/// See the module's text.
pub(super) struct Bed {
    scene: Scene,
    folder: PathBuf,
    resolver: Option<Child>,
    runtime: Option<Runtime>,
    clients: Vec<Client>,
}

fn service(name: &str, last: u8) -> Result<Arc<Service>> {
    let port = ServicePort { id: last.into(), port: 80, protocol: Protocol::Auto, endpoints: vec![] };
    Ok(Arc::new(Service {
        name: name.parse()?,
        vip: Vip { v4: Ipv4Addr::new(240, 240, 0, last), v6: format!("fd65:6373:6d65:7368::{last}").parse()? },
        ports: vec![port],
        tls: TlsMode::Strict,
        on_agent_death: OnAgentDeath::Open,
        owners: None,
    }))
}

fn snapshot() -> Result<Snapshot> {
    let services = [service("world", 1)?, service("world--tag-v2", 2)?, service("taken", 3)?];
    Ok(Snapshot {
        generation: 7,
        by_vip: services.iter().map(|one| (Ip::v4(one.vip.v4.octets()), one.name.clone())).collect(),
        services: services.into_iter().map(|one| (one.name.clone(), one)).collect(),
        ..Snapshot::default()
    })
}

impl Bed {
    /// `None`: this machine cannot run it, which has been said aloud.
    pub(super) fn new() -> Result<Option<Self>> {
        if !require(Tier::Netns) {
            return Ok(None);
        }
        let Some(scene) = Scene::new(0)? else { return Ok(None) };
        for address in [format!("{RESOLVER}/32"), format!("{SECOND}/32"), "fd00:53::1/128".to_owned()] {
            scene.ip(&format!("addr add {address} dev lo"))?;
        }
        let folder = std::env::temp_dir().join(format!("mesh-test-{}-names", std::process::id()));
        fs::create_dir_all(&folder)?;
        let mut bed = Self { scene, folder, resolver: None, runtime: None, clients: Vec::new() };
        for (file, text) in [
            ("hosts", "127.0.0.1 localhost\n".to_owned()),
            ("nsswitch.conf", "hosts: files dns\n".to_owned()),
            ("inside.sh", INSIDE.to_owned()),
            ("names.py", PYTHON.to_owned()),
            ("Names.java", JAVA.to_owned()),
            ("musl.c", MUSL.to_owned()),
            ("many", (0..100).map(|n| format!("10.91.0.{n} many.example\n")).collect()),
        ] {
            fs::write(bed.folder.join(file), text)?;
        }
        bed.start_resolver()?;
        bed.start_agent()?;
        bed.find_clients()?;
        Ok(Some(bed))
    }

    /// All that are installed; what is not is said aloud.
    fn find_clients(&mut self) -> Result<()> {
        let there = |program: &str| Command::new("which").arg(program).output().is_ok_and(|it| it.status.success());
        let (musl, source) = (self.folder.join("musl"), self.folder.join("musl.c"));
        if there("musl-gcc") {
            let made = Command::new("musl-gcc").args(["-static", "-O1", "-o"]).args([&musl, &source]).output()?;
            ensure!(made.status.success(), "musl-gcc: {}", String::from_utf8_lossy(&made.stderr));
        }
        let java = there("java") && there("javac");
        if java {
            let made =
                Command::new("javac").arg("-d").args([&self.folder, &self.folder.join("Names.java")]).output()?;
            ensure!(made.status.success(), "javac: {}", String::from_utf8_lossy(&made.stderr));
        }
        for (client, package, found) in [
            (Client::Glibc, "libc-bin", there("getent")),
            (Client::Python, "python3", Path::new("/usr/bin/python3").exists()),
            (Client::Musl, "musl-tools", musl.exists()),
            (Client::Node, "nodejs", there("node")),
            (Client::NodeLookup, "nodejs", there("node")),
            (Client::Java, "a JDK, which the set-up leaves to you for its size", java),
        ] {
            match found {
                true => self.clients.push(client),
                false => eprintln!("SKIPPED the resolver of {client}: not installed (Debian: {package})"),
            }
        }
        Ok(())
    }

    pub(super) fn clients(&self) -> Vec<Client> {
        self.clients.clone()
    }

    fn start_resolver(&mut self) -> Result<()> {
        let mut dnsmasq = Command::new("dnsmasq");
        dnsmasq.args(["--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root", "--keep-in-foreground"]);
        dnsmasq.args(["--bind-interfaces", "--local=/#/", "--pid-file="]).args([
            format!("--listen-address={RESOLVER}"),
            "--host-record=elsewhere.example,10.90.0.9".to_owned(),
            format!("--host-record={LONG},10.90.0.9"),
            "--host-record=taken.corp.test,10.90.0.9".to_owned(),
            format!("--addn-hosts={}", self.folder.join("many").display()),
            format!("--log-facility={}", self.folder.join("dnsmasq.log").display()),
        ]);
        let child = self.scene.space.netns.run(|| dnsmasq.spawn())?.context("start dnsmasq")?;
        self.resolver = Some(child);
        until(LIMIT, "the task's resolver listens", || {
            Ok(self.scene.space.netns.run(|| TcpStream::connect((RESOLVER, 53)))?.map(drop))
        })
    }

    fn start_agent(&mut self) -> Result<()> {
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, DNS));
        let (udp, tcp) = self.scene.space.netns.run(|| (socket::udp_socket(at), socket::tcp_listener(at)))?;
        let listeners = Listeners { udp: vec![udp?], tcp: vec![tcp?] };
        let (publisher, published) = state::publish();
        publisher.replace(snapshot()?);
        let mut config = config::parse(config::EXAMPLE).map_err(|faults| anyhow::anyhow!("{faults:?}"))?.dns;
        config.search = Some(vec!["corp.test".into(), "eu.internal".into()]);
        let netns = Arc::new(Netns::open(self.scene.space.netns.path())?);
        let context = dns::Context {
            published,
            config: Arc::new(config),
            originals: Originals::Kernel { flows: self.scene.readers.flows.clone(), netns_cookie: netns.cookie() },
            netns: Some(netns),
            fallback: [RESOLVER, SECOND].map(|ip| (ip, 53).into()).into(),
            counters: Arc::new(DnsCounters::default()),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        runtime.spawn(dns::server::serve(context, listeners));
        self.runtime = Some(runtime);
        Ok(())
    }

    /// Its sockets are closed, as the kernel does for a process that is killed.
    pub(super) fn end_agent(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(LIMIT);
        }
    }

    /// Its sockets stay, its heart does not beat.
    pub(super) fn hang_agent(&mut self, hangs: bool) -> Result<()> {
        self.scene.heartbeat_limit(if hangs { 0 } else { u64::MAX })
    }

    /// What the task is told about its resolvers.
    pub(super) fn resolv_conf(&self, servers: &[Ipv4Addr], more: &str) -> Result<()> {
        let servers: String = servers.iter().map(|ip| format!("nameserver {ip}\n")).collect();
        Ok(fs::write(self.folder.join("resolv.conf"), format!("{servers}{more}\n"))?)
    }

    /// Ends the task's resolver; `silent`: its address takes questions and says nothing while the value lives.
    pub(super) fn kill_resolver(&mut self, silent: bool) -> Result<Option<UdpSocket>> {
        if let Some(mut child) = self.resolver.take() {
            child.kill()?;
            child.wait()?;
        }
        silent.then(|| self.silent(RESOLVER)).transpose()
    }

    /// A resolver that takes questions and says nothing.
    pub(super) fn silent(&self, ip: Ipv4Addr) -> Result<UdpSocket> {
        Ok(self.scene.space.netns.run(|| UdpSocket::bind((ip, 53)))??)
    }

    pub(super) fn look_up(&self, client: Client, name: &str) -> Result<String> {
        self.look_up_as(client, name, "4")
    }

    pub(super) fn look_up_v6(&self, client: Client, name: &str) -> Result<String> {
        self.look_up_as(client, name, "6")
    }

    /// The addresses found with a space between, or why there are none.
    fn look_up_as(&self, client: Client, name: &str, family: &str) -> Result<String> {
        let folder = self.folder.display().to_string();
        let script = format!("{folder}/names.py");
        let said = match client {
            Client::Glibc => self.run(&["sh", "-c", "getent ahosts \"$0\" || echo no such name", name])?,
            Client::Python => self.run(&["/usr/bin/python3", &script, name, family])?,
            Client::Musl => self.run(&["MUSL", family, name])?,
            Client::Node => {
                // It has no search, so programs that use it say whole names; but for one label there is nothing to add.
                self.run(&["node", "-e", NODE, "resolve", name, family])?
            }
            Client::NodeLookup => self.run(&["node", "-e", NODE, "lookup", name, family])?,
            Client::Java => {
                self.run(&["java", "-Xshare:auto", "-XX:TieredStopAtLevel=1", "-cp", &folder, "Names", name])?
            }
        };
        if client != Client::Glibc || said.trim() == "no such name" {
            return Ok(said.trim().to_owned());
        }
        let mut found: Vec<_> = said.lines().filter_map(|line| line.split_whitespace().next()).collect();
        found.sort_unstable();
        found.dedup();
        Ok(found.join(" "))
    }

    /// So many processes that look up one name at once.
    pub(super) fn crowd(&self, count: usize, name: &str, expected: &str) -> Result<()> {
        let loops = format!("for n in $(seq {count}); do getent ahostsv4 {name} & done; wait");
        let said = self.run(&["sh", "-c", &loops])?;
        let found = said.lines().filter(|line| line.starts_with(expected) && line.contains("STREAM")).count();
        ensure!(found == count, "{found} of {count}");
        Ok(())
    }

    /// The same while the agent is busy elsewhere, until the client has sent so many questions.
    pub(super) fn run_unheard(&self, questions: u64, argv: &[&str]) -> Result<String> {
        let runtime = self.runtime.as_ref().context("the agent lives")?;
        let (busy, is_busy) = mpsc::channel::<()>();
        let (release, released) = mpsc::channel::<()>();
        // Its only thread. The channel closes when it is to go on.
        runtime.spawn(async move {
            drop(busy);
            released.recv().ok();
        });
        is_busy.recv().ok();
        let before = self.scene.dns_questions()?;
        let child = self.begin(argv)?;
        until(LIMIT, "the client has asked", || {
            let asked = self.scene.dns_questions()? - before;
            Ok(if asked >= questions { Ok(()) } else { Err(asked) })
        })?;
        drop(release);
        Self::end(child)
    }

    /// What a program of the task says, on both of its outputs.
    pub(super) fn run(&self, argv: &[&str]) -> Result<String> {
        Self::end(self.begin(argv)?)
    }

    fn begin(&self, argv: &[&str]) -> Result<Child> {
        let musl = self.folder.join("musl").display().to_string();
        let folder = self.folder.display().to_string();
        let mut command = Command::new("unshare");
        command.args(["-m", "sh"]).arg(self.folder.join("inside.sh")).arg(&folder);
        command.args(argv.iter().map(|word| if *word == "MUSL" { musl.as_str() } else { word }));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.scene.space.netns.run(|| command.spawn())??;
        let task = self.scene.stage.cgroup().join("task/cgroup.procs");
        fs::write(task, child.id().to_string())?;
        child.stdin.take().context("piped above")?.write_all(b"go\n")?;
        Ok(child)
    }

    fn end(child: Child) -> Result<String> {
        let output = child.wait_with_output()?;
        let texts = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        ensure!(output.status.success(), "{} {texts:?}", output.status);
        Ok(texts.concat())
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.end_agent();
        // Both fail only where nothing is left to do.
        drop(self.kill_resolver(false));
        drop(fs::remove_dir_all(&self.folder));
    }
}

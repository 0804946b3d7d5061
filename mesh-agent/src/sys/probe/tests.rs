//! Probes on the machine at hand: what the test can arrange is checked, the rest must at least be answered.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, UdpSocket},
    os::unix::{fs::PermissionsExt as _, net::UnixListener},
    thread,
};

use super::*;

/// A directory of its own, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mesh-probe-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).expect("the temporary directory is writable");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).expect("it was made by this test");
    }
}

/// Free ports, and nobody at home.
fn settings(scratch: &Scratch) -> Settings {
    let free = || {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
        listener.local_addr().expect("it is bound")
    };
    Settings {
        cgroup_root: None,
        pin_dir: scratch.0.join("pins"),
        docker_socket: scratch.0.join("docker.sock"),
        ecs_agent: free(),
        outbound_port: free().port(),
        dns_port: free().port(),
        tunnel_listen: free(),
        metrics: free(),
        admin_socket: scratch.0.join("admin.sock"),
        ca_bundle: None,
        join_token: None,
    }
}

fn find<'a>(findings: &'a [Finding], name: &str) -> &'a Finding {
    findings.iter().find(|finding| finding.name == name).unwrap_or_else(|| panic!("no `{name}` in {findings:#?}"))
}

#[test]
fn everything_is_looked_at_and_each_lack_has_a_remedy() {
    let scratch = Scratch::new("all");
    let findings = all(&settings(&scratch));
    for name in ["kernel", "capabilities", "BPF", "BTF", "cgroup2", "bpffs", "pins", "clock", "Docker", "ECS agent"] {
        find(&findings, name);
    }
    for finding in &findings {
        assert_eq!(finding.remedy.is_none(), finding.verdict == Verdict::Ok, "{finding}");
        assert!(!finding.found.is_empty(), "{finding}");
    }
    assert_eq!(passed(&findings), findings.iter().all(|finding| finding.verdict != Verdict::Fail));
}

#[test]
fn a_port_clash_is_seen() {
    let scratch = Scratch::new("clash");
    let settings = settings(&scratch);
    let _tunnel = TcpListener::bind(settings.tunnel_listen).expect("it was free");
    let _dns = UdpSocket::bind(("127.0.0.1", settings.dns_port)).expect("it was free");
    let findings = host::ports(&settings, false);
    let tunnel = find(&findings, &format!("port {}/tcp", settings.tunnel_listen.port()));
    assert_eq!(tunnel.verdict, Verdict::Fail, "{tunnel}");
    assert!(tunnel.remedy.as_deref().is_some_and(|remedy| remedy.contains("proxy.tunnel_listen")), "{tunnel}");
    assert_eq!(find(&findings, &format!("port {}/udp", settings.dns_port)).verdict, Verdict::Fail);
    assert_ne!(find(&findings, &format!("port {}/tcp", settings.metrics.port())).verdict, Verdict::Fail);
    // The same ports in the hands of our own agent are as they should be.
    let findings = host::ports(&settings, true);
    assert_eq!(find(&findings, &format!("port {}/udp", settings.dns_port)).verdict, Verdict::Ok);
}

#[test]
fn a_living_agent_is_noticed() {
    let scratch = Scratch::new("living");
    let socket = scratch.0.join("admin.sock");
    assert!(!host::agent_runs(&socket));
    let _listener = UnixListener::bind(&socket).expect("the directory is writable");
    assert!(host::agent_runs(&socket));
}

#[test]
fn docker_is_asked_for_its_version() {
    let scratch = Scratch::new("docker");
    let socket = scratch.0.join("docker.sock");
    assert_eq!(host::docker(&socket).verdict, Verdict::Fail);
    let check = |answer: &'static str, verdict| {
        let listener = UnixListener::bind(&socket).expect("the directory is writable");
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("the probe connects");
            let mut request = [0; 1024];
            let length = stream.read(&mut request).expect("the probe asks");
            stream.write_all(answer.as_bytes()).expect("the probe reads");
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        let finding = host::docker(&socket);
        assert!(server.join().expect("no panic").starts_with("GET /version HTTP/1.0\r\n"));
        assert_eq!(finding.verdict, verdict, "{answer}: {finding}");
        std::fs::remove_file(&socket).expect("it was made here");
        finding
    };
    let good =
        "HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{\"Version\":\"25.0.8\",\"ApiVersion\":\"1.44\"}";
    let found = check(good, Verdict::Ok).found;
    assert!(found.starts_with("25.0.8, API 1.44"), "{found}");
    check("HTTP/1.0 500 Internal Server Error\r\n\r\n{}", Verdict::Fail);
    check("HTTP/1.0 200 OK\r\n\r\n{}", Verdict::Fail);
    check("SSH-2.0-OpenSSH_9.2\r\n", Verdict::Fail);
}

#[test]
fn a_secret_that_everybody_can_read_is_none() {
    let scratch = Scratch::new("secret");
    let path = scratch.0.join("join-token");
    let check = |verdict| {
        let finding = host::secret("join token", &path, Verdict::Fail);
        assert_eq!(finding.verdict, verdict, "{finding}");
    };
    check(Verdict::Fail);
    std::fs::write(&path, "").expect("the directory is writable");
    check(Verdict::Fail);
    std::fs::write(&path, "token").expect("the directory is writable");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("it is ours");
    check(Verdict::Fail);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("it is ours");
    check(Verdict::Ok);
    assert_eq!(host::secret("join token", &scratch.0, Verdict::Fail).verdict, Verdict::Fail, "a directory is no file");
}

#[test]
fn what_is_no_cgroup2_and_no_bpffs_is_refused() {
    let scratch = Scratch::new("mounts");
    assert_eq!(kernel::cgroup2(Some(&scratch.0)).verdict, Verdict::Fail);
    assert_eq!(kernel::cgroup2(Some(Path::new("/nonexistent"))).verdict, Verdict::Fail);
    assert_eq!(kernel::bpffs(&scratch.0.join("a/b")).verdict, Verdict::Fail);
}

#[test]
fn pins_are_counted() {
    let scratch = Scratch::new("pins");
    assert_eq!(kernel::pins(&scratch.0.join("none"), false).verdict, Verdict::Ok);
    std::fs::write(scratch.0.join("a"), "").expect("the directory is writable");
    let left = kernel::pins(&scratch.0, false);
    assert_eq!(left.verdict, Verdict::Warn);
    assert!(left.found.starts_with("1 in"), "{left}");
    assert_eq!(kernel::pins(&scratch.0, true).verdict, Verdict::Ok);
}

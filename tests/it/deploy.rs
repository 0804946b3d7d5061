//! The deploy artefacts, each judged by the real tool that reads it: systemd, shellcheck, bash, the agent's own parsers.
//!
//! Must not know the agent's insides.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use mesh_core::{config, services};

/// The folder `deploy` of the workspace.
fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn read(path: &str) -> String {
    let path = deploy().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

/// Fails, and names the remedy, where a tool is missing.
fn need(tool: &str, package: &str) {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(tool).is_file()));
    assert!(found, "{tool} is missing: apt-get install {package}");
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"))
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A directory of its own, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mesh-deploy-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("the temporary directory is writable");
        Self(path)
    }

    fn write(&self, path: &str, mode: u32, text: &str) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().expect("it is below the scratch folder")).expect("writable");
        fs::write(&path, text).expect("writable");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("it is ours");
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).expect("it was made by this test");
    }
}

#[test]
fn the_unit_is_accepted_by_systemd() {
    need("systemd-analyze", "systemd");
    let scratch = Scratch::new("unit");
    // systemd looks whether the program is there; on the machine of the test it is not installed.
    let unit = read("systemd/ecs-mesh.service");
    scratch.write("ecs-mesh.service", 0o644, &unit.replace("/usr/local/bin/mesh-agent", "/bin/true"));
    let verify = || {
        let output = run(Command::new("systemd-analyze").arg("verify").arg(scratch.0.join("ecs-mesh.service")));
        (output.status.success(), text(&output))
    };
    let (good, said) = verify();
    assert!(good && !said.contains("ecs-mesh.service:"), "{said}");
    // The tool does notice what is wrong.
    scratch.write("ecs-mesh.service", 0o644, &unit.replace("Restart=always", "Restart=sometimes"));
    let (_, said) = verify();
    assert!(said.contains("sometimes"), "{said}");
}

#[test]
fn the_unit_starts_between_docker_and_ecs() {
    let unit = read("systemd/ecs-mesh.service");
    let values = |key: &str| -> Vec<String> {
        let lines = unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        lines.flat_map(str::split_whitespace).map(str::to_owned).collect()
    };
    assert!(values("Before").contains(&"ecs.service".into()));
    assert!(values("After").contains(&"docker.service".into()));
    assert_eq!(values("Restart"), ["always"]);
    assert_eq!(values("StartLimitIntervalSec"), ["0"]);
    assert_eq!(values("ExecStart"), ["/usr/local/bin/mesh-agent", "run", "--config", "/etc/ecs-mesh/agent.toml"]);
    // A mount namespace of its own would hide docker's namespace files from the agent.
    for key in
        ["ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateMounts", "PrivateNetwork", "ProtectKernelTunables"]
    {
        assert_eq!(values(key), [] as [&str; 0], "{key}");
    }
    assert_eq!(values("RestrictNamespaces"), ["net"], "setns into network namespaces must stay possible");
}

#[test]
fn the_examples_are_accepted_by_the_agent() {
    let agent = config::parse(&read("config/agent.toml")).unwrap_or_else(|faults| panic!("{faults:#?}"));
    assert_eq!(agent.identity.trust_domain.as_str(), "demo.mesh");
    let set = services::parse(&read("config/services.toml")).unwrap_or_else(|faults| panic!("{faults:#?}"));
    let names: Vec<_> = set.services.keys().map(|name| name.as_str()).collect();
    assert_eq!(names, ["billing", "cache", "world"]);
    assert_eq!(set.policy.map(|policy| policy.rules.len()), Some(1));
}

#[test]
fn the_user_data_is_clean_shell() {
    need("shellcheck", "shellcheck");
    let output = run(Command::new("shellcheck")
        .arg("--enable=all")
        .arg("--exclude=SC2250,SC2310,SC2311,SC2312")
        .arg(deploy().join("user-data.sh")));
    assert!(output.status.success(), "{}", text(&output));
    // EC2 takes 16 KB, before base64.
    assert!(read("user-data.sh").len() < 16 * 1024);
}

#[test]
fn the_user_data_carries_the_unit() {
    let script = read("user-data.sh");
    assert!(script.contains(&format!("<<'UNIT'\n{}UNIT\n", read("systemd/ecs-mesh.service"))));
}

/// What the machine has under a container instance's names, so that the script can run as it is: everything that
/// would leave the machine is replaced, and notes how it was called.
struct Instance(Scratch);

/// The agent's own checks are its own; everything else is only noted.
const AGENT: &str =
    "#!/bin/bash\necho \"mesh-agent $*\" >>/calls\n[[ $1 != config ]] || exec /built/mesh-agent \"$@\"\n";

impl Instance {
    fn new(name: &str) -> Self {
        need("unshare", "util-linux");
        assert!(nix::unistd::geteuid().is_root(), "root is needed to run the user data in a root folder of its own");
        let scratch = Scratch::new(name);
        let fake = |tool: &str, script: &str| {
            scratch.write(
                &format!("fake/{tool}"),
                0o755,
                &format!("#!/bin/bash\necho \"{tool} $*\" >>/calls\n{script}\n"),
            );
        };
        fake("systemctl", "");
        fake("mountpoint", "");
        fake("sysctl", "[[ $1 != -n ]] || echo 8080,15000-15003");
        fake(
            "curl",
            "case ${!#} in */token) echo t ;; */availability-zone) echo eu-central-1a ;; */region) echo eu-central-1 ;;
                */local-ipv4) cat /address 2>/dev/null || exit 22 ;; *) exit 22 ;; esac",
        );
        fake(
            "aws",
            "case \"$1 $2\" in
                's3 cp') case ${!#} in -) cat \"/${4##*/}\" ;; *) cat /agent >\"${!#}\" ;; esac ;;
                'ssm get-parameter') echo sealed-bundle ;;
                'secretsmanager get-secret-value') echo token ;;
                *) exit 1 ;;
            esac",
        );
        scratch.write("agent", 0o644, AGENT);
        let built = mesh_tests::mesh::agent_program().expect("the agent is built");
        fs::create_dir_all(scratch.0.join("built")).expect("writable");
        fs::copy(&built, scratch.0.join("built/mesh-agent")).expect("it can be copied");
        scratch.write("address", 0o644, "10.0.1.7\n");
        scratch.write("services.toml", 0o644, &read("config/services.toml"));
        scratch.write("user-data.sh", 0o755, &read("user-data.sh"));
        scratch.write(
            "etc/ecs/ecs.config",
            0o644,
            "ECS_CLUSTER=production\nECS_INSTANCE_ATTRIBUTES={\"stack\":\"a/b&\\\\c\"}\nECS_RESERVED_PORTS=[22,9999]\n",
        );
        for folder in ["usr/local/bin", "proc", "dev", "tmp", "sys", "bin", "sbin", "lib", "lib64"] {
            fs::create_dir_all(scratch.0.join(folder)).expect("writable");
        }
        Self(scratch)
    }

    /// Runs the script with the scratch folder as root, in a mount namespace that ends with it.
    fn run(&self, settings: &[(&str, &str)]) -> Output {
        fs::write(self.0.0.join("calls"), "").expect("writable");
        // The folders of the machine's programs, except for those where the script installs.
        const ENTER: &str = r#"
            set -e
            for folder in bin sbin lib lib64 usr/bin usr/sbin usr/lib usr/lib64 usr/share dev proc; do
                [[ -d /$folder ]] || continue
                mkdir -p "$0/$folder"
                mount --bind "/$folder" "$0/$folder"
            done
            exec chroot "$0" /usr/bin/env -i PATH=/fake:/usr/sbin:/usr/bin:/sbin:/bin "$@" /bin/bash /user-data.sh"#;
        let settings = settings.iter().map(|(key, value)| format!("{key}={value}"));
        run(Command::new("unshare").args(["--mount", "bash", "-c", ENTER]).arg(&self.0.0).args(settings))
    }

    fn calls(&self) -> String {
        self.text("calls")
    }

    fn text(&self, path: &str) -> String {
        fs::read_to_string(self.0.0.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Inode, time of the last change in nanoseconds, and mode: what shows that a file was written again.
    fn state(&self, path: &str) -> (u64, i64, u32) {
        let found = fs::metadata(self.0.0.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
        (found.ino(), found.ctime_nsec(), found.mode() & 0o777)
    }
}

fn sha256(path: &Path) -> String {
    let output = run(Command::new("sha256sum").arg(path));
    text(&output).split_whitespace().next().expect("sha256sum prints the sum first").to_owned()
}

const SETTINGS: [(&str, &str); 5] = [
    ("MESH_BINARY_S3_URI", "s3://artefacts/mesh-agent"),
    ("MESH_TRUST_DOMAIN", "prod.mesh"),
    ("MESH_CA_BUNDLE", "/mesh/ca-bundle"),
    ("MESH_JOIN_TOKEN", "arn:aws:secretsmanager:eu-central-1:1:secret:mesh"),
    ("MESH_SERVICES_S3_URI", "s3://artefacts/services.toml"),
];

#[test]
fn the_user_data_installs_and_changes_nothing_the_second_time() {
    let instance = Instance::new("install");
    let sum = sha256(&instance.0.0.join("agent"));
    let settings: Vec<_> = SETTINGS.into_iter().chain([("MESH_BINARY_SHA256", sum.as_str())]).collect();
    let output = instance.run(&settings);
    assert!(output.status.success(), "{}", text(&output));

    let agent = config::parse(&instance.text("etc/ecs-mesh/agent.toml")).unwrap_or_else(|faults| panic!("{faults:#?}"));
    assert_eq!(agent.identity.trust_domain.as_str(), "prod.mesh");
    assert_eq!(agent.host.cluster.as_ref().map(|cluster| cluster.as_str()), Some("production"));
    assert_eq!(agent.host.zone.as_deref(), Some("eu-central-1a"));
    assert_eq!(agent.services_file.as_deref(), Some(Path::new("/etc/ecs-mesh/services.toml")));
    assert!(services::parse(&instance.text("etc/ecs-mesh/services.toml")).is_ok());
    assert_eq!(instance.text("etc/ecs-mesh/ca-bundle.pem"), "sealed-bundle\n");
    assert_eq!(instance.text("etc/ecs-mesh/join-token"), "token\n");
    assert_eq!(instance.text("etc/systemd/system/ecs-mesh.service"), read("systemd/ecs-mesh.service"));
    assert_eq!(
        instance.text("etc/ecs/ecs.config"),
        "ECS_CLUSTER=production\n\
         ECS_RESERVED_PORTS=[22,2375,2376,9999,15001,15008,15020,15053,51678,51679]\n\
         ECS_RESERVED_PORTS_UDP=[15053]\n\
         ECS_INSTANCE_ATTRIBUTES={\"ecs-mesh.address\": \"10.0.1.7\", \"ecs-mesh.tunnel-port\": \"15008\", \
         \"stack\": \"a/b&\\\\c\"}\n"
    );
    // What the ECS source of other agents reads.
    let config = instance.text("etc/ecs/ecs.config");
    for name in [mesh_core::ecs::model::attribute::ADDRESS, mesh_core::ecs::model::attribute::TUNNEL_PORT] {
        assert!(config.contains(&format!("\"{name}\": \"")), "{name} is not in\n{config}");
    }
    assert_eq!(
        instance.text("etc/sysctl.d/90-ecs-mesh.conf"),
        "net.ipv4.ip_local_reserved_ports = 8080,15000-15003,15001,15008,15020,15053\n"
    );
    let calls = instance.calls();
    assert!(calls.contains("mesh-agent config check /etc/ecs-mesh/agent.toml."), "{calls}");
    for call in [
        "sysctl -q -p /etc/sysctl.d/90-ecs-mesh.conf",
        "systemctl enable ecs-mesh.service",
        "systemctl restart ecs-mesh.service",
    ] {
        assert!(calls.lines().any(|line| line == call), "`{call}` is not among\n{calls}");
    }

    let files = [
        ("usr/local/bin/mesh-agent", 0o755),
        ("etc/ecs-mesh/agent.toml", 0o644),
        ("etc/ecs-mesh/ca-bundle.pem", 0o600),
        ("etc/ecs-mesh/join-token", 0o600),
        ("etc/ecs-mesh/services.toml", 0o644),
        ("etc/ecs/ecs.config", 0o644),
        ("etc/sysctl.d/90-ecs-mesh.conf", 0o644),
        ("etc/systemd/system/ecs-mesh.service", 0o644),
    ];
    let before = files.map(|(path, _)| instance.state(path));
    assert_eq!(before.map(|(.., mode)| mode), files.map(|(_, mode)| mode));
    let output = instance.run(&settings);
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(files.map(|(path, _)| instance.state(path)), before, "{}", text(&output));
    let calls = instance.calls();
    assert!(calls.contains("systemctl start ecs-mesh.service") && !calls.contains("restart"), "{calls}");
    assert!(!calls.contains("s3://artefacts/mesh-agent"), "the binary is there already:\n{calls}");
}

/// What an operator adds to have registries asked.
const REGISTRIES: &str = "[discovery.ecs]\nclusters = [\"production\"]\n\n[discovery.cloud_map]\n\
    namespaces = [\"my.demo\"]\n\n[discovery.cloud_map.registration]\nenabled = true\n\n[readiness]\ncheck = \"tcp\"";

#[test]
fn the_user_data_switches_registries_on() {
    let instance = Instance::new("registries");
    let sum = sha256(&instance.0.0.join("agent"));
    let settings: Vec<_> = SETTINGS.into_iter().chain([("MESH_BINARY_SHA256", sum.as_str())]).collect();
    let and = |more: &[(&'static str, &'static str)]| [&settings[..], more].concat();
    let file = "etc/ecs-mesh/agent.toml";
    instance.0.write("more.toml", 0o644, REGISTRIES);
    for more in [("MESH_AGENT_CONFIG", REGISTRIES), ("MESH_AGENT_CONFIG_S3_URI", "s3://artefacts/more.toml")] {
        let settings = and(&[more]);
        let output = instance.run(&settings);
        assert!(output.status.success(), "{}", text(&output));
        let agent = config::parse(&instance.text(file)).unwrap_or_else(|faults| panic!("{faults:#?}"));
        assert_eq!(agent.host.zone.as_deref(), Some("eu-central-1a"));
        let discovery = &agent.discovery;
        assert!(discovery.ecs.is_some(), "{discovery:#?}");
        let cloud_map = discovery.cloud_map.as_ref().expect("it is asked");
        assert_eq!(cloud_map.namespaces, ["my.demo"]);
        let before = instance.state(file);
        let output = instance.run(&settings);
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(instance.state(file), before, "{}", text(&output));
        assert!(!instance.calls().contains("restart"), "{}", instance.calls());
    }
    // What the agent would refuse does not take the place of what it runs with.
    let before = instance.state(file);
    for (faulty, said) in [
        ("[discovery.ecs]\nclusterz = []", "did you mean `clusters`?"),
        ("[discovery.ecs", "line "),
        ("[identity]\nleaf_ttl = \"1h\"", "duplicate key"),
    ] {
        let output = instance.run(&and(&[("MESH_AGENT_CONFIG", faulty)]));
        assert!(!output.status.success(), "{faulty}");
        let told = text(&output);
        assert!(told.contains(said) && told.contains("agent.toml is not written, and stays as it was"), "{told}");
        assert_eq!(instance.state(file), before, "{faulty}");
        assert!(!instance.calls().contains("systemctl"), "{}", instance.calls());
        let left = fs::read_dir(instance.0.0.join("etc/ecs-mesh")).expect("it exists").count();
        assert_eq!(left, 4, "no draft is left");
    }
    let both = and(&[("MESH_AGENT_CONFIG", REGISTRIES), ("MESH_AGENT_CONFIG_S3_URI", "s3://artefacts/more.toml")]);
    let output = instance.run(&both);
    assert!(!output.status.success() && text(&output).contains("are both set"), "{}", text(&output));
    assert_eq!(instance.calls(), "");
}

/// A commented section of the example is what the agent takes when somebody removes the comment's sign.
#[test]
fn the_commented_sections_of_the_example_are_accepted() {
    let example = read("config/agent.toml");
    let uncommented = |line: &str| {
        let code = line.strip_prefix("# ").filter(|code| code.starts_with('[') || code.contains(" = "));
        code.filter(|code| code.starts_with('[') || code.starts_with(|c: char| c.is_ascii_lowercase()))
            .map(str::to_owned)
    };
    let lines: Vec<_> = example.lines().map(|line| uncommented(line).unwrap_or_else(|| line.to_owned())).collect();
    let agent = config::parse(&lines.join("\n")).unwrap_or_else(|faults| panic!("{faults:#?}"));
    let discovery = agent.discovery;
    assert!(discovery.consul.is_some() && discovery.ecs.is_some() && discovery.cloud_map.is_some());
}

#[test]
fn the_user_data_makes_what_is_missing() {
    let instance = Instance::new("fresh");
    fs::remove_dir_all(instance.0.0.join("etc/ecs")).expect("it was made by this test");
    let sum = sha256(&instance.0.0.join("agent"));
    let more = [("MESH_BINARY_SHA256", sum.as_str()), ("MESH_CLUSTER", "staging")];
    let output = instance.run(&SETTINGS.into_iter().chain(more).collect::<Vec<_>>());
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(
        instance.text("etc/ecs/ecs.config"),
        "ECS_CLUSTER=staging\n\
         ECS_RESERVED_PORTS=[22,2375,2376,15001,15008,15020,15053,51678,51679]\n\
         ECS_RESERVED_PORTS_UDP=[15053]\n\
         ECS_INSTANCE_ATTRIBUTES={\"ecs-mesh.address\": \"10.0.1.7\", \"ecs-mesh.tunnel-port\": \"15008\"}\n"
    );
    let agent = config::parse(&instance.text("etc/ecs-mesh/agent.toml")).unwrap_or_else(|faults| panic!("{faults:#?}"));
    assert_eq!(agent.host.cluster.as_ref().map(|cluster| cluster.as_str()), Some("staging"));
}

#[test]
fn the_user_data_promises_no_agent_that_it_cannot_place() {
    let instance = Instance::new("attributes");
    let sum = sha256(&instance.0.0.join("agent"));
    let settings: Vec<_> = SETTINGS.into_iter().chain([("MESH_BINARY_SHA256", sum.as_str())]).collect();
    // No address: the host is in the mesh, and says why others will not know by ECS.
    fs::remove_file(instance.0.0.join("address")).expect("it was made by this test");
    let before = "ECS_CLUSTER=production\nECS_INSTANCE_ATTRIBUTES={\"stack\": \"blue\"}\n";
    instance.0.write("etc/ecs/ecs.config", 0o644, before);
    let output = instance.run(&settings);
    assert!(output.status.success() && text(&output).contains("tell no address"), "{}", text(&output));
    assert!(!instance.text("etc/ecs/ecs.config").contains("ecs-mesh."));
    // Attributes that nobody can read are left as they are, and named.
    instance.0.write("address", 0o644, "10.0.1.7\n");
    for odd in ["{stack: blue}", "[]", "7"] {
        instance.0.write("etc/ecs/ecs.config", 0o644, &format!("ECS_CLUSTER=a\nECS_INSTANCE_ATTRIBUTES={odd}\n"));
        let output = instance.run(&settings);
        assert!(!output.status.success(), "{odd}");
        assert!(
            text(&output).contains("ECS_INSTANCE_ATTRIBUTES in /etc/ecs/ecs.config is no JSON"),
            "{}",
            text(&output)
        );
        assert!(instance.text("etc/ecs/ecs.config").contains(&format!("ECS_INSTANCE_ATTRIBUTES={odd}\n")));
    }
    // Quoted, as some write it.
    instance.0.write("etc/ecs/ecs.config", 0o644, "ECS_INSTANCE_ATTRIBUTES='{\"stack\": \"blue\"}'\n");
    let output = instance.run(&settings);
    assert!(output.status.success(), "{}", text(&output));
    assert!(instance.text("etc/ecs/ecs.config").ends_with("\"15008\", \"stack\": \"blue\"}\n"));
    // An agent that does not start.
    instance.0.write("fake/systemctl", 0o755, "#!/bin/bash\n[[ $1 != restart && $1 != start ]]\n");
    instance.0.write("etc/ecs/ecs.config", 0o644, before);
    assert!(!instance.run(&settings).status.success());
    assert!(!instance.text("etc/ecs/ecs.config").contains("ecs-mesh."));
}

#[test]
fn the_user_data_refuses_another_binary_and_missing_settings() {
    let instance = Instance::new("refuse");
    let wrong = "0".repeat(64);
    let settings: Vec<_> = SETTINGS.into_iter().chain([("MESH_BINARY_SHA256", wrong.as_str())]).collect();
    let output = instance.run(&settings);
    assert!(!output.status.success());
    assert!(text(&output).contains("MESH_BINARY_SHA256"), "{}", text(&output));
    let left: Vec<_> = fs::read_dir(instance.0.0.join("usr/local/bin")).expect("it exists").collect();
    assert!(left.is_empty(), "{left:?}");

    for missing in
        ["MESH_BINARY_S3_URI", "MESH_BINARY_SHA256", "MESH_TRUST_DOMAIN", "MESH_CA_BUNDLE", "MESH_JOIN_TOKEN"]
    {
        let settings: Vec<_> = settings.iter().copied().filter(|(key, _)| *key != missing).collect();
        let output = instance.run(&settings);
        assert!(!output.status.success(), "{missing}");
        assert!(text(&output).contains(&format!("{missing} is not set")), "{}", text(&output));
        assert_eq!(instance.calls(), "", "nothing is done without {missing}");
    }
}

/// The strings in a text that name an IAM action of the APIs that discovery asks.
fn actions(text: &str) -> std::collections::BTreeSet<String> {
    let quoted = text.split('"').skip(1).step_by(2);
    let action = |text: &&str| {
        text.split_once(':').is_some_and(|(api, name)| {
            ["servicediscovery", "ecs"].contains(&api)
                && name.starts_with(|c: char| c.is_ascii_uppercase())
                && name.bytes().all(|b| b.is_ascii_alphanumeric())
        })
    };
    quoted.filter(action).map(str::to_owned).collect()
}

#[test]
fn the_policies_permit_exactly_what_is_asked() {
    let sources = ["cloud_map/client.rs", "ecs/client.rs"];
    let sources: String = sources
        .iter()
        .map(|file| {
            let file = deploy().join("../mesh-agent/src/discovery").join(file);
            fs::read_to_string(&file).unwrap_or_else(|error| panic!("cannot read {}: {error}", file.display()))
        })
        .collect();
    // What changes something is permitted apart from what only asks.
    let policies = ["iam/discovery.json", "iam/registration.json"].map(|file| {
        let policy = read(file);
        let parsed: serde_json::Value = serde_json::from_str(&policy).expect("the policy is JSON");
        assert_eq!(parsed["Version"], "2012-10-17");
        actions(&policy)
    });
    assert!(policies.iter().all(|actions| !actions.is_empty()));
    let asks =
        |action: &String| ["Describe", "Discover", "List"].iter().any(|verb| action.contains(&format!(":{verb}")));
    assert!(policies[0].iter().all(asks) && !policies[1].iter().any(asks), "{policies:?}");
    assert_eq!(policies.into_iter().flatten().collect::<std::collections::BTreeSet<_>>(), actions(&sources));
}

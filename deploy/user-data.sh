#!/bin/bash
# User data for an ECS container instance (Amazon Linux 2023 ECS AMI): installs mesh-agent and starts it before the
# ECS agent. Fill in the settings, and paste it as the launch template's user data; or source the settings from
# /etc/ecs-mesh/user-data.env of your image. Running it again changes nothing that is already right.
#
# The instance role needs s3:GetObject on the objects, and ssm:GetParameter or secretsmanager:GetSecretValue (with
# kms:Decrypt on their key) on the CA bundle and the join token.
set -euo pipefail

# --- Settings -------------------------------------------------------------------------------------------------------
if [[ -r /etc/ecs-mesh/user-data.env ]]; then
    # shellcheck source=/dev/null
    source /etc/ecs-mesh/user-data.env
fi
# The mesh-agent binary for this architecture, and its SHA-256 in hex.
MESH_BINARY_S3_URI="${MESH_BINARY_S3_URI:-}"
MESH_BINARY_SHA256="${MESH_BINARY_SHA256:-}"
# The same on all hosts of the mesh.
MESH_TRUST_DOMAIN="${MESH_TRUST_DOMAIN:-}"
# Names of SSM SecureString parameters, or ARNs of Secrets Manager secrets.
MESH_CA_BUNDLE="${MESH_CA_BUNDLE:-}"
MESH_JOIN_TOKEN="${MESH_JOIN_TOKEN:-}"
# Optional: the ECS cluster; left empty, the one in /etc/ecs/ecs.config.
MESH_CLUSTER="${MESH_CLUSTER:-}"
# Optional: services.toml, the same for all hosts.
MESH_SERVICES_S3_URI="${MESH_SERVICES_S3_URI:-}"
# Optional: more of agent.toml, such as '[discovery.ecs]'; every section but [host], [identity] and [services], which
# this script writes. Either the text, in single quotes, or an S3 object, the same for all hosts.
MESH_AGENT_CONFIG="${MESH_AGENT_CONFIG:-}"
MESH_AGENT_CONFIG_S3_URI="${MESH_AGENT_CONFIG_S3_URI:-}"
# --------------------------------------------------------------------------------------------------------------------

# Outbound, tunnel, metrics, DNS: the ports of agent.toml.
PORTS=(15001 15008 15020 15053)
# What the ECS agent reserves when it is told nothing.
ECS_DEFAULT_PORTS=(22 2375 2376 51678 51679)
CONFIG=/etc/ecs-mesh
ECS_CONFIG=/etc/ecs/ecs.config
changed=no

say() { echo "ecs-mesh user data: $*"; }
die() { say "$*" >&2; exit 1; }

need() {
    local name
    for name in "$@"; do
        [[ -n "${!name}" ]] || die "$name is not set: fill in the settings at the top of this script"
    done
}

# Puts standard input into a file with a mode, whole or not at all; notes whether that changed anything. What follows
# the mode is a command that judges the new file before it replaces the old one. Not for the end of a pipe: there the
# note would be lost.
put() {
    local path=$1 mode=$2 check=("${@:3}") draft
    draft=$(mktemp "$path.XXXXXX")
    # shellcheck disable=SC2064 # the draft's name is wanted as it is now
    trap "rm -f '$draft'" EXIT
    cat >"$draft"
    [[ -s $draft ]] || die "nothing to put into $path"
    if ((${#check[@]})) && ! "${check[@]}" "$draft"; then
        die "$path is not written, and stays as it was: correct the settings that it is made of"
    fi
    chmod "$mode" "$draft"
    if [[ -f $path ]] && cmp -s "$draft" "$path" && [[ $(stat -c %a "$path") == "${mode#0}" ]]; then
        rm "$draft"
    else
        mv "$draft" "$path"
        changed=yes
        say "wrote $path"
    fi
    trap - EXIT
}

metadata() {
    local token
    token=$(curl -sSf -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' \
        http://169.254.169.254/latest/api/token) || return 1
    curl -sSf -m 2 -H "X-aws-ec2-metadata-token: $token" "http://169.254.169.254/latest/meta-data/$1"
}

secret() {
    case $1 in
        arn:aws*:secretsmanager:*)
            aws secretsmanager get-secret-value --secret-id "$1" --query SecretString --output text
            ;;
        *) aws ssm get-parameter --name "$1" --with-decryption --query Parameter.Value --output text ;;
    esac
}

# The value of a key of ecs.config; nothing where it is not set.
ecs_setting() { sed -n "s/^$1=//p" "$ECS_CONFIG" | tail -n 1; }

# Numbers and ranges of the arguments, each once, in order, separated by commas.
union() { grep -oE '[0-9]+(-[0-9]+)?' <<<"$*" | sort -Vu | paste -sd, -; }

# Adds ports to a list of ecs.config, and keeps those that are there.
reserve() {
    local key=$1 ports
    shift
    ports=$(union "$(ecs_setting "$key")" "$@")
    if [[ -n $(ecs_setting "$key") ]]; then
        put "$ECS_CONFIG" 0644 <<<"$(sed "s/^$key=.*/$key=[$ports]/" "$ECS_CONFIG")"
    else
        put "$ECS_CONFIG" 0644 <<<"$(cat "$ECS_CONFIG"; echo "$key=[$ports]")"
    fi
}

main() {
    need MESH_BINARY_S3_URI MESH_BINARY_SHA256 MESH_TRUST_DOMAIN MESH_CA_BUNDLE MESH_JOIN_TOKEN
    [[ -z $MESH_AGENT_CONFIG || -z $MESH_AGENT_CONFIG_S3_URI ]] ||
        die "MESH_AGENT_CONFIG and MESH_AGENT_CONFIG_S3_URI are both set: put all of it into one of them"
    command -v aws >/dev/null || dnf install -y awscli-2
    install -d -m 0750 "$CONFIG"
    install -d -m 0755 /etc/ecs /etc/sysctl.d /etc/systemd/system /usr/local/bin
    [[ -f $ECS_CONFIG ]] || : >"$ECS_CONFIG"

    local zone region
    zone=$(metadata placement/availability-zone || true)
    region=$(metadata placement/region || true)
    if [[ -n $region ]]; then
        export AWS_DEFAULT_REGION=$region
    fi

    install_binary
    write_configuration "$zone"
    reserve_ports
    mount_bpffs
    start
    announce
}

install_binary() {
    local binary=/usr/local/bin/mesh-agent draft
    if [[ -x $binary ]] && sha256sum -c --status <<<"$MESH_BINARY_SHA256  $binary"; then
        return
    fi
    draft=$(mktemp "$binary.XXXXXX")
    # shellcheck disable=SC2064 # the draft's name is wanted as it is now
    trap "rm -f '$draft'" EXIT
    aws s3 cp --only-show-errors "$MESH_BINARY_S3_URI" "$draft"
    sha256sum -c --status <<<"$MESH_BINARY_SHA256  $draft" ||
        die "$MESH_BINARY_S3_URI does not have the SHA-256 that MESH_BINARY_SHA256 names"
    chmod 0755 "$draft"
    mv "$draft" "$binary"
    trap - EXIT
    changed=yes
    say "installed $binary"
}

write_configuration() {
    local zone=$1 cluster=${MESH_CLUSTER:-$(ecs_setting ECS_CLUSTER)} bundle token services host=$'[host]\n'
    local more=$MESH_AGENT_CONFIG
    # Into variables first: a secret that cannot be read must not leave an empty file.
    bundle=$(secret "$MESH_CA_BUNDLE")
    token=$(secret "$MESH_JOIN_TOKEN")
    if [[ -n $MESH_SERVICES_S3_URI ]]; then
        services=$(aws s3 cp --only-show-errors "$MESH_SERVICES_S3_URI" -)
    fi
    if [[ -n $MESH_AGENT_CONFIG_S3_URI ]]; then
        more=$(aws s3 cp --only-show-errors "$MESH_AGENT_CONFIG_S3_URI" -)
    fi
    [[ -z $more ]] || more=$'\n'$more
    # What is not known is left out: the agent finds it out itself.
    [[ -z $cluster ]] || host+="cluster = \"$cluster\""$'\n'
    [[ -z $zone ]] || host+="zone = \"$zone\""$'\n'
    put "$CONFIG/agent.toml" 0644 /usr/local/bin/mesh-agent config check <<AGENT
# Written by the instance's user data: what is changed here is lost when that runs again. See MESH_AGENT_CONFIG there.
$host
[identity]
trust_domain = "$MESH_TRUST_DOMAIN"
ca_bundle = "$CONFIG/ca-bundle.pem"
join_token_file = "$CONFIG/join-token"

[services]
file = "$CONFIG/services.toml"
$more
AGENT
    put "$CONFIG/ca-bundle.pem" 0600 <<<"$bundle"
    put "$CONFIG/join-token" 0600 <<<"$token"
    if [[ -n $MESH_SERVICES_S3_URI ]]; then
        put "$CONFIG/services.toml" 0644 <<<"$services"
    fi
    put /etc/systemd/system/ecs-mesh.service 0644 <<'UNIT'
# mesh-agent on an ECS container instance (Amazon Linux 2023 ECS AMI, or any systemd host with Docker).
# Install to /etc/systemd/system; deploy/user-data.sh does it.
[Unit]
Description=ecs-mesh host agent
Documentation=file:///etc/ecs-mesh/agent.toml
Wants=network-online.target
# Docker must answer before the agent asks it for tasks; the ECS agent must not start a task before it is armed.
After=network-online.target docker.service docker.socket sys-fs-bpf.mount
Before=ecs.service
RequiresMountsFor=/sys/fs/bpf /sys/fs/cgroup
ConditionPathExists=/etc/ecs-mesh/agent.toml
# Try for ever: while the agent is away, tasks keep connecting without it.
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStartPre=/usr/local/bin/mesh-agent check --config /etc/ecs-mesh/agent.toml
ExecStart=/usr/local/bin/mesh-agent run --config /etc/ecs-mesh/agent.toml
Restart=always
RestartSec=2
TimeoutStartSec=60
# Longer than proxy.drain of agent.toml.
TimeoutStopSec=30
KillMode=mixed
RuntimeDirectory=ecs-mesh
RuntimeDirectoryMode=0700
RuntimeDirectoryPreserve=restart
StateDirectory=ecs-mesh
StateDirectoryMode=0700
ConfigurationDirectory=ecs-mesh
ConfigurationDirectoryMode=0750
UMask=0077

# Two descriptors per connection, and a few per task.
LimitNOFILE=1048576
TasksMax=4096
# All tasks of the host depend on it: among the last to be killed when memory runs out.
OOMScoreAdjust=-900
# As unlikely to be killed, it must not take the host's memory from the tasks: what clients leave unread waits in the agent, up to
# 25 MB for an HTTP/2 connection and 1 MB for a TCP connection over a tunnel. Killed by this, it starts again at once.
MemoryMax=50%

# What the agent needs: SYS_ADMIN enters network namespaces and loads programs, NET_ADMIN attaches them and marks
# sockets, SYS_PTRACE opens namespaces of tasks whose user is not root, DAC_READ_SEARCH reads below docker's folders.
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_NET_ADMIN CAP_SYS_PTRACE CAP_BPF CAP_PERFMON CAP_DAC_READ_SEARCH CAP_DAC_OVERRIDE CAP_NET_BIND_SERVICE CAP_SYS_RESOURCE
NoNewPrivileges=yes
# Entering a task's network namespace is the one use of namespaces that is left.
RestrictNamespaces=net
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
SystemCallFilter=~@cpu-emulation @debug @module @obsolete @raw-io @reboot @swap
SystemCallErrorNumber=EPERM
# Not used on purpose: ProtectSystem=, ProtectKernelTunables=, ProtectControlGroups=, PrivateTmp= and the like. Each
# would give the agent a mount namespace of its own, a copy of all mounts in which docker's namespace files under
# /run/docker/netns come late, and which keeps those of dead tasks alive.

[Install]
WantedBy=multi-user.target
UNIT
}

reserve_ports() {
    if [[ -n $MESH_CLUSTER && -z $(ecs_setting ECS_CLUSTER) ]]; then
        put "$ECS_CONFIG" 0644 <<<"$(cat "$ECS_CONFIG"; echo "ECS_CLUSTER=$MESH_CLUSTER")"
    fi
    reserve ECS_RESERVED_PORTS "${ECS_DEFAULT_PORTS[@]}" "${PORTS[@]}"
    reserve ECS_RESERVED_PORTS_UDP 15053
    local reserved
    reserved=$(union "$(sysctl -n net.ipv4.ip_local_reserved_ports)" "${PORTS[@]}")
    put /etc/sysctl.d/90-ecs-mesh.conf 0644 <<<"net.ipv4.ip_local_reserved_ports = $reserved"
    sysctl -q -p /etc/sysctl.d/90-ecs-mesh.conf
}

mount_bpffs() {
    # systemd mounts it at boot where the kernel has it.
    mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
}

start() {
    systemctl daemon-reload
    systemctl enable ecs-mesh.service
    if [[ $changed == yes ]]; then
        # Waits until the agent is ready. ecs.service waits for this script to end, and so for the agent.
        systemctl restart ecs-mesh.service
    else
        systemctl start ecs-mesh.service
    fi
    say "mesh-agent runs"
}

# Tells other hosts, by attributes of this container instance, where the tunnels to its tasks end. Attributes that are
# set already stay. The last step: who cannot run the agent must not promise it.
announce() {
    local address attributes
    address=$(metadata local-ipv4 || metadata ipv6 || true)
    if [[ -z $address ]]; then
        say "the instance metadata tell no address: [discovery.ecs] of other hosts will not know of this agent" >&2
        return
    fi
    attributes=$(python3 -c '
import json, sys
text, address, port = sys.argv[1:]
known = json.loads(text.strip().strip("\x27") or "{}")
known.update({"ecs-mesh.address": address, "ecs-mesh.tunnel-port": port})
print(json.dumps(known, sort_keys=True))
' "$(ecs_setting ECS_INSTANCE_ATTRIBUTES)" "$address" "${PORTS[1]}") ||
        die "ECS_INSTANCE_ATTRIBUTES in $ECS_CONFIG is no JSON object: write it like {\"name\": \"value\"}"
    put "$ECS_CONFIG" 0644 <<<"$(grep -v '^ECS_INSTANCE_ATTRIBUTES=' "$ECS_CONFIG"
        echo "ECS_INSTANCE_ATTRIBUTES=$attributes")"
}

main

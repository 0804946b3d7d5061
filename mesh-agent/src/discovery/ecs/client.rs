//! Questions to the ECS API by the SDK, and what of the answers is of use.
//!
//! Must not know when anything is asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use aws_sdk_ecs::types::{self, ApplicationProtocol, HealthStatus, TaskField, TransportProtocol};
use mesh_core::{
    config::ecs::Ecs,
    ecs::model::{Binding, Checked, Connect, Container, Definition, Deployment, Instance, Port, Service, State, Task},
    model::Protocol,
    task::NetworkMode,
};

use super::super::aws::{self, Trouble};

const LIST_SERVICES: &str = "ecs:ListServices";
const DESCRIBE_SERVICES: &str = "ecs:DescribeServices";
const LIST_TASKS: &str = "ecs:ListTasks";
const DESCRIBE_TASKS: &str = "ecs:DescribeTasks";
const LIST_INSTANCES: &str = "ecs:ListContainerInstances";
const DESCRIBE_INSTANCES: &str = "ecs:DescribeContainerInstances";
const DESCRIBE_DEFINITION: &str = "ecs:DescribeTaskDefinition";

/// The most that one question may name of each.
pub const SERVICES_AT_ONCE: usize = 10;
pub const TASKS_AT_ONCE: usize = 100;
pub const INSTANCES_AT_ONCE: usize = 100;

/// A page of ARNs, and the word for the next one.
pub type Page = (Vec<String>, Option<String>);

/// See the module's text.
#[derive(Clone, Debug)]
pub struct Client {
    api: aws_sdk_ecs::Client,
}

fn malformed(action: &'static str) -> Trouble {
    Trouble::Malformed { action, source: None }
}

fn page(arns: Option<Vec<String>>, next: Option<String>, action: &'static str) -> Result<Page, Trouble> {
    Ok((arns.ok_or_else(|| malformed(action))?, next.filter(|token| !token.is_empty())))
}

impl Client {
    /// # Errors
    /// No region is known.
    pub async fn new(config: &Ecs) -> Result<Self, Trouble> {
        Ok(Self { api: aws_sdk_ecs::Client::new(&aws::load(&config.aws).await?) })
    }

    /// # Errors
    /// There is no answer, or none to be relied on; the same for the others.
    pub async fn list_services(&self, cluster: &str, token: Option<String>) -> Result<Page, Trouble> {
        let asked = self.api.list_services().cluster(cluster).max_results(100).set_next_token(token);
        let answer = asked.send().await.map_err(|error| Trouble::of(LIST_SERVICES, error))?;
        page(answer.service_arns, answer.next_token, LIST_SERVICES)
    }

    pub async fn services(&self, cluster: &str, arns: Vec<String>) -> Result<BTreeMap<String, Service>, Trouble> {
        let asked = self.api.describe_services().cluster(cluster).set_services(Some(arns));
        let answer = asked.send().await.map_err(|error| Trouble::of(DESCRIBE_SERVICES, error))?;
        let services = answer.services.ok_or_else(|| malformed(DESCRIBE_SERVICES))?;
        // One that is deleted is described for a while.
        let there = services.into_iter().filter(|it| it.status.as_deref() != Some("INACTIVE"));
        there
            .map(|it| Ok((it.service_name.clone().ok_or_else(|| malformed(DESCRIBE_SERVICES))?, service(it))))
            .collect()
    }

    /// Tasks that are to run: one that is told to stop is not among them.
    pub async fn list_tasks(&self, cluster: &str, token: Option<String>) -> Result<Page, Trouble> {
        let asked = self.api.list_tasks().cluster(cluster).desired_status(types::DesiredStatus::Running);
        let answer = asked.max_results(100).set_next_token(token).send().await;
        let answer = answer.map_err(|error| Trouble::of(LIST_TASKS, error))?;
        page(answer.task_arns, answer.next_token, LIST_TASKS)
    }

    pub async fn tasks(&self, cluster: &str, arns: Vec<String>) -> Result<Vec<Task>, Trouble> {
        let asked = self.api.describe_tasks().cluster(cluster).set_tasks(Some(arns)).include(TaskField::Tags);
        let answer = asked.send().await.map_err(|error| Trouble::of(DESCRIBE_TASKS, error))?;
        let tasks = answer.tasks.ok_or_else(|| malformed(DESCRIBE_TASKS))?;
        tasks.into_iter().map(|it| task(it).ok_or_else(|| malformed(DESCRIBE_TASKS))).collect()
    }

    pub async fn list_instances(&self, cluster: &str, token: Option<String>) -> Result<Page, Trouble> {
        let asked = self.api.list_container_instances().cluster(cluster).max_results(100).set_next_token(token);
        let answer = asked.send().await.map_err(|error| Trouble::of(LIST_INSTANCES, error))?;
        page(answer.container_instance_arns, answer.next_token, LIST_INSTANCES)
    }

    pub async fn instances(&self, cluster: &str, arns: Vec<String>) -> Result<BTreeMap<String, Instance>, Trouble> {
        let asked = self.api.describe_container_instances().cluster(cluster).set_container_instances(Some(arns));
        let answer = asked.send().await.map_err(|error| Trouble::of(DESCRIBE_INSTANCES, error))?;
        let instances = answer.container_instances.ok_or_else(|| malformed(DESCRIBE_INSTANCES))?;
        let one = |it: types::ContainerInstance| {
            let arn = it.container_instance_arn.ok_or_else(|| malformed(DESCRIBE_INSTANCES))?;
            let own = it.attributes.unwrap_or_default().into_iter().filter(|it| it.name.starts_with("ecs-mesh."));
            let attributes = own.map(|it| (it.name, it.value.unwrap_or_default())).collect();
            Ok((arn, Instance { ec2_id: it.ec2_instance_id, attributes }))
        };
        instances.into_iter().map(one).collect()
    }

    pub async fn definition(&self, arn: &str) -> Result<Definition, Trouble> {
        let answer = self.api.describe_task_definition().task_definition(arn).send().await;
        let answer = answer.map_err(|error| Trouble::of(DESCRIBE_DEFINITION, error))?;
        let described = answer.task_definition.ok_or_else(|| malformed(DESCRIBE_DEFINITION))?;
        definition(described).ok_or_else(|| malformed(DESCRIBE_DEFINITION))
    }
}

fn service(it: types::Service) -> Service {
    let deployment = |it: types::Deployment| {
        let connect = it.service_connect_configuration.filter(|connect| connect.enabled);
        let services = connect.and_then(|connect| connect.services).unwrap_or_default();
        let connects = services.into_iter().map(connected).collect();
        Some((it.id?, Deployment { status: it.status.unwrap_or_default(), external_id: None, connects }))
    };
    let task_set = |it: types::TaskSet| {
        let status = it.status.unwrap_or_default();
        Some((it.id?, Deployment { status, external_id: it.external_id, connects: Vec::new() }))
    };
    let deployments = it.deployments.unwrap_or_default().into_iter().filter_map(deployment);
    let task_sets = it.task_sets.unwrap_or_default().into_iter().filter_map(task_set);
    Service { deployments: deployments.chain(task_sets).collect() }
}

/// Without an alias, other tasks know the port by its discovery name only, at no port of its own: nothing is called so.
fn connected(it: types::ServiceConnectService) -> Connect {
    let discovery = it.discovery_name.unwrap_or_else(|| it.port_name.clone());
    let alias = |it: types::ServiceConnectClientAlias| {
        let port = u16::try_from(it.port).ok().filter(|port| *port != 0)?;
        Some((it.dns_name.unwrap_or_else(|| discovery.clone()), port))
    };
    let aliases = it.client_aliases.unwrap_or_default().into_iter().filter_map(alias).collect();
    Connect { port_name: it.port_name, aliases }
}

fn task(it: types::Task) -> Option<Task> {
    let details = it
        .attachments
        .unwrap_or_default()
        .into_iter()
        .filter(|it| it.r#type.as_deref() == Some("ElasticNetworkInterface"));
    let details: Vec<types::KeyValuePair> = details.flat_map(|it| it.details.unwrap_or_default()).collect();
    let containers = it.containers.unwrap_or_default();
    let interfaces = containers.iter().flat_map(|it| it.network_interfaces());
    let interfaces: Vec<&str> =
        interfaces.flat_map(|it| [it.private_ipv4_address(), it.ipv6_address()]).flatten().collect();
    let attached = ["privateIPv4Address", "ipv6Address", "privateIPv6Address"].into_iter().filter_map(|name| {
        let found = details.iter().find(|it| it.name() == Some(name))?;
        found.value()
    });
    let address = attached.chain(interfaces).find_map(|text| text.parse::<IpAddr>().ok());
    let binding = |container: &types::Container, it: &types::NetworkBinding| {
        let tcp = it.protocol.as_ref().is_none_or(|protocol| *protocol == TransportProtocol::Tcp);
        let port = |port: Option<i32>| u16::try_from(port?).ok().filter(|port| *port != 0);
        let container = container.name().unwrap_or_default().to_owned();
        Some(Binding { container, port: port(it.container_port)?, host_port: port(it.host_port)? }).filter(|_| tcp)
    };
    let bound =
        containers.iter().flat_map(|container| container.network_bindings().iter().map(move |it| (container, it)));
    // One for each family of addresses, on the same port or not.
    let bindings: BTreeSet<Binding> = bound.filter_map(|(container, it)| binding(container, it)).collect();
    let runs = |status: &Option<String>| status.as_deref() == Some("RUNNING");
    let state = match it.health_status {
        _ if !runs(&it.desired_status) || !runs(&it.last_status) => State::Not,
        Some(HealthStatus::Healthy) => State::Running(Checked::Healthy),
        Some(HealthStatus::Unhealthy) => State::Running(Checked::Unhealthy),
        Some(_) | None => State::Running(Checked::Unknown),
    };
    let tag = |it: types::Tag| Some((it.key?, it.value.unwrap_or_default()));
    Some(Task {
        arn: it.task_arn?,
        service: it.group.as_ref().and_then(|group| group.strip_prefix("service:")).map(str::to_owned),
        definition: it.task_definition_arn?,
        deployment: it.started_by.filter(|by| by.starts_with("ecs-svc/")),
        instance: it.container_instance_arn,
        zone: it.availability_zone,
        launch_type: it.launch_type.map(|launch| launch.as_str().to_owned()).unwrap_or_default(),
        state,
        address,
        bindings: bindings.into_iter().collect(),
        tags: it.tags.unwrap_or_default().into_iter().filter_map(tag).collect(),
    })
}

fn definition(it: types::TaskDefinition) -> Option<Definition> {
    let mode = match it.network_mode {
        Some(types::NetworkMode::Awsvpc) => NetworkMode::Awsvpc,
        Some(types::NetworkMode::Host) => NetworkMode::Host,
        Some(types::NetworkMode::None) => NetworkMode::None,
        // ECS's default on Linux is bridge.
        Some(_) | None => NetworkMode::Bridge,
    };
    let containers = it.container_definitions.unwrap_or_default();
    let port = |it: &types::PortMapping| {
        let tcp = it.protocol.as_ref().is_none_or(|protocol| *protocol == TransportProtocol::Tcp);
        let protocol = match &it.app_protocol {
            Some(ApplicationProtocol::Http) => Some(Protocol::Http),
            Some(ApplicationProtocol::Http2) => Some(Protocol::Http2),
            Some(ApplicationProtocol::Grpc) => Some(Protocol::Grpc),
            Some(_) | None => None,
        };
        let container = u16::try_from(it.container_port?).ok().filter(|port| *port != 0)?;
        Some(Port { container, name: it.name.clone(), protocol }).filter(|_| tcp)
    };
    let is_checked = containers.iter().any(|it| it.health_check.is_some());
    let container = |it: types::ContainerDefinition| Container {
        ports: it.port_mappings().iter().filter_map(port).collect(),
        labels: it.docker_labels.unwrap_or_default().into_iter().collect(),
        name: it.name.unwrap_or_default(),
    };
    Some(Definition {
        family: it.family?,
        revision: u32::try_from(it.revision).ok()?,
        mode,
        containers: containers.into_iter().map(container).collect(),
        is_checked,
    })
}

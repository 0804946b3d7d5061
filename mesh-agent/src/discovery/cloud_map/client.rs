//! Questions and requests to Cloud Map by the SDK, and what of an answer is of use.
//!
//! Must not know when anything is asked.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use aws_sdk_servicediscovery::types::{
    CustomHealthStatus, FilterCondition, HealthStatus, HealthStatusFilter, HttpInstanceSummary, NamespaceFilter,
    NamespaceFilterName, ServiceFilter, ServiceFilterName,
};
use mesh_core::{
    cloud_map::{
        entries::{Instance, LARGEST_ANSWER, Said},
        known::Key,
        ledger::{Call, Service},
    },
    config::cloud_map::CloudMap,
    instance::meta,
};

use super::super::aws::{self, DataPlane, Trouble, gate::Gate};

const LIST_NAMESPACES: &str = "servicediscovery:ListNamespaces";
const LIST_SERVICES: &str = "servicediscovery:ListServices";
const DISCOVER: &str = "servicediscovery:DiscoverInstances";
const REGISTER: &str = "servicediscovery:RegisterInstance";
const DEREGISTER: &str = "servicediscovery:DeregisterInstance";
const TELL_HEALTH: &str = "servicediscovery:UpdateInstanceCustomHealthStatus";

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Asked {
    /// The services of a namespace, by its place in the configuration.
    Names(usize),
    /// The instances of a service.
    Service(Key),
}

/// Its answer.
#[derive(Debug)]
pub enum Answer {
    Names(BTreeSet<String>),
    Instances(Vec<Instance>),
}

/// What comes of a [`Call`].
#[derive(Debug)]
pub enum Told {
    Services(BTreeMap<String, Service>),
    Instances(Vec<Instance>),
    /// It is taken, and will be carried out; Cloud Map's name of it.
    Operation(Option<String>),
    Done,
}

/// The right to ask: the first time it is there, and then it is waited for.
struct Turn<'a> {
    gate: &'a Gate,
    has: bool,
}

impl Turn<'_> {
    async fn come(&mut self) {
        if !std::mem::take(&mut self.has) {
            self.gate.turn().await;
        }
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct Client {
    /// The control plane.
    api: aws_sdk_servicediscovery::Client,
    /// The data plane: it tells instances, and nothing else.
    data: aws_sdk_servicediscovery::Client,
    /// Ids of the namespaces, once known.
    ids: Mutex<BTreeMap<usize, Arc<str>>>,
}

impl Client {
    /// # Errors
    /// No region is known.
    pub async fn new(config: &CloudMap) -> Result<Self, Trouble> {
        let shared = aws::load(&config.aws).await?;
        let is_configured = config.data_endpoint.is_some() || config.aws.endpoint.is_some();
        let mut data = aws_sdk_servicediscovery::config::Builder::from(&shared);
        if let Some(endpoint) = &config.data_endpoint {
            data = data.endpoint_url(endpoint);
        }
        let data = data.interceptor(DataPlane { is_configured }).build();
        Ok(Self {
            api: aws_sdk_servicediscovery::Client::new(&shared),
            data: aws_sdk_servicediscovery::Client::from_conf(data),
            ids: Mutex::default(),
        })
    }

    /// Where an answer has pages, those after the first one wait at the `gate`.
    ///
    /// # Errors
    /// There is no answer, or none to be relied on.
    pub async fn ask(&self, config: &CloudMap, asked: &Asked, gate: &Gate) -> Result<Answer, Trouble> {
        match asked {
            Asked::Names(namespace) => {
                let services = self.listed(config, *namespace, gate).await?;
                Ok(Answer::Names(services.into_keys().collect()))
            }
            Asked::Service((namespace, name)) => {
                let namespace = config.namespaces.get(*namespace).map(String::as_str).unwrap_or_default();
                self.instances(namespace, name, None).await.map(Answer::Instances)
            }
        }
    }

    /// Makes a request about what this host has in the first namespace; `service` is the one that it is about. Where an
    /// answer has pages, those after the first one wait at the `gate`.
    ///
    /// # Errors
    /// It was not taken, or nobody knows.
    pub async fn call(
        &self,
        config: &CloudMap,
        call: &Call,
        owner: &str,
        service: Option<&Service>,
        gate: &Gate,
    ) -> Result<Told, Trouble> {
        let id = service.map(|service| service.id.as_str()).unwrap_or_default();
        let namespace = config.namespaces.first().map(String::as_str).unwrap_or_default();
        match call {
            Call::List => self.listed(config, 0, gate).await.map(Told::Services),
            Call::Look(name) => self.instances(namespace, name, Some(owner)).await.map(Told::Instances),
            Call::Register((_, instance), attributes) => {
                let attributes: HashMap<_, _> = attributes.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
                let asked = self.api.register_instance().service_id(id).instance_id(instance);
                let answer = asked.set_attributes(Some(attributes)).send().await;
                Ok(Told::Operation(answer.map_err(|error| Trouble::of(REGISTER, error))?.operation_id))
            }
            Call::Deregister((_, instance)) => {
                let asked = self.api.deregister_instance().service_id(id).instance_id(instance);
                match asked.send().await.map_err(|error| Trouble::of(DEREGISTER, error)) {
                    Ok(answer) => Ok(Told::Operation(answer.operation_id)),
                    Err(trouble) if trouble.is_gone() => Ok(Told::Done),
                    Err(trouble) => Err(trouble),
                }
            }
            Call::Tell((_, instance), well) => {
                let status = if *well { CustomHealthStatus::Healthy } else { CustomHealthStatus::Unhealthy };
                let asked = self.api.update_instance_custom_health_status().service_id(id).instance_id(instance);
                asked.status(status).send().await.map_err(|error| Trouble::of(TELL_HEALTH, error))?;
                Ok(Told::Done)
            }
        }
    }

    /// The id of the first namespace, once it was asked for.
    pub fn known_id(&self) -> Option<Arc<str>> {
        self.ids().get(&0).cloned()
    }

    /// The services of a namespace. The first question is asked at once.
    async fn listed(
        &self,
        config: &CloudMap,
        namespace: usize,
        gate: &Gate,
    ) -> Result<BTreeMap<String, Service>, Trouble> {
        let mut turn = Turn { gate, has: true };
        let known = self.ids().contains_key(&namespace);
        let id = self.id(config, namespace, &mut turn).await?;
        let mut services = self.services(&id, &mut turn).await?;
        if services.is_empty() && known {
            // Or the namespace is gone, and perhaps made anew with another id: a filter says nothing of that.
            self.ids().remove(&namespace);
            let again = self.id(config, namespace, &mut turn).await?;
            if again != id {
                services = self.services(&again, &mut turn).await?;
            }
        }
        Ok(services)
    }

    fn ids(&self) -> std::sync::MutexGuard<'_, BTreeMap<usize, Arc<str>>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn id(&self, config: &CloudMap, place: usize, turn: &mut Turn<'_>) -> Result<Arc<str>, Trouble> {
        if let Some(id) = self.ids().get(&place) {
            return Ok(id.clone());
        }
        let name = config.namespaces.get(place).map(String::as_str).unwrap_or_default();
        let filter = NamespaceFilter::builder().name(NamespaceFilterName::Name).values(name);
        let filter = filter.condition(FilterCondition::Eq).build().ok();
        let mut page = None;
        loop {
            turn.come().await;
            let asked = self.api.list_namespaces().set_filters(filter.clone().map(|filter| vec![filter]));
            let answer = asked.set_next_token(page).send().await.map_err(|e| Trouble::of(LIST_NAMESPACES, e))?;
            let malformed = || Trouble::Malformed { action: LIST_NAMESPACES, source: None };
            let namespaces = answer.namespaces.ok_or_else(malformed)?;
            if let Some(found) = namespaces.iter().find(|it| it.name() == Some(name)) {
                let id: Arc<str> = found.id().ok_or_else(malformed)?.into();
                self.ids().insert(place, id.clone());
                return Ok(id);
            }
            page = answer.next_token.filter(|token| !token.is_empty());
            if page.is_none() {
                return Err(Trouble::NoNamespace(name.to_owned()));
            }
        }
    }

    async fn services(&self, namespace: &str, turn: &mut Turn<'_>) -> Result<BTreeMap<String, Service>, Trouble> {
        let filter = ServiceFilter::builder().name(ServiceFilterName::NamespaceId).values(namespace);
        let filter = filter.condition(FilterCondition::Eq).build().ok();
        let mut found = BTreeMap::new();
        let mut page = None;
        loop {
            turn.come().await;
            let asked = self.api.list_services().set_filters(filter.clone().map(|filter| vec![filter]));
            let asked = asked.max_results(100).set_next_token(page);
            let answer = asked.send().await.map_err(|error| Trouble::of(LIST_SERVICES, error))?;
            let services = answer.services.ok_or(Trouble::Malformed { action: LIST_SERVICES, source: None })?;
            found.extend(services.into_iter().filter_map(|it| {
                let health = it.health_check_custom_config.is_some();
                Some((it.name?, Service { id: it.id.unwrap_or_default(), health }))
            }));
            page = answer.next_token.filter(|token| !token.is_empty());
            if page.is_none() {
                return Ok(found);
            }
        }
    }

    /// The instances of a service; only those of an `owner`, where there is one.
    async fn instances(&self, namespace: &str, service: &str, owner: Option<&str>) -> Result<Vec<Instance>, Trouble> {
        let asked = self.data.discover_instances().namespace_name(namespace).service_name(service);
        let largest = i32::try_from(LARGEST_ANSWER).unwrap_or(i32::MAX);
        // All of them, so that one that is ill is told from one that is gone.
        let asked = asked.health_status(HealthStatusFilter::All).max_results(largest);
        let asked = asked.set_query_parameters(owner.map(|owner| [(meta::OWNER.to_owned(), owner.to_owned())].into()));
        let answer = asked.send().await.map_err(|error| Trouble::of(DISCOVER, error))?;
        let instances = answer.instances.ok_or(Trouble::Malformed { action: DISCOVER, source: None })?;
        instances.into_iter().map(instance).collect()
    }
}

fn instance(summary: HttpInstanceSummary) -> Result<Instance, Trouble> {
    let health = match summary.health_status {
        Some(HealthStatus::Healthy) => Said::Healthy,
        Some(HealthStatus::Unhealthy) => Said::Unhealthy,
        // Also a word that AWS may say one day.
        Some(_) | None => Said::Unknown,
    };
    let id = summary.instance_id.ok_or(Trouble::Malformed { action: DISCOVER, source: None })?;
    Ok(Instance { id, health, attributes: summary.attributes.unwrap_or_default().into_iter().collect() })
}

//! Questions to Cloud Map by the SDK, and what of an answer is of use.
//!
//! Must not know when anything is asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
};

use aws_sdk_servicediscovery::types::{
    FilterCondition, HealthStatus, HealthStatusFilter, HttpInstanceSummary, NamespaceFilter, NamespaceFilterName,
    ServiceFilter, ServiceFilterName,
};
use mesh_core::{
    cloud_map::{
        entries::{Instance, LARGEST_ANSWER, Said},
        known::Key,
    },
    config::cloud_map::CloudMap,
};

use super::super::aws::{self, NoPrefixBeforeAddress, Trouble};

const LIST_NAMESPACES: &str = "servicediscovery:ListNamespaces";
const LIST_SERVICES: &str = "servicediscovery:ListServices";
const DISCOVER: &str = "servicediscovery:DiscoverInstances";

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
    Names {
        names: BTreeSet<String>,
        /// How many it took: an answer has pages.
        questions: u32,
    },
    Instances(Vec<Instance>),
}

/// See the module's text.
#[derive(Debug)]
pub struct Client {
    api: aws_sdk_servicediscovery::Client,
    /// Ids of the namespaces, once known.
    ids: Mutex<BTreeMap<usize, Arc<str>>>,
}

impl Client {
    /// # Errors
    /// No region is known.
    pub async fn new(config: &CloudMap) -> Result<Self, Trouble> {
        let shared = aws::load(&config.aws).await?;
        let own = aws_sdk_servicediscovery::config::Builder::from(&shared).interceptor(NoPrefixBeforeAddress).build();
        Ok(Self { api: aws_sdk_servicediscovery::Client::from_conf(own), ids: Mutex::default() })
    }

    /// # Errors
    /// There is no answer, or none to be relied on.
    pub async fn ask(&self, config: &CloudMap, asked: &Asked) -> Result<Answer, Trouble> {
        match asked {
            Asked::Names(namespace) => {
                let mut questions = 0;
                let known = self.ids().contains_key(namespace);
                let id = self.id(config, *namespace, &mut questions).await?;
                let mut names = self.services(&id, &mut questions).await?;
                if names.is_empty() && known {
                    // Or the namespace is gone, and perhaps made anew with another id: a filter says nothing of that.
                    self.ids().remove(namespace);
                    let again = self.id(config, *namespace, &mut questions).await?;
                    if again != id {
                        names = self.services(&again, &mut questions).await?;
                    }
                }
                Ok(Answer::Names { names, questions })
            }
            Asked::Service((namespace, name)) => {
                let namespace = config.namespaces.get(*namespace).map(String::as_str).unwrap_or_default();
                self.instances(namespace, name).await.map(Answer::Instances)
            }
        }
    }

    fn ids(&self) -> std::sync::MutexGuard<'_, BTreeMap<usize, Arc<str>>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn id(&self, config: &CloudMap, place: usize, questions: &mut u32) -> Result<Arc<str>, Trouble> {
        if let Some(id) = self.ids().get(&place) {
            return Ok(id.clone());
        }
        let name = config.namespaces.get(place).map(String::as_str).unwrap_or_default();
        let filter = NamespaceFilter::builder().name(NamespaceFilterName::Name).values(name);
        let filter = filter.condition(FilterCondition::Eq).build().ok();
        let mut page = None;
        loop {
            *questions += 1;
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

    async fn services(&self, namespace: &str, questions: &mut u32) -> Result<BTreeSet<String>, Trouble> {
        let filter = ServiceFilter::builder().name(ServiceFilterName::NamespaceId).values(namespace);
        let filter = filter.condition(FilterCondition::Eq).build().ok();
        let mut names = BTreeSet::new();
        let mut page = None;
        loop {
            *questions += 1;
            let asked = self.api.list_services().set_filters(filter.clone().map(|filter| vec![filter]));
            let asked = asked.max_results(100).set_next_token(page);
            let answer = asked.send().await.map_err(|error| Trouble::of(LIST_SERVICES, error))?;
            let services = answer.services.ok_or(Trouble::Malformed { action: LIST_SERVICES, source: None })?;
            names.extend(services.into_iter().filter_map(|service| service.name));
            page = answer.next_token.filter(|token| !token.is_empty());
            if page.is_none() {
                return Ok(names);
            }
        }
    }

    async fn instances(&self, namespace: &str, service: &str) -> Result<Vec<Instance>, Trouble> {
        let asked = self.api.discover_instances().namespace_name(namespace).service_name(service);
        let largest = i32::try_from(LARGEST_ANSWER).unwrap_or(i32::MAX);
        // All of them, so that one that is ill is told from one that is gone.
        let asked = asked.health_status(HealthStatusFilter::All).max_results(largest);
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

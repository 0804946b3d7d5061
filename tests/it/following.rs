//! A discovery that runs against a server, and what it has seen so far: for every registry.
//!
//! Must not know which registry it is.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use mesh_agent::{
    discovery::{self, Backend, Discovery, Figures},
    state::uses::Uses,
};
use mesh_core::services::{EndpointEntry, ServiceSet};
use mesh_tests::until::until;
use tokio::runtime::Runtime;

pub(crate) struct Following {
    discovery: Discovery,
    pub(crate) uses: Uses,
    limit: Duration,
    show: fn(&EndpointEntry) -> String,
    _runtime: Runtime,
}

impl Following {
    /// Starts it. Whatever is awaited has `limit`; `show` is how an endpoint is written in [`Following::seen`].
    pub(crate) fn start(backend: Backend, limit: Duration, show: fn(&EndpointEntry) -> String) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let uses = Uses::default();
        let discovery = runtime.block_on(async { discovery::run(vec![backend], &uses) });
        Ok(Self { discovery, uses, limit, show, _runtime: runtime })
    }

    pub(crate) fn set(&self) -> ServiceSet {
        self.discovery.sets.borrow()[0].clone()
    }

    /// Every service with its endpoints.
    pub(crate) fn seen(&self) -> BTreeMap<String, Vec<String>> {
        let services = self.set().services;
        services.values().map(|s| (s.name.to_string(), s.endpoints.iter().map(self.show).collect())).collect()
    }

    pub(crate) fn await_seen(&self, expected: &[(&str, &[&str])]) -> Result<()> {
        let expected: BTreeMap<String, Vec<String>> = expected
            .iter()
            .map(|(name, endpoints)| ((*name).to_owned(), endpoints.iter().map(|e| (*e).to_owned()).collect()))
            .collect();
        until(self.limit, &format!("{expected:?}"), || {
            let seen = self.seen();
            Ok(if seen == expected { Ok(()) } else { Err(format!("{seen:?}; {:?}", self.error())) })
        })
    }

    pub(crate) fn error(&self) -> Option<String> {
        self.discovery.status.borrow()[0].error.clone()
    }

    pub(crate) fn await_error(&self, part: &str) -> Result<()> {
        until(self.limit, &format!("an error with `{part}`"), || {
            let error = self.error();
            Ok(if error.as_ref().is_some_and(|error| error.contains(part)) {
                Ok(())
            } else {
                Err(format!("{error:?}"))
            })
        })
    }

    pub(crate) fn figures(&self) -> Result<Arc<Figures>> {
        self.discovery.status.borrow()[0].figures.clone().context("it is asked over the network")
    }
}

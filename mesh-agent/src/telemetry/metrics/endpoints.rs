//! How many endpoints each service has, counted when somebody asks: kept as series, they would weigh as much as the
//! endpoints' addresses, and cost more with each change than the change itself.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use mesh_core::model::{Health, Snapshot};
use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder},
    metrics::{MetricType, gauge::ConstGauge},
};

use super::{EndpointHealth, Endpoints};

/// The gauge; it has the values of the snapshot that it was last given.
#[derive(Clone, Default)]
pub(super) struct EndpointCounts(Arc<RwLock<Arc<Snapshot>>>);

impl EndpointCounts {
    pub(super) fn set(&self, snapshot: &Arc<Snapshot>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = snapshot.clone();
    }
}

impl EncodeMetric for EndpointCounts {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let snapshot = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        for service in snapshot.services.values() {
            for (health, is) in [
                (EndpointHealth::Healthy, Health::Healthy),
                (EndpointHealth::Unhealthy, Health::Unhealthy),
                (EndpointHealth::Draining, Health::Draining),
            ] {
                let endpoints = service.ports.iter().flat_map(|port| &port.endpoints);
                let count = endpoints.filter(|endpoint| endpoint.health == is).count();
                let labels = Endpoints { service: service.name.to_string(), health };
                ConstGauge::new(i64::try_from(count).unwrap_or(i64::MAX)).encode(encoder.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }
}

impl fmt::Debug for EndpointCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EndpointCounts")
    }
}

//! AWS as a registry: Cloud Map and the ECS API, against moto and against doubles that AWS's own description judges.

mod cloud_map;
mod cloud_map_faults;
mod ecs;
mod ecs_faults;
mod registration;
mod registration_faults;
mod running;
mod sdk;
mod two_hosts;

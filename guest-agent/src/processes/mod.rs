//! The processes of the workload.

pub mod launch;

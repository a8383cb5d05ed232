//! Support for the integration tests: the lab of real clients, the small test client, and clusters
//! of processes on loopback.

pub mod client;
pub mod cluster;
pub mod lab;
pub mod server;

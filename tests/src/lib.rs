//! Support for the integration tests: the lab of real clients and the small test client.

pub mod client;
pub mod lab;
pub mod server;

//! Real Linux clients keep what they have when a node of the cluster fails: their locks, their
//! place in the line, and every write that was acknowledged.
//!
//! Two clients are Linux kernels in virtual machines, three nodes are the real binary on hosts of
//! the lab. Each case prints a line of figures; none of them is judged, but for a time that nobody
//! would wait. Needs root.

mod arrival;
mod majority;
mod moves;
mod pause;
mod power;
mod reboot;
mod scene;
mod services;
mod silence;
mod storage;
mod twice;

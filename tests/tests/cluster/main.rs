//! Three processes of the built server on loopback that form a cluster, and what becomes of a
//! service's promises when they are killed, paused, wiped and restarted.
//!
//! Every test judges by what clients were told, and prints its times. Addresses are fixed ones of
//! 127.A.B.x that all nodes have, so a test can't show that an address moves; the lab can. Nothing
//! needs root or a port below 1024, but `root_disks` and `root_power`, which mount.

#![expect(clippy::print_stdout, reason = "times are for who reads the output")]

mod config;
mod connections;
mod dead_storage;
mod defined;
mod documents;
mod failback;
mod given_on;
mod hooked;
mod hooks;
mod hooks_left;
mod late;
mod listing;
mod majority;
mod members;
mod moves;
mod operator;
mod pause;
mod pause_long;
mod phases;
mod programs;
mod repairs;
mod root_disks;
mod root_power;
mod scene;
mod services;
mod store;
mod takeover;
mod watchdog;

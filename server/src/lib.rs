//! havenfs: the whole NFSv3 service of a node in one process.
//!
//! # Architecture
//!
//! ```text
//!   clients --TCP, UDP--> net --> dispatch --> programs --> backend --> kernel
//!                          |        | gate      |  |
//!                          +-- reply_cache      |  +-- export (who may), mount_list, portmap
//!                          +-- pool (workers)   |
//!                                               +--> lock_service --> raft --> cluster (apply)
//!                                                     |              (log)  |   |
//!   clients <---- host_calls <-- grants, notices -----+    other nodes <---+   +- nlm, nsm (pure)
//!
//!   serve: for each service a keeper, which does what cluster::reconcile decides; one lease
//! ```
//!
//! - [`net`] turns bytes into messages with a bound on everything; [`dispatch`] checks a call's
//!   header, and asks the [`gate`] before its effect and before its reply; [`programs`] decode
//!   arguments, ask, and encode answers; [`backend`] makes the system calls and knows no RPC;
//!   [`export`] decides who may do what.
//! - [`cluster`] is the replicated state: who serves what, locks, hosts, the numbers that handles
//!   are made of. One pure function changes it, fed by the log of [`raft`], and nothing is told to
//!   a peer before it is there. [`lock_service`] is how the programs read and change the part of
//!   one service, and what an epoch starts: grants are delivered, hosts are told, by way of
//!   [`host_calls`]. The crates `nlm` and `nsm` hold the lock table, the schedules and the
//!   messages, without input or output.
//! - A service is put together anew ([`node`]) for each epoch that this node serves it. [`serve`]
//!   has a keeper for each service, which takes it, opens it, stops it and gives it away, as
//!   [`cluster::reconcile`] decides. A start, a takeover and a planned move go the same way; a node
//!   without a cluster is a cluster of one. Around that it runs the operator's commands: the fence
//!   and what makes the storage ready before a service is opened, what lets it go afterwards.
//! - Two runtimes: the data runtime has one task per connection and never waits for a disk; what
//!   may wait goes to the worker threads of [`pool`]. The control runtime, on a thread of its own,
//!   serves the control socket, metrics, the registration with rpcbind, the keepers and the calls
//!   to hosts, so that a slow exported disk delays none of them. Consensus has a thread that waits
//!   for the log and for the other nodes, and the lease one that waits for nothing.
//! - What a service is (names, addresses, exports) is replicated as well; [`definitions`] stands
//!   between that and the files of this node, which are a proposal of it.
//! - State that must outlive the process lies in the [`state`] directory, in files with versions.
//!
//! What is deliberately absent: no path is walked that a client gave; no handle holds a device
//! number or a time; no call waits for DNS; nothing is allocated because a length field says so.

#[cfg(not(target_pointer_width = "64"))]
compile_error!("havenfs needs a 64-bit system: file offsets and lengths are u64 and usize alike");

pub mod address;
pub mod backend;
pub mod call;
pub mod clients;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod control;
pub mod definitions;
pub mod dispatch;
pub mod doctor;
pub mod export;
pub mod fault;
pub mod gate;
pub mod host_calls;
pub mod lock_service;
pub mod looks;
pub mod metrics;
pub mod mount_help;
pub mod mount_list;
pub mod net;
pub mod node;
pub mod numbering;
pub mod pool;
pub mod programs;
pub mod raft;
pub mod random;
pub mod register;
pub mod reply_cache;
pub mod rpc_client;
pub mod serve;
pub mod services;
pub mod state;
pub mod volumes;

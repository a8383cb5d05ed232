//! What the server answers on the wire, over real sockets on loopback: the built binary, our small
//! client, and decoders that are not ours (see `client`).
//!
//! One binary for all wire tests, since each test binary costs a link. Tests whose names contain
//! `needs_root` act as several users, make devices or use reserved ports; all others also pass for
//! a normal user, for whom every call runs as that user.

mod access;
mod announce;
mod captures;
mod create;
mod directory;
mod export;
mod flood;
mod good_client;
mod handle;
mod hostile;
mod io;
mod killed;
mod lock;
mod locking;
mod message;
mod monitor;
mod mount;
mod names;
mod operator;
mod portmap;
mod quiet;
mod random;
mod record;
mod replay;
mod root_sync_fails;
mod rpc;
mod scene;
mod setattr;
mod situation;
mod status;
mod table;
mod table_root;
mod udp;
mod wait;

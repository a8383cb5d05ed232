//! Sockets: from bytes to messages and back, with a bound on everything.
//!
//! - [`limits`]: the bounds; [`mailbox`]: finished replies on their way to a socket.
//! - [`listen`]: binding ports; [`runtimes`]: the threads; [`tcp`]: one task per connection;
//!   [`udp`]: one task per socket.
//!
//! Calls are carried out by [`intake`], the same for both transports: inline if they can't wait,
//! else on a worker thread, with the reply cache in between.

pub mod intake;
pub mod limits;
pub mod listen;
pub mod mailbox;
pub mod runtimes;
pub mod tcp;
pub mod udp;

#[cfg(test)]
mod gated;

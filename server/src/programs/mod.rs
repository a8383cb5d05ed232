//! The programs: each decodes a call, asks the domain, and encodes the answer.
//!
//! A program's `serve` gets a [`Request`](crate::call::Request) whose header is checked and a
//! writer that already holds the reply header; it appends the results or returns why there are
//! none. NULL never arrives here.

pub mod mount;
pub mod nfs3;
pub mod nlm;
pub mod nsm;
pub mod portmap;

#[cfg(test)]
pub(crate) mod tests;

use havenfs_rpc::xdr::{Encode, Writer};

use crate::call::{Origin, Transport};

/// The longest list that is sent over UDP, in bytes; the rest is left out.
pub const UDP_LIST_BYTES_MAX: usize = 8 * 1024;

/// Writes a linked list; over UDP only as much as a datagram should carry.
fn write_list<T: Encode>(origin: &Origin, writer: &mut Writer<'_>, items: impl Iterator<Item = T>) {
    let start = writer.position();
    for item in items {
        let before = writer.position();
        writer.optional(Some(&item));
        let too_long = writer.position() - start > UDP_LIST_BYTES_MAX;
        if too_long && origin.transport == Transport::Udp {
            writer.truncate(before);
            break;
        }
    }
    writer.bool(false);
}

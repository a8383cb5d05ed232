//! The numbers of the procedures, the same in all versions.
//!
//! TEST, LOCK, CANCEL, UNLOCK and GRANTED have three forms each: one that is answered by a reply, a
//! `_MSG` form whose reply says nothing, and a `_RES` form, a call by which the other side answers
//! the `_MSG` form.
//!
//! Source: RFC 1813 6.2, XNFS chapter 10.

/// Does nothing.
pub const NULL: u32 = 0;
/// Asks whether a lock could be had.
pub const TEST: u32 = 1;
/// Takes a lock.
pub const LOCK: u32 = 2;
/// Takes a blocked request back.
pub const CANCEL: u32 = 3;
/// Releases a range.
pub const UNLOCK: u32 = 4;
/// Tells the caller of a blocked LOCK that it has the lock now: server to client.
pub const GRANTED: u32 = 5;
/// TEST, answered by [`TEST_RES`].
pub const TEST_MSG: u32 = 6;
/// LOCK, answered by [`LOCK_RES`].
pub const LOCK_MSG: u32 = 7;
/// CANCEL, answered by [`CANCEL_RES`].
pub const CANCEL_MSG: u32 = 8;
/// UNLOCK, answered by [`UNLOCK_RES`].
pub const UNLOCK_MSG: u32 = 9;
/// GRANTED, answered by [`GRANTED_RES`].
pub const GRANTED_MSG: u32 = 10;
/// The result of [`TEST_MSG`], itself a call without result.
pub const TEST_RES: u32 = 11;
/// The result of [`LOCK_MSG`].
pub const LOCK_RES: u32 = 12;
/// The result of [`CANCEL_MSG`].
pub const CANCEL_RES: u32 = 13;
/// The result of [`UNLOCK_MSG`].
pub const UNLOCK_RES: u32 = 14;
/// The result of [`GRANTED_MSG`]: client to server.
pub const GRANTED_RES: u32 = 15;
/// What Linux's status monitor tells the lock manager on its own machine; in no specification.
pub const NSM_NOTIFY: u32 = 16;
/// Opens a file with a share mode (versions 3 and 4).
pub const SHARE: u32 = 20;
/// Closes it (versions 3 and 4).
pub const UNSHARE: u32 = 21;
/// LOCK by a host that is not to be monitored (versions 3 and 4).
pub const NM_LOCK: u32 = 22;
/// Drops everything that a host holds (versions 3 and 4).
pub const FREE_ALL: u32 = 23;

/// What separates a procedure from its `_MSG` form, and that from its `_RES` form.
const FORM_DISTANCE: u32 = 5;

/// The procedure whose `_MSG` form this is, or `None` if it is no `_MSG` form.
pub const fn of_msg(procedure: u32) -> Option<u32> {
    match procedure {
        TEST_MSG..=GRANTED_MSG => Some(procedure - FORM_DISTANCE),
        _ => None,
    }
}

/// The `_RES` procedure that answers a `_MSG` form, or `None` if it is no `_MSG` form.
pub const fn res_of_msg(procedure: u32) -> Option<u32> {
    match procedure {
        TEST_MSG..=GRANTED_MSG => Some(procedure + FORM_DISTANCE),
        _ => None,
    }
}

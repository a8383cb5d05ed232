//! The caller's identity on a worker thread.
//!
//! Changes of a name space run under the caller's own user, group and groups, so that the kernel
//! judges permission with all it knows (ACLs, sticky directories, quotas). The switch concerns
//! one thread; group goes before user, because a user other than root may not change groups.
//!
//! A thread remembers whom it is, and switches only when the next call is someone else's: a batch
//! of calls by one caller costs one switch. Root identity is needed for `open_by_handle_at`, so
//! [`as_server`] switches back.
//!
//! Invariants: only worker threads switch, they never await and never make a thread (a new thread
//! inherits the identity); if the way back to the server's own identity fails, the process aborts,
//! since every later call on that thread would run as somebody else.

use std::cell::RefCell;
use std::sync::{Arc, OnceLock};

use havenfs_rpc::auth::Gids;
use rustix::io::Errno;

use super::sys;

/// Supplementary groups: those of the call, or those that the server looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Groups {
    /// From the credential of the call.
    Wire(Gids),
    /// From the server's own user database (`manage-gids`).
    Resolved(Arc<[u32]>),
}

impl Groups {
    /// The groups.
    pub fn as_slice(&self) -> &[u32] {
        match self {
            Self::Wire(gids) => gids.as_slice(),
            Self::Resolved(gids) => gids,
        }
    }
}

/// Who a call acts as, after squashing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The user id.
    pub uid: u32,
    /// The group id.
    pub gid: u32,
    /// The supplementary groups.
    pub groups: Groups,
}

impl Caller {
    /// Whether the caller is a member of `gid`.
    pub fn in_group(&self, gid: u32) -> bool {
        self.gid == gid || self.groups.as_slice().contains(&gid)
    }
}

/// The identity that the server itself has, and whether it can take on others.
#[derive(Debug, Clone)]
struct Own {
    caller: Caller,
    can_switch: bool,
}

static OWN: OnceLock<Own> = OnceLock::new();

/// Whom a thread acts as.
#[derive(Debug, Default)]
struct Acting {
    /// Whose groups the thread has.
    prepared: Option<Caller>,
    /// Whether it has that caller's user id as well; else it is the server.
    is_caller: bool,
}

thread_local! {
    static ACTING: RefCell<Acting> = const {
        RefCell::new(Acting { prepared: None, is_caller: false })
    };
}

/// Gives up the right to pass quotas and to use reserved blocks, which callers would have through
/// the server otherwise. Called before any other thread is made, since it concerns this one only.
pub fn drop_resource_privilege() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let Ok(mut sets) = capabilities(None) else {
        return;
    };
    sets.effective.remove(CapabilitySet::SYS_RESOURCE);
    // Fails only without the capability, and then there is nothing to give up.
    let _ = set_capabilities(None, sets);
}

fn own() -> &'static Own {
    OWN.get_or_init(|| {
        let groups = rustix::process::getgroups().unwrap_or_default();
        let uid = rustix::process::geteuid();
        Own {
            caller: Caller {
                uid: uid.as_raw(),
                gid: rustix::process::getegid().as_raw(),
                groups: Groups::Resolved(groups.into_iter().map(rustix::fs::Gid::as_raw).collect()),
            },
            can_switch: uid.is_root() && probe_switch(),
        }
    })
}

/// Tries on a thread of its own whether another identity can be taken on.
fn probe_switch() -> bool {
    std::thread::spawn(|| sys::set_groups(&[]).is_ok() && sys::set_fsuid(1).is_ok())
        .join()
        .unwrap_or(false)
}

/// Whether calls run as their callers; if not, every call runs as the server's own user.
pub fn can_switch() -> bool {
    own().can_switch
}

/// Whether every call would run with the rights of root: the server is root of this system and
/// can't take on other identities. In a user namespace that maps one user only there is nobody
/// else to be.
pub fn is_root_for_all() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let one_user = map.lines().count() == 1 && map.split_whitespace().next_back() == Some("1");
    !can_switch() && own_caller().uid == 0 && !one_user
}

/// The caller that calls act as when the server can't switch: the server's own user.
pub fn own_caller() -> &'static Caller {
    &own().caller
}

/// Runs `work` on this worker thread as `caller`.
///
/// # Errors
/// EPERM: the caller's ids can't be taken on (not mapped in this user namespace).
pub fn as_caller<T>(caller: &Caller, work: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    if can_switch() {
        ACTING.with_borrow_mut(|acting| switch_to(acting, caller))?;
    }
    work()
}

fn switch_to(acting: &mut Acting, caller: &Caller) -> Result<(), Errno> {
    let prepared = acting.prepared.as_ref() == Some(caller);
    if prepared && acting.is_caller {
        return Ok(());
    }
    let groups = || {
        if prepared {
            return Ok(());
        }
        sys::set_groups(caller.groups.as_slice()).and_then(|()| sys::set_fsgid(caller.gid))
    };
    // Whatever fails half-way, the way back begins from here.
    acting.is_caller = true;
    if let Err(errno) = groups().and_then(|()| sys::set_fsuid(caller.uid)) {
        acting.prepared = None;
        return_to_server(acting);
        return Err(errno);
    }
    if !prepared {
        acting.prepared = Some(caller.clone());
    }
    Ok(())
}

/// Makes this thread act as the server itself again.
///
/// Only the user id goes back: with it come root's capabilities, and groups mean nothing to those.
/// They stay for the next call of the same caller, which is most often the next one.
pub fn as_server() {
    ACTING.with_borrow_mut(return_to_server);
}

fn return_to_server(acting: &mut Acting) {
    if !acting.is_caller {
        return;
    }
    acting.is_caller = false;
    if sys::set_fsuid(own().caller.uid).is_err() {
        // Going on would run the next caller's work with a wrong identity.
        tracing::error!("cannot return to the server's own identity; aborting");
        std::process::abort();
    }
}

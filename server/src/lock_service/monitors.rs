//! SM_MON for programs of this machine: whom to tell when a host reboots.
//!
//! Our own lock manager needs none of this; it is for others on the machine that expect a status
//! monitor here. The list is bounded, and it is in memory: a program asks again after a restart of
//! the monitor, which it sees by the changed state.
//!
//! What is called is only ever a lock manager on this machine: monitors that called any program
//! they were told to were used to attack others (CERT CA-99.05).

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use havenfs_nlm::wire::NsmNotifyArgs;
use havenfs_nsm::wire::{Mon, MyId, SM_PRIV_SIZE};
use havenfs_rpc::portmap::Protocol;
use havenfs_rpc::program;
use havenfs_rpc::xdr::Writer;

use super::result_calls::ResultCall;
use crate::host_calls::Callee;

/// How many requests are kept.
const MONITORS_MAX: usize = 256;
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A local program that wants to hear of a host's reboots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Monitor {
    mon_name: Box<[u8]>,
    my_name: Box<[u8]>,
    version: u32,
    procedure: u32,
    private: [u8; SM_PRIV_SIZE],
}

/// All of them.
#[derive(Debug, Default)]
pub struct Monitors(Mutex<Vec<Monitor>>);

impl Monitors {
    /// Adds a request; false if it is for no lock manager, or there are too many.
    pub fn add(&self, args: &Mon<'_>) -> bool {
        let id = &args.mon_id.my_id;
        if id.my_prog != program::NLM {
            return false;
        }
        let monitor = Monitor {
            mon_name: args.mon_id.mon_name.into(),
            my_name: id.my_name.into(),
            version: id.my_vers,
            procedure: id.my_proc,
            private: args.private,
        };
        let mut monitors = self.lock();
        monitors.retain(|known| !known.is(args.mon_id.mon_name, id));
        if monitors.len() >= MONITORS_MAX {
            return false;
        }
        monitors.push(monitor);
        true
    }

    /// Removes a request.
    pub fn remove(&self, mon_name: &[u8], id: &MyId<'_>) {
        self.lock().retain(|known| !known.is(mon_name, id));
    }

    /// Removes all requests of a program.
    pub fn remove_all(&self, id: &MyId<'_>) {
        self.lock().retain(|known| !known.is_of(id));
    }

    /// The calls that tell of a host's reboot.
    pub(super) fn calls_for(&self, mon_name: &[u8], host: IpAddr, state: i32) -> Vec<ResultCall> {
        let address = host.to_string();
        let told = |monitor: &&Monitor| {
            monitor.mon_name.eq_ignore_ascii_case(mon_name)
                || *monitor.mon_name == *address.as_bytes()
        };
        let monitors = self.lock();
        let monitors = monitors.iter().filter(told);
        monitors.map(|monitor| monitor.call(state)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Monitor>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Monitor {
    fn is(&self, mon_name: &[u8], id: &MyId<'_>) -> bool {
        *self.mon_name == *mon_name && self.is_of(id)
    }

    fn is_of(&self, id: &MyId<'_>) -> bool {
        (&*self.my_name, program::NLM, self.version, self.procedure)
            == (id.my_name, id.my_prog, id.my_vers, id.my_proc)
    }

    fn call(&self, state: i32) -> ResultCall {
        let mut args = Vec::new();
        Writer::new(&mut args).value(&NsmNotifyArgs {
            mon_name: &self.mon_name,
            state,
            private: self.private,
        });
        ResultCall {
            callee: Callee {
                address: LOOPBACK,
                from: LOOPBACK,
                program: (program::NLM, self.version),
                protocol: Protocol::Udp,
            },
            number: self.procedure,
            args,
        }
    }
}

#[cfg(test)]
mod tests {
    use havenfs_nsm::wire::MonId;

    use super::*;

    const fn id(my_prog: u32) -> MyId<'static> {
        MyId {
            my_name: b"localhost",
            my_prog,
            my_vers: 4,
            my_proc: 16,
        }
    }

    const fn mon(mon_name: &[u8], my_prog: u32) -> Mon<'_> {
        Mon {
            mon_id: MonId {
                mon_name,
                my_id: id(my_prog),
            },
            private: [7; SM_PRIV_SIZE],
        }
    }

    #[test]
    fn who_asked_is_called_and_nobody_else() {
        let monitors = Monitors::default();
        assert!(monitors.add(&mon(b"c1", program::NLM)));
        assert!(
            monitors.add(&mon(b"c1", program::NLM)),
            "once more is the same"
        );
        assert!(monitors.add(&mon(b"10.0.0.2", program::NLM)));
        assert!(
            !monitors.add(&mon(b"c1", program::NFS)),
            "only lock managers"
        );
        let host = IpAddr::from([10, 0, 0, 2]);
        let calls = monitors.calls_for(b"C1", IpAddr::from([10, 0, 0, 9]), 5);
        assert_eq!(calls.len(), 1);
        assert_eq!((calls[0].callee.address, calls[0].number), (LOOPBACK, 16));
        assert_eq!(monitors.calls_for(b"c1", host, 5).len(), 2);
        monitors.remove(b"c1", &id(program::NLM));
        assert_eq!(monitors.calls_for(b"c1", host, 5).len(), 1);
        monitors.remove_all(&id(program::NLM));
        assert!(monitors.calls_for(b"c1", host, 5).is_empty());
    }

    #[test]
    fn there_is_an_end_to_them() {
        let monitors = Monitors::default();
        for number in 0..MONITORS_MAX {
            assert!(monitors.add(&mon(number.to_string().as_bytes(), program::NLM)));
        }
        assert!(!monitors.add(&mon(b"one more", program::NLM)));
    }
}

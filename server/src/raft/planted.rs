//! Faults that this folder's tests plant in the log's writing thread.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::error::StoreError;

/// What fails, from when it is set.
#[derive(Debug, Default)]
pub(super) struct Planted {
    /// No log file can be made any more.
    pub(super) full: AtomicBool,
    /// Syncs fail.
    pub(super) broken: AtomicBool,
    /// Nothing is written any more, as after a kill.
    pub(super) dead: AtomicBool,
}

impl Planted {
    pub(super) fn check_space(&self, path: &Path) -> Result<(), StoreError> {
        let error = || io::Error::from(io::ErrorKind::StorageFull);
        check(&self.full, "reserve space for", path, error)
    }

    pub(super) fn check_sync(&self, path: &Path) -> Result<(), StoreError> {
        let error = || rustix::io::Errno::IO.into();
        check(&self.broken, "sync", path, error)
    }

    pub(super) fn check_alive(&self) -> Result<(), StoreError> {
        let error = || io::ErrorKind::BrokenPipe.into();
        check(&self.dead, "write", Path::new("log"), error)
    }
}

fn check(
    fault: &AtomicBool,
    step: &'static str,
    path: &Path,
    error: impl FnOnce() -> io::Error,
) -> Result<(), StoreError> {
    if fault.load(Ordering::SeqCst) {
        Err(StoreError::io(step, path)(error()))
    } else {
        Ok(())
    }
}

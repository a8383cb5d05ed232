//! Whether a host may lock a file, as far as exports and permissions say.
//!
//! The rules of the export hold for locks as for everything else: a host that may not use the
//! export gets NLM4_STALE_FH, an exclusive lock on a read-only export NLM4_ROFS, and a caller who
//! may neither read the file nor owns it NLM4_DENIED, as with the Linux kernel's server, unless the
//! export says `no_auth_nlm`.

use havenfs_nlm::keys::FileKey;
use havenfs_nlm::range::TooFar;
use havenfs_nlm::wire::Nlm4Stats;

use super::NlmCall;
use crate::backend::Failure;
use crate::backend::attributes::Want;
use crate::backend::file::File;
use crate::backend::handle::FileHandle;
use crate::call::{Mode, Refusal};
use crate::export::{Options, Verdict};
use crate::programs::nfs3;

/// Why a call is not carried out.
pub(super) enum Refused {
    /// This is the answer.
    Stat(Nlm4Stats),
    /// There is none yet, or none at all.
    NoAnswer(Refusal),
}

impl Refused {
    /// The status to answer with.
    pub(super) const fn stat(&self) -> Result<Nlm4Stats, Refusal> {
        match self {
            Self::Stat(stat) => Ok(*stat),
            Self::NoAnswer(refusal) => Err(*refusal),
        }
    }
}

impl From<Nlm4Stats> for Refused {
    fn from(stat: Nlm4Stats) -> Self {
        Self::Stat(stat)
    }
}

impl From<TooFar> for Refused {
    fn from(_: TooFar) -> Self {
        Self::Stat(Nlm4Stats::Fbig)
    }
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Wait => Self::NoAnswer(Refusal::Wait),
            // Not ready, or somebody's lease is in the way: the host asks again.
            Failure::Jukebox | Failure::NotServing => Self::NoAnswer(Refusal::Silence),
            Failure::BadHandle | Failure::Stale => Self::Stat(Nlm4Stats::StaleFh),
            Failure::Os(_) => Self::Stat(Nlm4Stats::Failed),
        }
    }
}

impl NlmCall<'_> {
    /// What locks know a file by. Looks at nothing but the bytes of its handle.
    pub(super) fn file_key(&self, fh: &[u8]) -> Result<FileKey, Refused> {
        let handle = FileHandle::new(fh).ok_or(Nlm4Stats::StaleFh)?;
        Ok(self.node.files.lock_key(&handle)?)
    }

    /// Succeeds if the caller may have this lock, as far as exports and permissions say.
    pub(super) fn admit(&self, fh: &[u8], exclusive: bool) -> Result<(), Refused> {
        let handle = FileHandle::new(fh).ok_or(Nlm4Stats::StaleFh)?;
        let file = match self.node.files.open(&handle, self.request.mode) {
            Err(Failure::Stale) if self.node.awaits_volume_of(&handle) => {
                return Err(Refused::NoAnswer(Refusal::Silence));
            }
            file => file?,
        };
        let options = self.options(&file)?;
        if options.read_only && exclusive {
            return Err(Nlm4Stats::Rofs.into());
        }
        file.must_be_regular()?;
        if options.no_auth_nlm {
            return Ok(());
        }
        let caller = nfs3::caller(self.node, &self.request.credential, &options);
        // It fails while the caller's groups are being looked up.
        let caller = caller.map_err(|_| Refused::NoAnswer(Refusal::Silence))?;
        let attributes = file.attributes()?;
        if attributes.uid == caller.uid {
            return Ok(());
        }
        match file.allows(&attributes, &caller, Want::READ, self.request.mode) {
            Err(Failure::Os(_)) => Err(Nlm4Stats::Denied.into()),
            allowed => Ok(allowed?),
        }
    }

    /// The export's options for this host.
    fn options(&self, file: &File) -> Result<Options, Refused> {
        let exports = self.node.exports.load();
        let export = exports
            .by_id(file.volume.export_id)
            .ok_or(Nlm4Stats::StaleFh)?;
        let origin = self.request.origin;
        let rule = match export.policy(origin.host(), &self.node.names) {
            Verdict::Allowed(rule) => rule,
            Verdict::Refused => return Err(Nlm4Stats::StaleFh.into()),
            Verdict::Pending if self.request.mode == Mode::Inline => {
                return Err(Refused::NoAnswer(Refusal::Pending));
            }
            Verdict::Pending => return Err(Refused::NoAnswer(Refusal::Silence)),
        };
        if !rule.options.admits_port(origin.peer.port()) {
            let path = &export.spec.path;
            self.node.metrics.refused_port(&origin.peer, path);
            return Err(Nlm4Stats::Denied.into());
        }
        Ok(rule.options)
    }
}

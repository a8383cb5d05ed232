//! What tests set and see of attributes: `sattr3` on the way out, and every attribute that an
//! answer may carry on the way back.

use havenfs_rpc::xdr::Writer;
use nfs3_types::nfs3::{self, Nfs3Option, Nfs3Result, fattr3, nfsstat3, pre_op_attr};
use nfs3_types::xdr_codec::Void;

/// What a time becomes (`time_how`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SetTime {
    /// It stays.
    #[default]
    Keep,
    /// The server's clock.
    Now,
    /// Seconds and nanoseconds.
    To(u32, u32),
}

/// `sattr3`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sattr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Last access.
    pub atime: SetTime,
    /// Last change of the contents.
    pub mtime: SetTime,
}

impl Sattr {
    /// Changes the mode alone.
    pub fn mode(mode: u32) -> Self {
        Self {
            mode: Some(mode),
            ..Self::default()
        }
    }

    /// Changes the size alone.
    pub fn size(size: u64) -> Self {
        Self {
            size: Some(size),
            ..Self::default()
        }
    }

    pub(super) fn encode(&self, writer: &mut Writer<'_>) {
        for value in [self.mode, self.uid, self.gid] {
            writer.bool(value.is_some());
            if let Some(value) = value {
                writer.u32(value);
            }
        }
        writer.bool(self.size.is_some());
        if let Some(size) = self.size {
            writer.u64(size);
        }
        for time in [self.atime, self.mtime] {
            match time {
                SetTime::Keep => writer.u32(0),
                SetTime::Now => writer.u32(1),
                SetTime::To(seconds, nanoseconds) => {
                    writer.u32(2);
                    writer.u32(seconds);
                    writer.u32(nanoseconds);
                }
            }
        }
    }
}

/// What all results have in common, whatever the procedure.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status.
    pub status: nfsstat3,
    /// Every `post_op_attr` of the results, those in `wcc_data` included, in their order.
    pub after: Vec<Option<fattr3>>,
    /// Whether any `wcc_data` claims to know the attributes from before the call.
    pub claims_before: bool,
}

/// Results of NFSv3 that [`Answer`] can be made of.
pub trait Results {
    /// Takes out what all results have in common.
    fn answer(&self) -> Answer;
}

/// An attribute field of results: `post_op_attr` or `wcc_data`.
trait Field {
    fn after(&self) -> Option<fattr3>;
    fn before(&self) -> bool;
}

impl Field for nfs3::post_op_attr {
    fn after(&self) -> Option<fattr3> {
        match self {
            Nfs3Option::Some(attributes) => Some(attributes.clone()),
            Nfs3Option::None => None,
        }
    }

    fn before(&self) -> bool {
        false
    }
}

impl Field for nfs3::wcc_data {
    fn after(&self) -> Option<fattr3> {
        self.after.after()
    }

    fn before(&self) -> bool {
        let before: &pre_op_attr = &self.before;
        before.is_some()
    }
}

fn answer(status: nfsstat3, fields: &[&dyn Field]) -> Answer {
    Answer {
        status,
        after: fields.iter().map(|field| field.after()).collect(),
        claims_before: fields.iter().any(|field| field.before()),
    }
}

/// The attribute fields of each result, as RFC 1813 3.3 names them: on success, and on failure.
macro_rules! results {
    ($($ok:ty, [$($of_ok:ident),*], $fail:ty, [$($of_fail:ident),*];)*) => {$(
        impl Results for Nfs3Result<$ok, $fail> {
            fn answer(&self) -> Answer {
                match self {
                    #[allow(unused_variables, reason = "some results have no attributes")]
                    Nfs3Result::Ok(ok) => answer(nfsstat3::NFS3_OK, &[$(&ok.$of_ok),*]),
                    #[allow(unused_variables, reason = "GETATTR has none on failure")]
                    Nfs3Result::Err((status, fail)) => answer(*status, &[$(&fail.$of_fail),*]),
                }
            }
        }
    )*};
}

results! {
    nfs3::SETATTR3resok, [obj_wcc], nfs3::SETATTR3resfail, [obj_wcc];
    nfs3::LOOKUP3resok, [obj_attributes, dir_attributes], nfs3::LOOKUP3resfail, [dir_attributes];
    nfs3::ACCESS3resok, [obj_attributes], nfs3::ACCESS3resfail, [obj_attributes];
    nfs3::READLINK3resok<'static>, [symlink_attributes],
        nfs3::READLINK3resfail, [symlink_attributes];
    nfs3::READ3resok<'static>, [file_attributes], nfs3::READ3resfail, [file_attributes];
    nfs3::WRITE3resok, [file_wcc], nfs3::WRITE3resfail, [file_wcc];
    nfs3::CREATE3resok, [obj_attributes, dir_wcc], nfs3::CREATE3resfail, [dir_wcc];
    nfs3::MKDIR3resok, [obj_attributes, dir_wcc], nfs3::MKDIR3resfail, [dir_wcc];
    nfs3::SYMLINK3resok, [obj_attributes, dir_wcc], nfs3::SYMLINK3resfail, [dir_wcc];
    nfs3::MKNOD3resok, [obj_attributes, dir_wcc], nfs3::MKNOD3resfail, [dir_wcc];
    nfs3::REMOVE3resok, [dir_wcc], nfs3::REMOVE3resfail, [dir_wcc];
    nfs3::RMDIR3resok, [dir_wcc], nfs3::RMDIR3resfail, [dir_wcc];
    nfs3::RENAME3resok, [fromdir_wcc, todir_wcc], nfs3::RENAME3resfail, [fromdir_wcc, todir_wcc];
    nfs3::LINK3resok, [file_attributes, linkdir_wcc],
        nfs3::LINK3resfail, [file_attributes, linkdir_wcc];
    nfs3::READDIR3resok<'static>, [dir_attributes], nfs3::READDIR3resfail, [dir_attributes];
    nfs3::READDIRPLUS3resok<'static>, [dir_attributes],
        nfs3::READDIRPLUS3resfail, [dir_attributes];
    nfs3::FSSTAT3resok, [obj_attributes], nfs3::FSSTAT3resfail, [obj_attributes];
    nfs3::FSINFO3resok, [obj_attributes], nfs3::FSINFO3resfail, [obj_attributes];
    nfs3::PATHCONF3resok, [obj_attributes], nfs3::PATHCONF3resfail, [obj_attributes];
    nfs3::COMMIT3resok, [file_wcc], nfs3::COMMIT3resfail, [file_wcc];
}

impl Results for Nfs3Result<nfs3::GETATTR3resok, Void> {
    fn answer(&self) -> Answer {
        let (status, after) = match self {
            Self::Ok(ok) => (nfsstat3::NFS3_OK, vec![Some(ok.obj_attributes.clone())]),
            Self::Err((status, _)) => (*status, Vec::new()),
        };
        Answer {
            status,
            after,
            claims_before: false,
        }
    }
}

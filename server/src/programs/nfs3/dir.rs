//! LOOKUP, and the procedures that change directories.

use std::ffi::{CStr, CString};
use std::sync::Arc;

use havenfs_rpc::xdr::{Reader, Writer, XdrError};
use rustix::io::Errno;

use super::wire::{
    Diropargs3, Fail, Filename3, Nfsstat3, nfspath3, put_post_op_attr, put_post_op_fh3,
    put_wcc_data,
};
use super::{Nfs3, Target, attr_of, conclude, with_wcc};
use crate::backend::Failure;
use crate::backend::file::File;
use crate::backend::handle::FileHandle;
use crate::backend::namespace::{Change, CreateHow, Special};
use crate::backend::setattr::Changes;
use crate::call::{Mode, Refusal};
use crate::volumes;

/// The longest text of a symbolic link that Linux keeps, in bytes.
const SYMLINK_BYTES_MAX: usize = 4095;

impl Nfs3<'_> {
    /// RFC 1813 3.3.3.
    pub(super) fn lookup(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let what: Diropargs3<'_> = args.value()?;
        args.finish()?;
        let seen = self.see(&what.dir);
        let dir_attr = seen.as_ref().ok().map(|seen| seen.attr);
        let result = seen.and_then(|seen| {
            let Target {
                file: dir,
                caller,
                options,
            } = seen.target;
            let name = what.name.check()?;
            let mode = self.request.mode;
            let found = match self
                .node
                .files
                .lookup(&dir, &seen.attributes, &name, &caller, mode)
            {
                Err(Failure::Os(Errno::XDEV)) if mode == Mode::Inline => return Err(Fail::Wait),
                Err(Failure::Os(Errno::XDEV)) => volumes::cross(
                    self.node,
                    self.exports,
                    &dir,
                    &name,
                    options.crossmnt,
                    self.request.origin.host(),
                )?,
                found => found?,
            };
            let attr = attr_of(&found);
            Ok((found, attr))
        });
        let put_dir = |writer: &mut Writer<'_>| put_post_op_attr(writer, dir_attr.as_ref());
        let put_found = |writer: &mut Writer<'_>, (found, attr): (Arc<File>, Option<_>)| {
            writer.opaque(found.handle.as_slice());
            put_post_op_attr(writer, attr.as_ref());
            put_dir(writer);
        };
        conclude(writer, result, put_found, put_dir)
    }

    /// RFC 1813 3.3.8.
    pub(super) fn create(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let what: Diropargs3<'_> = args.value()?;
        let how = match args.u32()? {
            0 => CreateHow::Unchecked(args.value()?),
            1 => CreateHow::Guarded(args.value()?),
            2 => CreateHow::Exclusive(args.fixed()?),
            _ => return Err(XdrError::BadValue.into()),
        };
        args.finish()?;
        self.make(&what, writer, |change, dir, name| {
            change.create(dir, name, &how, |file| self.may_write(file))
        })
    }

    /// RFC 1813 3.3.9.
    pub(super) fn mkdir(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let what: Diropargs3<'_> = args.value()?;
        let changes: Changes = args.value()?;
        args.finish()?;
        self.make(&what, writer, |change, dir, name| {
            change.mkdir(dir, name, &changes)
        })
    }

    /// RFC 1813 3.3.10.
    pub(super) fn symlink(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let what: Diropargs3<'_> = args.value()?;
        let changes: Changes = args.value()?;
        let text = nfspath3(&mut args)?;
        args.finish()?;
        self.make(&what, writer, |change, dir, name| {
            if text.len() > SYMLINK_BYTES_MAX {
                return Err(Errno::NAMETOOLONG.into());
            }
            let text = CString::new(text).map_err(|_| Failure::Os(Errno::INVAL))?;
            change.symlink(dir, name, &text, &changes)
        })
    }

    /// RFC 1813 3.3.11.
    pub(super) fn mknod(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let what: Diropargs3<'_> = args.value()?;
        // ftype3: regular files, directories and links have procedures of their own.
        let (special, changes): (Option<Special>, Changes) = match args.u32()? {
            kind @ (3 | 4) => {
                let changes = args.value()?;
                let (major, minor) = (args.u32()?, args.u32()?);
                let special = if kind == 3 {
                    Special::BlockDevice(major, minor)
                } else {
                    Special::CharacterDevice(major, minor)
                };
                (Some(special), changes)
            }
            6 => (Some(Special::Socket), args.value()?),
            7 => (Some(Special::Fifo), args.value()?),
            1 | 2 | 5 => (None, Changes::default()),
            _ => return Err(XdrError::BadValue.into()),
        };
        args.finish()?;
        let Some(special) = special else {
            let dir = self.target(&what.dir);
            let after = dir.as_ref().ok().and_then(|dir| attr_of(&dir.file));
            let result = dir.and_then(|dir| {
                dir.may_change()?;
                Err::<(), _>(Fail::Status(Nfsstat3::BadType))
            });
            return with_wcc(writer, after.as_ref(), result, |_, ()| {});
        };
        self.make(&what, writer, |change, dir, name| {
            change.mknod(dir, name, special, &changes)
        })
    }

    /// RFC 1813 3.3.12.
    pub(super) fn remove(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let what: Diropargs3<'_> = args.value()?;
        args.finish()?;
        let name = match what.name.0 {
            b"." | b".." => Err(Nfsstat3::IsDir),
            _ => what.name.check(),
        };
        self.take(&what.dir, name, writer, |change, dir, name| {
            change.remove(dir, name)
        })
    }

    /// RFC 1813 3.3.13.
    pub(super) fn rmdir(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let what: Diropargs3<'_> = args.value()?;
        args.finish()?;
        let name = match what.name.0 {
            b"." => Err(Nfsstat3::Inval),
            b".." => Err(Nfsstat3::Exist),
            _ => what.name.check(),
        };
        self.take(&what.dir, name, writer, |change, dir, name| {
            change.rmdir(dir, name)
        })
    }

    /// RFC 1813 3.3.14. Both handles are judged by the same rules.
    pub(super) fn rename(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let from: Diropargs3<'_> = args.value()?;
        let to: Diropargs3<'_> = args.value()?;
        args.finish()?;
        let from_dir = self.target(&from.dir);
        let to_dir = self.target(&to.dir);
        let result = match (&from_dir, &to_dir) {
            (Err(fail), _) | (_, Err(fail)) => Err(*fail),
            (Ok(from_dir), Ok(to_dir)) => rename_name(&from.name)
                .and_then(|name| Ok((name, rename_name(&to.name)?)))
                .map_or_else(
                    |status| Err(status.into()),
                    |(from_name, to_name)| {
                        let from = (&from_dir.file, from_name.as_c_str());
                        let to = (&to_dir.file, to_name.as_c_str());
                        to_dir.may_change()?;
                        Ok(self.change(from_dir)?.rename(from, to)?)
                    },
                ),
        };
        let attr = |dir: Result<Target, Fail>| dir.ok().and_then(|dir| attr_of(&dir.file));
        let (from_attr, to_attr) = (attr(from_dir), attr(to_dir));
        let put_both = |writer: &mut Writer<'_>| {
            put_wcc_data(writer, from_attr.as_ref());
            put_wcc_data(writer, to_attr.as_ref());
        };
        conclude(writer, result, |writer, ()| put_both(writer), put_both)
    }

    /// RFC 1813 3.3.15.
    pub(super) fn link(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let handle: FileHandle = args.value()?;
        let link: Diropargs3<'_> = args.value()?;
        args.finish()?;
        let file = self.target(&handle);
        let dir = self.target(&link.dir);
        let result = match (&file, &dir) {
            (Err(fail), _) | (_, Err(fail)) => Err(*fail),
            (Ok(file), Ok(dir)) => link.name.check_new().map_or_else(
                |status| Err(status.into()),
                |name| {
                    file.may_change()?;
                    Ok(self.change(dir)?.link(&file.file, &dir.file, &name)?)
                },
            ),
        };
        let file_attr = file.ok().and_then(|file| attr_of(&file.file));
        let dir_attr = dir.ok().and_then(|dir| attr_of(&dir.file));
        let put_both = |writer: &mut Writer<'_>| {
            put_post_op_attr(writer, file_attr.as_ref());
            put_wcc_data(writer, dir_attr.as_ref());
        };
        conclude(writer, result, |writer, ()| put_both(writer), put_both)
    }

    fn change<'t>(&'t self, target: &'t Target) -> Result<Change<'t>, Fail> {
        target.may_change()?;
        Ok(Change {
            files: &self.node.files,
            caller: &target.caller,
            durable: target.options.sync,
        })
    }

    /// In a directory that was removed every name is missing; the right answer is STALE.
    fn stale_if_gone<T>(
        &self,
        handle: &FileHandle,
        dir: &Target,
        result: Result<T, Failure>,
    ) -> Result<T, Fail> {
        if matches!(result, Err(Failure::Os(Errno::NOENT))) {
            self.note(handle, dir.file.attributes())?;
        }
        Ok(result?)
    }

    /// CREATE, MKDIR, SYMLINK and MKNOD: `work` makes the file; the results are the same.
    fn make(
        &self,
        what: &Diropargs3<'_>,
        writer: &mut Writer<'_>,
        work: impl FnOnce(&Change<'_>, &Arc<File>, &CStr) -> Result<Arc<File>, Failure>,
    ) -> Result<(), Refusal> {
        let dir = self.target(&what.dir);
        let result = dir.as_ref().map_err(|fail| *fail).and_then(|dir| {
            let change = self.change(dir)?;
            let name = what.name.check_new()?;
            self.stale_if_gone(&what.dir, dir, work(&change, &dir.file, &name))
        });
        let made_attr = result.as_ref().ok().and_then(|made| attr_of(made));
        let dir_attr = dir.ok().and_then(|dir| attr_of(&dir.file));
        let put_dir = |writer: &mut Writer<'_>| put_wcc_data(writer, dir_attr.as_ref());
        let put_made = |writer: &mut Writer<'_>, made: Arc<File>| {
            put_post_op_fh3(writer, Some(&made.handle));
            put_post_op_attr(writer, made_attr.as_ref());
            put_dir(writer);
        };
        conclude(writer, result, put_made, put_dir)
    }

    /// REMOVE and RMDIR.
    fn take(
        &self,
        handle: &FileHandle,
        name: Result<CString, Nfsstat3>,
        writer: &mut Writer<'_>,
        work: impl FnOnce(&Change<'_>, &Arc<File>, &CStr) -> Result<(), Failure>,
    ) -> Result<(), Refusal> {
        let dir = self.target(handle);
        let result = dir.as_ref().map_err(|fail| *fail).and_then(|dir| {
            let change = self.change(dir)?;
            self.stale_if_gone(handle, dir, work(&change, &dir.file, &name?))
        });
        let attr = dir.ok().and_then(|dir| attr_of(&dir.file));
        with_wcc(writer, attr.as_ref(), result, |_, ()| {})
    }
}

/// A name in RENAME: "." and ".." can't be moved or replaced (RFC 1813 3.3.14: INVAL).
fn rename_name(name: &Filename3<'_>) -> Result<CString, Nfsstat3> {
    if matches!(name.0, b"." | b"..") {
        Err(Nfsstat3::Inval)
    } else {
        name.check()
    }
}

//! GETATTR, SETATTR, ACCESS, READLINK, FSSTAT, FSINFO, PATHCONF.

use crate::backend::attributes::FileType;
use havenfs_rpc::xdr::{Reader, Writer};
use rustix::io::Errno;

use super::wire::{Fail, Nfsstat3};
use super::{Nfs3, Target, attr_of, conclude, with_attr, with_wcc};
use crate::backend::Failure;
use crate::backend::attributes::{Attributes, Time, Want};
use crate::backend::handle::FileHandle;
use crate::backend::setattr::{self, Changes};
use crate::backend::space;
use crate::call::Refusal;

const ACCESS3_READ: u32 = 0x01;
const ACCESS3_LOOKUP: u32 = 0x02;
const ACCESS3_MODIFY: u32 = 0x04;
const ACCESS3_EXTEND: u32 = 0x08;
const ACCESS3_DELETE: u32 = 0x10;
const ACCESS3_EXECUTE: u32 = 0x20;

const FSF3_LINK: u32 = 0x01;
const FSF3_SYMLINK: u32 = 0x02;
const FSF3_HOMOGENEOUS: u32 = 0x08;
const FSF3_CANSETTIME: u32 = 0x10;

/// Directories are listed well in pages of this size.
const DIRECTORY_BYTES_PREFERRED: u32 = 64 * 1024;

impl Nfs3<'_> {
    /// RFC 1813 3.3.1.
    pub(super) fn getattr(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let handle: FileHandle = args.value()?;
        args.finish()?;
        let result = self.see(&handle).map(|seen| seen.attr);
        conclude(writer, result, |writer, attr| writer.fixed(&attr), |_| {})
    }

    /// RFC 1813 3.3.2.
    pub(super) fn setattr(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let handle: FileHandle = args.value()?;
        let changes: Changes = args.value()?;
        let guard: Option<Time> = args.optional()?;
        args.finish()?;
        let target = self.target(&handle);
        let result = target.as_ref().map_err(|fail| *fail).and_then(|target| {
            target.may_change()?;
            if changes.size.is_some() {
                self.may_write(&handle)?;
            }
            let before = self.note(&handle, target.file.attributes())?;
            // The wire has 32 bits of seconds.
            let ctime = Time {
                seconds: i64::from(before.ctime.seconds as u32),
                ..before.ctime
            };
            if guard.is_some_and(|guard| guard != ctime) {
                return Err(Nfsstat3::NotSync.into());
            }
            let (file, options) = (&target.file, &target.options);
            Ok(setattr::setattr(
                &self.node.files,
                file,
                &target.caller,
                &changes,
                options.sync,
            )?)
        });
        let after = target.ok().and_then(|target| attr_of(&target.file));
        with_wcc(writer, after.as_ref(), result, |_, _| {})
    }

    /// RFC 1813 3.3.4. A right that is refused is a cleared bit, not an error; all bits that the
    /// answer has set were asked for.
    pub(super) fn access(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let handle: FileHandle = args.value()?;
        let asked = args.u32()?;
        args.finish()?;
        let seen = self.see(&handle);
        let attr = seen.as_ref().ok().map(|seen| seen.attr);
        let result = seen.and_then(|seen| self.rights(&seen.target, &seen.attributes, asked));
        with_attr(writer, attr.as_ref(), result, |writer, rights| {
            writer.u32(rights);
        })
    }

    /// Which of the asked rights the caller has. Source of the meaning for directories and for
    /// devices on read-only exports: Linux fs/nfsd/vfs.c.
    fn rights(&self, target: &Target, attributes: &Attributes, asked: u32) -> Result<u32, Fail> {
        let write_and_search = Want::WRITE.and(Want::EXECUTE);
        let meanings: &[(u32, Want)] = match attributes.kind {
            FileType::Directory => &[
                (ACCESS3_READ, Want::READ),
                (ACCESS3_LOOKUP, Want::EXECUTE),
                (ACCESS3_MODIFY, write_and_search),
                (ACCESS3_EXTEND, write_and_search),
                (ACCESS3_DELETE, write_and_search),
            ],
            FileType::RegularFile => &[
                (ACCESS3_READ, Want::READ),
                (ACCESS3_MODIFY, Want::WRITE),
                (ACCESS3_EXTEND, Want::WRITE),
                (ACCESS3_EXECUTE, Want::EXECUTE),
            ],
            _ => &[
                (ACCESS3_READ, Want::READ),
                (ACCESS3_MODIFY, Want::WRITE),
                (ACCESS3_EXTEND, Want::WRITE),
            ],
        };
        let on_this_file_system =
            matches!(attributes.kind, FileType::Directory | FileType::RegularFile);
        let mut rights = 0;
        for (bit, want) in meanings.iter().filter(|(bit, _)| asked & bit != 0) {
            let writes = want.0 & Want::WRITE.0 != 0;
            if writes && target.options.read_only && on_this_file_system {
                continue;
            }
            match target
                .file
                .allows(attributes, &target.caller, *want, self.request.mode)
            {
                Ok(()) => rights |= bit,
                Err(Failure::Os(Errno::ACCESS | Errno::ROFS | Errno::PERM)) => {}
                Err(failure) => return Err(failure.into()),
            }
        }
        Ok(rights)
    }

    /// RFC 1813 3.3.5.
    pub(super) fn readlink(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let handle: FileHandle = args.value()?;
        args.finish()?;
        let target = self.target(&handle);
        let attr = target
            .as_ref()
            .ok()
            .and_then(|target| attr_of(&target.file));
        let result = target.and_then(|target| Ok(target.file.read_link(self.request.mode)?));
        with_attr(writer, attr.as_ref(), result, |writer, text| {
            writer.opaque(text.as_bytes());
        })
    }

    /// RFC 1813 3.3.18.
    pub(super) fn fsstat(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let handle: FileHandle = args.value()?;
        args.finish()?;
        let target = self.target(&handle);
        let attr = target
            .as_ref()
            .ok()
            .and_then(|target| attr_of(&target.file));
        let result = target.and_then(|target| Ok(space::space(&target.file)?));
        with_attr(writer, attr.as_ref(), result, |writer, space| {
            for number in [
                space.bytes,
                space.free_bytes,
                space.available_bytes,
                space.files,
                space.free_files,
                space.available_files,
            ] {
                writer.u64(number);
            }
            // `invarsec`: the numbers may change at any time.
            writer.u32(0);
        })
    }

    /// RFC 1813 3.3.19.
    pub(super) fn fsinfo(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let handle: FileHandle = args.value()?;
        args.finish()?;
        let target = self.target(&handle);
        let attr = target
            .as_ref()
            .ok()
            .and_then(|target| attr_of(&target.file));
        with_attr(writer, attr.as_ref(), target, |writer, _| {
            let transfer = self.transfer_bytes_max();
            // rtmax, rtpref, rtmult, wtmax, wtpref, wtmult, dtpref
            for value in [
                transfer,
                transfer,
                4096,
                transfer,
                transfer,
                4096,
                transfer.min(DIRECTORY_BYTES_PREFERRED),
            ] {
                writer.u32(value);
            }
            writer.u64(crate::backend::data::OFFSET_MAX);
            // time_delta: a nanosecond.
            writer.u32(0);
            writer.u32(1);
            writer.u32(FSF3_LINK | FSF3_SYMLINK | FSF3_HOMOGENEOUS | FSF3_CANSETTIME);
        })
    }

    /// RFC 1813 3.3.20.
    pub(super) fn pathconf(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let handle: FileHandle = args.value()?;
        args.finish()?;
        let target = self.target(&handle);
        let attr = target
            .as_ref()
            .ok()
            .and_then(|target| attr_of(&target.file));
        let result = target.and_then(|target| Ok(space::name_limits(&target.file)?));
        with_attr(writer, attr.as_ref(), result, |writer, limits| {
            writer.u32(limits.link_max);
            writer.u32(limits.name_max);
            // no_trunc, chown_restricted, case_insensitive, case_preserving
            for claim in [true, true, false, true] {
                writer.bool(claim);
            }
        })
    }
}

//! READ, WRITE, COMMIT.

use havenfs_rpc::xdr::{Reader, Writer, XdrError};

use super::wire::{FATTR3_BYTES, Fail, Nfsstat3};
use super::{Nfs3, TRANSFER_BYTES_MAX, attr_of, encode, with_attr, with_wcc};
use crate::backend::data::{self, OFFSET_MAX};
use crate::backend::handle::FileHandle;
use crate::call::Refusal;

// `stable_how`. What is synced at all is synced with its attributes: FILE_SYNC.
const UNSTABLE: u32 = 0;
const DATA_SYNC: u32 = 1;
const FILE_SYNC: u32 = 2;

/// Status, `post_op_attr`, count, eof and the length of the data: what stands before the data.
const READ_HEAD_BYTES: usize = 4 + 4 + FATTR3_BYTES + 4 + 4 + 4;

impl Nfs3<'_> {
    /// RFC 1813 3.3.6. The data is read straight into the reply, behind room for the numbers that
    /// are known only afterwards.
    pub(super) fn read(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let handle: FileHandle = args.value()?;
        let offset = args.u64()?;
        let count = args.u32()?.min(self.transfer_bytes_max()) as usize;
        args.finish()?;
        let target = self.target(&handle);
        let start = writer.position();
        let result = target.as_ref().map_err(|fail| *fail).and_then(|target| {
            let out = writer.buffer();
            out.resize(start + READ_HEAD_BYTES, 0);
            let (file, caller) = (&target.file, &target.caller);
            let read = data::read(file, caller, offset, count, out, self.request.mode);
            self.note(&handle, read)
        });
        match result {
            Ok(done) => {
                let Ok(target) = target else {
                    return Err(Refusal::Silence);
                };
                writer.pad(done.count);
                // Write the head where room was left, in front of the data.
                let attr = encode(&target.file, &done.attributes);
                let count = u32::try_from(done.count).unwrap_or(u32::MAX);
                let mut at = start;
                for part in [
                    (Nfsstat3::Ok as u32).to_be_bytes().as_slice(),
                    &1u32.to_be_bytes(),
                    &attr,
                    &count.to_be_bytes(),
                    &u32::from(done.eof).to_be_bytes(),
                    &count.to_be_bytes(),
                ] {
                    writer.patch(at, part);
                    at += part.len();
                }
                debug_assert_eq!(at, start + READ_HEAD_BYTES);
                Ok(())
            }
            Err(fail) => {
                writer.truncate(start);
                let attr = target.ok().and_then(|target| attr_of(&target.file));
                with_attr(writer, attr.as_ref(), Err(fail), |_, ()| {})
            }
        }
    }

    /// RFC 1813 3.3.7. A count below the length of the data writes as much as it says; above it,
    /// the arguments contradict themselves. What is longer than the preferred size is written in
    /// part, which the reply says.
    pub(super) fn write(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let handle: FileHandle = args.value()?;
        let offset = args.u64()?;
        let count = args.u32()? as usize;
        let stable = match args.u32()? {
            UNSTABLE => false,
            DATA_SYNC | FILE_SYNC => true,
            _ => return Err(XdrError::BadValue.into()),
        };
        let data = args.opaque(usize::MAX)?;
        args.finish()?;
        let Some(data) = data.get(..count) else {
            return Err(Refusal::GarbageArgs);
        };
        let data = data.get(..TRANSFER_BYTES_MAX as usize).unwrap_or(data);
        // Taken before the write: if a sync fails meanwhile, the client must see the old one here
        // and another one in its COMMIT.
        let write_verifier = self.node.files.write_verifier();
        let target = self.target(&handle);
        let result = target.as_ref().map_err(|fail| *fail).and_then(|target| {
            target.may_change()?;
            self.may_write(&handle)?;
            let (files, file, caller) = (&self.node.files, &target.file, &target.caller);
            let sync = stable && target.options.sync;
            self.note(
                &handle,
                data::write(files, file, caller, offset, data, sync),
            )
        });
        // `async`: the administrator has chosen to answer before the disk has it.
        let kept = stable || target.as_ref().is_ok_and(|target| !target.options.sync);
        let after = match (&target, &result) {
            (Ok(target), Ok((attributes, _))) => Some(encode(&target.file, attributes)),
            (Ok(target), Err(_)) => attr_of(&target.file),
            _ => None,
        };
        with_wcc(writer, after.as_ref(), result, |writer, (_, written)| {
            writer.u32(written as u32);
            writer.u32(if kept { FILE_SYNC } else { UNSTABLE });
            writer.u64(write_verifier);
        })
    }

    /// RFC 1813 3.3.21. The whole file is synced, whatever range was named, as the RFC allows.
    pub(super) fn commit(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let handle: FileHandle = args.value()?;
        let offset = args.u64()?;
        let count = args.u32()?;
        args.finish()?;
        let target = self.target(&handle);
        let result = target.as_ref().map_err(|fail| *fail).and_then(|target| {
            target.may_change()?;
            if offset
                .checked_add(u64::from(count))
                .is_none_or(|end| end > OFFSET_MAX)
            {
                return Err(Fail::Status(Nfsstat3::Inval));
            }
            let files = &self.node.files;
            if target.options.sync {
                self.note(&handle, data::commit(files, &target.file, &target.caller))
            } else {
                self.note(&handle, target.file.attributes())
            }
        });
        let after = target.ok().and_then(|target| attr_of(&target.file));
        with_wcc(writer, after.as_ref(), result, |writer, _| {
            // Taken after the sync: if another one failed before, its data may be lost too.
            writer.u64(self.node.files.write_verifier());
        })
    }
}

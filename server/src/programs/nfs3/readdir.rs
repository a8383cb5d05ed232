//! READDIR and READDIRPLUS.
//!
//! The cookie verifier is always zero and never checked: cookies are the kernel's own positions
//! and stay valid for the life of a directory, as with Linux's server.

use havenfs_rpc::xdr::{Reader, Writer};
use rustix::io::Errno;

use super::wire::{FATTR3_BYTES, Fail, Nfsstat3, fattr3, put_post_op_attr, put_post_op_fh3};
use super::{Nfs3, Target, with_attr};
use crate::backend::Failure;
use crate::backend::attributes::{Attributes, Want};
use crate::backend::directory::{self, Next};
use crate::backend::handle::{FileHandle, HANDLE_BYTES_MAX};
use crate::call::Refusal;

/// What stands before the entries: status, `post_op_attr`, `cookieverf`.
const HEAD_BYTES: usize = 4 + 4 + FATTR3_BYTES + 8;
/// What stands behind them: "no more entries" and eof.
const TAIL_BYTES: usize = 8;
/// An entry without its name: "an entry follows", fileid, length of the name, cookie.
const ENTRY_BYTES: usize = 4 + 8 + 4 + 8;
/// What READDIRPLUS adds to an entry at most.
const PLUS_BYTES: usize = 4 + FATTR3_BYTES + 4 + 4 + HANDLE_BYTES_MAX;

/// How large a page may become.
struct Page {
    dir_cookie: u64,
    /// Bytes of names, ids and cookies.
    dircount: usize,
    /// Bytes of the whole result.
    maxcount: usize,
    plus: bool,
}

impl Nfs3<'_> {
    /// RFC 1813 3.3.16.
    pub(super) fn readdir(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let handle: FileHandle = args.value()?;
        let dir_cookie = args.u64()?;
        let _cookie_verifier = args.u64()?;
        let count = args.u32()?.min(self.transfer_bytes_max()) as usize;
        args.finish()?;
        let page = Page {
            dir_cookie,
            dircount: count,
            maxcount: count,
            plus: false,
        };
        self.list(&handle, &page, writer)
    }

    /// RFC 1813 3.3.17. `dircount` bounds names, ids and cookies, `maxcount` the whole; a
    /// `dircount` of 0 is taken for "no bound", as clients mean it.
    pub(super) fn readdirplus(
        &self,
        mut args: Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let handle: FileHandle = args.value()?;
        let dir_cookie = args.u64()?;
        let _cookie_verifier = args.u64()?;
        let dircount = args.u32()?;
        let maxcount = args.u32()?.min(self.transfer_bytes_max()) as usize;
        args.finish()?;
        let dircount = if dircount == 0 {
            usize::MAX
        } else {
            dircount as usize
        };
        let page = Page {
            dir_cookie,
            dircount,
            maxcount,
            plus: true,
        };
        self.list(&handle, &page, writer)
    }

    fn list(
        &self,
        handle: &FileHandle,
        page: &Page,
        writer: &mut Writer<'_>,
    ) -> Result<(), Refusal> {
        let start = writer.position();
        let seen = self.see(handle);
        let attr = seen.as_ref().ok().map(|seen| seen.attr);
        let result = seen.and_then(|seen| {
            writer.u32(Nfsstat3::Ok as u32);
            put_post_op_attr(writer, attr.as_ref());
            writer.u64(0);
            self.entries(&seen.target, &seen.attributes, page, writer)
        });
        match result {
            Ok(eof) => {
                writer.bool(false);
                writer.bool(eof);
                Ok(())
            }
            Err(fail) => {
                writer.truncate(start);
                with_attr(writer, attr.as_ref(), Err(fail), |_, ()| {})
            }
        }
    }

    /// Appends as many entries as the page takes; returns whether the end was reached.
    fn entries(
        &self,
        target: &Target,
        attributes: &Attributes,
        page: &Page,
        writer: &mut Writer<'_>,
    ) -> Result<bool, Fail> {
        let (dir, mode) = (&target.file, self.request.mode);
        dir.must_be_dir()?;
        dir.allows(attributes, &target.caller, Want::READ, mode)?;
        // Attributes and handles are what LOOKUP would give: they need the right to search.
        let may_search = dir
            .allows(attributes, &target.caller, Want::EXECUTE, mode)
            .is_ok();
        let plus = page.plus && may_search;
        let end = writer.position().saturating_sub(HEAD_BYTES) + page.maxcount;
        let is_root = dir.is_root(attributes);
        let (mut names_bytes, mut count) = (0, 0);
        // The kernel's entries are about as long as ours without attributes.
        let per_entry = ENTRY_BYTES + 16 + if page.plus { PLUS_BYTES } else { 0 };
        let hint = page.maxcount / per_entry * 40;
        let listed = directory::list(dir, page.dir_cookie, hint, |entry| {
            let name = entry.name.to_bytes();
            let before = writer.position();
            // ".." of the export's root would name a directory outside.
            let above_root = is_root && name == b"..";
            writer.bool(true);
            writer.u64(if above_root {
                attributes.ino
            } else {
                entry.ino
            });
            writer.opaque(name);
            writer.u64(entry.dir_cookie);
            names_bytes += writer.position() - before;
            if page.plus {
                let details = if plus && name != b".." {
                    self.node.files.details(dir, entry.name)
                } else {
                    None
                };
                let (attr, handle) = details.unzip();
                let attr = attr.map(|attributes| fattr3(&attributes, dir.volume.fsid));
                put_post_op_attr(writer, attr.as_ref());
                put_post_op_fh3(writer, handle.as_ref());
            }
            if writer.position() + TAIL_BYTES > end || names_bytes > page.dircount && count > 0 {
                writer.truncate(before);
                return Ok(Next::Stop);
            }
            count += 1;
            Ok(Next::Continue)
        });
        match listed {
            Ok(false) if count == 0 => Err(Nfsstat3::TooSmall.into()),
            Ok(eof) => Ok(eof),
            Err(Failure::Os(Errno::INVAL)) if page.dir_cookie != 0 => {
                Err(Nfsstat3::BadCookie.into())
            }
            Err(failure) => Err(failure.into()),
        }
    }
}

//! What is called and what the answer must be.
//!
//! All calls of a workload are encoded before the clock starts; issuing one copies it, patches
//! its transaction id and, where there is one, its offset or cookie. Every answer is checked
//! against what the data set holds.
//!
//! Invariants: an answer that is not exactly right ends the measurement with an error, so a fast
//! wrong server can't win.

use std::time::Instant;

use anyhow::ensure;
use havenfs_nlm::wire::procedure;
use havenfs_rpc::xdr::{Reader, Writer, XdrError};

use crate::dataset::{self, file_name};
use crate::locks;
use crate::pattern::Pattern;
use crate::session::{ACCEPTED, Identity, Session, append_call};
use crate::workload::Workload;

/// Asked for with ACCESS: READ, MODIFY and EXTEND, which the owner of a file of mode 0644 has.
const ACCESS_ASKED: u32 = 0x01 | 0x04 | 0x08;
/// READDIRPLUS `maxcount`.
const LIST_BYTES: u32 = 64 << 10;
/// READDIRPLUS `dircount`: an eighth, as Linux asks.
const LIST_NAME_BYTES: u32 = LIST_BYTES / 8;
/// Every how many READ answers all bytes are compared.
const WHOLE_EVERY: u32 = 64;

/// A call that is under way.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    pub(crate) xid: u32,
    /// Which of the prepared calls it is.
    index: usize,
    offset: u64,
    cookie: u64,
    cookie_verf: [u8; 8],
    /// Names seen in this pass through a directory.
    names: u32,
    /// Whether the file of this slot exists (CREATE and REMOVE), or its lock is held.
    created: bool,
    /// Whole passes through a directory.
    pub(crate) passes: u32,
    /// When the call was made, where that is of interest.
    pub(crate) issued: Option<Instant>,
}

/// Where the payload of a WRITE comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Payload {
    pub(crate) file: usize,
    pub(crate) offset: u64,
    pub(crate) len: usize,
}

#[derive(Debug)]
struct Prepared {
    call: Vec<u8>,
    /// The file id for GETATTR.
    file_id: u64,
    /// The handle for LOOKUP.
    handle: Vec<u8>,
}

/// A workload with all its calls.
#[derive(Debug)]
pub(crate) struct Work {
    workload: Workload,
    calls: Vec<Prepared>,
    pattern: Pattern,
    next: usize,
    answers: u32,
    noise: u64,
    blocks: u64,
    write_verf: Option<[u8; 8]>,
}

/// Why an answer is wrong.
#[derive(Debug)]
pub(crate) enum Fault {
    Header,
    Xdr(XdrError),
    Status(u32),
    Wrong(&'static str),
}

impl From<XdrError> for Fault {
    fn from(error: XdrError) -> Self {
        Self::Xdr(error)
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Header => f.write_str("the reply is not an accepted one"),
            Self::Xdr(error) => write!(f, "the reply can't be decoded: {error}"),
            Self::Status(status) => write!(f, "the status is {status}"),
            Self::Wrong(what) => write!(f, "wrong {what}"),
        }
    }
}

impl std::error::Error for Fault {}

impl Work {
    /// Finds the handles and encodes the calls. `slots` is how many calls will be outstanding.
    pub(crate) fn prepare(
        workload: Workload,
        session: &mut Session,
        root: &[u8],
        who: Identity,
        slots: usize,
    ) -> anyhow::Result<Self> {
        let mut calls = Vec::new();
        let mut add = |procedure, arguments: &dyn Fn(&mut Writer<'_>), file_id, handle: &[u8]| {
            let mut call = Vec::new();
            let payload = match workload {
                Workload::Write4k | Workload::Write1m => workload.payload(),
                _ => 0,
            };
            let (program, version) = workload.program();
            let what = (program, version, procedure);
            append_call(&mut call, who, what, arguments, payload);
            calls.push(Prepared {
                call,
                file_id,
                handle: handle.to_vec(),
            });
        };
        let procedure = workload.procedure();
        let count = workload.payload() as u32;
        let (directory, files, bytes) = match workload {
            Workload::Null | Workload::Commit | Workload::StoreCommit => ("", 0, 0),
            Workload::Getattr | Workload::Access | Workload::Lookup | Workload::Read4k => (
                dataset::SMALL_READ,
                dataset::SMALL_FILES,
                dataset::SMALL_BYTES,
            ),
            Workload::Write4k => (
                dataset::SMALL_WRITE,
                dataset::SMALL_FILES,
                dataset::SMALL_BYTES,
            ),
            Workload::Read1m => (
                dataset::LARGE_READ,
                dataset::LARGE_FILES,
                dataset::LARGE_BYTES,
            ),
            Workload::Write1m => (
                dataset::LARGE_WRITE,
                dataset::LARGE_FILES,
                dataset::LARGE_BYTES,
            ),
            Workload::LockUnlock | Workload::LockUnlockCrowded => (dataset::SMALL_WRITE, 0, 0),
            Workload::CreateRemove => (dataset::SCRATCH, 0, 0),
            Workload::List1k | Workload::List100k | Workload::List1m => ("list", 0, 0),
        };
        match workload {
            Workload::Null => add(procedure, &|_| {}, 0, &[]),
            Workload::Commit | Workload::StoreCommit => {}
            Workload::LockUnlock | Workload::LockUnlockCrowded => {
                let handle = locks::file(workload, session, root)?;
                for slot in 0..slots {
                    let alock = locks::CALLER.lock(&handle, slot);
                    let lock = locks::lock(alock);
                    add(procedure, &|args| args.value(&lock), 0, &[]);
                    let unlock = locks::unlock(alock);
                    add(procedure::UNLOCK, &|args| args.value(&unlock), 0, &[]);
                }
            }
            Workload::CreateRemove => {
                let directory = session.lookup(root, directory)?;
                for slot in 0..slots {
                    let name = file_name(slot);
                    session.remove(&directory, &name)?;
                    add(
                        8,
                        &|args| {
                            args.opaque(&directory);
                            args.opaque(name.as_bytes());
                            // GUARDED, mode 0644, nothing else set.
                            for word in [1, 1, 0o644, 0, 0, 0, 0, 0] {
                                args.u32(word);
                            }
                        },
                        0,
                        &[],
                    );
                    add(
                        12,
                        &|args| {
                            args.opaque(&directory);
                            args.opaque(name.as_bytes());
                        },
                        0,
                        &[],
                    );
                }
            }
            Workload::List1k | Workload::List100k | Workload::List1m => {
                let entries = workload.listed().unwrap_or(0);
                let directory = session.lookup(root, &dataset::directory_name(entries))?;
                add(
                    procedure,
                    &|args| {
                        args.opaque(&directory);
                        args.u64(0);
                        args.u64(0);
                        args.u32(LIST_NAME_BYTES);
                        args.u32(LIST_BYTES);
                    },
                    0,
                    &[],
                );
            }
            _ => {
                let directory = session.lookup(root, directory)?;
                for index in 0..files {
                    let name = file_name(index);
                    let handle = session.lookup(&directory, &name)?;
                    let file_id = session.file_id(&handle)?;
                    ensure!(handle.len() <= 64, "a handle has {} bytes", handle.len());
                    add(
                        procedure,
                        &|args| match workload {
                            Workload::Lookup => {
                                args.opaque(&directory);
                                args.opaque(name.as_bytes());
                            }
                            Workload::Access => {
                                args.opaque(&handle);
                                args.u32(ACCESS_ASKED);
                            }
                            Workload::Read4k | Workload::Read1m => {
                                args.opaque(&handle);
                                args.u64(0);
                                args.u32(count);
                            }
                            Workload::Write4k | Workload::Write1m => {
                                args.opaque(&handle);
                                args.u64(0);
                                // Count, UNSTABLE, and the length of the data that follows.
                                for word in [count, 0, count] {
                                    args.u32(word);
                                }
                            }
                            _ => args.opaque(&handle),
                        },
                        file_id,
                        &handle,
                    );
                }
            }
        }
        Ok(Self {
            workload,
            calls,
            pattern: Pattern::new(),
            next: 0,
            answers: 0,
            noise: 0x9e37_79b9_7f4a_7c15,
            blocks: if count == 0 {
                0
            } else {
                bytes / u64::from(count)
            },
            write_verf: None,
        })
    }

    /// Whether it is of interest how long a call takes: what waits for a disk shows it better than
    /// calls per second.
    pub(crate) const fn is_timed(&self) -> bool {
        self.workload.locks()
    }

    /// The payload bytes of a WRITE.
    pub(crate) fn payload(&self, payload: Payload) -> &[u8] {
        self.pattern
            .expected(payload.file, payload.offset, payload.len)
    }

    /// Appends the next call of slot number `number`; a payload is sent behind it.
    pub(crate) fn issue(
        &mut self,
        number: usize,
        slot: &mut Slot,
        out: &mut Vec<u8>,
    ) -> Option<Payload> {
        slot.index = match self.workload {
            Workload::CreateRemove | Workload::LockUnlock | Workload::LockUnlockCrowded => {
                2 * number + usize::from(slot.created)
            }
            _ => self.next,
        };
        self.next += 1;
        if self.next >= self.calls.len() {
            self.next = 0;
        }
        let start = out.len();
        let call = self.calls[slot.index].call.as_slice();
        out.extend_from_slice(call);
        out[start + 4..start + 8].copy_from_slice(&slot.xid.to_be_bytes());
        let end = out.len();
        match self.workload {
            Workload::Read4k | Workload::Read1m => {
                slot.offset = self.next_offset();
                out[end - 12..end - 4].copy_from_slice(&slot.offset.to_be_bytes());
                None
            }
            Workload::Write4k | Workload::Write1m => {
                slot.offset = self.next_offset();
                out[end - 20..end - 12].copy_from_slice(&slot.offset.to_be_bytes());
                Some(Payload {
                    file: slot.index,
                    offset: slot.offset,
                    len: self.workload.payload(),
                })
            }
            Workload::List1k | Workload::List100k | Workload::List1m => {
                out[end - 24..end - 16].copy_from_slice(&slot.cookie.to_be_bytes());
                out[end - 16..end - 8].copy_from_slice(&slot.cookie_verf);
                None
            }
            _ => None,
        }
    }

    fn next_offset(&mut self) -> u64 {
        self.noise ^= self.noise << 13;
        self.noise ^= self.noise >> 7;
        self.noise ^= self.noise << 17;
        (self.noise >> 20) % self.blocks * self.workload.payload() as u64
    }

    /// Checks an answer, without its record mark; returns how many units it counts for.
    pub(crate) fn check(&mut self, slot: &mut Slot, message: &[u8]) -> Result<u64, Fault> {
        let results = message
            .get(4..)
            .and_then(|rest| rest.strip_prefix(&ACCEPTED))
            .ok_or(Fault::Header)?;
        let mut reader = Reader::new(results);
        if self.workload == Workload::Null {
            reader.finish()?;
            return Ok(1);
        }
        if self.workload.locks() && reader.opaque(locks::COOKIE.len())? != locks::COOKIE {
            return Err(Fault::Wrong("cookie"));
        }
        let status = reader.u32()?;
        if status != 0 {
            return Err(Fault::Status(status));
        }
        match self.workload {
            Workload::Null | Workload::Commit | Workload::StoreCommit => {}
            Workload::LockUnlock | Workload::LockUnlockCrowded => {
                reader.finish()?;
                slot.created = !slot.created;
            }
            Workload::Getattr => {
                if reader.u32()? != 1 {
                    return Err(Fault::Wrong("type"));
                }
                reader.fixed::<16>()?;
                if reader.u64()? != dataset::SMALL_BYTES {
                    return Err(Fault::Wrong("size"));
                }
                reader.fixed::<24>()?;
                if reader.u64()? != self.calls[slot.index].file_id {
                    return Err(Fault::Wrong("file id"));
                }
                reader.fixed::<24>()?;
                reader.finish()?;
            }
            Workload::Access => {
                skip_attributes(&mut reader)?;
                if reader.u32()? != ACCESS_ASKED {
                    return Err(Fault::Wrong("access"));
                }
                reader.finish()?;
            }
            Workload::Lookup => {
                if reader.opaque(64)? != self.calls[slot.index].handle {
                    return Err(Fault::Wrong("handle"));
                }
                skip_attributes(&mut reader)?;
                skip_attributes(&mut reader)?;
                reader.finish()?;
            }
            Workload::Read4k | Workload::Read1m => {
                skip_attributes(&mut reader)?;
                let count = reader.u32()? as usize;
                let _eof = reader.bool()?;
                let data = reader.opaque(self.workload.payload())?;
                if count != self.workload.payload() || data.len() != count {
                    return Err(Fault::Wrong("count"));
                }
                self.answers = self.answers.wrapping_add(1);
                let whole = self.answers.is_multiple_of(WHOLE_EVERY);
                if !self.pattern.holds(slot.index, slot.offset, data, whole) {
                    return Err(Fault::Wrong("data"));
                }
            }
            Workload::Write4k | Workload::Write1m => {
                skip_weak_cache_data(&mut reader)?;
                if reader.u32()? as usize != self.workload.payload() {
                    return Err(Fault::Wrong("count"));
                }
                if reader.u32()? > 2 {
                    return Err(Fault::Wrong("stability"));
                }
                let verf = reader.fixed::<8>()?;
                if *self.write_verf.get_or_insert(verf) != verf {
                    return Err(Fault::Wrong("write verifier"));
                }
                reader.finish()?;
            }
            Workload::CreateRemove => {
                if !slot.created && (!reader.bool()? || reader.opaque(64)?.is_empty()) {
                    return Err(Fault::Wrong("handle"));
                }
                if !slot.created {
                    skip_attributes(&mut reader)?;
                }
                skip_weak_cache_data(&mut reader)?;
                reader.finish()?;
                slot.created = !slot.created;
            }
            Workload::List1k | Workload::List100k | Workload::List1m => {
                return self.check_list(slot, reader);
            }
        }
        Ok(1)
    }

    fn check_list(&self, slot: &mut Slot, mut reader: Reader<'_>) -> Result<u64, Fault> {
        skip_attributes(&mut reader)?;
        slot.cookie_verf = reader.fixed()?;
        let mut entries = 0;
        while reader.bool()? {
            reader.u64()?;
            let name = reader.opaque(255)?;
            slot.cookie = reader.u64()?;
            skip_attributes(&mut reader)?;
            if reader.bool()? {
                reader.opaque(64)?;
            } else if name != b".." && name != b"." {
                return Err(Fault::Wrong("missing handle"));
            }
            entries += 1;
            slot.names += u32::from(name.starts_with(b"file-"));
        }
        let end = reader.bool()?;
        reader.finish()?;
        if end {
            if Some(slot.names) != self.workload.listed() {
                return Err(Fault::Wrong("number of names"));
            }
            slot.names = 0;
            slot.cookie = 0;
            slot.cookie_verf = [0; 8];
            slot.passes += 1;
        } else if entries == 0 {
            return Err(Fault::Wrong("empty page"));
        }
        Ok(entries)
    }
}

fn skip_attributes(reader: &mut Reader<'_>) -> Result<(), XdrError> {
    if reader.bool()? {
        reader.fixed::<84>()?;
    }
    Ok(())
}

fn skip_weak_cache_data(reader: &mut Reader<'_>) -> Result<(), XdrError> {
    if reader.bool()? {
        reader.fixed::<24>()?;
    }
    skip_attributes(reader)
}

#[cfg(test)]
mod tests;

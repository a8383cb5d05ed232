//! Where in the log files which entries lie, and reading them from there.
//!
//! The index is sparse: a mark per [`MARK_BYTES`] of log. From a mark to the next one the entries
//! of one file follow each other without a gap and without a truncation, since a new file and
//! a truncation each force a mark. So what a mark covers is read in one piece.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::codec::{self, Record};
use super::error::StoreError;
use super::segment::{self, Header, Step};
use super::types::Entry;

/// How much log a mark covers at least.
const MARK_BYTES: u64 = 4096;

/// A log file.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    pub(super) header: Header,
    pub(super) path: PathBuf,
    /// Where its synced frames end.
    pub(super) end: u64,
    /// The highest index that was ever written to it.
    pub(super) last_index: Option<u64>,
}

/// Entries from `index` on begin in the frame at `offset` of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    index: u64,
    number: u64,
    offset: u64,
}

/// What of the log lies on the disk; only synced frames are in it.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// In order; the last one is written to.
    pub(super) segments: VecDeque<Segment>,
    marks: VecDeque<Mark>,
    /// The next entry needs a mark of its own.
    forced: bool,
    /// The index after the last entry.
    next: u64,
}

/// A piece of a file that holds the entries from `first` up to before `next`.
#[derive(Debug)]
pub(super) struct Piece {
    header: Header,
    path: PathBuf,
    offset: u64,
    end: u64,
    first: u64,
    next: u64,
}

impl Index {
    /// Takes a new file to the end.
    pub(super) fn add_segment(&mut self, segment: Segment) {
        self.segments.push_back(segment);
        self.forced = true;
    }

    /// The frame at `offset` of the last file holds the entries from `first` to `last`, and ends at
    /// `end`.
    pub(super) fn add_entries(&mut self, offset: u64, first: u64, last: u64) {
        let Some(segment) = self.segments.back_mut() else {
            return;
        };
        segment.last_index = Some(segment.last_index.map_or(last, |highest| highest.max(last)));
        self.next = last + 1;
        let near = self
            .marks
            .back()
            .is_some_and(|mark| offset.saturating_sub(mark.offset) < MARK_BYTES);
        if self.forced || !near {
            self.forced = false;
            self.marks.push_back(Mark {
                index: first,
                number: segment.header.number,
                offset,
            });
        }
    }

    /// Entries from `index` on are gone.
    pub(super) fn truncate(&mut self, index: u64) {
        while self.marks.back().is_some_and(|mark| mark.index >= index) {
            self.marks.pop_back();
        }
        self.next = self.next.min(index);
        self.forced = true;
    }

    /// Entries up to `index` are gone; returns the files that hold nothing else any more.
    pub(super) fn purge(&mut self, index: u64) -> Vec<PathBuf> {
        if index >= self.next {
            self.truncate(0);
            self.next = index + 1;
        }
        // The mark before the first one above may cover entries above.
        while self
            .marks
            .get(1)
            .is_some_and(|mark| mark.index <= index + 1)
        {
            self.marks.pop_front();
        }
        let mut paths = Vec::new();
        while self.segments.len() > 1
            && let Some(first) = self.segments.front()
            && first.last_index.is_none_or(|last| last <= index)
        {
            let number = first.header.number;
            paths.push(first.path.clone());
            self.segments.pop_front();
            while self.marks.front().is_some_and(|mark| mark.number == number) {
                self.marks.pop_front();
            }
        }
        paths
    }

    /// The index after the last durable entry.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// The lowest index that is there.
    pub(super) fn first(&self) -> Option<u64> {
        self.marks.front().map(|mark| mark.index)
    }

    /// The pieces that hold the entries from `first` up to before `next`.
    pub(super) fn pieces(&self, first: u64, next: u64) -> Vec<Piece> {
        let from = self.marks.partition_point(|mark| mark.index <= first);
        let mut pieces: Vec<Piece> = Vec::new();
        for at in from.saturating_sub(1)..self.marks.len() {
            let mark = self.marks[at];
            if mark.index >= next {
                break;
            }
            let after = self.marks.get(at + 1);
            let Some(segment) = self
                .segments
                .iter()
                .find(|segment| segment.header.number == mark.number)
            else {
                continue;
            };
            // A truncation may lie between, so the end of the file is the only safe bound unless
            // the next mark is in the same file.
            let end = after
                .filter(|after| after.number == mark.number)
                .map_or(segment.end, |after| after.offset);
            pieces.push(Piece {
                header: segment.header,
                path: segment.path.clone(),
                offset: mark.offset,
                end,
                first: first.max(mark.index),
                next: after.map_or(next, |after| next.min(after.index)),
            });
        }
        pieces
    }
}

/// Reads entries. Waits for the disk.
pub(super) fn read(pieces: &[Piece]) -> Result<Vec<Entry>, StoreError> {
    let mut entries = Vec::new();
    let mut open: Option<(u64, File)> = None;
    for piece in pieces {
        let number = piece.header.number;
        let file = match open.take() {
            Some((opened, file)) if opened == number => file,
            _ => File::open(&piece.path).map_err(StoreError::io("open", &piece.path))?,
        };
        read_piece(piece, &file, &mut entries)?;
        open = Some((number, file));
    }
    Ok(entries)
}

fn read_piece(piece: &Piece, file: &File, entries: &mut Vec<Entry>) -> Result<(), StoreError> {
    // A frame may begin right before the next mark and reach over it only if both are in it.
    let length = piece.end.saturating_sub(piece.offset) as usize;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, piece.offset)
        .map_err(StoreError::io("read", &piece.path))?;
    let key = piece.header.key();
    let mut at = 0;
    let mut wanted = piece.first;
    while wanted < piece.next {
        let damaged = |problem: &str| {
            let offset = piece.offset + at as u64;
            StoreError::damaged(&piece.path, offset, problem)
        };
        let Step::Frame(frame) = segment::step(&bytes, at, key) else {
            return Err(damaged("what was written there can't be read any more"));
        };
        let records = frame.records().ok_or_else(|| damaged("its records"))?;
        for record in records {
            match codec::record(record) {
                Ok(Record::Entry(entry)) if entry.log_id.index == wanted && wanted < piece.next => {
                    entries.push(entry);
                    wanted += 1;
                }
                Ok(_) => {}
                Err(error) => return Err(error.at(&piece.path, piece.offset + at as u64)),
            }
        }
        at = frame.end;
    }
    Ok(())
}

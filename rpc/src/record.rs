//! TCP record marking: bytes in, whole bounded messages out.
//!
//! [`RecordReader`] owns the receive buffer of one connection. The caller asks where to put the
//! next bytes ([`RecordReader::space`]), reads into it, and then takes every whole record
//! ([`RecordReader::next_record`]). It reads no socket and knows no clock.
//!
//! Invariants: a record is refused as soon as its announced length passes the maximum, before
//! anything is reserved for it; small records are lent out of one buffer without a copy; a large
//! record (a WRITE) is received straight into a buffer of its own, which is then given away, so
//! that its payload is never moved again.
//!
//! Source: RFC 5531 11.

use std::ops::Deref;

/// The length of a record mark.
pub const MARK_BYTES: usize = 4;
/// The bit that marks the last fragment.
const LAST_FRAGMENT: u32 = 1 << 31;
/// Capacity of the buffer that small records share.
const SHARED_BYTES: usize = 64 * 1024;
/// A fragment longer than this gets a buffer of its own.
const OWN_BUFFER_FROM_BYTES: usize = 32 * 1024;

/// A record's announced length is above the maximum of this port; the connection must be closed,
/// because where the next record begins can't be told without reading this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordTooLong;

/// One whole message.
#[derive(Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// Lent from the shared buffer until the next call of the reader.
    Lent(&'a [u8]),
    /// In a buffer of its own.
    Owned(Vec<u8>),
}

impl Record<'_> {
    /// The message in a buffer of its own; copies it if it was lent.
    pub fn into_owned(self) -> Vec<u8> {
        match self {
            Self::Lent(bytes) => bytes.to_vec(),
            Self::Owned(bytes) => bytes,
        }
    }
}

impl Deref for Record<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Lent(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }
}

/// A fragment that is being received into its own buffer.
#[derive(Debug)]
struct OwnFragment {
    bytes: Vec<u8>,
    len: usize,
    last: bool,
}

/// Where a whole record was found.
enum Found {
    /// In the shared buffer, at this place.
    Shared(std::ops::Range<usize>),
    Owned(Vec<u8>),
}

/// Cuts the byte stream of one connection into records.
#[derive(Debug)]
pub struct RecordReader {
    record_bytes_max: usize,
    /// Received bytes; those before `start` are consumed.
    shared: Vec<u8>,
    start: usize,
    /// Earlier fragments of the record that is under way.
    fragments: Vec<u8>,
    own: Option<OwnFragment>,
}

impl RecordReader {
    /// Makes a reader that refuses records above `record_bytes_max` bytes.
    pub const fn new(record_bytes_max: usize) -> Self {
        Self {
            record_bytes_max,
            shared: Vec::new(),
            start: 0,
            fragments: Vec::new(),
            own: None,
        }
    }

    /// The buffer to append received bytes to, and how many at most. The count is never 0.
    ///
    /// [`RecordReader::next_record`] must have returned `None` before.
    pub fn space(&mut self) -> (&mut Vec<u8>, usize) {
        if self.own.is_none() {
            self.compact();
            let missing = SHARED_BYTES.saturating_sub(self.shared.len());
            self.shared.reserve_exact(missing);
        }
        if let Some(own) = &mut self.own {
            let missing = own.len.saturating_sub(own.bytes.len()).max(1);
            return (&mut own.bytes, missing);
        }
        // What is left of a fragment here is at most half of the buffer: there is room.
        let free = SHARED_BYTES.saturating_sub(self.shared.len()).max(1);
        (&mut self.shared, free)
    }

    /// Gives the buffer back if nothing is held in it; it is made anew when bytes come.
    pub fn release(&mut self) {
        if self.held_bytes() == 0 {
            self.shared = Vec::new();
            self.start = 0;
        }
    }

    fn compact(&mut self) {
        if self.start > 0 {
            self.shared.drain(..self.start);
            self.start = 0;
        }
    }

    /// Bytes that are held for a record that has not arrived whole.
    pub fn held_bytes(&self) -> usize {
        let own = self.own.as_ref().map_or(0, |own| own.bytes.len());
        self.shared.len() - self.start + self.fragments.len() + own
    }

    /// Takes the next whole record, or `None` if more bytes are needed.
    pub fn next_record(&mut self) -> Result<Option<Record<'_>>, RecordTooLong> {
        Ok(match self.advance()? {
            None => None,
            Some(Found::Shared(place)) => {
                Some(Record::Lent(self.shared.get(place).unwrap_or_default()))
            }
            Some(Found::Owned(bytes)) => Some(Record::Owned(bytes)),
        })
    }

    /// Consumes fragments until a record is whole or bytes are missing. Each turn consumes at
    /// least a mark or ends the loop, so it ends.
    fn advance(&mut self) -> Result<Option<Found>, RecordTooLong> {
        loop {
            if let Some(own) = &self.own {
                if own.bytes.len() < own.len {
                    return Ok(None);
                }
                if let Some(record) = self.finish_own() {
                    return Ok(Some(Found::Owned(record)));
                }
                continue;
            }
            let received = self.shared.get(self.start..).unwrap_or_default();
            let Some((mark, body)) = received.split_first_chunk::<MARK_BYTES>() else {
                return Ok(None);
            };
            let mark = u32::from_be_bytes(*mark);
            let last = mark & LAST_FRAGMENT != 0;
            let len = (mark & !LAST_FRAGMENT) as usize;
            if len > self.record_bytes_max.saturating_sub(self.fragments.len()) {
                return Err(RecordTooLong);
            }
            let Some(body) = body.get(..len) else {
                if len > OWN_BUFFER_FROM_BYTES {
                    let mut bytes = Vec::with_capacity(len);
                    bytes.extend_from_slice(body);
                    self.own = Some(OwnFragment { bytes, len, last });
                    // A connection holds one large buffer at a time.
                    self.shared = Vec::new();
                    self.start = 0;
                }
                return Ok(None);
            };
            let place = self.start + MARK_BYTES..self.start + MARK_BYTES + len;
            self.start = place.end;
            if last && self.fragments.is_empty() {
                return Ok(Some(Found::Shared(place)));
            }
            self.fragments.extend_from_slice(body);
            if last {
                return Ok(Some(Found::Owned(std::mem::take(&mut self.fragments))));
            }
        }
    }

    /// Takes the complete own fragment; returns the record if it was the last one.
    fn finish_own(&mut self) -> Option<Vec<u8>> {
        let own = self.own.take()?;
        if self.fragments.is_empty() {
            self.fragments = own.bytes;
        } else {
            self.fragments.extend_from_slice(&own.bytes);
        }
        own.last.then(|| std::mem::take(&mut self.fragments))
    }
}

/// Reserves the place of a record mark at the end of `out`; [`end_record`] fills it in.
pub fn begin_record(out: &mut Vec<u8>) -> usize {
    let start = out.len();
    out.extend_from_slice(&[0; MARK_BYTES]);
    start
}

/// Writes the mark of the single-fragment record that [`begin_record`] began at `start`.
///
/// Replies are bounded far below 2^31 bytes by the limits of the programs.
pub fn end_record(out: &mut [u8], start: usize) {
    let len = out.len().saturating_sub(start + MARK_BYTES) as u32;
    if let Some(mark) = out.get_mut(start..start + MARK_BYTES) {
        mark.copy_from_slice(&(LAST_FRAGMENT | len).to_be_bytes());
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Feeds `stream` in pieces and returns the records.
    fn feed(reader: &mut RecordReader, stream: &[u8], pieces: &[usize]) -> Vec<Vec<u8>> {
        let (mut records, mut at, mut turn) = (Vec::new(), 0, 0);
        while at < stream.len() {
            let (buffer, free) = reader.space();
            let piece = pieces[turn % pieces.len()]
                .clamp(1, free)
                .min(stream.len() - at);
            buffer.extend_from_slice(&stream[at..at + piece]);
            at += piece;
            turn += 1;
            while let Some(record) = reader.next_record().unwrap() {
                records.push(record.into_owned());
            }
        }
        records
    }

    fn fragment(last: bool, body: &[u8]) -> Vec<u8> {
        let mark = u32::try_from(body.len()).unwrap() | if last { LAST_FRAGMENT } else { 0 };
        [&mark.to_be_bytes()[..], body].concat()
    }

    #[test]
    fn a_length_above_the_maximum_takes_no_memory() {
        let mut reader = RecordReader::new(1000);
        reader.space().0.extend_from_slice(&[0xff; 4]);
        assert_eq!(reader.next_record(), Err(RecordTooLong));
        assert_eq!(reader.fragments.capacity(), 0);
        assert!(reader.own.is_none());
    }

    #[test]
    fn fragments_add_up_to_the_maximum_and_no_further() {
        let mut reader = RecordReader::new(10);
        let stream = [fragment(false, &[1; 6]), fragment(true, &[2; 4])].concat();
        assert_eq!(
            feed(&mut reader, &stream, &[3]),
            [[[1; 6].as_slice(), &[2; 4]].concat()]
        );
        reader
            .space()
            .0
            .extend_from_slice(&fragment(false, &[1; 6]));
        reader.space().0.extend_from_slice(&fragment(true, &[2; 5]));
        assert_eq!(reader.next_record(), Err(RecordTooLong));
    }

    #[test]
    fn empty_fragments_are_passed_over() {
        let mut reader = RecordReader::new(10);
        let stream = [
            fragment(false, &[]),
            fragment(false, &[]),
            fragment(true, b"ab"),
        ]
        .concat();
        assert_eq!(feed(&mut reader, &stream, &[64]), [b"ab".to_vec()]);
        assert_eq!(reader.held_bytes(), 0);
    }

    proptest! {
        #[test]
        fn records_survive_any_cut(
            sizes in prop::collection::vec((0usize..100_000, 1usize..4), 1..6),
            pieces in prop::collection::vec(1usize..70_000, 1..5),
        ) {
            let (mut stream, mut expected) = (Vec::new(), Vec::new());
            for (i, (size, parts)) in sizes.iter().enumerate() {
                let body: Vec<u8> = (0..*size).map(|b| (b + i) as u8).collect();
                let step = (size / parts).max(1);
                let mut chunks = body.chunks(step).peekable();
                if chunks.peek().is_none() {
                    stream.extend(fragment(true, &[]));
                }
                while let Some(chunk) = chunks.next() {
                    stream.extend(fragment(chunks.peek().is_none(), chunk));
                }
                expected.push(body);
            }
            let mut reader = RecordReader::new(200_000);
            prop_assert_eq!(feed(&mut reader, &stream, &pieces), expected);
            prop_assert_eq!(reader.held_bytes(), 0);
        }
    }
}

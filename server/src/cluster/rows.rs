//! How the replicated state is written: rows, each with its length in front, and a length of zero
//! where a list of them ends. All in one encoding, whose version `state` writes first.

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};

/// Above the longest row: a host with all that is remembered of it.
const ROW_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Writes one row; `buffer` is kept between rows.
pub(super) fn write_row(
    out: &mut impl Write,
    buffer: &mut Vec<u8>,
    row: &impl Serialize,
) -> io::Result<()> {
    buffer.clear();
    let bytes = postcard::to_extend(row, std::mem::take(buffer)).map_err(io::Error::other)?;
    *buffer = bytes;
    let len = u32::try_from(buffer.len()).map_err(io::Error::other)?;
    out.write_all(&len.to_le_bytes())?;
    out.write_all(buffer)
}

/// Ends a list of rows.
pub(super) fn write_end(out: &mut impl Write) -> io::Result<()> {
    out.write_all(&0u32.to_le_bytes())
}

/// Reads one row; none if the end of a list was written here.
pub(super) fn read_row<T: DeserializeOwned>(
    input: &mut impl Read,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<T>> {
    let mut len = [0; 4];
    input.read_exact(&mut len)?;
    let len = u32::from_le_bytes(len) as usize;
    if len == 0 {
        return Ok(None);
    }
    if len > ROW_BYTES_MAX {
        return Err(damaged());
    }
    buffer.resize(len, 0);
    input.read_exact(buffer)?;
    match postcard::take_from_bytes(buffer) {
        Ok((row, [])) => Ok(Some(row)),
        _ => Err(damaged()),
    }
}

/// A row is not what was written.
pub(super) fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a row is damaged")
}

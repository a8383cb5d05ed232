//! XDR: a borrowing [`Reader`] over received bytes and a [`Writer`] that appends to a buffer.
//!
//! Every variable-length read takes its maximum, so that no length field decides how much memory
//! or time a peer costs. Decoded opaques and strings borrow from the message.
//!
//! Residual bytes (RFC 4506 3: "zero") are written as zero and accepted as anything: real clients
//! send garbage there, and the bytes carry no meaning.
//!
//! Source: RFC 4506.

/// Why bytes are not the value that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XdrError {
    /// The message ends before the value does.
    Short,
    /// A length field is above the maximum of this field.
    TooLong,
    /// A bool or enum has a value that the protocol does not define.
    BadValue,
    /// Bytes are left over after the last field.
    Leftover,
}

impl std::fmt::Display for XdrError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Short => "message ends inside a value",
            Self::TooLong => "length above the maximum of the field",
            Self::BadValue => "undefined bool or enum value",
            Self::Leftover => "bytes left over after the last field",
        })
    }
}

impl std::error::Error for XdrError {}

/// A value that can be read from XDR; `'a` is the life of the message it borrows from.
pub trait Decode<'a>: Sized {
    /// Reads one value and moves the reader behind it.
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError>;
}

/// A value that can be written as XDR.
pub trait Encode {
    /// Appends the value.
    fn encode(&self, writer: &mut Writer<'_>);
}

/// Reads XDR values from the front of a byte slice.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the first byte of `bytes`.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The bytes not read yet.
    pub const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Reads an unsigned integer.
    pub fn u32(&mut self) -> Result<u32, XdrError> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(XdrError::Short)?;
        self.rest = rest;
        Ok(u32::from_be_bytes(*head))
    }

    /// Reads an integer.
    pub fn i32(&mut self) -> Result<i32, XdrError> {
        self.u32().map(u32::cast_signed)
    }

    /// Reads an unsigned hyper.
    pub fn u64(&mut self) -> Result<u64, XdrError> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(XdrError::Short)?;
        self.rest = rest;
        Ok(u64::from_be_bytes(*head))
    }

    /// Reads a bool; anything but 0 and 1 is [`XdrError::BadValue`].
    pub fn bool(&mut self) -> Result<bool, XdrError> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(XdrError::BadValue),
        }
    }

    /// Reads fixed-length opaque data whose length is a multiple of four.
    pub fn fixed<const N: usize>(&mut self) -> Result<[u8; N], XdrError> {
        const { assert!(N.is_multiple_of(4), "padding is not handled here") };
        let (head, rest) = self.rest.split_first_chunk().ok_or(XdrError::Short)?;
        self.rest = rest;
        Ok(*head)
    }

    /// Reads variable-length opaque data of at most `max` bytes.
    pub fn opaque(&mut self, max: usize) -> Result<&'a [u8], XdrError> {
        let len = usize::try_from(self.u32()?).map_err(|_| XdrError::TooLong)?;
        if len > max {
            return Err(XdrError::TooLong);
        }
        let padded = len.checked_next_multiple_of(4).ok_or(XdrError::TooLong)?;
        let (value, rest) = self.rest.split_at_checked(padded).ok_or(XdrError::Short)?;
        self.rest = rest;
        value.get(..len).ok_or(XdrError::Short)
    }

    /// Reads an optional value (RFC 4506 4.19).
    pub fn optional<T: Decode<'a>>(&mut self) -> Result<Option<T>, XdrError> {
        Ok(if self.bool()? {
            Some(T::decode(self)?)
        } else {
            None
        })
    }

    /// Reads a value of type `T`.
    pub fn value<T: Decode<'a>>(&mut self) -> Result<T, XdrError> {
        T::decode(self)
    }

    /// Succeeds when everything was read.
    pub fn finish(self) -> Result<(), XdrError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(XdrError::Leftover)
        }
    }
}

/// Decodes a whole message: a value and nothing after it.
pub fn decode_all<'a, T: Decode<'a>>(bytes: &'a [u8]) -> Result<T, XdrError> {
    let mut reader = Reader::new(bytes);
    let value = T::decode(&mut reader)?;
    reader.finish()?;
    Ok(value)
}

impl Decode<'_> for () {
    fn decode(_: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(())
    }
}

/// Appends XDR values to a buffer.
#[derive(Debug)]
pub struct Writer<'b> {
    out: &'b mut Vec<u8>,
}

impl<'b> Writer<'b> {
    /// Appends to `out`; what is already there stays.
    pub const fn new(out: &'b mut Vec<u8>) -> Self {
        Self { out }
    }

    /// The length of the buffer, for [`Writer::truncate`], [`Writer::patch`] and limits.
    pub fn position(&self) -> usize {
        self.out.len()
    }

    /// Drops everything behind `position`.
    pub fn truncate(&mut self, position: usize) {
        self.out.truncate(position);
    }

    /// The buffer itself, for data that is read straight into it.
    pub const fn buffer(&mut self) -> &mut Vec<u8> {
        self.out
    }

    /// Appends an unsigned integer.
    pub fn u32(&mut self, value: u32) {
        self.out.extend_from_slice(&value.to_be_bytes());
    }

    /// Appends an integer.
    pub fn i32(&mut self, value: i32) {
        self.u32(value.cast_unsigned());
    }

    /// Appends an unsigned hyper.
    pub fn u64(&mut self, value: u64) {
        self.out.extend_from_slice(&value.to_be_bytes());
    }

    /// Appends a bool.
    pub fn bool(&mut self, value: bool) {
        self.u32(u32::from(value));
    }

    /// Appends fixed-length opaque data and its padding.
    pub fn fixed(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
        self.pad(bytes.len());
    }

    /// Appends variable-length opaque data: length, bytes, padding.
    ///
    /// Lengths come from our own limits, all far below 4 GiB; a longer slice would be cut.
    pub fn opaque(&mut self, bytes: &[u8]) {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.u32(len);
        self.fixed(bytes);
    }

    /// Appends the zero bytes that follow opaque data of `len` bytes.
    pub fn pad(&mut self, len: usize) {
        let padding = len.next_multiple_of(4) - len;
        self.out.extend_from_slice(&[0; 3][..padding]);
    }

    /// Appends an optional value.
    pub fn optional<T: Encode>(&mut self, value: Option<&T>) {
        self.bool(value.is_some());
        if let Some(value) = value {
            value.encode(self);
        }
    }

    /// Appends a value.
    pub fn value<T: Encode>(&mut self, value: &T) {
        value.encode(self);
    }

    /// Overwrites what an earlier call has appended at `position`, with as many bytes.
    pub fn patch(&mut self, position: usize, bytes: &[u8]) {
        if let Some(place) = self
            .out
            .get_mut(position..position.saturating_add(bytes.len()))
        {
            place.copy_from_slice(bytes);
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn opaque_checks_its_maximum_before_the_bytes() {
        let bytes = [0, 0, 0, 9, 1, 2, 3];
        assert_eq!(Reader::new(&bytes).opaque(8), Err(XdrError::TooLong));
        assert_eq!(Reader::new(&bytes).opaque(9), Err(XdrError::Short));
        let huge = [0xff; 4];
        assert_eq!(Reader::new(&huge).opaque(usize::MAX), Err(XdrError::Short));
    }

    #[test]
    fn bool_two_is_refused() {
        assert_eq!(Reader::new(&[0, 0, 0, 2]).bool(), Err(XdrError::BadValue));
    }

    #[test]
    fn padding_may_hold_anything_but_must_be_there() {
        assert_eq!(
            Reader::new(&[0, 0, 0, 1, b'x', 9, 9, 9]).opaque(4),
            Ok(&b"x"[..])
        );
        assert_eq!(
            Reader::new(&[0, 0, 0, 1, b'x', 9, 9]).opaque(4),
            Err(XdrError::Short)
        );
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(a: u32, b: u64, c: bool, d in prop::collection::vec(any::<u8>(), 0..70)) {
            let mut out = Vec::new();
            let mut writer = Writer::new(&mut out);
            writer.u32(a);
            writer.u64(b);
            writer.bool(c);
            writer.opaque(&d);
            prop_assert!(out.len().is_multiple_of(4));
            let mut reader = Reader::new(&out);
            prop_assert_eq!(reader.u32().unwrap(), a);
            prop_assert_eq!(reader.u64().unwrap(), b);
            prop_assert_eq!(reader.bool().unwrap(), c);
            prop_assert_eq!(reader.opaque(70).unwrap(), &d[..]);
            prop_assert!(reader.finish().is_ok());
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), max in 0usize..80) {
            let mut reader = Reader::new(&bytes);
            while reader.opaque(max).is_ok() && !reader.rest().is_empty() {}
        }
    }
}

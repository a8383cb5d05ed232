//! The bytes that every file of the data set holds, so that each READ can be checked.
//!
//! A file's content is a window of one periodic block of noise: the byte at `offset` of the file
//! with number `file` is `noise[(shift(file) + offset) % PERIOD]`. Any payload of up to a mebibyte
//! is therefore one slice that exists already: nothing is generated or copied while measuring.
//!
//! Invariants: the period is no multiple of any block size that is used, so a server that answers
//! with another block or another file's block is noticed.

/// The longest payload of one call.
pub(crate) const PAYLOAD_BYTES_MAX: usize = 1 << 20;
/// One page more than the longest payload, so that equal offsets in a payload differ.
const PERIOD: usize = PAYLOAD_BYTES_MAX + 4096;
/// Distance of the words that [`Pattern::holds`] compares.
const STRIDE: usize = 512;

/// The noise, twice in a row.
#[derive(Debug)]
pub(crate) struct Pattern {
    noise: Vec<u8>,
}

impl Pattern {
    pub(crate) fn new() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut noise = Vec::with_capacity(2 * PERIOD);
        while noise.len() < PERIOD {
            // xorshift64: enough to make every word its own.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            noise.extend_from_slice(&state.to_le_bytes());
        }
        noise.extend_from_within(..);
        Self { noise }
    }

    /// What `len` bytes at `offset` of file number `file` must be.
    pub(crate) fn expected(&self, file: usize, offset: u64, len: usize) -> &[u8] {
        let shift = (file as u64).wrapping_mul(8 * 4096);
        let start = ((shift + offset) % PERIOD as u64) as usize;
        self.noise
            .get(start..start + len.min(PAYLOAD_BYTES_MAX))
            .unwrap_or_default()
    }

    /// Compares one word in every 512 bytes, or with `whole` every byte.
    pub(crate) fn holds(&self, file: usize, offset: u64, data: &[u8], whole: bool) -> bool {
        let expected = self.expected(file, offset, data.len());
        if whole || !data.len().is_multiple_of(STRIDE) {
            return expected == data;
        }
        expected.len() == data.len()
            && expected
                .chunks_exact(STRIDE)
                .zip(data.chunks_exact(STRIDE))
                .all(|(expected, data)| expected.first_chunk::<8>() == data.first_chunk::<8>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_block_or_file_is_noticed() {
        let pattern = Pattern::new();
        let data = pattern.expected(3, 8192, 4096).to_vec();
        assert!(pattern.holds(3, 8192, &data, false));
        assert!(!pattern.holds(3, 4096, &data, false));
        assert!(!pattern.holds(4, 8192, &data, false));
    }

    #[test]
    fn a_single_wrong_byte_is_noticed_when_all_are_compared() {
        let pattern = Pattern::new();
        let mut data = pattern.expected(0, 0, 4096).to_vec();
        if let Some(byte) = data.get_mut(100) {
            *byte ^= 1;
        }
        assert!(!pattern.holds(0, 0, &data, true));
        assert!(
            !pattern.holds(0, 0, data.get(..100).unwrap_or_default(), false) || data.len() == 4096
        );
    }
}

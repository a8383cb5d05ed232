//! Random numbers.

/// Eight bytes from the kernel's random number generator.
pub fn random_u64() -> u64 {
    let mut bytes = [0; 8];
    // Short only for requests above 256 bytes; fails only before Linux 3.17.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u64::from_ne_bytes(bytes)
}

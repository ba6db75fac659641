//! One hash for everything that is told apart or looked up by its contents.

use std::{hash::Hasher, io};

/// A hash that is the same for the same bytes on every machine, in every build and in every version of this program:
/// BLAKE3, shortened. Rust's own hashers promise none of that.
///
/// What is kept in a file is named by bytes that are written to it ([`io::Write`]), with [`StableHash::hex`] or
/// [`Hasher::finish`]. As a [`Hasher`] it takes whole numbers as 64 bits, little end first; which numbers a value of the
/// standard library feeds to a hasher may change with the compiler, so such hashes are for one run.
#[derive(Clone, Default)]
pub struct StableHash(blake3::Hasher);

impl StableHash {
    /// The hash of nothing so far.
    pub fn new() -> StableHash {
        StableHash::default()
    }

    /// The hash of these bytes.
    pub fn of(bytes: &[u8]) -> StableHash {
        let mut hash = StableHash::new();
        hash.0.update(bytes);
        hash
    }

    /// 32 hexadecimal digits, enough to name a file with.
    pub fn hex(&self) -> String {
        self.0.finalize().to_hex()[..32].to_owned()
    }
}

impl io::Write for StableHash {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Hasher for StableHash {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        let bytes = self.0.finalize();
        u64::from_le_bytes(std::array::from_fn(|at| bytes.as_bytes()[at]))
    }

    fn write_u8(&mut self, number: u8) {
        self.write_u64(number.into());
    }

    fn write_u16(&mut self, number: u16) {
        self.write_u64(number.into());
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(number.into());
    }

    fn write_u64(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    fn write_usize(&mut self, number: usize) {
        self.write_u64(number as u64);
    }

    fn write_i8(&mut self, number: i8) {
        self.write_i64(number.into());
    }

    fn write_i16(&mut self, number: i16) {
        self.write_i64(number.into());
    }

    fn write_i32(&mut self, number: i32) {
        self.write_i64(number.into());
    }

    fn write_i64(&mut self, number: i64) {
        self.0.update(&number.to_le_bytes());
    }

    fn write_isize(&mut self, number: isize) {
        self.write_i64(number as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files that were written by earlier versions are found by these.
    #[test]
    fn hashes_never_change() {
        let hash = StableHash::of(b"abc");
        assert_eq!(hash.hex(), "6437b3ac38465133ffb63b75273a8db5");
        assert_eq!(hash.finish(), 0x3351_4638_acb3_3764);
        let mut parts = StableHash::new();
        io::Write::write_all(&mut parts, b"ab").unwrap();
        io::Write::write_all(&mut parts, b"c").unwrap();
        assert_eq!(parts.hex(), hash.hex());
    }

    #[test]
    fn numbers_are_the_same_whatever_their_width() {
        let of = |feed: &dyn Fn(&mut StableHash)| {
            let mut hash = StableHash::new();
            feed(&mut hash);
            hash.finish()
        };
        let bytes = StableHash::of(&7u64.to_le_bytes()).finish();
        assert_eq!([of(&|h| h.write_u8(7)), of(&|h| h.write_usize(7)), of(&|h| h.write_i32(7))], [bytes; 3]);
        assert_eq!(of(&|h| h.write_i8(-7)), of(&|h| h.write_isize(-7)));
    }
}

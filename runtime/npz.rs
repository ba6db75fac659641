//! Writing NumPy archives: a zip of arrays, nothing compressed.

use std::{
    fs::File,
    io::{self, BufWriter, Seek, Write},
    path::Path,
};

/// Sizes and offsets of a zip without extensions end here.
const LARGEST: u64 = u32::MAX as u64;

/// An archive being written. It is complete after [`NpzWriter::finish`].
pub struct NpzWriter {
    out: BufWriter<File>,
    directory: Vec<u8>,
    entries: u16,
}

impl NpzWriter {
    /// Creates the file.
    pub fn create(path: &Path) -> io::Result<NpzWriter> {
        let out = BufWriter::with_capacity(1 << 20, File::create(path)?);
        Ok(NpzWriter { out, directory: Vec::new(), entries: 0 })
    }

    /// Adds a float64 array. Fails where `data` is not as long as `dims` say, and beyond 4 GiB or 65,535 arrays.
    pub fn add(&mut self, name: &str, dims: &[usize], data: &[f64]) -> io::Result<()> {
        let wrong = |message: &str| io::Error::new(io::ErrorKind::InvalidInput, message.to_owned());
        if lathe_ir::element_count(dims) != Some(data.len()) {
            return Err(wrong("the shape does not fit the data"));
        }
        let sizes: Vec<String> = dims.iter().map(|d| format!("{d},")).collect();
        let mut header = format!("{{'descr': '<f8', 'fortran_order': False, 'shape': ({}), }}", sizes.join(" "));
        // The data starts at a multiple of 64, and the header ends with a newline.
        let padded = (10 + header.len() + 1).next_multiple_of(64) - 10;
        header.extend(std::iter::repeat_n(' ', padded - header.len() - 1));
        header.push('\n');
        let length = u16::try_from(header.len()).map_err(|_| wrong("too many axes"))?;
        let mut start = b"\x93NUMPY\x01\x00".to_vec();
        start.extend(length.to_le_bytes());
        start.extend(header.as_bytes());
        let mut crc = Crc::default();
        crc.update(&start);
        data.iter().for_each(|v| crc.update(&v.to_le_bytes()));
        let offset = self.out.stream_position()?;
        let size = start.len() as u64 + 8 * data.len() as u64;
        if offset + size > LARGEST {
            return Err(wrong("an archive of more than 4 GiB is not supported; ask for fewer tensors"));
        }
        let file_name = format!("{name}.npy");
        let name_length = u16::try_from(file_name.len()).map_err(|_| wrong("a name is too long"))?;
        // Version, flags (the name is UTF-8), no compression, no time (the first of January 1980), checksum, sizes.
        let mut fields = Vec::new();
        for number in [20u16, 1 << 11, 0, 0, 33] {
            fields.extend(number.to_le_bytes());
        }
        for number in [crc.value(), size as u32, size as u32] {
            fields.extend(number.to_le_bytes());
        }
        fields.extend(name_length.to_le_bytes());
        fields.extend(0u16.to_le_bytes());
        self.out.write_all(b"PK\x03\x04")?;
        self.out.write_all(&fields)?;
        self.out.write_all(file_name.as_bytes())?;
        self.out.write_all(&start)?;
        for value in data {
            self.out.write_all(&value.to_le_bytes())?;
        }
        self.directory.extend(b"PK\x01\x02\x14\x00");
        self.directory.extend(&fields);
        self.directory.extend([0; 10]);
        self.directory.extend((offset as u32).to_le_bytes());
        self.directory.extend(file_name.as_bytes());
        self.entries = self.entries.checked_add(1).ok_or_else(|| wrong("too many arrays"))?;
        Ok(())
    }

    /// Writes the directory of the archive.
    pub fn finish(mut self) -> io::Result<()> {
        let offset = self.out.stream_position()?;
        self.out.write_all(&self.directory)?;
        self.out.write_all(b"PK\x05\x06\0\0\0\0")?;
        self.out.write_all(&self.entries.to_le_bytes())?;
        self.out.write_all(&self.entries.to_le_bytes())?;
        self.out.write_all(&(self.directory.len() as u32).to_le_bytes())?;
        self.out.write_all(&(offset as u32).to_le_bytes())?;
        self.out.write_all(&[0, 0])?;
        self.out.flush()
    }
}

/// The checksum of zip files.
struct Crc {
    table: [u32; 256],
    state: u32,
}

impl Default for Crc {
    fn default() -> Crc {
        let entry = |index: usize| {
            (0..8).fold(index as u32, |value, _| if value & 1 == 1 { value >> 1 ^ 0xedb8_8320 } else { value >> 1 })
        };
        Crc { table: std::array::from_fn(entry), state: u32::MAX }
    }
}

impl Crc {
    fn update(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.state = self.table[(self.state as u8 ^ byte) as usize] ^ self.state >> 8;
        }
    }

    fn value(&self) -> u32 {
        !self.state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_zip() {
        let mut crc = Crc::default();
        crc.update(b"123456789");
        assert_eq!(crc.value(), 0xcbf4_3926);
    }

    #[test]
    fn shapes_must_fit() {
        let folder = tempfile::tempdir().unwrap();
        let mut npz = NpzWriter::create(&folder.path().join("a.npz")).unwrap();
        assert!(npz.add("a", &[2, 2], &[1.0]).is_err());
        npz.add("a", &[], &[1.0]).unwrap();
        npz.finish().unwrap();
    }
}

//! Writing NumPy archives: a zip of arrays, nothing compressed.

use lathe_ir::{DataType, Tensor};
use std::{
    fs::File,
    io::{self, BufWriter, Seek, Write},
    path::Path,
};
use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

/// Arrays above this many bytes need the fields of large archives.
const LARGE: usize = 1 << 31;

/// An archive being written. It is complete after [`NpzWriter::finish`].
pub struct NpzWriter<W: Write + Seek = BufWriter<File>> {
    zip: ZipWriter<W>,
}

impl NpzWriter {
    /// Creates the file.
    pub fn create(path: &Path) -> io::Result<NpzWriter> {
        Ok(NpzWriter::new(BufWriter::with_capacity(1 << 20, File::create(path)?)))
    }
}

impl<W: Write + Seek> NpzWriter<W> {
    /// An archive that is written to `out`.
    pub fn new(out: W) -> NpzWriter<W> {
        NpzWriter { zip: ZipWriter::new(out) }
    }

    /// Adds an array. Fails for types that NumPy does not have.
    pub fn add(&mut self, name: &str, tensor: &Tensor) -> io::Result<()> {
        let text = tensor.string_data().map(padded);
        let (text_kind, data) = match &text {
            Some((width, bytes)) => (format!("|S{width}"), bytes.as_slice()),
            None => (String::new(), tensor.bytes()),
        };
        let kind = match tensor.dtype() {
            DataType::Float => "<f4",
            DataType::Double => "<f8",
            DataType::Float16 => "<f2",
            DataType::Int64 => "<i8",
            DataType::Int32 => "<i4",
            DataType::Int16 => "<i2",
            DataType::Int8 => "|i1",
            DataType::Uint64 => "<u8",
            DataType::Uint32 => "<u4",
            DataType::Uint16 => "<u2",
            DataType::Uint8 => "|u1",
            DataType::Bool => "|b1",
            DataType::Bfloat16 => "|V2",
            DataType::String => &text_kind,
            other => {
                let message = format!("NumPy has no elements of type {other}");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
        };
        let sizes: Vec<String> = tensor.dims().iter().map(|d| format!("{d},")).collect();
        let mut header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': ({}), }}", sizes.join(" "));
        // The data starts at a multiple of 64, and the header ends with a newline.
        let length = (10 + header.len() + 1).next_multiple_of(64) - 10;
        header.extend(std::iter::repeat_n(' ', length - header.len() - 1));
        header.push('\n');
        let length = u16::try_from(header.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let options =
            SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(data.len() >= LARGE);
        self.zip.start_file(format!("{name}.npy"), options)?;
        self.zip.write_all(b"\x93NUMPY\x01\x00")?;
        self.zip.write_all(&length.to_le_bytes())?;
        self.zip.write_all(header.as_bytes())?;
        self.zip.write_all(data)
    }

    /// Writes the directory of the archive.
    pub fn finish(self) -> io::Result<()> {
        self.zip.finish()?.flush()
    }
}

/// Strings one after another, filled up with zeros to the length of the longest.
fn padded(strings: &[bytes::Bytes]) -> (usize, Vec<u8>) {
    let width = strings.iter().map(|s| s.len()).max().unwrap_or(0).max(1);
    let all = strings.iter().flat_map(|s| s.iter().copied().chain(std::iter::repeat_n(0, width - s.len())));
    (width, all.collect())
}

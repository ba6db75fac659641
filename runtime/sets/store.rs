//! Where the bytes of an array lie, and reading them once from front to back.

use super::{
    error::SetError,
    npy::{Header, HeaderError},
};
use flate2::{Crc, read::DeflateDecoder};
use std::{
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom, Take},
    path::{Path, PathBuf},
};
use zip::{CompressionMethod, ZipArchive};

/// Reads are this large, so that many arrays read in turn stay in few blocks of memory.
const BLOCK: usize = 1 << 16;

/// A `.npy` array in a file of its own or in an archive.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) path: PathBuf,
    pub(super) name: String,
    pub(super) header: Header,
    extent: Extent,
}

/// The bytes of one file or member.
#[derive(Debug, Clone)]
struct Extent {
    /// First byte in the file.
    offset: u64,
    /// Bytes in the file.
    packed: u64,
    /// Bytes after inflating, the header among them.
    length: u64,
    deflated: bool,
    crc: Option<u32>,
}

impl Stored {
    /// The array in a `.npy` file, called as the file is.
    pub(super) fn npy(path: &Path) -> Result<Stored, SetError> {
        let length = std::fs::metadata(path).map_err(|source| read_error(path, source))?.len();
        let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let extent = Extent { offset: 0, packed: length, length, deflated: false, crc: None };
        Stored::at(path, name, extent)
    }

    /// Every array of a `.npz` archive, by name.
    pub(super) fn npz(path: &Path) -> Result<Vec<Stored>, SetError> {
        let broken = |message: String| SetError::Archive { path: path.to_owned(), message };
        let file = File::open(path).map_err(|source| read_error(path, source))?;
        let size = file.metadata().map_err(|source| read_error(path, source))?.len();
        let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| broken(e.to_string()))?;
        let mut arrays = Vec::with_capacity(archive.len());
        for index in 0..archive.len() {
            let member = archive.by_index_raw(index).map_err(|e| broken(e.to_string()))?;
            let name = member.name().map_err(|e| broken(e.to_string()))?.into_owned();
            if name.ends_with('/') {
                continue;
            }
            let deflated = match member.compression() {
                _ if member.encrypted() => return Err(broken(format!("`{name}` is encrypted"))),
                CompressionMethod::Stored => false,
                #[allow(deprecated)] // The number is all that is known of a method this build does not unpack.
                method => match method.to_u16() {
                    8 => true,
                    _ => return Err(broken(format!("`{name}` is packed by {method:?}, which NumPy does not use"))),
                },
            };
            let offset = member.data_start().ok_or_else(|| broken(format!("`{name}` is nowhere")))?;
            let extent = Extent {
                offset,
                packed: member.compressed_size(),
                length: member.size(),
                deflated,
                crc: Some(member.crc32()),
            };
            if extent.offset.checked_add(extent.packed).is_none_or(|end| end > size) {
                return Err(broken(format!("`{name}` goes on past the end of the file")));
            }
            let name = name.strip_suffix(".npy").unwrap_or(&name).to_owned();
            arrays.push(Stored::at(path, name, extent)?);
        }
        arrays.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(arrays)
    }

    /// Reads the header and holds it to the number of bytes there are.
    fn at(path: &Path, name: String, extent: Extent) -> Result<Stored, SetError> {
        let mut stream = Stream::open(path, &extent).map_err(|source| read_error(path, source))?;
        let array = || (path.to_owned(), name.clone());
        let header = Header::read(&mut stream).map_err(|error| {
            let (path, array) = array();
            match error {
                HeaderError::Io(error) => SetError::Array { path, array, message: error.to_string() },
                HeaderError::Pickle => SetError::Pickle { path, array },
                HeaderError::Bad(message) => SetError::Array { path, array, message },
            }
        })?;
        let (path, array) = array();
        if header.fortran {
            return Err(SetError::Fortran { path, array });
        }
        let found = extent.length.saturating_sub(header.length);
        if found != header.data_bytes {
            let expected = header.data_bytes;
            let message = format!("its shape {:?} needs {expected} bytes, found {found}", header.shape);
            return Err(SetError::Array { path, array, message });
        }
        Ok(Stored { path, name: array, header, extent })
    }

    /// The error of this array.
    pub(super) fn broken(&self, message: impl Into<String>) -> SetError {
        SetError::Array { path: self.path.clone(), array: self.name.clone(), message: message.into() }
    }

    /// The data, from its first byte.
    pub(super) fn stream(&self) -> Result<Stream, SetError> {
        let stream = Stream::open(&self.path, &self.extent).and_then(|mut stream| {
            stream.read_bytes(self.header.length)?;
            Ok(stream)
        });
        stream.map_err(|error| self.broken(error.to_string()))
    }
}

fn read_error(path: &Path, source: io::Error) -> SetError {
    SetError::Read { path: path.to_owned(), source }
}

/// The bytes of one array in order, checked against the archive's sum if all of them were read.
pub(super) struct Stream {
    bytes: Bytes,
    /// Bytes that are still to come.
    remaining: u64,
    /// The sum so far and what it must come to; `None` once bytes were stepped over.
    sum: Option<(Crc, u32)>,
}

enum Bytes {
    Plain(Take<BufReader<File>>),
    Deflated(Box<DeflateDecoder<Take<BufReader<File>>>>),
}

impl Stream {
    fn open(path: &Path, extent: &Extent) -> io::Result<Stream> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(extent.offset))?;
        let packed = BufReader::with_capacity(BLOCK, file).take(extent.packed);
        let bytes =
            if extent.deflated { Bytes::Deflated(Box::new(DeflateDecoder::new(packed))) } else { Bytes::Plain(packed) };
        Ok(Stream { bytes, remaining: extent.length, sum: extent.crc.map(|crc| (Crc::new(), crc)) })
    }

    /// The next `count` bytes. Memory grows with what is there, not with what is asked for.
    pub(super) fn read_bytes(&mut self, count: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let arrived = self.by_ref().take(count).read_to_end(&mut bytes)? as u64;
        if arrived == count { Ok(bytes) } else { Err(io::Error::other("it ends before its last sample")) }
    }

    /// Steps over the next `count` bytes.
    pub(super) fn skip(&mut self, count: u64) -> io::Result<()> {
        match &mut self.bytes {
            _ if count == 0 => {}
            Bytes::Plain(file) => {
                let step = i64::try_from(count).map_err(io::Error::other)?;
                let limit = file.limit().saturating_sub(count);
                file.get_mut().seek_relative(step)?;
                file.set_limit(limit);
                self.remaining = self.remaining.saturating_sub(count);
                self.sum = None;
            }
            Bytes::Deflated(_) => {
                if io::copy(&mut self.by_ref().take(count), &mut io::sink())? != count {
                    return Err(io::Error::other("it ends before its last sample"));
                }
            }
        }
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(buffer.len());
        let count = match &mut self.bytes {
            Bytes::Plain(file) => file.read(&mut buffer[..most])?,
            Bytes::Deflated(file) => file.read(&mut buffer[..most])?,
        };
        self.remaining -= count as u64;
        if let Some((sum, expected)) = &mut self.sum {
            sum.update(&buffer[..count]);
            if self.remaining == 0 && count > 0 && sum.sum() != *expected {
                return Err(io::Error::other(format!("its checksum is {:08x}, expected {expected:08x}", sum.sum())));
            }
        }
        Ok(count)
    }
}

//! Tensor data outside the model file: finding it without leaving the model's folder.

use super::proto::TensorProto;
use crate::mapping::Mapping;
use bytes::Bytes;
use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

/// Why external data cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ExternalError {
    /// The model came from memory, so there is no folder to look in.
    #[error("a model that is not in a file cannot have external data")]
    NoFolder,
    /// No file is named.
    #[error("it names no external file")]
    NoLocation,
    /// A number is not a number.
    #[error("its external {key} is `{value}`, which is no size in bytes")]
    BadNumber {
        /// `offset` or `length`.
        key: &'static str,
        /// What stands there.
        value: String,
    },
    /// The path leads out of the model's folder.
    #[error("its external file `{location}` lies outside the model's folder")]
    Escapes {
        /// The path in the model.
        location: String,
    },
    /// The file cannot be opened.
    #[error("its external file `{location}` cannot be read: {source}")]
    Open {
        /// The path in the model.
        location: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The stated range is not in the file.
    #[error("it needs bytes {offset} to {end} of the external file `{location}`, which has {size}")]
    Range {
        /// The path in the model.
        location: String,
        /// First byte.
        offset: u64,
        /// One past the last byte.
        end: u64,
        /// The file's size.
        size: u64,
    },
}

/// The external files of one model, each mapped once.
pub(super) struct ExternalFiles {
    folder: Option<PathBuf>,
    files: BTreeMap<PathBuf, Arc<Mapping>>,
    /// By the path in the model, so that each is resolved once.
    locations: BTreeMap<String, Arc<Mapping>>,
}

impl ExternalFiles {
    pub(super) fn new(folder: Option<PathBuf>) -> ExternalFiles {
        ExternalFiles { folder, files: BTreeMap::new(), locations: BTreeMap::new() }
    }

    /// The files in use, as canonical paths.
    pub(super) fn paths(self) -> Vec<PathBuf> {
        self.files.into_keys().collect()
    }

    /// The data of `tensor`, whose type and shape need `expected` bytes.
    pub(super) fn data(
        &mut self,
        tensor: &TensorProto,
        expected: usize,
    ) -> Result<(Bytes, Arc<Mapping>), ExternalError> {
        let entry = |key: &str| tensor.external_data.iter().find(|e| e.key() == key).map(|e| e.value());
        let location = entry("location").ok_or(ExternalError::NoLocation)?.to_owned();
        let number = |key: &'static str| match entry(key) {
            None => Ok(None),
            Some(value) => match value.parse::<u64>() {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(ExternalError::BadNumber { key, value: value.to_owned() }),
            },
        };
        let offset = number("offset")?.unwrap_or(0);
        let length = number("length")?.unwrap_or(expected as u64);
        let mapping = self.open(&location)?;
        let contents = mapping.bytes();
        let size = contents.len() as u64;
        let end = offset.saturating_add(length);
        if end > size {
            return Err(ExternalError::Range { location, offset, end, size });
        }
        Ok((contents.slice(offset as usize..end as usize), mapping))
    }

    fn open(&mut self, location: &str) -> Result<Arc<Mapping>, ExternalError> {
        if let Some(mapping) = self.locations.get(location) {
            return Ok(Arc::clone(mapping));
        }
        let folder = self.folder.as_ref().ok_or(ExternalError::NoFolder)?;
        let escapes = || ExternalError::Escapes { location: location.to_owned() };
        let failed = |source| ExternalError::Open { location: location.to_owned(), source };
        let plain = |c: Component| matches!(c, Component::Normal(_) | Component::CurDir);
        if location.is_empty() || !Path::new(location).components().all(plain) || location.contains('\\') {
            return Err(escapes());
        }
        // A symbolic link may still lead out, so the real paths are compared as well.
        let real = folder.join(location).canonicalize().map_err(failed)?;
        let home = folder.canonicalize().map_err(failed)?;
        if !real.starts_with(&home) {
            return Err(escapes());
        }
        let mapping = match self.files.get(&real) {
            Some(mapping) => Arc::clone(mapping),
            None => Mapping::open(&real).map_err(failed)?,
        };
        self.files.insert(real, Arc::clone(&mapping));
        self.locations.insert(location.to_owned(), Arc::clone(&mapping));
        Ok(mapping)
    }
}

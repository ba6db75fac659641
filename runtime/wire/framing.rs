//! Framed messages: a JSON header and raw bytes.

use crate::Sample;
use bytes::Bytes;
use lathe_ir::{DataType, Tensor, TensorError};
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};

/// Begins every frame; anything else on the pipe (a library that prints) is noticed.
const MAGIC: [u8; 4] = *b"LWF1";

/// Headers hold names and shapes only.
const LARGEST_HEADER: u64 = 64 << 20;

/// A named tensor whose data is in the payload.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Head {
    name: String,
    dtype: i32,
    dims: Vec<usize>,
    /// The length of the data; of each string, for strings.
    lengths: Vec<u64>,
}

/// Why the payload of a message is not what its header says.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PayloadError {
    /// It ends too early.
    #[error("a message holds less data than it says")]
    Short,
    /// A tensor has elements of no known type.
    #[error("a message names an unknown element type")]
    Type,
    /// Data and shape of a tensor contradict each other.
    #[error(transparent)]
    Tensor(#[from] TensorError),
}

/// Writes one frame.
pub(crate) fn write(out: &mut dyn Write, header: &impl Serialize, payload: &[&[u8]]) -> io::Result<()> {
    let header = serde_json::to_vec(header)?;
    let length: usize = payload.iter().map(|part| part.len()).sum();
    out.write_all(&MAGIC)?;
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&(length as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for part in payload {
        out.write_all(part)?;
    }
    out.flush()
}

/// Reads one frame; `None` at the end of the stream.
pub(crate) fn read<T: for<'de> Deserialize<'de>>(input: &mut dyn Read) -> io::Result<Option<(T, Bytes)>> {
    let mut start = [0u8; 20];
    match input.read(&mut start[..1])? {
        0 => return Ok(None),
        _ => input.read_exact(&mut start[1..])?,
    }
    let bad = |message: &str| io::Error::new(io::ErrorKind::InvalidData, message.to_owned());
    if start[..4] != MAGIC {
        return Err(bad("the stream holds something that is no message"));
    }
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| start[at + i]));
    let (header, payload) = (number(4), number(12));
    if header > LARGEST_HEADER {
        return Err(bad("the header of a message is too long"));
    }
    let header = read_exactly(input, header)?;
    let payload = read_exactly(input, payload)?;
    let header = serde_json::from_slice(&header).map_err(|e| bad(&format!("a message cannot be understood: {e}")))?;
    Ok(Some((header, payload.into())))
}

/// Reads `length` bytes. Memory grows with what arrives, not with what was promised.
fn read_exactly(input: &mut dyn Read, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let arrived = input.take(length).read_to_end(&mut bytes)?;
    if arrived as u64 == length { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Headers and data of named tensors.
pub(crate) fn pack(tensors: &[(String, Tensor)]) -> (Vec<Head>, Vec<Bytes>) {
    let mut heads = Vec::with_capacity(tensors.len());
    let mut parts = Vec::new();
    for (name, tensor) in tensors {
        let data: Vec<Bytes> = match tensor.string_data() {
            Some(strings) => strings.to_vec(),
            None => vec![tensor.shared_bytes()],
        };
        heads.push(Head {
            name: name.clone(),
            dtype: tensor.dtype().code(),
            dims: tensor.dims().to_vec(),
            lengths: data.iter().map(|part| part.len() as u64).collect(),
        });
        parts.extend(data);
    }
    (heads, parts)
}

/// Headers and data of several sets of named tensors.
pub(crate) fn pack_all(samples: &[Sample]) -> (Vec<Vec<Head>>, Vec<Bytes>) {
    let (heads, parts): (Vec<_>, Vec<_>) = samples.iter().map(|sample| pack(sample)).unzip();
    (heads, parts.into_iter().flatten().collect())
}

/// The sets of tensors that `heads` describe, taken off the front of `payload`.
pub(crate) fn unpack_all(heads: Vec<Vec<Head>>, payload: &mut Bytes) -> Result<Vec<Sample>, PayloadError> {
    heads.into_iter().map(|heads| unpack(heads, payload)).collect()
}

/// The tensors that `heads` describe, taken off the front of `payload`.
pub(crate) fn unpack(heads: Vec<Head>, payload: &mut Bytes) -> Result<Sample, PayloadError> {
    let mut take = |length: u64| -> Result<Bytes, PayloadError> {
        let length = usize::try_from(length).ok().filter(|&l| l <= payload.len());
        length.map(|l| payload.split_to(l)).ok_or(PayloadError::Short)
    };
    let mut tensors = Vec::with_capacity(heads.len());
    for head in heads {
        let dtype = DataType::from_code(head.dtype).ok_or(PayloadError::Type)?;
        let data: Vec<Bytes> = head.lengths.into_iter().map(&mut take).collect::<Result<_, _>>()?;
        let tensor = if dtype == DataType::String {
            Tensor::strings(head.dims, data)
        } else {
            Tensor::new(dtype, head.dims, data.into_iter().next().unwrap_or_default())
        };
        tensors.push((head.name, tensor?));
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{WorkerAnswer, WorkerRequest};

    #[test]
    fn tensors_survive_the_trip() {
        let text = Tensor::strings(vec![2], vec!["a".into(), "".into()]).unwrap();
        let sample = vec![("x".to_owned(), Tensor::int64s(&[1, 2])), ("s".to_owned(), text)];
        let (heads, parts) = pack(&sample);
        let mut wire = Vec::new();
        let parts: Vec<&[u8]> = parts.iter().map(|p| &p[..]).collect();
        write(&mut wire, &WorkerAnswer::Outputs(heads), &parts).unwrap();
        let (answer, mut payload) = read::<WorkerAnswer>(&mut &wire[..]).unwrap().unwrap();
        let WorkerAnswer::Outputs(heads) = answer else { panic!() };
        assert_eq!(unpack(heads, &mut payload).unwrap(), sample);
        assert!(read::<WorkerAnswer>(&mut &wire[wire.len()..]).unwrap().is_none());
    }

    #[test]
    fn lengths_are_not_believed() {
        let mut wire = Vec::new();
        write(&mut wire, &WorkerRequest::Hello, &[]).unwrap();
        wire[12..20].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(read::<WorkerRequest>(&mut &wire[..]).is_err());
        wire[4..12].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(read::<WorkerRequest>(&mut &wire[..]).is_err());
        assert!(read::<WorkerRequest>(&mut &b"hello, this is a library that prints"[..]).is_err());
        let head = Head { name: "x".into(), dtype: 1, dims: vec![usize::MAX, 2], lengths: vec![8] };
        assert!(unpack(vec![head], &mut Bytes::from_static(b"12345678")).is_err());
        let head = Head { name: "x".into(), dtype: 1, dims: vec![2], lengths: vec![u64::MAX] };
        assert!(unpack(vec![head], &mut Bytes::from_static(b"12345678")).is_err());
    }
}

//! What travels between the program and its worker: framed messages of a JSON header and raw bytes.

use crate::{
    BenchInputs, BenchResult, BenchTask, ChosenSamples, Claim, Datum, InputSpec, LoadOptions, Measured, Progress,
    Sample, SetSpec, Verdict,
    statistics::{Gathered, Job},
    trials,
    verify::LeftOut,
};
use bytes::Bytes;
use lathe_ir::{DataType, Tensor};
use serde::{Deserialize, Serialize};
use std::{
    io::{self, Read, Write},
    path::PathBuf,
};

/// Begins every frame; anything else on the pipe (a library that prints) is noticed.
const MAGIC: [u8; 4] = *b"LWF1";

/// Headers hold names and shapes only.
const LARGEST_HEADER: u64 = 64 << 20;

/// What the program asks of the worker.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Who are you?
    Hello,
    /// Run a model (the first `model` bytes of the payload) on inputs (the rest).
    Evaluate { model: u64, inputs: Vec<Head>, options: LoadOptions },
    /// Run a model on disk on several sets of inputs, whose data is the payload.
    Run { model: PathBuf, inputs: Vec<Vec<Head>>, options: LoadOptions },
    /// Compare two models on disk, but not on the inputs that `left_out` names.
    Verify {
        reference: PathBuf,
        candidate: PathBuf,
        inputs: InputHeads,
        claim: Claim,
        options: LoadOptions,
        left_out: Vec<LeftOut>,
    },
    /// Choose some samples of a set.
    Select { model: PathBuf, set: SetSpec, count: usize, seed: u64, options: LoadOptions },
    /// Run a model that computes statistics over a set.
    Gather(Job),
    /// Run variants of a model over a set.
    Trials(trials::Job),
    /// Measure what the candidate loses on a set.
    Measure { reference: PathBuf, candidate: PathBuf, set: SetSpec, metric: String, options: LoadOptions },
    /// Time one or two models on disk.
    Bench { models: Vec<PathBuf>, inputs: BenchInputs, task: BenchTask, options: LoadOptions },
}

/// What the worker answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The engine's name and its providers.
    Hello { name: String, providers: Vec<String> },
    /// What the worker is about to do; the answer is still to come.
    Stage(String),
    /// How far it is; the answer is still to come.
    Progress(Progress),
    /// The outputs, whose data is the payload.
    Outputs(Vec<Head>),
    /// The outputs of several runs, whose data is the payload.
    Ran(Vec<Vec<Head>>),
    /// The result of a comparison.
    Verdict(Verdict),
    /// The samples that were chosen.
    Selected(ChosenSamples),
    /// What came of gathering statistics.
    Gathered(Gathered),
    /// Distances of outputs; `None` where one is not finite.
    Tried(Vec<Option<f64>>),
    /// The result of a measurement; a verdict where one of the models does not run.
    Measured(Result<Box<Measured>, Verdict>),
    /// What a measurement gave.
    Timed(BenchResult),
    /// It did not work.
    Error(String),
    /// There is nothing to run models with.
    NoEngine(String),
}

/// The inputs of a comparison.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum InputHeads {
    /// Make them.
    Random(InputSpec),
    /// Read them from a set.
    Set(SetSpec),
    /// They are in the payload.
    Given(Vec<Vec<Head>>),
}

/// A named tensor whose data is in the payload.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Head {
    name: String,
    dtype: i32,
    dims: Vec<usize>,
    /// The length of the data; of each string, for strings.
    lengths: Vec<u64>,
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
pub(crate) fn unpack_all(heads: Vec<Vec<Head>>, payload: &mut Bytes) -> Result<Vec<Sample>, String> {
    heads.into_iter().map(|heads| unpack(heads, payload)).collect()
}

/// The tensors that `heads` describe, taken off the front of `payload`.
pub(crate) fn unpack(heads: Vec<Head>, payload: &mut Bytes) -> Result<Sample, String> {
    let mut take = |length: u64| -> Result<Bytes, String> {
        let length = usize::try_from(length).ok().filter(|&l| l <= payload.len());
        length.map(|l| payload.split_to(l)).ok_or_else(|| "a message holds less data than it says".to_owned())
    };
    let mut tensors = Vec::with_capacity(heads.len());
    for head in heads {
        let dtype = DataType::from_code(head.dtype).ok_or("a message names an unknown element type")?;
        let data: Vec<Bytes> = head.lengths.into_iter().map(&mut take).collect::<Result<_, _>>()?;
        let tensor = if dtype == DataType::String {
            Tensor::strings(head.dims, data)
        } else {
            Tensor::new(dtype, head.dims, data.into_iter().next().unwrap_or_default())
        };
        tensors.push((head.name, tensor.map_err(|e| e.to_string())?));
    }
    Ok(tensors)
}

/// The outputs as named tensors, if all of them are tensors.
pub(crate) fn only_tensors(outputs: Vec<(String, Datum)>) -> Result<Sample, String> {
    let tensor = |(name, datum): (String, Datum)| match datum {
        Datum::Tensor(tensor) => Ok((name, tensor)),
        other => Err(format!("output `{name}` is {}, not a tensor", other.describe())),
    };
    outputs.into_iter().map(tensor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_survive_the_trip() {
        let text = Tensor::strings(vec![2], vec!["a".into(), "".into()]).unwrap();
        let sample = vec![("x".to_owned(), Tensor::int64s(&[1, 2])), ("s".to_owned(), text)];
        let (heads, parts) = pack(&sample);
        let mut wire = Vec::new();
        let parts: Vec<&[u8]> = parts.iter().map(|p| &p[..]).collect();
        write(&mut wire, &Answer::Outputs(heads), &parts).unwrap();
        let (answer, mut payload) = read::<Answer>(&mut &wire[..]).unwrap().unwrap();
        let Answer::Outputs(heads) = answer else { panic!() };
        assert_eq!(unpack(heads, &mut payload).unwrap(), sample);
        assert!(read::<Answer>(&mut &wire[wire.len()..]).unwrap().is_none());
    }

    #[test]
    fn lengths_are_not_believed() {
        let mut wire = Vec::new();
        write(&mut wire, &Request::Hello, &[]).unwrap();
        wire[12..20].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(read::<Request>(&mut &wire[..]).is_err());
        wire[4..12].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(read::<Request>(&mut &wire[..]).is_err());
        assert!(read::<Request>(&mut &b"hello, this is a library that prints"[..]).is_err());
        let head = Head { name: "x".into(), dtype: 1, dims: vec![usize::MAX, 2], lengths: vec![8] };
        assert!(unpack(vec![head], &mut Bytes::from_static(b"12345678")).is_err());
        let head = Head { name: "x".into(), dtype: 1, dims: vec![2], lengths: vec![u64::MAX] };
        assert!(unpack(vec![head], &mut Bytes::from_static(b"12345678")).is_err());
    }
}

//! From a [`Model`] to an ONNX file: weights are streamed, results appear whole.

use super::{
    convert::{self, entries, imports, text},
    message::{function_proto, scope_proto},
    proto,
};
use crate::{Initializer, Model, ScopeId, Tensor, mapping};
use prost::Message;
use std::{
    collections::BTreeMap,
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    sync::Mutex,
    thread::{self, ThreadId},
};

/// Files above this go to external data: protobuf ends at 2 GiB.
const LARGEST_INLINE: u64 = 1_900_000_000;
/// Tensors of at least this many bytes move to the external file.
const SMALLEST_EXTERNAL: usize = 1024;
/// Tensors of at least this many bytes start on a page, so that runtimes can map them; smaller ones on a cache line.
const PAGE_ALIGNED: usize = 1 << 20;

/// Where weights are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum External {
    /// In the model file, or beside it when the model file would exceed 1.9 GB.
    #[default]
    Auto,
    /// Beside the model file.
    Always,
}

/// How a model is written.
#[derive(Debug, Clone, Copy, Default)]
pub struct WriteOptions {
    /// Where weights are written.
    pub external: External,
}

/// Why a model could not be written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The messages say what the fields are.
pub enum WriteError {
    #[error("cannot write `{path}`: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("the model without its weights takes {bytes} bytes; a model file ends at 2 GiB")]
    TooLarge { bytes: u64 },
}

/// What was written.
#[derive(Debug, Clone)]
pub struct Written {
    /// Bytes of the model file.
    pub file_bytes: u64,
    /// Bytes of the external data file; 0 if there is none.
    pub data_bytes: u64,
}

impl Model {
    /// Writes the model to `path`, and its weights to `path` with `.data` appended where they are external. Both files
    /// appear whole or not at all; files that were there are replaced.
    pub fn write(&self, path: &Path, options: &WriteOptions) -> Result<Written, WriteError> {
        self.stage(path, options)?.commit()
    }

    /// The encoded model with every weight inline.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut buffer = Vec::new();
        let plan = Plan::new(self, &Weights::Inline);
        plan.write_model(&mut buffer).expect("writing to memory does not fail");
        buffer
    }

    /// Writes what [`Model::to_bytes`] gives without holding it in memory: to a hash, for instance.
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        Plan::new(self, &Weights::Inline).write_model(out)
    }

    /// Writes the model to `path` and leaves weights in the files they are mapped from: those appear in the folder of
    /// `path` under names of their own, as links where the file system allows it, else as copies. For short-lived
    /// copies of a model; other weights go into the file itself.
    pub fn write_linked(&self, path: &Path) -> Result<(), WriteError> {
        let failed = |source| WriteError::Io { path: path.to_owned(), source };
        // By what they are, so that models written to one folder share links, and none takes that of another.
        let name = |file: &PathBuf| {
            let mut hash = DefaultHasher::new();
            (file, fs::metadata(file).and_then(|found| found.modified()).ok()).hash(&mut hash);
            format!("weights-{:016x}", hash.finish())
        };
        let files: BTreeMap<PathBuf, String> =
            self.mapped_files().into_iter().map(|file| (file.clone(), name(&file))).collect();
        for (file, name) in &files {
            let link = path.with_file_name(name);
            if !link.exists() && fs::hard_link(file, &link).is_err() {
                fs::copy(file, &link).map_err(failed)?;
            }
        }
        let weights = Weights::Linked(files);
        let plan = Plan::new(self, &weights);
        if plan.total() >= 1 << 31 {
            return Err(WriteError::TooLarge { bytes: plan.total() });
        }
        create(path, |out| plan.write_model(out)).map_err(failed)
    }

    /// Writes the model with weights that are mapped from files told by a name of the file and their place in it: to a
    /// hash, which then need not read them.
    pub fn write_referring(&self, out: &mut impl Write, name: &dyn Fn(&Path) -> io::Result<String>) -> io::Result<()> {
        let named = |file: PathBuf| Ok((file.clone(), name(&file)?));
        let files = self.mapped_files().into_iter().map(named).collect::<io::Result<_>>()?;
        Plan::new(self, &Weights::Linked(files)).write_model(out)
    }

    /// The files that weights of the main graph are mapped from, in the order of these.
    fn mapped_files(&self) -> Vec<PathBuf> {
        let mut files: Vec<PathBuf> = Vec::new();
        for value in self.graph.initializers(ScopeId::MAIN) {
            let Some(Initializer::Dense(tensor)) = self.graph.value(value).initializer() else { continue };
            let Some((file, _)) = tensor.place().filter(|_| tensor.byte_len() >= SMALLEST_EXTERNAL) else { continue };
            if !files.iter().any(|known| known == file) {
                files.push(file.to_owned());
            }
        }
        files
    }

    /// Writes the model to a folder beside `path`, to be looked at and then put in place by [`Staged::commit`].
    pub fn stage(&self, path: &Path, options: &WriteOptions) -> Result<Staged, WriteError> {
        let failed = |source| WriteError::Io { path: path.to_owned(), source };
        let name = path.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidFilename.into()))?.to_owned();
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let folder = {
            // An interrupt sees either no folder or one that it knows of.
            let mut staging = staging();
            if staging.ended {
                return Err(failed(io::ErrorKind::Interrupted.into()));
            }
            let folder = tempfile::Builder::new().prefix(".optimize-").tempdir_in(parent).map_err(failed)?;
            staging.folders.push((thread::current().id(), folder.path().to_owned()));
            folder
        };
        let mut data_name = name.clone();
        data_name.push(".data");
        let inline = Plan::new(self, &Weights::Inline);
        let large = inline.total() > LARGEST_INLINE;
        let plan = if large || options.external == External::Always {
            Plan::new(self, &Weights::Beside(data_name.to_string_lossy().into_owned()))
        } else {
            inline
        };
        if plan.total() >= 1 << 31 {
            return Err(WriteError::TooLarge { bytes: plan.total() });
        }
        let mut staged = Staged {
            model: folder.path().join(&name),
            data: None,
            target: path.to_owned(),
            target_data: path.with_file_name(&data_name),
            written: Written { file_bytes: plan.total(), data_bytes: 0 },
            folder,
        };
        if plan.data_bytes > 0 {
            let data = staged.folder.path().join(&data_name);
            create(&data, |out| plan.write_data(out)).map_err(failed)?;
            staged.written.data_bytes = plan.data_bytes;
            staged.data = Some(data);
        }
        create(&staged.model, |out| plan.write_model(out)).map_err(failed)?;
        Ok(staged)
    }
}

fn create(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    write(&mut out)?;
    out.flush()
}

/// What [`remove_staged`] removes.
struct Staging {
    /// Folders of results that are not yet in place, and the threads that write them.
    folders: Vec<(ThreadId, PathBuf)>,
    /// Whether the program is ending, so that no more are made.
    ended: bool,
}

static STAGING: Mutex<Staging> = Mutex::new(Staging { folders: Vec::new(), ended: false });

/// Times that a folder is removed into which somebody is writing; each file can come in between once.
const REMOVALS: usize = 4;

fn staging() -> std::sync::MutexGuard<'static, Staging> {
    STAGING.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Removes every result that is not yet in place, for a program about to end: nothing can be staged afterwards.
pub fn remove_staged() {
    let mut staging = staging();
    staging.ended = true;
    mapping::remove_spilled();
    for (_, folder) in staging.folders.drain(..) {
        // The program is ending; a folder that cannot be removed is only litter.
        let _ = (0..REMOVALS).find(|_| fs::remove_dir_all(&folder).is_ok());
    }
}

/// Removes what `thread` has not put in place yet: for work that was called off and has not noticed. Its
/// [`Staged::commit`] fails.
pub fn remove_staged_of(thread: ThreadId) {
    for (_, folder) in staging().folders.extract_if(.., |(writer, _)| *writer == thread) {
        // Nobody waits for it any more.
        let _ = fs::remove_dir_all(folder);
    }
}

/// A written model that is not yet in its place. Dropping it removes it.
#[derive(Debug)]
pub struct Staged {
    folder: tempfile::TempDir,
    model: PathBuf,
    data: Option<PathBuf>,
    target: PathBuf,
    target_data: PathBuf,
    written: Written,
}

impl Drop for Staged {
    fn drop(&mut self) {
        let mut staging = staging();
        // While the list is held: an interrupt would not know of the folder any more.
        let _ = fs::remove_dir_all(self.folder.path());
        staging.folders.retain(|(_, folder)| folder != self.folder.path());
    }
}

impl Staged {
    /// Where the model file is now; it can be loaded from there.
    pub fn path(&self) -> &Path {
        &self.model
    }

    /// Sizes.
    pub fn written(&self) -> &Written {
        &self.written
    }

    /// Puts model and data file in place, together: if the second cannot follow, the first is taken back.
    pub fn commit(self) -> Result<Written, WriteError> {
        let failed = |path: &Path, source| WriteError::Io { path: path.to_owned(), source };
        let Some(data) = &self.data else {
            fs::rename(&self.model, &self.target).map_err(|e| failed(&self.target, e))?;
            return Ok(self.written.clone());
        };
        let kept = self.folder.path().join("replaced.data");
        let replaced = match fs::rename(&self.target_data, &kept) {
            Ok(()) => true,
            Err(e) if e.kind() == io::ErrorKind::NotFound => false,
            Err(e) => return Err(failed(&self.target_data, e)),
        };
        let take_back = || {
            if replaced { fs::rename(&kept, &self.target_data) } else { fs::remove_file(&self.target_data) }
        };
        let placed = fs::rename(data, &self.target_data).map_err(|e| failed(&self.target_data, e));
        let placed = placed.and_then(|()| fs::rename(&self.model, &self.target).map_err(|e| failed(&self.target, e)));
        if let Err(error) = placed {
            take_back().map_err(|e| failed(&self.target_data, e))?;
            return Err(error);
        }
        Ok(self.written.clone())
    }
}

/// Everything known before the first byte is written: messages, lengths, places in the data file.
struct Plan<'a> {
    model: &'a Model,
    /// Fields of the model before the graph.
    head: Vec<u8>,
    /// Fields of the graph before the initializers.
    graph_head: Vec<u8>,
    initializers: Vec<Stored<'a>>,
    /// Fields of the graph after the initializers.
    graph_tail: Vec<u8>,
    /// Fields of the model after the graph.
    tail: Vec<u8>,
    /// Bytes of the data file to be written.
    data_bytes: u64,
}

/// Where the weights of the main graph are.
enum Weights {
    /// In the model.
    Inline,
    /// Large ones in a file of this name beside the model.
    Beside(String),
    /// Large ones in these files, which exist: path and name beside the model.
    Linked(BTreeMap<PathBuf, String>),
}

struct Stored<'a> {
    header: proto::TensorProto,
    tensor: &'a Tensor,
    /// Offset in a data file; `None` for data in the message itself.
    offset: Option<u64>,
}

impl Stored<'_> {
    fn inline_data(&self) -> bool {
        self.offset.is_none() && convert::is_raw(self.tensor)
    }

    /// Length of the encoded message.
    fn len(&self) -> usize {
        let data = if self.inline_data() {
            let bytes = self.tensor.byte_len();
            1 + varint_len(bytes as u64) + bytes
        } else {
            0
        };
        self.header.encoded_len() + data
    }
}

fn varint_len(value: u64) -> usize {
    prost::encoding::encoded_len_varint(value)
}

fn write_key(out: &mut impl Write, field: u32, length: usize) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(20);
    prost::encoding::encode_varint(u64::from(field) << 3 | 2, &mut buffer);
    prost::encoding::encode_varint(length as u64, &mut buffer);
    out.write_all(&buffer)
}

/// Length of key and length prefix of a message field.
fn key_len(field: u32, length: usize) -> usize {
    varint_len(u64::from(field) << 3 | 2) + varint_len(length as u64)
}

const MODEL_GRAPH: u32 = 7;
const GRAPH_INITIALIZER: u32 = 5;
const TENSOR_RAW_DATA: u32 = 9;

impl<'a> Plan<'a> {
    fn new(model: &'a Model, weights: &Weights) -> Plan<'a> {
        let graph = &model.graph;
        let mut initializers = Vec::new();
        let mut data_bytes = 0u64;
        let scope = graph.scope(ScopeId::MAIN);
        let defaults = scope.inputs().iter().copied();
        for value in defaults.chain(graph.initializers(ScopeId::MAIN)) {
            let Some(Initializer::Dense(tensor)) = graph.value(value).initializer() else { continue };
            let length = tensor.bytes().len();
            let place = match weights {
                _ if length < SMALLEST_EXTERNAL => None,
                Weights::Inline => None,
                Weights::Beside(name) => {
                    let alignment = if length >= PAGE_ALIGNED { 4096 } else { 64 };
                    let start = data_bytes.next_multiple_of(alignment);
                    data_bytes = start + length as u64;
                    Some((name, start))
                }
                Weights::Linked(files) => tensor.place().and_then(|(file, start)| Some((files.get(file)?, start))),
            };
            let mut header = convert::tensor_header(&graph.value(value).name, tensor);
            if let Some((location, start)) = place {
                header = convert::tensor_header(&graph.value(value).name, &tensor.as_raw());
                header.data_location = Some(1);
                header.external_data = entries(&[
                    ("location".to_owned(), location.clone()),
                    ("offset".to_owned(), start.to_string()),
                    ("length".to_owned(), length.to_string()),
                ]);
            }
            initializers.push(Stored { header, tensor, offset: place.map(|(_, start)| start) });
        }
        let whole = scope_proto(graph, ScopeId::MAIN);
        let graph_head = proto::GraphProto { node: whole.node, name: whole.name, ..Default::default() }.encode_to_vec();
        let graph_tail = proto::GraphProto { node: Vec::new(), name: None, initializer: Vec::new(), ..whole };
        let head = proto::ModelProto {
            ir_version: Some(model.ir_version),
            producer_name: text(&model.producer_name),
            producer_version: text(&model.producer_version),
            domain: text(&model.domain),
            model_version: model.model_version,
            doc_string: text(&model.doc),
            ..Default::default()
        };
        let training = model.training.iter().map(|t| {
            proto::TrainingInfoProto::decode(t.clone()).expect("encoded by the reader from a decoded message")
        });
        let tail = proto::ModelProto {
            opset_import: imports(&model.opsets),
            metadata_props: entries(&model.metadata),
            training_info: training.collect(),
            functions: model.functions.iter().map(function_proto).collect(),
            configuration: model.configurations.iter().map(convert::configuration_proto).collect(),
            ..Default::default()
        };
        Plan {
            model,
            head: head.encode_to_vec(),
            graph_head,
            initializers,
            graph_tail: graph_tail.encode_to_vec(),
            tail: tail.encode_to_vec(),
            data_bytes,
        }
    }

    fn graph_len(&self) -> usize {
        let initializers = self.initializers.iter().map(|s| key_len(GRAPH_INITIALIZER, s.len()) + s.len());
        self.graph_head.len() + initializers.sum::<usize>() + self.graph_tail.len()
    }

    /// Bytes of the model file.
    fn total(&self) -> u64 {
        let graph = self.graph_len();
        (self.head.len() + key_len(MODEL_GRAPH, graph) + graph + self.tail.len()) as u64
    }

    fn write_model(&self, out: &mut impl Write) -> io::Result<()> {
        debug_assert!(self.model.graph.main().owner().is_none());
        out.write_all(&self.head)?;
        write_key(out, MODEL_GRAPH, self.graph_len())?;
        out.write_all(&self.graph_head)?;
        for stored in &self.initializers {
            write_key(out, GRAPH_INITIALIZER, stored.len())?;
            out.write_all(&stored.header.encode_to_vec())?;
            if stored.inline_data() {
                write_key(out, TENSOR_RAW_DATA, stored.tensor.byte_len())?;
                write_data(stored.tensor, out)?;
            }
        }
        out.write_all(&self.graph_tail)?;
        out.write_all(&self.tail)
    }

    fn write_data(&self, out: &mut impl Write) -> io::Result<()> {
        let mut at = 0;
        for stored in &self.initializers {
            let Some(offset) = stored.offset else { continue };
            let gap = usize::try_from(offset - at).expect("gaps are smaller than a page");
            out.write_all(&vec![0; gap])?;
            write_data(stored.tensor, out)?;
            at = offset + stored.tensor.byte_len() as u64;
        }
        Ok(())
    }
}

fn write_data(tensor: &Tensor, out: &mut impl Write) -> io::Result<()> {
    tensor.parts().try_for_each(|part| out.write_all(part))
}

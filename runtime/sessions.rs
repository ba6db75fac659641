//! Sessions that stay: a worker is asked to run the same models again and again, and loading one may take longer than a run.
//!
//! What a session is of is told by contents, not by paths: models are written anew for every request, with their weights
//! left in the files that they were read from.

use crate::{Datum, Engine, LoadOptions, RuntimeError, Sample, Session, Source, content::place};
use lathe_ir::{Model, Tensor};
use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    rc::Rc,
};

/// A file up to this size is told by its bytes; a larger one by its place, size and time, as files of weights are.
const LARGEST_HASHED: u64 = 32 << 20;

/// The part of the memory for sessions that outputs may take.
const OUTPUTS_SHARE: u64 = 4;

/// What a session is of: a hash of the model, and how it is loaded.
type Key = [u8; 32];

/// The outputs of a run.
type Outputs = Rc<Vec<(String, Datum)>>;

/// Loads models, keeps their sessions afterwards, and remembers outputs where it is told to.
pub(crate) struct SessionStore<'e> {
    engine: &'e dyn Engine,
    /// Bytes that kept sessions may take.
    limit: u64,
    kept: RefCell<Kept>,
}

#[derive(Default)]
struct Kept {
    /// Sessions that nobody uses, the one used last at the end.
    idle: Vec<(Key, Box<dyn Session>, u64)>,
    /// Models that have been loaded before.
    loadable: BTreeSet<Key>,
    outputs: BTreeMap<Key, KnownOutputs>,
    /// When outputs of a model were last asked for.
    clock: u64,
}

/// The outputs of one model by the hash of its inputs.
#[derive(Default)]
struct KnownOutputs {
    by_inputs: BTreeMap<[u8; 32], Outputs>,
    bytes: u64,
    used: u64,
}

impl<'e> SessionStore<'e> {
    /// Sessions may stay while they take at most `limit` bytes together, as estimated by their weights.
    pub fn new(engine: &'e dyn Engine, limit: u64) -> SessionStore<'e> {
        SessionStore { engine, limit, kept: RefCell::default() }
    }

    /// Who runs the models.
    pub fn engine(&self) -> &'e dyn Engine {
        self.engine
    }

    /// A session of the model in this file: one that stayed, if there is one.
    pub fn load(&self, path: &Path, options: &LoadOptions) -> Result<KeptSession<'_, 'e>, RuntimeError> {
        // What cannot be told apart is not kept.
        let (key, bytes) = match identity(path, options) {
            Ok((key, bytes)) => (Some(key), bytes),
            Err(_) => (None, 0),
        };
        let mut session =
            KeptSession { store: self, path: path.to_owned(), options: options.clone(), key, bytes, session: None };
        if !key.is_some_and(|key| self.kept.borrow().is_known(&key)) {
            session.ready()?;
        }
        Ok(session)
    }

    fn take(&self, key: &Key) -> Option<Box<dyn Session>> {
        let mut kept = self.kept.borrow_mut();
        let at = kept.idle.iter().position(|(known, ..)| known == key)?;
        Some(kept.idle.remove(at).1)
    }

    /// Lets go of those sessions that were not used for longest until there is room for `bytes`.
    fn make_room(&self, bytes: u64) {
        let mut kept = self.kept.borrow_mut();
        while !kept.idle.is_empty() && kept.idle.iter().map(|(.., b)| b).sum::<u64>() + bytes > self.limit {
            kept.idle.remove(0);
        }
    }
}

impl Kept {
    /// Whether a session of the model is there, or was there and left outputs.
    fn is_known(&self, key: &Key) -> bool {
        self.outputs.contains_key(key) && self.loadable.contains(key)
    }
}

/// A session that goes back to where it stays when it is dropped. Of a model whose outputs are known it is loaded only when
/// it is run.
pub(crate) struct KeptSession<'s, 'e> {
    store: &'s SessionStore<'e>,
    path: PathBuf,
    options: LoadOptions,
    key: Option<Key>,
    bytes: u64,
    session: Option<Box<dyn Session>>,
}

impl KeptSession<'_, '_> {
    fn ready(&mut self) -> Result<&mut dyn Session, RuntimeError> {
        let session = match self.session.take().or_else(|| self.store.take(&self.key?)) {
            Some(session) => session,
            None => {
                self.store.make_room(self.bytes);
                let session = self.store.engine.load(Source::Path(&self.path), &self.options)?;
                self.store.kept.borrow_mut().loadable.extend(self.key);
                session
            }
        };
        Ok(self.session.insert(session).as_mut())
    }

    /// The outputs of an earlier run on the same inputs, where they were kept.
    pub fn known(&self, inputs: &Sample) -> Option<Outputs> {
        let mut kept = self.store.kept.borrow_mut();
        kept.clock += 1;
        let clock = kept.clock;
        let known = kept.outputs.get_mut(&self.key?)?;
        known.used = clock;
        known.by_inputs.get(&hash_of(inputs)).cloned()
    }

    /// Keeps the outputs of a run while there is room. Those of one model do not push each other out: they are asked for
    /// in the same order again.
    pub fn remember(&self, inputs: &Sample, outputs: &Outputs) {
        let Some(key) = self.key else { return };
        let bytes: u64 = outputs.iter().map(|(_, datum)| bytes_of(datum)).sum();
        let limit = self.store.limit / OUTPUTS_SHARE;
        let mut kept = self.store.kept.borrow_mut();
        loop {
            let total: u64 = kept.outputs.values().map(|known| known.bytes).sum();
            if total + bytes <= limit {
                break;
            }
            let others = kept.outputs.iter().filter(|(other, known)| **other != key && known.bytes > 0);
            let Some(oldest) = others.min_by_key(|(_, known)| known.used).map(|(other, _)| *other) else { return };
            kept.outputs.remove(&oldest);
        }
        let known = kept.outputs.entry(key).or_default();
        known.bytes += bytes;
        known.by_inputs.insert(hash_of(inputs), Rc::clone(outputs));
    }
}

impl Session for KeptSession<'_, '_> {
    fn run(&mut self, inputs: &[(String, Tensor)]) -> Result<Vec<(String, Datum)>, RuntimeError> {
        self.ready()?.run(inputs)
    }

    fn visit(
        &mut self,
        inputs: &[(String, Tensor)],
        take: &mut dyn FnMut(&str, Datum) -> Result<(), RuntimeError>,
    ) -> Result<(), RuntimeError> {
        self.ready()?.visit(inputs, take)
    }
}

impl Drop for KeptSession<'_, '_> {
    fn drop(&mut self) {
        let (Some(session), Some(key)) = (self.session.take(), self.key) else { return };
        self.store.make_room(self.bytes);
        if self.bytes <= self.store.limit {
            self.store.kept.borrow_mut().idle.push((key, session, self.bytes));
        }
    }
}

/// What a model in a file is, with how it is loaded, and the bytes that a session of it takes at least.
fn identity(path: &Path, options: &LoadOptions) -> io::Result<(Key, u64)> {
    let mut hash = blake3::Hasher::new();
    hash.update(&serde_json::to_vec(options)?);
    let bytes = fs::metadata(path)?.len();
    if bytes <= LARGEST_HASHED {
        hash.update_reader(fs::File::open(path)?)?;
    } else {
        hash.update(place(path)?.as_bytes());
    }
    let loaded = Model::read(path).map_err(io::Error::other)?;
    let mut total = bytes;
    for file in &loaded.data_files {
        total += fs::metadata(file)?.len();
        hash.update(place(file)?.as_bytes());
    }
    // Weights are packed for the processor beside what is read of the file, unless memory is to be saved.
    Ok((*hash.finalize().as_bytes(), if options.lean { total } else { 2 * total }))
}

fn hash_of(inputs: &Sample) -> [u8; 32] {
    let mut hash = blake3::Hasher::new();
    for (name, tensor) in inputs {
        hash.update(format!("{name} {:?} {:?} ", tensor.dtype(), tensor.dims()).as_bytes());
        match tensor.string_data() {
            Some(strings) => strings.iter().for_each(|text| {
                hash.update(&(text.len() as u64).to_le_bytes());
                hash.update(text);
            }),
            None => _ = hash.update(&tensor.shared_bytes()),
        }
    }
    *hash.finalize().as_bytes()
}

fn bytes_of(datum: &Datum) -> u64 {
    match datum {
        Datum::Tensor(tensor) => tensor.byte_len() as u64,
        Datum::Sequence(members) => members.iter().map(bytes_of).sum(),
        Datum::Map { keys, values } => (keys.byte_len() + values.byte_len()) as u64,
        Datum::None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{engine, unary};
    use lathe_ir::Node;
    use std::{
        cell::Cell,
        sync::atomic::{AtomicUsize, Ordering},
    };

    /// Counts what is loaded.
    struct Counting(AtomicUsize);

    impl Engine for Counting {
        fn load(&self, source: Source<'_>, options: &LoadOptions) -> Result<Box<dyn Session>, RuntimeError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            engine().load(source, options)
        }

        fn name(&self) -> String {
            engine().name()
        }

        fn providers(&self) -> Vec<String> {
            engine().providers()
        }
    }

    struct Bench {
        engine: Counting,
        folder: tempfile::TempDir,
        files: Cell<usize>,
    }

    impl Bench {
        fn new() -> Bench {
            let folder = tempfile::tempdir().unwrap();
            Bench { engine: Counting(AtomicUsize::new(0)), folder, files: Cell::new(0) }
        }

        /// A file of its own that holds a model of one node.
        fn write(&self, op: &str) -> PathBuf {
            self.files.set(self.files.get() + 1);
            let path = self.folder.path().join(format!("{}.onnx", self.files.get()));
            fs::write(&path, unary(Node::new(op)).to_bytes()).unwrap();
            path
        }

        fn loaded(&self) -> usize {
            self.engine.0.load(Ordering::Relaxed)
        }
    }

    fn sample(x: f32) -> Sample {
        vec![("x".to_owned(), Tensor::from_f32s(&[1, 3], &[x; 3]))]
    }

    #[test]
    fn one_session_serves_every_copy_of_a_model() {
        let bench = Bench::new();
        let store = SessionStore::new(&bench.engine, 1 << 20);
        let options = LoadOptions::default();
        for _ in 0..3 {
            store.load(&bench.write("Relu"), &options).unwrap().run(&sample(1.0)).unwrap();
        }
        assert_eq!(bench.loaded(), 1);
        // Other contents, another way of loading, and a model that is in use already are other sessions.
        drop(store.load(&bench.write("Neg"), &options).unwrap());
        drop(store.load(&bench.write("Relu"), &LoadOptions { optimize: true, ..options.clone() }).unwrap());
        let first = store.load(&bench.write("Relu"), &options).unwrap();
        drop((store.load(&bench.write("Relu"), &options).unwrap(), first));
        assert_eq!(bench.loaded(), 4);
        // A path says nothing: the file may have changed.
        let path = bench.write("Abs");
        drop(store.load(&path, &options).unwrap());
        fs::write(&path, unary(Node::new("Exp")).to_bytes()).unwrap();
        drop(store.load(&path, &options).unwrap());
        assert_eq!(bench.loaded(), 6);
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first() {
        let bench = Bench::new();
        let one = 2 * fs::metadata(bench.write("Relu")).unwrap().len();
        let store = SessionStore::new(&bench.engine, 2 * one + one / 2);
        let mut load = |op: &str| drop(store.load(&bench.write(op), &LoadOptions::default()).unwrap());
        ["Relu", "Tanh", "Relu", "Ceil"].into_iter().for_each(&mut load);
        assert_eq!(bench.loaded(), 3);
        load("Relu");
        assert_eq!(bench.loaded(), 3);
        load("Tanh");
        assert_eq!(bench.loaded(), 4);
        let nothing = SessionStore::new(&bench.engine, 0);
        drop(nothing.load(&bench.write("Relu"), &LoadOptions::default()).unwrap());
        assert!(nothing.kept.borrow().idle.is_empty());
    }

    #[test]
    fn outputs_that_are_known_need_no_session() {
        let bench = Bench::new();
        let store = SessionStore::new(&bench.engine, 1 << 20);
        let options = LoadOptions::default();
        {
            let mut session = store.load(&bench.write("Neg"), &options).unwrap();
            assert!(session.known(&sample(1.0)).is_none());
            let outputs = Rc::new(session.run(&sample(1.0)).unwrap());
            session.remember(&sample(1.0), &outputs);
        }
        store.kept.borrow_mut().idle.clear();
        let mut session = store.load(&bench.write("Neg"), &options).unwrap();
        assert_eq!(bench.loaded(), 1);
        let known = session.known(&sample(1.0)).unwrap();
        assert_eq!(known[0].1.tensor().unwrap().to_f32s().unwrap(), [-1.0; 3]);
        assert!(session.known(&sample(2.0)).is_none());
        session.run(&sample(2.0)).unwrap();
        assert_eq!(bench.loaded(), 2);
    }

    #[test]
    fn outputs_stay_within_their_share_and_push_out_those_of_other_models() {
        let bench = Bench::new();
        // A share of 40 bytes: ten numbers.
        let store = SessionStore::new(&bench.engine, 160);
        let session = |op: &str| store.load(&bench.write(op), &LoadOptions::default()).unwrap();
        let outputs = |count: usize| -> Outputs {
            Rc::new(vec![("y".to_owned(), Datum::Tensor(Tensor::from_f32s(&[count], &vec![0.0; count])))])
        };
        let (one, other) = (session("Neg"), session("Abs"));
        one.remember(&sample(1.0), &outputs(6));
        one.remember(&sample(2.0), &outputs(6));
        assert!(one.known(&sample(1.0)).is_some() && one.known(&sample(2.0)).is_none());
        other.remember(&sample(1.0), &outputs(6));
        assert!(one.known(&sample(1.0)).is_none() && other.known(&sample(1.0)).is_some());
        other.remember(&sample(2.0), &outputs(11));
        assert!(other.known(&sample(1.0)).is_some());
    }
}

//! Collecting: what is cached is read, the rest is computed group by group.

use super::{
    append::{Append, Mask, RowSizes, resolve},
    error::StatisticsError,
    request::Request,
    store::{self, StatisticFile},
};
use crate::{
    Child, ContentIds, LoadOptions, Part, RuntimeError, SampleSet, SetSpec,
    content::short,
    wire::{Fold, GatherEntry, GatherJob, Gathered, Output},
};
use lathe_analysis::{Bindings, Cost, Facts, Magnitudes, Rows, Spread, SymMatrix, View};
use lathe_ir::{Model, ScopeId};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

/// Bytes that a process with the runtime in it takes before it holds a model.
const RUNTIME_ITSELF: u64 = 64 << 20;

/// How statistics are collected.
#[derive(Debug, Clone)]
pub struct CollectOptions {
    /// Threads, provider and device. With `optimize` off, values are those of the model as it is written.
    pub load: LoadOptions,
    /// Bytes that collecting may take, as estimated: statistics that do not fit together are computed in groups, each
    /// of which runs what it needs of the model again.
    pub memory: u64,
    /// Where results are kept and found again; must be writable.
    pub cache: PathBuf,
    /// Bytes that the cache may hold; those that were not used for longest go first.
    pub cache_limit: u64,
    /// Which input says which tokens are padding.
    pub mask: MaskInput,
}

/// The input that marks padded tokens with zeros: whole numbers or booleans, `[batch, tokens]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum MaskInput {
    /// The one whose name says so (`mask`, `…attention_mask`, `…attn_mask`), if there is one.
    #[default]
    Auto,
    /// None: every row counts.
    None,
    /// This one.
    Named(String),
}

impl CollectOptions {
    /// Runs as `load` says, in a quarter of this machine's memory, and keeps up to 8 GiB in `cache`.
    pub fn new(load: LoadOptions, cache: PathBuf) -> CollectOptions {
        CollectOptions { load, memory: quarter_of_memory(), cache, cache_limit: 8 << 30, mask: MaskInput::Auto }
    }
}

/// How many rows a statistic is made of, and how many were left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Rows that count.
    pub rows: u64,
    /// Rows that the mask calls padding.
    pub padded: u64,
    /// Other rows that hold a NaN or an infinity.
    pub broken: u64,
}

/// One array of a statistic.
#[derive(Debug, Clone, PartialEq)]
pub struct Field {
    /// What it is, as [`Request`] names it: `sum`.
    pub name: String,
    /// Its shape; empty for one number.
    pub dims: Vec<usize>,
    /// Its elements, the last axis fastest.
    pub data: Vec<f64>,
}

/// Statistics of a model on a set, on disk. Everything is a plain sum over the rows that count, in float64.
#[derive(Debug)]
pub struct Statistics {
    files: BTreeMap<Request, PathBuf>,
    /// What was done to get them.
    pub work: Work,
}

/// What collecting took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Statistics that were found in the cache.
    pub cached: usize,
    /// Statistics that were computed.
    pub computed: usize,
    /// Files of the cache that were damaged and have been computed again.
    pub damaged: usize,
    /// Runs over the set.
    pub groups: usize,
    /// Samples in each; 0 if nothing was computed.
    pub samples: usize,
}

impl Statistics {
    /// Collects `requests` for `model` on `set`, in the worker.
    ///
    /// Finished groups are kept even if a later one fails, so that a second attempt goes on from there.
    pub fn collect(
        child: &Child,
        model: &Model,
        set: &SetSpec,
        requests: &[Request],
        options: &CollectOptions,
    ) -> Result<Statistics, StatisticsError> {
        let worker =
            Gatherer { engine: child.hello()?.0, content: child.content(), gather: &|jobs| child.gather(jobs) };
        Statistics::collect_with(&worker, model, set, requests, options)
    }

    pub(super) fn collect_with(
        worker: &Gatherer<'_>,
        model: &Model,
        set: &SetSpec,
        requests: &[Request],
        options: &CollectOptions,
    ) -> Result<Statistics, StatisticsError> {
        let requests: BTreeSet<&Request> = requests.iter().collect();
        for rows in requests.iter().flat_map(|r| r.rows()) {
            resolve(model, &rows.value)?;
        }
        let name = match &options.mask {
            MaskInput::Named(name) => Some(name.as_str()),
            _ => None,
        };
        let mask = if options.mask == MaskInput::None { None } else { Mask::find(model, name)? };
        // The copies need other amounts of memory than the model, and would choose other batches.
        let batch = Some(SampleSet::open(set, model)?.batch_size());
        let set = &SetSpec { batch, ..set.clone() };
        let mask_name = format!("{:?}", options.mask);
        let key = worker.content.of_run(&worker.engine, model, set, &options.load, &mask_name);
        let unread = |source| StatisticsError::Io { path: set.path.clone(), source };
        let folder = options.cache.join(short(&key.map_err(unread)?));
        let failed = |source| StatisticsError::Io { path: folder.clone(), source };
        fs::create_dir_all(&folder).map_err(failed)?;
        let mut work = Work::default();
        let mut files = BTreeMap::new();
        let mut missing = Vec::new();
        for request in requests {
            let file = store::file_of(&folder, request);
            match store::read(&file, request) {
                Ok(_) => work.cached += 1,
                Err(error) => {
                    work.damaged += usize::from(error.kind() != io::ErrorKind::NotFound);
                    missing.push(request);
                }
            }
            files.insert(request.clone(), file);
        }
        if !missing.is_empty() {
            let collector = Collector { worker, model, facts: Facts::infer(model), set, mask, options };
            collector.run(missing, &files, &mut work)?;
        }
        // The folder counts as used now, for the order in which folders are removed.
        let _ = fs::write(folder.join("used"), b"");
        store::evict(&options.cache, &folder, options.cache_limit);
        Ok(Statistics { files, work })
    }

    /// The requests that were collected.
    pub fn requests(&self) -> impl Iterator<Item = &Request> {
        self.files.keys()
    }

    /// XᵀX over the rows that count, `[k, k]`. Divide by [`Counts::rows`] for the mean.
    pub fn gram(&self, rows: &Rows) -> Result<SymMatrix, StatisticsError> {
        Ok(self.gram_and_sum(rows)?.0)
    }

    /// The same with the sum of every feature, `[k]`, and how many rows both are of.
    pub fn gram_and_sum(&self, rows: &Rows) -> Result<(SymMatrix, Vec<f64>, Counts), StatisticsError> {
        let mut stored = self.stored(&Request::Gram(rows.clone()))?;
        let at = index_of(&stored, "gram").expect("a Gram matrix is stored under this name");
        let size = stored.head.arrays[at].dims[0];
        let upper = std::mem::take(&mut stored.data[at]);
        let gram = SymMatrix::from_upper(size, upper).expect("a stored triangle has the length that its size says");
        let sum = index_of(&stored, "sum").map(|at| std::mem::take(&mut stored.data[at])).unwrap_or_default();
        Ok((gram, sum, counts_in(&stored)))
    }

    /// How large the numbers of every feature are, as shares and means over the rows that count; `None` if none counts.
    pub fn magnitudes(&self, rows: &Rows) -> Result<Option<Magnitudes>, StatisticsError> {
        let request = Request::Magnitudes(rows.clone());
        let counted = self.counts(&request)?.rows;
        let mean = |name: &str| -> Result<Vec<f64>, StatisticsError> {
            let mut sums = self.field(&request, name)?.data;
            sums.iter_mut().for_each(|sum| *sum /= counted.max(1) as f64);
            Ok(sums)
        };
        let (share_below, square_below) = (mean("below")?, mean("square_below")?);
        let magnitudes = Magnitudes { share_below, square_below, square: mean("square_sum")?, rows: counted };
        Ok((counted > 0).then_some(magnitudes))
    }

    /// The least and the largest number of every feature that was counted for a spread.
    pub fn extremes(&self, rows: &Rows) -> Result<Vec<(f64, f64)>, StatisticsError> {
        let request = Request::Spread(rows.clone());
        let (least, largest) = (self.field(&request, "least")?.data, self.field(&request, "largest")?.data);
        Ok(least.into_iter().zip(largest).collect())
    }

    /// How the numbers are spread; `None` if none counts.
    pub fn spread(&self, rows: &Rows) -> Result<Option<Spread>, StatisticsError> {
        let request = Request::Spread(rows.clone());
        let field = |name: &str| -> Result<Vec<f64>, StatisticsError> { Ok(self.field(&request, name)?.data) };
        let least = field("least")?.into_iter().fold(f64::INFINITY, f64::min);
        let largest = field("largest")?.into_iter().fold(f64::NEG_INFINITY, f64::max);
        Ok(Spread::new(least, largest, &field("spread")?))
    }

    /// One array of a statistic with its shape, by the name that [`Request`] gives it, and matrices in full.
    pub fn field(&self, request: &Request, name: &str) -> Result<Field, StatisticsError> {
        let missing = || StatisticsError::NotCollected { request: format!("{} {name}", request.label()) };
        self.fields(request)?.into_iter().find(|f| f.name == name).ok_or_else(missing)
    }

    /// All arrays of a statistic, symmetric matrices in full.
    pub fn fields(&self, request: &Request) -> Result<Vec<Field>, StatisticsError> {
        let stored = self.stored(request)?;
        let arrays = stored.head.arrays.into_iter().zip(stored.data).filter(|(a, _)| a.field != "counts");
        let full = arrays.map(|(array, data)| {
            let size = array.dims.first().copied().unwrap_or_default();
            let data = if array.triangle {
                SymMatrix::from_upper(size, data)
                    .expect("a stored triangle has the length that its size says")
                    .to_full()
            } else {
                data
            };
            Field { name: array.field, dims: array.dims, data }
        });
        Ok(full.collect())
    }

    /// How many rows a statistic is made of.
    pub fn counts(&self, request: &Request) -> Result<Counts, StatisticsError> {
        Ok(counts_in(&self.stored(request)?))
    }

    fn stored(&self, request: &Request) -> Result<StatisticFile, StatisticsError> {
        let missing = || StatisticsError::NotCollected { request: request.label() };
        let path = self.files.get(request).ok_or_else(missing)?;
        store::read(path, request).map_err(|source| StatisticsError::Io { path: path.clone(), source })
    }
}

fn counts_in(stored: &StatisticFile) -> Counts {
    let counts = index_of(stored, "counts").map(|at| &stored.data[at][..]);
    let &[rows, padded, broken] = counts.unwrap_or_default() else { return Counts::default() };
    Counts { rows: rows as u64, padded: padded as u64, broken: broken as u64 }
}

fn index_of(stored: &StatisticFile, field: &str) -> Option<usize> {
    stored.head.arrays.iter().position(|a| a.field == field)
}

/// Parts of a set at most. The plan fixes them, not the number of workers: where they begin shows in the last bits of sums.
const PARTS: usize = 4;

/// The parts of a set that statistics are computed over, of whole batches.
fn parts(set: &SetSpec, model: &Model) -> Result<Vec<SetSpec>, StatisticsError> {
    let samples = SampleSet::open(set, model)?;
    let units = samples.spread(samples.len());
    let batches = units.len().div_ceil(samples.batch_size().max(1));
    let size = batches.div_ceil(PARTS) * samples.batch_size().max(1);
    if batches < PARTS {
        return Ok(vec![set.clone()]);
    }
    let part = |chosen: &[usize]| SetSpec { chosen: Some(chosen.to_vec()), part: Part::All, ..set.clone() };
    Ok(units.chunks(size).map(part).collect())
}

/// Adds up what files of parts hold, in their order, and writes it where it is to be found.
fn join(entry: &GatherEntry, parts: &[PathBuf]) -> io::Result<()> {
    let mut sums: Option<StatisticFile> = None;
    for part in parts {
        let more = store::read(part, &entry.request)?;
        fs::remove_file(part)?;
        let Some(sums) = &mut sums else {
            sums = Some(more);
            continue;
        };
        for ((output, sum), more) in entry.outputs.iter().zip(&mut sums.data).zip(more.data) {
            if sum.len() != more.len() {
                return Err(io::Error::other("the features of a tensor vary from sample to sample"));
            }
            let both = sum.iter_mut().zip(more);
            match output.fold {
                Fold::Sum | Fold::Triangle | Fold::Spread => both.for_each(|(sum, x)| *sum += x),
                Fold::Max => both.for_each(|(sum, x)| *sum = sum.max(x)),
                Fold::Min => both.for_each(|(sum, x)| *sum = sum.min(x)),
                Fold::First => {}
            }
        }
    }
    let StatisticFile { head, data } = sums.ok_or_else(|| io::Error::other("no part was computed"))?;
    store::write(&entry.file, &head, &data.iter().map(|array| &array[..]).collect::<Vec<_>>())
}

/// Runs copies, which share nothing; what came of each.
pub(super) type Gather<'a> = dyn Fn(&[GatherJob]) -> Result<Vec<Gathered>, RuntimeError> + 'a;

/// Who runs the copies.
pub(super) struct Gatherer<'a> {
    /// The engine's name with its version.
    pub engine: String,
    /// What files are.
    pub content: &'a ContentIds,
    pub gather: &'a Gather<'a>,
}

struct Collector<'a> {
    worker: &'a Gatherer<'a>,
    model: &'a Model,
    facts: Facts,
    set: &'a SetSpec,
    mask: Option<Mask>,
    options: &'a CollectOptions,
}

impl Collector<'_> {
    fn run(
        &self,
        mut requests: Vec<&Request>,
        files: &BTreeMap<Request, PathBuf>,
        work: &mut Work,
    ) -> Result<(), StatisticsError> {
        let failed = |source| StatisticsError::Io { path: self.options.cache.clone(), source };
        let scratch = tempfile::Builder::new().prefix("run-").tempdir_in(&self.options.cache).map_err(failed)?;
        let (sizes, base) = self.sizes(&requests, scratch.path())?;
        // Early values first: then a group runs only the beginning of the model.
        let depth = self.depths();
        let latest = |r: &Request| r.rows().iter().filter_map(|x| depth.get(x.value.as_str()).copied()).max();
        requests.sort_by_key(|r| latest(r));
        for group in self.groups(&requests, &sizes, base)? {
            let mut append = Append::new(self.model, &self.facts, &sizes, self.mask)?;
            let mut entries = Vec::new();
            for request in group {
                let outputs = append.request(request)?;
                entries.push(GatherEntry { request: request.clone(), outputs, file: files[request].clone() });
            }
            work.computed += entries.len();
            work.samples = self.gather_parts(&append.finish(), scratch.path(), &entries)?;
            work.groups += 1;
        }
        Ok(())
    }

    /// Computes statistics over every part of the set, and adds them up in the order of the parts: the sums are the same
    /// whoever computes which. Returns the samples.
    fn gather_parts(&self, copy: &Model, scratch: &Path, entries: &[GatherEntry]) -> Result<usize, StatisticsError> {
        let parts = parts(self.set, self.model)?;
        let path = |part: usize, entry: usize| scratch.join(format!("{part}-{entry}.stat"));
        let of_part = |part: usize| -> Vec<GatherEntry> {
            let file = |entry: usize| if parts.len() == 1 { entries[entry].file.clone() } else { path(part, entry) };
            entries.iter().enumerate().map(|(at, entry)| GatherEntry { file: file(at), ..entry.clone() }).collect()
        };
        let model = scratch.join("statistics.onnx");
        copy.write_linked(&model)?;
        let job = |(at, set): (usize, &SetSpec)| GatherJob {
            model: model.clone(),
            set: set.clone(),
            first_only: false,
            options: self.load(),
            entries: of_part(at),
            direct: Vec::new(),
        };
        let jobs: Vec<GatherJob> = parts.iter().enumerate().map(job).collect();
        let samples = (self.worker.gather)(&jobs)?.iter().map(|gathered| gathered.samples).sum();
        for (at, entry) in entries.iter().enumerate().filter(|_| parts.len() > 1) {
            let files: Vec<PathBuf> = (0..parts.len()).map(|part| path(part, at)).collect();
            join(entry, &files).map_err(|source| StatisticsError::Io { path: entry.file.clone(), source })?;
        }
        Ok(samples)
    }

    /// How copies are run. Batches are large: packing weights once and for all saves little time and takes their memory
    /// twice.
    fn load(&self) -> LoadOptions {
        LoadOptions { lean: true, ..self.options.load.clone() }
    }

    /// What outputs of a copy that are sizes are for the first batch, where that follows from the sizes of its inputs.
    fn known_sizes(&self, copy: &Model, direct: &[Output]) -> Result<Option<Vec<Vec<f64>>>, StatisticsError> {
        let Some(batch) = SampleSet::open(self.set, self.model)?.batches().next().transpose()? else { return Ok(None) };
        let graph = &copy.graph;
        let mut bindings = Bindings::default();
        for (name, tensor) in &batch.inputs {
            let input = graph.find_value(name).map(|value| graph.value(value));
            if let Some(stated) = input.and_then(|value| value.ty.as_ref()).and_then(|ty| ty.shape()) {
                bindings.set_input(stated, tensor.dims());
            }
        }
        let facts = Facts::infer(copy);
        let sizes = |output: &Output| -> Option<Vec<f64>> {
            let contents = facts.contents(graph.find_value(&output.value)?)?;
            contents.elements().iter().map(|e| bindings.evaluate(e.as_ref()?).map(|size| size as f64)).collect()
        };
        Ok(direct.iter().map(sizes).collect())
    }

    /// What outputs of a copy are for the first batch.
    fn show(&self, copy: &Model, scratch: &Path, direct: Vec<Output>) -> Result<Vec<Vec<f64>>, StatisticsError> {
        let model = scratch.join("sizes.onnx");
        copy.write_linked(&model)?;
        let (set, options) = (self.set.clone(), self.load());
        let job = GatherJob { model, set, first_only: true, options, entries: Vec::new(), direct };
        Ok((self.worker.gather)(&[job])?.pop().unwrap_or_default().direct)
    }

    /// The sizes of what is asked for in the first batch, and the bytes that running the model itself takes.
    fn sizes(&self, requests: &[&Request], scratch: &Path) -> Result<(RowSizes, u64), StatisticsError> {
        let rows: BTreeSet<&Rows> = requests.iter().flat_map(|r| r.rows()).collect();
        let empty = RowSizes::new();
        let mut append = Append::new(self.model, &self.facts, &empty, self.mask)?;
        let mut direct = rows.iter().map(|r| append.shapes(r)).collect::<Result<Vec<_>, _>>()?;
        let graph = &self.model.graph;
        let inputs: Vec<_> = graph.main().inputs().iter().copied().filter(|&v| self.facts.shape(v).is_some()).collect();
        direct.extend(inputs.iter().map(|&v| append.size_of(v)));
        let copy = append.finish();
        let shown = match self.known_sizes(&copy, &direct)? {
            Some(known) => known,
            None => self.show(&copy, scratch, direct)?,
        };
        let shown: Vec<Vec<usize>> = shown.iter().map(|s| s.iter().map(|&d| d as usize).collect()).collect();
        let mut bindings = Bindings::default();
        for (&input, sizes) in inputs.iter().zip(&shown[rows.len()..]) {
            if let Some(stated) = graph.value(input).ty.as_ref().and_then(|t| t.shape()) {
                bindings.set_input(stated, sizes);
            }
        }
        // What the copies leave out (a language model's output, above all) takes no memory.
        let depths = self.depths();
        let mut needed = Append::new(self.model, &self.facts, &empty, self.mask)?;
        if let Some(last) = rows.iter().max_by_key(|r| depths.get(r.value.as_str())) {
            needed.shapes(last)?;
        }
        let needed = needed.finish();
        let cost = Cost::unfolded(&needed, &Facts::infer(&needed), &bindings);
        let sizes = rows.into_iter().cloned().zip(shown).collect();
        Ok((sizes, RUNTIME_ITSELF + cost.weight_bytes + cost.activation_peak_bytes))
    }

    /// When each value of the main graph is computed.
    fn depths(&self) -> BTreeMap<&str, usize> {
        let graph = &self.model.graph;
        let order = graph.sorted(ScopeId::MAIN).unwrap_or_else(|_| graph.nodes(ScopeId::MAIN).collect());
        let outputs = order.iter().enumerate().flat_map(|(at, &id)| {
            graph.node(id).outputs().iter().flatten().map(move |&v| (graph.value(v).name.as_str(), at + 1))
        });
        outputs.collect()
    }

    /// Requests that fit into memory together.
    fn groups<'r>(
        &self,
        requests: &[&'r Request],
        sizes: &RowSizes,
        base: u64,
    ) -> Result<Vec<Vec<&'r Request>>, StatisticsError> {
        // Allocators round up and keep what was freed; a quarter is left to them.
        let allowed = self.options.memory / 4 * 3;
        let mut groups: Vec<Vec<&Request>> = Vec::new();
        let (mut kept, mut passing) = (0u64, 0u64);
        for &request in requests {
            let (stays, passes) = footprint(self.model, request, sizes);
            if stays + passes > allowed {
                let (needed, allowed) = ((stays + passes) >> 20, self.options.memory >> 20);
                return Err(StatisticsError::TooLarge { request: request.label(), needed, allowed });
            }
            let fits = base + kept + stays + passing.max(passes) <= allowed;
            match groups.last_mut().filter(|_| fits) {
                Some(group) => group.push(request),
                None => {
                    groups.push(vec![request]);
                    (kept, passing) = (0, 0);
                }
            }
            kept += stays;
            passing = passing.max(passes);
        }
        Ok(groups)
    }
}

/// Bytes of a statistic: what stays until its group is done, and what is needed while it is computed.
fn footprint(model: &Model, request: &Request, sizes: &RowSizes) -> (u64, u64) {
    let shape = |rows: &Rows| -> (u64, u64) {
        let sizes = &sizes[rows];
        let axis = match rows.view {
            View::Axis(axis) if axis < 0 => (axis + sizes.len() as i64) as usize,
            View::Axis(axis) => axis as usize,
            View::Position(_) => sizes.len() - 1,
            View::Patches(_) => 1,
        };
        let features = sizes.get(axis).copied().unwrap_or(1) as u64;
        let all: u64 = sizes.iter().map(|&s| s as u64).product();
        (features, all)
    };
    // The rows as they are, turned, without broken rows, and twice as wide.
    let passing = |(_, all): (u64, u64)| all * 4 * 5;
    match request {
        Request::Gram(x) => {
            let x = shape(x);
            // Out of the runtime in float32 (float64 where it is narrow), and half a matrix of sums in float64.
            (x.0 * x.0 * (4 + 4), passing(x) + x.0 * x.0 * 24)
        }
        Request::Cross(x, y) => {
            let (x, y) = (shape(x), shape(y));
            (x.0 * y.0 * (4 + 8), passing(x) + passing(y) + x.0 * y.0 * 24)
        }
        Request::Columns(x) => (shape(x).0 * 64, passing(shape(x))),
        Request::Cosine(x, y) => (128, passing(shape(x)) + passing(shape(y))),
        Request::Magnitudes(x) => {
            let (features, all) = shape(x);
            (features * Magnitudes::steps().len() as u64 * 32, 2 * passing((features, all)))
        }
        Request::Range(x) => (shape(x).0 * 32, passing(shape(x))),
        Request::Spread(x) => {
            let (features, all) = shape(x);
            // The numbers of a batch leave the runtime and are counted.
            (features * 32 + all * 8 + Spread::BINS as u64 * 24, passing((features, all)))
        }
        Request::Skip(skip) => {
            let (features, all) = shape(&skip.rows);
            let weight = model.graph.find_value(&skip.weight).and_then(|v| model.graph.constant(v));
            let numbers = weight.map_or(0, |t| t.len() as u64);
            // The weight turned and squared, and products in float32 and float64.
            let products = all / features.max(1) * (numbers / features.max(1)) * (4 + 8 + 8);
            (256, 2 * passing((features, all)) + numbers * 4 * 3 + products)
        }
    }
}

/// A quarter of this machine's memory; 2 GiB where it is not known.
pub fn quarter_of_memory() -> u64 {
    let kib = || {
        let text = fs::read_to_string("/proc/meminfo").ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    kib().map_or(2 << 30, |kib| kib.saturating_mul(1024) / 4)
}

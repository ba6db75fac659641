//! ONNX Runtime: the only module that mentions `ort`.

mod assignment;
mod plugins;
mod providers;
mod registration;
mod timed;
mod values;

pub use plugins::InstalledPlugin;
pub use providers::{PROVIDERS, Provider, provider_name};

use self::values::{ValueError, from_ort, to_ort};

use crate::{
    Datum, RuntimeError,
    engine::{Engine, LoadOptions, Session, Source, Timed},
    library::{FoundLibrary, LibrarySearch, Unusable},
};
use lathe_ir::Tensor;
use ort::{
    environment::Environment,
    logging::LogLevel,
    session::{
        SessionInputValue,
        builder::{GraphOptimizationLevel, SessionBuilder},
    },
};
use std::{
    borrow::Cow,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

/// ONNX Runtime, loaded into this process. A process can load it once.
#[derive(Debug)]
pub struct OrtEngine {
    environment: Environment,
    library: FoundLibrary,
    version: String,
    tried: Vec<String>,
    plugins: Vec<InstalledPlugin>,
}

static ENGINE: OnceLock<OrtEngine> = OnceLock::new();
static LOADING: Mutex<()> = Mutex::new(());

impl OrtEngine {
    /// The ONNX Runtime of this process; the first call finds and loads it, later ones return what is loaded.
    pub fn start(search: &LibrarySearch) -> Result<&'static OrtEngine, RuntimeError> {
        let _one_at_a_time = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(engine) = ENGINE.get() {
            return Ok(engine);
        }
        let mut environment = None;
        let discovery = search.find(&mut |path| {
            environment = Some(load(path)?);
            Ok(())
        })?;
        let tried: Vec<String> = discovery.tried.iter().map(ToString::to_string).collect();
        let (Some(environment), Some(library)) = (environment, discovery.found) else {
            return Err(RuntimeError::NoLibrary { tried });
        };
        let version = version_in(ort::info()).or_else(|| version_in(&library.path.to_string_lossy()));
        let version = version.unwrap_or_else(|| "of unknown version".to_owned());
        // Packages lie beside that of the library, or where `doctor` installs them.
        let packages = library.path.ancestors().nth(3).map(Path::to_owned);
        let beside = library.path.parent().map(Path::to_owned);
        let folders: Vec<PathBuf> = packages.into_iter().chain(beside).chain(search.data_dir.clone()).collect();
        let plugins = plugins::installed(&folders);
        Ok(ENGINE.get_or_init(|| OrtEngine { environment, library, version, tried, plugins }))
    }

    /// The library and how it was found.
    pub fn library(&self) -> &FoundLibrary {
        &self.library
    }

    /// Every place that was looked at to find it, one line each.
    pub fn tried(&self) -> &[String] {
        &self.tried
    }

    /// The version of the library: `1.32.0`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Providers that are installed as libraries of their own.
    pub fn plugins(&self) -> &[InstalledPlugin] {
        &self.plugins
    }

    /// The devices that a plugin offers, one line each. Loads it into this process.
    pub fn devices_of(&self, plugin: &InstalledPlugin) -> Result<Vec<String>, String> {
        let named = registration::plugin(&self.environment, &plugin.name, &plugin.path);
        let named = named.map_err(|error| error.to_string())?;
        let own = format!("{named}: ");
        Ok(self.devices().iter().filter_map(|line| line.strip_prefix(&own).map(str::to_owned)).collect())
    }

    /// The devices the library sees, one line each: `CPUExecutionProvider: Intel CPU`.
    pub fn devices(&self) -> Vec<String> {
        let describe = |device: ort::device::Device<'_>| {
            let hardware = device.hardware_device();
            let vendor = hardware.vendor().unwrap_or_default();
            format!("{}: {vendor} {:?}", device.ep().unwrap_or("unknown"), hardware.ty())
        };
        self.environment.devices().map(describe).collect()
    }

    /// A builder, and the name that the nodes of its provider carry.
    // The binding's own error hands the builder back, whatever its size.
    #[allow(clippy::result_large_err)]
    fn builder(&self, options: &LoadOptions, timing: bool) -> Result<(SessionBuilder, String), RuntimeError> {
        let refused = |message: String| RuntimeError::Load { engine: self.name(), message };
        let level = if options.optimize { GraphOptimizationLevel::All } else { GraphOptimizationLevel::Disable };
        let builder = ort::session::Session::builder(&self.environment).map_err(|e| refused(sentence(e.message())))?;
        let configured = builder
            .with_optimization_level(level)
            .and_then(|b| b.with_intra_threads(options.threads))
            .and_then(|b| b.with_intra_op_spinning(options.spin))
            .and_then(|b| b.with_prepacking(!options.lean))
            .and_then(|b| if options.lean { b.with_execution_providers([unpooled()]) } else { Ok(b) })
            .and_then(|b| b.with_log_level(LogLevel::Fatal));
        let builder = configured.map_err(|e| refused(sentence(e.message())))?;
        let engine = (self.name(), self.library.path.as_path());
        registration::register(&self.environment, builder, options, (&engine.0, engine.1), &self.plugins, timing)
    }

    fn commit(&self, mut builder: SessionBuilder, source: Source<'_>) -> Result<ort::session::Session, RuntimeError> {
        // The binding panics on input and output types it does not know (opaque ones, for instance).
        let committed = catch_unwind(AssertUnwindSafe(|| match source {
            Source::Bytes(bytes) => builder.commit_from_memory(bytes),
            Source::Path(path) => builder.commit_from_file(path),
        }));
        let message = match committed {
            Ok(Ok(session)) => return Ok(session),
            Ok(Err(error)) => sentence(error.message()),
            Err(_) => "an input or output has a type that cannot be passed to it".to_owned(),
        };
        Err(RuntimeError::Load { engine: self.name(), message })
    }
}

/// The CPU without a pool: what is freed goes back to the system.
fn unpooled() -> ort::ep::ExecutionProviderDispatch {
    ort::ep::CPU::default().with_arena_allocator(false).build()
}

/// Loads the library at `path` and creates the process's environment.
fn load(path: &Path) -> Result<Environment, Unusable> {
    // A library that lacks the expected entry points makes the binding panic rather than fail.
    let environment = catch_unwind(|| {
        let builder = ort::init_from(path).map_err(|e| {
            let message = e.to_string();
            too_old(&message).unwrap_or_else(|| Unusable::Refused(sentence(&message)))
        })?;
        // Whatever matters comes back as an error; the runtime's own log would only be printed a second time. What it
        // logs about a provider that it cannot load says more than its error, and is kept.
        let logger = Arc::new(|level: LogLevel, _: &str, _: &str, _: &str, message: &str| {
            if matches!(level, LogLevel::Error | LogLevel::Fatal) {
                registration::complain(message);
            }
        });
        let environment = builder.with_name("lathe").with_telemetry(false).with_logger(logger);
        let environment = environment.build().map_err(|e| Unusable::Refused(sentence(e.message())))?;
        environment.set_log_level(LogLevel::Fatal);
        Ok(environment)
    });
    environment.unwrap_or(Err(Unusable::Foreign))
}

impl Engine for OrtEngine {
    fn load(&self, source: Source<'_>, options: &LoadOptions) -> Result<Box<dyn Session>, RuntimeError> {
        let (builder, _) = self.builder(options, false)?;
        Ok(Box::new(OrtSession { session: self.commit(builder, source)?, engine: self.name() }))
    }

    fn timed(
        &self,
        source: Source<'_>,
        options: &LoadOptions,
        profile: Option<&Path>,
    ) -> Result<Box<dyn Timed>, RuntimeError> {
        timed::load(self, source, options, profile)
    }

    fn name(&self) -> String {
        format!("ONNX Runtime {}", self.version)
    }

    fn providers(&self) -> Vec<String> {
        providers::available()
    }
}

struct OrtSession {
    session: ort::session::Session,
    engine: String,
}

impl Session for OrtSession {
    fn run(&mut self, inputs: &[(String, Tensor)]) -> Result<Vec<(String, Datum)>, RuntimeError> {
        let mut outputs = Vec::new();
        self.visit(inputs, &mut |name, datum| {
            outputs.push((name.to_owned(), datum));
            Ok(())
        })?;
        Ok(outputs)
    }

    fn visit(
        &mut self,
        inputs: &[(String, Tensor)],
        take: &mut dyn FnMut(&str, Datum) -> Result<(), RuntimeError>,
    ) -> Result<(), RuntimeError> {
        let value = |value: String, why: ValueError| RuntimeError::Value {
            value,
            engine: self.engine.clone(),
            message: why.to_string(),
        };
        let mut feeds: Vec<(Cow<'_, str>, SessionInputValue<'_>)> = Vec::with_capacity(inputs.len());
        for (name, tensor) in inputs {
            let fed = to_ort(tensor).map_err(|why| value(format!("input `{name}`"), why))?;
            feeds.push((Cow::Borrowed(name.as_str()), fed.into()));
        }
        // The binding panics on an output that is an absent optional.
        let ran = catch_unwind(AssertUnwindSafe(|| self.session.run(feeds)));
        let outputs = match ran {
            Ok(Ok(outputs)) => outputs,
            Ok(Err(error)) => {
                let (node, message) = failed_node(&sentence(error.message()));
                return Err(RuntimeError::of_run(&self.engine, node, message));
            }
            Err(_) => {
                let message = "an output is of a type that cannot be taken from it".to_owned();
                return Err(RuntimeError::Run { engine: self.engine.clone(), node: None, message });
            }
        };
        for (name, output) in outputs {
            let datum = from_ort(output).map_err(|why| value(format!("output `{name}`"), why))?;
            take(name, datum)?;
        }
        Ok(())
    }
}

/// What is wrong with a library of a version before the first that serves, out of what the binding says about it.
fn too_old(message: &str) -> Option<Unusable> {
    let (_, after) = message.split_once("expected version >= '")?;
    let (needed, after) = after.split_once('\'')?;
    let (_, after) = after.split_once("got '")?;
    let (found, _) = after.split_once('\'')?;
    Some(Unusable::TooOld { found: found.to_owned(), needed: needed.trim_end_matches(".x").to_owned() })
}

/// One line out of what ONNX Runtime says.
fn sentence(message: &str) -> String {
    let mut text = message.split_whitespace().collect::<Vec<_>>().join(" ");
    while text.ends_with('.') {
        text.pop();
    }
    text
}

/// Separates the node that ONNX Runtime blames, the innermost one if it lies in a subgraph, from the rest of its message.
fn failed_node(message: &str) -> (Option<String>, String) {
    let split = |message: &str| {
        let (_, after) = message.split_once("while running ")?;
        let (op, after) = after.split_once(" node. Name:'")?;
        let (name, after) = after.split_once("' Status Message: ")?;
        Some((format!("`{name}` ({op})"), after.to_owned()))
    };
    let (mut node, mut rest) = (None, message.to_owned());
    while let Some((inner, after)) = split(&rest) {
        (node, rest) = (Some(inner), after);
    }
    (node, rest)
}

/// The first `1.32.0` in a text.
fn version_in(text: &str) -> Option<String> {
    let mut words = text.split(|c: char| !c.is_ascii_digit() && c != '.');
    let version = |word: &str| {
        let parts: Vec<&str> = word.split('.').filter(|p| !p.is_empty()).collect();
        (parts.len() >= 2 && parts[0] == "1").then(|| parts.join("."))
    };
    words.find_map(version)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Build, engine, unary};
    use lathe_ir::{DataType, Node, Type, TypeKind};

    fn run(model: &lathe_ir::Model, inputs: &[(&str, Tensor)]) -> Result<Vec<(String, Datum)>, RuntimeError> {
        let inputs: Vec<(String, Tensor)> = inputs.iter().map(|(n, t)| ((*n).to_owned(), t.clone())).collect();
        let bytes = model.to_bytes();
        engine().load(Source::Bytes(&bytes), &LoadOptions { threads: 1, ..LoadOptions::default() })?.run(&inputs)
    }

    #[test]
    fn knows_its_version_and_providers() {
        assert!(engine().version().starts_with("1."), "{}", engine().version());
        assert!(engine().providers().contains(&"cpu".to_owned()));
    }

    #[test]
    fn passes_every_element_type_through() {
        use DataType::*;
        for dtype in [Float, Double, Float16, Bfloat16, Int8, Int16, Int32, Int64, Uint8, Uint16, Uint32, Uint64, Bool]
        {
            let mut build = Build::new();
            let x = build.input("x", dtype, &["n"]);
            let y = build.node(Node::new("Identity"), &[x], "y");
            let model = build.output(y, Type::unshaped(dtype)).model();
            let tensor = Tensor::from_f64s(dtype, &[3], &[0.0, 1.0, 5.0]).unwrap();
            assert_eq!(run(&model, &[("x", tensor.clone())]).unwrap()[0].1, Datum::Tensor(tensor), "{dtype}");
            let empty = Tensor::from_f64s(dtype, &[0], &[]).unwrap();
            assert_eq!(run(&model, &[("x", empty.clone())]).unwrap()[0].1, Datum::Tensor(empty), "{dtype}");
        }
    }

    #[test]
    fn passes_strings_through() {
        let mut build = Build::new();
        let x = build.input("x", DataType::String, &["n"]);
        let y = build.node(Node::new("Identity"), &[x], "y");
        let model = build.output(y, Type::unshaped(DataType::String)).model();
        let text = Tensor::strings(vec![3], vec!["a".into(), "".into(), "ü b".into()]).unwrap();
        assert_eq!(run(&model, &[("x", text.clone())]).unwrap()[0].1, Datum::Tensor(text));
        let empty = Tensor::strings(vec![0], vec![]).unwrap();
        assert_eq!(run(&model, &[("x", empty.clone())]).unwrap()[0].1, Datum::Tensor(empty));
    }

    #[test]
    fn takes_sequences_apart() {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["4"]);
        let y = build.node(Node::new("SplitToSequence").with("keepdims", 1), &[x], "y");
        let ty: Type = TypeKind::Sequence(Box::new(Type::unshaped(DataType::Float))).into();
        let model = build.output(y, ty).model();
        let outputs = run(&model, &[("x", Tensor::from_f32s(&[4], &[1.0, 2.0, 3.0, 4.0]))]).unwrap();
        let member = |v: f32| Datum::Tensor(Tensor::from_f32s(&[1], &[v]));
        assert_eq!(outputs[0].1, Datum::Sequence(vec![member(1.0), member(2.0), member(3.0), member(4.0)]));
    }

    #[test]
    fn takes_maps_apart() {
        let mut build = Build::new();
        let x = build.input("x", DataType::Float, &["1", "2"]);
        let node = Node::new("ZipMap").in_domain("ai.onnx.ml").with("classlabels_int64s", vec![7, 3]);
        let y = build.node(node, &[x], "y");
        let map = TypeKind::Map { key: DataType::Int64, value: Box::new(Type::unshaped(DataType::Float)) };
        let mut model = build.output(y, TypeKind::Sequence(Box::new(map.into())).into()).model();
        model.import("ai.onnx.ml", 3);
        let outputs = run(&model, &[("x", Tensor::from_f32s(&[1, 2], &[0.25, 0.75]))]).unwrap();
        let map = Datum::Map { keys: Tensor::int64s(&[3, 7]), values: Tensor::from_f32s(&[2], &[0.75, 0.25]) };
        assert_eq!(outputs[0].1, Datum::Sequence(vec![map]));
    }

    #[test]
    fn names_the_node_that_fails() {
        let mut build = Build::new();
        let table = build.constant("table", Tensor::from_f32s(&[2], &[1.0, 2.0]));
        let x = build.input("x", DataType::Int64, &["n"]);
        let mut node = Node::new("Gather");
        node.name = "lookup".into();
        let y = build.node(node, &[table, x], "y");
        let model = build.output(y, Type::unshaped(DataType::Float)).model();
        let error = run(&model, &[("x", Tensor::int64s(&[5]))]).unwrap_err();
        let RuntimeError::Run { node, message, .. } = &error else { panic!("{error}") };
        assert_eq!(node.as_deref(), Some("`lookup` (Gather)"));
        assert!(message.contains("out of data bounds"), "{message}");
    }

    #[test]
    fn a_broken_model_is_an_error() {
        let error = run(&unary(Node::new("NoSuchOperator")), &[]).unwrap_err();
        assert!(error.to_string().contains("refuses the model"), "{error}");
        let options = LoadOptions::default();
        assert!(engine().load(Source::Bytes(b"not a model"), &options).is_err());
        assert!(engine().load(Source::Path(Path::new("missing.onnx")), &options).is_err());
    }

    #[test]
    fn a_missing_input_and_a_wrong_type_are_errors() {
        let model = unary(Node::new("Relu"));
        assert!(run(&model, &[]).is_err());
        assert!(run(&model, &[("x", Tensor::int64s(&[1]))]).is_err());
    }

    #[test]
    fn an_unavailable_provider_is_an_error() {
        let bytes = unary(Node::new("Relu")).to_bytes();
        let options = LoadOptions { provider: "abacus".into(), ..LoadOptions::default() };
        let error = engine().load(Source::Bytes(&bytes), &options).err().unwrap();
        assert!(error.to_string().contains("has no execution provider `abacus`; it has cpu"), "{error}");
    }

    #[test]
    fn an_old_library_is_told_by_its_version() {
        let said = "ort 2.0 is not compatible with the ONNX Runtime binary found at `a.so`; expected version >= '1.22.x', \
                    but got '1.20.1'";
        let expected = "it is ONNX Runtime 1.20.1, and this program needs 1.22 or later";
        assert_eq!(too_old(said).map(|why| why.to_string()).as_deref(), Some(expected));
        assert_eq!(too_old("no such file"), None);
    }

    #[test]
    fn finds_the_version_in_what_the_library_says() {
        assert_eq!(version_in("ORT Build Info: git-branch=rel-1.32.0, git-commit-id=1a"), Some("1.32.0".into()));
        assert_eq!(version_in("lib/libonnxruntime.so.1.22.1"), Some("1.22.1".into()));
        assert_eq!(version_in("nothing"), None);
    }
}

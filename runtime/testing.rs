//! Engine and small models for the tests of this crate.

use crate::{LibrarySearch, OrtEngine};
use lathe_ir::{DataType, Dim, Graph, Model, Node, ScopeId, Tensor, Type, ValueId};
use std::path::{Path, PathBuf};

/// The ONNX Runtime of this process.
pub(crate) fn engine() -> &'static OrtEngine {
    let search = LibrarySearch {
        variable: std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from),
        environments: vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv")],
        pythons: vec![PathBuf::from("python3")],
        system_dirs: LibrarySearch::usual_system_dirs(),
        ..LibrarySearch::default()
    };
    OrtEngine::start(&search).expect("the tests need ONNX Runtime, which `./test` installs")
}

/// A model under construction.
pub(crate) struct Build {
    pub(crate) graph: Graph,
}

impl Build {
    pub(crate) fn new() -> Build {
        Build { graph: Graph::new("g") }
    }

    pub(crate) fn input(&mut self, name: &str, dtype: DataType, dims: &[&str]) -> ValueId {
        let ty = Type::tensor(dtype, dims.iter().map(|d| dim(d)).collect());
        let value = self.graph.add_value(name, Some(ty));
        self.graph.add_input(ScopeId::MAIN, value);
        value
    }

    pub(crate) fn constant(&mut self, name: &str, tensor: Tensor) -> ValueId {
        self.graph.add_initializer(ScopeId::MAIN, name, tensor)
    }

    pub(crate) fn node(&mut self, node: Node, inputs: &[ValueId], output: &str) -> ValueId {
        self.graph.append(ScopeId::MAIN, node, inputs, output)
    }

    pub(crate) fn output(mut self, value: ValueId, ty: Type) -> Build {
        self.graph.value_mut(value).ty = Some(ty);
        self.graph.add_output(ScopeId::MAIN, value);
        self
    }

    pub(crate) fn model(self) -> Model {
        Model { ir_version: 8, opsets: vec![(String::new(), 17)], graph: self.graph, ..Model::default() }
    }
}

/// `3` is known, `?` unknown, anything else a symbol.
fn dim(text: &str) -> Dim {
    match text.parse() {
        Ok(size) => Dim::Known(size),
        Err(_) if text == "?" => Dim::Unknown,
        Err(_) => Dim::Symbol(text.to_owned()),
    }
}

/// A model that applies `node` to one float input of shape `[n, 3]`.
pub(crate) fn unary(node: Node) -> Model {
    let mut build = Build::new();
    let x = build.input("x", DataType::Float, &["n", "3"]);
    let y = build.node(node, &[x], "y");
    build.output(y, Type::unshaped(DataType::Float)).model()
}

//! A whole model: the main graph, local functions and what the file says about itself.

use crate::{Attribute, Graph, Metadata};
use bytes::Bytes;
use std::collections::BTreeMap;

/// A local function: a named graph that nodes call as an operator.
#[derive(Debug, Clone)]
pub struct Function {
    /// The operator name that calls it.
    pub name: String,
    /// The operator domain that calls it.
    pub domain: String,
    /// Distinguishes functions of equal name and domain; usually empty.
    pub overload: String,
    /// Attributes without default.
    pub attributes: Vec<String>,
    /// Attributes with their defaults.
    pub defaults: Vec<Attribute>,
    /// The operator sets its body uses: domain and version.
    pub opsets: Vec<(String, i64)>,
    /// The body; its main scope's inputs and outputs are the function's.
    pub graph: Graph,
    /// Documentation kept for the file.
    pub doc: String,
    /// Metadata kept for the file.
    pub metadata: Metadata,
}

/// A named set of devices that placements refer to.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceConfiguration {
    /// Its name.
    pub name: String,
    /// How many devices it has.
    pub count: Option<i32>,
    /// Their names.
    pub devices: Vec<String>,
}

/// A model: what one ONNX file (with its external data) holds.
#[derive(Debug, Clone, Default)]
pub struct Model {
    /// The version of the file format.
    pub ir_version: i64,
    /// The operator sets in use: domain and version.
    pub opsets: Vec<(String, i64)>,
    /// The program that made the file.
    pub producer_name: String,
    /// Its version.
    pub producer_version: String,
    /// The model's own domain, reverse DNS.
    pub domain: String,
    /// The model's own version.
    pub model_version: Option<i64>,
    /// Documentation kept for the file.
    pub doc: String,
    /// Metadata kept for the file.
    pub metadata: Metadata,
    /// The main graph.
    pub graph: Graph,
    /// The local functions.
    pub functions: Vec<Function>,
    /// Device configurations kept for the file.
    pub configurations: Vec<DeviceConfiguration>,
    /// Training information, encoded, kept for the file. It names values of the graph, which passes may remove.
    pub training: Vec<Bytes>,
}

/// The version imported for `domain`, with `""` and `ai.onnx` meaning the same.
pub fn imported(opsets: &[(String, i64)], domain: &str) -> Option<i64> {
    let standard = |d: &str| d.is_empty() || d == "ai.onnx";
    let same = |d: &str| d == domain || (standard(d) && standard(domain));
    opsets.iter().find(|(d, _)| same(d)).map(|(_, version)| *version)
}

/// The metadata of a model whose inputs and outputs are not those of the model it was made of: a line `old=new` for each
/// that may have another name, `old=` where it is gone.
pub const RENAMED: &str = "onnx_lathe.renamed";

impl Model {
    /// Inputs and outputs of the model this one was made of, with their names here; `None` where they are gone.
    pub fn renamed(&self) -> BTreeMap<String, Option<String>> {
        let notes = self.metadata.iter().filter(|(key, _)| key == RENAMED).flat_map(|(_, note)| note.lines());
        let pair = |line: &str| line.split_once('=').map(|(old, new)| (old.to_owned(), Some(new.to_owned())));
        notes.filter_map(pair).map(|(old, new)| (old, new.filter(|new| !new.is_empty()))).collect()
    }

    /// The version of the standard operator set in use; 0 if none is imported.
    pub fn opset(&self) -> i64 {
        imported(&self.opsets, "").unwrap_or(0)
    }

    /// The version of the operator set of `domain` in use.
    pub fn opset_of(&self, domain: &str) -> Option<i64> {
        imported(&self.opsets, domain)
    }

    /// Imports `domain` at `version` unless it is imported already.
    pub fn import(&mut self, domain: &str, version: i64) {
        if self.opset_of(domain).is_none() {
            self.opsets.push((domain.to_owned(), version));
        }
    }

    /// The local function that a node of this operator calls.
    pub fn function(&self, domain: &str, name: &str, overload: &str) -> Option<&Function> {
        let standard = |d: &str| d.is_empty() || d == "ai.onnx";
        let same = |d: &str| d == domain || (standard(d) && standard(domain));
        self.functions.iter().find(|f| f.name == name && f.overload == overload && same(&f.domain))
    }

    /// The main graph and the body of every local function, each with the operator sets it uses.
    pub fn graphs(&self) -> impl Iterator<Item = (&Graph, &[(String, i64)])> {
        let bodies = self.functions.iter().map(|f| (&f.graph, f.opsets.as_slice()));
        std::iter::once((&self.graph, self.opsets.as_slice())).chain(bodies)
    }

    /// The main graph and the body of every local function, each with the operator sets it uses, to edit.
    pub fn graphs_mut(&mut self) -> impl Iterator<Item = (&mut Graph, &[(String, i64)])> {
        let bodies = self.functions.iter_mut().map(|f| (&mut f.graph, f.opsets.as_slice()));
        std::iter::once((&mut self.graph, self.opsets.as_slice())).chain(bodies)
    }
}

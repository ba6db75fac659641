//! Editing every graph of a model: the main one, and the bodies of local functions.

use crate::{Error, Outcome, PassContext};
use lathe_ir::{Function, Graph, Model};

/// A graph that is being edited, with what is known around it.
pub(crate) struct Editor<'a> {
    /// The main graph or the body of a local function, with all subgraphs.
    pub graph: &'a mut Graph,
    /// The operator sets that count in it.
    pub opsets: &'a [(String, i64)],
    /// The model's local functions; a body that is being edited is empty among them.
    pub functions: &'a [Function],
    /// Target, settings and engine.
    pub context: &'a PassContext<'a>,
    /// What was changed and refused so far.
    pub outcome: &'a mut Outcome,
}

/// Has `edit` see every graph of a model once.
pub(crate) fn edit_graphs(
    model: &mut Model,
    context: &PassContext,
    mut edit: impl FnMut(&mut Editor) -> Result<(), Error>,
) -> Result<Outcome, Error> {
    let mut outcome = Outcome::default();
    let functions = std::mem::take(&mut model.functions);
    let (graph, opsets) = (&mut model.graph, &model.opsets);
    let result = edit(&mut Editor { graph, opsets, functions: &functions, context, outcome: &mut outcome });
    model.functions = functions;
    result?;
    for index in 0..model.functions.len() {
        // A body may call other functions, whose bodies are as they were; only its own graph changes.
        let mut graph = std::mem::take(&mut model.functions[index].graph);
        let opsets = model.functions[index].opsets.clone();
        let (functions, outcome) = (&model.functions, &mut outcome);
        let result = edit(&mut Editor { graph: &mut graph, opsets: &opsets, functions, context, outcome });
        model.functions[index].graph = graph;
        result?;
    }
    Ok(outcome)
}

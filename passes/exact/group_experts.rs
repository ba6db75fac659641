//! Mixtures of experts as exporters write them: the weights of the experts of every token are gathered, one copy for each
//! pair of token and expert. Grouped, every expert multiplies the rows that picked it, with its weights where they lie.

mod emit;
mod region;
#[cfg(test)]
mod tests;

use super::linear::RTOL;
use crate::{Editor, Error, Info, Kind, Opt, Outcome, Pass, PassContext, Saving, edit_graphs};
use lathe_ir::{Model, Use, ValueId, imported};
use region::Region;
use std::collections::BTreeSet;

/// See [`INFO`].
pub struct GroupExperts;

static INFO: Info = Info {
    name: "group-experts",
    summary: "lets every expert of a mixture multiply its own rows, instead of gathering weights for each of them",
    doc: "Exporters write a layer of experts with one Gather of weights for every pair of a token and an expert that it \
          picked: three matrices are copied for each pair, and multiplied with one row. Here the pairs are sorted by \
          expert (TopK of the expert's number), one Split hands every expert its rows, as many as there are in that \
          run, and each expert becomes ordinary products with a matrix of its own, which quantization and the other \
          methods of a budget can change. The results go back to the places of their pairs, so what is done with the \
          weights of the router stays as it is. An expert that nobody picks gets no rows. The three-dimensional tables \
          are cut, not copied. Products of several rows are summed in other blocks than those of one. Declines where the \
          experts' numbers are not the indices of a TopK over as many scores as there are experts, where what lies \
          between the tables does not treat every pair by itself, and before opset 13.",
    options: &[Opt { name: "max-experts", unit: "count", default: "256", doc: "Experts of a layer, at most" }],
    kind: Kind::Equivalent { rtol: RTOL },
    lowers: &[Saving::Flops, Saving::PeakMemory],
    source: Some("expert grouping as in MegaBlocks (arXiv:2211.15841); forms of exporters measured"),
};

impl Pass for GroupExperts {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        let most = cx.setting::<usize>(&INFO, "max-experts")?;
        edit_graphs(model, cx, |editor| group(editor, most))
    }
}

/// Groups every layer of a graph.
fn group(editor: &mut Editor, most: usize) -> Result<(), Error> {
    let mut tried = BTreeSet::new();
    while let Some(numbers) = candidates(editor).into_iter().find(|numbers| !tried.contains(numbers)) {
        tried.insert(numbers);
        let facts = editor.context.facts.take(editor.graph, editor.opsets, editor.functions);
        let place = editor.graph.value(numbers).name.clone();
        let old = imported(editor.opsets, "").unwrap_or(0) < 13;
        let found = if old {
            Err("before opset 13 a Split has fixed sizes")
        } else {
            Region::find(editor.graph, &facts, numbers, most)
        };
        match found {
            Ok(region) => {
                emit::emit(editor.graph, &region);
                editor.graph.sort()?;
                editor.outcome.change("group-experts", place);
            }
            Err(reason) => {
                editor.context.facts.keep(editor.graph, facts);
                editor.outcome.refuse(reason, place);
            }
        }
    }
    Ok(())
}

/// Values by which matrices of a table of three dimensions are gathered.
fn candidates(editor: &Editor) -> Vec<ValueId> {
    let graph = &*editor.graph;
    let numbers = graph.all_nodes().into_iter().filter_map(|id| {
        let node = graph.node(id);
        let is_table = node.is("Gather") && node.int("axis").unwrap_or(0) == 0;
        let table = node.input(0).filter(|_| is_table).and_then(|table| graph.constant(table))?;
        let picked = node.input(1).filter(|&picked| graph.constant(picked).is_none())?;
        let read = graph.value(node.output(0)?).uses().iter().any(|place| matches!(place, Use::Node(..)));
        (table.dims().len() == 3 && table.dtype().is_float() && read).then_some(picked)
    });
    let mut seen = BTreeSet::new();
    numbers.filter(|&picked| seen.insert(picked)).collect()
}

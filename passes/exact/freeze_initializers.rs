//! Turns initializers that callers could override into constants.

use crate::{Error, Info, Kind, Opt, Outcome, Pass, PassContext};
use lathe_ir::{Model, ScopeId};

/// See [`INFO`].
pub struct FreezeInitializers;

static INFO: Info = Info {
    name: "freeze-initializers",
    summary: "removes initializers from the graph inputs, so that they are constants",
    doc: "Before IR version 4 every initializer had to be listed as a graph input; old exporters went on doing so. Where \
          every initializer of the graph is listed, all of them become constants; the result is at least IR version 4. \
          Declines where the file as it was read lists only some, or where no other input would remain: those are inputs with a deliberate \
          default, which stay unless `all` is set.",
    options: &[Opt {
        name: "all",
        unit: "true or false",
        default: "false",
        doc: "make inputs with a deliberate default constants too",
    }],
    kind: Kind::Identical,
    lowers: &[],
    source: Some("ONNX IR specification, version 4: initializers need not be inputs"),
};

impl Pass for FreezeInitializers {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        let all: bool = cx.setting(&INFO, "all")?;
        let graph = &mut model.graph;
        let inputs = graph.main().inputs();
        let listed: Vec<usize> =
            (0..inputs.len()).filter(|&i| graph.value(inputs[i]).initializer().is_some()).collect();
        let Some(&first) = listed.first() else { return Ok(outcome) };
        let name = |graph: &lathe_ir::Graph, index: usize| {
            format!("input `{}`", graph.value(graph.main().inputs()[index]).name)
        };
        // Later on the others may be gone, and the inputs with a default would look like what old exporters write.
        let unlisted = || graph.initializers(ScopeId::MAIN).next().is_some();
        let constants = *cx.lists_constants.get_or_init(|| model.ir_version < 4 || !unlisted());
        if !all {
            if !constants {
                outcome.refuse(
                    "the file lists only some initializers as inputs: a caller may mean to override these",
                    name(graph, first),
                );
                return Ok(outcome);
            }
            if model.ir_version >= 4 && listed.len() == inputs.len() {
                outcome.refuse("every input has a default: no other input would remain", name(graph, first));
                return Ok(outcome);
            }
        }
        for index in listed.into_iter().rev() {
            let place = name(graph, index);
            graph.freeze_input(ScopeId::MAIN, index);
            outcome.change("freeze-initializer", place);
        }
        outcome.changes.reverse();
        model.ir_version = model.ir_version.max(4);
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::model;
    use lathe_ir::{Initializer, Tensor};

    /// `y = x + w`, with `w` an input that has a default, and another constant if asked for.
    fn with_default(ir_version: i64, other: bool) -> Model {
        let mut m = model("g (float[2] x, float[2] w) => (float[2] y) { y = Add (x, w) }");
        m.ir_version = ir_version;
        let w = m.graph.main().inputs()[1];
        m.graph.set_default(w, Some(Initializer::Dense(Tensor::from_f32s(&[2], &[1.0, 2.0]))));
        if other {
            m.graph.add_initializer(ScopeId::MAIN, "k", Tensor::int64s(&[1]));
        }
        m
    }

    fn run(m: &mut Model, all: bool) -> Outcome {
        let cx = PassContext::default().with_setting("freeze-initializers.all", all);
        FreezeInitializers.apply(m, &cx).unwrap()
    }

    #[test]
    fn freezes_what_old_files_list() {
        for ir_version in [3, 8] {
            let mut m = with_default(ir_version, false);
            assert_eq!(run(&mut m, false).changes.len(), 1);
            assert_eq!(m.graph.main().inputs().len(), 1);
            assert_eq!(m.ir_version, ir_version.max(4));
            assert_eq!(run(&mut m, false), Outcome::default());
        }
    }

    #[test]
    fn keeps_deliberate_defaults_unless_told() {
        let mut m = with_default(8, true);
        let outcome = run(&mut m, false);
        assert!(outcome.changes.is_empty());
        assert!(outcome.refusals.keys().any(|r| r.contains("a caller may mean to override")));
        assert_eq!(run(&mut m, true).changes.len(), 1);
    }

    #[test]
    fn keeps_deliberate_defaults_when_the_last_other_constant_is_gone() {
        let mut m = with_default(8, true);
        let cx = PassContext::default();
        assert!(FreezeInitializers.apply(&mut m, &cx).unwrap().changes.is_empty());
        let other = m.graph.initializers(ScopeId::MAIN).next().unwrap();
        m.graph.remove_initializer(other);
        let outcome = FreezeInitializers.apply(&mut m, &cx).unwrap();
        assert!(outcome.changes.is_empty());
        assert!(outcome.refusals.keys().any(|r| r.contains("a caller may mean to override")));
        assert_eq!(m.graph.main().inputs().len(), 2);
    }

    #[test]
    fn keeps_a_default_when_it_is_the_only_input() {
        let mut m = model("g (float[2] w) => (float[2] y) { y = Neg (w) }");
        let w = m.graph.main().inputs()[0];
        m.graph.set_default(w, Some(Initializer::Dense(Tensor::from_f32s(&[2], &[1.0, 2.0]))));
        assert!(run(&mut m, false).refusals.keys().any(|r| r.contains("no other input would remain")));
    }
}

//! Proposals that are kept between runs: what a method could do with a model does not depend on how much may stay.
//!
//! Values and nodes are told by names, so that a proposal fits every copy of the model.

use super::{Candidate, Cost, Edit, Loss, Method, MethodContext, Proposal, Site};
use crate::{Error, Outcome};
use lathe_analysis::kept_or;
use lathe_ir::{Graph, Model, NodeId, ScopeId, ValueId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{any::Any, collections::BTreeMap, fmt};

/// How edits of a method are written and read again.
#[derive(Clone, Copy)]
pub struct EditCodec {
    write: fn(&Edit) -> Option<Vec<u8>>,
    read: fn(&[u8]) -> Option<Edit>,
}

impl EditCodec {
    /// The codec of edits of one type.
    pub fn of<T: Any + fmt::Debug + PartialEq + Send + Sync + Serialize + DeserializeOwned>() -> EditCodec {
        EditCodec {
            write: |edit| postcard::to_stdvec(edit.of::<T>()).ok(),
            read: |bytes| postcard::from_bytes::<T>(bytes).ok().map(Edit::new),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct KeptProposal {
    sites: Vec<KeptSite>,
    refusals: BTreeMap<String, (usize, String)>,
    unmet: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct KeptSite {
    weight: Option<String>,
    footprint: Vec<String>,
    /// The first output of every node.
    nodes: Vec<String>,
    name: String,
    taps: Vec<String>,
    baseline: Cost,
    candidates: Vec<KeptCandidate>,
    required: bool,
    isolatable: bool,
}

#[derive(Serialize, Deserialize)]
struct KeptCandidate {
    label: String,
    cost: Cost,
    loss: Loss,
    edit: Vec<u8>,
}

/// What `method` proposes: as it was kept, or else as it is computed now, and kept then.
pub fn propose(method: &dyn Method, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
    let Some((codec, key)) = method.edit_codec().zip(cx.key()) else { return method.propose(model, cx) };
    let key = key.text(method.info().name);
    let mut computed = None;
    let kept = kept_or(cx.kept, "proposals", &key, || {
        let proposal = method.propose(model, cx).map_err(Some)?;
        let kept = KeptProposal::of(&proposal, &model.graph, codec);
        computed = Some(proposal);
        // What cannot be written is not kept.
        kept.ok_or(None)
    });
    match (computed, kept) {
        (Some(proposal), _) => Ok(proposal),
        (None, Ok(kept)) => match kept.restored(&model.graph, codec) {
            Some(proposal) => Ok(proposal),
            None => method.propose(model, cx),
        },
        (None, Err(error)) => Err(error.expect("without a proposal there is an error")),
    }
}

impl KeptProposal {
    fn of(proposal: &Proposal, graph: &Graph, codec: EditCodec) -> Option<KeptProposal> {
        let value = |&value: &ValueId| graph.value(value).name.clone();
        let node = |&node: &NodeId| graph.node(node).outputs().iter().flatten().next().map(value);
        let candidate = |candidate: &Candidate| {
            let Candidate { label, cost, loss, edit } = candidate;
            Some(KeptCandidate { label: label.clone(), cost: *cost, loss: loss.clone(), edit: (codec.write)(edit)? })
        };
        let site = |site: &Site| {
            Some(KeptSite {
                weight: site.weight.as_ref().map(value),
                footprint: site.footprint.iter().map(value).collect(),
                nodes: site.nodes.iter().map(node).collect::<Option<_>>()?,
                name: site.name.clone(),
                taps: site.taps.iter().map(value).collect(),
                baseline: site.baseline,
                candidates: site.candidates.iter().map(candidate).collect::<Option<_>>()?,
                required: site.required,
                isolatable: site.isolatable,
            })
        };
        let sites = proposal.sites.iter().map(site).collect::<Option<_>>()?;
        // A method that proposes has made no changes.
        Some(KeptProposal { sites, refusals: proposal.outcome.refusals.clone(), unmet: proposal.unmet.clone() })
    }

    /// The proposal for this graph; `None` if it is of another one.
    fn restored(self, graph: &Graph, codec: EditCodec) -> Option<Proposal> {
        let value = |name: &String| graph.find_value(name);
        let makers: BTreeMap<&str, NodeId> = graph
            .nodes(ScopeId::MAIN)
            .filter_map(|id| {
                let first = *graph.node(id).outputs().iter().flatten().next()?;
                Some((graph.value(first).name.as_str(), id))
            })
            .collect();
        let candidate = |kept: KeptCandidate| {
            let edit = (codec.read)(&kept.edit)?;
            Some(Candidate { label: kept.label, cost: kept.cost, loss: kept.loss, edit })
        };
        let site = |kept: KeptSite| {
            Some(Site {
                weight: match &kept.weight {
                    Some(name) => Some(value(name)?),
                    None => None,
                },
                footprint: in_order(kept.footprint.iter().map(value).collect::<Option<_>>()?),
                nodes: in_order(
                    kept.nodes.iter().map(|name| makers.get(name.as_str()).copied()).collect::<Option<_>>()?,
                ),
                name: kept.name,
                taps: kept.taps.iter().map(value).collect::<Option<_>>()?,
                baseline: kept.baseline,
                candidates: kept.candidates.into_iter().map(candidate).collect::<Option<_>>()?,
                required: kept.required,
                isolatable: kept.isolatable,
            })
        };
        let sites = self.sites.into_iter().map(site).collect::<Option<_>>()?;
        let outcome = Outcome { refusals: self.refusals, ..Outcome::default() };
        Some(Proposal { sites, outcome, unmet: self.unmet })
    }
}

/// Footprints and nodes of a site are in order.
fn in_order<T: Ord>(mut all: Vec<T>) -> Vec<T> {
    all.sort();
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Info;
    use lathe_analysis::{Calibrate, EvaluateError, Gram, Keep, Moments, Rows};
    use lathe_ir::text;
    use std::{cell::Cell, sync::Mutex};

    #[derive(Default)]
    struct InMemory(Mutex<BTreeMap<[u8; 32], Vec<u8>>>);

    impl Keep for InMemory {
        fn get(&self, _: &str, key: &[u8; 32]) -> Option<Vec<u8>> {
            self.0.lock().unwrap().get(key).cloned()
        }

        fn put(&self, _: &str, key: &[u8; 32], bytes: &[u8]) {
            self.0.lock().unwrap().insert(*key, bytes.to_vec());
        }
    }

    struct Seen([u8; 32]);

    impl Calibrate for Seen {
        fn gram(&self, _: &Rows) -> Result<Option<Gram>, EvaluateError> {
            Ok(None)
        }

        fn moments(&self, _: &Rows) -> Result<Option<Moments>, EvaluateError> {
            Ok(None)
        }

        fn identity(&self) -> Option<[u8; 32]> {
            Some(self.0)
        }
    }

    static INFO: Info =
        Info { name: "test", summary: "", doc: "", options: &[], kind: crate::Kind::Lossy, lowers: &[], source: None };

    thread_local!(static ASKED: Cell<usize> = const { Cell::new(0) });

    /// Counts how often it is asked.
    struct Counted;

    impl Method for Counted {
        fn info(&self) -> &'static Info {
            &INFO
        }

        fn edit_codec(&self) -> Option<EditCodec> {
            Some(EditCodec::of::<(usize, f64)>())
        }

        fn propose(&self, model: &Model, _: &MethodContext) -> Result<Proposal, Error> {
            ASKED.set(ASKED.get() + 1);
            let graph = &model.graph;
            let [w, y] = ["w", "y"].map(|name| graph.find_value(name).unwrap());
            let candidate = Candidate {
                label: "a label".to_owned(),
                cost: Cost { bytes: 7, parameters: 8, flops_per_row: 9 },
                loss: Loss::Measured(f64::INFINITY),
                edit: Edit::new((3usize, 0.1 + 0.2)),
            };
            let site = Site {
                weight: Some(w),
                footprint: vec![w],
                nodes: graph.nodes(ScopeId::MAIN).collect(),
                name: "w".to_owned(),
                taps: vec![y],
                baseline: Cost::default(),
                candidates: vec![candidate],
                required: true,
                isolatable: false,
            };
            let mut proposal =
                Proposal { sites: vec![site], unmet: Some("a reason".to_owned()), ..Proposal::default() };
            proposal.outcome.refuse("it is too small", "`v`");
            Ok(proposal)
        }

        fn apply(&self, _: &mut Model, _: &Site, _: &Candidate, _: &MethodContext) -> Result<Outcome, Error> {
            Ok(Outcome::default())
        }
    }

    fn model(before: &str) -> Model {
        let head = "<ir_version: 8, opset_import: [\"\" : 17]> g (float[n, 1] x) => (float[n, 1] y) <float[1] w = {2}>";
        text::parse(&format!("{head} {{ {before} y = Mul (x, w) }}")).unwrap()
    }

    #[test]
    fn a_proposal_is_asked_for_once_and_fits_another_copy_of_the_model() {
        let (keep, seen) = (InMemory::default(), Seen([1; 32]));
        let ask = |model: &Model, seen: &Seen, cx: MethodContext<'_>| {
            propose(&Counted, model, &cx.with_kept(Some(&keep)).with_calibration(seen)).unwrap()
        };
        let first = ask(&model(""), &seen, MethodContext::default());
        // Here values have other numbers.
        let other = model("unused = Neg (x)");
        let of_y = other.graph.producer(other.graph.find_value("y").unwrap()).unwrap();
        let again = ask(&other, &seen, MethodContext::default());
        assert_eq!(ASKED.get(), 1);
        let mut expected = Counted.propose(&other, &MethodContext::default()).unwrap();
        ASKED.set(1);
        expected.sites[0].nodes = vec![of_y];
        assert_eq!((&again.sites, &again.outcome, &again.unmet), (&expected.sites, &expected.outcome, &expected.unmet));
        assert_eq!(first.outcome, again.outcome);
        // Other statistics, another target, and a context that keeps nothing.
        ask(&model(""), &Seen([2; 32]), MethodContext::default());
        ask(&model(""), &seen, MethodContext::new(crate::Target::Ort, Vec::new(), crate::Settings::default()));
        propose(&Counted, &model(""), &MethodContext::default().with_calibration(&seen)).unwrap();
        assert_eq!(ASKED.get(), 4);
    }
}

//! Fewer visual tokens before a language model: those that the vision tower looks at, and those unlike them.

mod emit;
mod place;
mod selection;
#[cfg(test)]
mod tests;
mod video;

use super::{
    Candidate, Cost, Edit, EditCodec, Loss, Method, MethodContext, Needs, OVERHEAD, Proposal, Site, regions::held_by,
};
use crate::{Error, Info, Kind, Opt, Outcome, Quantity, Saving};
use emit::{Rest, emit};
use lathe_analysis::{Bindings, Cost as ModelCost, Facts};
use lathe_ir::{DataType, Model, NodeId, ScopeId, ValueId};
use place::{Place, Span, place};
use selection::{Counts, Form};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Selects visual tokens.
pub struct SelectVisualTokens;

static INFO: Info = Info {
    name: "select-visual-tokens",
    summary: "keep the visual tokens that matter between a vision tower and a language model",
    doc: "Where settings tell which tokens of the stream before the first attention of a language model come from a vision \
          tower, offers to keep a part of them: a few that the last attention of the tower looks at most, more by the same \
          score, and the rest so that each is as unlike those before it as can be (EfficientVLA); or all of them one after \
          another by how unlike they are times how much they are looked at (the selection of FlashVID). With several \
          frames or images each keeps its own part. Those that go are left out, or counted by attentions and averages \
          with the one they are most like. Of several frames, tokens that are like one of the frame before can also be \
          merged with it, over as many frames as a segment has, into their mean (the merging of FlashVID with a fixed \
          number of tokens per frame). The loss of each choice is measured. Positions that are added before the first \
          attention go with their tokens. Declines where the tokens are not told, where no attention over them can be \
          read, and where anything later reads tokens by their position: rotary tables, masks with a number per token, \
          outputs with a row per token.",
    options: &[
        Opt {
            name: "span",
            unit: "START:LENGTH or the name of a value",
            default: "",
            doc: "which tokens are visual: counted in the stream before the first attention, or the value that is joined \
                  with others to make it; without it nothing is done",
        },
        Opt {
            name: "keep",
            unit: "auto or a number",
            default: "auto",
            doc: "how many stay; auto offers several numbers",
        },
        Opt {
            name: "frames",
            unit: "a number above 0",
            default: "1",
            doc: "parts of equal length that each keep their share",
        },
        Opt {
            name: "segment",
            unit: "auto or a number",
            default: "auto",
            doc: "frames in a row that are merged over time; auto takes four, or an eighth of them if that is more",
        },
        Opt {
            name: "key",
            unit: "auto or a number",
            default: "auto",
            doc: "tokens that go by the score first, of every part",
        },
        Opt {
            name: "task",
            unit: "a share from 0 to 1",
            default: "0.5",
            doc: "of the others, those that go by the score too; what is left goes by how unlike they are",
        },
    ],
    kind: Kind::Lossy,
    lowers: &[Saving::Flops],
    source: Some("Yang et al. 2025, EfficientVLA, arXiv:2506.10100; Fan et al. 2026, FlashVID, arXiv:2602.08024"),
};

/// The oldest operator set with what is written.
const OLDEST_OPSET: i64 = 18;

/// Percent of the visual tokens that are offered to stay.
const SHARES: [usize; 5] = [75, 50, 35, 25, 15];

/// Tokens that go by their score first, at most.
const MOST_KEYS: usize = 8;

/// Of the tokens that stay where frames are merged over time, the share that stays as it is.
const UNMERGED: f64 = 0.7;

/// Frames in a row that are merged at most, unless an eighth of them is more.
const SEGMENT: usize = 4;

/// A number, or what seems good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Number(Option<usize>);

impl std::str::FromStr for Number {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "auto" => Ok(Number(None)),
            count => count.parse().ok().filter(|&n| n > 0).map(|n| Number(Some(n))).ok_or(()),
        }
    }
}

/// A share from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Part(f64);

impl std::str::FromStr for Part {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        text.parse().ok().filter(|x| (0.0..=1.0).contains(x)).map(Part).ok_or(())
    }
}

/// What settings ask for.
#[derive(Debug, Clone)]
struct Requested {
    span: Span,
    keep: Option<usize>,
    frames: usize,
    segment: Option<usize>,
    key: Option<usize>,
    task: f64,
}

impl Requested {
    /// `None` where nobody says which tokens are visual.
    fn of(cx: &MethodContext) -> Result<Option<Requested>, Error> {
        let Some(span) = cx.setting::<Span>(&INFO, "span").map(|span| Some(span).filter(|s| *s != Span::None))? else {
            return Ok(None);
        };
        let (Number(keep), Number(key)) = (cx.setting(&INFO, "keep")?, cx.setting(&INFO, "key")?);
        let Number(segment) = cx.setting(&INFO, "segment")?;
        let Part(task) = cx.setting(&INFO, "task")?;
        let frames = cx.setting::<std::num::NonZeroUsize>(&INFO, "frames")?.get();
        Ok(Some(Requested { span, keep, frames, segment, key, task }))
    }

    /// Frames in a row that are merged: a divisor of their number.
    fn segment(&self) -> usize {
        let most = self.segment.unwrap_or(SEGMENT.max(self.frames / 8));
        (1..=most.min(self.frames)).rev().find(|n| self.frames.is_multiple_of(*n)).unwrap_or(1)
    }

    /// The ways to keep so many tokens of every part.
    fn ways(&self, keep: usize) -> Vec<(Form, Rest)> {
        let mut ways = vec![(Form::Score, Rest::Gone), (Form::Score, Rest::Counted), (Form::Spread, Rest::Counted)];
        if self.segment() > 1 && keep > 1 {
            ways.extend([(Form::Video, Rest::Gone), (Form::Video, Rest::Counted)]);
        }
        ways
    }

    /// How `keep` tokens of every part are chosen.
    fn counts(&self, form: Form, keep: usize) -> Counts {
        match form {
            Form::Spread => Counts { key: 1, task: 0, spread: keep - 1, merged: 0 },
            Form::Video => {
                let alone = ((UNMERGED * keep as f64).round() as usize).clamp(1, keep - 1);
                Counts { key: 1, task: 0, spread: alone - 1, merged: keep - alone }
            }
            Form::Score => {
                let key = self.key.unwrap_or((keep / 4).clamp(1, MOST_KEYS)).min(keep);
                let task = (self.task * (keep - key) as f64) as usize;
                Counts { key, task, spread: keep - key - task, merged: 0 }
            }
        }
    }
}

/// Whether a model reads numbers of pixels and ids of words, so that some of its tokens may be visual.
fn looks_mixed(model: &Model) -> bool {
    let types = || model.graph.main().inputs().iter().filter_map(|&v| model.graph.value(v).ty.as_ref());
    let ids = types().any(|ty| matches!(ty.elem(), Some(DataType::Int64 | DataType::Int32)));
    let pixels =
        types().any(|ty| ty.elem().is_some_and(|t| t.is_float()) && ty.shape().is_some_and(|s| s.dims.len() > 3));
    ids && pixels
}

impl Method for SelectVisualTokens {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn operator_set(&self) -> i64 {
        OLDEST_OPSET
    }

    fn needs(&self, _: &MethodContext) -> Needs {
        Needs { statistics: false, ..Needs::default() }
    }

    fn edit_codec(&self) -> Option<EditCodec> {
        Some(EditCodec::of::<KeptTokens>())
    }

    fn propose(&self, model: &Model, cx: &MethodContext) -> Result<Proposal, Error> {
        let mut proposal = Proposal::default();
        let saves = |m: &Quantity| matches!(m, Quantity::Flops | Quantity::Latency);
        let Some(calibration) = cx.calibration.filter(|_| cx.quantities.iter().any(saves)) else { return Ok(proposal) };
        let Some(requested) = Requested::of(cx)? else {
            if looks_mixed(model) {
                let reason =
                    "which tokens are visual is not told; --set select-visual-tokens.span=START:LENGTH tells it";
                proposal.outcome.refuse(reason, "the model");
            }
            return Ok(proposal);
        };
        let found = match model.opset() {
            OLDEST_OPSET.. => place(model, &requested.span, requested.frames),
            _ => Err("operator set 18 or newer is needed"),
        };
        let place = match found {
            Ok(place) => place,
            Err(reason) => {
                proposal.outcome.refuse(reason, "the visual tokens");
                return Ok(proposal);
            }
        };
        let flops = |model: &Model| ModelCost::of(model, &Facts::infer(model), &Bindings::default()).flops;
        let (whole, nodes) = (flops(model), place.nodes(&model.graph));
        let baseline = baseline(model, &nodes);
        let mut candidates: Vec<Candidate> = Vec::new();
        for keep in keeps(&requested, &place) {
            for (form, rest) in requested.ways(keep) {
                let mut changed = model.clone();
                emit(&mut changed, &place, &requested.counts(form, keep), form, rest, requested.segment());
                let loss = calibration.trials(&changed, &[Vec::new()])?.first().copied().unwrap_or(f64::INFINITY);
                let saved = whole.saturating_sub(flops(&changed));
                if !loss.is_finite() || saved == 0 {
                    continue;
                }
                let count = |model: &Model| model.graph.nodes(ScopeId::MAIN).count() as u64;
                let cost = Cost {
                    bytes: baseline.bytes + OVERHEAD * count(&changed).saturating_sub(count(model)),
                    parameters: baseline.parameters,
                    flops_per_row: baseline.flops_per_row.saturating_sub(saved),
                };
                let kept = KeptTokens { keep, form, rest, length: place.length, frames: place.frames };
                candidates.push(Candidate {
                    label: kept.label(),
                    cost,
                    loss: Loss::Measured(loss),
                    edit: Edit::new(kept),
                });
            }
        }
        if candidates.is_empty() {
            proposal.outcome.refuse("no selection of visual tokens saves anything", "the visual tokens");
            return Ok(proposal);
        }
        proposal.sites.push(Site {
            weight: None,
            footprint: held_by(&model.graph, &nodes),
            nodes,
            name: name(model, &place),
            taps: place.ends(&model.graph),
            baseline,
            candidates,
            required: false,
            isolatable: false,
        });
        Ok(proposal)
    }

    fn apply(
        &self,
        model: &mut Model,
        site: &Site,
        candidate: &Candidate,
        cx: &MethodContext,
    ) -> Result<Outcome, Error> {
        let kept = candidate.edit.of::<KeptTokens>();
        let mut outcome = Outcome::default();
        let requested = Requested::of(cx)?;
        let found = requested.as_ref().ok_or("which tokens are visual is not told");
        let found = found.and_then(|requested| Ok((requested, place(model, &requested.span, requested.frames)?)));
        let done = found.and_then(|(requested, place)| {
            if (place.length, place.frames) != (kept.length, kept.frames) {
                return Err("the visual tokens are no longer what they were");
            }
            let KeptTokens { keep, form, rest, .. } = *kept;
            emit(model, &place, &requested.counts(form, keep), form, rest, requested.segment());
            Ok(())
        });
        match done {
            Ok(()) => outcome.change(candidate.label.clone(), site.name.clone()),
            Err(reason) => outcome.refuse(reason, site.name.clone()),
        }
        Ok(outcome)
    }
}

fn name(model: &Model, place: &Place) -> String {
    format!("visual tokens of `{}`", model.graph.value(place.stream).name)
}

/// How many tokens of every frame stay, which, and what becomes of the others.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct KeptTokens {
    keep: usize,
    form: Form,
    rest: Rest,
    /// Visual tokens that there are, and the frames that they divide into.
    length: usize,
    frames: usize,
}

impl KeptTokens {
    /// As reports call it: `64 of 256 visual tokens, others counted`.
    fn label(&self) -> String {
        let spread = match self.form {
            Form::Score => "",
            Form::Spread => " spread out",
            Form::Video => " merged over time",
        };
        let others = if self.rest == Rest::Counted { ", others counted" } else { "" };
        format!("{} of {} visual tokens{spread}{others}", self.keep * self.frames, self.length)
    }
}

/// How many tokens of every part may stay.
fn keeps(requested: &Requested, place: &Place) -> Vec<usize> {
    let part = place.length / place.frames;
    let mut keeps: Vec<usize> = match requested.keep {
        Some(keep) => vec![keep / place.frames],
        None => SHARES.iter().map(|share| part * share / 100).collect(),
    };
    keeps.retain(|&keep| keep > 0 && keep < part);
    keeps.dedup();
    keeps
}

/// What nodes take with all tokens.
fn baseline(model: &Model, nodes: &[NodeId]) -> Cost {
    let cost = ModelCost::of(model, &Facts::infer(model), &Bindings::default());
    let read: BTreeSet<ValueId> =
        nodes.iter().flat_map(|&id| model.graph.node(id).inputs()).flatten().copied().collect();
    let tensors = || read.iter().filter_map(|&v| model.graph.constant(v));
    Cost {
        bytes: tensors().map(|t| t.byte_len() as u64).sum(),
        parameters: tensors().filter(|t| t.dtype().is_float()).map(|t| t.len() as u64).sum(),
        flops_per_row: nodes.iter().map(|id| cost.by_node[id.index()].flops).sum(),
    }
}

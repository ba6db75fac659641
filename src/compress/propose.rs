//! Second stage: what every method could do where.

use super::{
    calibrate::Calibrated,
    candidates::{Offer, Region, overlap},
    setup::Setup,
};
use crate::{Failure, PassRecord};
use lathe_ir::{DataType, Model, ValueId};
use lathe_passes::lossy::{self, Candidate, Method, Site};
use lathe_runtime::RunEvent;
use std::{collections::BTreeMap, time::Instant};

/// The sites of all methods that were asked, by region, and what each method said.
#[derive(Clone, Default)]
pub(super) struct Proposed {
    /// By what would change.
    pub regions: BTreeMap<Vec<ValueId>, Region>,
    pub records: BTreeMap<&'static str, PassRecord>,
    /// Why methods cannot do what settings ask of them.
    pub unmet: BTreeMap<&'static str, String>,
    /// What was proposed for constants alone, by which those that come later know what they have to beat.
    incumbents: BTreeMap<ValueId, Vec<Candidate>>,
}

/// Asks some methods, in order, beside what others proposed before them.
pub(super) fn propose(
    setup: &Setup<'_>,
    model: &Model,
    calibrated: &Calibrated<'_>,
    methods: &[&'static dyn Method],
    before: Proposed,
) -> Result<Proposed, Failure> {
    let Proposed { mut regions, mut records, mut unmet, incumbents } = before;
    let mut cx = calibrated.context(&setup.cx);
    cx.incumbents = incumbents;
    let listener = setup.runner.child().listener();
    for &method in methods {
        Failure::if_stopped(listener)?;
        listener.tell(&RunEvent::Part(records.len(), setup.methods.len(), method.info().name.to_owned()));
        let start = Instant::now();
        let _span = listener.span(method.info().name);
        let proposal = lossy::propose(method, model, &cx)?;
        let mut outcome = proposal.outcome;
        unmet.extend(proposal.unmet.map(|reason| (method.info().name, reason)));
        for mut site in proposal.sites {
            if regions.keys().any(|other| overlap(other, &site.footprint)) {
                outcome.refuse("it shares a part with what another method would change as a whole", site.name);
                continue;
            }
            if let (Some(weight), 1) = (site.weight, site.footprint.len()) {
                cx.incumbents.entry(weight).or_default().extend(site.candidates.iter().cloned());
            }
            if setup.halves {
                price_halves(&mut site, model);
            }
            let sensitivities = &calibrated.sensitivities.values;
            let offer = Offer {
                method,
                needs: method.needs(&cx),
                nested: Vec::new(),
                sensitivity: site.taps.iter().filter_map(|tap| sensitivities.get(tap).copied()).collect(),
                rows: site.weight.map_or(1, |weight| calibrated.rows.get(&weight).copied().unwrap_or(0)),
                site,
            };
            let region = regions.entry(offer.site.footprint.clone());
            region.or_insert_with(|| Region { offers: Vec::new(), latency: Vec::new() }).offers.push(offer);
        }
        records.insert(method.info().name, record(method, outcome, start));
    }
    Ok(Proposed { regions, records, unmet, incumbents: cx.incumbents })
}

/// Prices floats that stay as they are written in half precision: 2 bytes each, in a site as it is and in candidates of which
/// every number is a float.
fn price_halves(site: &mut Site, model: &Model) {
    let floats = site.footprint.iter().filter_map(|&value| model.graph.constant(value));
    let numbers = floats.filter(|tensor| tensor.dtype() == DataType::Float).map(|tensor| tensor.len() as u64);
    site.baseline.bytes = site.baseline.bytes.saturating_sub(2 * numbers.sum::<u64>());
    for Candidate { cost, .. } in &mut site.candidates {
        if cost.bytes >= 4 * cost.parameters {
            cost.bytes -= 2 * cost.parameters;
        }
    }
}

/// Why methods are not asked whose gain nobody would notice.
const UNNOTICED: &str = "rounding alone keeps to the budget and loses next to nothing; --thorough asks this method too";

impl Proposed {
    /// Records that some methods were not asked.
    pub fn without(mut self, methods: &[&'static dyn Method]) -> Proposed {
        for &method in methods {
            let mut record = PassRecord::new(method.info());
            record.outcome.refuse(UNNOTICED, "the model");
            self.records.insert(method.info().name, record);
        }
        self
    }
}

fn record(method: &dyn Method, outcome: lathe_passes::Outcome, start: Instant) -> PassRecord {
    PassRecord { outcome, time: start.elapsed(), ..PassRecord::new(method.info()) }
}

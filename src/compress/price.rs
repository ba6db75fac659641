//! Third stage: what candidates take and lose that their methods cannot tell: measured times, measured losses, and what
//! nested sites take where a candidate around them is chosen.

use super::{
    calibrate::Calibrated,
    candidates::{Candidates, Nested, Offer, Region},
    latency_model, loss_trials,
    propose::Proposed,
    setup::Setup,
    uncovered::uncovered,
};
use crate::Failure;
use lathe_ir::Model;
use lathe_passes::{
    Quantity,
    lossy::{MethodContext, Site},
};
use std::rc::Rc;

/// Everything that can be chosen, ready for the allocator.
pub(super) fn price<'a>(
    setup: &Setup<'a>,
    model: &Model,
    calibrated: &Rc<Calibrated<'a>>,
    proposed: Proposed,
    warnings: &mut Vec<String>,
) -> Result<Candidates<'a>, Failure> {
    let Proposed { regions, mut records, unmet, .. } = proposed;
    let mut regions: Vec<Region> = regions.into_values().collect();
    let cx = calibrated.context(&setup.cx);
    let listener = setup.runner.child().listener();
    if setup.cx.quantities.contains(&Quantity::Latency) {
        let _span = listener.span("time candidates");
        latency_model::time_candidates(setup, model, &mut regions, &cx, warnings)?;
        latency_model::decline_slower(&mut regions, &mut records);
    }
    {
        let _span = listener.span("measure losses of candidates");
        loss_trials::measure_losses(setup, model, &mut regions, &cx, warnings)?;
    }
    price_nested(setup, model, &mut regions, &cx)?;
    drop(cx);
    let offered: Vec<&Site> =
        regions.iter().filter(|region| region.candidates().next().is_some()).map(Region::site).collect();
    let uncovered = uncovered(model, &offered);
    Ok(Candidates { uncovered, cx: setup.cx.clone(), regions, records, unmet, calibrated: Rc::clone(calibrated) })
}

/// Asks what every region takes where a candidate of one around it is carried out.
fn price_nested(setup: &Setup<'_>, model: &Model, regions: &mut [Region], cx: &MethodContext) -> Result<(), Failure> {
    for at in 0..regions.len() {
        for offer in 0..regions[at].offers.len() {
            let mut nested = Vec::new();
            for candidate in 0..regions[at].offers[offer].site.candidates.len() {
                Failure::if_stopped(setup.runner.child().listener())?;
                let Offer { method, site, .. } = &regions[at].offers[offer];
                let effect = method.effect_on_nested(model, site, &site.candidates[candidate], cx)?;
                nested.push(effect.map(|effect| Nested::under(regions, at, &effect, cx)).transpose()?);
            }
            regions[at].offers[offer].nested = nested;
        }
    }
    Ok(())
}

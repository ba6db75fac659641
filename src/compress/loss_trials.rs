//! Candidates whose loss is measured in the whole model, because it does not follow from the error of their layer.

use super::{candidates::Region, setup::Setup};
use crate::Failure;
use lathe_ir::Model;
use lathe_passes::{
    Quantity,
    lossy::{Candidate, Loss, MethodContext},
};

/// Floating-point operations that running candidates one by one may take.
const MOST_FLOPS: f64 = 4e12;

/// Carries out the candidates of methods that need it, each alone, and measures what the outputs lose. Candidates that
/// another of the same method is as good as go first, and those that give no numbers afterwards.
pub(super) fn measure_losses(
    setup: &Setup<'_>,
    model: &Model,
    regions: &mut [Region],
    cx: &MethodContext,
    warnings: &mut Vec<String>,
) -> Result<(), Failure> {
    let Some(calibration) = cx.calibration else { return Ok(()) };
    let mut unmeasured = 0;
    for region in regions.iter_mut() {
        let mut stays = region.unbeaten(&setup.cx.quantities);
        for (offer, stays) in region.offers.iter().zip(&mut stays).filter(|(offer, _)| !offer.needs.trials) {
            *stays = vec![true; offer.site.candidates.len()];
        }
        region.retain(&stays);
        let tried = region.candidates().filter(|(offer, _)| offer.needs.trials);
        unmeasured += tried.filter(|(offer, own)| offer.site.candidates[*own].loss.measured().is_none()).count();
    }
    if unmeasured as f64 * calibration.trial_flops() > MOST_FLOPS {
        warnings.push(format!(
            "the loss of {unmeasured} choices is told by their layers alone, which may be far too little: trying them in \
             the whole model would take long; a smaller calibration set shortens it"
        ));
        return Ok(());
    }
    for region in regions.iter_mut() {
        let (mut variants, mut of) = (Vec::new(), Vec::new());
        for (at, offer) in region.offers.iter().enumerate().filter(|(_, offer)| offer.needs.trials) {
            for (own, candidate) in offer.site.candidates.iter().enumerate() {
                Failure::if_stopped(setup.runner.child().listener())?;
                if candidate.loss.measured().is_some() {
                    continue;
                }
                let mut variant = model.clone();
                let done = offer.method.apply(&mut variant, &offer.site, candidate, cx)?;
                if !done.changes.is_empty() {
                    variants.push(variant);
                    of.push((at, own));
                }
            }
        }
        for ((at, own), lost) in of.into_iter().zip(calibration.trials_of(&variants)?) {
            region.offers[at].site.candidates[own].loss = Loss::Measured(lost);
        }
        let numbers = |choice: &Candidate| choice.loss.measured().is_none_or(f64::is_finite);
        let stays = region.offers.iter().map(|offer| offer.site.candidates.iter().map(numbers).collect());
        let stays: Vec<Vec<bool>> = stays.collect();
        region.retain(&stays);
    }
    Ok(())
}

impl Region {
    /// Which choices of every offer no other of the offer is as good as: in what is predicted to be lost, and in what is
    /// limited.
    fn unbeaten(&self, measures: &[Quantity]) -> Vec<Vec<bool>> {
        let mut times = self.latency.iter().skip(1).map(|ns| ns.unwrap_or(u64::MAX));
        let mut all = Vec::new();
        for offer in &self.offers {
            let figures = |choice: &Candidate| {
                let ns = times.next().unwrap_or(0);
                let spent = |measure: &Quantity| match measure {
                    Quantity::Size => choice.cost.bytes,
                    Quantity::Parameters => choice.cost.parameters,
                    Quantity::Flops => choice.cost.flops_per_row,
                    Quantity::Latency => ns,
                };
                (offer.loss(choice), measures.iter().map(spent).collect::<Vec<u64>>())
            };
            let figures: Vec<(f64, Vec<u64>)> = offer.site.candidates.iter().map(figures).collect();
            let beats = |a: usize, b: usize| {
                let (one, other) = (&figures[a], &figures[b]);
                let as_good = one.0 <= other.0 && one.1.iter().zip(&other.1).all(|(x, y)| x <= y);
                as_good && (a < b || one != other)
            };
            let count = figures.len();
            all.push((0..count).map(|b| !(0..count).any(|a| a != b && beats(a, b))).collect());
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{candidates::Offer, latency_model::tests::offer},
        *,
    };

    #[test]
    fn what_loses_more_and_saves_no_more_than_another_is_beaten() {
        let offers: Vec<Offer> =
            vec![offer("quantize", &["int8"]), offer("substitute", &["mean", "max", "copy", "shift", "again"])];
        let mut region = Region { offers, latency: [100, 90, 60, 60, 50, 70, 60].map(Some).to_vec() };
        for (choice, lost) in region.offers[1].site.candidates.iter_mut().zip([0.2, 0.3, 0.4, 0.1, 0.2]) {
            choice.loss = Loss::Measured(lost);
        }
        let found = region.unbeaten(&[Quantity::Latency]);
        // As fast and worse, as fast and as good as one before it.
        assert_eq!(found, [vec![true], vec![true, false, true, true, false]]);
        assert_eq!(region.unbeaten(&[Quantity::Flops])[1], [false, false, false, true, false]);
        region.retain(&found);
        let names: Vec<&str> = region.offers[1].site.candidates.iter().map(|c| c.label.as_str()).collect();
        assert_eq!(names, ["mean", "copy", "shift"]);
        assert_eq!(region.latency, [100, 90, 60, 50, 70].map(Some));
    }
}

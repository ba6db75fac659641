//! Choices whose loss is measured in the whole model, because the error of their layer does not tell it.

use super::{Compressor, candidates::Place};
use crate::Failure;
use lathe_ir::Model;
use lathe_passes::{
    Quantity,
    lossy::{Candidate, Loss, MethodContext},
};

/// Floating-point operations that trying choices one by one may take.
const MOST_FLOPS: f64 = 4e12;

impl Compressor<'_> {
    /// Carries out the choices of methods that ask for it, each alone, and measures what the outputs lose. Choices that
    /// another of the same method is as good as go first, and those that give no numbers afterwards.
    pub(super) fn try_choices(
        &self,
        model: &Model,
        places: &mut [Place],
        cx: &MethodContext,
        warnings: &mut Vec<String>,
    ) -> Result<(), Failure> {
        let Some(calibration) = cx.calibration else { return Ok(()) };
        let mut untold = 0;
        for place in places.iter_mut() {
            let mut stays = place.unbeaten(&self.cx.quantities);
            for (offer, stays) in place.offers.iter().zip(&mut stays).filter(|(offer, _)| !offer.needs.trials) {
                *stays = vec![true; offer.site.candidates.len()];
            }
            place.retain(&stays);
            let tried = place.choices().filter(|(offer, _)| offer.needs.trials);
            untold += tried.filter(|(offer, own)| offer.site.candidates[*own].loss.measured().is_none()).count();
        }
        if untold as f64 * calibration.trial_flops() > MOST_FLOPS {
            warnings.push(format!(
                "the loss of {untold} choices is told by their layers alone, which may be far too little: trying them in \
                 the whole model would take long; a smaller calibration set shortens it"
            ));
            return Ok(());
        }
        for place in places.iter_mut() {
            for offer in place.offers.iter_mut().filter(|offer| offer.needs.trials) {
                for own in 0..offer.site.candidates.len() {
                    Failure::if_stopped(self.runner.child().listener())?;
                    if offer.site.candidates[own].loss.measured().is_some() {
                        continue;
                    }
                    let mut variant = model.clone();
                    let candidate = &offer.site.candidates[own];
                    let done = offer.method.apply(&mut variant, &offer.site, candidate, cx)?;
                    if !done.changes.is_empty() {
                        let lost = calibration.trials(&variant, &[Vec::new()])?;
                        if let Some(&lost) = lost.first() {
                            offer.site.candidates[own].loss = Loss::Measured(lost);
                        }
                    }
                }
            }
            let numbers = |choice: &Candidate| choice.loss.measured().is_none_or(f64::is_finite);
            let stays = place.offers.iter().map(|offer| offer.site.candidates.iter().map(numbers).collect());
            let stays: Vec<Vec<bool>> = stays.collect();
            place.retain(&stays);
        }
        Ok(())
    }
}

impl Place {
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
        let mut place = Place { offers, latency: [100, 90, 60, 60, 50, 70, 60].map(Some).to_vec() };
        for (choice, lost) in place.offers[1].site.candidates.iter_mut().zip([0.2, 0.3, 0.4, 0.1, 0.2]) {
            choice.loss = Loss::Measured(lost);
        }
        let found = place.unbeaten(&[Quantity::Latency]);
        // As fast and worse, as fast and as good as one before it.
        assert_eq!(found, [vec![true], vec![true, false, true, true, false]]);
        assert_eq!(place.unbeaten(&[Quantity::Flops])[1], [false, false, false, true, false]);
        place.retain(&found);
        let names: Vec<&str> = place.offers[1].site.candidates.iter().map(|c| c.label.as_str()).collect();
        assert_eq!(names, ["mean", "copy", "shift"]);
        assert_eq!(place.latency, [100, 90, 60, 50, 70].map(Some));
    }
}

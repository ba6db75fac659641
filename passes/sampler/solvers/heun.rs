//! Karras et al. 2022, arXiv:2206.00364: Heun steps in the noise level, two evaluations each but the last.

use crate::sampler::{
    Anchor, BetaSchedule, Error, Request, Row, Schedule, Scheduler, Sigmas, Solver, SolverInfo, levels,
};

/// Heun steps in the noise level.
pub(super) struct Heun;

/// Betas of the solvers that evaluate the network twice, where the configuration does not say.
pub(super) const BETAS: (f64, f64, BetaSchedule) = (0.000_85, 0.012, BetaSchedule::Linear);

impl Solver for Heun {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "heun",
            class: "HeunDiscreteScheduler",
            summary: "Heun steps in the noise level, two evaluations each",
            source: "Karras et al. 2022, arXiv:2206.00364",
            betas: BETAS,
            clip_sample: Some(false),
            sigmas: &[Sigmas::Karras, Sigmas::Exponential, Sigmas::Beta],
            fractions: true,
            zero_snr: false,
            pairs: true,
            mixtures: false,
            ..SolverInfo::USUAL
        }
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let (mut sigmas, times) = levels::growing(scheduler, &Schedule::new(scheduler), &request.steps);
        sigmas.push(0.0);
        let mut rows = Vec::new();
        for (index, pair) in sigmas.windows(2).enumerate() {
            let (sigma, next) = (pair[0], pair[1]);
            let way = next - sigma;
            rows.push(Row { history: vec![way], ..levels::derivative_row(scheduler, sigma, times[index]) });
            // At the end there is no noise to divide by.
            if let Some(&time) = times.get(index + 1) {
                rows.push(again(levels::derivative_row(scheduler, next, time), way));
            }
        }
        Ok((rows, levels::growing_scale(scheduler, &sigmas)))
    }
}

/// The second evaluation of a step, from where it began with the mean of what both kept.
pub(super) fn again(row: Row, way: f64) -> Row {
    let anchor = Some(Anchor { back: 1, factor: 1.0 });
    Row { state: 0.0, anchor, history: vec![0.5 * way, 0.5 * way], ..row }
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::{SD, assert_rows, assert_six, sd, table};
    use serde_json::json;

    #[test]
    fn steps_are_the_golden_ones() {
        let rows = table("HeunDiscreteScheduler", SD.clone(), 5).rows;
        assert_eq!(rows.len(), 9);
        assert_rows(&[&rows[0].history[..], &rows[1].history], &[vec![-10.528_56], vec![-5.264_279, -5.264_279]]);
        let rows = table("HeunDiscreteScheduler", SD.clone(), 10).rows;
        assert_six(&rows[10].history[..1], &[-0.41257]);
        let rows = table("HeunDiscreteScheduler", sd(json!({"use_karras_sigmas": true})), 10).rows;
        assert_six(&[rows[10].time, rows[10].history[0]], &[327.147, -0.467_156]);
    }

    #[test]
    fn its_own_schedule_is_exponential() {
        let rows = table("HeunDiscreteScheduler", json!({"beta_schedule": "exp"}), 5).rows;
        // The cumulative alpha falls as e^{-12t}.
        let sigma = ((12.0_f64 * 0.75).exp() - 1.0).sqrt();
        let found = (rows[1].input_scale.powi(-2) - 1.0).sqrt();
        assert!((found / sigma - 1.0).abs() < 0.02, "{found} {sigma}");
    }
}

//! Linear multistep steps in the noise level: Adams and Bashforth's on the derivative of Karras et al. 2022, arXiv:2206.00364.

use crate::sampler::{
    Error, Request, Row, Schedule, Scheduler, Sigmas, Solver, SolverInfo, levels,
    polynomials::{moments, weights},
};

/// Linear multistep steps of order 4.
pub(super) struct Lms;

/// The order, once so many steps were made.
const ORDER: usize = 4;

impl Solver for Lms {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "lms",
            class: "LMSDiscreteScheduler",
            summary: "linear multistep steps of order 4 in the noise level",
            source: "Karras et al. 2022, arXiv:2206.00364",
            sigmas: &[Sigmas::Karras, Sigmas::Exponential, Sigmas::Beta],
            fractions: true,
            zero_snr: false,
            mixtures: false,
            ..SolverInfo::USUAL
        }
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let (mut sigmas, times) = levels::growing(scheduler, &Schedule::new(scheduler), &request.steps);
        sigmas.push(0.0);
        let row = |(index, &time): (usize, &f64)| {
            let (sigma, order) = (sigmas[index], ORDER.min(index + 1));
            let nodes: Vec<f64> = (0..order).map(|back| sigmas[index - back] - sigma).collect();
            let history = weights(&nodes, &moments(sigmas[index + 1] - sigma, order));
            Row { history, ..levels::derivative_row(scheduler, sigma, time) }
        };
        let rows = times.iter().enumerate().map(row).collect();
        Ok((rows, levels::growing_scale(scheduler, &sigmas)))
    }
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::{SD, assert_six, sd, table};
    use serde_json::json;

    #[test]
    fn ten_steps_are_the_golden_ones() {
        let row = &table("LMSDiscreteScheduler", SD.clone(), 10).rows[5];
        assert_six(&row.history, &[-0.676_671, 0.357_871, -0.103_261, 0.009_490_57]);
        let row = &table("LMSDiscreteScheduler", sd(json!({"use_karras_sigmas": true})), 10).rows[5];
        assert_six(&row.history, &[-0.701_731, 0.309_109, -0.082_734_8, 0.008_201_12]);
    }

    fn check(settings: serde_json::Value, golden: &[&[f64]]) {
        let rows = table("LMSDiscreteScheduler", settings, 5).rows;
        for (row, golden) in rows.iter().zip(golden) {
            assert_eq!(row.history.len(), golden.len());
            let near = |(a, b): (&f64, &f64)| (a - b).abs() <= (1e-6 * b.abs()).max(6e-8);
            assert!(row.history.iter().zip(*golden).all(near), "{:?} is not {golden:?}", row.history);
        }
    }

    #[test]
    fn steps_are_the_golden_ones() {
        check(
            SD.clone(),
            &[
                &[-10.528_56],
                &[-2.760_357, 0.289_850_0],
                &[-1.132_575, 0.221_688_3, -0.009_545_6],
                &[-1.030_703, 0.413_445_3, -0.049_337_4, 0.000_612_0],
                &[-0.030_191_5, 0.001_339_6, -0.000_329_5, 0.000_013_8],
            ],
        );
        check(
            sd(json!({"use_karras_sigmas": true})),
            &[
                &[-9.818_104],
                &[-4.154_311, 0.631_872_4],
                &[-1.222_753, 0.213_508_7, -0.016_909_0],
                &[-0.250_081_7, 0.033_815_7, -0.002_588_2, 0.000_070_0],
                &[-0.031_582_5, 0.002_521_1, -0.000_107_8, 0.000_001_7],
            ],
        );
    }
}

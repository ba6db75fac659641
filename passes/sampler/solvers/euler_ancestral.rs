//! Euler steps in the noise level that add fresh noise: Karras et al. 2022, arXiv:2206.00364.

use super::euler;
use crate::sampler::{Error, Request, Row, Scheduler, Solver, SolverInfo};

/// Euler steps that add fresh noise.
pub(super) struct EulerAncestral;

impl Solver for EulerAncestral {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "euler-ancestral",
            class: "EulerAncestralDiscreteScheduler",
            summary: "Euler steps that add fresh noise",
            source: "Karras et al. 2022, arXiv:2206.00364",
            finite_sigmas: true,
            ..SolverInfo::USUAL
        }
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        // The last step is always free of noise.
        let scheduler = Scheduler { final_sigma_zero: true, ..scheduler.clone() };
        Ok(euler::rows(&scheduler, &request.steps, &split))
    }
}

/// From a noise level and the next one: down to which a step goes, and how much fresh noise follows.
pub(super) fn split(sigma: f64, next: f64) -> (f64, f64) {
    let up = (next * next * (sigma * sigma - next * next) / (sigma * sigma)).max(0.0).sqrt();
    ((next * next - up * up).max(0.0).sqrt(), up)
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::{SD, assert_rows, table};

    #[test]
    fn ancestral_steps_are_the_golden_ones() {
        let rows = table("EulerAncestralDiscreteScheduler", SD.clone(), 5).rows;
        let sigmas = [14.614_648_8, 4.086_090_4, 1.615_583_5, 0.695_150_9, 0.029_167_5];
        let found: Vec<[f64; 2]> = rows.iter().zip(&sigmas).map(|(r, sigma)| [r.noise, r.state * sigma]).collect();
        let golden = [
            [3.923_136_6, 1.142_424_6],
            [1.483_937_7, 0.638_779_3],
            [0.627_510_1, 0.299_108_5],
            [0.029_141_8, 0.001_223_8],
            [0.0, 0.0],
        ];
        assert_rows(&found, &golden);
    }
}

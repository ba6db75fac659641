//! The steps of `kdpm2` that add fresh noise: Karras et al. 2022, arXiv:2206.00364.

use super::{
    euler_ancestral::split,
    kdpm2::{self, Way},
};
use crate::sampler::{Error, Request, Row, Scheduler, Solver, SolverInfo};

/// Midpoint steps that add fresh noise.
pub(super) struct Kdpm2Ancestral;

impl Solver for Kdpm2Ancestral {
    fn info(&self) -> &'static SolverInfo {
        const INFO: SolverInfo = SolverInfo {
            name: "kdpm2-ancestral",
            class: "KDPM2AncestralDiscreteScheduler",
            summary: "the same steps with fresh noise",
            ..kdpm2::USUAL
        };
        &INFO
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        Ok(kdpm2::rows(scheduler, request, &|sigma, next| {
            let (down, up) = split(sigma, next);
            Way { middle: (sigma * down).sqrt(), down, up }
        }))
    }
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::{SD, assert_six, sd, table};
    use serde_json::json;

    #[test]
    fn steps_are_the_golden_ones() {
        let rows = table("KDPM2AncestralDiscreteScheduler", SD.clone(), 10).rows;
        assert_six(&[rows[11].time, rows[11].history[0], rows[11].noise], &[333.0, -0.69858, 0.671_957]);
        // The middle is the level of the next step itself, whose noise is what the step adds and what it leaves.
        assert!((rows[11].level.noise / rows[12].level.noise - 1.0).abs() < 1e-9);
        let rows = table("KDPM2AncestralDiscreteScheduler", sd(json!({"use_karras_sigmas": true})), 10).rows;
        assert_six(&[rows[11].time, rows[11].history[0], rows[11].noise], &[145.939, -0.695_563, 0.389_859]);
    }
}

//! Latent consistency models, Luo et al. 2023, arXiv:2310.04378, of a flow.

use super::flow_euler;
use crate::sampler::{Error, Fields, Request, Row, Scheduler, Sigmas, Solver, SolverInfo};

/// Latent consistency models of a flow.
pub(super) struct FlowLcm;

impl Solver for FlowLcm {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "flow-lcm",
            class: "FlowMatchLCMScheduler",
            summary: "latent consistency models of a flow",
            source: "Luo et al. 2023, arXiv:2310.04378",
            fields: &["invert_sigmas", "scale_factors", "shift", "upscale_mode"],
            sigmas: &[Sigmas::Karras, Sigmas::Exponential, Sigmas::Beta],
            flow: true,
            fractions: true,
            zero_snr: false,
            mixtures: false,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        if fields.numbers("scale_factors")?.is_some_and(|factors| !factors.is_empty()) {
            return Err(fields.unsupported("scale_factors", ", by which the latent would grow between steps"));
        }
        flow_euler::read_levels(fields, scheduler)
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let row = |pair: &[f64]| {
            let (sigma, next) = (pair[0], pair[1]);
            Row { state: 0.0, history: vec![1.0 - next], noise: next, ..flow_euler::row(scheduler, sigma) }
        };
        Ok((flow_euler::levels(scheduler, request)?.windows(2).map(row).collect(), 1.0))
    }
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::{assert_rows, table};
    use serde_json::json;

    #[test]
    fn states_are_mixtures_of_estimate_and_fresh_noise() {
        let table = table("FlowMatchLCMScheduler", json!({"shift": 3.0}), 4);
        let found: Vec<[f64; 2]> = table.rows.iter().map(|row| [row.history[0], row.noise]).collect();
        let golden = [[0.142_307_7, 0.857_692_3], [0.397_849_5, 0.602_150_5], [0.991_071_4, 0.008_928_6], [1.0, 0.0]];
        assert_rows(&found, &golden);
        assert_eq!(table.noises(), 3);
    }
}

//! Luo et al. 2023, Latent consistency models, arXiv:2310.04378.

use crate::sampler::{
    BetaSchedule, Error, Fields, Level, Request, Row, Schedule, Scheduler, Solver, SolverInfo, Spacing, Steps, grid,
};

/// Latent consistency models.
pub(super) struct Lcm;

impl Solver for Lcm {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "lcm",
            class: "LCMScheduler",
            summary: "latent consistency models",
            source: "Luo et al. 2023, arXiv:2310.04378",
            fields: &["original_inference_steps", "timestep_scaling"],
            spacing: Spacing::Leading,
            betas: (0.000_85, 0.012, BetaSchedule::ScaledLinear),
            clip_sample: Some(false),
            thresholding: true,
            mixtures: false,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        scheduler.original_inference_steps = fields.count("original_inference_steps", 50)?;
        scheduler.timestep_scaling = fields.number("timestep_scaling", 10.0)?;
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        Ok((rows(scheduler, &Schedule::new(scheduler), request)?, 1.0))
    }
}

/// The variance of data that the boundary condition is made for.
const DATA_VARIANCE: f64 = 0.25;

fn rows(s: &Scheduler, schedule: &Schedule, request: &Request) -> Result<Vec<Row>, Error> {
    let times = match &request.steps {
        Steps::Count(count) => grid::lcm(s, *count)?,
        Steps::Times(times) => times.clone(),
    };
    let nexts: Vec<Option<f64>> = times.iter().skip(1).copied().map(Some).chain([None]).collect();
    let row = |(time, next): (f64, Option<f64>)| {
        let level = Level::of_alpha(schedule.alpha(time as usize));
        let scaled = time * s.timestep_scaling;
        let skip = DATA_VARIANCE / (scaled * scaled + DATA_VARIANCE);
        let out = scaled / (scaled * scaled + DATA_VARIANCE).sqrt();
        let after = next.map_or(1.0, |t| schedule.alpha(t as usize));
        Row {
            state: after.sqrt() * skip,
            history: vec![after.sqrt() * out],
            noise: (1.0 - after).sqrt(),
            ..level.row(time, level.estimate(s.prediction))
        }
    };
    Ok(times.into_iter().zip(nexts).map(row).collect())
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::table;
    use serde_json::json;

    #[test]
    fn all_but_the_last_step_add_noise() {
        let table = table("LCMScheduler", json!({}), 4);
        assert_eq!(table.noises(), 3);
        let last = &table.rows[3];
        assert!(last.state.abs() < 1e-6 && (last.history[0] - 1.0).abs() < 1e-6 && last.noise == 0.0);
    }
}

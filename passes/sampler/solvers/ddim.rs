//! Song et al. 2021, Denoising diffusion implicit models, arXiv:2010.02502.

use crate::sampler::{Error, Level, Request, Row, Schedule, Scheduler, Solver, SolverInfo, Spacing, Steps, grid};

/// Denoising diffusion implicit models.
pub(super) struct Ddim;

impl Solver for Ddim {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "ddim",
            class: "DDIMScheduler",
            aliases: &["DDIMParallelScheduler"],
            summary: "DDIM, deterministic or with `--eta`",
            source: "Song et al. 2021, arXiv:2010.02502",
            spacing: Spacing::Leading,
            clip_sample: Some(true),
            thresholding: true,
            eta: Some(0.0),
            ..SolverInfo::USUAL
        }
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        Ok((rows(scheduler, &Schedule::new(scheduler), request), 1.0))
    }
}

/// A grid of one's own steps to its true successors; the grids of the configuration step by `⌊T/N⌋` as the reference
/// does, even where that is not the next of its timesteps.
fn rows(s: &Scheduler, schedule: &Schedule, request: &Request) -> Vec<Row> {
    let last = if s.set_alpha_to_one { 1.0 } else { schedule.alpha(0) };
    let (times, nexts): (Vec<f64>, Vec<f64>) = match &request.steps {
        Steps::Count(count) => {
            let stride = (s.num_train_timesteps / count) as f64;
            let times = grid::whole(s, *count);
            let nexts = times.iter().map(|t| t - stride).collect();
            (times, nexts)
        }
        Steps::Times(times) => (times.clone(), times.iter().copied().skip(1).chain([-1.0]).collect()),
    };
    let row = |(time, next): (f64, f64)| {
        let bar = schedule.alpha(time as usize);
        let after = if next < 0.0 { last } else { schedule.alpha(next as usize) };
        let level = Level::of_alpha(bar);
        let variance = (1.0 - after) / (1.0 - bar) * (1.0 - bar / after);
        let noise = request.eta.unwrap_or(0.0) * variance.max(0.0).sqrt();
        let direction = (1.0 - after - noise * noise).max(0.0).sqrt();
        let epsilon = level.epsilon(s.prediction);
        Row {
            state: direction * epsilon[0],
            output: direction * epsilon[1],
            history: vec![after.sqrt()],
            noise,
            ..level.row(time, level.estimate(s.prediction))
        }
    };
    times.into_iter().zip(nexts).map(row).collect()
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::{assert_rows, table};
    use serde_json::json;

    const GOLDEN: [(f64, f64); 4] = [
        (2.091_162_3, -1.135_978_9),
        (1.626_667_1, -0.731_344_7),
        (1.333_647_4, -0.515_297_4),
        (1.152_071_5, -0.532_282_2),
    ];

    #[test]
    fn steps_are_the_golden_ones() {
        let mut settings = json!({
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "steps_offset": 1, "clip_sample": false
        });
        let last = |settings: &serde_json::Value| {
            let rows = table("DDIMScheduler", settings.clone(), 5).rows;
            let found: Vec<[f64; 2]> = rows.iter().map(|r| [r.affine().0, r.affine().1]).collect();
            assert_rows(&found[..4], &GOLDEN.map(|(a, b)| [a, b]));
            found[4]
        };
        assert_rows(&[last(&settings)], &[[1.000_853_1, -0.041_314_5]]);
        settings["set_alpha_to_one"] = json!(false);
        assert_rows(&[last(&settings)], &[[1.000_427_6, -0.012_141_8]]);
    }
}

//! Ho et al. 2020, Denoising diffusion probabilistic models, arXiv:2006.11239.

use crate::sampler::{
    Error, Fields, Level, Request, Row, Schedule, Scheduler, Solver, SolverInfo, Spacing, Steps, Variance, grid,
};
use serde_json::Value;

/// Ancestral sampling of the diffusion process.
pub(super) struct Ddpm;

impl Solver for Ddpm {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "ddpm",
            class: "DDPMScheduler",
            aliases: &["DDPMParallelScheduler"],
            summary: "ancestral sampling of the diffusion process",
            source: "Ho et al. 2020, arXiv:2006.11239",
            fields: &["variance_type"],
            spacing: Spacing::Leading,
            clip_sample: Some(true),
            thresholding: true,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        let words =
            [("fixed_small", Variance::Small), ("fixed_small_log", Variance::Small), ("fixed_large", Variance::Large)];
        let word = fields.get("variance_type").and_then(Value::as_str);
        if let Some(word) = word.filter(|word| word.starts_with("learned") || *word == "fixed_large_log") {
            return Err(Error::Unsupported(format!("`variance_type` = `{word}`")));
        }
        scheduler.variance = fields.word("variance_type", Variance::Small, &words)?;
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        Ok((rows(scheduler, &Schedule::new(scheduler), request), 1.0))
    }
}

/// The smallest variance of fresh noise.
const SMALLEST_VARIANCE: f64 = 1e-20;

fn rows(s: &Scheduler, schedule: &Schedule, request: &Request) -> Vec<Row> {
    let times = match &request.steps {
        Steps::Count(count) => grid::whole(s, *count),
        Steps::Times(times) => times.clone(),
    };
    let nexts: Vec<Option<f64>> = times.iter().skip(1).copied().map(Some).chain([None]).collect();
    let row = |(time, next): (f64, Option<f64>)| {
        let bar = schedule.alpha(time as usize);
        let after = next.map_or(1.0, |t| schedule.alpha(t as usize));
        let level = Level::of_alpha(bar);
        let beta = 1.0 - bar / after;
        let posterior = ((1.0 - after) / (1.0 - bar) * beta).max(SMALLEST_VARIANCE);
        let variance = match s.variance {
            Variance::Small => posterior,
            Variance::Large => beta,
        };
        Row {
            state: (1.0 - beta).sqrt() * (1.0 - after) / (1.0 - bar),
            history: vec![after.sqrt() * beta / (1.0 - bar)],
            noise: if time > 0.0 { variance.sqrt() } else { 0.0 },
            ..level.row(time, level.estimate(s.prediction))
        }
    };
    times.into_iter().zip(nexts).map(row).collect()
}

#[cfg(test)]
mod tests {
    use crate::sampler::{Level, testing::table};
    use serde_json::json;

    /// One step of the process leaves the marginal distribution of the next timestep: signal and variance add up.
    #[test]
    fn steps_keep_the_marginal_distribution() {
        let table = table("DDPMScheduler", json!({"clip_sample": false}), 10);
        let schedule = crate::sampler::testing::schedule("DDPMScheduler", json!({}));
        for pair in table.rows.windows(2) {
            let (now, next) = (&pair[0], &pair[1]);
            let here = Level::of_alpha(schedule.alpha(now.time as usize));
            let there = Level::of_alpha(schedule.alpha(next.time as usize));
            // With x = α·x0 + s·ε and an exact estimate, x' has the mean α'·x0 and the variance s'².
            let mean = now.state * here.alpha + now.history[0];
            let variance = (now.state * here.noise).powi(2) + now.noise.powi(2);
            assert!((mean - there.alpha).abs() < 1e-12, "{mean} {}", there.alpha);
            assert!((variance - there.noise.powi(2)).abs() < 1e-12, "{variance}");
        }
        assert_eq!(table.rows.last().map(|r| r.noise), Some(0.0));
    }
}

//! Ho et al. 2020, Denoising diffusion probabilistic models, arXiv:2006.11239.

use super::{
    super::{Request, Row, Scheduler, Steps, grid, schedule::Schedule, scheduler::Variance},
    Level,
};

/// The smallest variance of fresh noise.
const SMALLEST_VARIANCE: f64 = 1e-20;

pub(super) fn rows(s: &Scheduler, schedule: &Schedule, request: &Request) -> Vec<Row> {
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
            estimates: vec![after.sqrt() * beta / (1.0 - bar)],
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
            let mean = now.state * here.alpha + now.estimates[0];
            let variance = (now.state * here.noise).powi(2) + now.noise.powi(2);
            assert!((mean - there.alpha).abs() < 1e-12, "{mean} {}", there.alpha);
            assert!((variance - there.noise.powi(2)).abs() < 1e-12, "{variance}");
        }
        assert_eq!(table.rows.last().map(|r| r.noise), Some(0.0));
    }
}

//! DDIM steps, Song et al. 2021, arXiv:2010.02502, on the shifted schedule of Yang et al. 2024, CogVideoX, arXiv:2408.06072.

use crate::sampler::{
    BetaSchedule, Error, Fields, Level, Request, Row, Schedule, Scheduler, Solver, SolverInfo, Spacing, Steps, grid,
};

/// Deterministic DDIM on a schedule with less signal.
pub(super) struct CogvideoxDdim;

impl Solver for CogvideoxDdim {
    fn info(&self) -> &'static SolverInfo {
        const INFO: SolverInfo = SolverInfo {
            name: "cogvideox-ddim",
            class: "CogVideoXDDIMScheduler",
            summary: "deterministic DDIM on a schedule with less signal",
            ..USUAL
        };
        &INFO
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        scheduler.snr_shift_scale = Some(fields.positive("snr_shift_scale", 3.0)?);
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let row = |way: Way| {
            let (here, next) = (Level::of_alpha(way.here), Level::of_alpha(way.next));
            let state = next.noise / here.noise;
            let history = vec![next.alpha - here.alpha * state];
            Row { state, history, ..here.row(way.time, here.estimate(scheduler.prediction)) }
        };
        Ok((ways(scheduler, &request.steps).map(row).collect(), 1.0))
    }
}

/// What both solvers for this model have in common.
pub(super) const USUAL: SolverInfo = SolverInfo {
    source: "Yang et al. 2024, arXiv:2408.06072",
    fields: &["snr_shift_scale"],
    spacing: Spacing::Leading,
    betas: (0.000_85, 0.012, BetaSchedule::ScaledLinear),
    mixtures: false,
    ..SolverInfo::USUAL
};

/// A step from one cumulative alpha to the next.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    pub time: f64,
    pub here: f64,
    pub next: f64,
    /// Whether the next level is the final one.
    pub last: bool,
}

/// The steps: of a count by whole strides as in the reference, of a grid to its own next timestep.
pub(super) fn ways(s: &Scheduler, steps: &Steps) -> impl Iterator<Item = Way> {
    let schedule = Schedule::new(s);
    let end = if s.set_alpha_to_one { 1.0 } else { schedule.alpha(0) };
    let (times, nexts): (Vec<f64>, Vec<f64>) = match steps {
        Steps::Count(count) => {
            let stride = (s.num_train_timesteps / count) as f64;
            grid::whole(s, *count).into_iter().map(|time| (time, time - stride)).unzip()
        }
        Steps::Times(times) => (times.clone(), times.iter().copied().skip(1).chain([-1.0]).collect()),
    };
    times.into_iter().zip(nexts).map(move |(time, next)| {
        let last = next < 0.0;
        let next = if last { end } else { schedule.alpha(next as usize) };
        Way { time, here: schedule.alpha(time as usize), next, last }
    })
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::{schedule, table};
    use serde_json::json;

    #[test]
    fn the_schedule_has_a_third_of_the_signal_to_noise() {
        let plain = schedule(
            "DDIMScheduler",
            json!({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}),
        );
        let shifted = schedule("CogVideoXDDIMScheduler", json!({}));
        for timestep in [0, 400, 999] {
            let ratio = |bar: f64| bar / (1.0 - bar);
            let found = ratio(shifted.alpha(timestep)) * 3.0 / ratio(plain.alpha(timestep));
            assert!((found - 1.0).abs() < 1e-3, "{found}");
        }
    }

    #[test]
    fn without_a_shift_it_is_ddim() {
        let found = table("CogVideoXDDIMScheduler", json!({"snr_shift_scale": 1.0}), 5).rows;
        let ddim = table("DDIMScheduler", crate::sampler::testing::sd(json!({"clip_sample": false})), 5).rows;
        for (a, b) in found.iter().zip(&ddim) {
            assert!((a.affine().0 - b.affine().0).abs() < 1e-6 && (a.affine().1 - b.affine().1).abs() < 1e-6);
        }
    }
}

//! The middle of the way from noise to sample is gone at a smaller size.
//!
//! Source: Tian et al. 2025, Bottleneck Sampling, arXiv:2503.18940. Noise levels between the ends of a stage are shifted in
//! proportion to the side of the latent, as Esser et al. 2024, arXiv:2403.03206, shift them by resolution; the exact rule of
//! the source was not seen.

use super::{Method, Options, PlanContext, Stages};
use crate::{
    Opt,
    sampler::{
        Error, Request, Schedule, Scheduler, Sizes, StepPlan, Table, Up,
        sizes::{share, side_ratio},
    },
};

pub(super) const METHOD: Method = Method {
    name: "bottleneck",
    summary: "goes through the middle steps at a smaller size",
    doc: "The latent is made smaller after the first stage of steps and larger again before the last. It needs a denoiser \
          whose latent is `[n, c, h, w]` with open height and width, and `--input-shape` for the size of samples. It makes \
          the steps that other methods then work on, so it comes first. Not for LCM and for `invert_sigmas`.",
    options: &[
        Opt {
            name: "sizes",
            unit: "numbers as 1/2/3",
            default: "1/0.5/1",
            doc: "shares of the sample's size, by stage",
        },
        Opt {
            name: "ends",
            unit: "numbers as 1/2/3",
            default: "",
            doc: "the steps after which stages end; of three stages as 4/16/21 of 21 unless given",
        },
        Opt { name: "up", unit: UPS, default: "linear", doc: "how latents grow" },
    ],
    stages: Stages::Any,
    source: "Tian et al. 2025, Bottleneck Sampling, arXiv:2503.18940",
    apply,
};

const UPS: &str = "nearest, linear, cubic or matched";

fn apply(plan: &mut StepPlan, options: &Options, cx: &PlanContext) -> Result<(), Error> {
    let steps = plan.grid.len();
    let up: String = options.get("up")?;
    let up = Up::from_name(&up).ok_or_else(|| options.wrong("up", &up, UPS))?;
    let shares: Vec<f64> = options.several("sizes")?.unwrap_or_default();
    let sizes = sizes(cx.calibration.sides()?, &shares)?;
    let usual = if shares.len() == 3 { Bottleneck::usual_ends(steps) } else { None };
    let ends = options.several("ends")?.or(usual).ok_or_else(|| {
        let stages = shares.len();
        Error::Plan(format!("bottleneck needs its option ends for {stages} stages of {steps} steps: 4/16/21"))
    })?;
    bottleneck(plan, cx.scheduler, cx.request, cx.table, &Bottleneck { sizes, ends, up })
}

/// Height and width of stages by their shares of those that samples have.
fn sizes(full: [usize; 2], shares: &[f64]) -> Result<Vec<[usize; 2]>, Error> {
    let side = |share: f64, whole: usize| {
        let side = share * whole as f64;
        let fits = side >= 1.0 && share <= 1.0 && side.fract() == 0.0;
        fits.then_some(side as usize).ok_or_else(|| {
            Error::Plan(format!(
                "option sizes of bottleneck has {share} of {whole}, expected a whole number up to {whole}"
            ))
        })
    };
    if shares.last() != Some(&1.0) {
        let message = "option sizes of bottleneck ends with 1, the size of the sample: 1/0.5/1";
        return Err(Error::Plan(message.to_owned()));
    }
    shares.iter().map(|&share| Ok([side(share, full[0])?, side(share, full[1])?])).collect()
}

/// The stages.
#[derive(Debug, Clone, PartialEq)]
pub struct Bottleneck {
    /// Height and width of each stage; those of the last are those of the sample.
    pub sizes: Vec<[usize; 2]>,
    /// How many steps are done when each stage ends.
    pub ends: Vec<usize>,
    /// How latents grow.
    pub up: Up,
}

impl Bottleneck {
    /// Where three stages of so many steps end, in the proportions of the source's own setting for 21 steps; `None` for
    /// fewer steps than stages.
    pub fn usual_ends(steps: usize) -> Option<Vec<usize>> {
        let at = |of: usize| (steps * of + 10) / 21;
        let ends = vec![at(4).max(1), at(16).min(steps.saturating_sub(1)), steps];
        (ends[0] < ends[1]).then_some(ends)
    }
}

/// The shift of noise levels of a flow.
fn shifted(share: f64, by: f64) -> f64 {
    by * share / (1.0 + (by - 1.0) * share)
}

/// How a scheduler tells shares of noise by times, and on which line it spreads steps evenly.
struct Clock<'a> {
    scheduler: &'a Scheduler,
    schedule: Schedule,
    /// By how much even noise levels of a flow are shifted.
    shift: f64,
}

impl Clock<'_> {
    fn is_flow(&self) -> bool {
        self.scheduler.solver.info().flow
    }

    /// The time at a share of noise, as the solver can use it.
    fn time(&self, share: f64) -> f64 {
        let total = self.scheduler.num_train_timesteps as f64;
        let time = match (self.is_flow(), share < 1.0) {
            (true, _) => share * total,
            (_, true) => self.schedule.time_of(share / (1.0 - share)),
            _ => total - 1.0,
        };
        if self.scheduler.solver.info().fractions { time } else { time.round_ties_even() }
    }

    /// Where a share of noise lies on the line.
    fn place(&self, share: f64) -> f64 {
        if self.is_flow() { shifted(share, 1.0 / self.shift) } else { self.schedule.time_of(share / (1.0 - share)) }
    }

    /// The share of noise at a place.
    fn share(&self, place: f64) -> f64 {
        if self.is_flow() {
            return shifted(place, self.shift);
        }
        let sigma = self.schedule.sigma_at(place);
        sigma / (1.0 + sigma)
    }
}

/// Writes sizes and timesteps. `table` is that of the scheduler's own steps, at which stages end.
///
/// A smaller stage begins at the noise level where the one before it ended, a larger one at more noise, in proportion to
/// the side: what was added to it is noise of smaller details than the stage before could know.
pub fn bottleneck(
    plan: &mut StepPlan,
    scheduler: &Scheduler,
    request: &Request,
    table: &Table,
    options: &Bottleneck,
) -> Result<(), Error> {
    let (steps, Bottleneck { sizes, ends, up }) = (table.rows.len(), options);
    if plan.sizes.is_some() || !plan.steps.is_empty() || plan.cfg.iter().any(|mode| *mode != plan.cfg[0]) {
        return Err(Error::Plan(
            "bottleneck makes the steps that other methods then work on, and comes first".to_owned(),
        ));
    }
    let rising = ends.windows(2).all(|pair| pair[0] < pair[1]) && ends.first().is_some_and(|&end| end > 0);
    if sizes.len() != ends.len() || !rising || ends.last() != Some(&steps) {
        return Err(Error::Plan(format!(
            "{} stages end after {ends:?} of {steps} steps, expected as many ends, rising to the number of steps",
            sizes.len()
        )));
    }
    let shift = if scheduler.solver.info().flow { scheduler.flow_shift(request)? } else { 1.0 };
    let clock = Clock { scheduler, schedule: Schedule::new(scheduler), shift };
    let level = |step: usize| share(table.rows[step].level);
    let (mut grid, mut by_step) = (Vec::with_capacity(steps), Vec::with_capacity(steps));
    let (mut start, mut done) = (level(0), 0);
    for (index, (&size, &end)) in sizes.iter().zip(ends).enumerate() {
        let count = end - done;
        let ratio = side_ratio(sizes[sizes.len() - 1], size);
        // The last stage ends with the scheduler's last step, others where the next one takes over.
        let (until, gaps) = if end < steps { (level(end), count) } else { (level(steps - 1), count.max(2) - 1) };
        let [from, to] = [start, until].map(|share| clock.place(shifted(share, 1.0 / ratio)));
        grid.push(clock.time(start));
        let places = (1..count).map(|k| from + (to - from) * k as f64 / gaps as f64);
        grid.extend(places.map(|place| clock.time(shifted(clock.share(place), ratio))));
        by_step.extend(std::iter::repeat_n(size, count));
        if let Some(&next) = sizes.get(index + 1) {
            start = shifted(until, side_ratio(size, next).max(1.0));
        }
        done = end;
    }
    plan.grid = grid;
    plan.sizes = Some(Sizes { steps: by_step, up: *up });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::{Mode, testing::scheduler};
    use serde_json::{Value, json};

    fn staged(
        class: &str,
        settings: Value,
        request: &Request,
        options: &Bottleneck,
    ) -> Result<(StepPlan, Table), Error> {
        let scheduler = scheduler(class, settings);
        let table = Table::new(&scheduler, request)?;
        let grid = table.rows.iter().map(|row| row.time).collect();
        let mut plan = StepPlan::plain(scheduler.solver.name(), grid, Mode::Conditional);
        bottleneck(&mut plan, &scheduler, request, &table, options)?;
        plan.check()?;
        let sizes = plan.sizes.clone().unwrap();
        let staged = Table::staged(&scheduler, request, &plan.grid, &sizes)?;
        Ok((plan, staged))
    }

    fn options(ends: &[usize], up: Up) -> Bottleneck {
        Bottleneck { sizes: vec![[8, 8], [4, 4], [8, 8]], ends: ends.to_vec(), up }
    }

    #[test]
    fn grids_of_a_flow_are_shifted_by_stage() {
        // Even levels 1, 0.875, …, so the first stage ends at 0.75 and the second at 0.25.
        let request = Request { explicit_sigmas: true, ..Request::steps(8) };
        let (plan, table) =
            staged("FlowMatchEulerDiscreteScheduler", json!({}), &request, &options(&[2, 6, 8], Up::Linear)).unwrap();
        let shares: Vec<f64> = plan.grid.iter().map(|t| t / 1000.0).collect();
        // Half the side: levels are S½ of even ones from S₂(0.75) = 6/7 to S₂(0.25) = 2/5.
        let low = |k: f64| shifted(6.0 / 7.0 + (2.0 / 5.0 - 6.0 / 7.0) * k / 4.0, 0.5);
        // Then from S₂(0.25) = 2/5 to the last even level.
        let expected = [1.0, 0.875, 0.75, low(1.0), low(2.0), low(3.0), 0.4, 0.125];
        for (found, expected) in shares.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{shares:?}");
        }
        // The last rows of stages leave an estimate and noise at the level of the next.
        let left = |step: usize| (table.rows[step].state, table.rows[step].history[0], table.rows[step].noise);
        assert_eq!((left(1).0, left(5).0), (0.0, 0.0));
        assert!((left(1).1 - 0.25).abs() < 1e-12 && (left(1).2 - 0.75).abs() < 1e-12);
        assert!((left(5).1 - 0.6).abs() < 1e-12 && (left(5).2 - 0.4).abs() < 1e-12);
    }

    /// With an exact estimate, a state that is repeated twice in both directions holds a quarter of the variance that its
    /// noise must have in each mean of four, and what is added the other three.
    #[test]
    fn matched_growth_keeps_signal_and_variance() {
        for (class, settings) in [
            ("FlowMatchEulerDiscreteScheduler", json!({"shift": 3.0})),
            ("DDIMScheduler", json!({"clip_sample": false})),
            ("EulerDiscreteScheduler", json!({})),
        ] {
            let (_, table) = staged(class, settings, &Request::steps(9), &options(&[2, 6, 9], Up::Matched)).unwrap();
            let (row, next) = (&table.rows[5], table.rows[6].level);
            let signal = row.state * row.level.alpha + row.history[0];
            let noise = row.state * row.level.noise;
            assert!((signal - next.alpha).abs() < 1e-12, "{class}: {signal} {next:?}");
            // Of the mean of a group, whose variance is that of one of its four places.
            assert!((noise - next.noise / 2.0).abs() < 1e-12 * next.noise, "{class}: {noise} {next:?}");
            assert!((row.noise - next.noise).abs() < 1e-12 * next.noise);
        }
    }

    #[test]
    fn times_of_a_schedule_are_whole_and_fall_in_each_stage() {
        let (plan, _) = staged(
            "DDPMScheduler",
            json!({"clip_sample": false}),
            &Request::steps(21),
            &options(&[4, 16, 21], Up::Cubic),
        )
        .unwrap();
        for stage in plan.sizes.unwrap().stages() {
            assert!(plan.grid[stage].windows(2).all(|pair| pair[0] > pair[1] && pair[0].fract() == 0.0));
        }
        // Noise grows again where the latent does, and only there.
        assert!(plan.grid[4] < plan.grid[3] && plan.grid[16] > plan.grid[15]);
        assert_eq!(plan.grid.last(), Some(&0.0));
    }

    #[test]
    fn stages_have_usual_ends() {
        assert_eq!(Bottleneck::usual_ends(21), Some(vec![4, 16, 21]));
        assert_eq!(Bottleneck::usual_ends(3), Some(vec![1, 2, 3]));
        assert_eq!(Bottleneck::usual_ends(2), None);
    }

    #[test]
    fn what_makes_no_stages_is_refused() {
        let refused = |class: &str, settings: Value, options: &Bottleneck| {
            staged(class, settings, &Request::steps(6), options).unwrap_err().to_string()
        };
        let flow = "FlowMatchEulerDiscreteScheduler";
        let usual = options(&[1, 4, 6], Up::Linear);
        for ends in [&[1, 4][..], &[1, 4, 5], &[4, 4, 6], &[0, 4, 6]] {
            assert!(refused(flow, json!({}), &options(ends, Up::Linear)).contains("expected as many ends"));
        }
        assert!(refused("LCMScheduler", json!({}), &usual).contains("not defined for solver lcm"));
        assert!(refused(flow, json!({"invert_sigmas": true}), &usual).contains("not defined for `invert_sigmas`"));
        let karras = json!({"use_karras_sigmas": true});
        assert!(refused("EulerDiscreteScheduler", karras, &usual).contains("cannot be joined with Karras"));
        let odd = Bottleneck { sizes: vec![[8, 8], [3, 4], [8, 8]], ..options(&[1, 4, 6], Up::Matched) };
        assert!(refused(flow, json!({}), &odd).contains("matched growth is by whole factors"));
        let large = Bottleneck { sizes: vec![[8, 8], [9, 4], [8, 8]], ..usual };
        assert!(refused(flow, json!({}), &large).contains("at most that of the last one, 8×8"));
    }
}

//! Liu et al. 2022, Pseudo numerical methods for diffusion models on manifolds, arXiv:2202.09778: the default of Stable
//! Diffusion 1.

use crate::sampler::{
    Anchor, Error, Fields, Level, Prediction, Request, Row, Schedule, Scheduler, Solver, SolverInfo, Spacing, grid,
};

/// Pseudo linear multistep steps, after Runge-Kutta steps where the configuration wants them.
pub(super) struct Pndm;

impl Solver for Pndm {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "pndm",
            class: "PNDMScheduler",
            summary: "pseudo multistep steps on raw outputs, after Runge-Kutta steps or none",
            source: "Liu et al. 2022, arXiv:2202.09778",
            fields: &["skip_prk_steps"],
            predictions: &[Prediction::Epsilon, Prediction::Velocity],
            spacing: Spacing::Leading,
            zero_snr: false,
            grids: false,
            mixtures: false,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        scheduler.skip_prk_steps = fields.flag("skip_prk_steps", false)?;
        scheduler.set_alpha_to_one = fields.flag("set_alpha_to_one", false)?;
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        Ok((rows(scheduler, request.steps.count())?, 1.0))
    }
}

/// Evaluations of one Runge-Kutta step.
const STAGES: usize = 4;

/// The factors of the latest raw outputs by how many there are: Adams and Bashforth's.
pub(super) fn adams_bashforth(known: usize) -> &'static [f64] {
    const WEIGHTS: [&[f64]; 4] = [
        &[1.0],
        &[3.0 / 2.0, -1.0 / 2.0],
        &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
        &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
    ];
    WEIGHTS[known.clamp(1, WEIGHTS.len()) - 1]
}

/// The row that is evaluated at `time`, moves a state from one timestep to another, and weights the outputs of rows by how
/// many rows ago they were.
struct Move {
    time: f64,
    from: f64,
    to: f64,
    /// How many rows ago the state lies that it moves.
    anchor: usize,
    outputs: Vec<(usize, f64)>,
}

impl Move {
    fn row(&self, s: &Scheduler, schedule: &Schedule) -> Row {
        let bar = |time: f64| match time < 0.0 {
            true if s.set_alpha_to_one => 1.0,
            true => schedule.alpha(0),
            false => schedule.alpha(time as usize),
        };
        let (here, next) = (bar(self.from), bar(self.to));
        let mut state = (next / here).sqrt();
        let mut output = (next - here) / (here * (1.0 - next).sqrt() + (here * (1.0 - here) * next).sqrt());
        if s.prediction == Prediction::Velocity {
            // The sum of velocities is taken for the noise at the place where the step begins.
            state -= output * (1.0 - here).sqrt();
            output *= here.sqrt();
        }
        let depth = self.outputs.iter().map(|(back, _)| back + 1).max().unwrap_or(0);
        let mut history = vec![0.0; depth];
        for (back, weight) in &self.outputs {
            history[*back] -= output * weight;
        }
        let level = Level::of_alpha(bar(self.time));
        let row = level.row(self.time, level.estimate(s.prediction));
        let anchor = (self.anchor > 0).then_some(Anchor { back: self.anchor, factor: state });
        Row { state: if anchor.is_some() { 0.0 } else { state }, history, kept: [0.0, 1.0, 0.0], anchor, ..row }
    }
}

fn rows(s: &Scheduler, steps: usize) -> Result<Vec<Row>, Error> {
    let (times, stride) = (grid::whole(s, steps), (s.num_train_timesteps / steps) as f64);
    let schedule = Schedule::new(s);
    let mut moves = if s.skip_prk_steps { Vec::new() } else { runge_kutta(&times, stride)? };
    // Rows whose outputs later ones use.
    let mut used: Vec<usize> = (0..moves.len()).step_by(STAGES).collect();
    let rest = if s.skip_prk_steps { twice_the_second(&times) } else { times[used.len()..].to_vec() };
    for time in rest {
        let index = moves.len();
        if s.skip_prk_steps && index == 1 {
            // The second evaluation does the first step again, with the mean of both outputs.
            let outputs = vec![(0, 0.5), (1, 0.5)];
            moves.push(Move { time, from: time + stride, to: time, anchor: 1, outputs });
            continue;
        }
        used.push(index);
        let weights = adams_bashforth(used.len()).iter();
        let outputs = used.iter().rev().zip(weights).map(|(&row, &weight)| (index - row, weight)).collect();
        moves.push(Move { time, from: time, to: time - stride, anchor: 0, outputs });
    }
    Ok(moves.iter().map(|step| step.row(s, &schedule)).collect())
}

/// The timesteps with the second one repeated.
fn twice_the_second(times: &[f64]) -> Vec<f64> {
    let again = times.get(1).copied();
    times.iter().take(2).copied().chain(again).chain(times.iter().skip(2).copied()).collect()
}

/// Three steps of Runge and Kutta, each with evaluations half way.
fn runge_kutta(times: &[f64], stride: f64) -> Result<Vec<Move>, Error> {
    let half = (stride / 2.0).floor();
    let Some(first) = times.get(..STAGES) else {
        let count = times.len();
        let message =
            format!("solver pndm needs {STAGES} steps unless `skip_prk_steps` is true, {count} are asked for");
        return Err(Error::Plan(message));
    };
    let step = |pair: &[f64]| {
        let (from, next) = (pair[0], pair[1]);
        let part = |time: f64, to: f64, anchor: usize| Move { time, from, to, anchor, outputs: vec![(0, 1.0)] };
        let sum = [3, 2, 1, 0].into_iter().zip([1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0]).collect();
        [
            part(from, from - half, 0),
            part(next + half, next + half, 1),
            part(next + half, next, 2),
            Move { outputs: sum, ..part(next, next, 3) },
        ]
    };
    Ok(first.windows(2).flat_map(step).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::testing::{assert_rows, assert_six, sd, table};
    use serde_json::json;

    fn rows(steps: usize, more: serde_json::Value) -> Vec<Row> {
        let mut settings = sd(json!({"steps_offset": 1}));
        settings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        table("PNDMScheduler", settings, steps).rows
    }

    /// The factor of the state, whether it is that of the row or an earlier one, and those of raw outputs, negated.
    fn shown(row: &Row) -> Vec<f64> {
        let state = row.anchor.map_or(row.state, |anchor| anchor.factor);
        std::iter::once(state).chain(row.history.iter().map(|b| -b)).collect()
    }

    #[test]
    fn multistep_steps_are_the_golden_ones() {
        let found = rows(5, json!({"skip_prk_steps": true}));
        let golden: [&[f64]; 6] = [
            &[2.091_162_3, 1.135_978_9],
            &[2.091_162_3, 0.567_989_5, 0.567_989_5],
            &[1.626_667_1, 1.097_017_0, 0.0, -0.365_672_4],
            &[1.333_647_4, 0.987_653_3, -0.687_063_2, 0.0, 0.214_707_2],
            &[1.152_071_5, 1.219_813_0, -1.308_527_0, 0.820_601_7, 0.0, -0.199_605_8],
            &[1.000_427_6, 0.027_824_9, -0.029_848_5, 0.018_718_6, -0.004_553_2],
        ];
        assert_rows(&found.iter().map(shown).collect::<Vec<_>>(), &golden);
        assert_eq!(found.iter().map(|row| row.time).collect::<Vec<_>>(), [801.0, 601.0, 601.0, 401.0, 201.0, 1.0]);
        assert_eq!(found[1].anchor.map(|anchor| anchor.back), Some(1));
        assert_eq!(rows(1, json!({"skip_prk_steps": true})).len(), 1);
        let row = &rows(10, json!({"skip_prk_steps": true}))[6];
        assert_six(&shown(row), &[1.18, 0.584_812, -0.627_344, 0.393_419, -0.095_696_6]);
        assert_eq!(row.time, 401.0);
    }

    #[test]
    fn runge_kutta_steps_come_first_where_they_are_wanted() {
        let found = rows(10, json!({}));
        assert_eq!(found.len(), 19);
        assert_six(&shown(&found[3]), &[1.615_41, 0.103_75, 0.207_501, 0.207_501, 0.103_75]);
        assert_eq!((found[3].time, found[3].anchor.map(|anchor| anchor.back)), (801.0, Some(3)));
        assert_six(&shown(&found[14]), &[1.18, 0.584_812, -0.627_344, 0.393_419, 0.0, 0.0, 0.0, -0.095_696_6]);
        assert_eq!(found[14].time, 401.0);
        let few = Scheduler { skip_prk_steps: false, ..crate::sampler::testing::scheduler("PNDMScheduler", json!({})) };
        assert!(super::rows(&few, 3).unwrap_err().to_string().contains("`skip_prk_steps`"));
    }

    #[test]
    fn first_moves_are_ddim() {
        let ddim = sd(json!({"steps_offset": 1, "clip_sample": false, "set_alpha_to_one": false}));
        let ddim = table("DDIMScheduler", ddim, 5).rows[0].clone();
        let pndm = &rows(5, json!({"skip_prk_steps": true}))[0];
        assert!((ddim.affine().0 - pndm.affine().0).abs() < 1e-9 && (ddim.affine().1 - pndm.affine().1).abs() < 1e-9);
    }
}

//! Liu et al. 2022, arXiv:2202.09778, on a schedule of its own: the improved pseudo linear multistep method.

use super::pndm::adams_bashforth;
use crate::sampler::{Error, Level, Prediction, Request, Row, Scheduler, Solver, SolverInfo, schedule::linspace};
use std::f64::consts::{FRAC_2_PI, FRAC_PI_2};

/// Improved pseudo linear multistep steps.
pub(super) struct Ipndm;

impl Solver for Ipndm {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "ipndm",
            class: "IPNDMScheduler",
            summary: "pseudo multistep steps on a trigonometric schedule",
            source: "Liu et al. 2022, arXiv:2202.09778",
            predictions: &[],
            betas_by_timestep: false,
            fractions: true,
            zero_snr: false,
            grids: false,
            mixtures: false,
            ..SolverInfo::USUAL
        }
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let points = points(scheduler, request.steps.count())?;
        let row = |(index, pair): (usize, &[Level])| step(index, pair[0], pair[1]);
        Ok((points.windows(2).enumerate().map(row).collect(), 1.0))
    }
}

/// The levels of the steps and the final one.
fn points(s: &Scheduler, count: usize) -> Result<Vec<Level>, Error> {
    let noises = match &s.trained_betas {
        Some(betas) if betas.len() == count + 1 => betas.clone(),
        Some(betas) => {
            return Err(Error::Plan(format!(
                "`trained_betas` of solver ipndm are one more than steps, and there are {} for {count} steps",
                betas.len()
            )));
        }
        None => linspace(1.0, 0.0, count + 1).into_iter().map(|share| (share * FRAC_PI_2).sin().powi(2)).collect(),
    };
    Ok(noises.into_iter().map(|noise| Level { alpha: (1.0 - noise * noise).max(0.0).sqrt(), noise }).collect())
}

fn step(index: usize, here: Level, next: Level) -> Row {
    let time = FRAC_2_PI * here.noise.atan2(here.alpha);
    let row = Row { kept: [here.noise, here.alpha, 0.0], ..here.row(time, here.estimate(Prediction::Velocity)) };
    // Where nothing but noise is left the noise is the state itself, whatever the network says.
    if here.alpha < 1e-8 {
        return Row { state: next.noise, ..row };
    }
    let state = next.alpha / here.alpha;
    let noise = next.noise - state * here.noise;
    Row { state, history: adams_bashforth(index + 1).iter().map(|weight| noise * weight).collect(), ..row }
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::{assert_rows, assert_six, table};
    use serde_json::json;

    #[test]
    fn steps_are_the_golden_ones() {
        let rows = table("IPNDMScheduler", json!({}), 5).rows;
        let found: Vec<Vec<f64>> =
            rows.iter().map(|row| std::iter::once(row.state).chain(row.history.iter().copied()).collect()).collect();
        let golden: [&[f64]; 5] = [
            &[0.904_508_5, 0.0],
            &[1.772_88, -1.423_615, 0.474_538_4],
            &[1.241_209, -0.894_873_5, 0.622_520_7, -0.194_537_7],
            &[1.060_749, -0.621_014_9, 0.666_179_6, -0.417_773_6, 0.101_620_6],
            &[1.004_591, -0.219_839_3, 0.235_827_6, -0.147_891_9, 0.035_973_7],
        ];
        assert_rows(&found, &golden);
        let times: Vec<f64> = rows.iter().map(|row| row.time).collect();
        assert_rows(&[times], &[[1.0, 0.719_524_1, 0.454_248_8, 0.224_575_6, 0.060_884_6]]);
        let row = &table("IPNDMScheduler", json!({}), 10).rows[5];
        assert_six(&[row.time, row.state], &[0.333_333, 1.0836]);
        assert_six(&row.history, &[-0.449_869, 0.482_587, -0.302_639, 0.073_615]);
    }

    #[test]
    fn the_first_evaluation_reaches_nothing() {
        let table = table("IPNDMScheduler", json!({}), 5);
        assert_eq!(table.rows.iter().map(|row| row.evaluates()).collect::<Vec<_>>(), [false, true, true, true, true]);
        assert_eq!(table.notes.len(), 1);
    }
}

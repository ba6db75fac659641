//! Stochastic DPM-Solver++ steps of second order, Lu et al. 2022, arXiv:2211.01095, as Yang et al. 2024, CogVideoX, samples.

use super::cogvideox_ddim::{USUAL, Way, ways};
use crate::sampler::{Error, Fields, Level, Request, Row, Scheduler, Solver, SolverInfo, exponential::log_ratio};

/// Stochastic multistep steps on a schedule with less signal.
pub(super) struct CogvideoxDpm;

impl Solver for CogvideoxDpm {
    fn info(&self) -> &'static SolverInfo {
        const INFO: SolverInfo = SolverInfo {
            name: "cogvideox-dpm",
            class: "CogVideoXDPMScheduler",
            summary: "stochastic DPM-Solver++ of order 2 on a schedule with less signal",
            ..USUAL
        };
        &INFO
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        scheduler.snr_shift_scale = Some(fields.positive("snr_shift_scale", 3.0)?);
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let ways: Vec<Way> = ways(scheduler, &request.steps).collect();
        let row = |(index, way): (usize, &Way)| {
            let before = index.checked_sub(1).map(|last| Level::of_alpha(ways[last].here));
            step(scheduler, *way, before)
        };
        Ok((ways.iter().enumerate().map(row).collect(), 1.0))
    }
}

fn step(s: &Scheduler, way: Way, before: Option<Level>) -> Row {
    let (here, next) = (Level::of_alpha(way.here), Level::of_alpha(way.next));
    // Infinite at both ends, where the step does not depend on it.
    let h = log_ratio(next) - log_ratio(here);
    let decay = (-h).exp();
    let pull = next.alpha * -(-2.0 * h).exp_m1();
    let history = match before.filter(|_| !way.last) {
        None => vec![pull],
        Some(before) => {
            let share = 0.5 * h / (log_ratio(here) - log_ratio(before));
            vec![pull * (1.0 + share), -pull * share]
        }
    };
    let noise = next.noise * (-(-2.0 * h).exp_m1()).max(0.0).sqrt();
    let state = next.noise / here.noise * decay;
    Row { state, history, noise, ..here.row(way.time, here.estimate(s.prediction)) }
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::table;
    use serde_json::json;

    #[test]
    fn both_ends_are_of_first_order() {
        let table = table("CogVideoXDPMScheduler", json!({}), 5);
        let depths: Vec<usize> = table.rows.iter().map(|row| row.history.len()).collect();
        assert_eq!((depths, table.noises()), (vec![1, 2, 2, 2, 1], 4));
        let last = &table.rows[4];
        assert!(last.state == 0.0 && last.history == [1.0]);
    }

    #[test]
    fn noise_alone_is_a_beginning() {
        let settings = json!({
            "rescale_betas_zero_snr": true, "prediction_type": "v_prediction", "timestep_spacing": "trailing"
        });
        let table = table("CogVideoXDPMScheduler", settings, 5);
        assert!(table.rows[0].state == 0.0 && table.rows[1].history[1] == 0.0);
    }
}

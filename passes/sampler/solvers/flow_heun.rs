//! Heun steps of a flow: Esser et al. 2024, arXiv:2403.03206, integrated as in Karras et al. 2022.

use super::{flow_euler, heun};
use crate::sampler::{Error, Fields, Request, Row, Scheduler, Solver, SolverInfo};

/// Heun steps of a flow.
pub(super) struct FlowHeun;

impl Solver for FlowHeun {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "flow-heun",
            class: "FlowMatchHeunDiscreteScheduler",
            summary: "Heun steps of a flow, two evaluations each",
            source: "Esser et al. 2024, arXiv:2403.03206",
            flow: true,
            fractions: true,
            zero_snr: false,
            pairs: true,
            mixtures: false,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        scheduler.shift = fields.number("shift", 1.0)?;
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let sigmas = flow_euler::levels(scheduler, request)?;
        let row = |sigma: f64| Row { kept: [0.0, 1.0, 0.0], ..flow_euler::row(scheduler, sigma) };
        let mut rows = Vec::new();
        for (index, pair) in sigmas.windows(2).enumerate() {
            let way = pair[1] - pair[0];
            rows.push(Row { history: vec![way], ..row(pair[0]) });
            if index + 2 < sigmas.len() {
                rows.push(heun::again(row(pair[1]), way));
            }
        }
        Ok((rows, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::{assert_rows, assert_six, table};
    use serde_json::json;

    #[test]
    fn steps_are_the_golden_ones() {
        let rows = table("FlowMatchHeunDiscreteScheduler", json!({"shift": 3.0}), 5).rows;
        let sigmas: Vec<f64> = rows.iter().step_by(2).map(|row| row.level.noise).collect();
        assert_rows(&[sigmas], &[[1.0, 0.900_359_1, 0.751_121_1, 0.502_985_1, 0.008_928_6]]);
        let rows = table("FlowMatchHeunDiscreteScheduler", json!({"shift": 3.0}), 10).rows;
        assert_six(&[rows[10].time, rows[10].history[0]], &[707.278, -0.105_128]);
    }
}

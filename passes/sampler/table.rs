//! The canonical form of a sampler: one row of numbers per evaluation of the network.
//!
//! Solvers, forecasts of whole outputs and corrections of steps are only different tables, computed in float64; one
//! emitter turns any of them into a graph.

use super::{Clip, Error, Request, Row, Scheduler, grid, solvers::named_where};

/// A sampler as numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    /// One row per evaluation of the network, noisy ones first.
    pub rows: Vec<Row>,
    /// The first state is standard normal noise times this.
    pub initial_scale: f64,
    /// What happens to estimates of the clean sample.
    pub clip: Clip,
    /// How many steps were asked for; some need several rows.
    pub steps: usize,
    /// What a person should know about the steps.
    pub notes: Vec<String>,
}

impl Table {
    /// The table of a scheduler. Fails on steps it cannot make and on settings that contradict each other.
    pub fn new(s: &Scheduler, request: &Request) -> Result<Table, Error> {
        grid::check(&request.steps, s)?;
        let (name, solver) = (s.solver.name(), s.solver.info());
        let eta = request.eta.unwrap_or(0.0);
        if !(0.0..=1.0).contains(&eta) {
            return Err(Error::Plan(format!("eta is {eta}, expected 0 to 1")));
        }
        if eta > 0.0 && solver.eta.is_none() {
            let others = named_where(|i| i.eta.is_some());
            return Err(Error::Plan(format!("eta is for solver {others}, and this is {name}")));
        }
        if request.tokens.is_some() && s.dynamic_shift.is_none() {
            return Err(Error::Plan("the number of tokens is given, and `use_dynamic_shifting` is off".to_owned()));
        }
        if request.explicit_sigmas && !solver.flow {
            let flows = named_where(|i| i.flow);
            return Err(Error::Plan(format!("explicit sigmas are for solver {flows}, and this is {name}")));
        }
        let (mut rows, initial_scale) = s.solver.rows(s, request)?;
        if s.preconditioned {
            rows.iter_mut().for_each(|row| row.input_scale = 1.0 / row.level.alpha);
        }
        let mut notes = Vec::new();
        if rows.len() > 1 && rows.last().is_some_and(Row::is_idle) {
            rows.pop();
            notes.push("the last step leaves the sample as it is with these noise levels, and was left out".to_owned());
        }
        if let Some(row) = rows.iter().position(|row| !row.evaluates()) {
            notes.push(format!("what the network gives at row {row} reaches nothing, and it is not evaluated there"));
        }
        let table = Table { rows, initial_scale, clip: s.clip, steps: request.steps.count(), notes };
        let numbers = |row: &Row| {
            let fixed = [row.time, row.input_scale, row.state, row.output, row.noise, row.noise_before];
            let anchor = row.anchor.map_or(0.0, |anchor| anchor.factor);
            let others = row.estimate.iter().chain(&row.kept).chain(&row.history);
            anchor.is_finite() && fixed.iter().chain(others).all(|n| n.is_finite())
        };
        match table.rows.iter().position(|row| !numbers(row)) {
            None => Ok(table),
            Some(at) => Err(Error::Unsupported(format!(
                "prediction of the noise at timestep {}, where nothing but noise is left (rescale_betas_zero_snr)",
                table.rows[at].time
            ))),
        }
    }

    /// How many rows add fresh noise.
    pub fn noises(&self) -> usize {
        self.rows.iter().filter(|row| row.noise != 0.0).count()
    }

    /// Of how many earlier rows some row uses what they kept.
    pub fn history(&self) -> usize {
        let used = |row: &Row| row.history.iter().rposition(|&b| b != 0.0).unwrap_or(0);
        self.rows.iter().map(used).max().unwrap_or(0)
    }

    /// How many rows back the state lies that some row starts from.
    pub fn anchored(&self) -> usize {
        self.rows.iter().filter_map(|row| Some(row.anchor?.back)).max().unwrap_or(0)
    }
}

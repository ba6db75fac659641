//! Ancestral steps of a flow, as HaCohen et al. 2024, LTX-Video, arXiv:2501.00103, samples.

use super::flow_euler;
use crate::sampler::{Error, Fields, Request, Row, Scheduler, Solver, SolverInfo};

/// Ancestral steps of a flow.
pub(super) struct LtxAncestral;

impl Solver for LtxAncestral {
    fn info(&self) -> &'static SolverInfo {
        &SolverInfo {
            name: "ltx-ancestral",
            class: "LTXEulerAncestralRFScheduler",
            summary: "Euler steps of a flow that add fresh noise",
            source: "HaCohen et al. 2024, arXiv:2501.00103",
            fields: &["eta", "s_noise"],
            flow: true,
            fractions: true,
            zero_snr: false,
            mixtures: false,
            ..SolverInfo::USUAL
        }
    }

    fn read(&self, fields: &Fields, scheduler: &mut Scheduler) -> Result<(), Error> {
        scheduler.eta = fields.number("eta", 1.0)?;
        scheduler.s_noise = fields.number("s_noise", 1.0)?;
        Ok(())
    }

    fn rows(&self, scheduler: &Scheduler, request: &Request) -> Result<(Vec<Row>, f64), Error> {
        let row = |pair: &[f64]| step(scheduler, pair[0], pair[1]);
        Ok((flow_euler::levels(scheduler, request)?.windows(2).map(row).collect(), 1.0))
    }
}

fn step(s: &Scheduler, sigma: f64, next: f64) -> Row {
    let row = flow_euler::row(s, sigma);
    if next < 1e-8 {
        return Row { state: 0.0, history: vec![1.0], ..row };
    }
    let down = next * (1.0 + (next / sigma - 1.0) * s.eta);
    let (state, estimate) = (down / sigma, 1.0 - down / sigma);
    if s.eta <= 0.0 || s.s_noise <= 0.0 {
        return Row { state, history: vec![estimate], ..row };
    }
    // The state at the lower level is shrunk to the signal of the next one, and noise makes up for the rest.
    let ratio = (1.0 - next) / (1.0 - down);
    let noise = (next * next - down * down * ratio * ratio).max(0.0).sqrt() * s.s_noise;
    Row { state: ratio * state, history: vec![ratio * estimate], noise, ..row }
}

#[cfg(test)]
mod tests {
    use crate::sampler::testing::table;
    use serde_json::json;

    /// With x = (1 − σ)·x0 + σ·ε and an exact estimate, the next state has the signal and the noise of its level.
    #[test]
    fn steps_keep_the_marginal_distribution() {
        for eta in [0.0, 0.5, 1.0] {
            let table = table("LTXEulerAncestralRFScheduler", json!({"eta": eta}), 6);
            for pair in table.rows.windows(2) {
                let (here, next) = (pair[0].level, pair[1].level);
                let signal = pair[0].state * here.alpha + pair[0].history[0];
                let noise = (pair[0].state * here.noise).hypot(pair[0].noise);
                assert!((signal - next.alpha).abs() < 1e-9 && (noise - next.noise).abs() < 1e-9);
            }
            assert_eq!(table.noises(), if eta > 0.0 { 5 } else { 0 });
        }
    }
}

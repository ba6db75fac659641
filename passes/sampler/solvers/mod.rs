//! The solvers, one file each: what turns a schedule and a grid into a [`Table`].

mod ddim;
mod ddpm;
mod dpmpp;
mod euler;
mod flow_euler;
mod lcm;

use super::{Class, Error, Prediction, Request, Row, Scheduler, Table, schedule::Schedule, table::Flow};

/// A point of the way from noise to sample: `x = alpha·x0 + noise·ε`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Level {
    /// Factor of the clean sample.
    pub alpha: f64,
    /// Factor of the noise.
    pub noise: f64,
}

impl Level {
    /// The level at a cumulative alpha ᾱ.
    pub fn of_alpha(bar: f64) -> Level {
        Level { alpha: bar.sqrt(), noise: (1.0 - bar).sqrt() }
    }

    /// The variance preserving level at `noise / alpha`.
    pub fn of_sigma(sigma: f64) -> Level {
        let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
        Level { alpha, noise: sigma * alpha }
    }

    /// The estimate of the clean sample: factors of the state and of the output of the network.
    pub fn estimate(self, prediction: Prediction) -> [f64; 2] {
        let Level { alpha, noise } = self;
        match prediction {
            Prediction::Epsilon => [1.0 / alpha, -noise / alpha],
            Prediction::Velocity => [alpha, -noise],
            Prediction::Sample => [0.0, 1.0],
            Prediction::Flow => [1.0, -noise],
        }
    }

    /// The estimate of the noise, before anything is clipped.
    pub fn epsilon(self, prediction: Prediction) -> [f64; 2] {
        let Level { alpha, noise } = self;
        match prediction {
            Prediction::Epsilon => [0.0, 1.0],
            Prediction::Velocity => [noise, alpha],
            Prediction::Sample => [1.0 / noise, -alpha / noise],
            Prediction::Flow => [1.0, 1.0 - noise],
        }
    }

    /// A row at this level that so far leaves the state as it is.
    fn row(self, time: f64, estimate: [f64; 2]) -> Row {
        let flow = Flow::of(self, estimate);
        Row {
            time,
            level: self,
            input_scale: 1.0,
            estimate,
            state: 1.0,
            output: 0.0,
            estimates: vec![0.0],
            noise: 0.0,
            flow,
        }
    }
}

pub(super) use flow_euler::shift as flow_shift;

/// The table of the solver that the configuration names.
pub(super) fn table(s: &Scheduler, schedule: &Schedule, request: &Request) -> Result<Table, Error> {
    let (rows, initial_scale) = match s.class {
        Class::Ddim => (ddim::rows(s, schedule, request), 1.0),
        Class::Ddpm => (ddpm::rows(s, schedule, request), 1.0),
        Class::Lcm => (lcm::rows(s, schedule, request)?, 1.0),
        Class::Euler | Class::EulerAncestral => euler::rows(s, schedule, request),
        Class::Dpm => (dpmpp::rows(s, schedule, request), 1.0),
        Class::FlowEuler => (flow_euler::rows(s, request)?, 1.0),
    };
    Ok(Table { rows, initial_scale, clip: s.clip })
}

//! The sampler compiler: a denoiser, a scheduler and a plan become one graph, noise in, sample out.
//!
//! A [`Scheduler`] gives a [`Table`] of numbers, a [`StepPlan`] says what each step computes, and one emitter turns both
//! into a graph. Methods that make sampling faster only write plan entries or other tables.

mod actions;
mod beta;
mod emit;
mod error;
mod exponential;
mod fields;
mod grid;
mod levels;
pub mod methods;
mod network;
pub mod pipelines;
mod plan;
pub mod planner;
mod polynomials;
mod python_json;
mod reference;
mod request;
mod roles;
mod row;
mod schedule;
mod scheduler;
pub mod search;
mod sizes;
mod solvers;
mod sums;
mod table;
#[cfg(test)]
pub(crate) mod testing;

pub use actions::Actions;
pub use emit::{Form, Guidance, OPSET, Sampler, Scale, emit};
pub use error::Error;
pub use fields::Fields;
pub use plan::{Adaptive, Key, Kind, Mode, Pass, Ref, StepPlan, Substitution, Terms};
pub use python_json::read_python_json;
pub use reference::{Sampled, sample};
pub use request::{Request, Steps};
pub use roles::{Condition, RoleOptions, Roles, TimeValue, Uncond};
pub use row::{Anchor, Flow, Level, Prediction, Row};
pub use schedule::Schedule;
pub use scheduler::{
    BetaSchedule, Clip, Corrector, DynamicShift, Scheduler, Sigmas, Solver, SolverInfo, Spacing, Variance,
};
pub use sizes::{Sizes, Up};
pub use solvers::{SOLVERS, solver, solver_names};
pub use table::Table;

//! What travels between the program and its worker: requests and answers, the jobs in them, and how all of it is framed.
//!
//! The program's side sends them (`child.rs`), the worker's side serves them (`serve.rs`); neither needs the other.

mod answer;
pub(crate) mod framing;
mod jobs;
mod request;

pub(crate) use answer::WorkerAnswer;
pub use jobs::{Distance, Gates};
pub(crate) use jobs::{Fold, GatherEntry, GatherJob, Gathered, MeasureJob, NonFinite, Output, SelectJob, TrialJob};
pub(crate) use request::{InputHeads, WorkerRequest};

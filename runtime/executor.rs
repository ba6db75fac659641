//! Where requests are answered that need no worker of this process: a cluster, or whatever takes tasks as bytes.

/// A request to a worker, as bytes that any worker of the same version understands. It changes nothing but files that are
/// put in place whole, so it may be carried out more than once.
pub type Task = Vec<u8>;

/// Carries out tasks, in any order and at a time; the outcomes are bytes too.
///
/// Paths travel in tasks, weights never: every worker sees the files of this process under the same paths.
pub trait Executor: Send + Sync {
    /// The outcomes in the order of the tasks.
    fn map(&self, tasks: Vec<Task>) -> Result<Vec<Vec<u8>>, ExecutorError>;

    /// How many tasks are carried out at a time.
    fn workers(&self) -> usize;
}

/// Why tasks were not carried out, as whoever should have said.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ExecutorError {
    /// One sentence.
    pub message: String,
}

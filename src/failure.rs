//! How a run ends when it does not succeed, and the exit code that says so.

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The command line asks for something that does not make sense.
    #[error("{0}")]
    Usage(String),
    /// The input or the environment is at fault.
    #[error("{0:#}")]
    Error(anyhow::Error),
    /// The result was computed and turned down.
    #[error("{0}")]
    Refused(String),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::Error(error)
    }
}

impl Failure {
    /// The exit code of the program: 1 error, 2 usage, 3 refused.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Error(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Refused(_) => 3,
        }
    }
}

//! How a run ends when it does not succeed, and the exit code that says so.

use crate::pipeline::UnknownPass;
use lathe_ir::WriteError;
use lathe_runtime::{FeatureError, InstallError, Listener, RuntimeError, SetError, StatisticsError};

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The command line asks for something that does not make sense.
    #[error("{0}")]
    Usage(String),
    /// The input or the environment is at fault.
    #[error("{}", sentence(.0))]
    Error(anyhow::Error),
    /// The result was computed and turned down.
    #[error("{0}")]
    Refused(String),
    /// Whoever asked for the work called it off.
    #[error("interrupted; nothing was written")]
    Interrupted,
}

/// What went wrong and why, with causes that are not told yet: most errors tell their own.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        Failure::Error(error)
    }
}

impl From<UnknownPass> for Failure {
    fn from(unknown: UnknownPass) -> Failure {
        Failure::Usage(unknown.to_string())
    }
}

/// Errors that are the fault of the input or the environment.
macro_rules! errors {
    ($($error:ty),* $(,)?) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Failure {
                Failure::Error(error.into())
            }
        }
    )*};
}

errors!(
    WriteError,
    lathe_analysis::EvaluateError,
    lathe_passes::Error,
    FeatureError,
    InstallError,
    RuntimeError,
    SetError,
    StatisticsError,
);

impl Failure {
    /// The exit code of the program: 1 error, 2 usage, 3 refused.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Error(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Refused(_) => 3,
            Failure::Interrupted => 130,
        }
    }

    /// What kind of end this is, as JSON names it.
    fn kind(&self) -> &'static str {
        match self {
            Failure::Error(_) => "error",
            Failure::Usage(_) => "usage",
            Failure::Refused(_) => "refused",
            Failure::Interrupted => "interrupted",
        }
    }

    /// The failure for programs, for standard output where the answer would have been JSON.
    pub fn to_json(&self) -> String {
        let object =
            serde_json::json!({"kind": self.kind(), "message": self.to_string(), "exit_code": self.exit_code()});
        format!("{}\n", serde_json::json!({ "error": object }))
    }

    /// Whether there is nothing to run models with: the library that was asked for is not to be had.
    pub fn is_missing_runtime(&self) -> bool {
        let Failure::Error(error) = self else { return false };
        let missing = |error: &RuntimeError| {
            use RuntimeError::{Library, NoEngine, NoLibrary};
            matches!(error, NoEngine(_) | NoLibrary { .. } | Library { .. })
        };
        error.chain().any(|cause| cause.downcast_ref::<RuntimeError>().is_some_and(missing))
    }

    /// An error if the work that `progress` hears of was called off.
    pub(crate) fn if_stopped(progress: &Listener) -> Result<(), Failure> {
        if progress.is_stopped() { Err(Failure::Interrupted) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context as _;

    #[test]
    fn a_cause_that_is_told_already_is_not_told_again() {
        let io = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        let write = WriteError::Io { path: "m.onnx".into(), source: io() };
        let told = Failure::Error(Err::<(), _>(write).context("nothing can be staged").unwrap_err()).to_string();
        assert_eq!(told, format!("nothing can be staged: cannot write `m.onnx`: {}", io()));
        let alone = Err::<(), _>(io()).context("the store cannot be used").unwrap_err();
        assert_eq!(Failure::Error(alone).to_string(), format!("the store cannot be used: {}", io()));
    }
}

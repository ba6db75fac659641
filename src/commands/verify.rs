//! `optimize verify A B`: whether two models compute the same.

use super::{input_spec, runner_options};
use crate::{
    Failure,
    cli::{RunArgs, print},
    job,
    runner::Runner,
};
use anyhow::anyhow;
use clap::Args;
use lathe_runtime::{Claim, Inputs, Verdict};
use std::{fmt::Write as _, path::PathBuf};

/// What to compare.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The reference.
    a: PathBuf,
    /// The candidate.
    b: PathBuf,
    /// The largest relative L2 error of an output; by default 1e-4 for float32 and what narrower types allow.
    #[arg(long)]
    rtol: Option<f64>,
    /// Expect equal bits.
    #[arg(long, conflicts_with = "rtol")]
    bits: bool,
    /// As JSON, in the form of the report's `verify`.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    run: RunArgs,
}

pub(crate) fn run(args: &VerifyArgs) -> Result<(), Failure> {
    super::read(&args.a)?;
    super::read(&args.b)?;
    let claim = if args.bits { Claim::Identical } else { Claim::Equivalent { rtol: args.rtol } };
    let runner = Runner::new(runner_options(&args.run)?)?;
    let verdict = runner.compare(&args.a, &args.b, &Inputs::Random(input_spec(&args.run)?), claim)?;
    let sentence = verdict.describe();
    let report = match verdict {
        Verdict::Compared(report) => report,
        Verdict::ReferenceRefused { .. } => return Err(Failure::Error(anyhow!("{sentence}"))),
        _ => return Err(Failure::Refused(sentence)),
    };
    let passed = report.comparison.failures.is_empty();
    let found = job::verify(report, claim, "random", None);
    if args.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&found).expect("only names and numbers")));
    } else {
        let mut out = format!("{} on {}\n", sentence, found.runtime);
        for o in &found.outputs {
            let _ = writeln!(
                out,
                "  {}  max abs {:.2e}  rel L2 {:.2e}  cosine {:.6}",
                o.name, o.max_abs, o.rel_l2, o.cosine
            );
        }
        print(&out);
    }
    if passed { Ok(()) } else { Err(Failure::Refused(sentence)) }
}

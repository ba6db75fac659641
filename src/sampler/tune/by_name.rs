//! Methods by name: `gate:at=30+forecast:every=2,order=1`.

use super::plan_runner::PlanRunner;
use crate::Failure;
use lathe_passes::sampler::{
    StepPlan,
    methods::{Calibration, Methods, Parts, PlanContext},
};
use serde_json::Value;

/// Where runs agree less than this on what is computed, each had better decide for itself.
const LEAST_AGREEMENT: f64 = 0.8;

/// The plan of some methods, one after the other, on the steps that were asked for; and a sentence where it should rather
/// be decided at run time.
pub(super) fn find(plans: &PlanRunner, text: &str) -> Result<(StepPlan, Option<String>), Failure> {
    let methods = Methods::parse(text).map_err(lathe_passes::sampler::Error::from)?;
    let table = plans.table()?;
    let mut plan = plans.full_plan(&table);
    let parts = Parts::find(plans.denoiser, plans.roles)?;
    let calibration = Calibration::new(plans, &table, plans.roles);
    let (scheduler, request) = (plans.scheduler, &plans.request);
    methods.apply(
        &mut plan,
        &PlanContext { scheduler, request, table: &table, parts: &parts, calibration: &calibration },
    )?;
    plan.evidence.insert("methods".to_owned(), text.into());
    let agreement = plan.evidence.get("agreement").and_then(Value::as_f64);
    let sentence = agreement.filter(|&agreement| agreement < LEAST_AGREEMENT).map(|agreement| {
        let agreement = 100.0 * agreement;
        format!("easy: runs agree on {agreement:.0} % of what is computed; --form adaptive lets each decide")
    });
    Ok((plan, sentence))
}

#[cfg(test)]
mod tests {
    use lathe_passes::sampler::{SOLVERS, methods::METHODS, pipelines::PIPELINES};

    /// The rows of the table after a line of the documentation.
    fn rows(header: &str) -> Vec<String> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/src/samplers.md");
        let text = std::fs::read_to_string(path).unwrap();
        let table = text.lines().skip_while(|line| *line != header).skip(2);
        table.take_while(|line| line.starts_with('|')).map(str::to_owned).collect()
    }

    #[test]
    fn the_documentation_lists_every_method() {
        let row = |method: &&lathe_passes::sampler::methods::Method| {
            let options: Vec<String> = method.options.iter().map(|o| format!("{}={}", o.name, o.default)).collect();
            format!("| `{}` | {} | `{}` |", method.name, method.summary, options.join(","))
        };
        assert_eq!(
            rows("| method | what it does | options and their defaults |"),
            METHODS.iter().map(row).collect::<Vec<_>>()
        );
    }

    #[test]
    fn the_documentation_lists_every_pipeline() {
        let row = |pipeline: &&lathe_passes::sampler::pipelines::Pipeline| {
            let classes: Vec<String> = pipeline.classes.iter().map(|class| format!("`{class}`")).collect();
            format!("| {} | {} |", classes.join(", "), pipeline.summary)
        };
        assert_eq!(rows("| classes | what they make |"), PIPELINES.iter().map(row).collect::<Vec<_>>());
    }

    #[test]
    fn the_documentation_lists_every_solver() {
        let row = |solver: &&dyn lathe_passes::sampler::Solver| {
            let info = solver.info();
            format!("| `{}` | `{}` | {} |", info.name, info.class, info.summary)
        };
        assert_eq!(rows("| solver | class | what it is |"), SOLVERS.iter().map(row).collect::<Vec<_>>());
    }
}

//! The solvers, one file each: what turns a scheduler's configuration and steps into the rows of a table.

mod ddim;
mod ddpm;
mod dpmpp;
mod euler;
mod euler_ancestral;
mod flow_euler;
mod lcm;

use self::{
    ddim::Ddim, ddpm::Ddpm, dpmpp::DpmPp, euler::Euler, euler_ancestral::EulerAncestral, flow_euler::FlowEuler,
    lcm::Lcm,
};
use super::{Error, Scheduler, Solver, SolverInfo, scheduler::Fields};
use serde_json::Value;

pub(super) use flow_euler::shift as flow_shift;

/// Every solver. The command line, its help and the documentation list them in this order.
pub const SOLVERS: &[&dyn Solver] = &[&Ddpm, &Ddim, &Euler, &EulerAncestral, &DpmPp, &FlowEuler, &Lcm];

/// The solver with this short name.
pub fn solver(name: &str) -> Option<&'static dyn Solver> {
    SOLVERS.iter().copied().find(|solver| solver.name() == name)
}

/// The short names of all solvers, for messages.
pub fn solver_names() -> Vec<&'static str> {
    SOLVERS.iter().map(|solver| solver.name()).collect()
}

/// The short names of the solvers of which something is true, for messages.
pub(super) fn named_where(holds: impl Fn(&SolverInfo) -> bool) -> String {
    let names = SOLVERS.iter().map(|solver| solver.info()).filter(|info| holds(info)).map(|info| info.name);
    names.collect::<Vec<_>>().join(" or ")
}

impl Scheduler {
    /// Reads a configuration. `solver` overrides the class that it names. Returns warnings about fields that no class has.
    ///
    /// Fails on a class that is not built unless it is overridden, on a setting that is not, and on values that make no
    /// sense.
    pub fn parse(json: &Value, solver: Option<&'static dyn Solver>) -> Result<(Scheduler, Vec<String>), Error> {
        let fields = Fields::of(json)?;
        let named = fields.get("_class_name").and_then(Value::as_str);
        let found = named.and_then(|name| SOLVERS.iter().copied().find(|solver| solver.info().class == name));
        let solver = solver.or(found).ok_or_else(|| {
            let what = named.map_or("without `_class_name`".to_owned(), |name| format!("`_class_name` = `{name}`"));
            Error::Unsupported(format!("{what} (--solver takes {} in its place)", solver_names().join(", ")))
        })?;
        let known = |field: &str| SOLVERS.iter().any(|solver| solver.info().fields.contains(&field));
        let (scheduler, unknown) = Scheduler::read(solver, &fields, &known)?;
        let warning = |k: String| format!("the scheduler's `{k}` is not known and was ignored");
        Ok((scheduler, unknown.into_iter().map(warning).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BetaSchedule, Clip, Spacing};
    use super::*;
    use serde_json::json;

    #[test]
    fn every_file_is_a_solver_of_its_name() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("sampler/solvers");
        let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
        let mut files: Vec<String> = files.filter_map(|f| Some(f.strip_suffix(".rs")?.replace('_', "-"))).collect();
        files.retain(|file| file != "mod");
        files.sort();
        let mut names = solver_names();
        names.sort_unstable();
        assert_eq!(files, names);
        for info in SOLVERS.iter().map(|solver| solver.info()) {
            assert!(!info.class.is_empty() && !info.summary.is_empty() && info.source.contains("arXiv:"), "{info:?}");
        }
    }

    #[test]
    fn classes_have_their_own_defaults() {
        let of = |name: &str| Scheduler::parse(&json!({ "_class_name": name }), None).unwrap().0;
        let (ddim, euler, lcm) = (of("DDIMScheduler"), of("EulerDiscreteScheduler"), of("LCMScheduler"));
        assert_eq!((ddim.spacing, ddim.clip), (Spacing::Leading, Clip::Clamp(1.0)));
        assert_eq!((euler.spacing, euler.clip), (Spacing::Linspace, Clip::None));
        assert_eq!((lcm.beta_schedule, lcm.clip), (BetaSchedule::ScaledLinear, Clip::None));
    }

    #[test]
    fn settings_that_are_not_built_are_named() {
        let refused = |json: Value| Scheduler::parse(&json, None).unwrap_err().to_string();
        let dpm = "DPMSolverMultistepScheduler";
        assert!(refused(json!({"_class_name": dpm, "use_lu_lambdas": true})).contains("`use_lu_lambdas` = true"));
        assert!(refused(json!({"_class_name": dpm, "algorithm_type": "dpmsolver"})).contains("algorithm_type"));
        assert!(refused(json!({"_class_name": "PNDMScheduler"})).contains("`PNDMScheduler`"));
        assert!(refused(json!({"_class_name": dpm, "beta_schedule": "sigmoid"})).contains("squaredcos_cap_v2"));
        assert!(refused(json!({"_class_name": "DDPMScheduler", "variance_type": "learned_range"})).contains("learned"));
        assert!(refused(json!({"_class_name": dpm, "solver_order": 4})).contains("1, 2 or 3"));
        assert!(refused(json!({"_class_name": "DDIMScheduler", "beta_start": "much"})).contains("a number"));
        assert!(refused(json!([1])).contains("an object"));
    }

    #[test]
    fn another_class_is_taken_only_when_it_is_asked_for() {
        let pndm = json!({"_class_name": "PNDMScheduler", "skip_prk_steps": true, "steps_offset": 1});
        let (scheduler, warnings) = Scheduler::parse(&pndm, Some(&Ddim)).unwrap();
        assert_eq!((scheduler.solver.name(), scheduler.steps_offset), ("ddim", 1));
        assert_eq!(warnings, ["the scheduler's `skip_prk_steps` is not known and was ignored"]);
    }

    #[test]
    fn infinities_are_words() {
        let json = json!({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": "-Infinity"});
        assert_eq!(Scheduler::parse(&json, None).unwrap().0.lambda_min_clipped, f64::NEG_INFINITY);
    }
}

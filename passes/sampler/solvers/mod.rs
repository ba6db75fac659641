//! The solvers, one file each: what turns a scheduler's configuration and steps into the rows of a table.

mod cogvideox_ddim;
mod cogvideox_dpm;
mod consistency;
mod cosine_dpm;
mod ddim;
mod ddpm;
mod deis;
mod dpm_sde;
mod dpm_single;
mod dpmpp;
mod edm_dpm;
mod edm_euler;
mod euler;
mod euler_ancestral;
mod flow_euler;
mod flow_heun;
mod flow_lcm;
mod heun;
mod ipndm;
mod kdpm2;
mod kdpm2_ancestral;
mod lcm;
mod lms;
mod ltx_ancestral;
mod pndm;
mod sa;
mod scm;
mod tcd;
mod unipc;

use self::{
    cogvideox_ddim::CogvideoxDdim, cogvideox_dpm::CogvideoxDpm, consistency::Consistency, cosine_dpm::CosineDpm,
    ddim::Ddim, ddpm::Ddpm, deis::Deis, dpm_sde::DpmSde, dpm_single::DpmSingle, dpmpp::DpmPp, edm_dpm::EdmDpm,
    edm_euler::EdmEuler, euler::Euler, euler_ancestral::EulerAncestral, flow_euler::FlowEuler, flow_heun::FlowHeun,
    flow_lcm::FlowLcm, heun::Heun, ipndm::Ipndm, kdpm2::Kdpm2, kdpm2_ancestral::Kdpm2Ancestral, lcm::Lcm, lms::Lms,
    ltx_ancestral::LtxAncestral, pndm::Pndm, sa::Sa, scm::Scm, tcd::Tcd, unipc::UniPc,
};
use super::{Error, Fields, Scheduler, Solver, SolverInfo};
use serde_json::Value;

/// Every solver. The command line, its help and the documentation list them in this order.
pub const SOLVERS: &[&dyn Solver] = &[
    &Ddpm,
    &Ddim,
    &Pndm,
    &Euler,
    &EulerAncestral,
    &Heun,
    &Kdpm2,
    &Kdpm2Ancestral,
    &Lms,
    &DpmPp,
    &DpmSingle,
    &DpmSde,
    &UniPc,
    &Deis,
    &Sa,
    &EdmEuler,
    &EdmDpm,
    &CosineDpm,
    &FlowEuler,
    &FlowHeun,
    &LtxAncestral,
    &Lcm,
    &FlowLcm,
    &Tcd,
    &Consistency,
    &Scm,
    &Ipndm,
    &CogvideoxDdim,
    &CogvideoxDpm,
];

/// Classes of the reference that are no solver here, and why.
const REFUSED: &[(&str, &str)] = &[
    ("RePaintScheduler", "it jumps back in time, and wants a mask"),
    ("ScoreSdeVeScheduler", "its corrector takes the length of its steps from the prediction"),
    ("ScoreSdeVpScheduler", "it is deprecated, and steps through continuous time"),
    ("KarrasVeScheduler", "it is deprecated, and feeds the network another state than the one it steps from"),
    ("UnCLIPScheduler", "it needs the variance that the network learned"),
    ("DDPMWuerstchenScheduler", "it needs the variance that the network learned"),
    ("HeliosScheduler", "it goes through stages of several sizes"),
    ("HeliosDMDScheduler", "it goes through stages of several sizes"),
    ("PiflowScheduler", "the network gives a policy that is stepped through by itself"),
    ("FlowMapEulerDiscreteScheduler", "the network is told two timesteps"),
    ("MiniMaxH3Scheduler", "its steps belong to one pipeline"),
    ("RFD4ProteinaScheduler", "its states are proteins"),
    ("ConsistencyDecoderScheduler", "it is a decoder with a time of its own"),
    ("VQDiffusionScheduler", "its states are tokens"),
    ("AmusedScheduler", "its states are tokens"),
    ("BlockRefinementScheduler", "its states are tokens"),
    ("EntropyBoundScheduler", "its states are tokens"),
    ("DiscreteDDIMScheduler", "its states are tokens"),
    ("DDIMInverseScheduler", "it goes from an image to noise"),
    ("DPMSolverMultistepInverseScheduler", "it goes from an image to noise"),
];

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
        let is =
            |solver: &&dyn Solver, name: &str| solver.info().class == name || solver.info().aliases.contains(&name);
        let found = named.and_then(|name| SOLVERS.iter().copied().find(|solver| is(solver, name)));
        let chosen = solver.or(found).ok_or_else(|| unknown_class(named))?;
        let known = |field: &str| SOLVERS.iter().any(|solver| solver.info().fields.contains(&field));
        // What another class took for granted is no choice.
        let fields = if found == Some(chosen) { fields } else { fields.chosen() };
        let (scheduler, unknown) = Scheduler::read(chosen, &fields, &known)?;
        let warning = |k: String| format!("the scheduler's `{k}` is not known and was ignored");
        let warnings = scheduler.notes.iter().cloned().chain(unknown.into_iter().map(warning)).collect();
        Ok((scheduler, warnings))
    }
}

fn unknown_class(named: Option<&str>) -> Error {
    let what = match named.map(|name| (name, REFUSED.iter().find(|(class, _)| *class == name))) {
        None => "without `_class_name`".to_owned(),
        Some((name, None)) => format!("`_class_name` = `{name}`"),
        Some((name, Some((_, why)))) => format!("`_class_name` = `{name}`: {why}"),
    };
    Error::Unsupported(format!("{what} (--solver takes {} in its place)", solver_names().join(", ")))
}

#[cfg(test)]
mod tests {
    use super::super::{BetaSchedule, Clip, Level, Request, Schedule, Spacing, Table, testing::scheduler};
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

    /// What every class of the reference saves by itself, as it is written: read without a warning and made a table of, or
    /// refused with the reason.
    #[test]
    fn every_class_of_the_reference_is_read_or_refused_with_a_reason() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/schedulers");
        let mut seen = Vec::new();
        for file in std::fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let class = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let json = super::super::read_python_json(&std::fs::read_to_string(&path).unwrap()).unwrap();
            match Scheduler::parse(&json, None) {
                Ok((scheduler, warnings)) => {
                    assert_eq!(warnings, Vec::<String>::new(), "{class}");
                    let info = scheduler.solver.info();
                    assert!(
                        info.class == class || info.aliases.contains(&class.as_str()),
                        "{class} is read as {info:?}"
                    );
                    for steps in [1, 5, 10] {
                        let table = Table::new(&scheduler, &Request::steps(steps));
                        // Three Runge-Kutta steps need four timesteps.
                        assert!(table.is_ok() || (class == "PNDMScheduler" && steps == 1), "{class}: {table:?}");
                    }
                }
                Err(error) => {
                    let why = REFUSED.iter().find(|(name, _)| *name == class).map(|(_, why)| *why);
                    let why = why.unwrap_or_else(|| panic!("{class}: {error}"));
                    assert!(error.to_string().contains(&format!("`_class_name` = `{class}`: {why}")), "{error}");
                }
            }
            seen.push(class);
        }
        let solvers = SOLVERS.iter().flat_map(|s| s.info().aliases.iter().copied().chain([s.info().class]));
        let missing: Vec<&str> =
            solvers.chain(REFUSED.iter().map(|(class, _)| *class)).filter(|c| !seen.iter().any(|s| s == c)).collect();
        assert!(missing.is_empty(), "no file of {missing:?}");
    }

    /// The final state of a table from a first state and fresh noise by row, of data of variance 0.25 around zero whose noise
    /// the network predicts exactly.
    fn end_of(table: &Table, first: f64, fresh: &dyn Fn(usize) -> f64) -> f64 {
        let mut x = first * table.initial_scale;
        let (mut kept, mut seen) = (Vec::new(), Vec::new());
        for (index, row) in table.rows.iter().enumerate() {
            let sigma = row.level.noise / row.level.alpha;
            let m = x / row.level.alpha * sigma / (0.25 + sigma * sigma);
            let y = row.estimate[0] * x + row.estimate[1] * m;
            kept.insert(0, row.kept[0] * x + row.kept[1] * m + row.kept[2] * y);
            seen.insert(0, x);
            let before = index.checked_sub(1).map_or(0.0, fresh);
            x = row.state * x + row.output * m + row.noise * fresh(index) + row.noise_before * before;
            x += row.history.iter().zip(&kept).map(|(factor, q)| factor * q).sum::<f64>();
            x += row.anchor.map_or(0.0, |anchor| anchor.factor * seen[anchor.back]);
        }
        x
    }

    #[test]
    fn stochastic_solvers_draw_data_of_its_variance() {
        let cases = [
            ("DDPMScheduler", json!({"clip_sample": false}), 200),
            ("EulerAncestralDiscreteScheduler", json!({}), 200),
            ("KDPM2AncestralDiscreteScheduler", json!({"beta_schedule": "scaled_linear"}), 100),
            ("DPMSolverSDEScheduler", json!({"beta_schedule": "scaled_linear", "use_karras_sigmas": true}), 100),
            ("DPMSolverMultistepScheduler", json!({"algorithm_type": "sde-dpmsolver++"}), 100),
            ("SASolverScheduler", json!({}), 100),
            ("SASolverScheduler", json!({"algorithm_type": "noise_prediction"}), 100),
        ];
        for (class, settings, steps) in cases {
            let table = crate::sampler::testing::table(class, settings, steps);
            // The end is linear in everything that is drawn, so its variance is a sum of squares.
            let of_row = |drawn: usize| end_of(&table, 0.0, &|row| f64::from(u8::from(row == drawn))).powi(2);
            let fresh: f64 = (0..table.rows.len()).filter(|&row| table.rows[row].noise != 0.0).map(of_row).sum();
            let variance = end_of(&table, 1.0, &|_| 0.0).powi(2) + fresh;
            // Steps of first order are still some percent off.
            assert!((variance / 0.25 - 1.0).abs() < 0.08, "{class}: {variance}");
        }
    }

    #[test]
    fn solvers_converge_with_their_order() {
        let cases = [
            ("EulerDiscreteScheduler", json!({}), 0.8),
            ("HeunDiscreteScheduler", json!({}), 1.8),
            ("KDPM2DiscreteScheduler", json!({}), 1.8),
            ("LMSDiscreteScheduler", json!({}), 2.5),
            ("DPMSolverMultistepScheduler", json!({}), 1.8),
            ("DPMSolverMultistepScheduler", json!({"solver_order": 3}), 2.3),
            ("DPMSolverSinglestepScheduler", json!({}), 1.8),
            ("UniPCMultistepScheduler", json!({}), 1.8),
            ("UniPCMultistepScheduler", json!({"solver_order": 3}), 2.5),
            ("DEISMultistepScheduler", json!({}), 1.8),
            ("DEISMultistepScheduler", json!({"solver_order": 3}), 2.5),
        ];
        for (class, mut settings, order) in cases {
            settings["use_exponential_sigmas"] = true.into();
            let error = |steps: usize| {
                let table = crate::sampler::testing::table(class, settings.clone(), steps);
                let (first, last) = (table.rows[0].level, table.rows[table.rows.len() - 1].level);
                let [from, low] = [first, last].map(|level| level.noise / level.alpha);
                // The exact path of the state without its scale, and what the estimate makes of its end.
                let variance = |sigma: f64| 0.25 + sigma * sigma;
                let begin = table.initial_scale / first.alpha;
                let exact = match class {
                    // This one ends at the lowest level, whose row was left out.
                    "DEISMultistepScheduler" => {
                        let low = Schedule::new(&scheduler(class, settings.clone())).sigmas()[0];
                        begin * (variance(low) / variance(from)).sqrt() * Level::of_sigma(low).alpha
                    }
                    _ => begin * (variance(low) / variance(from)).sqrt() * 0.25 / variance(low),
                };
                (end_of(&table, 1.0, &|_| 0.0) / exact - 1.0).abs()
            };
            // With more steps the first one, of first order, rules the error of the others.
            let slope = (error(20) / error(40)).log2();
            assert!(slope > order, "{class} {settings}: {slope}");
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
        let both = json!({"_class_name": dpm, "use_lu_lambdas": true, "use_karras_sigmas": true});
        assert!(refused(both).contains("`use_karras_sigmas` = true beside `use_lu_lambdas` = true"));
        assert!(refused(json!({"_class_name": dpm, "algorithm_type": "dpmsolver"})).contains("algorithm_type"));
        assert!(refused(json!({"_class_name": dpm, "solver_type": "best"})).contains("midpoint or heun"));
        assert!(refused(json!({"_class_name": "MyScheduler"})).contains("`MyScheduler`"));
        assert!(refused(json!({"_class_name": "RePaintScheduler"})).contains("`RePaintScheduler`: it jumps back"));
        let sample = json!({"_class_name": "PNDMScheduler", "prediction_type": "sample"});
        assert!(refused(sample).contains("`prediction_type` = \"sample\" of solver pndm"));
        let betas = json!({"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.2]});
        assert!(refused(betas).contains("a list of 2, expected as many numbers as `num_train_timesteps`, 1000"));
        assert!(refused(json!({"_class_name": dpm, "beta_schedule": "exp"})).contains("squaredcos_cap_v2"));
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
        // Files are carried from class to class, so what another class knows is no fault.
        assert_eq!(warnings, Vec::<String>::new());
        let odd = json!({"_class_name": "DDIMScheduler", "skip_type": 1});
        let warnings = Scheduler::parse(&odd, None).unwrap().1;
        assert_eq!(warnings, ["the scheduler's `skip_type` is not known and was ignored"]);
    }

    #[test]
    fn what_nobody_chose_is_that_of_the_class_that_is_taken() {
        let json = json!({
            "_class_name": "HeunDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "linspace",
            "_use_default_values": ["timestep_spacing", "beta_end"]
        });
        let (scheduler, _) = Scheduler::parse(&json, Some(&Ddim)).unwrap();
        assert_eq!((scheduler.spacing, scheduler.beta_start, scheduler.beta_end), (Spacing::Leading, 0.00085, 0.02));
        assert_eq!(Scheduler::parse(&json, None).unwrap().0.spacing, Spacing::Linspace);
    }

    #[test]
    fn infinities_are_words() {
        let json = json!({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": "-Infinity"});
        assert_eq!(Scheduler::parse(&json, None).unwrap().0.lambda_min_clipped, f64::NEG_INFINITY);
    }

    #[test]
    fn the_file_of_stable_diffusion_is_read() {
        let json = json!({
            "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true,
            "steps_offset": 1, "trained_betas": null, "clip_sample": false
        });
        let (scheduler, warnings) = Scheduler::parse(&json, None).unwrap();
        assert_eq!((scheduler.solver.name(), warnings), ("pndm", Vec::new()));
        assert_eq!(Table::new(&scheduler, &Request::steps(50)).unwrap().rows.len(), 51);
    }

    #[test]
    fn old_files_say_otherwise_what_is_predicted() {
        let json = json!({"_class_name": "DDIMScheduler", "predict_epsilon": false});
        assert_eq!(Scheduler::parse(&json, None).unwrap().0.prediction, super::super::Prediction::Sample);
    }
}

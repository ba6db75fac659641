//! The error of the network is lessened by what it said when there was more noise.
//!
//! Source: Yu et al. 2025, DualFast, arXiv:2506.13058; the growth of the factor is a choice of this program.

use super::{Method, Options, PlanContext, Stages, substitute};
use crate::{
    Opt,
    sampler::{Error, Kind, Ref, StepPlan, Substitution},
};

pub(super) const METHOD: Method = Method {
    name: "dual",
    summary: "corrects a prediction by an earlier one",
    doc: "A prediction moves away from an earlier one, by a factor that grows over the steps: the error of the network is \
          smaller where there is more noise. No evaluation is saved; fewer steps become as good as more.",
    options: &[
        Opt { name: "most", unit: "a number", default: "0.3", doc: "the factor at the last step" },
        Opt {
            name: "first",
            unit: "true or false",
            default: "false",
            doc: "whether the earlier prediction is that of the first step rather than of the step before",
        },
    ],
    stages: Stages::One,
    source: "Yu et al. 2025, DualFast, arXiv:2506.13058",
    apply,
};

fn apply(plan: &mut StepPlan, options: &Options, cx: &PlanContext) -> Result<(), Error> {
    dual(plan, &cx.parts.output, &Dual { most: options.get("most")?, first: options.get("first")? })
}

/// How strongly an earlier prediction counts against the current one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dual {
    /// The factor at the last step; it grows evenly from 0 at the first.
    pub most: f64,
    /// Whether the earlier prediction is that of the first step, or that of the step before.
    pub first: bool,
}

/// Writes the entries: the prediction `m` of step `i` becomes `(1 + c)·m − c·m_earlier`. No evaluation is saved.
pub fn dual(plan: &mut StepPlan, output: &str, options: &Dual) -> Result<(), Error> {
    let steps = plan.grid.len();
    if !options.most.is_finite() || options.most == 0.0 {
        return Err(Error::Plan(format!("the factor of earlier predictions is {}", options.most)));
    }
    for step in 1..steps {
        let factor = options.most * step as f64 / (steps - 1) as f64;
        let earlier = if options.first { 0 } else { step - 1 };
        let refs = vec![Ref::from(step), Ref::from(earlier)];
        let kind = Kind::Affine { refs, coefs: vec![1.0 + factor, -factor] };
        substitute(plan, step, Substitution::new(output, kind))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::guided;
    use super::*;

    #[test]
    fn the_factor_grows_and_weights_sum_to_one() {
        let mut plan = guided(5);
        dual(&mut plan, "eps", &Dual { most: 0.4, first: false }).unwrap();
        plan.check().unwrap();
        assert!(plan.at(0).is_empty());
        let Kind::Affine { refs, coefs } = &plan.at(4)[0].kind else { panic!("{:?}", plan.at(4)) };
        assert_eq!((refs[1].step, coefs[1]), (3, -0.4));
        for step in 1..5 {
            let Kind::Affine { coefs, .. } = &plan.at(step)[0].kind else { panic!("{:?}", plan.at(step)) };
            assert!((coefs.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
        assert!(dual(&mut guided(3), "eps", &Dual { most: 0.0, first: true }).is_err());
    }
}

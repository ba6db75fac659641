//! The tensors at which plans cut a denoiser, by name.

use super::super::{Error, Roles};
use lathe_analysis::{Cones, Cuts, Facts, UnitKind};
use lathe_ir::{Model, ValueId};

/// The tensors at which plans cut a denoiser.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parts {
    /// The prediction.
    pub output: String,
    /// The borders of the repeated blocks, one more than there are blocks, each with the names of its streams. Empty
    /// where no blocks repeat.
    pub borders: Vec<Vec<String>>,
    /// What attention and MLPs add to their stream, before gates.
    pub arms: Vec<String>,
    /// What comes from below at the skips of a UNet, the shallowest first.
    pub deep: Vec<String>,
}

impl Parts {
    /// Finds the parts of a denoiser from its structure.
    pub fn find(model: &Model, roles: &Roles) -> Result<Parts, Error> {
        let find = |name: &str| {
            let found = model.graph.find_value(name);
            found.ok_or_else(|| Error::Roles(format!("the denoiser has no value `{name}`")))
        };
        let (latent, time, output) = (find(&roles.latent)?, find(&roles.time)?, find(&roles.output)?);
        let cones = Cones::find(model, &[latent], &[time]);
        let cones = cones.ok_or_else(|| Error::Network("the nodes of the denoiser form a cycle".to_owned()))?;
        let cuts = Cuts::find(model, &Facts::infer(model), &cones, latent, output);
        let name = |value: &ValueId| model.graph.value(*value).name.clone();
        let border = |index: usize| cuts.borders[index].streams.iter().map(name).collect();
        let mut borders: Vec<Vec<String>> = Vec::new();
        if let Some(run) = cuts.longest() {
            borders.extend(run.blocks.first().map(|block| border(block.enter)));
            borders.extend(run.blocks.iter().map(|block| border(block.leave)));
        }
        let plain = [UnitKind::Attention, UnitKind::CrossAttention, UnitKind::Mlp];
        let arms = cuts.residuals.iter().filter(|r| plain.contains(&r.kind)).map(|r| name(&r.ungated)).collect();
        let deep = cuts.skips.iter().map(|skip| name(&skip.deep)).collect();
        Ok(Parts { output: roles.output.clone(), borders, arms, deep })
    }

    /// How many blocks repeat.
    pub fn blocks(&self) -> usize {
        self.borders.len().saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::{Condition, Uncond};
    use super::*;

    fn parts(file: &str, latent: &str, time: &str, output: &str, conditions: &[&str]) -> Parts {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(file);
        let model = Model::read(&path).unwrap().model;
        let conditions =
            conditions.iter().map(|&name| Condition { name: name.to_owned(), uncond: Uncond::Same }).collect();
        let [latent, time, output] = [latent, time, output].map(str::to_owned);
        Parts::find(&model, &Roles { latent, time, conditions, output, ..Roles::default() }).unwrap()
    }

    #[test]
    fn denoisers_of_three_families() {
        let dit = parts("dit.onnx", "x", "t", "eps", &["label"]);
        assert_eq!((dit.blocks(), dit.arms.len(), dit.deep.len()), (4, 8, 0));
        assert!(dit.borders.iter().all(|streams| streams.len() == 1));
        let mmdit = parts("mmdit.onnx", "latent", "timestep", "velocity", &["text", "pooled"]);
        assert_eq!((mmdit.blocks(), mmdit.arms.len()), (3, 14));
        assert!(mmdit.borders.iter().all(|streams| streams.len() == 2));
        let unet = parts("unet.onnx", "sample", "timestep", "eps", &["states"]);
        assert_eq!((unet.deep.len(), unet.arms.len()), (6, 18));
    }
}

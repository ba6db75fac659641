//! A pipeline's folder as diffusers and Optimum lay it out.

use crate::Failure;
use anyhow::{Context as _, anyhow};
use lathe_passes::sampler::{
    pipelines::{self, BESIDE, Pipeline},
    read_python_json,
};
use serde_json::{Map, Value};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A pipeline's folder.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    /// The class that `model_index.json` names.
    pub class: String,
    index: Map<String, Value>,
}

impl Folder {
    /// Opens a folder.
    pub fn open(path: &Path) -> Result<Folder, Failure> {
        let Value::Object(index) = json(&path.join("model_index.json")).with_context(|| {
            format!(
                "`{}` is a folder and no pipeline of diffusers; a denoiser alone is given as its file",
                path.display()
            )
        })?
        else {
            return Err(Failure::Error(anyhow!("`{}` holds no object", path.join("model_index.json").display())));
        };
        let class = index.get("_class_name").and_then(Value::as_str).map(str::to_owned);
        let class = class
            .ok_or_else(|| anyhow!("`{}` names no class as `_class_name`", path.join("model_index.json").display()))?;
        Ok(Folder { path: path.to_owned(), class, index })
    }

    /// What is true of pipelines of its class. Fails where the pipeline has a part that no pipeline of the class is run with.
    pub fn pipeline(&self) -> Result<&'static Pipeline, Failure> {
        let pipeline = pipelines::pipeline(&self.class).with_context(|| format!("`{}`", self.path.display()))?;
        let known =
            |name: &str| pipeline.denoiser == name || pipeline.encoders.contains(&name) || BESIDE.contains(&name);
        for (name, value) in &self.index {
            // A part is a pair of library and class; it is left out where these are null.
            let Some([_, Value::String(class)]) = value.as_array().map(Vec::as_slice) else { continue };
            if !known(name) {
                return Err(Failure::Error(anyhow!(
                    "`{}` has `{name}` of class `{class}`, which is not built: pipelines of class `{}` are run with `{}` \
                     and `{}` only",
                    self.path.display(),
                    self.class,
                    pipeline.encoders.join("`, `"),
                    pipeline.denoiser
                )));
            }
        }
        for field in pipeline.refused {
            if let Some(value) = self.index.get(*field).filter(|v| !v.is_null() && **v != Value::Bool(false)) {
                let (folder, class) = (self.path.display(), &self.class);
                let message =
                    format!("`{folder}` says `{field}` = {value}, which is not built for pipelines of class `{class}`");
                return Err(Failure::Error(anyhow!(message)));
            }
        }
        Ok(pipeline)
    }

    /// A sentence about what is not run.
    pub fn left_out(&self) -> Option<String> {
        let checker = self.index.get("safety_checker").and_then(Value::as_array)?;
        checker.iter().any(Value::is_string).then(|| "the safety checker is not part of the result".to_owned())
    }

    /// Whether `model_index.json` says yes to something.
    pub fn says(&self, field: &str) -> bool {
        self.index.get(field).and_then(Value::as_bool).unwrap_or(false)
    }

    /// The configuration of the scheduler.
    pub fn scheduler(&self) -> Result<Value, Failure> {
        let path = self.path.join("scheduler/scheduler_config.json");
        if !path.is_file() {
            let message =
                format!("`{}` has no `scheduler/scheduler_config.json`; --scheduler gives one", self.path.display());
            return Err(Failure::Error(anyhow!(message)));
        }
        Ok(json(&path)?)
    }

    /// The model of a part.
    pub fn model(&self, part: &str) -> Result<PathBuf, Failure> {
        let path = self.path.join(part).join("model.onnx");
        if path.is_file() {
            return Ok(path);
        }
        let (folder, class) = (self.path.display(), &self.class);
        let torch = ["safetensors", "bin"].iter().any(|end| {
            let files = fs::read_dir(self.path.join(part)).into_iter().flatten().flatten();
            files.map(|f| f.path()).any(|f| f.extension().is_some_and(|e| e == *end))
        });
        let hint = if torch { "; there are weights of PyTorch, which have to be exported to ONNX first" } else { "" };
        Err(Failure::Error(anyhow!(
            "`{folder}` has no `{part}/model.onnx`, which pipelines of class `{class}` need{hint}"
        )))
    }

    /// The configuration of a part; that of the decoder may stand with the whole autoencoder.
    pub fn config(&self, part: &str) -> Result<Map<String, Value>, Failure> {
        let mut places = vec![part.to_owned()];
        places.extend(part.strip_suffix("_decoder").map(str::to_owned));
        for place in places {
            let path = self.path.join(place).join("config.json");
            if path.is_file() {
                let Value::Object(config) = json(&path)? else {
                    return Err(Failure::Error(anyhow!("`{}` holds no object", path.display())));
                };
                return Ok(config);
            }
        }
        Ok(Map::new())
    }
}

fn json(path: &Path) -> anyhow::Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    read_python_json(&text).with_context(|| format!("`{}` is not JSON", path.display()))
}

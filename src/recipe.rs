//! Recipes: the options of a run in a TOML file.

use crate::{Failure, commands::optimize::args::OptimizeArgs, similar::did_you_mean};
use anyhow::{Context as _, anyhow};
use std::{ffi::OsString, io::Write as _, path::Path};

/// Options that a recipe cannot have: it would name itself.
const OUTSIDE: [&str; 2] = ["recipe", "save-recipe"];

/// The options of a recipe, each with its arguments. `command` knows which there are.
pub(crate) fn read(recipe: &Path, command: &clap::Command) -> Result<Vec<(String, Vec<OsString>)>, Failure> {
    let path = recipe.display();
    let text = std::fs::read_to_string(recipe).with_context(|| format!("cannot read recipe `{path}`"))?;
    let table: toml::Table = text.parse().with_context(|| format!("recipe `{path}` is not TOML"))?;
    let mut options = Vec::new();
    for (key, value) in table {
        let known = command.get_arguments().any(|a| a.get_long() == Some(&key));
        if !known || OUTSIDE.contains(&key.as_str()) {
            let names = command.get_arguments().filter_map(clap::Arg::get_long);
            let meant = did_you_mean(&key, names.filter(|name| !OUTSIDE.contains(name)));
            return Err(Failure::Usage(format!("`{key}` in recipe `{path}` is no option of the main job{meant}")));
        }
        let several = match value {
            toml::Value::Array(values) => values,
            value => vec![value],
        };
        let mut arguments = Vec::new();
        for value in several {
            let text = match value {
                toml::Value::Boolean(true) => {
                    arguments.push(format!("--{key}").into());
                    continue;
                }
                toml::Value::Boolean(false) => continue,
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Float(number) => number.to_string(),
                other => {
                    let kind = other.type_str();
                    return Err(Failure::Error(anyhow!("`{key}` in recipe `{path}` is a {kind}, expected a value")));
                }
            };
            arguments.push(format!("--{key}={text}").into());
        }
        options.push((key, arguments));
    }
    Ok(options)
}

/// Writes the options of a run as a recipe.
pub(crate) fn save(options: &OptimizeArgs, path: &Path) -> anyhow::Result<()> {
    let text = toml::to_string_pretty(options).context("these options cannot be written as TOML")?;
    lathe_ir::write_whole(path, |out| out.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write recipe `{}`", path.display()))
}

//! Recipes: the options of a run in a TOML file.

use crate::{Failure, cli::OptimizeArgs};
use anyhow::{Context as _, anyhow};
use std::{ffi::OsString, path::Path};

/// The arguments with those of the recipe put before them, so that the command line wins.
pub(crate) fn extend(arguments: &[OsString], recipe: &Path) -> Result<Vec<OsString>, Failure> {
    let path = recipe.display();
    let text = std::fs::read_to_string(recipe).with_context(|| format!("cannot read recipe `{path}`"))?;
    let table: toml::Table = text.parse().with_context(|| format!("recipe `{path}` is not TOML"))?;
    let mut all: Vec<OsString> = arguments.first().cloned().into_iter().collect();
    for (key, value) in table {
        let flag = format!("--{key}");
        let several = match value {
            toml::Value::Array(values) => values,
            value => vec![value],
        };
        for value in several {
            match value {
                toml::Value::Boolean(true) => all.push(flag.clone().into()),
                toml::Value::Boolean(false) => {}
                toml::Value::String(text) => all.push(format!("{flag}={text}").into()),
                toml::Value::Integer(number) => all.push(format!("{flag}={number}").into()),
                toml::Value::Float(number) => all.push(format!("{flag}={number}").into()),
                other => {
                    let kind = other.type_str();
                    return Err(Failure::Error(anyhow!("`{key}` in recipe `{path}` is a {kind}, expected a value")));
                }
            }
        }
    }
    all.extend(arguments.iter().skip(1).cloned());
    Ok(all)
}

/// Writes the options of a run as a recipe.
pub(crate) fn save(options: &OptimizeArgs, path: &Path) -> anyhow::Result<()> {
    let text = toml::to_string_pretty(options).context("these options cannot be written as TOML")?;
    std::fs::write(path, text).with_context(|| format!("cannot write recipe `{}`", path.display()))
}

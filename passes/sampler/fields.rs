//! The fields of a `scheduler_config.json`, with errors that name them.

use super::Error;
use serde_json::{Map, Value};

/// Where a configuration lists the fields that nobody chose.
const DEFAULTS: &str = "_use_default_values";

/// The fields of a configuration, read one by one.
pub struct Fields(Map<String, Value>);

impl Fields {
    /// The fields of a configuration, which is an object.
    pub(super) fn of(json: &Value) -> Result<Fields, Error> {
        json.as_object().cloned().map(Fields).ok_or_else(|| Self::wrong("scheduler", json, "an object"))
    }

    /// The same without the fields that nobody chose, for which another class has defaults of its own.
    pub(super) fn chosen(mut self) -> Fields {
        let defaults = self.0.get(DEFAULTS).and_then(Value::as_array).cloned().unwrap_or_default();
        defaults.iter().filter_map(Value::as_str).for_each(|field| _ = self.0.remove(field));
        self
    }

    /// The names of the fields, but for those that are about the file itself.
    pub(super) fn names(&self) -> impl Iterator<Item = &String> {
        self.0.keys().filter(|name| !name.starts_with('_'))
    }

    /// A field that is given and not `null`.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|v| !v.is_null())
    }

    /// The error of a field whose value makes no sense.
    pub(super) fn wrong(field: &str, found: &Value, expected: &str) -> Error {
        Error::Field { field: field.to_owned(), found: found.to_string(), expected: expected.to_owned() }
    }

    /// A number.
    pub(super) fn number(&self, field: &str, default: f64) -> Result<f64, Error> {
        Ok(self.optional(field)?.unwrap_or(default))
    }

    /// A number, if there is one.
    pub(super) fn optional(&self, field: &str) -> Result<Option<f64>, Error> {
        let Some(value) = self.get(field) else { return Ok(None) };
        // Infinities have no JSON form; exporters write them as words.
        let number = value.as_f64().or_else(|| value.as_str()?.to_ascii_lowercase().parse().ok());
        number.filter(|n| !n.is_nan()).map(Some).ok_or_else(|| Self::wrong(field, value, "a number"))
    }

    /// A whole number from 1 to a million.
    pub(super) fn count(&self, field: &str, default: usize) -> Result<usize, Error> {
        const MOST: u64 = 1_000_000;
        let Some(value) = self.get(field) else { return Ok(default) };
        let count = value.as_u64().filter(|&n| (1..=MOST).contains(&n));
        count.map(|n| n as usize).ok_or_else(|| Self::wrong(field, value, "a whole number from 1 to a million"))
    }

    /// A truth value.
    pub(super) fn flag(&self, field: &str, default: bool) -> Result<bool, Error> {
        let Some(value) = self.get(field) else { return Ok(default) };
        value.as_bool().ok_or_else(|| Self::wrong(field, value, "true or false"))
    }

    /// One of some words, by what it means.
    pub(super) fn word<T: Copy>(&self, field: &str, default: T, words: &[(&str, T)]) -> Result<T, Error> {
        let Some(value) = self.get(field) else { return Ok(default) };
        let found = value.as_str().and_then(|word| words.iter().find(|(name, _)| *name == word));
        found.map(|(_, meaning)| *meaning).ok_or_else(|| {
            let names: Vec<&str> = words.iter().map(|(name, _)| *name).collect();
            Self::wrong(field, value, &names.join(" or "))
        })
    }

    /// The error of a setting that is known and not built; `why` completes the sentence.
    pub(super) fn unsupported(&self, field: &str, why: &str) -> Error {
        let value = self.get(field).map_or_else(|| "null".to_owned(), Value::to_string);
        Error::Unsupported(format!("`{field}` = {value}{why}"))
    }

    /// A number above zero.
    pub(super) fn positive(&self, field: &str, default: f64) -> Result<f64, Error> {
        let number = self.number(field, default)?;
        if number > 0.0 && number.is_finite() {
            return Ok(number);
        }
        Err(Self::wrong(field, &Value::from(number), "a number above 0"))
    }

    /// A list of numbers, if there is one.
    pub(super) fn numbers(&self, field: &str) -> Result<Option<Vec<f64>>, Error> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let numbers = value.as_array().and_then(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>());
        numbers.map(Some).ok_or_else(|| Self::wrong(field, value, "a list of numbers"))
    }
}

//! Options of a method as a plan's text gives them: `every=2,order=1`.

use crate::Opt;
use std::{collections::BTreeMap, str::FromStr};

/// Methods or options that cannot be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OptionError {
    /// There is no such method.
    #[error("no method is called `{name}`, expected one of {}", .known.join(", "))]
    UnknownMethod {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<&'static str>,
    },
    /// The method has no such option.
    #[error("`{part}` is no option of {method}, expected one of {}", .known.join(", "))]
    UnknownOption {
        /// The method.
        method: &'static str,
        /// What was given.
        part: String,
        /// The options it has.
        known: Vec<&'static str>,
    },
    /// The value of an option cannot be read.
    #[error("option {option} of {method} is `{value}`, expected {expected}")]
    Value {
        /// The method.
        method: &'static str,
        /// The option.
        option: &'static str,
        /// What was given.
        value: String,
        /// What it takes.
        expected: &'static str,
    },
    /// An option without default is not given.
    #[error("{method} needs its option {option}")]
    Missing {
        /// The method.
        method: &'static str,
        /// The option.
        option: &'static str,
    },
}

/// The options of one method: those that were given, and the defaults of the others.
#[derive(Debug)]
pub struct Options {
    method: &'static str,
    declared: &'static [Opt],
    given: BTreeMap<&'static str, String>,
}

impl Options {
    /// Reads `every=2,order=1` for a method that declares these options.
    pub(super) fn parse(method: &'static str, declared: &'static [Opt], text: &str) -> Result<Options, OptionError> {
        let mut given = BTreeMap::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let named = |key: &str| declared.iter().find(|option| option.name == key).map(|option| option.name);
            let found = part.split_once('=').and_then(|(key, value)| Some((named(key)?, value.to_owned())));
            let (name, value) = found.ok_or_else(|| {
                let known = declared.iter().map(|option| option.name).collect();
                OptionError::UnknownOption { method, part: part.to_owned(), known }
            })?;
            given.insert(name, value);
        }
        Ok(Options { method, declared, given })
    }

    fn declared(&self, name: &str) -> &'static Opt {
        self.declared.iter().find(|option| option.name == name).expect("a method reads the options it declares")
    }

    /// The error of an option whose value is not what it takes.
    pub(super) fn wrong(&self, name: &str, value: &str, expected: &'static str) -> OptionError {
        let option = self.declared(name).name;
        OptionError::Value { method: self.method, option, value: value.to_owned(), expected }
    }

    /// The text of an option, and what it may be; `None` where it is neither given nor has a default.
    fn text(&self, name: &str) -> Option<(&str, &'static str)> {
        let option = self.declared(name);
        let text = self.given.get(name).map_or(option.default, String::as_str);
        (!text.is_empty()).then_some((text, option.unit))
    }

    /// An option; `None` where it is neither given nor has a default.
    pub(super) fn optional<T: FromStr>(&self, name: &str) -> Result<Option<T>, OptionError> {
        let Some((text, unit)) = self.text(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|_| self.wrong(name, text, unit))
    }

    /// An option of several values between slashes; `None` where it is neither given nor has a default.
    pub(super) fn several<T: FromStr>(&self, name: &str) -> Result<Option<Vec<T>>, OptionError> {
        let Some((text, unit)) = self.text(name) else { return Ok(None) };
        let parts = text.split('/').map(|part| part.parse().map_err(|_| self.wrong(name, text, unit)));
        parts.collect::<Result<_, _>>().map(Some)
    }

    /// An option that has a default.
    pub(super) fn get<T: FromStr>(&self, name: &str) -> Result<T, OptionError> {
        let option = self.declared(name).name;
        self.optional(name)?.ok_or(OptionError::Missing { method: self.method, option })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DECLARED: [Opt; 3] = [
        Opt { name: "every", unit: "a number", default: "3", doc: "" },
        Opt { name: "ends", unit: "numbers as 1/2/3", default: "", doc: "" },
        Opt { name: "first", unit: "true or false", default: "false", doc: "" },
    ];

    #[test]
    fn options_have_values_or_defaults() {
        let read = |text: &str| Options::parse("delta", &DECLARED, text);
        let options = read("ends=4/16,every=2").unwrap();
        assert_eq!((options.get::<usize>("every"), options.several("ends")), (Ok(2), Ok(Some(vec![4, 16]))));
        assert_eq!(options.get::<bool>("first"), Ok(false));
        let none = read("").unwrap();
        assert_eq!((none.get::<usize>("every"), none.several::<usize>("ends")), (Ok(3), Ok(None)));
        assert_eq!(none.get::<usize>("ends").unwrap_err().to_string(), "delta needs its option ends");
        let unknown = read("rate=3").unwrap_err().to_string();
        assert_eq!(unknown, "`rate=3` is no option of delta, expected one of every, ends, first");
        let odd = read("every=x,ends=4/y,first=1").unwrap();
        let wrong = |found: OptionError| found.to_string();
        let number = "option every of delta is `x`, expected a number";
        assert_eq!(wrong(odd.get::<usize>("every").unwrap_err()), number);
        let numbers = "option ends of delta is `4/y`, expected numbers as 1/2/3";
        assert_eq!(wrong(odd.several::<usize>("ends").unwrap_err()), numbers);
        let flag = "option first of delta is `1`, expected true or false";
        assert_eq!(wrong(odd.get::<bool>("first").unwrap_err()), flag);
    }
}

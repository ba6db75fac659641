//! JSON as Python writes it: with infinities and `NaN`, for which JSON has no words.

use serde_json::Value;
use std::borrow::Cow;

/// The words for numbers that JSON does not know, the longest first.
const WORDS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// Reads JSON in which `Infinity`, `-Infinity` and `NaN` may stand for numbers; they become words in quotes.
pub fn read_python_json(text: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str(&quoted(text))
}

/// The text with those words in quotes, outside of strings.
fn quoted(text: &str) -> Cow<'_, str> {
    if !WORDS[1..].iter().any(|word| text.contains(word)) {
        return Cow::Borrowed(text);
    }
    let (mut out, mut rest, mut inside) = (String::new(), text, false);
    while let Some(next) = rest.chars().next() {
        let word = if inside { None } else { WORDS.into_iter().find(|word| rest.starts_with(word)) };
        let taken = match (word, next) {
            (Some(word), _) => {
                out.extend(["\"", word, "\""]);
                word.len()
            }
            // What follows a backslash does not end a string.
            (None, '\\') if inside => {
                let escaped = rest[1..].chars().next().map_or(0, char::len_utf8);
                out.push_str(&rest[..1 + escaped]);
                1 + escaped
            }
            (None, _) => {
                inside ^= next == '"';
                out.push(next);
                next.len_utf8()
            }
        };
        rest = &rest[taken..];
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_python_writes_is_read() {
        let text = r#"{"a": -Infinity, "b": [Infinity, NaN], "c": "NaN \" Infinity", "d\\": -Infinity}"#;
        let expected = json!({"a": "-Infinity", "b": ["Infinity", "NaN"], "c": "NaN \" Infinity", "d\\": "-Infinity"});
        assert_eq!(read_python_json(text).unwrap(), expected);
        assert_eq!(read_python_json("[1]").unwrap(), json!([1]));
    }

    #[test]
    fn faults_are_told_by_line_and_column() {
        let refused = |text: &str| read_python_json(text).unwrap_err().to_string();
        assert!(refused("{\"a\": NaN,\n}").contains("line 2 column 1"));
        assert!(refused("\u{feff}{}").contains("line 1 column 1"));
        assert!(refused("{\"a\": Infinityy}").contains("line 1"));
    }
}

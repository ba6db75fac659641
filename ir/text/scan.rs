//! Characters, identifiers and literals of the text form.

use super::is_special_float;

/// Why a text is no model, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct ParseError {
    /// The line, from 1.
    pub line: usize,
    /// The character in the line, from 1.
    pub column: usize,
    /// What is wrong there.
    pub message: String,
}

impl ParseError {
    /// The error at byte `at` of `text`.
    pub(super) fn at(text: &str, at: usize, message: impl Into<String>) -> ParseError {
        let before = &text.as_bytes()[..at.min(text.len())];
        let start = before.iter().rposition(|&b| b == b'\n').map_or(0, |newline| newline + 1);
        let line = before.iter().filter(|&&b| b == b'\n').count() + 1;
        // Continuation bytes of UTF-8 are not characters of their own.
        let column = before[start..].iter().filter(|&&b| b & 0xc0 != 0x80).count() + 1;
        ParseError { line, column, message: message.into() }
    }
}

/// Graphs and types nest at most this deep.
const MAX_DEPTH: usize = 64;

/// A number as written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Number<'a> {
    /// The digits with sign, point and exponent, or a special float.
    pub text: &'a str,
    /// Whether it has a point or an exponent or is special.
    pub is_float: bool,
    /// Where it stands.
    pub at: usize,
}

/// A cursor over the text.
pub(super) struct Scanner<'a> {
    pub text: &'a str,
    pub at: usize,
    depth: usize,
}

pub(super) type Parsed<T> = Result<T, ParseError>;

impl<'a> Scanner<'a> {
    pub fn new(text: &'a str) -> Scanner<'a> {
        Scanner { text, at: 0, depth: 0 }
    }

    /// The error that `message` describes, at the cursor.
    pub fn error<T>(&self, message: impl Into<String>) -> Parsed<T> {
        self.error_at(self.at, message)
    }

    pub fn error_at<T>(&self, at: usize, message: impl Into<String>) -> Parsed<T> {
        Err(ParseError::at(self.text, at, message))
    }

    /// Runs `parse` one level deeper.
    pub fn nested<T>(&mut self, parse: impl FnOnce(&mut Scanner<'a>) -> Parsed<T>) -> Parsed<T> {
        if self.depth == MAX_DEPTH {
            return self.error(format!("nested deeper than {MAX_DEPTH} levels"));
        }
        self.depth += 1;
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    /// The byte at the cursor as it is.
    fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// Moves over spaces and comments.
    pub fn skip(&mut self) {
        while let Some(byte) = self.byte() {
            match byte {
                b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c => self.at += 1,
                b'#' => {
                    let rest = &self.text.as_bytes()[self.at..];
                    self.at += rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len());
                }
                _ => return,
            }
        }
    }

    /// The next byte after spaces and comments.
    pub fn peek(&mut self) -> Option<u8> {
        self.skip();
        self.byte()
    }

    /// Whether the next thing is `byte`, which is then taken.
    pub fn eat(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    pub fn expect(&mut self, byte: u8) -> Parsed<()> {
        if self.eat(byte) {
            return Ok(());
        }
        let found = self.found();
        self.error(format!("expected `{}`, found {found}", byte as char))
    }

    /// `=>`
    pub fn arrow(&mut self) -> Parsed<()> {
        self.skip();
        if self.text.as_bytes()[self.at..].starts_with(b"=>") {
            self.at += 2;
            return Ok(());
        }
        let found = self.found();
        self.error(format!("expected `=>`, found {found}"))
    }

    /// How messages name what stands at the cursor.
    pub fn found(&mut self) -> String {
        self.skip();
        match self.text.get(self.at..).and_then(|rest| rest.chars().next()) {
            Some(_) if self.peek_identifier().is_some() => {
                format!("`{}`", self.peek_identifier().unwrap_or_default())
            }
            Some(found) => format!("`{}`", found.escape_debug()),
            None => "the end".to_owned(),
        }
    }

    /// The identifier at the cursor, not taken.
    pub fn peek_identifier(&mut self) -> Option<&'a str> {
        self.skip();
        let rest = &self.text.as_bytes()[self.at..];
        let first = *rest.first()?;
        if !first.is_ascii_alphabetic() && first != b'_' {
            return None;
        }
        let len = rest.iter().position(|b| !b.is_ascii_alphanumeric() && *b != b'_').unwrap_or(rest.len());
        Some(&self.text[self.at..self.at + len])
    }

    pub fn identifier(&mut self) -> Option<&'a str> {
        let found = self.peek_identifier()?;
        self.at += found.len();
        Some(found)
    }

    /// An identifier or a quoted name; `what` is how the message calls it.
    pub fn name(&mut self, what: &str) -> Parsed<String> {
        if let Some(name) = self.optional_name()? {
            return Ok(name);
        }
        let found = self.found();
        self.error(format!("expected {what}, found {found}"))
    }

    /// An identifier or a quoted name, if one is there.
    pub fn optional_name(&mut self) -> Parsed<Option<String>> {
        match self.peek() {
            Some(b'"') => self.string().map(Some),
            Some(b'\'') if self.text.as_bytes()[self.at..].starts_with(b"''") => {
                self.at += 2;
                Ok(Some(String::new()))
            }
            _ => Ok(self.identifier().map(str::to_owned)),
        }
    }

    /// A quoted string that is UTF-8.
    pub fn string(&mut self) -> Parsed<String> {
        self.skip();
        let at = self.at;
        let bytes = self.bytes()?;
        String::from_utf8(bytes).or_else(|_| self.error_at(at, "the string is not UTF-8"))
    }

    /// A quoted string of any bytes.
    pub fn bytes(&mut self) -> Parsed<Vec<u8>> {
        if self.peek() != Some(b'"') {
            let found = self.found();
            return self.error(format!("expected a quoted string, found {found}"));
        }
        let start = self.at;
        let source = self.text.as_bytes();
        let mut bytes = Vec::new();
        let mut at = start + 1;
        loop {
            match source.get(at) {
                None => return self.error_at(start, "the string is not closed"),
                Some(b'"') => break,
                Some(b'\\') => {
                    let hex = source.get(at + 2..at + 4).and_then(|digits| std::str::from_utf8(digits).ok());
                    let code = hex.and_then(|digits| u8::from_str_radix(digits, 16).ok());
                    match (source.get(at + 1), code) {
                        (Some(b'x'), Some(code)) => {
                            bytes.push(code);
                            at += 4;
                        }
                        (Some(&escaped), _) => {
                            bytes.push(escaped);
                            at += 2;
                        }
                        (None, _) => return self.error_at(start, "the string is not closed"),
                    }
                }
                Some(&byte) => {
                    bytes.push(byte);
                    at += 1;
                }
            }
        }
        self.at = at + 1;
        Ok(bytes)
    }

    /// A number, also `inf`, `-inf`, `nan` and `nan(0x7fc00000)`.
    pub fn number(&mut self) -> Parsed<Number<'a>> {
        self.skip();
        let at = self.at;
        let source = self.text.as_bytes();
        let digits = |mut end: usize| {
            while source.get(end).is_some_and(u8::is_ascii_digit) {
                end += 1;
            }
            end
        };
        self.at += usize::from(self.byte() == Some(b'-'));
        // A special float follows the sign immediately.
        let signed = self.byte().is_some_and(|b| b.is_ascii_alphabetic());
        if let Some(word) = self.peek_identifier().filter(|word| signed && is_special_float(word)) {
            self.at += word.len();
            if word.eq_ignore_ascii_case("nan") && self.byte() == Some(b'(') {
                let rest = &source[self.at..];
                self.at += rest.iter().position(|&b| b == b')').map_or(rest.len(), |close| close + 1);
            }
            return Ok(Number { text: self.text.get(at..self.at).unwrap_or_default(), is_float: true, at });
        }
        let mut end = digits(self.at);
        if end == self.at {
            self.at = at;
            let found = self.found();
            return self.error(format!("expected a value, found {found}"));
        }
        let mut is_float = false;
        if source.get(end) == Some(&b'.') {
            is_float = true;
            end = digits(end + 1);
        }
        if matches!(source.get(end), Some(b'e' | b'E')) {
            is_float = true;
            end += 1;
            end = digits(end + usize::from(matches!(source.get(end), Some(b'+' | b'-'))));
        }
        self.at = end;
        Ok(Number { text: &self.text[at..end], is_float, at })
    }

    pub fn integer(&mut self) -> Parsed<i64> {
        let number = self.number()?;
        self.int(number)
    }

    pub fn int(&self, number: Number<'_>) -> Parsed<i64> {
        let parsed = number.text.parse().ok().filter(|_| !number.is_float);
        parsed.map_or_else(|| self.error_at(number.at, format!("`{}` is not a 64-bit integer", number.text)), Ok)
    }

    pub fn float(&self, number: Number<'_>) -> Parsed<f32> {
        if let Some(bits) = nan_bits(number.text) {
            return match u32::try_from(bits).ok().map(f32::from_bits).filter(|v| v.is_nan()) {
                Some(value) => Ok(value),
                None => self.error_at(number.at, format!("`{}` is not a float", number.text)),
            };
        }
        match number.text.parse::<f32>() {
            Ok(value) if value.is_nan() => Ok(f32::NAN.abs().copysign(sign(number.text) as f32)),
            Ok(value) if value.is_finite() || is_special(number.text) => Ok(value),
            _ => self.error_at(number.at, format!("`{}` is not a float", number.text)),
        }
    }

    pub fn double(&self, number: Number<'_>) -> Parsed<f64> {
        if let Some(value) = nan_bits(number.text).map(f64::from_bits).filter(|v| v.is_nan()) {
            return Ok(value);
        }
        match number.text.parse::<f64>() {
            Ok(value) if value.is_nan() => Ok(f64::NAN.abs().copysign(sign(number.text))),
            Ok(value) if value.is_finite() || is_special(number.text) => Ok(value),
            _ => self.error_at(number.at, format!("`{}` is not a double", number.text)),
        }
    }
}

fn sign(text: &str) -> f64 {
    if text.starts_with('-') { -1.0 } else { 1.0 }
}

fn is_special(text: &str) -> bool {
    is_special_float(text.trim_start_matches('-'))
}

/// The bits in `nan(0x7fc00000)`.
fn nan_bits(text: &str) -> Option<u64> {
    let (word, rest) = text.split_once("(0x")?;
    let bits = rest.strip_suffix(')')?;
    word.eq_ignore_ascii_case("nan").then(|| u64::from_str_radix(bits, 16).ok()).flatten()
}

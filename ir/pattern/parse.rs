//! Reads the text of a pattern.

use super::{Arithmetic, Chain, NodeTerm, Pattern, Power, Term, Wanted};
use std::sync::Arc;

pub(super) fn pattern(text: &str) -> Pattern {
    let mut parser = Parser { text: text.as_bytes(), at: 0 };
    let root = parser.term();
    assert!(parser.peek().is_none(), "pattern `{text}` goes on after its root");
    let mut roots = Vec::new();
    root.collect_roots(&mut roots);
    roots.sort_unstable();
    roots.dedup();
    assert!(!roots.is_empty(), "pattern `{text}` is no node");
    Pattern { root, roots, through_casts: false }
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

/// An argument of a product or sum.
enum Argument {
    Factor(Term, Power),
    Number(f64),
    Named(String),
}

impl Parser<'_> {
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn eat(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8) {
        let whole = String::from_utf8_lossy(self.text).into_owned();
        assert!(self.eat(byte), "pattern `{whole}` lacks a `{}` at {}", byte as char, self.at);
    }

    fn word(&mut self) -> String {
        self.peek();
        let start = self.at;
        let inside = |b: &u8| b.is_ascii_alphanumeric() || b"_.".contains(b);
        while self.text.get(self.at).is_some_and(inside) {
            self.at += 1;
            // `stringify!` may put spaces around the dots of a domain.
            if self.text.get(self.at) == Some(&b' ') && self.text.get(self.at + 1) == Some(&b'.') {
                self.at += 1;
            }
        }
        String::from_utf8_lossy(&self.text[start..self.at]).replace(' ', "")
    }

    /// The number that comes next, if one does.
    fn number(&mut self) -> Option<f64> {
        let start = self.at;
        let negative = self.eat(b'-');
        if !self.peek().is_some_and(|b| b.is_ascii_digit()) {
            self.at = start;
            return None;
        }
        let number: f64 = self.word().parse().expect("a pattern's number is a number");
        Some(if negative { -number } else { number })
    }

    fn term(&mut self) -> Term {
        if let Some(number) = self.number() {
            return Term::Number(number);
        }
        if self.eat(b'(') {
            let mut choices = vec![self.term()];
            while self.eat(b'|') {
                choices.push(self.term());
            }
            self.expect(b')');
            return if choices.len() == 1 { choices.remove(0) } else { Term::Choice(choices) };
        }
        let word = self.word();
        if self.eat(b':') {
            let label = Some(Arc::from(word.as_str()));
            return match self.term() {
                Term::Node(node) => Term::Node(NodeTerm { label, ..node }),
                Term::Chain(chain) => Term::Chain(Chain { label, ..chain }),
                _ => panic!("label `{word}` stands before something that is no node"),
            };
        }
        if !is_operator(&word) {
            assert!(!word.is_empty(), "a pattern has an empty name");
            return if word == "_" { Term::Any } else { Term::Value(word.into()) };
        }
        if self.eat(b'*') {
            return Term::Chain(self.chain(&word));
        }
        let mut ops = vec![word];
        while self.eat(b'|') {
            ops.push(self.word());
        }
        let optional = self.eat(b'?');
        let (mut args, mut rest) = (Vec::new(), false);
        self.expect(b'(');
        while !self.eat(b')') {
            if self.eat(b'.') {
                while self.eat(b'.') {}
                rest = true;
                continue;
            }
            args.push(self.term());
            self.eat(b',');
            assert!(self.peek().is_some(), "a pattern ends inside an argument list");
        }
        assert!(!optional || args.len() == 1, "`{}?` needs one argument that takes its place", ops[0]);
        let split = |op: String| match op.rsplit_once('.') {
            Some((domain, op)) => (domain.to_owned(), op.to_owned()),
            None => (String::new(), op),
        };
        Term::Node(NodeTerm { label: None, ops: ops.into_iter().map(split).collect(), optional, args, rest })
    }

    fn chain(&mut self, word: &str) -> Chain {
        self.expect(b'(');
        let kind = match word {
            "Mul" | "Pow" => Arithmetic::Product,
            "Add" => Arithmetic::Sum,
            _ => panic!("`{word}*` is neither a product nor a sum"),
        };
        let mut chain = Chain { label: None, kind, factors: Vec::new(), number: Wanted::Number(kind.neutral()) };
        if word == "Pow" {
            let base = self.term();
            chain.factors.push((base, self.exponent()));
            return chain;
        }
        while !self.eat(b')') {
            match (self.argument(kind), &mut chain.number) {
                (Argument::Factor(term, power), _) => chain.add(term, power),
                (Argument::Number(number), Wanted::Number(so_far)) => *so_far = kind.join(*so_far, number),
                (Argument::Named(name), Wanted::Number(so_far)) if *so_far == kind.neutral() => {
                    chain.number = Wanted::Named(name.into());
                }
                _ => panic!("a product or sum has a number beside a named one"),
            }
            self.eat(b',');
            assert!(self.peek().is_some(), "a pattern ends inside an argument list");
        }
        assert!(!chain.factors.is_empty(), "a product or sum has nothing but numbers");
        chain.factors.sort_by_key(|(term, _)| term.vagueness());
        chain
    }

    /// `, exponent)`, as twice the exponent.
    fn exponent(&mut self) -> Power {
        self.expect(b',');
        let halves = self.number().expect("an exponent is a number") * 2.0;
        assert!(halves != 0.0 && halves.fract() == 0.0 && halves.abs() < 64.0, "an exponent is a multiple of ½");
        self.expect(b')');
        halves as Power
    }

    fn argument(&mut self, kind: Arithmetic) -> Argument {
        if let Some(number) = self.number() {
            return Argument::Number(number);
        }
        if self.eat(b'#') {
            return Argument::Named(self.word());
        }
        let sign = if self.eat(b'-') { -2 } else { 2 };
        assert!(sign > 0 || kind == Arithmetic::Sum, "only the terms of a sum have signs");
        let start = self.at;
        if kind == Arithmetic::Product && self.word() == "Pow" && self.eat(b'(') {
            let base = self.term();
            return Argument::Factor(base, self.exponent());
        }
        self.at = start;
        Argument::Factor(self.term(), sign)
    }
}

/// Operators begin with a capital letter, after the dots of their domain.
fn is_operator(word: &str) -> bool {
    word.rsplit('.').next().is_some_and(|name| name.starts_with(|c: char| c.is_ascii_uppercase()))
}

impl Chain {
    /// Adds a factor; `x · x` is `x²`.
    fn add(&mut self, term: Term, power: Power) {
        if let (Arithmetic::Product, Term::Value(name), 0) = (self.kind, &term, power % 2) {
            let same = |other: &Term| matches!(other, Term::Value(n) if n == name);
            let joins = |(other, other_power): &&mut (Term, Power)| {
                same(other) && *other_power % 2 == 0 && other_power.signum() == power.signum()
            };
            if let Some((_, so_far)) = self.factors.iter_mut().find(joins) {
                *so_far += power;
                return;
            }
        }
        self.factors.push((term, power));
    }
}

impl Term {
    /// How little a term says: what says most is tried first.
    fn vagueness(&self) -> u8 {
        match self {
            Term::Node(_) | Term::Chain(_) | Term::Number(_) => 0,
            Term::Choice(terms) => terms.iter().map(Term::vagueness).max().unwrap_or(0),
            Term::Value(_) => 1,
            Term::Any => 2,
        }
    }
}

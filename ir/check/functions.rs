//! Local functions: told apart by name, and never calling themselves.

use super::CheckError;
use crate::Function;
use std::collections::HashMap;

/// What a node names to call a function: domain, name and overload.
type Key<'a> = (&'a str, &'a str, &'a str);

fn key<'a>(domain: &'a str, name: &'a str, overload: &'a str) -> Key<'a> {
    (if domain == "ai.onnx" { "" } else { domain }, name, overload)
}

/// How messages name a function: `local.f:overload`.
pub(super) fn full_name(function: &Function) -> String {
    let Function { domain, name, overload, .. } = function;
    let dot = if domain.is_empty() { "" } else { "." };
    let colon = if overload.is_empty() { "" } else { ":" };
    format!("{domain}{dot}{name}{colon}{overload}")
}

pub(super) fn check(functions: &[Function]) -> Result<(), CheckError> {
    let mut known = HashMap::with_capacity(functions.len());
    for (index, function) in functions.iter().enumerate() {
        if known.insert(key(&function.domain, &function.name, &function.overload), index).is_some() {
            return Err(CheckError::RepeatedFunction { function: full_name(function) });
        }
    }
    let calls = |function: &Function| -> Vec<usize> {
        let nodes = function.graph.all_nodes();
        let nodes = nodes.iter().map(|&id| function.graph.node(id));
        nodes.filter_map(|n| known.get(&key(&n.domain, &n.op_type, &n.overload)).copied()).collect()
    };
    #[derive(Clone, Copy, PartialEq)]
    enum State {
        New,
        Open,
        Done,
    }
    let mut state = vec![State::New; functions.len()];
    for root in 0..functions.len() {
        let mut stack = vec![(root, None::<Vec<usize>>)];
        while let Some((at, pending)) = stack.last_mut() {
            let at = *at;
            if pending.is_none() && state[at] == State::Done {
                stack.pop();
                continue;
            }
            if pending.is_none() {
                state[at] = State::Open;
            }
            match pending.get_or_insert_with(|| calls(&functions[at])).pop() {
                None => {
                    state[at] = State::Done;
                    stack.pop();
                }
                Some(called) if state[called] == State::Open => {
                    return Err(CheckError::Recursion { function: full_name(&functions[called]) });
                }
                Some(called) => stack.push((called, None)),
            }
        }
    }
    Ok(())
}

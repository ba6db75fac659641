//! Why the runtime leaves nodes to other providers, in its own words: what a session logs while nodes are assigned.

use ort::logging::{LogLevel, LoggerFunction};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// The reasons that a session has logged, by the name of the node.
#[derive(Debug, Clone, Default)]
pub(super) struct Assignment(Arc<Mutex<BTreeMap<String, String>>>);

impl Assignment {
    /// Hears what a session logs.
    pub fn logger(&self) -> LoggerFunction {
        let reasons = Arc::clone(&self.0);
        Arc::new(move |_: LogLevel, _: &str, _: &str, _: &str, message: &str| {
            if let Some((node, why)) = reason(message) {
                reasons.lock().unwrap_or_else(PoisonError::into_inner).entry(node).or_insert(why);
            }
        })
    }

    /// The reasons so far.
    pub fn reasons(&self) -> BTreeMap<String, String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The node that a message is about, and why it is left; `None` where it is about something else.
fn reason(message: &str) -> Option<(String, String)> {
    // "webgpu kernel not found in registries for Op type: Unsqueeze node name: /layer/Unsqueeze"
    if let Some((_, after)) = message.split_once("kernel not found in registries for Op type: ") {
        let (_, node) = after.split_once(" node name: ")?;
        return Some((node.trim().to_owned(), "the provider has no kernel for these types".to_owned()));
    }
    // "Force fallback to CPU execution for node: /layer/Shape because the CPU execution path is deemed faster …"
    let (_, after) = message.split_once("Force fallback to CPU execution for node: ")?;
    let (node, _) = after.split_once(" because ")?;
    Some((node.trim().to_owned(), "the runtime keeps it on the CPU, where it computes sizes".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_read_from_the_log() {
        let found =
            reason("webgpu kernel not found in registries for Op type: Unsqueeze node name: /blocks.9/Unsqueeze_5");
        assert_eq!(
            found,
            Some(("/blocks.9/Unsqueeze_5".to_owned(), "the provider has no kernel for these types".to_owned()))
        );
        let found = reason(
            "ORT optimization- Force fallback to CPU execution for node: /Gather because the CPU execution path is deemed \
             faster than overhead involved with execution on other EPs capable of executing this node",
        );
        assert_eq!(found.unwrap().0, "/Gather");
        assert_eq!(reason("Removing initializer 'x'. It is no longer used by any node."), None);
    }
}

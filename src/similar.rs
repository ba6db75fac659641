//! What somebody may have meant by a name that there is not.

/// How alike names must be, of 1, to be worth a question.
const ALIKE: f64 = 0.8;

/// `; did you mean \`X\`?` with the known name that is most like `name`, or nothing where none is.
pub(crate) fn did_you_mean<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let alike = |known: &'a str| (strsim::jaro_winkler(name, known), known);
    let nearest = known.into_iter().map(alike).max_by(|a, b| a.0.total_cmp(&b.0));
    match nearest {
        Some((likeness, nearest)) if likeness >= ALIKE => format!("; did you mean `{nearest}`?"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_alike_are_asked_about() {
        let known = ["fuse-layer-norm", "fuse-gelu", "fold-bias"];
        assert_eq!(did_you_mean("fuse-layernorm", known), "; did you mean `fuse-layer-norm`?");
        assert_eq!(did_you_mean("fold_bias", known), "; did you mean `fold-bias`?");
        assert_eq!(did_you_mean("quantise", known), "");
        assert_eq!(did_you_mean("x", []), "");
    }
}

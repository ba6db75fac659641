//! Round trips through text and what cannot be parsed.

use super::*;

#[track_caller]
fn round_trips(text: &str) -> crate::Model {
    let model = parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let full = print_full(&model);
    let again = parse(&full).unwrap_or_else(|error| panic!("{error}\n{full}"));
    assert_eq!(print_full(&again), full);
    model
}

#[test]
fn prints_the_style_of_snapshots() {
    let text = "g (float[2,3,4] x) => (float[4,2,3] y) {
    t = Transpose <perm = [1, 0, 2]> (x)
    [last] y = Transpose <perm = [2, 1, 0]> (t)  # float[4,2,3]
}
";
    assert_eq!(print_graph(&round_trips(text)), text);
}

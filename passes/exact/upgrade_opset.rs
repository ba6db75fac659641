//! Raises the version of the standard operator set.

mod convert;

use super::normalise_model::least_ir_version;
use crate::{Error, Info, Kind, Opt, Outcome, Pass, PassContext, Refusal};
use convert::{Site, convert};
use lathe_analysis::{Facts, Operator};
use lathe_ir::{AttributeValue, Function, Graph, Model, NodeId, imported};

/// The newest version whose changes are known.
const LAST: i64 = 25;

/// See [`INFO`].
pub struct UpgradeOpset;

static INFO: Info = Info {
    name: "upgrade-opset",
    summary: "converts the model to a newer version of the standard operator set, if one is asked for",
    doc: "Rewrites every node whose operator changed between the model's version and `to`: attributes that became \
          inputs, changed defaults and meanings, replaced operators. Local functions are converted too. Either the whole \
          model is converted or nothing is: declines with the operator's name where a change in meaning cannot be \
          expressed, for operators it does not know, for versions below 7 and for versions older than the model's.",
    options: &[Opt {
        name: "to",
        unit: "a version of the operator set from 8 to 25, or `none`",
        default: "none",
        doc: "the version to convert to",
    }],
    // A runtime may have another kernel for each version of an operator, which sums in another order.
    kind: Kind::Equivalent { rtol: 1e-5 },
    lowers: &[],
    source: Some("ONNX operator change log"),
};

/// The oldest version to start from.
const FIRST: i64 = 7;

impl Pass for UpgradeOpset {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn apply(&self, model: &mut Model, cx: &PassContext) -> Result<Outcome, Error> {
        let mut outcome = Outcome::default();
        let setting: String = cx.setting(&INFO, "to")?;
        if setting == "none" {
            return Ok(outcome);
        }
        let to = setting.parse().ok().filter(|to| (FIRST + 1..=LAST).contains(to)).ok_or_else(|| Error::Setting {
            option: format!("{}.to", INFO.name),
            value: setting,
            expected: INFO.options[0].unit,
        })?;
        let from = model.opset();
        if from > to {
            outcome.refuse(format!("the model uses version {from}; operators are never downgraded"), "the model");
            return Ok(outcome);
        }
        let mut next = model.clone();
        upgrade(&mut next.graph, &model.opsets, &model.functions, to, &mut outcome)?;
        raise(&mut next.opsets, to, &mut outcome, "the main graph");
        for (function, before) in next.functions.iter_mut().zip(&model.functions) {
            if imported(&before.opsets, "").is_some_and(|version| version < to) {
                upgrade(&mut function.graph, &before.opsets, &model.functions, to, &mut outcome)?;
                let place = format!("function `{}`", function.name);
                raise(&mut function.opsets, to, &mut outcome, &place);
            }
        }
        if !outcome.refusals.is_empty() {
            outcome.changes.clear();
            return Ok(outcome);
        }
        next.ir_version = next.ir_version.max(least_ir_version(&next));
        *model = next;
        Ok(outcome)
    }
}

fn raise(opsets: &mut [(String, i64)], to: i64, outcome: &mut Outcome, place: &str) {
    for (domain, version) in opsets {
        if (domain.is_empty() || domain == "ai.onnx") && *version < to {
            *version = to;
            outcome.change("raise-opset", place);
        }
    }
}

fn upgrade(
    graph: &mut Graph,
    opsets: &[(String, i64)],
    functions: &[Function],
    to: i64,
    outcome: &mut Outcome,
) -> Result<(), Error> {
    let Some(from) = imported(opsets, "").filter(|&from| from < to) else { return Ok(()) };
    if from < FIRST {
        outcome.refuse(format!("version {from} of the operator set is older than {FIRST}"), "the model");
        return Ok(());
    }
    graph.sort()?;
    let mut facts = Facts::of(graph, opsets, functions);
    for version in from + 1..=to {
        for id in graph.all_nodes() {
            let place = graph.describe(id);
            let op = graph.node(id).op_type.clone();
            match step(graph, &mut facts, functions, id, version, to) {
                Ok(false) => {}
                Ok(true) => outcome.change("convert-node", place),
                Err(Refusal::NoMatch) => {}
                Err(Refusal::Reason(reason)) => {
                    outcome.refuse(format!("{op} cannot be converted to version {version}: {reason}"), place)
                }
            }
        }
        if !outcome.refusals.is_empty() {
            return Ok(());
        }
    }
    graph.sort()?;
    Ok(())
}

/// Takes one node to `version` on its way to version `to`. Whether it changed.
fn step(
    graph: &mut Graph,
    facts: &mut Facts,
    functions: &[Function],
    id: NodeId,
    version: i64,
    to: i64,
) -> Result<bool, Refusal> {
    let node = graph.node(id);
    let called = functions.iter().any(|f| f.name == node.op_type && f.domain.is_empty());
    if !node.is_standard() || called {
        return Ok(false);
    }
    let operator = Operator::of(node).filter(|operator| operator.since <= LAST).ok_or("the operator is not known")?;
    if !operator.changed.contains(&version) {
        return Ok(false);
    }
    if node.attributes.iter().any(|a| matches!(a.value, AttributeValue::Reference { .. })) {
        return Err("an attribute is that of the calling node".into());
    }
    let revision = graph.revision();
    convert(&mut Site { graph, facts, id, to }, version)?;
    Ok(graph.revision() != revision)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_in, check_refuses_in, model};
    use insta::assert_snapshot;

    fn to(version: i64) -> PassContext<'static> {
        PassContext::default().with_setting("upgrade-opset.to", version)
    }

    fn text(from: i64, graph: &str) -> String {
        let ir_version = if from < 9 { 4 } else { 7 };
        format!("<ir_version: {ir_version}, opset_import: [\"\": {from}]>\n{graph}")
    }

    /// Converts, runs both and returns the new graph.
    fn up(from: i64, version: i64, graph: &str) -> String {
        check_in(&UpgradeOpset, &text(from, graph), &to(version))
    }

    fn refuses(from: i64, version: i64, graph: &str, reason: &str) {
        check_refuses_in(&UpgradeOpset, &text(from, graph), reason, &to(version));
    }

    #[test]
    fn moves_axes_into_inputs() {
        assert_snapshot!(up(11, 18, "
            g (float[2,1,3] x) => (float[1,2] y) {
                s = Squeeze <axes = [1]> (x)
                m = ReduceMean <axes = [1], keepdims = 0> (s)
                u = Unsqueeze <axes = [0]> (m)
                y = ReduceSum <axes = [0]> (u)
            }"), @"
        g (float[2,1,3] x) => (float[1,2] y) <
            int64[1] s_axes = {1},
            int64[1] u_axes = {0},
            int64[1] y_axes = {0},
            int64[1] m_axes = {1}
        > {
            s = Squeeze (x, s_axes)
            m = ReduceMean <keepdims = 0> (s, m_axes)
            u = Unsqueeze (m, u_axes)
            y = ReduceSum (u, y_axes)  # float[1,2]
        }
        ");
    }

    #[test]
    fn converts_every_reduction() {
        for op in ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"] {
            let graph = format!(
                "
                g (float[2,3] x) => (float[2] y, float[1,1] z) {{
                    a = Abs (x)
                    y = Reduce{op} <axes = [1], keepdims = 0> (a)
                    z = Reduce{op} (a)
                }}"
            );
            up(11, 20, &graph);
        }
    }

    #[test]
    fn flattens_where_softmax_meant_several_axes() {
        assert_snapshot!(up(11, 13, "
            g (float[2,3,4] x) => (float[2,3,4] y, float[2,3,4] z) {
                y = Softmax (x)
                z = LogSoftmax <axis = 2> (x)
            }"), @"
        g (float[2,3,4] x) => (float[2,3,4] y, float[2,3,4] z) {
            y_rows = Flatten <axis = 1> (x)
            y_2 = Softmax <axis = -1> (y_rows)
            z = LogSoftmax <axis = -1> (x)  # float[2,3,4]
            y_shape = Shape (x)
            y = Reshape (y_2, y_shape)  # float[2,3,4]
        }
        ");
        up(11, 13, "g (float[2,3,4] x) => (float[2,3,4] y) { s = Hardmax <axis = 1> (x) y = Neg (s) }");
    }

    #[test]
    fn flattens_a_softmax_in_a_branch() {
        up(
            11,
            13,
            "
            g (float[2,3,4] x, bool c) => (float[2,3,4] y) {
                y = If (c) <then_branch = t () => (float[2,3,4] p) { p = Softmax (x) },
                            else_branch = e () => (float[2,3,4] q) { q = Neg (x) }>
            }",
        );
    }

    #[test]
    fn moves_limits_paddings_and_ranges_into_inputs() {
        up(
            8,
            21,
            "
            g (float[4,6] x) => (float[4,6] y, float[6,9] z, float[2,3] s, float[4,2] v, int64[4,2] i) {
                y = Clip <min = 0.25, max = 0.75> (x)
                z = Pad <pads = [1, 1, 1, 2], value = 2.5> (x)
                s = Slice <starts = [1, 0], ends = [3, 3], axes = [0, 1]> (x)
                v, i = TopK <k = 2> (x)
            }",
        );
        up(9, 21, "g (float[4,6] x) => (float[4,6] y) { y = Clip <min = 0.25> (x) }");
    }

    #[test]
    fn converts_splits() {
        up(
            11,
            18,
            "
            g (float[6,3] x) => (float[2,3] a, float[4,3] b, float[3,3] c, float[3,3] d) {
                a, b = Split <split = [2, 4]> (x)
                c, d = Split (x)
            }",
        );
    }

    #[test]
    fn converts_normalization_and_dropout() {
        up(
            8,
            21,
            "
            g (float[2,3,4,4] x) => (float[2,3,4,4] y)
            <float[3] s = {1, 2, 3}, float[3] b = {0, 1, 2}, float[3] m = {0, 0.5, 1}, float[3] v = {1, 2, 4}> {
                n = BatchNormalization <spatial = 1> (x, s, b, m, v)
                y = Dropout <ratio = 0.25> (n)
            }",
        );
    }

    #[test]
    fn repeats_group_scales_for_every_channel() {
        up(
            18,
            21,
            "
            g (float[2,6,4] x) => (float[2,6,4] y) <float[2] s = {1, 2}, float[2] b = {0.5, -1}> {
                y = GroupNormalization <num_groups = 2> (x, s, b)
            }",
        );
    }

    #[test]
    fn turns_upsample_into_resize() {
        for mode in ["nearest", "linear"] {
            let graph = format!(
                "
                g (float[1,2,3,3] x) => (float[1,2,6,9] y) {{
                    y = Upsample <mode = \"{mode}\", scales = [1.0, 1.0, 2.0, 3.0]> (x)
                }}"
            );
            up(8, 19, &graph);
        }
        let graph = "
            g (float[1,2,3,3] x) => (float[1,2,6,6] y) <float[4] scales = {1, 1, 2, 2}> {
                y = Resize <mode = \"nearest\"> (x, scales)
            }";
        up(10, 13, graph);
        refuses(10, 13, &graph.replace("1, 2, 2}", "1, 0.5, 2}").replace("6,6] y", "1,6] y"), "nearest pixels");
    }

    #[test]
    fn renames_modes() {
        up(
            16,
            20,
            "
            g (float[1,2,4,4] x, float[1,3,3,2] at) => (float[1,2,3,3] y, float[1,2,3,3] z) {
                y = GridSample (x, at)
                z = GridSample <mode = \"bicubic\"> (x, at)
            }",
        );
        up(
            11,
            16,
            "
            g (float[1,2,8,8] x) => (float[1,2,2,2] y) <float[1,4] rois = {1, 1, 5, 5}, int64[1] at = {0}> {
                y = RoiAlign <output_height = 2, output_width = 2, sampling_ratio = 2> (x, rois, at)
            }",
        );
    }

    #[test]
    fn converts_transforms_scatters_and_pools() {
        up(17, 20, "g (float[1,8,1] x) => (float[1,8,2] y) { y = DFT <axis = 1> (x) }");
        up(
            9,
            18,
            "
            g (float[3,3] x) => (float[3,3] y) <int64[1,2] at = {1, 0}, float[1,2] new = {5, 6}> {
                y = Scatter (x, at, new)
            }",
        );
        up(
            10,
            22,
            "
            g (float[1,1,7] x) => (float[1,1,a] y, float[1,1,b] z) {
                y = AveragePool <kernel_shape = [3], strides = [2], ceil_mode = 1> (x)
                z = MaxPool <kernel_shape = [3], strides = [2], ceil_mode = 1> (x)
            }",
        );
    }

    #[test]
    fn refuses_a_mask_that_changes_its_meaning() {
        let graph = "g (float[2,3] x) => (float[2,3] y, bool[2,3] m) { y, m = Dropout <ratio = 0.7> (x) }";
        refuses(10, 13, graph, "Dropout cannot be converted to version 12: its mask says the opposite in inference");
        refuses(
            7,
            13,
            &graph.replace("bool", "float"),
            "Dropout cannot be converted to version 10: the type of its mask changed",
        );
        up(
            12,
            18,
            &graph.replace("<ratio = 0.7> ", "").replace(
                "y, m = Dropout (x)",
                "a = Unsqueeze <axes = [0]> (x) b = Squeeze <axes = [0]> (a) y, m = Dropout (b)",
            ),
        );
        up(10, 13, "g (float[2,3] x) => (float[2,3] y) { y, m = Dropout <ratio = 0.7> (x) }");
    }

    #[test]
    fn keeps_empty_axes_behind_a_softmax() {
        let graph = "g (float[a,b,c,3] x) => (float[a,b,c,3] y) { y = Softmax <axis = 1> (x) }";
        refuses(11, 13, graph, "one of its axes may be empty, which needs version 14");
        assert!(up(11, 14, graph).contains("allowzero = 1"));
        up(11, 13, &graph.replace("b,c", "2,5"));
    }

    #[test]
    fn refuses_what_cannot_be_expressed() {
        refuses(
            10,
            19,
            "
            g (float[1,1,7] x) => (float[1,1,a] y) {
                y = AveragePool <kernel_shape = [2], strides = [3], ceil_mode = 1> (x)
            }",
            "AveragePool cannot be converted to version 19",
        );
        refuses(
            8,
            9,
            "
            g (float[2,3] x, float[3] s) => (float[2,3] y) {
                y = BatchNormalization <spatial = 0> (x, s, s, s, s)
            }",
            "`spatial` is 0",
        );
        refuses(13, 12, "g (float[2] x) => (float[2] y) { y = Neg (x) }", "never downgraded");
        refuses(11, 18, "g (float[2] x) => (float[2] y) { y = Imaginary (x) }", "the operator is not known");
        refuses(11, 13, "g (float[2] x) => (float[1,2] y) { y = Unsqueeze (x) }", "it lacks `axes`");
        refuses(
            11,
            13,
            "
            g (float[1,2,4,4] x, float[0] roi) => (float[1,2,8,8] y) <float[4] scales = {1, 1, 2, 2}> {
                y = Resize <coordinate_transformation_mode = \"tf_half_pixel_for_nn\"> (x, roi, scales)
            }",
            "`tf_half_pixel_for_nn` is gone",
        );
        refuses(
            23,
            24,
            "
            g (float[1,2,4,8] q) => (float[1,2,4,8] y) { y = Attention <softcap = 2.0> (q, q, q) }",
            "the place of `softcap`",
        );
        refuses(
            8,
            9,
            "
            g (float[1,2] x, float[1,3,2] xs) => (float[1,2] y, float[1,3,2] ys) {
                y, ys = Scan <body = b (float[2] s, float[2] e) => (float[2] t, float[2] f) {
                    t = Add (s, e)
                    f = Neg (e)
                }, num_scan_inputs = 1> (, x, xs)
            }",
            "Scan cannot be converted to version 9: there is no conversion",
        );
    }

    #[test]
    fn refuses_nodes_that_lack_what_moves() {
        let one = |body: &str| format!("g (float[2,3] x) => (float[a,b] y) {{ {body} }}");
        refuses(9, 10, &one("y = Slice <ends = [1]> (x)"), "it lacks `starts`");
        refuses(9, 10, &one("y = Slice <starts = [1]> (x)"), "it lacks `ends`");
        refuses(9, 10, &one("y, i = TopK (x)"), "it lacks `k`");
        refuses(8, 9, &one("y = Upsample (x)"), "it lacks `scales`");
        refuses(10, 11, &one("y = Resize (x)"), "it lacks `scales`");
        refuses(10, 11, &one("y = Pad (x)"), "it lacks `pads`");
        refuses(11, 13, &one("y = Softmax <axis = 0> ()"), "it lacks an input");
        refuses(21, 22, &one("y = MaxPool <ceil_mode = 1> (x)"), "it lacks `kernel_shape`");
        refuses(17, 18, &one("y = ReduceMean <axes: ints = []> (x)"), "its list of axes is empty");
        let group = |sizes: &str, node: &str| {
            format!("g (float[{sizes}] x, float[2] s) => (float[{sizes}] y) {{ y = GroupNormalization {node} }}")
        };
        refuses(18, 21, &group("2,6,4", "<num_groups = 2> ()"), "it lacks an input");
        refuses(18, 21, &group("2,c,4", "<num_groups = 2> (x, s, s)"), "its channels are unknown");
        refuses(18, 21, &group("2,6,4", "(x, s, s)"), "it lacks `num_groups`");
        refuses(
            18,
            21,
            &group("2,6,4", "<num_groups = 4> (x, s, s)"),
            "its channels do not fall into `num_groups` groups",
        );
        refuses(
            18,
            21,
            &group("2,6,4", "<num_groups = 0> (x, s, s)"),
            "its channels do not fall into `num_groups` groups",
        );
        refuses(18, 21, &group("2,6,4", "<num_groups = 2> (x, s)"), "it lacks scale or bias");
    }

    #[test]
    fn refuses_nodes_whose_meaning_changed() {
        let pool = |attributes: &str| {
            format!(
                "g (float[1,1,7] x) => (float[1,1,a] y) {{ y = AveragePool <kernel_shape = [3], ceil_mode = 1{attributes}> (x) }}"
            )
        };
        refuses(18, 19, &pool(", count_include_pad = 1"), "`ceil_mode` counts padding differently");
        refuses(
            18,
            19,
            &pool(", strides = [4]"),
            "`ceil_mode` may add windows that begin in the padding, which are ignored now",
        );
        let norm = "g (float[2,3] x, float[3] s) => (float[2,3] y, float[3] m) {
            y, m, v, p, q = BatchNormalization (x, s, s, s, s) }";
        refuses(9, 14, norm, "it hands out the statistics of training");
        let turned = "g (float[1,1,4] x, float[1,1,2] w) => (float[1,1,a] y) { y = ConvTranspose <auto_pad = \"SAME_UPPER\"> (x, w) }";
        refuses(10, 11, turned, "`auto_pad` was not defined precisely before");
        refuses(
            6,
            11,
            "g (float[2] x) => (float[2] y) { y = Neg (x) }",
            "version 6 of the operator set is older than 7",
        );
        let unknown = |body: &str| {
            let graph = format!(
                "<ir_version: 5, opset_import: [\"\": 10, \"custom\": 1]> g (float[2] x, string[2] t) => (float[2] y, string[2] u) {{ {body} }}"
            );
            move |reason: &str| check_refuses_in(&UpgradeOpset, &graph, reason, &to(11))
        };
        unknown("f = custom.F (x) y = Clip <min = 0.5> (f) u = Identity (t)")(
            "the element type of its input is unknown",
        );
        unknown("y = Neg (x) u = Clip <min = 0.5> (t)")("its type is no number");
        unknown("y = Neg (x) u = Pad <pads = [1, 1], value = 0.5> (t)")("its type is no number");
    }

    #[test]
    fn converts_function_bodies_or_nothing() {
        let graph = r#"
            <ir_version: 8, opset_import: ["": 12, "local": 1]>
            g (float[2,3] x) => (float[2] y) { y = local.F (x) }
            <domain: "local", opset_import: ["": 12]>
            F (a) => (b) { b = ReduceSum <axes = [1], keepdims = 0> (a) }"#;
        assert_snapshot!(check_in(&UpgradeOpset, graph, &to(18)), @r#"
        g (float[2,3] x) => (float[2] y) {
            y = local.F (x)  # float[2]
        }

        <
            domain: "local",
            opset_import: ["" : 18]
        >
        F (a) => (b) <
            int64[1] b_axes = {1}
        > {
            b = ReduceSum <keepdims = 0> (a, b_axes)
        }
        "#);
        let referring = graph.replace("F (a)", "F <dims> (a)").replace("axes = [1]", "axes: ints = @dims");
        check_refuses_in(&UpgradeOpset, &referring, "that of the calling node", &to(18));
    }

    #[test]
    fn does_nothing_unless_asked() {
        let mut m = model(&text(11, "g (float[2] x) => (float[2] y) { y = Neg (x) }"));
        assert_eq!(UpgradeOpset.apply(&mut m, &PassContext::default()).unwrap(), Outcome::default());
        assert_eq!(m.opset(), 11);
        assert!(UpgradeOpset.apply(&mut m, &to(99)).is_err());
    }
}

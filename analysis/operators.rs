//! What operators are, in one place: an operator is added by a row here (and its shapes in `shapes/dispatch.rs`).

use lathe_ir::Node;

/// An operator, and what is true of it wherever it stands.
#[derive(Debug, Clone, Copy)]
pub struct Operator {
    /// The domain it is at home in; empty for the standard one.
    pub domain: &'static str,
    /// Its name.
    pub name: &'static str,
    /// The version of its operator set that had it first. ONNX Runtime puts some of its own into the standard domain,
    /// where no version has them.
    pub since: i64,
    /// The versions from 8 on that changed the meaning or form of valid nodes. Versions that only widen types, add
    /// optional inputs or add attributes whose default means what held before are not listed.
    pub changed: &'static [i64],
    traits: u32,
}

/// Something that is true of an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trait {
    /// Each element of the output comes from the elements at its place in the inputs, which broadcast.
    Elementwise,
    /// Elementwise in its first input; any others hold one number each.
    Unary,
    /// No linear map of its data.
    Nonlinear,
    /// Hands its first input on in another layout or type.
    Layout,
    /// Sets mean or size of its data.
    Normalization,
    /// Works on the axes from the attribute `axis` to the last one together, and on each place before them by itself.
    Trailing,
    /// An attention.
    Attention,
    /// A convolution.
    Convolution,
    /// A product of matrices.
    Product,
    /// Mixes what lies along an axis, without weights of its own or with a state.
    Mixing,
    /// Has subgraphs or experts: what is inside may be anything.
    Composite,
    /// May give other results from run to run.
    Random,
    /// Gives a result for every input of its type.
    Total,
    /// Deterministic, but its inputs may not fit one another.
    Partial,
    /// Computes each element of its output once.
    PerElement,
    /// Moves, compares, selects or makes data without floating-point arithmetic.
    Free,
}

impl Operator {
    /// The operator of a node of the standard domain or ONNX Runtime's, whose operators do what standard ones of their
    /// name do; `None` for others and unknown ones.
    pub fn of(node: &Node) -> Option<&'static Operator> {
        Operator::named(if node.is_standard() { STANDARD } else { &node.domain }, &node.op_type)
    }

    /// As [`Operator::of`], by domain and name.
    pub fn named(domain: &str, name: &str) -> Option<&'static Operator> {
        let operator = &OPERATORS[OPERATORS.binary_search_by(|operator| operator.name.cmp(name)).ok()?];
        let known = Operator::is_microsoft(domain) || (matches!(domain, "" | "ai.onnx") && operator.domain.is_empty());
        known.then_some(operator)
    }

    /// Whether a domain is one of ONNX Runtime's own.
    pub fn is_microsoft(domain: &str) -> bool {
        matches!(domain, MICROSOFT | "com.ms.internal.nhwc")
    }

    const fn changed(self, versions: &'static [i64]) -> Operator {
        Operator { changed: versions, ..self }
    }

    /// Whether this is true of the operator.
    pub fn is(&self, wanted: Trait) -> bool {
        self.traits & (1 << wanted as u32) != 0
    }
}

impl Trait {
    /// Whether this is true of the operator of a node; false where the operator is unknown.
    pub fn of(self, node: &Node) -> bool {
        Operator::of(node).is_some_and(|operator| operator.is(self))
    }
}

const STANDARD: &str = "";
const MICROSOFT: &str = "com.microsoft";

const fn row(domain: &'static str, name: &'static str, since: i64, traits: &[Trait]) -> Operator {
    let (mut bits, mut at) = (0, 0);
    while at < traits.len() {
        bits |= 1 << traits[at] as u32;
        at += 1;
    }
    Operator { domain, name, since, changed: &[], traits: bits }
}

use Trait::*;

/// Every standard operator, from the schemas of ONNX 1.23, and those of ONNX Runtime of which something is said here; by
/// name.
pub const OPERATORS: &[Operator] = &[
    row(STANDARD, "Abs", 1, &[Elementwise, Unary, Total, PerElement]),
    row(STANDARD, "Acos", 7, &[Elementwise, Unary, PerElement]),
    row(STANDARD, "Acosh", 9, &[Elementwise, Unary, PerElement]),
    row(STANDARD, "Add", 1, &[Elementwise, Partial, PerElement]),
    row(STANDARD, "AffineGrid", 20, &[]),
    row(STANDARD, "And", 1, &[Elementwise, Partial, Free]),
    row(STANDARD, "ArgMax", 1, &[Free]),
    row(STANDARD, "ArgMin", 1, &[Free]),
    row(STANDARD, "Asin", 7, &[Elementwise, Unary, PerElement]),
    row(STANDARD, "Asinh", 9, &[Elementwise, Unary, PerElement]),
    row(STANDARD, "Atan", 7, &[Elementwise, Unary, PerElement]),
    row(STANDARD, "Atanh", 9, &[Elementwise, Unary, PerElement]),
    row(STANDARD, "Attention", 23, &[Attention]).changed(&[24, 25]),
    row(STANDARD, "AveragePool", 1, &[Mixing]).changed(&[19, 22]),
    row(STANDARD, "BatchNormalization", 1, &[Normalization]).changed(&[9, 14]),
    row(STANDARD, "Bernoulli", 15, &[Random]),
    row(MICROSOFT, "BiasAdd", 1, &[PerElement]),
    row(MICROSOFT, "BiasGelu", 1, &[Elementwise, Nonlinear, PerElement]),
    row(MICROSOFT, "BiasSoftmax", 1, &[Nonlinear]),
    row(STANDARD, "BitCast", 26, &[Free]),
    row(STANDARD, "BitShift", 11, &[Elementwise, Free]),
    row(STANDARD, "BitwiseAnd", 18, &[Elementwise, Free]),
    row(STANDARD, "BitwiseNot", 18, &[Elementwise, Unary, Free]),
    row(STANDARD, "BitwiseOr", 18, &[Elementwise, Free]),
    row(STANDARD, "BitwiseXor", 18, &[Elementwise, Free]),
    row(STANDARD, "BlackmanWindow", 17, &[]),
    row(STANDARD, "Cast", 1, &[Elementwise, Unary, Layout, Partial, Free]),
    row(STANDARD, "CastLike", 15, &[Free]),
    row(STANDARD, "CausalConvWithState", 27, &[]),
    row(STANDARD, "Ceil", 1, &[Elementwise, Unary, Total, PerElement]),
    row(STANDARD, "Celu", 12, &[Elementwise, Unary, Nonlinear, PerElement]),
    row(STANDARD, "CenterCropPad", 18, &[Free]),
    row(STANDARD, "Clip", 1, &[Elementwise, Unary, Nonlinear, Partial, PerElement]).changed(&[11]),
    row(STANDARD, "Col2Im", 18, &[]),
    row(STANDARD, "Compress", 9, &[Free]),
    row(STANDARD, "Concat", 1, &[Partial, Free]),
    row(STANDARD, "ConcatFromSequence", 11, &[Free]),
    row(STANDARD, "Constant", 1, &[Free]),
    row(STANDARD, "ConstantOfShape", 9, &[Free]),
    row(STANDARD, "Conv", 1, &[Convolution, Partial]),
    row(STANDARD, "ConvInteger", 10, &[Convolution]),
    row(STANDARD, "ConvTranspose", 1, &[Convolution]).changed(&[11]),
    row(STANDARD, "Cos", 7, &[Elementwise, Unary, Total, PerElement]),
    row(STANDARD, "Cosh", 9, &[Elementwise, Unary, PerElement]),
    row(STANDARD, "CumProd", 26, &[PerElement]),
    row(STANDARD, "CumSum", 11, &[Mixing, PerElement]),
    row(STANDARD, "DFT", 17, &[Mixing]).changed(&[20]),
    row(MICROSOFT, "DecoderMaskedMultiHeadAttention", 1, &[Attention]),
    row(MICROSOFT, "DecoderMaskedSelfAttention", 1, &[Attention]),
    row(STANDARD, "DeformConv", 19, &[Convolution]),
    row(STANDARD, "DepthToSpace", 1, &[Free]),
    row(STANDARD, "DequantizeLinear", 10, &[Layout, PerElement]),
    row(STANDARD, "Det", 11, &[]),
    row(STANDARD, "Div", 1, &[Elementwise, Partial, PerElement]),
    row(STANDARD, "Dropout", 1, &[Elementwise, Layout, Random, Free]).changed(&[10, 12]),
    row(STANDARD, "DynamicQuantizeLinear", 11, &[PerElement]),
    row(MICROSOFT, "DynamicQuantizeMatMul", 1, &[Product]),
    row(STANDARD, "Einsum", 12, &[Product]),
    row(STANDARD, "Elu", 1, &[Elementwise, Unary, Nonlinear, Total, PerElement]),
    row(STANDARD, "Equal", 1, &[Elementwise, Partial, Free]),
    row(STANDARD, "Erf", 9, &[Elementwise, Unary, Nonlinear, Total, PerElement]),
    row(STANDARD, "Exp", 1, &[Elementwise, Unary, Total, PerElement]),
    row(STANDARD, "Expand", 8, &[Partial, Free]),
    row(STANDARD, "EyeLike", 9, &[Free]),
    row(MICROSOFT, "FastGelu", 1, &[Elementwise, Nonlinear, PerElement]),
    row(STANDARD, "Flatten", 1, &[Layout, Partial, Free]),
    row(STANDARD, "Floor", 1, &[Elementwise, Unary, Total, PerElement]),
    row(MICROSOFT, "FusedConv", 1, &[Convolution]),
    row(MICROSOFT, "FusedGemm", 1, &[Product]),
    row(MICROSOFT, "FusedMatMul", 1, &[Product]),
    row(STANDARD, "GRU", 1, &[Mixing]),
    row(STANDARD, "Gather", 1, &[Partial, Free]),
    row(MICROSOFT, "GatherBlockQuantized", 1, &[Free]),
    row(STANDARD, "GatherElements", 11, &[Free]),
    row(STANDARD, "GatherND", 11, &[Free]),
    row(STANDARD, "Gelu", 20, &[Elementwise, Unary, Nonlinear, PerElement]),
    row(STANDARD, "Gemm", 1, &[Product, Partial]),
    row(MICROSOFT, "GemmFastGelu", 1, &[Nonlinear, Product]),
    row(STANDARD, "GlobalAveragePool", 1, &[]),
    row(STANDARD, "GlobalLpPool", 1, &[]),
    row(STANDARD, "GlobalMaxPool", 1, &[Free]),
    row(STANDARD, "Greater", 1, &[Elementwise, Partial, Free]),
    row(STANDARD, "GreaterOrEqual", 12, &[Elementwise, Partial, Free]),
    row(STANDARD, "GridSample", 16, &[PerElement]).changed(&[20]),
    row(MICROSOFT, "GroupNorm", 1, &[Normalization]),
    row(STANDARD, "GroupNormalization", 18, &[Normalization]).changed(&[21]),
    row(MICROSOFT, "GroupQueryAttention", 1, &[Attention]),
    row(STANDARD, "HammingWindow", 17, &[]),
    row(STANDARD, "HannWindow", 17, &[]),
    row(STANDARD, "HardSigmoid", 1, &[Elementwise, Unary, Nonlinear, PerElement]),
    row(STANDARD, "HardSwish", 14, &[Elementwise, Unary, Nonlinear, PerElement]),
    row(STANDARD, "Hardmax", 1, &[Free]).changed(&[13]),
    row(STANDARD, "Identity", 1, &[Elementwise, Unary, Layout, Total, Free]),
    row(STANDARD, "If", 1, &[Composite]),
    row(STANDARD, "ImageDecoder", 20, &[]),
    row(STANDARD, "InstanceNormalization", 1, &[Normalization]),
    row(STANDARD, "IsInf", 10, &[Elementwise, Unary, Total, Free]),
    row(STANDARD, "IsNaN", 9, &[Elementwise, Unary, Total, Free]),
    row(STANDARD, "LRN", 1, &[]),
    row(STANDARD, "LSTM", 1, &[Mixing]),
    row(STANDARD, "LayerNormalization", 17, &[Normalization, Trailing, Partial]),
    row(STANDARD, "LeakyRelu", 1, &[Elementwise, Unary, Nonlinear, Total, PerElement]),
    row(STANDARD, "Less", 1, &[Elementwise, Partial, Free]),
    row(STANDARD, "LessOrEqual", 12, &[Elementwise, Partial, Free]),
    row(STANDARD, "LinearAttention", 27, &[Attention]),
    row(STANDARD, "Log", 1, &[Elementwise, Unary, Total, PerElement]),
    row(STANDARD, "LogSoftmax", 1, &[Nonlinear]).changed(&[13]),
    row(MICROSOFT, "LongformerAttention", 1, &[Attention]),
    row(STANDARD, "Loop", 1, &[Composite]),
    row(STANDARD, "LpNormalization", 1, &[Normalization, Trailing]),
    row(STANDARD, "LpPool", 1, &[Mixing]).changed(&[22]),
    row(STANDARD, "MatMul", 1, &[Product, Partial]),
    row(MICROSOFT, "MatMulBnb4", 1, &[Product]),
    row(STANDARD, "MatMulInteger", 10, &[Product]),
    row(MICROSOFT, "MatMulIntegerToFloat", 1, &[Product]),
    row(MICROSOFT, "MatMulNBits", 1, &[Product]),
    row(STANDARD, "Max", 1, &[Elementwise, Partial, PerElement]),
    row(STANDARD, "MaxPool", 1, &[Nonlinear, Mixing, Free]).changed(&[22]),
    row(STANDARD, "MaxRoiPool", 1, &[]),
    row(STANDARD, "MaxUnpool", 9, &[Free]),
    row(STANDARD, "Mean", 1, &[Elementwise, PerElement]),
    row(STANDARD, "MeanVarianceNormalization", 9, &[]),
    row(STANDARD, "MelWeightMatrix", 17, &[]),
    row(STANDARD, "Min", 1, &[Elementwise, Partial, PerElement]),
    row(STANDARD, "Mish", 18, &[Elementwise, Unary, Nonlinear, PerElement]),
    row(MICROSOFT, "MoE", 1, &[Composite]),
    row(STANDARD, "Mod", 10, &[Elementwise, Partial, PerElement]),
    row(STANDARD, "Mul", 1, &[Elementwise, Partial, PerElement]),
    row(MICROSOFT, "MultiHeadAttention", 1, &[Attention]),
    row(STANDARD, "Multinomial", 7, &[Random]),
    row(STANDARD, "Neg", 1, &[Elementwise, Unary, Total, PerElement]),
    row(STANDARD, "NegativeLogLikelihoodLoss", 12, &[]),
    row(MICROSOFT, "NhwcConv", 1, &[Convolution]),
    row(MICROSOFT, "NhwcFusedConv", 1, &[Convolution]),
    row(STANDARD, "NonMaxSuppression", 10, &[Free]),
    row(STANDARD, "NonZero", 9, &[Free]),
    row(STANDARD, "Not", 1, &[Elementwise, Unary, Total, Free]),
    row(STANDARD, "OneHot", 9, &[Free]),
    row(STANDARD, "Optional", 15, &[Free]),
    row(STANDARD, "OptionalGetElement", 15, &[Free]),
    row(STANDARD, "OptionalHasElement", 15, &[Free]),
    row(STANDARD, "Or", 1, &[Elementwise, Partial, Free]),
    row(STANDARD, "PRelu", 1, &[Elementwise, Nonlinear, PerElement]),
    row(MICROSOFT, "PackedAttention", 1, &[Attention]),
    row(MICROSOFT, "PackedMultiHeadAttention", 1, &[Attention]),
    row(STANDARD, "Pad", 1, &[Free]).changed(&[11]),
    row(MICROSOFT, "PagedAttention", 1, &[Attention]),
    row(STANDARD, "Pow", 1, &[Elementwise, Partial, PerElement]),
    row(MICROSOFT, "QAttention", 1, &[Attention]),
    row(MICROSOFT, "QGemm", 1, &[Product]),
    row(MICROSOFT, "QLinearAdd", 1, &[PerElement]),
    row(MICROSOFT, "QLinearAveragePool", 1, &[Mixing]),
    row(STANDARD, "QLinearConv", 10, &[Convolution]),
    row(STANDARD, "QLinearMatMul", 10, &[Product]),
    row(MICROSOFT, "QLinearMul", 1, &[PerElement]),
    row(MICROSOFT, "QMoE", 1, &[Composite]),
    row(STANDARD, "QuantizeLinear", 10, &[Layout, PerElement]),
    row(MICROSOFT, "QuickGelu", 1, &[Elementwise, Unary, Nonlinear, PerElement]),
    row(STANDARD, "RMSNormalization", 23, &[Normalization, Trailing]),
    row(STANDARD, "RNN", 1, &[Mixing]),
    row(STANDARD, "RandomNormal", 1, &[Random, Free]),
    row(STANDARD, "RandomNormalLike", 1, &[Random, Free]),
    row(STANDARD, "RandomUniform", 1, &[Random, Free]),
    row(STANDARD, "RandomUniformLike", 1, &[Random, Free]),
    row(STANDARD, "Range", 11, &[Partial, Free]),
    row(STANDARD, "Reciprocal", 1, &[Elementwise, Unary, Total, PerElement]),
    row(STANDARD, "ReduceL1", 1, &[]).changed(&[18]),
    row(STANDARD, "ReduceL2", 1, &[]).changed(&[18]),
    row(STANDARD, "ReduceLogSum", 1, &[]).changed(&[18]),
    row(STANDARD, "ReduceLogSumExp", 1, &[]).changed(&[18]),
    row(STANDARD, "ReduceMax", 1, &[Partial, Free]).changed(&[18]),
    row(STANDARD, "ReduceMean", 1, &[Partial]).changed(&[18]),
    row(STANDARD, "ReduceMin", 1, &[Partial, Free]).changed(&[18]),
    row(STANDARD, "ReduceProd", 1, &[Partial]).changed(&[18]),
    row(STANDARD, "ReduceSum", 1, &[Partial]).changed(&[13]),
    row(STANDARD, "ReduceSumSquare", 1, &[]).changed(&[18]),
    row(STANDARD, "RegexFullMatch", 20, &[]),
    row(STANDARD, "Relu", 1, &[Elementwise, Unary, Nonlinear, Total, PerElement]),
    row(STANDARD, "Reshape", 1, &[Layout, Partial, Free]),
    row(STANDARD, "Resize", 10, &[PerElement]).changed(&[11, 13]),
    row(STANDARD, "ReverseSequence", 10, &[Free]),
    row(STANDARD, "RoiAlign", 10, &[]).changed(&[16]),
    row(STANDARD, "RotaryEmbedding", 23, &[PerElement]),
    row(STANDARD, "Round", 11, &[Elementwise, Unary, Total, PerElement]),
    row(STANDARD, "STFT", 17, &[Mixing]),
    row(STANDARD, "Scan", 8, &[Composite]).changed(&[9]),
    row(STANDARD, "Scatter", 9, &[Free]).changed(&[11]),
    row(STANDARD, "ScatterElements", 11, &[Free]),
    row(STANDARD, "ScatterND", 11, &[Free]),
    row(STANDARD, "Selu", 1, &[Elementwise, Unary, Nonlinear, PerElement]),
    row(STANDARD, "SequenceAt", 11, &[Free]),
    row(STANDARD, "SequenceConstruct", 11, &[Free]),
    row(STANDARD, "SequenceEmpty", 11, &[Free]),
    row(STANDARD, "SequenceErase", 11, &[Free]),
    row(STANDARD, "SequenceInsert", 11, &[Free]),
    row(STANDARD, "SequenceLength", 11, &[Free]),
    row(STANDARD, "SequenceMap", 17, &[]),
    row(STANDARD, "Shape", 1, &[Total, Free]),
    row(STANDARD, "Shrink", 9, &[Elementwise, Unary, PerElement]),
    row(STANDARD, "Sigmoid", 1, &[Elementwise, Unary, Nonlinear, Total, PerElement]),
    row(STANDARD, "Sign", 9, &[Elementwise, Unary, Total, PerElement]),
    row(STANDARD, "SimplifiedLayerNormalization", i64::MAX, &[Normalization, Trailing]),
    row(STANDARD, "Sin", 7, &[Elementwise, Unary, Total, PerElement]),
    row(STANDARD, "Sinh", 9, &[Elementwise, Unary, PerElement]),
    row(STANDARD, "Size", 1, &[Total, Free]),
    row(STANDARD, "Slice", 1, &[Partial, Free]).changed(&[10]),
    row(STANDARD, "Softmax", 1, &[Nonlinear, Partial]).changed(&[13]),
    row(STANDARD, "SoftmaxCrossEntropyLoss", 12, &[]),
    row(STANDARD, "Softplus", 1, &[Elementwise, Unary, Nonlinear, Total, PerElement]),
    row(STANDARD, "Softsign", 1, &[Elementwise, Unary, PerElement]),
    row(STANDARD, "SpaceToDepth", 1, &[Free]),
    row(MICROSOFT, "SparseAttention", 1, &[Attention]),
    row(STANDARD, "Split", 1, &[Partial, Free]).changed(&[13, 18]),
    row(STANDARD, "SplitToSequence", 11, &[Free]),
    row(STANDARD, "Sqrt", 1, &[Elementwise, Unary, Total, PerElement]),
    row(STANDARD, "Squeeze", 1, &[Layout, Partial, Free]).changed(&[13]),
    row(STANDARD, "StringConcat", 20, &[]),
    row(STANDARD, "StringNormalizer", 10, &[]),
    row(STANDARD, "StringSplit", 20, &[]),
    row(STANDARD, "Sub", 1, &[Elementwise, Partial, PerElement]),
    row(STANDARD, "Sum", 1, &[Elementwise, PerElement]),
    row(STANDARD, "SwiGLU", 28, &[PerElement]),
    row(STANDARD, "Swish", 24, &[Elementwise, Unary, Nonlinear, PerElement]),
    row(STANDARD, "Tan", 7, &[Elementwise, Unary, PerElement]),
    row(STANDARD, "Tanh", 1, &[Elementwise, Unary, Nonlinear, Total, PerElement]),
    row(STANDARD, "TensorScatter", 24, &[Free]),
    row(STANDARD, "TfIdfVectorizer", 9, &[]),
    row(STANDARD, "ThresholdedRelu", 10, &[Elementwise, Unary, PerElement]),
    row(STANDARD, "Tile", 1, &[Free]),
    row(STANDARD, "TopK", 1, &[Free]).changed(&[10]),
    row(STANDARD, "Transpose", 1, &[Layout, Total, Free]),
    row(MICROSOFT, "TransposeMatMul", 1, &[Product]),
    row(STANDARD, "Trilu", 14, &[Free]),
    row(STANDARD, "Unique", 11, &[Free]),
    row(STANDARD, "Unsqueeze", 1, &[Layout, Partial, Free]).changed(&[13]),
    row(STANDARD, "Upsample", 1, &[PerElement]).changed(&[9, 10]),
    row(STANDARD, "Where", 9, &[Elementwise, Partial, Free]),
    row(STANDARD, "Xor", 1, &[Elementwise, Partial, Free]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_each_operator_has_one_row() {
        let changes_follow = |operator: &Operator| operator.changed.iter().all(|&version| version > operator.since);
        assert!(OPERATORS.iter().all(changes_follow));
        assert!(OPERATORS.windows(2).all(|pair| pair[0].name < pair[1].name));
        assert!(OPERATORS.iter().all(|operator| operator.since >= 1));
    }

    #[test]
    fn traits_do_not_contradict_one_another() {
        for operator in OPERATORS {
            let name = operator.name;
            assert!(!operator.is(Unary) || operator.is(Elementwise), "{name} is unary but not elementwise");
            assert!(!operator.is(PerElement) || !operator.is(Free), "{name} computes elements for free");
            assert!(!operator.is(Total) || !operator.is(Partial), "{name} is total and partial");
            assert!(!operator.is(Random) || !operator.is(Total), "{name} is random, and may not move");
        }
    }

    #[test]
    fn an_operator_is_known_by_its_domain() {
        let gelu = Node::new("Gelu");
        assert!(Elementwise.of(&gelu) && Elementwise.of(&gelu.clone().in_domain(MICROSOFT)));
        assert!(!Elementwise.of(&gelu.in_domain("elsewhere")));
        assert!(!Elementwise.of(&Node::new("BiasGelu")) && Elementwise.of(&Node::new("BiasGelu").in_domain(MICROSOFT)));
        assert!(Operator::of(&Node::new("Strange")).is_none());
        assert_eq!(Operator::of(&Node::new("Gelu")).map(|operator| operator.since), Some(20));
    }
}

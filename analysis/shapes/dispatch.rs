//! Which rule an operator has.

use super::{
    contrib, convolution, elementwise, generators, indexing, layout, linear, ml, neural,
    node::{Cx, Out},
    quantized, recurrent, reduce, resample, sequences, signal, slicing,
};
use lathe_ir::DataType;

/// The outputs of a node without subgraphs; `None` if its operator is not known or its form is not.
pub(super) fn infer(cx: &Cx) -> Option<Vec<Out>> {
    match cx.node.domain.as_str() {
        "" | "ai.onnx" => standard(cx),
        "com.microsoft" => contrib::infer(cx),
        "ai.onnx.ml" => ml::infer(cx),
        "ai.onnx.preview.training" => Some(neural::optimizer(cx)),
        _ => None,
    }
}

fn standard(cx: &Cx) -> Option<Vec<Out>> {
    let elem = cx.elem(0);
    Some(match cx.node.op_type.as_str() {
        "Acos"
        | "Acosh"
        | "Asin"
        | "Asinh"
        | "Atan"
        | "Atanh"
        | "BitwiseNot"
        | "Celu"
        | "Cos"
        | "Cosh"
        | "CumProd"
        | "CumSum"
        | "Elu"
        | "Erf"
        | "Exp"
        | "Gelu"
        | "GroupNormalization"
        | "HardSigmoid"
        | "HardSwish"
        | "Hardmax"
        | "InstanceNormalization"
        | "LRN"
        | "LeakyRelu"
        | "Log"
        | "LogSoftmax"
        | "LpNormalization"
        | "MeanVarianceNormalization"
        | "Mish"
        | "RMSNormalization"
        | "Reciprocal"
        | "ReverseSequence"
        | "RotaryEmbedding"
        | "Scatter"
        | "Selu"
        | "Shrink"
        | "Sigmoid"
        | "Sin"
        | "Sinh"
        | "Softmax"
        | "Softplus"
        | "Softsign"
        | "Sqrt"
        | "Swish"
        | "Tan"
        | "Tanh"
        | "TensorScatter"
        | "ThresholdedRelu"
        | "Trilu" => elementwise::same(cx, 0),
        "PRelu" => elementwise::led_by_data(cx),
        "Abs" | "Ceil" | "Floor" | "Neg" | "Relu" | "Round" | "Sign" => elementwise::unary(cx),
        "Add" | "Sub" | "Mul" | "Div" | "Mod" => elementwise::arithmetic(cx),
        "Pow" | "BitShift" | "BitwiseAnd" | "BitwiseOr" | "BitwiseXor" => elementwise::led_by_first(cx),
        "Max" | "Min" | "Mean" | "Sum" => elementwise::variadic(cx),
        "And" | "Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "Not" | "Or" | "Xor" => {
            elementwise::logic(cx)
        }
        "IsInf" | "IsNaN" | "RegexFullMatch" => elementwise::same_shape(cx, 0, Some(DataType::Bool)),
        "Where" => elementwise::choice(cx),
        "Cast" if cx.opset >= 6 => elementwise::cast(cx, cx.dtype("to", None)),
        "Cast" => {
            let to = DataType::from_name(&cx.string("to", "")?.to_lowercase());
            elementwise::cast(cx, to)
        }
        "CastLike" => elementwise::cast(cx, cx.elem(1)),
        "BitCast" => return elementwise::bit_cast(cx),
        "Clip" => elementwise::clip(cx),
        "Dropout" => elementwise::dropout(cx),
        "Identity" => elementwise::identity(cx),
        "StringConcat" => elementwise::led_by_first(cx),

        "Reshape" => return layout::reshape(cx),
        "Flatten" => return layout::flatten_axes(cx),
        "Transpose" => return layout::transpose(cx),
        "Squeeze" => return layout::squeeze(cx),
        "Unsqueeze" => return layout::unsqueeze(cx),
        "Concat" => return layout::concat(cx),
        "Split" => return layout::split(cx),
        "Expand" => return layout::expand(cx),
        "Tile" => return layout::tile(cx),
        "Pad" => return layout::pad(cx),
        "DepthToSpace" => return layout::depth_to_space(cx),
        "SpaceToDepth" => return layout::space_to_depth(cx),
        "CenterCropPad" => return layout::center_crop_pad(cx),
        "Shape" => return layout::shape_of(cx),
        "Size" => layout::size_of(cx),
        "Slice" => return slicing::infer(cx),

        "Gather" => return indexing::gather(cx),
        "GatherElements" => indexing::gather_elements(cx),
        "GatherND" => return indexing::gather_nd(cx),
        "ScatterElements" => return indexing::scatter_elements(cx),
        "ScatterND" => return indexing::scatter_nd(cx),
        "Compress" => return indexing::compress(cx),
        "NonZero" => indexing::non_zero(cx),
        "OneHot" => return indexing::one_hot(cx),
        "TopK" => return indexing::top_k(cx),
        "Unique" => return indexing::unique(cx),
        "ArgMax" | "ArgMin" => return indexing::arg_extreme(cx),

        "ReduceL1" | "ReduceL2" | "ReduceLogSum" | "ReduceLogSumExp" | "ReduceMax" | "ReduceMean" | "ReduceMin"
        | "ReduceProd" | "ReduceSum" | "ReduceSumSquare" => return reduce::infer(cx),

        "MatMul" => linear::matmul(cx, 0, 1, elem.or(cx.elem(1))),
        "MatMulInteger" => linear::matmul(cx, 0, 1, Some(DataType::Int32)),
        "Gemm" => return linear::gemm(cx),
        "Einsum" => return linear::einsum(cx),

        "Conv" => return convolution::conv(cx, 1, elem),
        "ConvInteger" => return convolution::conv(cx, 1, Some(DataType::Int32)),
        "ConvTranspose" => return convolution::conv_transpose(cx),
        "DeformConv" => return convolution::deform_conv(cx),
        "AveragePool" | "LpPool" | "MaxPool" => return convolution::pool(cx, elem),
        "GlobalAveragePool" | "GlobalLpPool" | "GlobalMaxPool" => convolution::global_pool(cx),
        "MaxUnpool" => return convolution::max_unpool(cx),
        "Col2Im" => return convolution::col2im(cx),

        "BatchNormalization" => neural::batch_norm(cx),
        "LayerNormalization" | "SimplifiedLayerNormalization" => return neural::layer_norm(cx),
        "Attention" => return neural::attention(cx),
        "CausalConvWithState" => neural::causal_conv(cx),
        "LinearAttention" => return neural::linear_attention(cx),
        "NegativeLogLikelihoodLoss" | "SoftmaxCrossEntropyLoss" => return neural::loss(cx),
        "AffineGrid" => neural::affine_grid(cx),
        "GridSample" => neural::grid_sample(cx),
        "NonMaxSuppression" => neural::non_max_suppression(),
        "RoiAlign" | "MaxRoiPool" => return neural::roi(cx),
        "Det" => neural::det(cx),
        "GRU" | "LSTM" | "RNN" => return recurrent::infer(cx),

        "Resize" => return resample::resize(cx),
        "Upsample" => return resample::upsample(cx),

        "Constant" => return generators::constant_node(cx),
        "ConstantOfShape" => return generators::constant_of_shape(cx),
        "Range" => return generators::range(cx),
        "Bernoulli" | "EyeLike" | "RandomNormalLike" | "RandomUniformLike" => return generators::like(cx),
        "RandomNormal" | "RandomUniform" => return generators::random(cx),
        "Multinomial" => return generators::multinomial(cx),

        "QuantizeLinear" => return quantized::quantize(cx),
        "DequantizeLinear" => return quantized::dequantize(cx),
        "DynamicQuantizeLinear" => quantized::dynamic_quantize(cx),
        "QLinearMatMul" => quantized::matmul(cx),
        "QLinearConv" => return quantized::conv(cx),

        "SequenceEmpty" => sequences::empty(cx),
        "SequenceConstruct" => return sequences::construct(cx),
        "SequenceInsert" => sequences::insert(cx),
        "SequenceErase" => sequences::erase(cx),
        "SequenceAt" => sequences::at(cx),
        "SequenceLength" => vec![Out::scalar(DataType::Int64)],
        "SplitToSequence" => return sequences::split(cx),
        "ConcatFromSequence" => return sequences::concat(cx),
        "Optional" => return sequences::optional(cx),
        "OptionalGetElement" => sequences::optional_get(cx),
        "OptionalHasElement" => sequences::optional_has(cx),

        "DFT" => return signal::dft(cx),
        "STFT" => return signal::stft(cx),
        "BlackmanWindow" | "HammingWindow" | "HannWindow" => return signal::window(cx),
        "MelWeightMatrix" => return signal::mel_weights(cx),
        "StringSplit" => signal::string_split(cx),
        "StringNormalizer" => signal::string_normalizer(cx),
        "TfIdfVectorizer" => return signal::tf_idf(cx),
        "ImageDecoder" => return signal::image(cx),

        // ONNX Runtime keeps some of its own operators in the standard domain.
        "FusedConv" => return convolution::conv(cx, 1, elem),
        _ => return None,
    })
}

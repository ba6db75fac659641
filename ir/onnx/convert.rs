//! Between protobuf messages and the model's own types, both ways.

use super::{
    external::ExternalFiles,
    proto::{self, StringStringEntryProto as Entry, TensorProto},
    read_error::ReadError,
};
use crate::{
    DataType, DeviceConfiguration, Dim, Metadata, Placement, Port, Shape, ShardedDim, Sharding, SparseTensor, Tensor,
    TensorError, Type, TypeKind, mapping::Mapping, tensor::element_count,
};
use bytes::Bytes;
use std::sync::Arc;

/// Where tensor bytes may lie.
pub(super) struct TensorSource<'a> {
    pub(super) mapping: Option<&'a Arc<Mapping>>,
    pub(super) external: &'a mut ExternalFiles,
}

pub(super) fn metadata(entries: Vec<Entry>) -> Metadata {
    entries.into_iter().map(|e| (e.key.unwrap_or_default(), e.value.unwrap_or_default())).collect()
}

pub(super) fn entries(metadata: &[(String, String)]) -> Vec<Entry> {
    metadata.iter().map(|(k, v)| Entry { key: Some(k.clone()), value: Some(v.clone()) }).collect()
}

pub(super) fn opsets(imports: Vec<proto::OperatorSetIdProto>) -> Vec<(String, i64)> {
    imports.into_iter().map(|o| (o.domain.unwrap_or_default(), o.version.unwrap_or_default())).collect()
}

pub(super) fn imports(opsets: &[(String, i64)]) -> Vec<proto::OperatorSetIdProto> {
    opsets.iter().map(|(d, v)| proto::OperatorSetIdProto { domain: text(d), version: Some(*v) }).collect()
}

/// `None` for an empty string: absent and empty mean the same in ONNX.
pub(super) fn text(string: &str) -> Option<String> {
    (!string.is_empty()).then(|| string.to_owned())
}

pub(super) fn configuration(file: proto::DeviceConfigurationProto) -> DeviceConfiguration {
    DeviceConfiguration { name: file.name.unwrap_or_default(), count: file.num_devices, devices: file.device }
}

pub(super) fn configuration_proto(configuration: &DeviceConfiguration) -> proto::DeviceConfigurationProto {
    proto::DeviceConfigurationProto {
        name: Some(configuration.name.clone()),
        num_devices: configuration.count,
        device: configuration.devices.clone(),
    }
}

pub(super) fn placement(file: proto::NodeDeviceConfigurationProto, inputs: &[String], outputs: &[String]) -> Placement {
    let port = |name: String| {
        let at = |names: &[String]| names.iter().position(|n| *n == name);
        match (at(inputs), at(outputs)) {
            (Some(index), _) => Port::Input(index),
            (None, Some(index)) => Port::Output(index),
            (None, None) => Port::Named(name),
        }
    };
    let shard = |s: proto::SimpleShardedDimProto| {
        let dim = match s.dim {
            Some(proto::SimpleShardedDimProtoDim::Value(size)) => Dim::Known(size),
            Some(proto::SimpleShardedDimProtoDim::Param(name)) => Dim::Symbol(name),
            None => Dim::Unknown,
        };
        (dim, s.num_shards)
    };
    let sharding = file.sharding_spec.into_iter().map(|s| Sharding {
        port: port(s.tensor_name.unwrap_or_default()),
        devices: s.device,
        groups: s.index_to_device_group_map.into_iter().map(|g| (g.key.unwrap_or_default(), g.value)).collect(),
        dims: s
            .sharded_dim
            .into_iter()
            .map(|d| ShardedDim {
                axis: d.axis.unwrap_or_default(),
                shards: d.simple_sharding.into_iter().map(shard).collect(),
            })
            .collect(),
    });
    let sharding = sharding.collect();
    Placement { configuration: file.configuration_id.unwrap_or_default(), sharding, stage: file.pipeline_stage }
}

pub(super) fn placement_proto(
    placement: &Placement,
    inputs: &[String],
    outputs: &[String],
) -> proto::NodeDeviceConfigurationProto {
    let name = |port: &Port| match port {
        Port::Input(index) => inputs.get(*index).cloned(),
        Port::Output(index) => outputs.get(*index).cloned(),
        Port::Named(name) => Some(name.clone()),
    };
    let shard = |(dim, count): &(Dim, Option<i64>)| proto::SimpleShardedDimProto {
        dim: match dim {
            Dim::Known(size) => Some(proto::SimpleShardedDimProtoDim::Value(*size)),
            Dim::Symbol(name) => Some(proto::SimpleShardedDimProtoDim::Param(name.clone())),
            Dim::Unknown => None,
        },
        num_shards: *count,
    };
    let spec = |s: &Sharding| proto::ShardingSpecProto {
        tensor_name: name(&s.port),
        device: s.devices.clone(),
        index_to_device_group_map: s
            .groups
            .iter()
            .map(|(key, value)| proto::IntIntListEntryProto { key: Some(*key), value: value.clone() })
            .collect(),
        sharded_dim: s
            .dims
            .iter()
            .map(|d| proto::ShardedDimProto {
                axis: Some(d.axis),
                simple_sharding: d.shards.iter().map(shard).collect(),
            })
            .collect(),
    };
    proto::NodeDeviceConfigurationProto {
        configuration_id: Some(placement.configuration.clone()),
        sharding_spec: placement.sharding.iter().map(spec).collect(),
        pipeline_stage: placement.stage,
    }
}

/// The type that `file` states for the value or attribute `name`.
pub(super) fn ty(file: proto::TypeProto, name: &str) -> Result<Type, ReadError> {
    let elem = |code: Option<i32>| match code.unwrap_or(0) {
        0 => Ok(None),
        code => match DataType::from_code(code) {
            Some(elem) => Ok(Some(elem)),
            None => Err(ReadError::ValueElementType { value: name.to_owned(), code }),
        },
    };
    let inner = |t: Option<Box<proto::TypeProto>>| match t {
        Some(t) => ty(*t, name).map(Box::new),
        None => Ok(Box::new(TypeKind::Unstated.into())),
    };
    let kind = match file.value {
        None => TypeKind::Unstated,
        Some(proto::TypeProtoValue::Tensor(t)) => {
            TypeKind::Tensor { elem: elem(t.elem_type)?, shape: t.shape.map(shape) }
        }
        Some(proto::TypeProtoValue::SparseTensor(t)) => {
            TypeKind::SparseTensor { elem: elem(t.elem_type)?, shape: t.shape.map(shape) }
        }
        Some(proto::TypeProtoValue::Sequence(s)) => TypeKind::Sequence(inner(s.elem_type)?),
        Some(proto::TypeProtoValue::Optional(o)) => TypeKind::Optional(inner(o.elem_type)?),
        Some(proto::TypeProtoValue::Map(m)) => {
            let code = m.key_type.unwrap_or(0);
            let key = DataType::from_code(code)
                .ok_or_else(|| ReadError::ValueElementType { value: name.to_owned(), code })?;
            TypeKind::Map { key, value: inner(m.value_type)? }
        }
        Some(proto::TypeProtoValue::Opaque(o)) => {
            TypeKind::Opaque { domain: o.domain.unwrap_or_default(), name: o.name.unwrap_or_default() }
        }
    };
    Ok(Type { kind, denotation: file.denotation.unwrap_or_default() })
}

fn shape(file: proto::TensorShapeProto) -> Shape {
    let mut shape = Shape::default();
    let mut any = false;
    for dim in file.dim {
        any |= dim.denotation.is_some();
        shape.denotations.push(dim.denotation.unwrap_or_default());
        shape.dims.push(match dim.value {
            // A negative size is how some exporters write "unknown".
            Some(proto::DimensionValue::Value(size)) if size >= 0 => Dim::Known(size),
            Some(proto::DimensionValue::Param(name)) if !name.is_empty() => Dim::Symbol(name),
            _ => Dim::Unknown,
        });
    }
    if !any {
        shape.denotations.clear();
    }
    shape
}

pub(super) fn type_proto(ty: &Type) -> proto::TypeProto {
    let tensor = |elem: &Option<DataType>, shape: &Option<Shape>| proto::TypeTensor {
        elem_type: elem.map(DataType::code),
        shape: shape.as_ref().map(shape_proto),
    };
    let inner = |t: &Type| Some(Box::new(type_proto(t)));
    let value = match &ty.kind {
        TypeKind::Unstated => None,
        TypeKind::Tensor { elem, shape } => Some(proto::TypeProtoValue::Tensor(tensor(elem, shape))),
        TypeKind::SparseTensor { elem, shape } => Some(proto::TypeProtoValue::SparseTensor(tensor(elem, shape))),
        TypeKind::Sequence(t) => Some(proto::TypeProtoValue::Sequence(proto::TypeSequence { elem_type: inner(t) })),
        TypeKind::Optional(t) => Some(proto::TypeProtoValue::Optional(proto::TypeOptional { elem_type: inner(t) })),
        TypeKind::Map { key, value } => {
            Some(proto::TypeProtoValue::Map(proto::TypeMap { key_type: Some(key.code()), value_type: inner(value) }))
        }
        TypeKind::Opaque { domain, name } => {
            Some(proto::TypeProtoValue::Opaque(proto::TypeOpaque { domain: text(domain), name: text(name) }))
        }
    };
    proto::TypeProto { value, denotation: text(&ty.denotation) }
}

fn shape_proto(shape: &Shape) -> proto::TensorShapeProto {
    let dim = |(index, dim): (usize, &Dim)| proto::Dimension {
        value: match dim {
            Dim::Known(size) => Some(proto::DimensionValue::Value(*size)),
            Dim::Symbol(name) => Some(proto::DimensionValue::Param(name.clone())),
            Dim::Unknown => None,
        },
        denotation: shape.denotations.get(index).and_then(|d| text(d)),
    };
    proto::TensorShapeProto { dim: shape.dims.iter().enumerate().map(dim).collect() }
}

pub(super) fn dims(dims: &[i64]) -> Result<Vec<usize>, TensorError> {
    dims.iter().map(|&d| usize::try_from(d).map_err(|_| TensorError::Negative { dims: dims.to_vec() })).collect()
}

/// The tensor in `file`, borrowed from the mapped model or its external file where the data is stored raw.
pub(super) fn tensor(file: TensorProto, source: TensorSource<'_>) -> Result<Tensor, ReadError> {
    let label = file.name().to_owned();
    let failed = |source| ReadError::Tensor { tensor: label.clone(), source };
    let dims = dims(&file.dims).map_err(failed)?;
    let code = file.data_type();
    let Some(dtype) = DataType::from_code(code) else {
        return Err(ReadError::ElementType { tensor: label, code });
    };
    if file.segment.is_some() {
        return Err(ReadError::Segment { tensor: label });
    }
    let mut tensor = if dtype == DataType::String {
        Tensor::strings(dims, file.string_data).map_err(failed)?
    } else if file.data_location() == 1 {
        let overflow = || failed(TensorError::Overflow { dims: file.dims.clone() });
        let count = element_count(&dims).ok_or_else(overflow)?;
        let expected = dtype.byte_len(count).ok_or_else(overflow)?;
        let data = source.external.data(&file, expected);
        let (bytes, mapping) = data.map_err(|source| ReadError::External { tensor: label.clone(), source })?;
        Tensor::mapped(dtype, dims, bytes, Some(&mapping)).map_err(failed)?
    } else if let Some(raw) = file.raw_data {
        Tensor::mapped(dtype, dims, raw, source.mapping).map_err(failed)?
    } else {
        let packed = from_typed_fields(dtype, &file);
        let mut tensor = Tensor::mapped(dtype, dims, packed, None).map_err(failed)?;
        tensor.typed = true;
        tensor
    };
    tensor.doc = file.doc_string.unwrap_or_default();
    tensor.metadata = metadata(file.metadata_props);
    Ok(tensor)
}

/// Packed little-endian bytes from the typed fields; each entry holds as many bytes as one element or one packed byte.
fn from_typed_fields(dtype: DataType, file: &TensorProto) -> Bytes {
    fn pack<T: Copy, const N: usize>(values: &[T], to: impl Fn(T) -> [u8; N]) -> Vec<u8> {
        values.iter().flat_map(|&v| to(v)).collect()
    }
    let packed = match dtype {
        DataType::Float | DataType::Complex64 => pack(&file.float_data, f32::to_le_bytes),
        DataType::Double | DataType::Complex128 => pack(&file.double_data, f64::to_le_bytes),
        DataType::Int64 => pack(&file.int64_data, i64::to_le_bytes),
        DataType::Uint64 => pack(&file.uint64_data, u64::to_le_bytes),
        DataType::Uint32 => pack(&file.uint64_data, |v| (v as u32).to_le_bytes()),
        DataType::Int32 => pack(&file.int32_data, i32::to_le_bytes),
        DataType::Int16 | DataType::Uint16 | DataType::Float16 | DataType::Bfloat16 => {
            pack(&file.int32_data, |v| (v as u16).to_le_bytes())
        }
        _ => pack(&file.int32_data, |v| [v as u8]),
    };
    packed.into()
}

/// A message with everything of `tensor` but raw data, which the writer streams.
pub(super) fn tensor_header(name: &str, tensor: &Tensor) -> TensorProto {
    let mut file = TensorProto {
        dims: tensor.dims().iter().map(|&d| d as i64).collect(),
        data_type: Some(tensor.dtype().code()),
        name: text(name),
        doc_string: text(&tensor.doc),
        metadata_props: entries(&tensor.metadata),
        ..Default::default()
    };
    match tensor.string_data() {
        Some(strings) => file.string_data = strings.to_vec(),
        None if tensor.typed => to_typed_fields(tensor, &mut file),
        None => {}
    }
    file
}

/// Whether [`tensor_header`] leaves the data of `tensor` to be written as raw bytes.
pub(super) fn is_raw(tensor: &Tensor) -> bool {
    tensor.string_data().is_none() && !tensor.typed
}

/// A complete message.
pub(super) fn tensor_proto(name: &str, tensor: &Tensor) -> TensorProto {
    let mut file = tensor_header(name, tensor);
    if is_raw(tensor) {
        file.raw_data = Some(tensor.shared_bytes());
    }
    file
}

fn to_typed_fields(tensor: &Tensor, file: &mut TensorProto) {
    fn unpack<T, const N: usize>(bytes: &[u8], from: impl Fn([u8; N]) -> T) -> Vec<T> {
        bytes.as_chunks::<N>().0.iter().map(|&chunk| from(chunk)).collect()
    }
    let bytes = tensor.bytes();
    match tensor.dtype() {
        DataType::Float | DataType::Complex64 => file.float_data = unpack(bytes, f32::from_le_bytes),
        DataType::Double | DataType::Complex128 => file.double_data = unpack(bytes, f64::from_le_bytes),
        DataType::Int64 => file.int64_data = unpack(bytes, i64::from_le_bytes),
        DataType::Uint64 => file.uint64_data = unpack(bytes, u64::from_le_bytes),
        DataType::Uint32 => file.uint64_data = unpack(bytes, |b| u32::from_le_bytes(b).into()),
        DataType::Int32 => file.int32_data = unpack(bytes, i32::from_le_bytes),
        DataType::Int16 => file.int32_data = unpack(bytes, |b| i16::from_le_bytes(b).into()),
        DataType::Uint16 | DataType::Float16 | DataType::Bfloat16 => {
            file.int32_data = unpack(bytes, |b| u16::from_le_bytes(b).into())
        }
        DataType::Int8 => file.int32_data = unpack(bytes, |b| i8::from_le_bytes(b).into()),
        _ => file.int32_data = unpack(bytes, |[b]: [u8; 1]| b.into()),
    }
}

pub(super) fn sparse_proto(name: &str, sparse: &SparseTensor) -> proto::SparseTensorProto {
    proto::SparseTensorProto {
        values: Some(tensor_proto(name, &sparse.values)),
        indices: Some(tensor_proto("", &sparse.indices)),
        dims: sparse.dims.iter().map(|&d| d as i64).collect(),
    }
}

/// The stated kind of an attribute, or the one its fields imply: old exporters state none.
pub(super) fn attribute_kind(file: &proto::AttributeProto) -> i32 {
    match file.r#type() {
        0 if file.f.is_some() => 1,
        0 if file.i.is_some() => 2,
        0 if file.s.is_some() => 3,
        0 if file.t.is_some() => 4,
        0 if file.g.is_some() => 5,
        0 if !file.floats.is_empty() => 6,
        0 if !file.strings.is_empty() => 8,
        0 if !file.tensors.is_empty() => 9,
        0 if !file.graphs.is_empty() => 10,
        0 if file.sparse_tensor.is_some() => 11,
        0 if !file.sparse_tensors.is_empty() => 12,
        0 if file.tp.is_some() => 13,
        0 if !file.type_protos.is_empty() => 14,
        0 => 7,
        kind => kind,
    }
}

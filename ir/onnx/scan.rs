//! Finds fields that no message of ours has, so that none is dropped in silence.

use super::proto::{MODEL, SCHEMAS};

/// Messages nested deeper than this are left to the decoder, which refuses them.
const DEPTH: usize = 110;

/// The first unknown field of an encoded model: message and field number. Malformed input ends the scan; the decoder
/// that follows reports it.
pub(super) fn unknown_field(bytes: &[u8]) -> Option<(&'static str, u32)> {
    scan(bytes, MODEL, 0)
}

fn scan(mut bytes: &[u8], schema: usize, depth: usize) -> Option<(&'static str, u32)> {
    if depth > DEPTH {
        return None;
    }
    let schema = &SCHEMAS[schema];
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let number = u32::try_from(key >> 3).ok()?;
        let Some((_, nested)) = schema.fields.iter().find(|(field, _)| *field == number) else {
            return Some((schema.name, number));
        };
        match key & 7 {
            0 => _ = varint(&mut bytes)?,
            1 => bytes = bytes.get(8..)?,
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                let (body, rest) = bytes.split_at_checked(length)?;
                if let Some(unknown) = nested.and_then(|nested| scan(body, nested, depth + 1)) {
                    return Some(unknown);
                }
                bytes = rest;
            }
            5 => bytes = bytes.get(4..)?,
            _ => return None,
        }
    }
    None
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_an_unknown_field_of_a_nested_message() {
        // ModelProto.graph (7) holds GraphProto.node (1) holds field 27.
        let bytes = [0x3a, 0x05, 0x0a, 0x03, 0xd8, 0x01, 0x05];
        assert_eq!(unknown_field(&bytes), Some(("NodeProto", 27)));
    }

    #[test]
    fn accepts_known_fields() {
        assert_eq!(unknown_field(&[0x08, 0x0a, 0x12, 0x01, b'x']), None);
    }
}

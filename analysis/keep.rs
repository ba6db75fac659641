//! Results that are kept by what they depend on, without knowing where.

use serde::{Serialize, de::DeserializeOwned};

/// Keeps results between runs. What cannot be kept or read is computed again.
pub trait Keep: Sync {
    /// What was kept of this kind under a key.
    fn get(&self, kind: &str, key: &[u8; 32]) -> Option<Vec<u8>>;

    /// Keeps a result.
    fn put(&self, kind: &str, key: &[u8; 32], bytes: &[u8]);
}

/// A key of everything that a result depends on: names, numbers and bytes, each with its length.
#[derive(Debug, Clone, Default)]
pub struct KeyBuilder(blake3::Hasher);

impl KeyBuilder {
    /// A key of nothing yet.
    pub fn new() -> KeyBuilder {
        KeyBuilder::default()
    }

    /// The result depends on these bytes.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> KeyBuilder {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// The result depends on this text.
    #[must_use]
    pub fn text(self, text: &str) -> KeyBuilder {
        self.bytes(text.as_bytes())
    }

    /// The result depends on the bits of these numbers.
    #[must_use]
    pub fn numbers(mut self, numbers: &[f64]) -> KeyBuilder {
        self.0.update(&(numbers.len() as u64).to_le_bytes());
        let mut bytes = Vec::with_capacity(1 << 16);
        for part in numbers.chunks(1 << 13) {
            bytes.clear();
            bytes.extend(part.iter().flat_map(|x| x.to_le_bytes()));
            self.0.update(&bytes);
        }
        self
    }

    /// The result depends on this value.
    #[must_use]
    pub fn value(self, value: &impl Serialize) -> KeyBuilder {
        let bytes = postcard::to_stdvec(value).expect("plain values can be written to memory");
        self.bytes(&bytes)
    }

    /// The key.
    pub fn finish(&self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}

/// What was kept under the key, or else what `compute` gives, which is kept then. Errors are not kept.
pub fn kept_or<T: Serialize + DeserializeOwned, E>(
    keep: Option<&dyn Keep>,
    kind: &str,
    key: &KeyBuilder,
    compute: impl FnOnce() -> Result<T, E>,
) -> Result<T, E> {
    let Some(keep) = keep else { return compute() };
    let key = key.finish();
    let kept = keep.get(kind, &key).and_then(|bytes| postcard::from_bytes(&bytes).ok());
    if let Some(kept) = kept {
        return Ok(kept);
    }
    let value = compute()?;
    if let Ok(bytes) = postcard::to_stdvec(&value) {
        keep.put(kind, &key, &bytes);
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeMap, sync::Mutex};

    type Results = BTreeMap<(String, [u8; 32]), Vec<u8>>;

    #[derive(Default)]
    struct InMemory(Mutex<Results>);

    impl Keep for InMemory {
        fn get(&self, kind: &str, key: &[u8; 32]) -> Option<Vec<u8>> {
            self.0.lock().unwrap().get(&(kind.to_owned(), *key)).cloned()
        }

        fn put(&self, kind: &str, key: &[u8; 32], bytes: &[u8]) {
            self.0.lock().unwrap().insert((kind.to_owned(), *key), bytes.to_vec());
        }
    }

    #[test]
    fn a_result_is_computed_once_and_comes_back_to_the_bit() {
        let keep = InMemory::default();
        let numbers = vec![0.1 + 0.2, f64::INFINITY, f64::MIN_POSITIVE, -0.0];
        let ask = |key: &KeyBuilder, value: Result<Vec<f64>, &'static str>| kept_or(Some(&keep), "x", key, || value);
        let key = KeyBuilder::new().text("a").numbers(&[1.0]);
        assert_eq!(ask(&key, Err("no")), Err("no"));
        assert_eq!(ask(&key, Ok(numbers.clone())), Ok(numbers.clone()));
        let bits = |all: Vec<f64>| all.into_iter().map(f64::to_bits).collect::<Vec<_>>();
        assert_eq!(ask(&key, Err("it is not computed again")).map(bits), Ok(bits(numbers)));
        assert_eq!(ask(&KeyBuilder::new().text("a").numbers(&[2.0]), Ok(vec![])), Ok(vec![]));
        assert_eq!(kept_or(None, "x", &key, || Err::<(), _>("nothing keeps it")), Err("nothing keeps it"));
    }

    #[test]
    fn keys_tell_where_one_part_ends() {
        let key = |parts: &[&str]| parts.iter().fold(KeyBuilder::new(), |key, part| key.text(part)).finish();
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
        assert_ne!(key(&["ab"]), key(&["ab", ""]));
        assert_eq!(key(&["ab", "c"]), key(&["ab", "c"]));
    }
}

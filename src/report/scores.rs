//! What was measured on one output, by metric.

use lathe_runtime::{metric_columns, metrics};
use serde::{Deserialize, Deserializer, Serialize, Serializer, ser::SerializeMap as _};
use std::collections::BTreeMap;

/// A number for every metric with a column that was measured. In JSON the metrics are keys (`rel_l2`), all of them, in the
/// order of their columns: one that was not measured is `null`, and so is an infinite one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct OutputScores(BTreeMap<&'static str, f64>);

impl OutputScores {
    /// Keeps the metrics that have a column. Of those that only some outputs have, such as the ratio of signal and noise,
    /// an infinite one says nothing.
    pub fn new(scores: impl IntoIterator<Item = (&'static str, f64)>) -> OutputScores {
        let scores: BTreeMap<&str, f64> = scores.into_iter().collect();
        let kept = metric_columns().into_iter().filter_map(|(metric, column)| {
            let score = *scores.get(metric.name)?;
            (column.order == 0 || score.is_finite()).then_some((metric.name, score))
        });
        OutputScores(kept.collect())
    }

    /// What a metric came to, if it was measured.
    pub fn get(&self, metric: &str) -> Option<f64> {
        self.0.get(metric).copied()
    }

    /// The relative L2 error.
    pub fn rel_l2(&self) -> f64 {
        self.get("rel-l2").unwrap_or(0.0)
    }

    /// The largest difference of two elements.
    pub fn max_abs(&self) -> f64 {
        self.get("max-abs").unwrap_or(0.0)
    }

    /// The cosine of the angle between both outputs.
    pub fn cosine(&self) -> f64 {
        self.get("cosine").unwrap_or(1.0)
    }
}

impl Serialize for OutputScores {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let columns = metric_columns();
        let mut map = serializer.serialize_map(Some(columns.len()))?;
        for (metric, _) in columns {
            map.serialize_entry(&metric.key(), &self.get(metric.name))?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for OutputScores {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<OutputScores, D::Error> {
        let fields: BTreeMap<String, serde_json::Value> = Deserialize::deserialize(deserializer)?;
        let score = |key: &str| fields.get(key).map(|value| value.as_f64().unwrap_or(f64::INFINITY));
        Ok(OutputScores::new(metrics().filter_map(|metric| Some((metric.name, score(&metric.key())?)))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_survive_json_in_the_order_of_columns() {
        let scores = OutputScores::new([
            ("rel-l2", f64::INFINITY),
            ("max-abs", 0.5),
            ("cosine", 1.0),
            ("snr", f64::INFINITY),
            ("kl", 0.25),
            ("accuracy", 0.5),
        ]);
        let text = serde_json::to_string(&scores).unwrap();
        let expected =
            r#"{"max_abs":0.5,"rel_l2":null,"cosine":1.0,"top1":null,"kl":0.25,"snr":null,"psnr":null,"ssim":null}"#;
        assert_eq!(text, expected);
        assert_eq!(serde_json::from_str::<OutputScores>(&text).unwrap(), scores);
    }
}

//! How far apart two sets of images are as sets, by the features that a network sees in each image.
//!
//! Which network is the user's choice; what it gives per image is one row of [`Features`]. Distances of sets of different
//! sizes are not compared with one another, because [`frechet`] falls with the number of rows even where nothing differs.

mod frechet;
mod kernel;
mod sliced;
#[cfg(test)]
mod testing;

pub use frechet::frechet;
pub use kernel::{Kernel, kernel};
pub use sliced::sliced;

use lathe_ir::Tensor;

/// Why two sets cannot be compared.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeatureError {
    /// What the network gave is no row of numbers per image.
    #[error("features of shape {0:?} are no rows of numbers, expected one row per image")]
    Shape(Vec<usize>),
    /// Rows of different networks, or of one network at different sizes.
    #[error("rows of {found} features meet rows of {expected}")]
    Width {
        /// The length of the new rows.
        found: usize,
        /// The length of the rows so far.
        expected: usize,
    },
    /// A feature is infinite or no number.
    #[error("feature {feature} of image {image} is not finite")]
    NotFinite {
        /// The image, counted from 0.
        image: usize,
        /// The feature.
        feature: usize,
    },
    /// A distance of distributions needs more than one image of each.
    #[error("a distance of two sets needs at least {expected} images in each, found {found}")]
    Few {
        /// How many there are in the smaller set.
        found: usize,
        /// How many there must be.
        expected: usize,
    },
    /// The distance is defined for sets of equal size only.
    #[error("the sets have {0} and {1} images, expected equally many")]
    Counts(usize, usize),
    /// A decomposition did not converge.
    #[error("the decomposition of the covariance did not converge")]
    Decomposition,
}

/// One row of numbers per image.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Features {
    width: usize,
    values: Vec<f64>,
}

impl Features {
    /// No images yet.
    pub fn new() -> Features {
        Features::default()
    }

    /// Adds a batch, `[images, …]`; everything after the first axis is one row.
    pub fn push(&mut self, batch: &Tensor) -> Result<(), FeatureError> {
        let shape = || FeatureError::Shape(batch.dims().to_vec());
        let (&images, rest) = batch.dims().split_first().ok_or_else(shape)?;
        let width = rest.iter().product::<usize>();
        let values = batch.to_f64s().filter(|_| width > 0).ok_or_else(shape)?;
        if self.width != 0 && width != self.width && images > 0 {
            return Err(FeatureError::Width { found: width, expected: self.width });
        }
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(FeatureError::NotFinite { image: self.len() + at / width, feature: at % width });
        }
        if images > 0 {
            self.width = width;
            self.values.extend(values);
        }
        Ok(())
    }

    /// How many images there are.
    pub fn len(&self) -> usize {
        self.values.len() / self.width.max(1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// How many features an image has; 0 before the first.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The features of an image.
    pub fn row(&self, image: usize) -> &[f64] {
        &self.values[image * self.width..(image + 1) * self.width]
    }

    /// The images of some indices, in this order.
    pub fn select(&self, images: &[usize]) -> Features {
        let values = images.iter().flat_map(|&image| self.row(image).iter().copied()).collect();
        Features { width: self.width, values }
    }

    /// Checks that two sets can be compared.
    fn check(&self, other: &Features, least: usize) -> Result<(), FeatureError> {
        let found = self.len().min(other.len());
        if found < least {
            return Err(FeatureError::Few { found, expected: least });
        }
        if self.width != other.width {
            return Err(FeatureError::Width { found: other.width, expected: self.width });
        }
        Ok(())
    }

    fn mean(&self) -> Vec<f64> {
        let mut mean = vec![0.0; self.width];
        for row in self.values.chunks_exact(self.width) {
            mean.iter_mut().zip(row).for_each(|(m, v)| *m += v);
        }
        mean.iter_mut().for_each(|m| *m /= self.len() as f64);
        mean
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_gathered_and_checked() {
        let mut features = Features::new();
        features.push(&Tensor::from_f32s(&[2, 1, 2], &[1.0, 2.0, 3.0, 4.0])).unwrap();
        features.push(&Tensor::from_f32s(&[1, 2], &[5.0, 6.0])).unwrap();
        assert_eq!((features.len(), features.width(), features.row(2)), (3, 2, &[5.0, 6.0][..]));
        assert_eq!(features.mean(), [3.0, 4.0]);
        assert_eq!(features.select(&[2, 0]).values, [5.0, 6.0, 1.0, 2.0]);
        let error = features.push(&Tensor::from_f32s(&[1, 3], &[0.0; 3])).unwrap_err();
        assert_eq!(error, FeatureError::Width { found: 3, expected: 2 });
        let error = features.push(&Tensor::from_f32s(&[1, 2], &[0.0, f32::NAN])).unwrap_err();
        assert_eq!(error, FeatureError::NotFinite { image: 3, feature: 1 });
        assert_eq!(features.push(&Tensor::from_f32s(&[], &[0.0])), Err(FeatureError::Shape(Vec::new())));
    }
}

//! Images of two samplers in one picture: two halves of equal layout, the same sample at the same place of each.

use anyhow::{Context as _, ensure};
use lathe_ir::Tensor;
use std::io::Cursor;

/// Images beside each other in a half, and below each other.
pub(super) const COLUMNS: usize = 2;
pub(super) const ROWS: usize = 4;
/// Pixels between images, and between the halves.
const GAP: usize = 4;
const MIDDLE: usize = 16;
/// Images are enlarged until they are at least this high.
const HEIGHT: usize = 96;

/// Images of one sampler, `[n, c, h, w]`, black at −1 and white at 1.
#[derive(Debug, Default)]
pub(super) struct Half {
    channels: usize,
    height: usize,
    width: usize,
    values: Vec<f64>,
}

impl Half {
    /// Adds images.
    pub fn push(&mut self, images: &Tensor) -> anyhow::Result<()> {
        let &[_, channels @ (1 | 3), height, width] = images.dims() else {
            anyhow::bail!("samples of shape {:?} are no images", images.dims());
        };
        let values = images.to_f64s().context("samples are no real numbers")?;
        let fits = self.values.is_empty() || (self.channels, self.height, self.width) == (channels, height, width);
        ensure!(fits && height > 0 && width > 0, "samples of shape {:?} do not fit beside the others", images.dims());
        (self.channels, self.height, self.width) = (channels, height, width);
        self.values.extend(values);
        Ok(())
    }

    /// The byte of a pixel of an image in one channel.
    fn byte(&self, image: usize, channel: usize, y: usize, x: usize) -> u8 {
        let at = ((image * self.channels + channel) * self.height + y) * self.width + x;
        // What is no number is black.
        ((self.values[at].clamp(-1.0, 1.0) + 1.0) * 127.5).round() as u8
    }
}

/// Pixels from 0 to 1 as numbers from -1 to 1.
pub(super) fn spread(image: &Tensor) -> anyhow::Result<Tensor> {
    let values = image.to_f32s().context("pixels are no real numbers")?;
    Ok(Tensor::from_f32s(image.dims(), &values.iter().map(|v| 2.0 * v - 1.0).collect::<Vec<f32>>()))
}

/// The picture as the bytes of a PNG. Both halves need an image for every place, of the same size.
pub(super) fn encode(left: &Half, right: &Half) -> anyhow::Result<Vec<u8>> {
    let size = (left.channels, left.height, left.width);
    ensure!(size == (right.channels, right.height, right.width), "the samplers give images of different sizes");
    let (channels, height, width) = size;
    let enough = |half: &Half| half.values.len() >= ROWS * COLUMNS * channels * height * width && channels > 0;
    ensure!(enough(left) && enough(right), "there are too few images for a picture");
    let times = HEIGHT.div_ceil(height).max(1);
    let (cell_height, cell_width) = (height * times, width * times);
    let half = COLUMNS * cell_width + (COLUMNS - 1) * GAP;
    let (whole_height, whole_width) = (ROWS * cell_height + (ROWS - 1) * GAP, 2 * half + MIDDLE);
    let mut pixels = vec![255u8; whole_height * whole_width * channels];
    for (images, start) in [(left, 0), (right, half + MIDDLE)] {
        for image in 0..ROWS * COLUMNS {
            let top = image / COLUMNS * (cell_height + GAP);
            let edge = start + image % COLUMNS * (cell_width + GAP);
            for y in 0..cell_height {
                for x in 0..cell_width {
                    let at = ((top + y) * whole_width + edge + x) * channels;
                    for channel in 0..channels {
                        pixels[at + channel] = images.byte(image, channel, y / times, x / times);
                    }
                }
            }
        }
    }
    let side = |size: usize| u32::try_from(size).context("the picture would be too large");
    let mut out = Cursor::new(Vec::new());
    let mut encoder = png::Encoder::new(&mut out, side(whole_width)?, side(whole_height)?);
    encoder.set_color(if channels == 1 { png::ColorType::Grayscale } else { png::ColorType::Rgb });
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    Ok(out.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Eight images of one colour each.
    fn half(channels: usize, shift: f32) -> Half {
        let numbers: Vec<f32> =
            (0..8 * channels * 6).map(|i| (i / (channels * 6)) as f32 / 4.0 - 1.0 + shift).collect();
        let mut half = Half::default();
        half.push(&Tensor::from_f32s(&[8, channels, 3, 2], &numbers)).unwrap();
        half
    }

    fn decode(bytes: &[u8]) -> (png::OutputInfo, Vec<u8>) {
        let mut reader = png::Decoder::new(Cursor::new(bytes)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        (info, pixels)
    }

    #[test]
    fn images_stand_where_they_belong() {
        for channels in [1, 3] {
            let (info, pixels) = decode(&encode(&half(channels, 0.0), &half(channels, 0.25)).unwrap());
            // Images of 3 by 2 are enlarged 32 times.
            assert_eq!((info.width, info.height), (2 * (2 * 64 + 4) + 16, 4 * 96 + 3 * 4));
            let at = |x: usize, y: usize| pixels[(y * info.width as usize + x) * channels + channels - 1];
            // From black upwards in steps of an eighth, the right half one step further.
            assert_eq!([at(0, 0), at(63, 95), at(68, 0), at(0, 100)], [0, 0, 32, 64]);
            assert_eq!([at(132 + 16, 0), at(132 + 16 + 68, 395)], [32, 255]);
            assert_eq!([at(64, 0), at(132, 200), at(0, 97)], [255; 3]);
        }
    }

    #[test]
    fn what_is_no_picture_is_an_error() {
        let mut half_of = half(1, 0.0);
        assert!(half_of.push(&Tensor::from_f32s(&[1, 1, 2, 2], &[0.0; 4])).is_err());
        assert!(Half::default().push(&Tensor::from_f32s(&[1, 4, 2, 2], &[0.0; 16])).is_err());
        assert!(encode(&half(1, 0.0), &half(3, 0.0)).is_err());
        assert!(encode(&Half::default(), &Half::default()).is_err());
    }
}

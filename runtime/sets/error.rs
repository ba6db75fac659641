//! Why a set cannot be used: one sentence each, with what was expected and what was found.

use lathe_ir::{DataType, ReadError};
use std::{io, path::PathBuf};

/// Why a set cannot be used with a model.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// A file or folder cannot be read.
    #[error("set `{}` cannot be read: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The path is nothing that holds samples.
    #[error("`{}` is {found}, expected a .npz, a folder of .npz or .npy files, or ONNX test_data_set_* folders", path.display())]
    Kind {
        /// The path given.
        path: PathBuf,
        /// What it is instead.
        found: String,
    },
    /// The archive is cut off or broken.
    #[error("set `{}` is broken, expected a whole .npz archive: {message}", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The bytes of an array are not what its header or the archive says.
    #[error("array `{array}` in `{}` is broken: {message}", path.display())]
    Array {
        /// The file it lies in.
        path: PathBuf,
        /// The array.
        array: String,
        /// What is wrong with it.
        message: String,
    },
    /// The array holds pickled Python objects.
    #[error("array `{array}` in `{}` holds pickled Python objects, which are never loaded, expected numbers", path.display())]
    Pickle {
        /// The file it lies in.
        path: PathBuf,
        /// The array.
        array: String,
    },
    /// The array is stored column by column.
    #[error(
        "array `{array}` in `{}` is stored in Fortran order, expected C order: samples are read one after another \
         (numpy.ascontiguousarray puts them so)",
        path.display()
    )]
    Fortran {
        /// The file it lies in.
        path: PathBuf,
        /// The array.
        array: String,
    },
    /// A tensor file of a test data set cannot be read.
    #[error("`{}` holds no tensor that can be used: {source}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ReadError,
    },
    /// An input has no array.
    #[error("set `{}` holds no array for input `{input}` of the model, expected {expected}, found {found}", path.display())]
    Missing {
        /// The file or folder.
        path: PathBuf,
        /// The input.
        input: String,
        /// Its type in the model.
        expected: String,
        /// The arrays there are.
        found: String,
    },
    /// An array is for nothing.
    #[error("array `{array}` in `{}` is no input of the model, expected only {expected} (--labels {array} if it holds labels)", path.display())]
    Extra {
        /// The file or folder.
        path: PathBuf,
        /// The array.
        array: String,
        /// The inputs of the model.
        expected: String,
    },
    /// The labels are not there.
    #[error("set `{}` holds no labels, expected an array `{labels}`, found {found}", path.display())]
    Labels {
        /// The file or folder.
        path: PathBuf,
        /// The name given with `--labels`.
        labels: String,
        /// The arrays there are.
        found: String,
    },
    /// The labels are not whole numbers.
    #[error("labels `{array}` in `{}` are {found}, expected whole numbers", path.display())]
    LabelType {
        /// The file.
        path: PathBuf,
        /// The array.
        array: String,
        /// What it holds.
        found: String,
    },
    /// The elements have another type than the input.
    #[error("array `{array}` in `{}` holds {found}, expected {expected}", path.display())]
    Type {
        /// The file it lies in.
        path: PathBuf,
        /// The array.
        array: String,
        /// The type in the model.
        expected: DataType,
        /// The type in the file.
        found: String,
    },
    /// An input that is not a tensor of a stated type.
    #[error("input `{input}` of the model is {found}, expected a tensor of a stated type: a set cannot serve it")]
    Input {
        /// The input.
        input: String,
        /// What it is.
        found: &'static str,
    },
    /// The array has another number of axes.
    #[error(
        "array `{array}` in `{}` has {} axes {found:?}, expected {expected} with samples along the first axis, or one axis \
         more with a run in each row",
        path.display(), found.len()
    )]
    Ndim {
        /// The file it lies in.
        path: PathBuf,
        /// The array.
        array: String,
        /// The shape in the model.
        expected: String,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// An axis has another size.
    #[error("array `{array}` in `{}` has the shape {found:?}, expected {expected}{because}", path.display())]
    Shape {
        /// The file it lies in.
        path: PathBuf,
        /// The array.
        array: String,
        /// The shape in the model.
        expected: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// Where the expectation comes from if it is not the model alone.
        because: String,
    },
    /// Arrays with different numbers of samples.
    #[error("array `{array}` in `{}` has {found} rows, expected {expected}", path.display())]
    Count {
        /// The file it lies in.
        path: PathBuf,
        /// The array.
        array: String,
        /// How many there should be and why.
        expected: String,
        /// How many there are.
        found: usize,
    },
    /// No samples.
    #[error("set `{}` holds no samples, found the shape {found:?} for `{array}`, expected at least one row", path.display())]
    Empty {
        /// The file it lies in.
        path: PathBuf,
        /// The array.
        array: String,
        /// Its shape.
        found: Vec<usize>,
    },
    /// An element is not a number.
    #[error("array `{array}` in `{}` holds NaN in sample {sample}, expected numbers only", path.display())]
    NotANumber {
        /// The file it lies in.
        path: PathBuf,
        /// The array.
        array: String,
        /// The sample, counted from 0 in its file.
        sample: usize,
    },
    /// A sample was chosen that is not there.
    #[error("sample {sample} was chosen, found {found} in the set")]
    Chosen {
        /// Its number.
        sample: usize,
        /// How many there are.
        found: usize,
    },
}

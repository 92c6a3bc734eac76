//! The windows of pooling, with PyTorch's rules for ceil mode.

use std::ops::Range;

use candle_core::{Shape, Tensor};

use super::dims4;
use crate::blocked;
use crate::error::shape_error;
use crate::{Error, Result};

/// A square window with PyTorch's defaults: the short form of [`Pool`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Side of the window.
    pub kernel: usize,
    /// Distance of windows.
    pub stride: usize,
    /// Rows and columns added on each side.
    pub padding: usize,
}

/// The window of a pooling op. Pairs are (height, width).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// Size of the window.
    pub kernel: (usize, usize),
    /// Distance of windows.
    pub stride: (usize, usize),
    /// Rows added above and below, columns added left and right; at most half of the kernel.
    pub padding: (usize, usize),
    /// Whether windows may reach past the padded input on the far side. The last one must start
    /// inside of the input or of the padding before it.
    pub ceil_mode: bool,
    /// Average pooling alone: whether padding counts in the divisor. What a window in ceil mode
    /// has past the padding never does.
    pub count_include_pad: bool,
}

impl Pool {
    /// Of this kernel, as far apart as it is large, with PyTorch's defaults.
    #[must_use]
    pub fn new(kernel: (usize, usize)) -> Self {
        Self {
            kernel,
            stride: kernel,
            padding: (0, 0),
            ceil_mode: false,
            count_include_pad: true,
        }
    }
}

impl From<Window> for Pool {
    fn from(window: Window) -> Self {
        let Window {
            kernel,
            stride,
            padding,
        } = window;
        Self {
            stride: (stride, stride),
            padding: (padding, padding),
            ..Self::new((kernel, kernel))
        }
    }
}

/// Windows along one axis.
#[derive(Debug, Clone, Copy)]
pub(super) struct Axis {
    pub(super) kernel: usize,
    pub(super) stride: usize,
    pub(super) padding: usize,
    /// Size of the input.
    pub(super) input: usize,
    /// Number of windows.
    pub(super) output: usize,
    /// Whether the windows share the input out as evenly as they can, whatever the kernel.
    adaptive: bool,
}

impl Axis {
    fn adaptive(input: usize, output: usize) -> Result<Self> {
        if output == 0 {
            return Err(Error::Option {
                what: "pooling output",
                value: output.to_string(),
                expected: "at least 1",
            });
        }
        Ok(Self {
            kernel: 1,
            stride: 1,
            padding: 0,
            input,
            output,
            adaptive: true,
        })
    }

    fn new(
        op: &'static str,
        input: usize,
        (kernel, stride, padding): (usize, usize, usize),
        ceil_mode: bool,
    ) -> Result<Self> {
        let range = |what, value: usize, expected| {
            Err(Error::Option {
                what,
                value: value.to_string(),
                expected,
            })
        };
        if kernel == 0 {
            return range("pooling kernel", kernel, "at least 1");
        }
        if stride == 0 {
            return range("pooling stride", stride, "at least 1");
        }
        if padding > kernel / 2 {
            return range("pooling padding", padding, "at most half of the kernel");
        }
        // In ceil mode up to stride − 1 places past the padding are made up.
        let extra = if ceil_mode { stride - 1 } else { 0 };
        let Some(room) = (input + 2 * padding + extra).checked_sub(kernel) else {
            return shape_error(
                op,
                format!("a window of {kernel} does not fit into {input} with padding {padding}"),
            );
        };
        let mut output = room / stride + 1;
        if ceil_mode && (output - 1) * stride >= input + padding {
            output -= 1;
        }
        Ok(Self {
            kernel,
            stride,
            padding,
            input,
            output,
            adaptive: false,
        })
    }

    /// Places of the input that the window at `index` covers; never none.
    pub(super) fn range(self, index: usize) -> Range<usize> {
        if self.adaptive {
            let (start, end) = (index * self.input, (index + 1) * self.input);
            return start / self.output..end.div_ceil(self.output);
        }
        let start = index * self.stride;
        let end = (start + self.kernel).saturating_sub(self.padding);
        start.saturating_sub(self.padding)..end.min(self.input)
    }

    /// Places of the input and the padding that the window at `index` covers.
    pub(super) fn padded_len(self, index: usize) -> usize {
        let start = index * self.stride;
        (start + self.kernel).min(self.input + 2 * self.padding) - start
    }
}

/// The windows of an op over `(batch, channels, height, width)`, or over blocked maps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Windows {
    pub(super) batch: usize,
    /// Channels, or panels of blocked maps.
    pub(super) channels: usize,
    /// Channels beside each other: 1, or those of a block.
    pub(super) lanes: usize,
    /// Whether the maps are blocked.
    last: bool,
    pub(super) rows: Axis,
    pub(super) columns: Axis,
}

impl Windows {
    pub(super) fn new(op: &'static str, x: &Tensor, pool: Pool) -> Result<Self> {
        Self::over(op, dims4(op, x)?, (1, false), pool)
    }

    /// Windows that share each plane out to `(rows, columns)`.
    pub(super) fn adaptive(
        op: &'static str,
        x: &Tensor,
        (rows, columns): (usize, usize),
    ) -> Result<Self> {
        let [batch, channels, height, width] = dims4(op, x)?;
        Ok(Self {
            batch,
            channels,
            lanes: 1,
            last: false,
            rows: Axis::adaptive(height, rows)?,
            columns: Axis::adaptive(width, columns)?,
        })
    }

    /// As [`new`](Self::new), for maps that may be blocked.
    pub(super) fn of_any_layout(op: &'static str, x: &Tensor, pool: Pool) -> Result<Self> {
        let (lanes, dims) = blocked::dims_of_any_layout(op, x)?;
        Self::over(op, dims, (lanes, x.rank() == 5), pool)
    }

    fn over(
        op: &'static str,
        [batch, channels, height, width]: [usize; 4],
        (lanes, last): (usize, bool),
        pool: Pool,
    ) -> Result<Self> {
        let down = (pool.kernel.0, pool.stride.0, pool.padding.0);
        let across = (pool.kernel.1, pool.stride.1, pool.padding.1);
        Ok(Self {
            batch,
            channels,
            lanes,
            last,
            rows: Axis::new(op, height, down, pool.ceil_mode)?,
            columns: Axis::new(op, width, across, pool.ceil_mode)?,
        })
    }

    /// As kernels have them. Channels of a GPU's blocked maps are all in one block.
    #[cfg(feature = "cuda")]
    pub(super) fn on_gpu(&self, include_padding: bool) -> crate::cuda::windows::Windows {
        use crate::cuda::windows;
        let axis = |axis: &Axis| windows::Axis {
            input: axis.input as i32,
            output: axis.output as i32,
            kernel: axis.kernel as i32,
            stride: axis.stride as i32,
            padding: axis.padding as i32,
            adaptive: i32::from(axis.adaptive),
        };
        windows::Windows {
            rows: axis(&self.rows),
            columns: axis(&self.columns),
            channels: (self.channels * self.lanes) as i32,
            beside: i32::from(self.last),
            include_padding: i32::from(include_padding),
            unused: 0,
        }
    }

    /// Size of an input plane, of all its lanes.
    pub(super) fn plane(&self) -> usize {
        self.rows.input * self.columns.input * self.lanes
    }

    /// Size of an output plane, of all its lanes.
    pub(super) fn out_plane(&self) -> usize {
        self.rows.output * self.columns.output * self.lanes
    }

    /// Shape of the output.
    pub(super) fn shape(&self) -> Shape {
        let (rows, columns) = (self.rows.output, self.columns.output);
        match self.lanes {
            _ if !self.last => Shape::from((self.batch, self.channels, rows, columns)),
            lanes => Shape::from((self.batch, self.channels, rows, columns, lanes)),
        }
    }

    pub(super) fn out_len(&self) -> usize {
        self.batch * self.channels * self.out_plane()
    }
}

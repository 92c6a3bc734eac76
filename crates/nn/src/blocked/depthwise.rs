//! Depthwise convolution: each channel alone, of maps in either layout into either layout.
//!
//! A panel of `WIDTH` channels of an image is brought into blocks and padded in scratch memory, which for most maps stays
//! in a processor's cache, convolved there as [`super::conv`] does, with a weight for each channel of a tap in place
//! of a matrix, and written in the layout that is wanted. So maps are read once and written once, and channels
//! that do not fill blocks need no copy of all maps that does.

use rayon::prelude::*;

use super::conv::{Correlation, Padded, Sums};
use super::kernel::{Correlate, Gather, Isa, Lanes};
use super::{into_panel, out_of_panel};
use crate::element::{Unwritten, images_per_task, sum_partials, transpose, with_scratch};
use crate::ops::{Clip, ConvShapes as Shapes};

/// The planes of maps, in blocks or not.
#[derive(Clone, Copy)]
struct Maps {
    size: (usize, usize),
    in_blocks: bool,
}

impl Maps {
    fn input(shapes: &Shapes) -> Self {
        Self {
            size: shapes.input(),
            in_blocks: shapes.lanes > 1,
        }
    }

    fn output(shapes: &Shapes, in_blocks: bool) -> Self {
        Self {
            size: shapes.output(),
            in_blocks,
        }
    }

    fn pixels(self) -> usize {
        self.size.0 * self.size.1
    }

    /// Values of a panel.
    fn panel<T: Lanes>(self) -> usize {
        self.pixels() * T::WIDTH
    }

    /// One of an image; the last of plain maps may be shorter.
    fn panel_of<T: Lanes>(self, image: &[T], panel: usize) -> &[T] {
        let from = panel * self.panel::<T>();
        &image[from..(from + self.panel::<T>()).min(image.len())]
    }
}

/// A padded panel in scratch memory.
struct Source {
    maps: Maps,
    to: Padded,
}

impl Source {
    /// Scratch memory that [`fill`](Self::fill) needs: for planes, for a panel, and for the padded one.
    fn scratch<T: Lanes>(&self) -> [usize; 3] {
        let panel = match self.maps.in_blocks {
            true => 0,
            false => self.maps.panel::<T>(),
        };
        let padded = match self.to.is_size(self.maps.size) {
            true => 0,
            false => self.to.plane() * T::WIDTH,
        };
        [panel, panel, padded]
    }

    /// Returns the panel of these values with its zeros.
    fn fill<'a, T: Lanes>(
        &self,
        values: &'a [T],
        [spare, whole, padded]: [&'a mut [T]; 3],
        isa: &Isa<T>,
    ) -> &'a [T] {
        let blocked = match self.maps.in_blocks {
            true => values,
            false => {
                into_panel(values, self.maps.pixels(), (&mut *whole, spare), isa);
                whole
            }
        };
        if self.to.is_size(self.maps.size) {
            return blocked;
        }
        self.to.pad(blocked, self.maps.size, padded);
        padded
    }
}

/// Runs `work` with parts of scratch memory.
fn with_parts<T: Lanes, const N: usize>(lens: [usize; N], work: impl FnOnce([&mut [T]; N])) {
    with_scratch(lens.iter().sum(), |mut scratch| {
        work(lens.map(|len| {
            let (part, rest) = std::mem::take(&mut scratch).split_at_mut(len);
            scratch = rest;
            part
        }));
    });
}

/// See [`Shapes::forward`]; maps come out in blocks or not.
pub(crate) fn forward<T: Lanes>(
    shapes: &Shapes,
    x: &[T],
    weight: &[T],
    (bias, clip): (Option<&[T]>, Clip<T>),
    into_blocks: bool,
    isa: &Isa<T>,
) -> Vec<T> {
    let pass = Pass {
        sums: Sums::forward::<T>(shapes, 1, T::WIDTH),
        weight: &pack(shapes, weight),
        bias: bias.map(|bias| filled(bias, 1)),
        clip,
        maps: (Maps::input(shapes), Maps::output(shapes, into_blocks)),
        channels: shapes.channels.0,
    };
    pass.run(x, isa)
}

/// The gradient of the input, from that of the output in blocks or not.
pub(crate) fn input_gradient<T: Lanes>(
    shapes: &Shapes,
    dy: &[T],
    weight: &[T],
    in_blocks: bool,
    isa: &Isa<T>,
) -> Vec<T> {
    let pass = Pass {
        sums: Sums::input_gradient::<T>(shapes, 1, T::WIDTH),
        weight: &pack(shapes, weight),
        bias: None,
        clip: Clip::off(),
        maps: (Maps::output(shapes, in_blocks), Maps::input(shapes)),
        channels: shapes.channels.0,
    };
    pass.run(dy, isa)
}

/// Sums over the taps, for every pixel of maps.
struct Pass<'a, T> {
    sums: Sums,
    /// See [`pack`].
    weight: &'a [T],
    /// For whole panels.
    bias: Option<Vec<T>>,
    clip: Clip<T>,
    /// What is read and what is written.
    maps: (Maps, Maps),
    channels: usize,
}

impl<T: Lanes> Pass<'_, T> {
    fn run(&self, x: &[T], isa: &Isa<T>) -> Vec<T> {
        let (from, to) = self.maps;
        let image = |maps: Maps| self.channels * maps.pixels();
        let mut y = Unwritten::new(x.len() / image(from) * image(to));
        let images = y.places().par_chunks_exact_mut(image(to));
        images
            .zip(x.par_chunks_exact(image(from)))
            .for_each(|(y, x)| {
                let panels = y.par_chunks_mut(to.panel::<T>());
                panels
                    .zip(x.par_chunks(from.panel::<T>()))
                    .enumerate()
                    .for_each(|(panel, (y, x))| self.panel(panel, x, y, isa));
            });
        // SAFETY: the phases together have every pixel of each panel, and each was written.
        unsafe { y.written() }
    }

    fn panel(&self, panel: usize, x: &[T], y: &mut [T], isa: &Isa<T>) {
        let (maps, to) = self.maps;
        let source = Source {
            maps,
            to: self.sums.source,
        };
        let ([a, b, c], size) = (source.scratch::<T>(), to.panel::<T>());
        let out = if to.in_blocks { 0 } else { size };
        let weights = self.weight.len() / self.channels.div_ceil(T::WIDTH);
        with_parts([a.max(out), b, c, out], |[spare, whole, padded, out]| {
            let x = source.fill(x, [&mut *spare, whole, padded], isa);
            let place = match to.in_blocks {
                true => &mut *y,
                false => &mut *out,
            };
            let bias = self.bias.as_ref();
            let bias = bias.map(|bias| bias[panel * T::WIDTH..][..T::WIDTH].as_ptr());
            assert!(place.len() == size);
            for (pixels, blocks) in &self.sums.phases {
                let job = Gather {
                    x: x.as_ptr(),
                    weight: self.weight[panel * weights..][..weights].as_ptr(),
                    y: place.as_mut_ptr(),
                    pixels,
                    blocks,
                    panels: 1,
                    weight_panel: 0,
                    y_panel: 0,
                    bias: bias.unwrap_or(std::ptr::null()),
                    clip: self.clip,
                };
                // SAFETY: the sums are of a padded panel, which `x` is, and of weights and places of a panel.
                unsafe { isa.depthwise(&job) };
            }
            if !to.in_blocks {
                out_of_panel(out, to.pixels(), (y, spare), isa);
            }
        });
    }
}

/// The gradient of the weights, from that of the output in blocks or not.
pub(crate) fn weight_gradient<T: Lanes>(
    shapes: &Shapes,
    x: &[T],
    dy: &[T],
    in_blocks: bool,
    isa: &Isa<T>,
) -> Vec<T> {
    let (maps, to) = (Maps::input(shapes), shapes.source());
    let source = Source { maps, to };
    let correlation = Correlation::of(shapes);
    let (maps, to) = (Maps::output(shapes, in_blocks), correlation.target);
    let target = Source { maps, to };
    let jobs = correlation.jobs::<T>(std::iter::once((0, 0)), source.to);
    let (channels, taps) = (shapes.channels.0, shapes.tap_places());
    let (panels, weights) = (channels.div_ceil(T::WIDTH), taps.len() * T::WIDTH);
    let per_task = images_per_task(shapes.batch, panels * weights);
    let mut partials = vec![T::ZERO; shapes.batch.div_ceil(per_task) * panels * weights];
    let tasks = x
        .par_chunks(per_task * shapes.image())
        .zip(dy.par_chunks(per_task * shapes.out_image()));
    partials
        .par_chunks_exact_mut(panels * weights)
        .zip(tasks)
        .for_each(|(partials, (x, dy))| {
            let partials = partials.par_chunks_exact_mut(weights).enumerate();
            partials.for_each(|(panel, dw)| {
                let ([a, b, c], [d, e, f]) = (source.scratch::<T>(), target.scratch::<T>());
                with_parts([a, b, c, d, e, f], |[a, b, c, d, e, f]| {
                    let images = x.chunks_exact(shapes.image());
                    for (x, dy) in images.zip(dy.chunks_exact(shapes.out_image())) {
                        let x = source.maps.panel_of(x, panel);
                        let dy = target.maps.panel_of(dy, panel);
                        let x = source.fill(x, [&mut *a, &mut *b, &mut *c], isa);
                        let dy = target.fill(dy, [&mut *d, &mut *e, &mut *f], isa);
                        for (runs, count) in &jobs {
                            for (tap, dw) in taps.iter().zip(dw.chunks_exact_mut(T::WIDTH)) {
                                let job = Correlate {
                                    x: x[tap * T::WIDTH..].as_ptr(),
                                    dy: dy.as_ptr(),
                                    dw: dw.as_mut_ptr(),
                                    runs,
                                    count: *count,
                                    step: shapes.columns.stride * T::WIDTH,
                                    panels: 1,
                                    dw_panel: 0,
                                    dy_panel: 0,
                                };
                                // SAFETY: a run's last pixel with the last tap is the last of the padded panel.
                                unsafe { isa.correlate_depthwise(&job) };
                            }
                        }
                    }
                });
            });
        });
    let dw = sum_partials(&partials, panels * weights);
    let mut dw: Vec<T> = dw
        .chunks_exact(weights)
        .flat_map(|panel| transpose(panel, taps.len(), T::WIDTH))
        .collect();
    dw.truncate(channels * taps.len());
    dw
}

/// Weights as `[panel][tap][channel]`.
fn pack<T: Lanes>(shapes: &Shapes, weight: &[T]) -> Vec<T> {
    let taps = shapes.taps();
    filled(weight, taps)
        .chunks_exact(taps * T::WIDTH)
        .flat_map(|panel| transpose(panel, T::WIDTH, taps))
        .collect()
}

/// So many values of each channel, with zeros for the channels that panels have more.
fn filled<T: Lanes>(values: &[T], each: usize) -> Vec<T> {
    let mut values = values.to_vec();
    values.resize(values.len().next_multiple_of(T::WIDTH * each), T::ZERO);
    values
}

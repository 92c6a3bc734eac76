//! MobileNetV2 (Sandler et al. 2018) of width 1 with torchvision's structure and parameter names
//! (`features.0.0`, `features.1.conv.0.0` and so on).
//!
//! Options: `last_stride` (2, or 1: the stage of 160 channels, the last one that halves the resolution,
//! keeps it) and `reduction` (a 1x1 convolution to so many channels with batch norm and ReLU after the
//! last one; none by default; names `layer_reduce`, `layer_reduce_bn`). Covariance heads take
//! `last_stride = 1, reduction = 256`, which gives 14x14x256 of a 224x224 image. torchvision's dropout
//! before its classifier is no part of this.

use candle_core::Tensor;
use isqrt_nn::layers::ConvNorm;
use isqrt_nn::ops::{Activation, add};
use isqrt_nn::{Mode, Scope};

use super::reduction::{Keys, check_stride, finer, leave_blocks, reduce};
use super::{Backbone, BackboneEntry, Options};
use crate::{Layout, Result};

pub(super) const MOBILENET_V2: Entry = Entry;

pub(super) struct Entry;

/// Of each stage: how many times wider its units are inside, channels, units, stride of the first (the
/// paper's table 2).
const STAGES: [(usize, usize, usize, usize); 7] = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
];

/// Place of the last stage that halves the resolution.
const LAST_HALVING: usize = 5;

/// timm's names: for each unit its place there, stage and number. The first unit has no expansion.
macro_rules! timm {
    ($($unit:literal => $place:literal),*) => {
        &[
            ("features.0.0.", "conv_stem."),
            ("features.0.1.", "bn1."),
            ("features.1.conv.0.0.", "blocks.0.0.conv_dw."),
            ("features.1.conv.0.1.", "blocks.0.0.bn1."),
            ("features.1.conv.1.", "blocks.0.0.conv_pw."),
            ("features.1.conv.2.", "blocks.0.0.bn2."),
            $(
                (concat!("features.", $unit, ".conv.0.0."), concat!("blocks.", $place, ".conv_pw.")),
                (concat!("features.", $unit, ".conv.0.1."), concat!("blocks.", $place, ".bn1.")),
                (concat!("features.", $unit, ".conv.1.0."), concat!("blocks.", $place, ".conv_dw.")),
                (concat!("features.", $unit, ".conv.1.1."), concat!("blocks.", $place, ".bn2.")),
                (concat!("features.", $unit, ".conv.2."), concat!("blocks.", $place, ".conv_pwl.")),
                (concat!("features.", $unit, ".conv.3."), concat!("blocks.", $place, ".bn3.")),
            )*
            ("features.18.0.", "conv_head."),
            ("features.18.1.", "bn2."),
            ("", ""),
        ]
    };
}

const TIMM: &[(&str, &str)] = timm!(
    2 => "1.0", 3 => "1.1", 4 => "2.0", 5 => "2.1", 6 => "2.2", 7 => "3.0", 8 => "3.1", 9 => "3.2",
    10 => "3.3", 11 => "4.0", 12 => "4.1", 13 => "4.2", 14 => "5.0", 15 => "5.1", 16 => "5.2",
    17 => "6.0"
);

impl BackboneEntry for Entry {
    fn name(&self) -> &'static str {
        "mobilenet_v2"
    }

    fn about(&self) -> &'static str {
        "inverted residuals with depthwise convolutions; 224x224 images to 7x7x1280; options \
         last_stride (2 or 1), reduction (to so many channels)"
    }

    fn second_order(&self) -> Options {
        finer()
    }

    fn layouts(&self) -> &'static [Layout] {
        &[
            Layout {
                name: "torchvision",
                linear: "classifier.1.",
                ..Layout::FLAT
            },
            Layout {
                name: "timm",
                backbone: TIMM,
                linear: "classifier.",
                ..Layout::FLAT
            },
        ]
    }

    fn build(&self, options: &Options, mut scope: Scope<'_>) -> Result<Box<dyn Backbone>> {
        let keys: Keys = options.read(self.name())?;
        check_stride(self.name(), "last_stride", keys.last_stride)?;

        let mut features = scope.sub("features");
        let stem = &mut features.sub(0);
        let stem = ConvNorm::new(stem, ("0", "1"), (3, 32), 3, 2, Activation::Relu6)?;
        let mut channels = 32;
        let mut units = Vec::new();
        for (stage, (expansion, outputs, count, stride)) in STAGES.into_iter().enumerate() {
            for i in 0..count {
                let stride = match (i, stage) {
                    (0, LAST_HALVING) => keys.last_stride,
                    (0, _) => stride,
                    _ => 1,
                };
                let mut scope = features.sub(units.len() + 1);
                let scope = &mut scope.sub("conv");
                units.push(Unit::new(scope, (channels, outputs), expansion, stride)?);
                channels = outputs;
            }
        }
        let last = &mut features.sub(units.len() + 1);
        let last = ConvNorm::new(last, ("0", "1"), (channels, 1280), 1, 1, Activation::Relu6)?;
        let (reduce, channels) = reduce(self.name(), &mut scope, 1280, keys.reduction)?;
        Ok(Box::new(MobileNetV2 {
            stem,
            units,
            last,
            reduce,
            channels,
        }))
    }
}

struct MobileNetV2 {
    stem: ConvNorm,
    units: Vec<Unit>,
    last: ConvNorm,
    reduce: Option<ConvNorm>,
    channels: usize,
}

impl Backbone for MobileNetV2 {
    fn forward_features(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut x = self.stem.forward_in_any_layout(x, mode)?;
        for unit in &self.units {
            x = unit.forward(&x, mode)?;
        }
        let x = self.last.forward_in_any_layout(&x, mode)?;
        leave_blocks(&x, self.reduce.as_ref(), mode)
    }

    fn out_channels(&self) -> usize {
        self.channels
    }
}

/// An inverted residual: 1x1 to more channels, 3x3 in each of them alone, 1x1 to few, without an
/// activation; and the input, where the shape is the same. The 24 channels of one stage do not fill
/// blocks in f32, so layouts change on the way.
struct Unit {
    expand: Option<ConvNorm>,
    depthwise: ConvNorm,
    project: ConvNorm,
    residual: bool,
}

impl Unit {
    fn new(
        scope: &mut Scope<'_>,
        (inputs, outputs): (usize, usize),
        expansion: usize,
        stride: usize,
    ) -> Result<Self> {
        let width = inputs * expansion;
        let mut place = 0;
        let mut expand = None;
        if expansion != 1 {
            let names = ("0.0", "0.1");
            expand = Some(ConvNorm::new(
                scope,
                names,
                (inputs, width),
                1,
                1,
                Activation::Relu6,
            )?);
            place = 1;
        }
        let names = (&*format!("{place}.0"), &*format!("{place}.1"));
        let depthwise = ConvNorm::depthwise(scope, names, width, 3, stride, Activation::Relu6)?;
        let names = (&*format!("{}", place + 1), &*format!("{}", place + 2));
        let project = ConvNorm::new(scope, names, (width, outputs), 1, 1, Activation::None)?;
        Ok(Self {
            expand,
            depthwise,
            project,
            residual: stride == 1 && inputs == outputs,
        })
    }

    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let mut y = x.clone();
        if let Some(expand) = &self.expand {
            y = expand.forward_in_any_layout(&y, mode)?;
        }
        y = self.depthwise.forward_in_any_layout(&y, mode)?;
        y = self.project.forward_in_any_layout(&y, mode)?;
        match self.residual {
            true => Ok(add(&y, x)?),
            false => Ok(y),
        }
    }
}

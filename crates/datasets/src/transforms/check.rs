//! What can be said of a pipeline before it has seen an image.

use crate::{Error, Result};

use super::run::resized;
use super::{Pipeline, Step};

/// Largest side of an input, in pixels.
pub const MAX_SIDE: usize = 4096;
/// Most steps of a pipeline.
const MAX_STEPS: usize = 32;

impl Pipeline {
    /// Height and width of the inputs, where they do not depend on the image.
    #[must_use]
    pub fn output_size(&self) -> Option<(usize, usize)> {
        let after = |size, step: &Step| step.size_after(size);
        let (width, height) = self.steps.iter().fold(None, after)?;
        Some((height, width))
    }

    /// Inputs that one image gives.
    #[must_use]
    pub fn views(&self) -> usize {
        match self.steps.last() {
            Some(Step::TenCrop { .. }) => 10,
            Some(Step::FiveCrop { .. }) => 5,
            Some(Step::Mirror {}) => 2,
            _ => 1,
        }
    }

    /// Whether an image gives other inputs in another epoch.
    #[must_use]
    pub fn is_random(&self) -> bool {
        self.steps.iter().any(Step::is_random)
    }

    /// The steps before the first random one, and the rest: what can be done once, and what each epoch
    /// does anew.
    #[must_use]
    pub fn split_random(&self) -> (Self, Self) {
        let first = self.steps.iter().position(Step::is_random);
        let (once, anew) = self.steps.split_at(first.unwrap_or(self.steps.len()));
        let with = |steps: &[Step]| Self {
            steps: steps.to_vec(),
            ..self.clone()
        };
        (with(once), with(anew))
    }

    /// Whether its numbers make sense.
    ///
    /// # Errors
    /// [`Error::Config`] with the number of the step (from 1) and what was expected there.
    pub fn check(&self) -> Result<()> {
        let wrong = |problem: String| Err(Error::Config(problem));
        if self.steps.len() > MAX_STEPS {
            return wrong(format!(
                "{} steps in a pipeline: {MAX_STEPS} are possible",
                self.steps.len()
            ));
        }
        let mut flips = 0;
        for (index, step) in self.steps.iter().enumerate() {
            let number = index + 1;
            if let Err(problem) = step.check() {
                return wrong(format!("step {number} of the pipeline: {problem}"));
            }
            if matches!(step, Step::BoxCrop { .. }) && index > 0 {
                return wrong(format!(
                    "step {number} of the pipeline: box_crop must be the first step, since boxes are in \
                     pixels of the file"
                ));
            }
            let views = matches!(
                step,
                Step::FiveCrop { .. } | Step::TenCrop { .. } | Step::Mirror {}
            );
            if views && number < self.steps.len() {
                return wrong(format!(
                    "step {number} of the pipeline: five_crop, ten_crop and mirror must be the last step"
                ));
            }
            flips += usize::from(matches!(step, Step::HorizontalFlip { .. }));
        }
        if flips > 1 {
            return wrong("a pipeline can have one horizontal_flip".to_owned());
        }
        for (channel, (mean, std)) in self.mean.iter().zip(self.std).enumerate() {
            if !mean.is_finite() || !std.is_finite() || std < 0.0 {
                return wrong(format!(
                    "cannot normalise channel {channel} with mean {mean} and standard deviation {std}"
                ));
            }
        }
        Ok(())
    }
}

impl Step {
    /// Whether it does something else to the same image in another epoch.
    fn is_random(&self) -> bool {
        match *self {
            Self::RandomResizedCrop { .. } | Self::RandomCrop { .. } => true,
            Self::JitterCrop {
                scale,
                ratio,
                centred,
                ..
            } => !centred || scale.0 < scale.1 || ratio.0 < ratio.1,
            Self::HorizontalFlip { p } => p > 0.0 && p < 1.0,
            Self::ColorJitter {
                brightness,
                contrast,
                saturation,
                hue,
            } => brightness + contrast + saturation + hue > 0.0,
            Self::Lighting { std } => std > 0.0,
            Self::Brightness { deviation } => deviation.iter().any(|&d| d > 0.0),
            _ => false,
        }
    }

    /// Width and height after this step, where `size` is what was known before.
    fn size_after(&self, size: Option<(usize, usize)>) -> Option<(usize, usize)> {
        match *self {
            Self::RandomResizedCrop { size, .. }
            | Self::JitterCrop { size, .. }
            | Self::CenterCrop { size }
            | Self::RandomCrop { size, .. }
            | Self::FiveCrop { size }
            | Self::TenCrop { size } => Some((size, size)),
            Self::ResizeTo { width, height, .. } => Some((width, height)),
            Self::Resize { short, .. } => resized(size?, short).ok(),
            Self::CenterSquare {} => {
                size.map(|(width, height)| (width.min(height), width.min(height)))
            }
            Self::TrimBottom { rows } => {
                size.map(|(width, height)| (width, height.saturating_sub(rows)))
            }
            Self::BoxCrop { .. } => None,
            Self::HorizontalFlip { .. }
            | Self::ColorJitter { .. }
            | Self::Lighting { .. }
            | Self::Brightness { .. }
            | Self::Mirror {} => size,
        }
    }

    fn check(&self) -> Result<(), String> {
        match *self {
            Self::RandomResizedCrop {
                size, scale, ratio, ..
            } => {
                side("size", size)?;
                range("scale", scale, 1.0)?;
                range("ratio", ratio, 100.0)
            }
            Self::JitterCrop {
                size,
                fraction,
                scale,
                ratio,
                ..
            } => {
                side("size", size)?;
                range("fraction", (fraction, fraction), 1.0)?;
                range("scale", scale, 1.0 / fraction)?;
                range("ratio", ratio, 100.0)
            }
            Self::Resize { short, .. } => side("short", short),
            Self::ResizeTo { width, height, .. } => {
                side("width", width)?;
                side("height", height)
            }
            Self::CenterCrop { size } | Self::FiveCrop { size } | Self::TenCrop { size } => {
                side("size", size)
            }
            Self::RandomCrop { size, padding, .. } => {
                side("size", size)?;
                match padding <= MAX_SIDE {
                    true => Ok(()),
                    false => Err(format!("padding = {padding}, expected 0 to {MAX_SIDE}")),
                }
            }
            Self::HorizontalFlip { p } => number("p", p, 1.0),
            Self::ColorJitter {
                brightness,
                contrast,
                saturation,
                hue,
            } => {
                number("brightness", brightness, 10.0)?;
                number("contrast", contrast, 10.0)?;
                number("saturation", saturation, 10.0)?;
                number("hue", hue, 0.5)
            }
            Self::Lighting { std } => number("std", std, 10.0),
            Self::Brightness { deviation } => deviation
                .into_iter()
                .try_for_each(|value| number("deviation", value, 10.0)),
            Self::TrimBottom { rows } => match rows <= MAX_SIDE {
                true => Ok(()),
                false => Err(format!("rows = {rows}, expected 0 to {MAX_SIDE}")),
            },
            Self::BoxCrop { margin } => number("margin", margin, 10.0),
            Self::CenterSquare {} | Self::Mirror {} => Ok(()),
        }
    }
}

fn side(name: &str, value: usize) -> Result<(), String> {
    match (1..=MAX_SIDE).contains(&value) {
        true => Ok(()),
        false => Err(format!("{name} = {value}, expected 1 to {MAX_SIDE} pixels")),
    }
}

fn number(name: &str, value: f64, most: f64) -> Result<(), String> {
    match (0.0..=most).contains(&value) {
        true => Ok(()),
        false => Err(format!("{name} = {value}, expected 0 to {most}")),
    }
}

fn range(name: &str, (low, high): (f64, f64), most: f64) -> Result<(), String> {
    // Not `low > 0`, so that what is not a number is refused too.
    match low > 0.0 && low <= high && high <= most && high / low <= 1e6 {
        true => Ok(()),
        false => Err(format!(
            "{name} = [{low}, {high}], expected two numbers above 0 and up to {most}, the smaller first"
        )),
    }
}

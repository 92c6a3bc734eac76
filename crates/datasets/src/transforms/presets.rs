//! Pipelines by name, one for each recipe.

use crate::{Error, Result};

use super::{Filter, IMAGENET_MEAN, IMAGENET_STD, Pipeline, Step};

/// A pipeline with a name.
#[derive(Debug, Clone, Copy)]
pub struct Preset {
    /// What experiment files call it.
    pub name: &'static str,
    /// What it does, in one line.
    pub about: &'static str,
    /// Where it comes from.
    pub source: &'static str,
    steps: fn() -> Vec<Step>,
}

const PYTORCH: &str = "jiangtaoxie/fast-MPN-COV, main.py and trainingFromScratch/train.sh";
const FINETUNE: &str = "jiangtaoxie/fast-MPN-COV, finetune scripts and main.py";
const MATCONVNET: &str = "augmentation settings of jiangtaoxie/matconvnet.fast-mpn-cov (as copies of its init files have \
     them); crop and brightness of vl_imreadjpeg.cu, bicubic of getImageBatch.m, vlfeat/matconvnet";
const KRIZHEVSKY: &str =
    "AlexNet's 227 pixels (as in Caffe's model, recalled) in torchvision's usual crops";
const SMALL: &str =
    "the usual augmentation of CIFAR (He et al. 2016, section 4.2), with a mirrored border";

/// All pipelines that have names.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "imagenet-train",
        about: "random part of 8 to 100 % of the area to 224x224, flip",
        source: PYTORCH,
        steps: || random_resized(224),
    },
    Preset {
        name: "imagenet-eval",
        about: "short side 256, middle 224x224",
        source: PYTORCH,
        steps: || vec![short(256), Step::CenterCrop { size: 224 }],
    },
    Preset {
        name: "imagenet-tencrop",
        about: "short side 256, corners and middle of 224x224 with their mirror images",
        source: PYTORCH,
        steps: || vec![short(256), Step::TenCrop { size: 224 }],
    },
    Preset {
        name: "imagenet-227-train",
        about: "random part of 8 to 100 % of the area to 227x227, flip (AlexNet)",
        source: KRIZHEVSKY,
        steps: || random_resized(227),
    },
    Preset {
        name: "imagenet-227-eval",
        about: "short side 256, middle 227x227 (AlexNet)",
        source: KRIZHEVSKY,
        steps: || vec![short(256), Step::CenterCrop { size: 227 }],
    },
    Preset {
        name: "imagenet-227-tencrop",
        about: "short side 256, corners and middle of 227x227 with their mirror images (AlexNet)",
        source: KRIZHEVSKY,
        steps: || vec![short(256), Step::TenCrop { size: 227 }],
    },
    Preset {
        name: "imagenet-matconvnet-resnet-train",
        about: "part of 224/256 of the short side, scale 0.4 to 1.1, aspect 3/4 to 4/3, to 224x224; flip; \
                brightness noise",
        source: MATCONVNET,
        steps: || matconvnet(224, (0.4, 1.1), (3.0 / 4.0, 4.0 / 3.0)),
    },
    Preset {
        name: "imagenet-matconvnet-alexnet-train",
        about: "part of 227/256 of the short side, aspect 2/3 to 3/2, to 227x227; flip; brightness noise",
        source: MATCONVNET,
        steps: || matconvnet(227, (1.0, 1.0), (2.0 / 3.0, 3.0 / 2.0)),
    },
    Preset {
        name: "imagenet-matconvnet-vgg-train",
        about: "part of 224/256 of the short side, scale 0.5 to 1, aspect 2/3 to 3/2, to 224x224; flip; \
                brightness noise",
        source: MATCONVNET,
        steps: || matconvnet(224, (0.5, 1.0), (2.0 / 3.0, 3.0 / 2.0)),
    },
    Preset {
        name: "imagenet-matconvnet-eval",
        about: "middle square of 224/256 of the short side to 224x224, bicubic",
        source: MATCONVNET,
        steps: || vec![jitter_crop(224, (1.0, 1.0), (1.0, 1.0), true)],
    },
    Preset {
        name: "imagenet-matconvnet-227-eval",
        about: "middle square of 227/256 of the short side to 227x227, bicubic (AlexNet)",
        source: MATCONVNET,
        steps: || vec![jitter_crop(227, (1.0, 1.0), (1.0, 1.0), true)],
    },
    Preset {
        name: "cub-train",
        about: "short side 448, middle 448x448, flip",
        source: FINETUNE,
        steps: || vec![short(448), Step::CenterCrop { size: 448 }, FLIP],
    },
    Preset {
        name: "cub-eval",
        about: "short side 448, middle 448x448 and its mirror image",
        source: FINETUNE,
        steps: || vec![short(448), Step::CenterCrop { size: 448 }, Step::Mirror {}],
    },
    Preset {
        name: "aircraft-train",
        about: "512x512 whatever the proportions, middle 448x448, flip (the banner of 20 rows stays in)",
        source: FINETUNE,
        steps: || vec![both(512), Step::CenterCrop { size: 448 }, FLIP],
    },
    Preset {
        name: "aircraft-eval",
        about: "512x512 whatever the proportions, middle 448x448 and its mirror image",
        source: FINETUNE,
        steps: || vec![both(512), Step::CenterCrop { size: 448 }, Step::Mirror {}],
    },
    Preset {
        name: "cars-train",
        about: "448x448 whatever the proportions, flip",
        source: FINETUNE,
        steps: || vec![both(448), FLIP],
    },
    Preset {
        name: "cars-eval",
        about: "448x448 whatever the proportions, and its mirror image",
        source: FINETUNE,
        steps: || vec![both(448), Step::Mirror {}],
    },
    Preset {
        name: "small32-train",
        about: "middle square to 32x32, moved by up to 4 pixels, flip",
        source: SMALL,
        steps: || small(32, true),
    },
    Preset {
        name: "small32-eval",
        about: "middle square to 32x32",
        source: SMALL,
        steps: || small(32, false),
    },
    Preset {
        name: "small64-train",
        about: "middle square to 64x64, moved by up to 4 pixels, flip",
        source: SMALL,
        steps: || small(64, true),
    },
    Preset {
        name: "small64-eval",
        about: "middle square to 64x64",
        source: SMALL,
        steps: || small(64, false),
    },
];

const FLIP: Step = Step::HorizontalFlip { p: 0.5 };

fn short(short: usize) -> Step {
    let filter = Filter::Bilinear;
    Step::Resize { short, filter }
}

fn both(side: usize) -> Step {
    Step::ResizeTo {
        width: side,
        height: side,
        filter: Filter::Bilinear,
    }
}

fn random_resized(size: usize) -> Vec<Step> {
    let crop = Step::RandomResizedCrop {
        size,
        scale: super::crops::default_scale(),
        ratio: super::crops::default_ratio(),
        filter: Filter::Bilinear,
    };
    vec![crop, FLIP]
}

fn jitter_crop(size: usize, scale: (f64, f64), ratio: (f64, f64), centred: bool) -> Step {
    Step::JitterCrop {
        size,
        fraction: size as f64 / 256.0,
        scale,
        ratio,
        centred,
        filter: Filter::Bicubic,
    }
}

fn matconvnet(size: usize, scale: (f64, f64), ratio: (f64, f64)) -> Vec<Step> {
    // The original adds 0.1 times a root of the covariance of ImageNet's colours, in effect an
    // independent number a channel; the channels' deviations stand in for that matrix.
    let deviation = [0.0229, 0.0224, 0.0225];
    vec![
        jitter_crop(size, scale, ratio, false),
        FLIP,
        Step::Brightness { deviation },
    ]
}

fn small(size: usize, train: bool) -> Vec<Step> {
    let mut steps = vec![Step::CenterSquare {}, both(size)];
    if train {
        let moved = Step::RandomCrop {
            size,
            padding: 4,
            reflect: true,
        };
        steps.extend([moved, FLIP]);
    }
    steps
}

impl Preset {
    /// The pipeline, with ImageNet's mean and deviation.
    #[must_use]
    pub fn pipeline(&self) -> Pipeline {
        Pipeline::of((self.steps)())
    }
}

impl Pipeline {
    /// Images as they are, with ImageNet's mean and deviation, as all of these.
    #[must_use]
    pub fn identity() -> Self {
        Self::of(Vec::new())
    }

    /// The middle square of each image, brought to this side: any images to one size.
    #[must_use]
    pub fn square(side: usize) -> Self {
        Self::of(small(side, false))
    }

    /// torchvision's `Resize` of the short side and `CenterCrop`: how most weights are evaluated.
    #[must_use]
    pub fn evaluation(resize: usize, crop: usize) -> Self {
        Self::of(vec![short(resize), Step::CenterCrop { size: crop }])
    }

    /// `imagenet-train` at another size.
    #[must_use]
    pub fn imagenet_train(size: usize) -> Self {
        Self::of(random_resized(size))
    }

    /// With another mean and deviation (red, green, blue; pixels scaled to 0..1).
    #[must_use]
    pub fn normalising(self, mean: [f32; 3], std: [f32; 3]) -> Self {
        Self { mean, std, ..self }
    }

    fn of(steps: Vec<Step>) -> Self {
        Self {
            steps,
            mean: IMAGENET_MEAN,
            std: IMAGENET_STD,
            exif_orientation: false,
        }
    }

    /// The pipeline of this name in [`PRESETS`], with ImageNet's mean and deviation.
    ///
    /// # Errors
    /// [`Error::Config`] with the name that is nearest.
    pub fn preset(name: &str) -> Result<Self> {
        if let Some(preset) = PRESETS.iter().find(|preset| preset.name == name) {
            return Ok(preset.pipeline());
        }
        let shown: String = name.chars().take(80).collect();
        let close = |known: &&Preset| strsim::damerau_levenshtein(known.name, &shown);
        let nearest = PRESETS.iter().min_by_key(close).map_or("", |p| p.name);
        let names: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
        Err(Error::Config(format!(
            "no pipeline is called {shown:?}; the nearest is {nearest:?} (known: {})",
            names.join(", ")
        )))
    }
}

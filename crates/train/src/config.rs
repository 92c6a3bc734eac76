//! How a network is trained, as data.

use isqrt_models::{ModelSpec, Network};
use isqrt_nn::{
    AdamW, AdamWConfig, Decay, Mode, Optimizer, ParamGroup, Schedule, Sgd, SgdConfig, Vars,
};
use serde::{Deserialize, Serialize};

use candle_core::{DType, Device, Tensor};
use isqrt_device::Search;
use isqrt_linalg::GpuKernel;

use crate::{Error, Result};

/// What the engine needs to know beside the images. Unknown keys are errors; keys with a default may be
/// left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The network.
    pub model: ModelSpec,
    /// Passes over the training images.
    pub epochs: usize,
    /// Images an update, of all ranks together; an incomplete last batch of an epoch is left out.
    pub batch: usize,
    /// Passes that each rank makes of its share of a batch, one after the other, where the whole does
    /// not fit into memory. The gradients are those of the whole; batch norm sees the parts. 1 by
    /// default.
    #[serde(default = "one")]
    pub accumulate: usize,
    /// What moves the parameters.
    pub optimiser: OptimiserSpec,
    /// Learning rate over time; cosine to 0 by default.
    #[serde(default)]
    pub schedule: Schedule,
    /// Parameters that learn or decay at their own pace.
    #[serde(default)]
    pub groups: Vec<ParamGroup>,
    /// Patterns of parameters that stay as they are, like `backbone.*`. A backbone that stays whole is
    /// not differentiated.
    #[serde(default)]
    pub frozen: Vec<String>,
    /// Batch norm trains with its running statistics as constants, see [`Mode::Frozen`]; for
    /// networks that are trained already. Off by default.
    #[serde(default)]
    pub frozen_norm: bool,
    /// Label smoothing; 0 by default.
    #[serde(default)]
    pub label_smoothing: f64,
    /// Largest norm of all gradients together; not limited by default.
    #[serde(default)]
    pub clip_norm: Option<f64>,
    /// Evaluate an average of the weights that keeps this share of itself at each update; off by default.
    #[serde(default)]
    pub ema: Option<f64>,
    /// Element type of weights and features.
    #[serde(default)]
    pub precision: Precision,
    /// How a GPU computes.
    #[serde(default)]
    pub gpu: GpuSpec,
    /// What becomes of an update whose loss or gradient is not finite.
    #[serde(default)]
    pub non_finite: NonFinite,
    /// Fixes weights, order and augmentation.
    pub seed: u64,
}

fn one() -> usize {
    1
}

/// Element types that networks train in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single.
    #[default]
    F32,
    /// Double, for studies of precision.
    F64,
    /// On a GPU: f32, with products of convolutions and linear layers rounded to TF32 (10 bits of
    /// mantissa). The square root stays in f32.
    Tf32,
    /// On a GPU: feature maps of the backbone in bf16, weights and all from the pooling head on in f32.
    Bf16,
}

impl Precision {
    /// Of the network's parameters.
    #[must_use]
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 | Self::Tf32 | Self::Bf16 => DType::F32,
            Self::F64 => DType::F64,
        }
    }

    /// Of the backbone's feature maps.
    #[must_use]
    pub fn maps(self) -> DType {
        match self {
            Self::Bf16 => DType::BF16,
            other => other.dtype(),
        }
    }

    /// Operations a second of a GPU at its best.
    #[must_use]
    pub fn peak(self, gpu: &isqrt_device::Gpu) -> f64 {
        match self {
            Self::Tf32 => gpu.peak_tensor().0,
            Self::Bf16 => gpu.peak_tensor().1,
            Self::F32 | Self::F64 => gpu.peak_f32(),
        }
    }

    /// Makes a network compute so, on the device where it is.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    pub fn apply(self, network: &mut Network) -> Result<()> {
        self.begin(network.vars().device())?;
        network.compute_in(self.maps());
        Ok(())
    }

    fn check(self, device: &Device) -> Result<()> {
        match matches!(self, Self::Tf32 | Self::Bf16) && !device.is_cuda() {
            false => Ok(()),
            true => Err(Error::Config {
                what: "precision",
                value: self.to_string(),
                expected: "only a GPU has it; on the CPU take f32 (--set precision=f32) or f64"
                    .to_owned(),
            }),
        }
    }

    /// Makes the whole program round products so from now on, see [`isqrt_device::set_precision`].
    ///
    /// # Errors
    /// [`Error::Config`] where the device cannot.
    pub fn begin(self, device: &Device) -> Result<()> {
        self.check(device)?;
        isqrt_device::set_precision(match self {
            Self::Tf32 | Self::Bf16 => isqrt_device::Precision::Tf32,
            Self::F32 | Self::F64 => isqrt_device::Precision::Full,
        });
        Ok(())
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Tf32 => "tf32",
            Self::Bf16 => "bf16",
        })
    }
}

/// How a GPU computes, where there is more than one way; they differ in speed and in rounding. The CPU does not
/// look at it, and a head without covariance not at `layer`. A kernel that does not take the features fails at
/// the first batch, or in a dry run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(
    default,
    deny_unknown_fields,
    expecting = "a table: gpu = { layer = \"fastest\", convolutions = \"timed\" }"
)]
pub struct GpuSpec {
    /// The covariance layer: `auto`, `fastest`, `tiles`, `tensor-cores`, ..., see [`GpuKernel`].
    #[serde(with = "by_name")]
    pub layer: GpuKernel,
    /// Algorithms of convolutions: `ranked` by cuDNN, or `timed` at the first pass of a shape.
    #[serde(with = "by_name")]
    pub convolutions: Search,
}

impl GpuSpec {
    /// Makes the whole program compute so from now on.
    pub fn begin(self) {
        isqrt_linalg::set_gpu_kernel(self.layer);
        isqrt_device::set_search(self.convolutions);
    }

    /// Whether something is measured while a run goes on, so that another run may round differently.
    #[must_use]
    pub fn measures(&self) -> bool {
        self.layer == GpuKernel::Fastest || self.convolutions == Search::Timed
    }

    /// Whether nothing was chosen.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Values as their names.
mod by_name {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer, de};

    pub fn serialize<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub fn deserialize<'de, T: FromStr<Err = String>, D: Deserializer<'de>>(
        from: D,
    ) -> Result<T, D::Error> {
        String::deserialize(from)?
            .parse()
            .map_err(|said| de::Error::custom(format_args!("does not fit: {said}")))
    }
}

/// What becomes of an update whose loss or gradient is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum NonFinite {
    /// The run ends with an error that says which layer went first.
    #[default]
    Stop,
    /// It is left out, up to so many times in the run: in TOML `non_finite = { skip = 10 }`.
    Skip(u64),
}

/// An optimiser with its base rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum OptimiserSpec {
    /// Stochastic gradient descent with momentum.
    Sgd {
        /// Learning rate at the start of the schedule.
        lr: f64,
        /// 0.9 by default.
        #[serde(default = "momentum")]
        momentum: f64,
        /// Nesterov's form of it; off by default.
        #[serde(default)]
        nesterov: bool,
        /// 0 by default.
        #[serde(default)]
        weight_decay: f64,
        /// What decays; weights only by default, `all` as in the authors' code.
        #[serde(default)]
        decay: Decay,
    },
    /// Adam with decoupled weight decay.
    AdamW {
        /// Learning rate at the start of the schedule.
        lr: f64,
        /// (0.9, 0.999) by default.
        #[serde(default = "betas")]
        betas: (f64, f64),
        /// 1e-8 by default.
        #[serde(default = "epsilon")]
        epsilon: f64,
        /// 0.01 by default.
        #[serde(default = "adamw_decay")]
        weight_decay: f64,
        /// What decays; weights only by default.
        #[serde(default)]
        decay: Decay,
    },
}

fn momentum() -> f64 {
    0.9
}

fn betas() -> (f64, f64) {
    AdamWConfig::default().betas
}

fn epsilon() -> f64 {
    AdamWConfig::default().epsilon
}

fn adamw_decay() -> f64 {
    AdamWConfig::default().weight_decay
}

impl OptimiserSpec {
    /// SGD with momentum 0.9 and without decay.
    #[must_use]
    pub fn sgd(lr: f64) -> Self {
        Self::Sgd {
            lr,
            momentum: momentum(),
            nesterov: false,
            weight_decay: 0.0,
            decay: Decay::default(),
        }
    }

    /// Learning rate at the start of the schedule.
    #[must_use]
    pub fn lr(&self) -> f64 {
        match self {
            Self::Sgd { lr, .. } | Self::AdamW { lr, .. } => *lr,
        }
    }

    /// Values that it keeps for each one that learns.
    #[must_use]
    pub fn slots(&self) -> usize {
        match self {
            Self::Sgd { .. } => 1,
            Self::AdamW { .. } => 2,
        }
    }

    fn build(&self, vars: &Vars, groups: &[ParamGroup]) -> Result<Box<dyn Optimizer>> {
        Ok(match *self {
            Self::Sgd {
                momentum,
                nesterov,
                weight_decay,
                decay,
                ..
            } => {
                let config = SgdConfig {
                    momentum,
                    nesterov,
                    weight_decay,
                    decay,
                };
                Box::new(Sgd::with_groups(vars, config, groups)?)
            }
            Self::AdamW {
                betas,
                epsilon,
                weight_decay,
                decay,
                ..
            } => {
                let config = AdamWConfig {
                    betas,
                    epsilon,
                    weight_decay,
                    decay,
                };
                Box::new(AdamW::with_groups(vars, config, groups)?)
            }
        })
    }
}

impl TrainConfig {
    /// Checks what does not need the data.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Nn`] that names the setting.
    pub fn check(&self) -> Result<()> {
        let check = |good: bool, what, value: String, expected: &str| match good {
            true => Ok(()),
            false => Err(Error::Config {
                what,
                value,
                expected: expected.to_owned(),
            }),
        };
        let count = |what, value: usize| {
            let good = (1..=1 << 24).contains(&value);
            check(
                good,
                what,
                value.to_string(),
                "at least 1, at most 16777216",
            )
        };
        count("epochs", self.epochs)?;
        count("batch", self.batch)?;
        count("accumulate", self.accumulate)?;
        check(
            self.batch.is_multiple_of(self.accumulate),
            "accumulate",
            self.accumulate.to_string(),
            &format!("a divisor of the batch, {}", self.batch),
        )?;
        let lr = self.optimiser.lr();
        let good = lr > 0.0 && lr.is_finite();
        check(good, "optimiser.lr", lr.to_string(), "a positive number")?;
        check(
            (0.0..1.0).contains(&self.label_smoothing),
            "label_smoothing",
            self.label_smoothing.to_string(),
            "at least 0 and less than 1 (a share, not percent)",
        )?;
        if let Some(norm) = self.clip_norm {
            check(
                norm > 0.0,
                "clip_norm",
                norm.to_string(),
                "a positive number",
            )?;
        }
        if let Some(share) = self.ema {
            check(
                (0.0..1.0).contains(&share),
                "ema",
                share.to_string(),
                "at least 0 and less than 1",
            )?;
        }
        Ok(self.schedule.check()?)
    }

    /// Checks what does not need the data on the devices that share the work; images of a pass on each.
    ///
    /// # Errors
    /// As [`check`](Self::check), [`Precision::begin`] and [`pass`](Self::pass).
    pub fn check_on(&self, devices: &[Device]) -> Result<usize> {
        self.check()?;
        devices
            .iter()
            .try_for_each(|device| self.precision.check(device))?;
        self.pass(devices.len().max(1))
    }

    /// Images of a pass on each of so many devices.
    ///
    /// # Errors
    /// [`Error::Config`] for a batch that cannot be shared so.
    pub fn pass(&self, devices: usize) -> Result<usize> {
        let passes = devices.saturating_mul(self.accumulate);
        match self.batch.is_multiple_of(passes) {
            true => Ok(self.batch / passes),
            false => Err(Error::Config {
                what: "batch",
                value: self.batch.to_string(),
                expected: format!(
                    "must be a multiple of {passes}, the devices ({devices}) times the parts (accumulate = {})",
                    self.accumulate
                ),
            }),
        }
    }

    /// Makes a network of this recipe compute as it says, on the device where it is, and with it the whole
    /// program, see [`Precision::begin`] and [`GpuSpec::begin`].
    ///
    /// # Errors
    /// As [`Precision::begin`].
    pub fn begin(&self, network: &mut Network) -> Result<()> {
        self.gpu.begin();
        self.precision.apply(network)
    }

    /// What the forward pass of a step is.
    pub(crate) fn mode(&self) -> Mode {
        match self.frozen_norm {
            true => Mode::Frozen,
            false => Mode::Train,
        }
    }

    /// The optimiser for these parameters.
    pub(crate) fn optimiser(&self, vars: &Vars) -> Result<Box<dyn Optimizer>> {
        for pattern in &self.frozen {
            let group = ParamGroup::new(pattern);
            if !vars.parameters().any(|(name, _)| group.matches(name)) {
                return Err(Error::Config {
                    what: "model.frozen",
                    value: pattern.clone(),
                    expected: "a pattern that matches a parameter, like `backbone.*`".to_owned(),
                });
            }
        }
        if vars.parameters().all(|(name, _)| self.freezes(name)) {
            return Err(Error::Config {
                what: "model.frozen",
                value: self.frozen.join(", "),
                expected: "patterns that leave a parameter to learn".to_owned(),
            });
        }
        // Those that stay get no gradient, and what has none is passed by.
        self.optimiser.build(vars, &self.groups)
    }

    /// Whether no parameter of the backbone learns.
    pub(crate) fn stays(&self, vars: &Vars) -> bool {
        vars.parameters()
            .filter(|(name, _)| name.starts_with("backbone."))
            .all(|(name, _)| self.freezes(name))
    }

    /// The parameters that stay as they are.
    pub(crate) fn frozen_of(&self, vars: &Vars) -> Vec<Tensor> {
        vars.parameters()
            .filter(|(name, _)| self.freezes(name))
            .map(|(_, parameter)| parameter.as_tensor().clone())
            .collect()
    }

    fn freezes(&self, parameter: &str) -> bool {
        let mut patterns = self.frozen.iter().map(ParamGroup::new);
        patterns.any(|pattern| pattern.matches(parameter))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn gpus_compute_as_their_names_say() {
        let spec: GpuSpec = toml::from_str("layer = \"tensor-cores\"").unwrap();
        assert_eq!(spec.layer.name(), "tensor-cores");
        assert_eq!(spec.convolutions, Search::Ranked);
        assert!(!spec.is_default());
        let text = toml::to_string(&spec).unwrap();
        assert_eq!(toml::from_str::<GpuSpec>(&text).unwrap(), spec);
        let said = |text: &str| toml::from_str::<GpuSpec>(text).unwrap_err().to_string();
        assert!(
            said("layer = \"tensor\"").contains("there are auto, fastest, tiles, tensor-cores")
        );
        assert!(said("convolutions = \"fast\"").contains("`ranked` or `timed`, not `fast`"));
        assert!(said("kernel = \"tiles\"").contains("unknown field"));
    }

    #[test]
    fn a_batch_is_shared_in_equal_parts() {
        let config: TrainConfig = toml::from_str(
            "epochs = 1\nbatch = 24\naccumulate = 2\nseed = 1\n\
             [optimiser]\nkind = \"sgd\"\nlr = 0.1\n\
             [model]\nbackbone = \"e10net\"\nclasses = 2\nrepresentation = { name = \"gap\" }",
        )
        .unwrap();
        assert_eq!(config.pass(3).unwrap(), 4);
        let said = config.pass(5).unwrap_err().to_string();
        assert!(
            said.contains("a multiple of 10, the devices (5) times the parts"),
            "{said}"
        );
    }
}

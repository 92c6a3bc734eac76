//! `isqrt bench`: time of the layer and of what it replaces, of networks and their ops, of loading.

mod loader;

use super::device::DeviceArg;
use crate::output::{self, show};
use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use isqrt_device::{Gpu, Search};
use isqrt_experiments::spec::{check_decomposition_size, check_size};
use isqrt_linalg::bench::{LayerCase, LayerTiming, decompositions, layer, peak_gflops};
use isqrt_linalg::{CovPool, GpuKernel, Kernel, Memory, Root, Schedule, Side};
use isqrt_models::ModelSpec;
use isqrt_models::bench::{NetworkCase, network, ops};
use isqrt_train::machine::{peak_gpu_memory_mb, peak_memory_mb};
use isqrt_train::{GpuSpec, Precision};
use std::time::Duration;

/// Time the layer, what it replaces, networks, and the loading of images
#[derive(Subcommand)]
#[command(
    after_help = "Example:\n  isqrt bench layer --batch 32 --dim 256 --positions 196 --iterations 5"
)]
pub enum Bench {
    Layer(LayerBench),
    Decomposition(DecompositionBench),
    Network(NetworkBench),
    Loader(loader::LoaderBench),
}

impl Bench {
    pub fn run(&self, json: bool) -> anyhow::Result<()> {
        match self {
            Self::Layer(c) => c.run(json),
            Self::Decomposition(c) => c.run(json),
            Self::Network(c) => c.run(json),
            Self::Loader(c) => c.run(json),
        }
    }
}

/// Our layer beside the plain reverse-mode iteration, measured in turn
#[derive(Args)]
#[command(
    after_help = "Example:\n  isqrt bench layer --batch 32 --dim 256 --positions 196 --iterations 5 --threads 1"
)]
pub struct LayerBench {
    /// Images
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Channels
    #[arg(long, default_value_t = 256)]
    dim: usize,
    /// Positions (height x width)
    #[arg(long, default_value_t = 196)]
    positions: usize,
    /// Steps of the iteration
    #[arg(long, default_value_t = 5)]
    iterations: usize,
    /// Polynomials of the steps
    #[arg(long, value_enum, default_value_t = ScheduleArg::NewtonSchulz)]
    schedule: ScheduleArg,
    /// Lower bound that a minimax schedule is made for
    #[arg(long, default_value_t = 0.1)]
    lower: f64,
    /// Side to iterate on
    #[arg(long, value_enum, default_value_t = SideArg::Auto)]
    side: SideArg,
    /// Recompute in the backward pass instead of keeping iterates
    #[arg(long)]
    lean: bool,
    /// Instruction set of the CPU; on a GPU each of its kernels has a row
    #[arg(long, value_enum, default_value_t = KernelArg::Auto)]
    kernel: KernelArg,
    #[command(flatten)]
    device: DeviceArg,
    /// Seconds of measuring, of all rows together and at least three rounds of them
    #[arg(long, default_value_t = 5.0)]
    budget: f64,
}

#[derive(Clone, Copy, ValueEnum)]
enum ScheduleArg {
    NewtonSchulz,
    Cubic,
    Quintic,
    Nonic,
}

#[derive(Clone, Copy, ValueEnum)]
enum SideArg {
    Auto,
    Covariance,
    Gram,
}

#[derive(Clone, Copy, ValueEnum)]
enum KernelArg {
    Auto,
    Avx512,
    Avx2,
    Portable,
}

impl LayerBench {
    fn case(&self) -> LayerCase {
        let (steps, lower) = (self.iterations, self.lower);
        let schedule = match self.schedule {
            ScheduleArg::NewtonSchulz => Schedule::NewtonSchulz { iterations: steps },
            ScheduleArg::Cubic => Schedule::Cubic { steps, lower },
            ScheduleArg::Quintic => Schedule::Quintic { steps, lower },
            ScheduleArg::Nonic => Schedule::Nonic { steps, lower },
        };
        let side = match self.side {
            SideArg::Auto => Side::Auto,
            SideArg::Covariance => Side::Covariance,
            SideArg::Gram => Side::Gram,
        };
        let memory = if self.lean {
            Memory::Lean
        } else {
            Memory::Keep
        };
        let mut pool = CovPool::with_root(Root {
            schedule,
            side,
            memory,
            ..Root::default()
        });
        pool.kernel = match self.kernel {
            KernelArg::Auto => Kernel::Auto,
            KernelArg::Avx512 => Kernel::Avx512,
            KernelArg::Avx2 => Kernel::Avx2,
            KernelArg::Portable => Kernel::Portable,
        };
        LayerCase {
            pool,
            batch: self.batch,
            d: self.dim,
            positions: self.positions,
        }
    }

    fn run(&self, json: bool) -> anyhow::Result<()> {
        let device = self.device.open()?;
        check_size(self.batch, self.dim, self.positions).map_err(anyhow::Error::msg)?;
        let case = self.case();
        let name = format!(
            "layer batch={} dim={} positions={} {} n={}",
            self.batch,
            self.dim,
            self.positions,
            case.pool
                .root
                .as_ref()
                .map_or_else(String::new, |r| r.schedule.name()),
            self.iterations
        );
        let budget = Duration::try_from_secs_f64(self.budget).context("--budget")?;
        let rows = layer(&case, &device, budget)?;
        if json {
            for r in &rows {
                output::json(&serde_json::json!({
                    "case": name,
                    "implementation": r.implementation,
                    "device": isqrt_device::name(&device),
                    "threads": r.threads,
                    "forward_ms": r.forward_ms,
                    "backward_ms": r.backward_ms,
                    "gflops": r.gflops,
                    "peak_share": r.peak_share,
                    "bandwidth_share": r.bandwidth_share,
                    "peak_memory_mb": peak_memory_mb(),
                    "kept_bytes_per_image": r.kept_bytes,
                    "kernel": r.kernel,
                }))?;
            }
            return Ok(());
        }
        output::line(&name)?;
        if let Some(gpu) = isqrt_device::gpu_of(&device) {
            return self.say_gpu(&rows, &gpu);
        }
        let cells = rows.iter().map(|r| {
            vec![
                r.implementation.to_owned(),
                r.threads.to_string(),
                show(r.forward_ms),
                show(r.backward_ms),
                show(total(r) / self.batch as f64),
                show(r.gflops),
                format!("{:.0} %", 100.0 * r.peak_share),
                format!("{:.2} MB", r.kept_bytes as f64 / 1e6),
                r.kernel.to_owned(),
            ]
        });
        let head = [
            "implementation",
            "threads",
            "forward ms",
            "backward ms",
            "ms/image",
            "GFLOP/s",
            "of peak",
            "kept/image",
            "kernel",
        ];
        output::table(&head, cells.collect(), 1)?;
        say_ratio(&rows, "ours")?;
        let peak = peak_gflops(case.pool.kernel)?;
        let memory =
            peak_memory_mb().map_or_else(String::new, |m| format!("; peak memory {m:.0} MB"));
        output::line(&format!("measured peak {} GFLOP/s{memory}", show(peak)))
    }

    /// The table of a GPU, where an implementation is a kernel.
    fn say_gpu(&self, rows: &[LayerTiming], gpu: &Gpu) -> anyhow::Result<()> {
        let percent = |share: f64| format!("{:.0} %", 100.0 * share);
        let cells = rows.iter().map(|r| {
            let all = total(r);
            vec![
                r.implementation.to_owned(),
                show(r.forward_ms),
                show(r.backward_ms),
                show(all),
                show(1e3 * all / self.batch as f64),
                show(r.gflops),
                percent(r.peak_share),
                r.bandwidth_share.map_or_else(String::new, percent),
            ]
        });
        let head = [
            "implementation",
            "forward ms",
            "backward ms",
            "both ms",
            "us/image",
            "GFLOP/s",
            "of f32 peak",
            "of bandwidth",
        ];
        output::table(&head, cells.collect(), 1)?;
        output::line(
            "GFLOP/s: the arithmetic that the implementation needs; where it computes half of a symmetric product, half",
        )?;
        output::line(&format!(
            "{}: peak {} GFLOP/s in f32 without tensor cores, {} GB/s",
            gpu.name,
            show(gpu.peak_f32() / 1e9),
            show(gpu.peak_bandwidth() / 1e9)
        ))?;
        let own = rows.iter().filter(|r| {
            let kernel = r.implementation.parse();
            kernel.is_ok_and(|kernel: GpuKernel| kernel.is_ours_in_f32())
        });
        let Some(best) = own.min_by(|a, b| total(a).total_cmp(&total(b))) else {
            return Ok(());
        };
        output::line(&format!(
            "the fastest of ours in f32: {0} (for training: --set gpu.layer={0})",
            best.implementation
        ))?;
        say_ratio(rows, best.implementation)
    }
}

/// Milliseconds of both passes.
fn total(r: &LayerTiming) -> f64 {
    r.forward_ms + r.backward_ms
}

/// How an implementation compares with the reference.
fn say_ratio(rows: &[LayerTiming], name: &str) -> anyhow::Result<()> {
    let named = |name: &str| rows.iter().find(|r| r.implementation == name);
    let (Some(ours), Some(reference)) = (named(name), named("reference")) else {
        return Ok(());
    };
    let ratio = |ours: f64, reference: f64| match reference >= ours {
        true => format!("{} times faster", show(reference / ours)),
        false => format!("{} times slower", show(ours / reference)),
    };
    output::line(&format!(
        "{} than the plain reverse-mode reference (forward {}, backward {})",
        ratio(total(ours), total(reference)),
        ratio(ours.forward_ms, reference.forward_ms),
        ratio(ours.backward_ms, reference.backward_ms)
    ))
}

/// Eigen- and singular value decomposition beside our layer
#[derive(Args)]
#[command(after_help = "Example:\n  isqrt bench decomposition --dim 256 --batch 16")]
pub struct DecompositionBench {
    /// Side of the covariance matrix
    #[arg(long, default_value_t = 256)]
    dim: usize,
    /// Matrices in the batched case
    #[arg(long, default_value_t = 16)]
    batch: usize,
    #[command(flatten)]
    device: DeviceArg,
    /// Seconds of measuring, of all rows together and at least three rounds of them
    #[arg(long, default_value_t = 5.0)]
    budget: f64,
}

impl DecompositionBench {
    fn run(&self, json: bool) -> anyhow::Result<()> {
        check_decomposition_size(self.batch, self.dim).map_err(anyhow::Error::msg)?;
        let budget = Duration::try_from_secs_f64(self.budget).context("--budget")?;
        let batches: &[usize] = if self.batch > 1 {
            &[1, self.batch]
        } else {
            &[1]
        };
        let device = self.device.open()?;
        let rows = decompositions(self.dim, batches, &device, budget)?;
        if json {
            for r in &rows {
                let ours = r.method.starts_with("isqrt");
                output::json(&serde_json::json!({
                    "case": format!("{} dim={} batch={}", r.method, r.n, r.batch),
                    "implementation": if ours { "ours" } else { "reference" },
                    "device": isqrt_device::name(&device),
                    "threads": rayon::current_num_threads(),
                    "forward_ms": r.ms,
                    "backward_ms": null,
                    "gflops": null,
                    "peak_share": null,
                    "peak_memory_mb": peak_memory_mb(),
                }))?;
            }
            return Ok(());
        }
        let cells = rows.iter().map(|r| {
            vec![
                r.method.clone(),
                r.n.to_string(),
                r.batch.to_string(),
                show(r.ms),
                show(r.ms / r.batch as f64),
            ]
        });
        output::table(
            &["method", "dim", "batch", "ms", "ms/matrix"],
            cells.collect(),
            1,
        )
    }
}

/// A training step of a network, and the ops it is made of
///
/// The head is that of the published network (average pooling, or the linear layers of AlexNet and
/// VGG) unless another one is named. Covariance heads get the backbone that the paper gives them:
/// last stage at stride 1, reduction to 256 channels where the backbone has these options.
#[derive(Args)]
#[command(after_help = "Examples:
  isqrt bench network --model resnet50 --batch 8 --size 224
  isqrt bench network --model resnet50 --head isqrt --ops --threads 1")]
pub struct NetworkBench {
    /// Backbone; `isqrt models` lists them
    #[arg(long, value_name = "NAME", default_value = "resnet50")]
    model: String,
    /// Pooling head; that of the published network by default
    #[arg(long, value_name = "NAME")]
    head: Option<String>,
    /// Images
    #[arg(long, value_name = "B", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Side of the images
    #[arg(long, value_name = "PIXELS", default_value_t = 224, value_parser = clap::value_parser!(u16).range(1..))]
    size: u16,
    /// Outputs of the classifier
    #[arg(long, value_name = "K", default_value_t = 1000)]
    classes: usize,
    /// Keep the inputs of residual blocks alone and compute the rest again in the backward pass
    #[arg(long)]
    checkpoint: bool,
    #[command(flatten)]
    device: DeviceArg,
    /// On a GPU: products in f32, rounded to TF32, or feature maps in bf16
    #[arg(long, value_enum, default_value_t = PrecisionArg::F32)]
    precision: PrecisionArg,
    /// On a GPU, the covariance layer's kernel, as `gpu.layer` of a spec: auto, fastest, tiles, tensor-cores, ...
    #[arg(long, value_name = "KERNEL", default_value_t)]
    layer: GpuKernel,
    /// On a GPU, how algorithms of convolutions are found, as `gpu.convolutions` of a spec: ranked or timed
    #[arg(long, value_name = "HOW", default_value_t)]
    convolutions: Search,
    /// Time each kind of op too, at the shapes of a ResNet
    #[arg(long)]
    ops: bool,
    /// Seconds of measuring, at least three rounds (twice as many with --ops)
    #[arg(long, value_name = "S", default_value_t = 10.0)]
    budget: f64,
}

/// How a network computes.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PrecisionArg {
    F32,
    Tf32,
    Bf16,
}

impl From<PrecisionArg> for Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::F32 => Self::F32,
            PrecisionArg::Tf32 => Self::Tf32,
            PrecisionArg::Bf16 => Self::Bf16,
        }
    }
}

impl NetworkBench {
    fn run(&self, json: bool) -> anyhow::Result<()> {
        let name = match &self.head {
            Some(head) => format!("{}+{head}", self.model),
            None => self.model.clone(),
        };
        let mut model = ModelSpec::named(&name, self.classes)?;
        let head = model.representation.name.clone();
        if self.checkpoint {
            model.backbone = model.backbone.with("checkpoint", true);
        }
        let batch = usize::from(self.batch);
        let (device, precision) = (self.device.open()?, Precision::from(self.precision));
        precision.begin(&device)?;
        let gpu_spec = GpuSpec {
            layer: self.layer,
            convolutions: self.convolutions,
        };
        gpu_spec.begin();
        let case = NetworkCase {
            model,
            batch,
            side: usize::from(self.size),
            maps: precision.maps(),
        };
        let budget = Duration::try_from_secs_f64(self.budget).context("--budget")?;
        let name = format!(
            "network {} {head} batch={batch} size={}{}{}",
            self.model,
            self.size,
            match precision {
                Precision::F32 => String::new(),
                other => format!(" {other}"),
            },
            if self.checkpoint { " checkpoint" } else { "" }
        );
        let name = match gpu_spec.is_default() || device.is_cpu() {
            true => name,
            false => format!(
                "{name} layer={} convolutions={}",
                self.layer, self.convolutions
            ),
        };
        let time = network(&case, &device, budget).map_err(|error| {
            let said = isqrt_train::without_backtrace(&error.to_string());
            match isqrt_device::is_out_of_memory(&said) {
                true => anyhow::anyhow!(
                    "{said}; a step of {batch} images does not fit: take a smaller --batch"
                ),
                false => error.into(),
            }
        })?;
        // Before the ops, which need other memory.
        let memory = peak_memory_mb();
        let on_gpu = peak_gpu_memory_mb(std::slice::from_ref(&device));
        let rows = match self.ops {
            true => ops(batch, &device, budget)?,
            false => Vec::new(),
        };
        let threads = rayon::current_num_threads();
        let gpu = isqrt_device::gpu_of(&device);
        let peak = gpu.as_ref().map(|gpu| precision.peak(gpu));
        let share = peak.zip(time.gflops).map(|(peak, rate)| rate * 1e9 / peak);
        let images_per_s = batch as f64 / time.step_ms * 1e3;
        if json {
            output::json(&serde_json::json!({
                "case": name,
                "implementation": "ours",
                "device": isqrt_device::name(&device),
                "precision": precision.to_string(),
                "threads": threads,
                "forward_ms": time.forward_ms,
                "backward_ms": time.backward_ms,
                "update_ms": time.update_ms,
                "step_ms": time.step_ms,
                "eval_ms": time.eval_ms,
                "images_per_s": images_per_s,
                "gflops": time.gflops,
                "peak_share": share,
                "parameters": time.parameters,
                "peak_memory_mb": memory,
                "peak_gpu_memory_mb": on_gpu,
                "measured_kernels": isqrt_linalg::measured_kernels(),
            }))?;
            for r in &rows {
                output::json(&serde_json::json!({
                    "case": format!("{} batch={batch}", r.name),
                    "implementation": "ours",
                    "threads": threads,
                    "forward_ms": r.forward_ms,
                    "backward_ms": r.backward_ms,
                    "dx_ms": r.dx_ms,
                    "dw_ms": r.dw_ms,
                    "gflops": r.gflops,
                    "peak_share": r.peak_share,
                }))?;
            }
            return Ok(());
        }
        let on = match &gpu {
            Some(gpu) => gpu.name.clone(),
            None => format!("{threads} threads"),
        };
        output::line(&format!("{name}, {on}, {} parameters", time.parameters))?;
        let part = |name: &str, ms: f64| vec![name.to_owned(), show(ms), show(ms / batch as f64)];
        let parts = vec![
            part("forward", time.forward_ms),
            part("backward", time.backward_ms),
            part("update", time.update_ms),
            part("training step", time.step_ms),
            part("evaluation", time.eval_ms),
        ];
        output::table(&["part", "ms", "ms/image"], parts, 1)?;
        let memory = match on_gpu {
            Some(mb) => format!("; peak memory on the GPU {mb:.0} MB"),
            None => memory.map_or_else(String::new, |m| format!("; peak memory {m:.0} MB")),
        };
        let rate = time.gflops.map_or_else(String::new, |rate| {
            let share =
                share.map_or_else(String::new, |s| format!(" ({:.0} % of peak)", 100.0 * s));
            format!(", {} GFLOP/s{share}", show(rate))
        });
        output::line(&format!(
            "training {} images/s{rate}{memory}",
            show(images_per_s)
        ))?;
        for line in isqrt_linalg::measured_kernels() {
            output::line(&line)?;
        }
        if rows.is_empty() {
            return Ok(());
        }
        let or_blank = |value: Option<f64>| value.map_or_else(String::new, show);
        let cells = rows.iter().map(|r| {
            let percent = |share: f64| format!("{:.0} %", 100.0 * share);
            vec![
                r.name.to_owned(),
                show(r.forward_ms),
                show(r.backward_ms),
                or_blank(r.dx_ms),
                or_blank(r.dw_ms),
                or_blank(r.gflops),
                r.peak_share.map_or_else(String::new, percent),
            ]
        });
        let head = [
            "op",
            "forward ms",
            "backward ms",
            "dX ms",
            "dW ms",
            "GFLOP/s",
            "of peak",
        ];
        output::table(&head, cells.collect(), 1)?;
        if gpu.is_some() {
            return Ok(());
        }
        let peak = peak_gflops(Kernel::Auto)?;
        output::line(&format!(
            "measured peak {} GFLOP/s; rates count the products of the definition, and 3x3 kernels of \
             stride 1 take fewer (Winograd)",
            show(peak)
        ))
    }
}

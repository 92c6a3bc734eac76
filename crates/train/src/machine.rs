//! What machine and which version of the code gave a number.

use candle_core::Device;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The machine, as recorded with every number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// Processor, as the operating system names it.
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Threads that were used.
    pub threads: usize,
    /// Operating system and architecture.
    pub os: String,
    /// `cpu`, or each GPU: `cuda:0 (NVIDIA H100 80GB HBM3)`.
    pub device: String,
}

impl Machine {
    /// This machine, with the threads of the current rayon pool; the work is done by the CPU.
    pub fn here() -> Self {
        Self::on(&[Device::Cpu])
    }

    /// This machine, the work done by these devices.
    pub fn on(devices: &[Device]) -> Self {
        let name = |device: &Device| {
            let name = isqrt_device::name(device);
            match isqrt_device::gpu_of(device) {
                Some(gpu) => format!("{name} ({})", gpu.name),
                None => name,
            }
        };
        Self {
            cpu: cpu_model().unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            threads: rayon::current_num_threads(),
            os: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            device: devices.iter().map(name).collect::<Vec<_>>().join(", "),
        }
    }
}

fn cpu_model() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("model name"))?;
    let (_, name) = line.split_once(':')?;
    Some(name.trim().to_owned())
}

/// The commit of the checkout that the program runs in, or else of the one it was built from;
/// `unknown` without git.
pub fn commit() -> String {
    git_head(Path::new("."))
        .or_else(|| git_head(Path::new(env!("CARGO_MANIFEST_DIR"))))
        .unwrap_or_else(|| "unknown".to_owned())
}

/// `git rev-parse`, but only if the folder is a checkout of this project.
fn git_head(dir: &Path) -> Option<String> {
    let git = |args: &[&str]| {
        let out = std::process::Command::new("git")
            .arg("-C")
            .arg(dir)
            .args(args)
            .output()
            .ok()?;
        out.status
            .success()
            .then(|| String::from_utf8_lossy(&out.stdout).trim().to_owned())
    };
    let root = git(&["rev-parse", "--show-toplevel"])?;
    if !Path::new(&root).join("crates/linalg").is_dir() {
        return None;
    }
    let head = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changed.is_empty() {
        head
    } else {
        format!("{head}+changes")
    })
}

/// Largest memory that this process has had, in MB, where the system tells.
pub fn peak_memory_mb() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kilobytes: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes / 1024.0)
}

/// Largest memory that tensors and scratch of this process took of one of these GPUs so far, in MB.
pub fn peak_gpu_memory_mb(devices: &[candle_core::Device]) -> Option<f64> {
    let most = devices.iter().filter_map(isqrt_device::peak_memory).max()?;
    Some(most as f64 / (1 << 20) as f64)
}

/// Processor time of this process so far, all threads, in seconds; 0 where the system does not tell.
pub fn cpu_seconds() -> f64 {
    // Linux counts in hundredths here whatever its own clock (proc(5), `utime` and `stime`).
    const TICKS: f64 = 100.0;
    let read = || -> Option<f64> {
        let text = std::fs::read_to_string("/proc/self/stat").ok()?;
        // The name of the program, which may hold spaces, ends at the last bracket.
        let (_, rest) = text.rsplit_once(')')?;
        let mut fields = rest.split_whitespace().skip(11);
        let mut next = || fields.next()?.parse::<f64>().ok();
        Some((next()? + next()?) / TICKS)
    };
    read().unwrap_or(0.0)
}

/// Seconds since 1970.
pub fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

/// A time as `2026-01-31 13:05 UTC`.
pub fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days to a civil date, counted in 400-year eras that begin on 1 March.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02} UTC",
        rest / 3600,
        rest % 3600 / 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn work_takes_processor_time_and_memory() {
        let before = cpu_seconds();
        let start = std::time::Instant::now();
        let mut sum = 0_u64;
        while start.elapsed().as_millis() < 200 {
            sum = std::hint::black_box(sum + 1);
        }
        let took = cpu_seconds() - before;
        assert!((0.05..60.0).contains(&took), "{took}");
        assert!(peak_memory_mb().is_some_and(|mb| mb > 1.0));
    }

    #[test]
    fn dates_of_known_moments() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(date(1_767_225_599), "2025-12-31 23:59 UTC");
    }
}

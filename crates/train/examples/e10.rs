//! Trains the small texture network on the embedded set with several heads and prints error and
//! seconds: `cargo run --release -p isqrt-train --example e10 -- DIR [HEAD[=RATE]...]`.
#![allow(clippy::print_stdout)]

use std::path::Path;
use std::sync::Arc;

use isqrt_datasets::{DataSet, Pipeline, e10};
use isqrt_models::RepresentationSpec;
use isqrt_train::{Silent, TrainConfig, train};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments
        .next()
        .ok_or("which folder may the images go to?")?;
    let wanted: Vec<String> = arguments.collect();
    e10::generate(Path::new(&folder), 1, e10::Sizes::default())?;
    let data = DataSet::open(Path::new(&folder), &Pipeline::identity(), 1)?;
    let isqrt = |n: i64| RepresentationSpec::new("isqrt").with("iterations", n);
    let heads = [
        ("gap", RepresentationSpec::new("gap"), 0.5),
        ("cov", RepresentationSpec::new("cov"), 0.2),
        ("n1", isqrt(1), 0.3),
        ("n3", isqrt(3), 0.3),
        ("n5", isqrt(5), 0.3),
        ("n7", isqrt(7), 0.3),
        ("mpn", RepresentationSpec::new("mpn"), 0.3),
    ];
    for (name, head, lr) in heads {
        let rates: Vec<f64> = match wanted.is_empty() {
            true => vec![lr],
            false => wanted.iter().filter_map(|w| rate(w, name, lr)).collect(),
        };
        for lr in rates {
            let config: TrainConfig = serde_json::from_value(serde_json::json!({
                "model": { "backbone": "e10net", "representation": &head, "classes": 10 },
                "epochs": 25, "batch": 64, "lr": lr, "weight_decay": 5e-4, "seed": 1
            }))?;
            let result = train(
                &config,
                Arc::clone(&data.train),
                Arc::clone(&data.test),
                &mut Silent,
            )?;
            println!(
                "{name:4} rate {lr:<5} error {:6.2} %  {:6.2} s",
                result.top1_error, result.seconds
            );
        }
    }
    Ok(())
}

/// The rate that `NAME` or `NAME=RATE` asks for.
fn rate(wanted: &str, name: &str, usual: f64) -> Option<f64> {
    match wanted.split_once('=') {
        None => (wanted == name).then_some(usual),
        Some((head, rate)) => (head == name).then(|| rate.parse().ok()).flatten(),
    }
}

fn main() {
    use candle_core::Var;
    use isqrt_linalg::{bench::*, *};
    use std::time::Instant;
    let b: Vec<usize> = std::env::args()
        .skip(1)
        .map(|a| a.parse().unwrap())
        .collect();
    for (n, p) in [(5, 784), (5, 196)] {
        let pool = if n == 0 {
            CovPool::with_schedule(Schedule::Cubic {
                steps: 3,
                lower: 0.1,
            })
        } else {
            CovPool::isqrt(n)
        };
        let x = Var::from_tensor(&synthetic_features(b[0], 256, p).unwrap()).unwrap();
        let (mut f, mut w) = (f64::MAX, f64::MAX);
        for _ in 0..b[1] {
            let s = Instant::now();
            let y = pool.forward(&x).unwrap();
            f = f.min(s.elapsed().as_secs_f64() * 1e3);
            let s = Instant::now();
            let g = y.backward().unwrap();
            w = w.min(s.elapsed().as_secs_f64() * 1e3);
            drop(g);
        }
        let d = pool.describe(256, p).unwrap();
        let (ff, fb) = (
            d.forward_multiply_adds * 2e-6 * b[0] as f64,
            d.backward_multiply_adds * 2e-6 * b[0] as f64,
        );
        println!(
            "N={n} M={p} min fwd {f:.2} ({:.0} GF) bwd {w:.2} ({:.0} GF) total {:.2} per image {:.2}",
            ff / f,
            fb / w,
            f + w,
            (f + w) / b[0] as f64
        );
    }
}

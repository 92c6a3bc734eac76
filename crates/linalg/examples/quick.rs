fn main() {
    use isqrt_linalg::{bench::*, *};
    let b: Vec<usize> = std::env::args()
        .skip(1)
        .map(|a| a.parse().unwrap())
        .collect();
    for (n, p) in [(5, 196), (3, 196), (5, 784)] {
        let case = LayerCase {
            pool: CovPool::isqrt(n),
            batch: b[0],
            d: 256,
            positions: p,
        };
        println!(
            "N={n} M={p} {:?}",
            layer(&case, std::time::Duration::from_millis(b[1] as u64)).unwrap()
        );
    }
    let case = LayerCase {
        pool: CovPool::with_schedule(Schedule::Cubic {
            steps: 3,
            lower: 0.1,
        }),
        batch: b[0],
        d: 256,
        positions: 196,
    };
    println!(
        "cubic3 {:?}",
        layer(&case, std::time::Duration::from_millis(b[1] as u64)).unwrap()
    );
    println!("peak {}", peak_gflops(Kernel::Auto).unwrap());
}

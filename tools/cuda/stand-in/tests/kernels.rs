//! Kernels compiled by nvcc, run by the interpreter.

use cuda_stand_in::memory::{self, Kind};
use cuda_stand_in::ptx::parse::{Init, Space};
use cuda_stand_in::ptx::{self, Failure, FailureKind, Globals, Launch, Module, Program};
use half::{bf16, f16};
use std::sync::Arc;

/// Values in device memory.
struct Buffer<T>(u64, usize, std::marker::PhantomData<T>);

impl<T: Copy> Buffer<T> {
    fn new(values: &[T]) -> Buffer<T> {
        let address = memory::allocate(size_of_val(values), Kind::Plain).unwrap();
        let to = address as *mut T;
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len()) };
        Buffer(address, values.len(), std::marker::PhantomData)
    }

    fn get(&self) -> Vec<T> {
        unsafe { std::slice::from_raw_parts(self.0 as *const T, self.1) }.to_vec()
    }
}

impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        memory::free(self.0, memory::is_device);
    }
}

fn module() -> Arc<Module> {
    Arc::new(Module::parse(include_str!("kernels/kernels.ptx").to_string()).unwrap())
}

fn globals(module: &Module) -> Globals {
    let mut globals = Globals::new();
    for v in module
        .variables
        .iter()
        .filter(|v| matches!(v.space, Space::Global | Space::Const))
    {
        let address = memory::allocate(v.size, Kind::Module).unwrap();
        for (n, init) in v.init.iter().enumerate() {
            let Init::Bits(bits) = init else {
                panic!("{init:?}")
            };
            let at = (address as usize + n * v.element) as *mut u8;
            let bytes = bits.to_le_bytes();
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, v.element.min(8)) };
        }
        globals.insert(v.name.clone(), address);
    }
    globals
}

/// Launches a kernel with parameters of 8 bytes (pointers) or 4 (numbers).
fn run(
    name: &str,
    grid: u32,
    block: u32,
    shared: u32,
    params: &[&dyn Param],
) -> Result<(), Failure> {
    let module = module();
    let program = Program::decode(&module, name, &globals(&module)).unwrap();
    assert!(
        program.unsupported().is_empty(),
        "{:?}",
        program.unsupported()
    );
    let mut bytes = vec![0u64; program.param_size.div_ceil(8)];
    let start = bytes.as_mut_ptr() as *mut u8;
    let all = unsafe { std::slice::from_raw_parts_mut(start, program.param_size) };
    assert_eq!(params.len(), program.params.len());
    for (p, &(offset, size)) in params.iter().zip(&program.params) {
        all[offset..offset + size].copy_from_slice(&p.bytes()[..size]);
    }
    let ranges = memory::ranges();
    ptx::launch(&Launch {
        program: &program,
        grid: [grid, 1, 1],
        block: [block, 1, 1],
        cluster: program.cluster.unwrap_or([1; 3]),
        dynamic_shared: shared,
        cooperative: false,
        workspace: 0,
        params: all,
        ranges: &ranges,
    })
}

trait Param {
    fn bytes(&self) -> [u8; 8];
}

impl<T> Param for Buffer<T> {
    fn bytes(&self) -> [u8; 8] {
        self.0.to_le_bytes()
    }
}

impl Param for i32 {
    fn bytes(&self) -> [u8; 8] {
        (*self as i64).to_le_bytes()
    }
}

#[test]
fn a_block_sums_in_shared_memory() {
    let x: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let (input, sums) = (Buffer::new(&x), Buffer::new(&[f32::NAN; 4]));
    run("block_sum", 4, 256, 0, &[&input, &sums, &1000]).unwrap();
    let expected: Vec<f32> = x.chunks(256).map(|c| c.iter().sum()).collect();
    assert_eq!(sums.get(), expected);
}

#[test]
fn lanes_exchange_values() {
    let x: Vec<i32> = (0..32).map(|i| i * i % 37).collect();
    let (input, out) = (Buffer::new(&x), Buffer::new(&[-1i32; 224]));
    run("warp_ops", 1, 32, 0, &[&input, &out]).unwrap();
    let out = out.get();
    let ballot = (0..32).fold(0, |b, i| b | (x[i] & 1) << i);
    for i in 0..32 {
        assert_eq!(out[i], x.iter().sum::<i32>());
        assert_eq!(out[32 + i], if i < 3 { x[i] } else { x[i - 3] });
        assert_eq!(out[64 + i], if i % 16 + 5 > 15 { x[i] } else { x[i + 5] });
        assert_eq!(out[96 + i], x[i / 8 * 8 + (i + 1) % 8]);
        assert_eq!(out[128 + i], ballot);
        assert_eq!(out[160 + i], x.contains(&7) as i32 + 2);
        assert_eq!(out[192 + i], if i % 2 == 1 { x[31] } else { 16 });
    }
}

#[test]
fn loops_diverge() {
    let out = Buffer::new(&[0u32; 300]);
    run("collatz", 3, 128, 0, &[&out, &300]).unwrap();
    for (i, steps) in out.get().into_iter().enumerate() {
        let (mut v, mut expected) = (i as u64 + 1, 0);
        while v != 1 {
            v = if v % 2 == 1 { 3 * v + 1 } else { v / 2 };
            expected += 1;
        }
        assert_eq!(steps, expected, "of {}", i + 1);
    }
}

#[test]
fn atomics_lose_nothing() {
    let x: Vec<u32> = (0..5000u32)
        .map(|i| i.wrapping_mul(2654435761) >> 20)
        .collect();
    let (input, bins) = (Buffer::new(&x), Buffer::new(&[0u32; 16]));
    let (sum, sum64) = (Buffer::new(&[0f32]), Buffer::new(&[0f64]));
    let (largest, count) = (Buffer::new(&[i32::MIN]), Buffer::new(&[0u32]));
    run(
        "atomics",
        8,
        128,
        0,
        &[&input, &5000, &bins, &sum, &sum64, &largest, &count],
    )
    .unwrap();
    let mut expected = [0u32; 16];
    x.iter().for_each(|v| expected[(v % 16) as usize] += 1);
    assert_eq!(bins.get(), expected);
    assert_eq!(sum.get()[0], x.iter().map(|v| v % 8).sum::<u32>() as f32);
    assert_eq!(sum64.get()[0], x.iter().sum::<u32>() as f64);
    assert_eq!(largest.get()[0], x.iter().copied().max().unwrap() as i32);
    assert_eq!(count.get()[0], 5000);
}

#[test]
fn elementary_functions_agree_with_the_hosts() {
    let x = [0.0f64, 1.0, -2.5, 1e5, 1e9, -12345.678, 0.1, 300.5];
    let n = x.len();
    let (input, out) = (Buffer::new(&x), Buffer::new(&vec![0f64; 12 * n]));
    run("functions", 1, 32, 0, &[&input, &out, &(n as i32)]).unwrap();
    let out = out.get();
    for (i, &v) in x.iter().enumerate() {
        let f = v as f32;
        let close = |k: usize, expected: f64, tolerance: f64| {
            let got = out[k * n + i];
            let good = got == expected || (got - expected).abs() <= tolerance * expected.abs();
            assert!(good, "function {k} of {v}: {got}, not {expected}");
        };
        close(0, v.sin(), 1e-13);
        close(1, (v * 1e-3).exp(), 1e-13);
        close(2, v / 3.0, 0.0);
        close(3, v.abs().sqrt(), 0.0);
        close(4, (f as f64).sin(), 3e-6);
        close(5, ((f * 1e-3) as f64).exp() as f32 as f64, 1e-6);
        close(6, f16::from_f32(f).to_f64(), 0.0);
        close(7, bf16::from_f32(f).to_f64(), 0.0);
        close(8, f.round_ties_even() as i32 as f64, 0.0);
        close(9, v.trunc(), 0.0);
        let exact = f as f64 + 0.1f32 as f64;
        let (zero, down) = (out[10 * n + i], out[11 * n + i]);
        assert!(zero.abs() <= exact.abs() && (zero - exact).abs() <= exact.abs() * 1.2e-7);
        assert!(down <= exact && exact - down <= exact.abs() * 1.2e-7);
    }
}

fn product(a: &[f64], b: &[f64], (m, n, k): (usize, usize, usize)) -> Vec<f64> {
    let entry = |i: usize, j: usize| (0..k).map(|d| a[i * k + d] * b[d * n + j]).sum();
    (0..m * n).map(|at| entry(at / n, at % n)).collect()
}

fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed;
    (0..n)
        .map(|_| {
            s = s.wrapping_mul(1664525).wrapping_add(1013904223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn assert_near(got: &[f32], expected: &[f64], tolerance: f64) {
    for (g, e) in got.iter().zip(expected) {
        assert!((*g as f64 - e).abs() <= tolerance, "{g}, not {e}");
    }
}

#[test]
fn tf32_products_have_tf32s_error() {
    let (a, b) = (numbers(128, 1), numbers(64, 2));
    let (x, y, d) = (
        Buffer::new(&a),
        Buffer::new(&b),
        Buffer::new(&[f32::NAN; 128]),
    );
    run("mma_tf32", 1, 32, 0, &[&x, &y, &d]).unwrap();
    let exact = |v: &[f32]| v.iter().map(|&v| v as f64).collect::<Vec<_>>();
    let whole = product(&exact(&a), &exact(&b), (16, 8, 8));
    assert_near(&d.get(), &whole, 5e-3);
    let cut = |v: &[f32]| {
        let round = |v: f32| f32::from_bits((v.to_bits() + 0x1000) & !0x1FFF) as f64;
        v.iter().map(|&v| round(v)).collect::<Vec<_>>()
    };
    assert_near(&d.get(), &product(&cut(&a), &cut(&b), (16, 8, 8)), 1e-6);
    assert!(
        d.get()
            .iter()
            .zip(&whole)
            .any(|(g, e)| (*g as f64 - e).abs() > 1e-5)
    );
}

#[test]
fn bf16_products_come_by_ldmatrix() {
    let halves = |v: Vec<f32>| v.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
    let (a, b) = (halves(numbers(256, 3)), halves(numbers(128, 4)));
    let (x, y, d) = (
        Buffer::new(&a),
        Buffer::new(&b),
        Buffer::new(&[f32::NAN; 128]),
    );
    run("mma_bf16", 1, 32, 0, &[&x, &y, &d]).unwrap();
    let exact = |v: &[bf16]| v.iter().map(|v| v.to_f64()).collect::<Vec<_>>();
    assert_near(
        &d.get(),
        &product(&exact(&a), &exact(&b), (16, 8, 16)),
        1e-6,
    );
}

#[test]
fn doubles_multiply_by_matrices() {
    let doubles = |v: Vec<f32>| v.into_iter().map(|v| v as f64).collect::<Vec<_>>();
    let (a, b) = (doubles(numbers(32, 5)), doubles(numbers(32, 6)));
    let (x, y, d) = (
        Buffer::new(&a),
        Buffer::new(&b),
        Buffer::new(&[f64::NAN; 64]),
    );
    run("mma_f64", 1, 32, 0, &[&x, &y, &d]).unwrap();
    for (g, e) in d.get().iter().zip(product(&a, &b, (8, 8, 4))) {
        assert!((g - e).abs() < 1e-15);
    }
}

#[test]
fn asynchronous_copies_fill_with_zeros() {
    let x: Vec<f32> = (0..256).map(|i| i as f32).collect();
    let (input, out) = (Buffer::new(&x), Buffer::new(&[f32::NAN; 256]));
    run("async_copy", 1, 64, 1024, &[&input, &out]).unwrap();
    for (i, v) in out.get().chunks(4).enumerate() {
        let from = 4 * (63 - i);
        let expected = [2.0 * x[from], 2.0 * x[from + 1], 2.0 * x[from + 2], 0.0];
        assert_eq!(v, expected);
    }
    // Without the dynamic shared memory it is an error.
    let e = run("async_copy", 1, 64, 0, &[&input, &out]).unwrap_err();
    assert_eq!(e.kind, FailureKind::IllegalAddress);
}

#[test]
fn a_store_past_the_end_fails() {
    let x = Buffer::new(&[0f32; 20]);
    run("out_of_bounds", 1, 32, 0, &[&x, &20, &0]).unwrap();
    let e = run("out_of_bounds", 1, 32, 0, &[&x, &20, &1]).unwrap_err();
    assert_eq!(e.kind, FailureKind::IllegalAddress);
    for part in [
        "out_of_bounds",
        "block [0, 0, 0] thread [20, 0, 0]",
        "st.global",
        "0 bytes past",
    ] {
        assert!(e.text.contains(part), "{}", e.text);
    }
}

#[test]
fn waiting_at_different_barriers_is_a_deadlock() {
    let x = Buffer::new(&[0i32; 64]);
    let e = run("deadlock", 1, 64, 0, &[&x]).unwrap_err();
    assert_eq!(e.kind, FailureKind::LaunchFailed);
    assert!(
        e.text.contains("deadlock") && e.text.contains("Barrier(2, 64)"),
        "{}",
        e.text
    );
}

#[test]
fn halves_hand_over_at_named_barriers() {
    let x = Buffer::new(&[0i32; 64]);
    run("named_barriers", 1, 64, 0, &[&x]).unwrap();
    let out = x.get();
    assert!(out[..32].iter().all(|&v| v == 42));
    assert!(out[32..].iter().all(|&v| v == 32));
}

#[test]
fn blocks_of_a_cluster_read_each_other() {
    let x = Buffer::new(&[0i32; 128]);
    run("clusters", 4, 32, 0, &[&x]).unwrap();
    for (i, v) in x.get().into_iter().enumerate() {
        let other = (i / 32 % 2) ^ 1;
        assert_eq!(v, (100 * other + i % 32) as i32);
    }
}

#[test]
fn variables_and_recursion() {
    let (x, y) = (Buffer::new(&[0f32; 32]), Buffer::new(&[0i32; 32]));
    run("variables", 1, 32, 0, &[&x, &y, &3]).unwrap();
    let table = [1.0, 2.0, 4.0, 8.0];
    let mut local = [0.0; 8];
    for i in 0..8 {
        local[i * 3 % 8] = table[i % 4] * i as f32;
    }
    for (i, (v, f)) in x.get().into_iter().zip(y.get()).enumerate() {
        assert_eq!(v, local[i % 8]);
        assert_eq!(f, (1..=i as i32 % 8).product::<i32>() + 5);
    }
}

/// Not a check but a measurement: run it with `--ignored --nocapture` in release.
#[test]
#[ignore]
fn speed() {
    let x = Buffer::new(&[0f32; 64 * 256]);
    let before = ptx::run::STEPS.load(std::sync::atomic::Ordering::Relaxed);
    let start = std::time::Instant::now();
    run("chain", 64, 256, 0, &[&x, &2000]).unwrap();
    let steps = ptx::run::STEPS.load(std::sync::atomic::Ordering::Relaxed) - before;
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{:.0} million instructions a second",
        steps as f64 / seconds / 1e6
    );
}

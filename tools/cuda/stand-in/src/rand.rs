//! cuRAND: numbers of the right distributions, not the library's own sequences.

use crate::driver::export;
use crate::{device, memory, stream};
use std::ffi::c_int;
use std::sync::{Arc, Mutex};

const SUCCESS: c_int = 0;
const LENGTH_NOT_MULTIPLE: c_int = 105;
const LAUNCH_FAILURE: c_int = 201;

/// A counter hashed by SplitMix64, so that any offset is reached at once.
#[derive(Default)]
struct State {
    seed: u64,
    at: u64,
}

impl State {
    fn next(&mut self) -> u64 {
        self.at += 1;
        let mut z = self
            .seed
            .wrapping_add(self.at.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In (0, 1], as cuRAND's.
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        let r = (-2.0 * self.uniform().ln()).sqrt();
        r * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

#[derive(Default)]
pub struct Generator {
    state: Arc<Mutex<State>>,
    stream: usize,
}

unsafe fn generate<T: 'static>(
    g: *const Generator,
    to: u64,
    n: usize,
    draw: impl Fn(&mut State) -> T + Send + Sync + 'static,
) -> c_int {
    let (state, on) = unsafe { ((*g).state.clone(), (*g).stream) };
    let e = stream::submit(on, move || {
        if !memory::check("curandGenerate", to, (n * size_of::<T>()) as u64) {
            return device::ILLEGAL_ADDRESS;
        }
        let mut state = state.lock().unwrap();
        for i in 0..n {
            unsafe { (to as *mut T).add(i).write(draw(&mut state)) };
        }
        device::SUCCESS
    });
    if e == device::SUCCESS {
        SUCCESS
    } else {
        LAUNCH_FAILURE
    }
}

/// The nearest f32 of a number in (0, 1] must not be 0.
fn unit32(u: f64) -> f32 {
    (u as f32).max(f32::MIN_POSITIVE)
}

export! {
    fn curandGetVersion(version: *mut c_int) {
        *version = 10400;
        SUCCESS
    }

    fn curandCreateGenerator(generator: *mut *mut Generator, _kind: c_int) {
        *generator = Box::into_raw(Box::default());
        SUCCESS
    }

    fn curandDestroyGenerator(generator: *mut Generator) {
        drop(Box::from_raw(generator));
        SUCCESS
    }

    fn curandSetStream(generator: *mut Generator, stream: usize) {
        (*generator).stream = stream;
        SUCCESS
    }

    fn curandSetPseudoRandomGeneratorSeed(generator: *mut Generator, seed: u64) {
        let g = &*generator;
        *g.state.lock().unwrap() = State { seed, at: 0 };
        SUCCESS
    }

    fn curandSetGeneratorOffset(generator: *mut Generator, offset: u64) {
        let g = &*generator;
        g.state.lock().unwrap().at = offset;
        SUCCESS
    }

    fn curandGenerate(g: *mut Generator, to: u64, n: usize) {
        generate::<u32>(g, to, n, |s| (s.next() >> 32) as u32)
    }

    fn curandGenerateLongLong(g: *mut Generator, to: u64, n: usize) {
        generate::<u64>(g, to, n, |s| s.next())
    }

    fn curandGenerateUniform(g: *mut Generator, to: u64, n: usize) {
        generate::<f32>(g, to, n, |s| unit32(s.uniform()))
    }

    fn curandGenerateUniformDouble(g: *mut Generator, to: u64, n: usize) {
        generate::<f64>(g, to, n, |s| s.uniform())
    }

    fn curandGenerateNormal(g: *mut Generator, to: u64, n: usize, mean: f32, deviation: f32) {
        // The real library takes even counts only, as it draws pairs.
        if !n.is_multiple_of(2) {
            return LENGTH_NOT_MULTIPLE;
        }
        generate::<f32>(g, to, n, move |s| mean + deviation * s.normal() as f32)
    }

    fn curandGenerateNormalDouble(g: *mut Generator, to: u64, n: usize, mean: f64, deviation: f64) {
        if !n.is_multiple_of(2) {
            return LENGTH_NOT_MULTIPLE;
        }
        generate::<f64>(g, to, n, move |s| mean + deviation * s.normal())
    }

    fn curandGenerateLogNormal(g: *mut Generator, to: u64, n: usize, mean: f32, deviation: f32) {
        if !n.is_multiple_of(2) {
            return LENGTH_NOT_MULTIPLE;
        }
        generate::<f32>(g, to, n, move |s| (mean + deviation * s.normal() as f32).exp())
    }

    fn curandGenerateLogNormalDouble(
        g: *mut Generator, to: u64, n: usize, mean: f64, deviation: f64
    ) {
        if !n.is_multiple_of(2) {
            return LENGTH_NOT_MULTIPLE;
        }
        generate::<f64>(g, to, n, move |s| (mean + deviation * s.normal()).exp())
    }
}

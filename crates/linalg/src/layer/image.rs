//! One image, forward and backward: the algebra of `docs/method.md`.
//!
//! Features are centred and scaled by `2^-e / √M`, with `e` so that squares neither overflow nor
//! vanish; `2^e` returns in the epilogue of the last product. With `K = XᵀX/s` (or `A = XXᵀ/s`),
//! `c = √s` with post-compensation and 1 without:
//!
//! ```text
//! Gram side        C = (c/s) X q(K) Xᵀ     dK = L_q(K, (c/s) XᵀGX)
//!                  dX = 2 (c/s) G X q(K) + 2 X (dK/s + δ K^(p-1)),  δ = -h⟨G,C⟩/s - ⟨dK,K⟩/s
//! covariance side  C = c f(A)              dA = L_f(A, c G)
//!                  dX = 2 (dA/s + δ A^(p-1)) X,              δ = [c]⟨G,C⟩/2s - ⟨dA,A⟩/s
//! ```
//! where `h` is 1/2 with post-compensation and 1 without, and `p` the Schatten order of `s`.

use super::plan::{CHUNK, Iteration, Plan};
use crate::kernel::Isa;
use crate::kernel::buffer::with_workspace;
use crate::kernel::pack::{Combine, Pack, Upstream};
use crate::kernel::product::{Ahead, Matrix, Out, Product, Target, Term, Tile, full_tiles};
use crate::kernel::vector::Element;
use crate::program::{Epilogue, Register};
use crate::{Error, Output, Result};

/// What the backward pass needs again beside the iterates; `divisor` 0 marks constant features.
#[derive(Clone, Debug, Default)]
pub(super) struct Summary<T> {
    divisor: f64,
    exponent: i32,
    means: Vec<T>,
}

/// Hands out matrices of a workspace one after another.
struct Arena<T> {
    next: *mut T,
}

impl<T: Element> Arena<T> {
    fn matrix(&mut self, rows: usize, columns: usize) -> Matrix<T> {
        let matrix = Matrix::new(self.next, rows);
        // Stays within the workspace: its length is the sum of what is handed out.
        self.next = self.next.wrapping_add(Matrix::<T>::len(rows, columns));
        matrix
    }

    fn matrices(&mut self, count: usize, n: usize) -> Vec<Matrix<T>> {
        (0..count).map(|_| self.matrix(n, n)).collect()
    }
}

/// An image of a batch, ready to run.
pub(super) struct Image<'a, T: 'static> {
    pub plan: &'a Plan,
    pub isa: &'static Isa<T>,
    /// Position in the batch, for messages.
    pub index: usize,
    /// Split every product over the threads of the pool.
    pub team: bool,
    pub features: &'a [T],
}

impl<T: Element> Image<'_, T> {
    fn non_finite(&self, what: &'static str) -> Error {
        Error::NonFinite {
            index: self.index,
            what,
        }
    }

    fn factor(&self) -> f64 {
        1.0 / (self.plan.positions as f64).sqrt()
    }

    /// Means of the channels and the exponent of the scale, from the largest centred feature.
    fn statistics(&self) -> Result<(Vec<T>, i32)> {
        let mut most = 0.0_f64;
        let mut means = Vec::with_capacity(self.plan.d);
        for row in self.features.chunks_exact(self.plan.positions) {
            let (mean, distance) = self.isa.row_statistics(row);
            if !mean.is_finite() {
                return Err(self.non_finite("a feature"));
            }
            means.push(T::of(mean));
            most = most.max(distance);
        }
        // 2^±100 keeps the scale itself far from the ends of f32.
        let exponent = if most > 0.0 { most.log2().ceil() } else { 0.0 };
        Ok((means, exponent.clamp(-100.0, 100.0) as i32))
    }

    /// What the scaled output is multiplied by: `2^e`, or `2^2e` for the plain covariance, or 1.
    fn out_scale(&self, exponent: i32) -> f64 {
        2.0_f64.powi(match &self.plan.iteration {
            None => 2 * exponent,
            Some(iteration) if iteration.post_compensation => exponent,
            Some(_) => 0,
        })
    }

    fn pack(
        &self,
        means: &[T],
        exponent: i32,
        range: (usize, usize),
        plain: Option<Matrix<T>>,
        transposed: Option<Matrix<T>>,
    ) {
        let job = Pack {
            features: self.features,
            positions: self.plan.positions,
            range,
            means,
            scale: T::of(2.0_f64.powi(-exponent) * self.factor()),
            plain,
            transposed,
        };
        // SAFETY: the matrices were sized for these channels and positions.
        unsafe { self.isa.pack(&job) }
    }

    fn run(&self, tiles: &[Tile], product: Product<'_, T>) {
        // SAFETY: every matrix comes from an arena sized for its rows and columns, tiles cover
        // the product's shape.
        unsafe { self.isa.product(&product, tiles, self.team) }
    }

    fn symmetric(&self, n: usize, tiles: &[Tile], terms: &[Term<T>], outs: &[Out<'_, T>]) {
        self.symmetric_ahead(n, tiles, terms, outs, &[]);
    }

    /// A symmetric product that meanwhile fetches `n x n` matrices of the next one.
    fn symmetric_ahead(
        &self,
        n: usize,
        tiles: &[Tile],
        terms: &[Term<T>],
        outs: &[Out<'_, T>],
        blocks: &[*const T],
    ) {
        self.run(
            tiles,
            Product {
                rows: n,
                columns: n,
                symmetric: true,
                terms,
                outs,
                ahead: Ahead {
                    blocks,
                    length: Matrix::<T>::len(n, n),
                },
            },
        );
    }

    /// A symmetric product of two symmetric matrices of the iteration, into panels.
    fn multiply(&self, left: Matrix<T>, right: Matrix<T>, to: Matrix<T>) {
        let n = self.plan.n;
        self.symmetric(
            n,
            &self.plan.tiles_n,
            &[term(left, right, n)],
            &[into(to, 1.0, &[])],
        );
    }

    fn combine(&self, target: Matrix<T>, terms: &[(T, Matrix<T>)], diagonal: f64) {
        let job = Combine {
            n: self.plan.n,
            target,
            terms,
            diagonal: T::of(diagonal),
        };
        // SAFETY: the matrices are n x n.
        unsafe { self.isa.combine(&job) }
    }

    fn dot(&self, a: Matrix<T>, b: Matrix<T>) -> f64 {
        // SAFETY: both matrices are n x n.
        unsafe { self.isa.dot(self.plan.n, a, b) }
    }

    fn trace(&self, a: Matrix<T>) -> f64 {
        // SAFETY: the diagonal lies inside.
        (0..self.plan.n)
            .map(|i| unsafe { *a.element(i, i) }.wide())
            .sum()
    }

    /// The covariance of the scaled features, into panels or, for the last chunk, to `target`
    /// times `alpha`.
    fn covariance(
        &self,
        means: &[T],
        exponent: i32,
        arena: &mut Arena<T>,
        sum: Matrix<T>,
        last: Option<(Target<T>, f64)>,
    ) {
        let (d, positions) = (self.plan.d, self.plan.positions);
        let packed = arena.matrix(positions.min(CHUNK), d);
        for from in (0..positions).step_by(CHUNK) {
            let to = positions.min(from + CHUNK);
            let packed = Matrix::new(packed.at, to - from);
            self.pack(means, exponent, (from, to), None, Some(packed));
            let (target, alpha) = match last {
                Some((target, alpha)) if to == positions => (target, alpha),
                _ => (Target::Panels(sum), 1.0),
            };
            let before = [(T::of(alpha), sum)];
            let out = Out {
                target,
                alpha: T::of(alpha),
                terms: if from > 0 { &before } else { &[] },
                diagonal: T::default(),
            };
            self.symmetric(
                d,
                &self.plan.tiles_d,
                &[term(packed, packed, to - from)],
                &[out],
            );
        }
    }

    /// Divides `k` (the unnormalised Gram or covariance matrix) by its norm; 0 if it vanishes.
    fn normalize(&self, order: i32, exponent: i32, k: Matrix<T>, powers: &[Matrix<T>]) -> f64 {
        let trace = self.trace(k);
        if trace <= 0.0 {
            return 0.0;
        }
        let divisor = match order {
            0 => 2.0_f64.powi(-2 * exponent),
            1 => trace,
            2 => self.dot(k, k).sqrt(),
            _ => {
                self.combine(k, &[(T::of(1.0 / trace), k)], 0.0);
                self.multiply(k, k, powers[0]);
                self.multiply(powers[0], powers[0], powers[1]);
                let relative = self.dot(powers[1], powers[1]).powf(1.0 / 8.0);
                self.combine(k, &[(T::of(1.0 / relative), k)], 0.0);
                return trace * relative;
            }
        };
        self.combine(k, &[(T::of(1.0 / divisor), k)], 0.0);
        divisor
    }

    /// Runs the iteration; the result's epilogue may go elsewhere, times a factor.
    fn iterate(
        &self,
        iteration: &Iteration,
        registers: &[Matrix<T>],
        result: Option<(Target<T>, f64)>,
    ) {
        let program = &iteration.program;
        for (at, step) in program.steps.iter().enumerate() {
            let terms: Vec<Vec<(T, Matrix<T>)>> = step
                .outs
                .iter()
                .map(|out| {
                    let factor = match result {
                        Some((_, factor)) if out.register == program.result => factor,
                        _ => 1.0,
                    };
                    weights(out, factor, registers)
                })
                .collect();
            let outs: Vec<Out<'_, T>> = step
                .outs
                .iter()
                .zip(&terms)
                .map(|(out, terms)| {
                    let (target, factor) = match result {
                        Some(result) if out.register == program.result => result,
                        _ => (Target::Panels(registers[out.register]), 1.0),
                    };
                    Out {
                        target,
                        alpha: T::of(out.alpha * factor),
                        terms,
                        diagonal: T::of(out.diagonal * factor),
                    }
                })
                .collect();
            match step.product {
                Some((left, right)) => {
                    let product = term(registers[left], registers[right], self.plan.n);
                    // The next results go to memory that was last used a batch ago.
                    let next = program.steps.get(at + 1).map_or(&[][..], |next| &next.outs);
                    let ahead: Vec<*const T> = next
                        .iter()
                        .map(|out| registers[out.register].at.cast_const())
                        .collect();
                    let n = self.plan.n;
                    self.symmetric_ahead(n, &self.plan.tiles_n, &[product], &outs, &ahead);
                }
                // Only the Gram side has steps without a product, and its result stays here.
                None => {
                    for (out, terms) in step.outs.iter().zip(&terms) {
                        self.combine(registers[out.register], terms, out.diagonal);
                    }
                }
            }
        }
    }

    /// The tangent of the iteration at the kept values, from `tangents[0]` to the result.
    fn tangent(
        &self,
        iteration: &Iteration,
        values: &[Matrix<T>],
        derived: &[Epilogue],
        tangents: &[Matrix<T>],
    ) {
        let n = self.plan.n;
        let steps = &iteration.program.steps;
        for (at, step) in steps.iter().enumerate() {
            let terms: Vec<_> = step
                .outs
                .iter()
                .map(|out| weights(out, 1.0, tangents))
                .collect();
            let Some((left, right)) = step.product else {
                for (out, terms) in step.outs.iter().zip(&terms) {
                    self.combine(tangents[out.register], terms, 0.0);
                }
                continue;
            };
            for out in derived {
                if out.register == left || out.register == right {
                    let terms = weights(out, 1.0, values);
                    self.combine(values[out.register], &terms, out.diagonal);
                }
            }
            let outs: Vec<Out<'_, T>> = step
                .outs
                .iter()
                .zip(&terms)
                .map(|(out, terms)| into(tangents[out.register], out.alpha, terms))
                .collect();
            let products = [
                term(tangents[left], values[right], n),
                term(values[left], tangents[right], n),
            ];
            // The iterates were written a batch ago: fetch the next ones meanwhile.
            let next = steps.get(at + 1).and_then(|next| next.product);
            let ahead: Vec<*const T> = next
                .into_iter()
                .flat_map(|(l, r)| if l == r { vec![l] } else { vec![l, r] })
                .map(|register| values[register].at.cast_const())
                .collect();
            self.symmetric_ahead(n, &self.plan.tiles_n, &products, &outs, &ahead);
        }
    }

    fn target(&self, out: &mut [T]) -> Target<T> {
        match self.plan.output {
            Output::Triangle => Target::Triangle(out.as_mut_ptr(), self.plan.d),
            Output::Full => Target::Rows(out.as_mut_ptr(), self.plan.d),
        }
    }

    fn check_finite(&self, values: &[T], what: &'static str) -> Result<()> {
        if self.isa.all_finite(values) {
            Ok(())
        } else {
            Err(self.non_finite(what))
        }
    }

    /// Computes `out`; fills `kept` (if any) for the backward pass.
    pub(super) fn forward(&self, out: &mut [T], kept: Option<*mut T>) -> Result<Summary<T>> {
        let (means, exponent) = self.statistics()?;
        let out_scale = self.out_scale(exponent);
        let Some(iteration) = &self.plan.iteration else {
            let target = self.target(out);
            with_workspace(self.forward_len(), |start| {
                let mut arena = Arena { next: start };
                let sum = arena.matrix(self.plan.n, self.plan.n);
                self.covariance(&means, exponent, &mut arena, sum, Some((target, out_scale)));
            });
            self.check_finite(out, "the covariance (it overflows)")?;
            return Ok(Summary {
                divisor: 1.0,
                exponent,
                means,
            });
        };
        let divisor = with_workspace(self.forward_len(), |start| {
            let mut arena = Arena { next: start };
            let registers = self.registers(iteration, kept, &mut arena);
            let (divisor, packed) =
                self.normalized(iteration, &means, exponent, registers[0], &mut arena);
            if divisor == 0.0 {
                out.fill(T::default());
                return 0.0;
            }
            let factor = if iteration.post_compensation {
                divisor.sqrt()
            } else {
                1.0
            };
            let target = self.target(out);
            match packed {
                None => self.iterate(iteration, &registers, Some((target, factor * out_scale))),
                Some(packed) => {
                    self.iterate(iteration, &registers, None);
                    self.sandwich(iteration, &registers, packed, &mut arena, target, {
                        factor * out_scale / divisor
                    });
                }
            }
            divisor
        });
        self.check_finite(out, "the matrix square root")?;
        Ok(Summary {
            divisor,
            exponent,
            means,
        })
    }

    /// `alpha X Q Xᵀ` from `Xᵀ` in panels over the channels.
    fn sandwich(
        &self,
        iteration: &Iteration,
        registers: &[Matrix<T>],
        packed: Matrix<T>,
        arena: &mut Arena<T>,
        target: Target<T>,
        alpha: f64,
    ) {
        let (d, m) = (self.plan.d, self.plan.positions);
        let right = arena.matrix(m, d);
        self.run(
            &self.plan.tiles_positions_d,
            Product {
                rows: m,
                columns: d,
                symmetric: false,
                terms: &[term(registers[iteration.program.result], packed, m)],
                outs: &[into(right, 1.0, &[])],
                ahead: Ahead::NOTHING,
            },
        );
        let out = Out {
            target,
            alpha: T::of(alpha),
            terms: &[],
            diagonal: T::default(),
        };
        self.symmetric(d, &self.plan.tiles_d, &[term(packed, right, m)], &[out]);
    }

    /// The matrices of the registers in a forward pass: kept ones in `kept`, others in the arena.
    fn registers(
        &self,
        iteration: &Iteration,
        kept: Option<*mut T>,
        arena: &mut Arena<T>,
    ) -> Vec<Matrix<T>> {
        let n = self.plan.n;
        let (slots, count) = if kept.is_some() {
            &iteration.loose
        } else {
            &iteration.slots
        };
        let scratch = arena.matrices(*count, n);
        let mut stored = Arena {
            next: kept.unwrap_or(std::ptr::null_mut()),
        };
        let places = stored.matrices(
            if kept.is_some() {
                iteration.kept.len()
            } else {
                0
            },
            n,
        );
        (0..iteration.program.registers)
            .map(
                |register| match iteration.kept.iter().position(|&k| k == register) {
                    Some(place) if kept.is_some() => places[place],
                    _ => scratch[slots[register]],
                },
            )
            .collect()
    }

    /// The normalised matrix of the iteration into `k`. Returns the divisor, and on the Gram side
    /// the transposed features in panels over the channels.
    fn normalized(
        &self,
        iteration: &Iteration,
        means: &[T],
        exponent: i32,
        k: Matrix<T>,
        arena: &mut Arena<T>,
    ) -> (f64, Option<Matrix<T>>) {
        let (d, m, n) = (self.plan.d, self.plan.positions, self.plan.n);
        let powers = arena.matrices(if iteration.order > 2 { 2 } else { 0 }, n);
        let packed = if iteration.gram {
            let (plain, transposed) = (arena.matrix(d, m), arena.matrix(m, d));
            self.pack(means, exponent, (0, m), Some(plain), Some(transposed));
            self.symmetric(
                n,
                &self.plan.tiles_n,
                &[term(plain, plain, d)],
                &[into(k, 1.0, &[])],
            );
            Some(transposed)
        } else {
            self.covariance(means, exponent, arena, k, None);
            None
        };
        (
            self.normalize(iteration.order, exponent, k, &powers),
            packed,
        )
    }

    /// Workspace of a forward pass, in elements.
    fn forward_len(&self) -> usize {
        let (d, m, n) = (self.plan.d, self.plan.positions, self.plan.n);
        let square = Matrix::<T>::len(n, n);
        match &self.plan.iteration {
            None => square + Matrix::<T>::len(m.min(CHUNK), d),
            Some(iteration) => {
                let matrices = iteration.slots.1.max(iteration.loose.1) + 2;
                let features = if iteration.gram {
                    Matrix::<T>::len(d, m) + 2 * Matrix::<T>::len(m, d)
                } else {
                    Matrix::<T>::len(m.min(CHUNK), d)
                };
                matrices * square + features
            }
        }
    }

    /// Writes the gradient of the features.
    pub(super) fn backward(
        &self,
        summary: &Summary<T>,
        kept: Option<*mut T>,
        output: &[T],
        gradient: &[T],
        out: &mut [T],
    ) -> Result<()> {
        let (divisor, exponent, means) = (summary.divisor, summary.exponent, &summary.means);
        let dot = self.isa.flat_dot(gradient, output);
        if !dot.is_finite() {
            self.check_finite(gradient, "the upstream gradient")?;
        }
        if divisor == 0.0 {
            out.fill(T::default());
            return Ok(());
        }
        let out_scale = self.out_scale(exponent);
        let last = 2.0 * out_scale * 2.0_f64.powi(-exponent) * self.factor();
        let dot = dot / out_scale;
        with_workspace(self.backward_len(kept.is_some()), |start| {
            let mut arena = Arena { next: start };
            let (d, n) = (self.plan.d, self.plan.n);
            let Some(iteration) = &self.plan.iteration else {
                let upstream = arena.matrix(d, d);
                self.upstream(gradient, 1.0, upstream);
                self.gradient_of_covariance(means, exponent, upstream, &mut arena, last, out);
                return;
            };
            let factor = if iteration.post_compensation {
                divisor.sqrt()
            } else {
                1.0
            };

            // The iterates, kept or run again.
            let mut values = arena.matrices(1, n);
            values = match kept {
                Some(start) => {
                    let scratch = values[0];
                    let mut stored = Arena { next: start };
                    let places = stored.matrices(iteration.kept.len(), n);
                    (0..iteration.program.registers)
                        .map(|register| {
                            let place = iteration.kept.iter().position(|&k| k == register);
                            place.map_or(scratch, |place| places[place])
                        })
                        .collect()
                }
                None => {
                    values.extend(arena.matrices(iteration.program.registers - 1, n));
                    let mut rest = Arena { next: arena.next };
                    self.normalized(iteration, means, exponent, values[0], &mut rest);
                    self.iterate(iteration, &values, None);
                    values
                }
            };
            let derived: &[Epilogue] = if kept.is_some() {
                &iteration.derived
            } else {
                &[]
            };
            let slots = arena.matrices(iteration.slots.1, n);
            let tangents: Vec<Matrix<T>> =
                iteration.slots.0.iter().map(|&slot| slots[slot]).collect();
            let result = tangents[iteration.program.result];

            if iteration.gram {
                let m = n;
                let (upstream, plain) = (arena.matrix(d, d), arena.matrix(d, m));
                let product = arena.matrix(d, m);
                self.upstream(gradient, factor / divisor, upstream);
                self.pack(means, exponent, (0, m), Some(plain), None);
                self.run(
                    &self.plan.tiles_d_positions,
                    Product {
                        rows: d,
                        columns: m,
                        symmetric: false,
                        terms: &[term(upstream, plain, d)],
                        outs: &[into(product, 1.0, &[])],
                        ahead: Ahead::NOTHING,
                    },
                );
                let seed = [into(tangents[0], 1.0, &[])];
                self.symmetric(m, &self.plan.tiles_n, &[term(plain, product, d)], &seed);
                self.tangent(iteration, &values, derived, &tangents);
                let through = if iteration.post_compensation {
                    0.5
                } else {
                    1.0
                };
                let delta = -(through * dot + self.dot(result, values[0])) / divisor;
                self.add_norm(iteration, delta, divisor, values[0], result, &mut arena);
                let plain_term = |left, right| Term {
                    left,
                    plain: true,
                    right,
                    inner: m,
                };
                let rows = Out {
                    target: Target::Rows(out.as_mut_ptr(), m),
                    alpha: T::of(last),
                    terms: &[],
                    diagonal: T::default(),
                };
                self.run(
                    &self.plan.tiles_d_positions,
                    Product {
                        rows: d,
                        columns: m,
                        symmetric: false,
                        terms: &[
                            plain_term(product, values[iteration.program.result]),
                            plain_term(plain, result),
                        ],
                        outs: &[rows],
                        ahead: Ahead::NOTHING,
                    },
                );
            } else {
                self.upstream(gradient, factor, tangents[0]);
                self.tangent(iteration, &values, derived, &tangents);
                let through = if iteration.post_compensation {
                    0.5
                } else {
                    0.0
                };
                let delta = (through * dot - self.dot(result, values[0])) / divisor;
                self.add_norm(iteration, delta, divisor, values[0], result, &mut arena);
                self.gradient_of_covariance(means, exponent, result, &mut arena, last, out);
            }
        });
        Ok(())
    }

    fn upstream(&self, gradient: &[T], scale: f64, target: Matrix<T>) {
        let job = Upstream {
            gradient,
            d: self.plan.d,
            triangle: self.plan.output == Output::Triangle,
            scale: T::of(scale),
            target,
        };
        // SAFETY: the target is d x d, the gradient of the output's length.
        unsafe { self.isa.upstream(&job) }
    }

    /// `tangent <- tangent / s + delta K^(p-1)`: the path through the divisor.
    fn add_norm(
        &self,
        iteration: &Iteration,
        delta: f64,
        divisor: f64,
        k: Matrix<T>,
        tangent: Matrix<T>,
        arena: &mut Arena<T>,
    ) {
        let scaled = (T::of(1.0 / divisor), tangent);
        match iteration.order {
            0 => self.combine(tangent, &[scaled], 0.0),
            1 => self.combine(tangent, &[scaled], delta),
            2 => self.combine(tangent, &[scaled, (T::of(delta), k)], 0.0),
            _ => {
                let powers = arena.matrices(3, self.plan.n);
                self.multiply(k, k, powers[0]);
                self.multiply(powers[0], powers[0], powers[1]);
                self.multiply(powers[0], powers[1], powers[2]);
                self.multiply(powers[2], k, powers[0]);
                self.combine(tangent, &[scaled, (T::of(delta), powers[0])], 0.0);
            }
        }
    }

    /// `out = last * gradient . X`, a chunk of positions at a time.
    fn gradient_of_covariance(
        &self,
        means: &[T],
        exponent: i32,
        gradient: Matrix<T>,
        arena: &mut Arena<T>,
        last: f64,
        out: &mut [T],
    ) {
        let (d, positions) = (self.plan.d, self.plan.positions);
        let packed = arena.matrix(d, positions.min(CHUNK));
        for from in (0..positions).step_by(CHUNK) {
            let to = positions.min(from + CHUNK);
            self.pack(means, exponent, (from, to), Some(packed), None);
            let rest;
            let tiles = if to - from == positions.min(CHUNK) {
                &self.plan.tiles_d_positions
            } else {
                rest = full_tiles(d, to - from, T::WIDTH, self.isa.shape);
                &rest
            };
            let rows = Out {
                target: Target::Rows(out[from..].as_mut_ptr(), positions),
                alpha: T::of(last),
                terms: &[],
                diagonal: T::default(),
            };
            self.run(
                tiles,
                Product {
                    rows: d,
                    columns: to - from,
                    symmetric: false,
                    terms: &[term(gradient, packed, d)],
                    outs: &[rows],
                    ahead: Ahead::NOTHING,
                },
            );
        }
    }

    /// Workspace of a backward pass, in elements; running the forward pass again needs no more.
    fn backward_len(&self, kept: bool) -> usize {
        let (d, m, n) = (self.plan.d, self.plan.positions, self.plan.n);
        let square = Matrix::<T>::len(n, n);
        let chunk = Matrix::<T>::len(d, m.min(CHUNK));
        match &self.plan.iteration {
            None => square + chunk,
            Some(iteration) => {
                let registers = if kept { 1 } else { iteration.program.registers };
                let matrices = registers + iteration.slots.1 + 3;
                let features = if iteration.gram {
                    Matrix::<T>::len(d, d) + 2 * Matrix::<T>::len(d, m)
                } else {
                    chunk
                };
                (matrices * square + features).max(registers * square + self.forward_len())
            }
        }
    }
}

fn term<T>(left: Matrix<T>, right: Matrix<T>, inner: usize) -> Term<T> {
    Term {
        left,
        plain: false,
        right,
        inner,
    }
}

fn into<T: Element>(matrix: Matrix<T>, alpha: f64, terms: &[(T, Matrix<T>)]) -> Out<'_, T> {
    Out {
        target: Target::Panels(matrix),
        alpha: T::of(alpha),
        terms,
        diagonal: T::default(),
    }
}

fn weights<T: Element>(
    out: &Epilogue,
    factor: f64,
    registers: &[Matrix<T>],
) -> Vec<(T, Matrix<T>)> {
    let weight =
        |&(weight, register): &(f64, Register)| (T::of(weight * factor), registers[register]);
    out.terms.iter().map(weight).collect()
}

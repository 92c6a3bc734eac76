//! The iteration as data: a list of symmetric products with linear epilogues over registers.
//!
//! All registers hold polynomials in the input `K`, so they are symmetric and commute. The
//! tangent of a program (its Fréchet derivative, which is also its adjoint) follows step by step:
//! `d(L·R) = dL·R + L·dR`, and the epilogue is linear.

use crate::schedule::{Polynomial, degree};

/// A register: a matrix of the iteration. Register 0 is the input `K`.
pub(crate) type Register = usize;

/// `register = alpha * product + sum of weighted registers + diagonal * I`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Epilogue {
    pub register: Register,
    pub alpha: f64,
    pub terms: Vec<(f64, Register)>,
    pub diagonal: f64,
}

/// A product of two registers with its epilogues; without a product, linear combinations alone.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Step {
    pub product: Option<(Register, Register)>,
    pub outs: Vec<Epilogue>,
}

/// What the program returns of the coupled pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Wanted {
    /// `Y`, the root of the input.
    Root,
    /// `Z`, so that `Y = K Z`.
    InverseRoot,
}

/// A straight-line program over registers.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub steps: Vec<Step>,
    pub registers: usize,
    pub result: Register,
}

struct Builder {
    steps: Vec<Step>,
    registers: usize,
}

impl Builder {
    fn fresh(&mut self) -> Register {
        self.registers += 1;
        self.registers - 1
    }

    fn linear(&mut self, terms: Vec<(f64, Register)>, diagonal: f64) -> Epilogue {
        Epilogue {
            register: self.fresh(),
            alpha: 0.0,
            terms,
            diagonal,
        }
    }

    fn scaled(&mut self, alpha: f64, terms: Vec<(f64, Register)>, diagonal: f64) -> Epilogue {
        Epilogue {
            alpha,
            ..self.linear(terms, diagonal)
        }
    }

    fn push(&mut self, left: Register, right: Register, outs: Vec<Epilogue>) {
        self.steps.push(Step {
            product: Some((left, right)),
            outs,
        });
    }

    fn multiply(&mut self, left: Register, right: Register) -> Register {
        let out = self.scaled(1.0, vec![], 0.0);
        let register = out.register;
        self.push(left, right, vec![out]);
        register
    }
}

/// `T₁T₀` of two cubic steps as a quartic in the first step's `M`.
fn two_at_once(first: &Polynomial, second: &Polynomial) -> Polynomial {
    let ([a0, b0, ..], [a1, b1, ..]) = (*first, *second);
    [
        a0 * a1,
        a0.powi(3) * b1 + b0 * a1,
        3.0 * a0 * a0 * b0 * b1,
        3.0 * a0 * b0 * b0 * b1,
        b0.powi(3) * b1,
    ]
}

impl Program {
    /// The coupled iteration `Y ← Y T, Z ← T Z`, `T` a polynomial in `M = ZY`, from `Y = K`,
    /// `Z = I`. Two cubic steps are taken at once: their product `T₁T₀` is a quartic in `M` that
    /// takes two products, as any quartic does (`docs/method.md`, "Two steps at once").
    pub(crate) fn new(coefficients: &[Polynomial], wanted: Wanted) -> Self {
        let mut b = Builder {
            steps: Vec::new(),
            registers: 1,
        };
        // Z = I is `None`.
        let (mut y, mut z): (Register, Option<Register>) = (0, None);
        let mut at = 0;
        while at < coefficients.len() {
            let first = coefficients[at];
            let second = coefficients.get(at + 1).filter(|next| degree(next) <= 1);
            let (factor, taken) = match second {
                Some(next) if degree(&first) <= 1 => (two_at_once(&first, next), 2),
                _ => (first, 1),
            };
            at += taken;
            let last = at == coefficients.len();
            let [c0, c1, c2, c3, c4] = factor;

            // A single cubic first step: T is linear in K, and Y = K T one product.
            if degree(&factor) <= 1 && z.is_none() {
                let mut outs = Vec::new();
                if !(last && wanted == Wanted::InverseRoot) {
                    let root = b.scaled(c1, vec![(c0, 0)], 0.0);
                    y = root.register;
                    outs.push(root);
                }
                let product = (!outs.is_empty()).then_some((0, 0));
                if !(last && wanted == Wanted::Root) {
                    let t = b.linear(vec![(c1, 0)], c0);
                    z = Some(t.register);
                    outs.push(t);
                }
                b.steps.push(Step { product, outs });
                continue;
            }

            // The factor T (or T₁T₀) as a register.
            let factor = if degree(&factor) <= 1 {
                let t = b.scaled(c1, vec![], c0);
                let register = t.register;
                // `z` is Some here: the first cubic step was handled above.
                b.push(z.unwrap_or(0), y, vec![t]);
                register
            } else if degree(&factor) == 2 {
                let m = z.map_or(y, |z| b.multiply(z, y));
                let t = b.scaled(c2, vec![(c1, m)], c0);
                let register = t.register;
                b.push(m, m, vec![t]);
                register
            } else {
                let m = z.map_or(y, |z| b.multiply(z, y));
                let square = b.scaled(1.0, vec![], 0.0);
                let w = b.scaled(c4, vec![(c3, m)], 0.0);
                let (square_register, w_register) = (square.register, w.register);
                b.push(m, m, vec![square, w]);
                let p = b.scaled(1.0, vec![(c1, m), (c2, square_register)], c0);
                let p_register = p.register;
                b.push(square_register, w_register, vec![p]);
                p_register
            };
            let before = z;
            if !(last && wanted == Wanted::Root) {
                z = Some(before.map_or(factor, |z| b.multiply(z, factor)));
            }
            if !(last && wanted == Wanted::InverseRoot) {
                y = b.multiply(y, factor);
            }
        }
        Self {
            steps: b.steps,
            registers: b.registers,
            result: match wanted {
                Wanted::Root => y,
                Wanted::InverseRoot => z.unwrap_or(0),
            },
        }
    }

    /// Products of the forward pass.
    pub(crate) fn products(&self) -> usize {
        self.steps.iter().filter(|s| s.product.is_some()).count()
    }

    /// How to compute a register that is a mere linear combination of two others that a later
    /// step multiplies anyway (`W = c₃M + c₄M²`): it is not worth keeping.
    fn derived(step: &Step, out: &Epilogue) -> Option<Epilogue> {
        let square = step.outs.iter().find(|o| {
            o.register != out.register && o.alpha == 1.0 && o.terms.is_empty() && o.diagonal == 0.0
        })?;
        let mut terms = out.terms.clone();
        terms.push((out.alpha, square.register));
        Some(Epilogue {
            register: out.register,
            alpha: 0.0,
            terms,
            diagonal: out.diagonal,
        })
    }

    /// The registers that the tangent reads: those to keep from the forward pass, and those to
    /// compute from kept ones.
    pub(crate) fn operands(&self) -> (Vec<Register>, Vec<Epilogue>) {
        let mut needed = vec![false; self.registers];
        for (left, right) in self.steps.iter().filter_map(|s| s.product) {
            needed[left] = true;
            needed[right] = true;
        }
        let derived: Vec<Epilogue> = self
            .steps
            .iter()
            .flat_map(|step| step.outs.iter().filter_map(|out| Self::derived(step, out)))
            .filter(|out| needed[out.register])
            .collect();
        for out in &derived {
            needed[out.register] = false;
        }
        let kept = (0..self.registers).filter(|&r| needed[r]).collect();
        (kept, derived)
    }

    /// The last step that reads each register; the number of steps for the result.
    pub(crate) fn last_read(&self) -> Vec<usize> {
        let mut last_read = vec![0; self.registers];
        for (at, step) in self.steps.iter().enumerate() {
            let terms = step
                .outs
                .iter()
                .flat_map(|out| out.terms.iter().map(|term| term.1));
            let operands = step
                .product
                .into_iter()
                .flat_map(|(left, right)| [left, right]);
            for register in terms.chain(operands) {
                last_read[register] = at;
            }
        }
        last_read[self.result] = self.steps.len();
        last_read
    }

    /// Assigns workspace slots to the registers that `wants` one, so that a slot serves again once
    /// its register has been read for the last time. Returns the slot of each register
    /// (`usize::MAX` for none) and their count. The same slots serve the tangents, which are read
    /// at the same steps.
    pub(crate) fn slots(&self, wants: impl Fn(Register) -> bool) -> (Vec<usize>, usize) {
        let last_read = self.last_read();
        let mut slots = vec![usize::MAX; self.registers];
        let (mut free, mut count) = (Vec::new(), 0);
        let mut take = |slot: &mut usize, free: &mut Vec<usize>| {
            *slot = free.pop().unwrap_or(count);
            count = count.max(*slot + 1);
        };
        if wants(0) {
            take(&mut slots[0], &mut free);
        }
        for (at, step) in self.steps.iter().enumerate() {
            for out in step.outs.iter().filter(|out| wants(out.register)) {
                take(&mut slots[out.register], &mut free);
            }
            let dead =
                |&register: &usize| last_read[register] == at && slots[register] != usize::MAX;
            free.extend(
                (0..self.registers)
                    .filter(dead)
                    .map(|register| slots[register]),
            );
        }
        (slots, count)
    }
}

#[cfg(feature = "cuda")]
impl Program {
    /// As [`slots`](Self::slots) of all registers, for steps that have read all they read before they
    /// write: what a step makes may take the slot of what it is the last to read.
    pub(crate) fn packed(&self) -> (Vec<usize>, usize) {
        let last_read = self.last_read();
        let mut slots = vec![usize::MAX; self.registers];
        let (mut free, mut count) = (Vec::new(), 1);
        slots[0] = 0;
        for (at, step) in self.steps.iter().enumerate() {
            let dead = |&r: &usize| last_read[r] == at && slots[r] != usize::MAX;
            free.extend((0..self.registers).filter(dead).map(|r| slots[r]));
            for out in &step.outs {
                slots[out.register] = free.pop().unwrap_or_else(|| {
                    count += 1;
                    count - 1
                });
            }
        }
        (slots, count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "cuda")]
    #[test]
    fn packed_slots_hold_what_is_read() {
        for n in 1..=13 {
            for wanted in [Wanted::Root, Wanted::InverseRoot] {
                let program = Program::new(&vec![NS; n], wanted);
                let (slots, count) = program.packed();
                let mut content = vec![usize::MAX; count];
                content[slots[0]] = 0;
                for step in &program.steps {
                    let terms = step.outs.iter().flat_map(|out| &out.terms);
                    let operands = step.product.into_iter().flat_map(|(l, r)| [l, r]);
                    for register in terms.map(|term| term.1).chain(operands) {
                        assert_eq!(content[slots[register]], register, "N={n}");
                    }
                    for out in &step.outs {
                        content[slots[out.register]] = out.register;
                    }
                }
                assert_eq!(content[slots[program.result]], program.result);
                // With a buffer, all of them fit into 99 KiB for sides of 64.
                assert!(
                    (count + 1) * 64 * 64 * 4 <= 99 << 10,
                    "N={n}: {count} slots"
                );
            }
        }
    }

    const NS: Polynomial = [1.5, -0.5, 0.0, 0.0, 0.0];

    /// Runs the program on a scalar.
    fn evaluate(program: &Program, x: f64) -> f64 {
        let mut registers = vec![f64::NAN; program.registers];
        registers[0] = x;
        for step in &program.steps {
            let product = step
                .product
                .map_or(0.0, |(l, r)| registers[l] * registers[r]);
            for out in &step.outs {
                let terms: f64 = out.terms.iter().map(|&(w, r)| w * registers[r]).sum();
                registers[out.register] = out.alpha * product + terms + out.diagonal;
            }
        }
        registers[program.result]
    }

    #[test]
    fn programs_equal_the_coupled_iteration() {
        let quintic = [1.875, -1.25, 0.375, 0.0, 0.0];
        let nonic = [315.0, -420.0, 378.0, -180.0, 35.0].map(|c| c / 128.0);
        let schedules = [
            vec![NS; 1],
            vec![NS; 2],
            vec![NS; 3],
            vec![NS; 4],
            vec![NS; 5],
            vec![NS; 7],
            vec![quintic; 1],
            vec![quintic; 3],
            vec![NS, quintic, NS, NS],
            vec![quintic, NS],
            vec![nonic; 1],
            vec![nonic; 2],
            vec![NS, nonic, NS, NS],
        ];
        for coefficients in schedules {
            for x in [0.0, 1e-3, 0.2, 0.9, 1.0] {
                let (mut y, mut z) = (x, 1.0);
                for step in &coefficients {
                    let m: f64 = z * y;
                    let t: f64 = (0..).zip(step).map(|(power, c)| c * m.powi(power)).sum();
                    (y, z) = (y * t, t * z);
                }
                let root = evaluate(&Program::new(&coefficients, Wanted::Root), x);
                let inverse = evaluate(&Program::new(&coefficients, Wanted::InverseRoot), x);
                assert!((root - y).abs() < 1e-14, "{coefficients:?} {x}: {root} {y}");
                assert!(
                    (inverse - z).abs() < 1e-12,
                    "{coefficients:?} {x}: {inverse} {z}"
                );
            }
        }
    }

    #[test]
    fn product_counts_are_those_of_the_method() {
        let counts = [
            (1, 0, 1),
            (2, 2, 3),
            (3, 5, 5),
            (4, 7, 7),
            (5, 10, 10),
            (7, 15, 15),
        ];
        for (n, inverse, root) in counts {
            let coefficients = vec![NS; n];
            assert_eq!(
                Program::new(&coefficients, Wanted::InverseRoot).products(),
                inverse,
                "N={n}"
            );
            assert_eq!(
                Program::new(&coefficients, Wanted::Root).products(),
                root,
                "N={n}"
            );
        }
    }

    #[test]
    fn live_registers_never_share_a_slot() {
        for n in 1..=9 {
            let program = Program::new(&vec![NS; n], Wanted::Root);
            let (slots, count) = program.slots(|_| true);
            let mut content = vec![usize::MAX; count];
            content[slots[0]] = 0;
            for step in &program.steps {
                let (left, right) = step.product.unwrap_or((0, 0));
                assert_eq!((content[slots[left]], content[slots[right]]), (left, right));
                for out in &step.outs {
                    content[slots[out.register]] = out.register;
                }
                for &(_, register) in step.outs.iter().flat_map(|out| &out.terms) {
                    assert_eq!(content[slots[register]], register, "N={n}");
                }
            }
            assert_eq!(content[slots[program.result]], program.result);
            assert!(count <= 8, "N={n}: {count} slots");
        }
    }

    #[test]
    fn keeps_at_most_three_matrices_a_further_step() {
        for n in 2..=9 {
            let program = Program::new(&vec![NS; n], Wanted::InverseRoot);
            let (mut kept, _) = program.operands();
            kept.push(program.result);
            assert!(kept.len() <= 3 * (n - 1), "N={n}: {kept:?}");
        }
    }
}

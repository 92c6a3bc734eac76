//! Gradient checkpointing: the same numbers as without it, and less that is kept.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};
use isqrt_nn::layers::{ConvNorm, Dropout, GradientCheckpoint, Linear};
use isqrt_nn::ops::{Activation, add_relu, cross_entropy, global_avg_pool};
use isqrt_nn::{Error, Mode, Result, Vars};
use isqrt_testkit::{assert_close, randn};

fn random(shape: &[usize]) -> Tensor {
    randn(shape, 7, DType::F64).unwrap()
}

/// A residual block with dropout.
struct Block {
    first: ConvNorm,
    dropout: Dropout,
    second: ConvNorm,
}

impl Block {
    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let y = self.first.forward(x, mode)?;
        let y = self.dropout.forward(&y, mode)?;
        add_relu(&self.second.forward(&y, mode)?, x)
    }
}

struct Toy {
    vars: Vars,
    checkpoint: Option<GradientCheckpoint>,
    blocks: Vec<Arc<Block>>,
    classifier: Linear,
}

impl Toy {
    fn new(checkpointed: bool) -> Self {
        let mut vars = Vars::new(3, DType::F64, &Device::Cpu);
        let mut root = vars.root();
        let block = |scope: &mut isqrt_nn::Scope<'_>| {
            Arc::new(Block {
                first: ConvNorm::new(scope, ("conv1", "bn1"), (4, 4), 3, 1, Activation::Relu)
                    .unwrap(),
                dropout: Dropout::new(scope.sub("dropout"), 0.3).unwrap(),
                second: ConvNorm::new(scope, ("conv2", "bn2"), (4, 4), 3, 1, Activation::None)
                    .unwrap(),
            })
        };
        Self {
            blocks: vec![block(&mut root.sub("0")), block(&mut root.sub("1"))],
            classifier: Linear::new(root.sub("classifier"), 4, 3).unwrap(),
            checkpoint: checkpointed.then(|| GradientCheckpoint::new(&root)),
            vars,
        }
    }

    fn loss(&self, x: &Tensor, mode: Mode) -> Tensor {
        let mut x = x.clone();
        for block in &self.blocks {
            x = match &self.checkpoint {
                Some(checkpoint) => {
                    let block = Arc::clone(block);
                    let part = move |x: &Tensor, mode| block.forward(x, mode);
                    checkpoint.forward(&x, mode, part).unwrap()
                }
                None => block.forward(&x, mode).unwrap(),
            };
        }
        let pooled = global_avg_pool(&x).unwrap();
        let logits = self.classifier.forward(&pooled).unwrap();
        cross_entropy(&logits, &[0, 2, 1], 0.1).unwrap()
    }

    /// All gradients by name, and that of `x`.
    fn gradients(&self, store: &GradStore, x: &Var) -> Vec<(String, Tensor)> {
        let parameters = self.vars.parameters();
        let all = parameters.chain([("x", x)]);
        all.map(|(name, var)| (name.to_owned(), store.get(var).unwrap().clone()))
            .collect()
    }

    fn buffers(&self) -> Vec<Tensor> {
        self.vars
            .buffers()
            .map(|(_, buffer)| buffer.get())
            .collect()
    }
}

fn assert_same(ours: &[(String, Tensor)], known: &[(String, Tensor)]) {
    assert_eq!(ours.len(), known.len());
    for ((name, ours), (_, known)) in ours.iter().zip(known) {
        if let Err(message) = isqrt_testkit::compare(ours, known, EXACT) {
            panic!("{name}: {message}");
        }
    }
}

const EXACT: isqrt_testkit::Tolerance = isqrt_testkit::Tolerance {
    rtol: 0.0,
    atol: 0.0,
};

/// Two passes, so that what the first left behind would show in the second.
#[test]
fn gradients_and_statistics_are_those_without_checkpoints() {
    for mode in [Mode::Train, Mode::Frozen, Mode::Eval] {
        let (plain, ours) = (Toy::new(false), Toy::new(true));
        let before = ours.buffers();
        let x = Var::from_tensor(&random(&[3, 4, 5, 5])).unwrap();
        for step in 0..2 {
            let [known, found] = [&plain, &ours].map(|toy| {
                toy.vars.set_step(step);
                let loss = toy.loss(&x, mode);
                toy.gradients(&toy.vars.backward(&loss).unwrap(), &x)
            });
            assert_same(&found, &known);
            for (found, known) in ours.buffers().iter().zip(&plain.buffers()) {
                assert_close!(found, known, atol = 0.0);
            }
        }
        let moved = before.iter().zip(&ours.buffers()).any(|(a, b)| {
            let off = (a - b).unwrap().abs().unwrap().max_all().unwrap();
            off.to_scalar::<f64>().unwrap() > 0.0
        });
        assert_eq!(moved, mode.updates_statistics());
    }
}

/// A batch in two parts, each with masks of its own, and one backward pass for both.
#[test]
fn masks_are_those_of_the_first_pass_whatever_the_step_is_now() {
    let x = Var::from_tensor(&random(&[3, 4, 5, 5])).unwrap();
    let [known, found] = [Toy::new(false), Toy::new(true)].map(|toy| {
        let losses = [1, 2].map(|step| {
            toy.vars.set_step(step);
            toy.loss(&x, Mode::Frozen)
        });
        let loss = (&losses[0] + &losses[1]).unwrap();
        toy.gradients(&toy.vars.backward(&loss).unwrap(), &x)
    });
    for ((name, found), (_, known)) in found.iter().zip(&known) {
        let off = (found - known).unwrap().abs().unwrap().max_all().unwrap();
        let off = off.to_scalar::<f64>().unwrap();
        assert!(off < 1e-14, "{name}: {off}");
    }
}

#[test]
fn gradients_are_never_lost_in_silence() {
    let toy = Toy::new(true);
    toy.vars.set_step(0);
    let x = Var::from_tensor(&random(&[3, 4, 5, 5])).unwrap();
    let loss = toy.loss(&x, Mode::Train);
    let message = loss.backward().unwrap_err().to_string();
    assert!(message.contains("call Vars::backward"), "{message}");
    // And it stands in the way of nothing.
    let known = toy.gradients(&toy.vars.backward(&loss).unwrap(), &x);
    assert_same(
        &toy.gradients(&toy.vars.backward(&loss).unwrap(), &x),
        &known,
    );
}

/// The identity, which holds what an op may keep for its adjoint.
struct Holder(#[allow(dead_code)] Arc<()>);

impl CustomOp1 for Holder {
    fn name(&self) -> &'static str {
        "holder"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((s.clone(), l.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(dy.clone()))
    }
}

fn checkpoint() -> (Vars, GradientCheckpoint) {
    let mut vars = Vars::new(1, DType::F64, &Device::Cpu);
    let checkpoint = GradientCheckpoint::new(&vars.root());
    (vars, checkpoint)
}

#[test]
fn nothing_inside_is_kept() {
    let (vars, checkpoint) = checkpoint();
    let x = Var::from_tensor(&random(&[4])).unwrap();
    let held = Arc::new(());
    let inside = Arc::clone(&held);
    let part = move |x: &Tensor, _| Ok(x.apply_op1(Holder(Arc::clone(&inside)))?.sqr()?);
    let plain = part(&x, Mode::Train).unwrap();
    // Ours, the closure's, the tape's.
    assert_eq!(Arc::strong_count(&held), 3);
    drop(plain);
    let y = checkpoint.forward(&x, Mode::Train, part).unwrap();
    assert_eq!(Arc::strong_count(&held), 2);
    let gradients = vars.backward(&y.sum_all().unwrap()).unwrap();
    assert_eq!(Arc::strong_count(&held), 2);
    let twice = (x.as_tensor() * 2.0).unwrap();
    assert_close!(gradients.get(&x).unwrap(), twice, atol = 0.0);
}

#[test]
fn an_input_without_gradients_is_not_kept_for_one() {
    let (vars, checkpoint) = checkpoint();
    let calls = Arc::new(AtomicUsize::new(0));
    let weight = Var::from_tensor(&random(&[4])).unwrap();
    let images = random(&[4]);
    let (count, inner) = (Arc::clone(&calls), weight.clone());
    let y = checkpoint.forward(&images, Mode::Train, move |x, _| {
        count.fetch_add(1, Ordering::Relaxed);
        Ok(x.mul(&inner)?)
    });
    let gradients = vars.backward(&y.unwrap().sum_all().unwrap()).unwrap();
    assert_close!(gradients.get(&weight).unwrap(), images, atol = 0.0);
    assert_eq!(calls.load(Ordering::Relaxed), 1);
}

/// One weight in a part, in a part of a part, and outside.
#[test]
fn gradients_of_a_shared_parameter_add_up() {
    let (vars, checkpoint) = checkpoint();
    let x = Var::from_tensor(&random(&[5])).unwrap();
    let weight = Var::from_tensor(&randn(5, 8, DType::F64).unwrap()).unwrap();
    let (w, nested) = (weight.clone(), checkpoint.clone());
    let part = move |x: &Tensor, mode| {
        let inner = w.clone();
        let y = nested.forward(x, mode, move |x, _| Ok((x * inner.as_tensor())?.sqr()?))?;
        Ok((y * w.as_tensor())?)
    };
    let outside = |y: &Tensor| y.mul(&weight).unwrap().sum_all().unwrap();
    let y = (x.as_tensor() * weight.as_tensor()).unwrap().sqr().unwrap();
    let y = (y * weight.as_tensor()).unwrap();
    let known = outside(&y).backward().unwrap();
    let y = checkpoint.forward(&x, Mode::Train, part).unwrap();
    let found = vars.backward(&outside(&y)).unwrap();
    for var in [&x, &weight] {
        assert_close!(
            found.get(var).unwrap(),
            known.get(var).unwrap(),
            rtol = 1e-13,
            atol = 1e-15
        );
    }
}

#[test]
fn an_error_of_the_second_pass_comes_back_and_leaves_nothing() {
    let (vars, checkpoint) = checkpoint();
    let x = Var::from_tensor(&random(&[5])).unwrap();
    let part = |x: &Tensor, mode| match mode {
        Mode::Replay => Err(Error::Shape {
            op: "part",
            message: "fails the second time".to_owned(),
        }),
        _ => Ok(x.sqr()?),
    };
    let y = checkpoint.forward(&x, Mode::Train, part).unwrap();
    let message = vars
        .backward(&y.sum_all().unwrap())
        .unwrap_err()
        .to_string();
    assert!(message.contains("part: fails the second time"), "{message}");

    let y = checkpoint.forward(&x, Mode::Train, |x, _| Ok(x.sqr()?));
    let gradients = vars.backward(&y.unwrap().sum_all().unwrap()).unwrap();
    let twice = (x.as_tensor() * 2.0).unwrap();
    assert_close!(gradients.get(&x).unwrap(), twice, atol = 0.0);
}

/// Weights of layers do not go over the tape in `Vars::backward`; used twice, their gradients add up.
#[test]
fn gradients_past_the_tape_are_those_over_it() {
    let toy = Toy::new(false);
    let x = Var::from_tensor(&random(&[3, 4, 5, 5])).unwrap();
    toy.vars.set_step(1);
    let loss = (toy.loss(&x, Mode::Frozen)
        + toy.loss(&(x.as_tensor() * 0.5).unwrap(), Mode::Frozen))
    .unwrap();
    let known = toy.gradients(&loss.backward().unwrap(), &x);
    let found = toy.gradients(&toy.vars.backward(&loss).unwrap(), &x);
    for ((name, found), (_, known)) in found.iter().zip(&known) {
        let size = known
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f64>()
            .unwrap();
        assert!(size > 0.0, "{name}");
        assert_close!(found, known, rtol = 0.0, atol = 1e-14 * size.max(1.0));
    }
}

/// A pass of another thread keeps its gradients on its own tape.
#[test]
fn two_threads_do_not_mix_their_gradients() {
    let toy = Toy::new(false);
    let x = Var::from_tensor(&random(&[3, 4, 5, 5])).unwrap();
    toy.vars.set_step(1);
    let loss = toy.loss(&x, Mode::Frozen);
    let known = toy.gradients(&loss.backward().unwrap(), &x);
    /// Differentiates another loss, in another thread, while this one is differentiated.
    struct Meanwhile<'a>(&'a Tensor, std::sync::Mutex<Option<GradStore>>);
    let meanwhile = Arc::new(Meanwhile(&loss, std::sync::Mutex::new(None)));
    std::thread::scope(|scope| {
        // Inside `Vars::backward` of this thread: held open by a node that waits for the other.
        let (start, started) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel();
        let other = Arc::clone(&meanwhile);
        scope.spawn(move || {
            started.recv().unwrap();
            *other.1.lock().unwrap() = Some(other.0.backward().unwrap());
            end.send(()).unwrap();
        });
        let wait = Wait(std::sync::Mutex::new(Some((start, ended))));
        let held = x.as_tensor().sum_all().unwrap().apply_op1(wait).unwrap();
        toy.vars.backward(&held).unwrap();
    });
    let found = meanwhile.1.lock().unwrap().take().unwrap();
    assert_same(&toy.gradients(&found, &x), &known);
}

/// The identity, whose backward pass lets another thread work first.
struct Wait(std::sync::Mutex<Option<(std::sync::mpsc::Sender<()>, std::sync::mpsc::Receiver<()>)>>);

impl CustomOp1 for Wait {
    fn name(&self) -> &'static str {
        "wait"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((s.clone(), l.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (start, ended) = self.0.lock().unwrap().take().unwrap();
        start.send(()).unwrap();
        ended.recv().unwrap();
        Ok(Some(dy.clone()))
    }
}

/// Parts whose result does not depend on what goes in, or not differentiably.
#[test]
fn a_part_without_a_path_to_its_input_has_zero_gradients() {
    let (vars, checkpoint) = checkpoint();
    let x = Var::from_tensor(&random(&[5])).unwrap();
    let inner = (x.as_tensor() * 2.0).unwrap();
    let y = checkpoint.forward(&inner, Mode::Train, |x, _| Ok(x.detach()));
    let gradients = vars.backward(&y.unwrap().sum_all().unwrap()).unwrap();
    let zero = x.zeros_like().unwrap();
    assert_close!(gradients.get(&x).unwrap(), zero, atol = 0.0);
}

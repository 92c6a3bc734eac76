//! Ops on maps whose gradients do not go over candle's tape.
//!
//! candle adds each gradient that it hands on to a tensor of zeros, so that a map with a single consumer,
//! as nearly all are, costs four passes over memory of its size between two nodes. Here candle sees a
//! **token** in place of the map, a scalar, by which it puts the nodes in order; the gradient lies beside it
//! until the node that made the map asks for it. Parameters stay on the tape.
//!
//! To everybody else, candle's own ops included, the result of such an op is a tensor like any other:
//! it hangs on its token by a node that puts the gradient that candle has for it with the others
//! ([`Leave`]), and a tensor of another op gets a token by one that gives candle the gradient
//! ([`Enter`]). Passes at the same time, also over the same maps, do not see each other. Where one by
//! `Tensor::backward` fails in an op of candle's, its graph must not be used again;
//! [`Vars::backward`](crate::Vars::backward) has no such limit.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, OnceLock};

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor,
    TensorId, bail,
};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, backend::BackendDevice, backend::BackendStorage};

use crate::checkpoint::lock;

type Gradients3 = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

/// `op` of a map.
pub(crate) fn apply1<C>(x: &Tensor, op: C) -> Result<Tensor>
where
    C: CustomOp1 + Send + Sync + 'static,
{
    let Some(token) = Token::of(x)? else {
        return x.apply_op1(op);
    };
    let (node, place) = Node::new(op, Map::new(x, &token), None);
    leave(&token.scalar.apply_op1(node)?, &place)
}

/// `op` of a map and a parameter.
pub(crate) fn apply2<C>(x: &Tensor, parameter: &Tensor, op: C) -> Result<Tensor>
where
    C: CustomOp2 + Send + Sync + 'static,
{
    let Some(token) = Token::beside(x, &[parameter])? else {
        return x.apply_op2(parameter, op);
    };
    let (node, place) = Node::new(op, Map::new(x, &token), None);
    leave(&token.scalar.apply_op2(parameter, node)?, &place)
}

/// `op` of two maps.
pub(crate) fn join<C>(x: &Tensor, other: &Tensor, op: C) -> Result<Tensor>
where
    C: CustomOp2 + Send + Sync + 'static,
{
    let tokens = (Token::beside(x, &[other])?, Token::beside(other, &[x])?);
    let (Some(token), Some(second)) = tokens else {
        return x.apply_op2(other, op);
    };
    let maps = (Map::new(x, &token), Some(Map::new(other, &second)));
    let (node, place) = Node::new(op, maps.0, maps.1);
    leave(&token.scalar.apply_op2(&second.scalar, node)?, &place)
}

/// `op` of a map and two parameters.
pub(crate) fn apply3<C>(x: &Tensor, parameters: [&Tensor; 2], op: C) -> Result<Tensor>
where
    C: CustomOp3 + Send + Sync + 'static,
{
    let [second, third] = parameters;
    let Some(token) = Token::beside(x, &parameters)? else {
        return x.apply_op3(second, third, op);
    };
    let (node, place) = Node::new(op, Map::new(x, &token), None);
    leave(&token.scalar.apply_op3(second, third, node)?, &place)
}

/// What candle sees of a map.
#[derive(Clone)]
struct Token {
    scalar: Tensor,
    inbox: Arc<Inbox>,
}

/// Of the maps that ops of this module made and that somebody still has.
static TOKENS: LazyLock<Mutex<HashMap<TensorId, Token>>> = LazyLock::new(Mutex::default);

impl Token {
    /// `None` where no gradient flows to `x`.
    fn of(x: &Tensor) -> Result<Option<Self>> {
        if !x.track_op() {
            return Ok(None);
        }
        if let Some(token) = lock(&TOKENS).get(&x.id()) {
            return Ok(Some(token.clone()));
        }
        let inbox = Arc::new(Inbox::default());
        let scalar = x.apply_op1(Enter(Arc::clone(&inbox)))?;
        Ok(Some(Self { scalar, inbox }))
    }

    /// `None` where no gradient flows to one of them. The scalar of an `x` without gradient hangs on nothing.
    fn beside(x: &Tensor, others: &[&Tensor]) -> Result<Option<Self>> {
        let token = Self::of(x)?;
        if token.is_some() || !others.iter().any(|other| other.track_op()) {
            return Ok(token);
        }
        let scalar = Tensor::zeros((), DType::F32, x.device())?;
        let inbox = Arc::default();
        Ok(Some(Self { scalar, inbox }))
    }
}

/// The gradients that came for a map, their sum for each pass that is under way; none where an op has no gradient for it.
#[derive(Default)]
pub(crate) struct Inbox(Mutex<Vec<(u64, Option<Tensor>)>>);

impl Inbox {
    pub(crate) fn add(&self, gradient: Option<Tensor>) -> Result<()> {
        let gradient = gradient.map(|gradient| gradient.detach());
        let (mut inbox, pass) = (lock(&self.0), PASS.get());
        match inbox.iter_mut().find(|(of, _)| *of == pass) {
            None => inbox.push((pass, gradient)),
            Some((_, sum)) => {
                *sum = match (sum.take(), gradient) {
                    (Some(sum), Some(gradient)) => Some((sum + gradient)?),
                    (sum, gradient) => sum.or(gradient),
                }
            }
        }
        Ok(())
    }

    /// The sum of this pass, of the shape of `map`.
    pub(crate) fn take(&self, map: &Tensor) -> Result<Tensor> {
        let (mut inbox, pass) = (lock(&self.0), PASS.get());
        let Some(at) = inbox.iter().position(|(of, _)| *of == pass) else {
            bail!("no gradient came for maps {:?}", map.dims())
        };
        match inbox.swap_remove(at).1 {
            Some(sum) if sum.dims() == map.dims() => sum.contiguous(),
            Some(sum) => bail!("a gradient {:?} came for maps {:?}", sum.dims(), map.dims()),
            None => Ok(map.zeros_like()?.detach()),
        }
    }
}

// candle differentiates on one thread: the number of its pass tells what is whose in an inbox.
thread_local!(static PASS: Cell<u64> = Cell::new(next_pass()));

fn next_pass() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A backward pass with a number of its own as long as this lives, within another or not: what it leaves behind where it
/// fails is nobody's.
pub(crate) struct Pass {
    outer: u64,
}

impl Pass {
    pub(crate) fn begin() -> Self {
        let outer = PASS.replace(next_pass());
        Self { outer }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        PASS.set(self.outer);
    }
}

/// Where a result waits to become a tensor, and what its node needs of it later.
#[derive(Default)]
struct Place {
    made: Mutex<Option<(Storage, Shape)>>,
    /// Without its op, which is a node that leads to this place.
    y: OnceLock<Tensor>,
    /// Of the tensor that others have.
    id: OnceLock<TensorId>,
    inbox: Arc<Inbox>,
}

impl Place {
    fn put(&self, storage: Storage, shape: Shape) {
        *lock(&self.made) = Some((storage, shape));
    }

    fn get(&self) -> Result<(Storage, Shape)> {
        match lock(&self.made).take() {
            Some(made) => Ok(made),
            None => bail!("a result was asked for twice"),
        }
    }
}

/// A map that an op takes.
struct Map {
    map: Tensor,
    inbox: Arc<Inbox>,
}

impl Map {
    fn new(map: &Tensor, token: &Token) -> Self {
        Self {
            map: map.clone(),
            inbox: Arc::clone(&token.inbox),
        }
    }

    /// Returns what candle gets for the token.
    fn give(&self, gradient: Option<Tensor>, scalar: &Tensor) -> Result<Option<Tensor>> {
        if !self.map.track_op() {
            return Ok(None);
        }
        self.inbox.add(gradient)?;
        // A token is zero, and so is its gradient.
        Ok(Some(scalar.detach()))
    }
}

/// `op` as candle sees it: from tokens (and parameters) to a token.
struct Node<C> {
    op: C,
    x: Map,
    /// Of an op of two maps.
    second: Option<Map>,
    place: Arc<Place>,
}

impl<C> Node<C> {
    fn new(op: C, x: Map, second: Option<Map>) -> (Self, Arc<Place>) {
        let place = Arc::<Place>::default();
        let node = Self {
            op,
            x,
            second,
            place: Arc::clone(&place),
        };
        (node, place)
    }

    /// What `adjoint` makes of the result and the gradient that came for it.
    fn backward<R>(&self, adjoint: impl FnOnce(&Tensor, &Tensor) -> Result<R>) -> Result<R> {
        let Some(y) = self.place.y.get() else {
            bail!("backward before forward")
        };
        let dy = self.place.inbox.take(y)?;
        // Of passes without a number of their own, by `Tensor::backward`: what this one left is nobody's.
        adjoint(y, &dy).inspect_err(|_| PASS.set(next_pass()))
    }
}

/// Runs `$forward` with `$x` the values of a map in the memory of a device (`Cpu` or `Cuda`).
macro_rules! on {
    ($device:ident, $map:expr, ($x:ident, $layout:ident) => $forward:expr) => {{
        let (storage, $layout) = $map.storage_and_layout();
        match &*storage {
            Storage::$device($x) => $forward?,
            _ => bail!("a map and its token are on different devices"),
        }
    }};
}

fn zero() -> (CpuStorage, Shape) {
    (CpuStorage::F32(vec![0.0]), Shape::from(()))
}

#[cfg(feature = "cuda")]
fn zero_beside(s: &CudaStorage) -> Result<(CudaStorage, Shape)> {
    let shape = Shape::from(());
    Ok((s.device().zeros_impl(&shape, DType::F32)?, shape))
}

impl<C: CustomOp1> CustomOp1 for Node<C> {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let (y, shape) = on!(Cpu, self.x.map, (x, l) => self.op.cpu_fwd(x, l));
        self.place.put(Storage::Cpu(y), shape);
        Ok(zero())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let (y, shape) = on!(Cuda, self.x.map, (x, l) => self.op.cuda_fwd(x, l));
        self.place.put(Storage::Cuda(y), shape);
        zero_beside(s)
    }

    fn bwd(&self, token: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        let dx = self.backward(|y, dy| self.op.bwd(&self.x.map, y, dy))?;
        self.x.give(dx, token)
    }
}

impl<C: CustomOp2> CustomOp2 for Node<C> {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (y, shape) = on!(Cpu, self.x.map, (x, l) => match &self.second {
            Some(second) => Ok(on!(Cpu, second.map, (x2, l2) => self.op.cpu_fwd(x, l, x2, l2))),
            None => self.op.cpu_fwd(x, l, s2, l2),
        });
        self.place.put(Storage::Cpu(y), shape);
        Ok(zero())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s: &CudaStorage,
        _: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (y, shape) = on!(Cuda, self.x.map, (x, l) => match &self.second {
            Some(second) => Ok(on!(Cuda, second.map, (x2, l2) => self.op.cuda_fwd(x, l, x2, l2))),
            None => self.op.cuda_fwd(x, l, s2, l2),
        });
        self.place.put(Storage::Cuda(y), shape);
        zero_beside(s)
    }

    fn bwd(
        &self,
        token: &Tensor,
        second: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let x = &self.x.map;
        let x2 = self.second.as_ref().map_or(second, |second| &second.map);
        let (dx, d2) = self.backward(|y, dy| self.op.bwd(x, x2, y, dy))?;
        let d2 = match &self.second {
            Some(map) => map.give(d2, second)?,
            None => d2,
        };
        Ok((self.x.give(dx, token)?, d2))
    }
}

impl<C: CustomOp3> CustomOp3 for Node<C> {
    fn name(&self) -> &'static str {
        self.op.name()
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (y, shape) = on!(Cpu, self.x.map, (x, l) => self.op.cpu_fwd(x, l, s2, l2, s3, l3));
        self.place.put(Storage::Cpu(y), shape);
        Ok(zero())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s: &CudaStorage,
        _: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (y, shape) = on!(Cuda, self.x.map, (x, l) => self.op.cuda_fwd(x, l, s2, l2, s3, l3));
        self.place.put(Storage::Cuda(y), shape);
        zero_beside(s)
    }

    fn bwd(
        &self,
        token: &Tensor,
        second: &Tensor,
        third: &Tensor,
        _: &Tensor,
        _: &Tensor,
    ) -> Result<Gradients3> {
        let x = &self.x.map;
        let (dx, d2, d3) = self.backward(|y, dy| self.op.bwd(x, second, third, y, dy))?;
        Ok((self.x.give(dx, token)?, d2, d3))
    }
}

/// The token of a tensor that another op made.
struct Enter(Arc<Inbox>);

impl CustomOp1 for Enter {
    fn name(&self) -> &'static str {
        "token"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(zero())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, s: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        zero_beside(s)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.take(x)?))
    }
}

/// The result that waits in `place`, on the tape by the token of its node.
fn leave(scalar: &Tensor, place: &Arc<Place>) -> Result<Tensor> {
    let y = scalar.apply_op1(Leave(Arc::clone(place)))?;
    // Both once: a place has one result.
    let _ = place.y.set(y.detach());
    let _ = place.id.set(y.id());
    let token = Token {
        scalar: scalar.clone(),
        inbox: Arc::clone(&place.inbox),
    };
    lock(&TOKENS).insert(y.id(), token);
    Ok(y)
}

/// From a token to its map.
struct Leave(Arc<Place>);

impl CustomOp1 for Leave {
    fn name(&self) -> &'static str {
        "map"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.0.get()? {
            (Storage::Cpu(y), shape) => Ok((y, shape)),
            _ => bail!("a map and its token are on different devices"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        match self.0.get()? {
            (Storage::Cuda(y), shape) => Ok((y, shape)),
            _ => bail!("a map and its token are on different devices"),
        }
    }

    fn bwd(&self, scalar: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        self.0.inbox.add(Some(dy.clone()))?;
        Ok(Some(scalar.detach()))
    }
}

impl Drop for Leave {
    fn drop(&mut self) {
        let token = self.0.id.get().map(|id| lock(&TOKENS).remove(id));
        // Only now: what hangs on the token may be the last of other maps, which come here too.
        drop(token);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::AtomicBool;

    use candle_core::{Device, Var};

    use super::*;
    use crate::ops::{add, relu};

    /// The identity, whose first backward pass fails.
    struct FailsOnce(AtomicBool);

    impl CustomOp1 for FailsOnce {
        fn name(&self) -> &'static str {
            "fails once"
        }

        fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
            Ok((s.clone(), l.shape().clone()))
        }

        fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
            if self.0.swap(false, Ordering::Relaxed) {
                bail!("the first time")
            }
            Ok(Some(dy.clone()))
        }
    }

    fn variable() -> Var {
        Var::new(&[0.5f64, 1.0, 3.0], &Device::Cpu).unwrap()
    }

    #[test]
    fn maps_have_any_consumers_of_any_kind() {
        let x = variable();
        let a = relu(&x).unwrap();
        let b = relu(&a).unwrap();
        // By candle's ops from maps and to them.
        let product = (&a * &b).unwrap();
        let squares = relu(&product).unwrap();
        let sum = add(&b, &a).unwrap();
        let y = add(&squares, &sum).unwrap();
        let loss = (y.sum_all().unwrap() + a.sum_all().unwrap()).unwrap();
        // Of x² + 3x, and again: a pass leaves nothing behind.
        for _ in 0..2 {
            let gradients = loss.backward().unwrap();
            let dx: Vec<f64> = gradients.get(&x).unwrap().to_vec1().unwrap();
            assert_eq!(dx, [4.0, 5.0, 9.0]);
        }
    }

    #[test]
    fn parameters_have_gradients_where_the_map_has_none() {
        let images = Tensor::new(&[[1.0f64, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        let weight = Var::new(&[[1.0f64, 1.0]], &Device::Cpu).unwrap();
        let bias = Var::new(&[0.0f64], &Device::Cpu).unwrap();
        let y = crate::ops::linear(&images, &weight, &bias).unwrap();
        let gradients = relu(&y).unwrap().sum_all().unwrap().backward().unwrap();
        let dw: Vec<Vec<f64>> = gradients.get(&weight).unwrap().to_vec2().unwrap();
        assert_eq!(dw, [[4.0, 6.0]]);
        assert!(gradients.get(&images).is_none());
    }

    #[test]
    fn a_pass_that_failed_leaves_no_gradient_to_the_next() {
        let x = variable();
        let a = relu(&x).unwrap();
        let fails = || FailsOnce(AtomicBool::new(true));
        // An op of ours fails, and one of candle's.
        let ours = apply1(&a, fails()).unwrap();
        let candles = a.apply_op1(fails()).unwrap();
        for (b, numbered) in [(ours, false), (candles, true)] {
            let loss = add(&a, &b).unwrap().sum_all().unwrap();
            let backward = || {
                let _pass = numbered.then(Pass::begin);
                loss.backward()
            };
            assert!(backward().is_err());
            let dx: Vec<f64> = backward().unwrap().get(&x).unwrap().to_vec1().unwrap();
            assert_eq!(dx, [2.0, 2.0, 2.0]);
        }
    }

    /// The identity, between whose passes another thread has all of its own.
    struct Waits(Arc<std::sync::Barrier>);

    impl CustomOp1 for Waits {
        fn name(&self) -> &'static str {
            "waits"
        }

        fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
            Ok((s.clone(), l.shape().clone()))
        }

        fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
            self.0.wait();
            Ok(Some(dy.clone()))
        }
    }

    #[test]
    fn passes_at_once_over_one_graph() {
        let x = variable();
        let a = relu(&x).unwrap();
        // Both have brought `a` a gradient before one takes it.
        let barrier = Arc::new(std::sync::Barrier::new(2));
        let b = apply1(&a, Waits(barrier)).unwrap();
        let loss = add(&b, &a).unwrap().sum_all().unwrap();
        let gradient = || -> Vec<f64> {
            let gradients = loss.backward().unwrap();
            gradients.get(&x).unwrap().to_vec1().unwrap()
        };
        std::thread::scope(|scope| {
            let both = [(); 2].map(|()| scope.spawn(gradient));
            for dx in both.map(|thread| thread.join().unwrap()) {
                assert_eq!(dx, [2.0, 2.0, 2.0]);
            }
        });
    }

    #[test]
    fn a_token_goes_with_its_map() {
        let x = variable();
        let a = relu(&x).unwrap();
        let b = relu(&a).unwrap();
        let ids = [a.id(), b.id()];
        let known = || ids.map(|id| lock(&TOKENS).contains_key(&id));
        assert_eq!(known(), [true, true]);
        drop(a);
        // The node of `b` has it still.
        assert_eq!(known(), [true, true]);
        drop(b);
        assert_eq!(known(), [false, false]);
    }
}

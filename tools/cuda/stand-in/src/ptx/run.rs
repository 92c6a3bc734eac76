//! Running a decoded kernel: threads, warps, blocks and clusters.
//!
//! The threads of a block take turns on one CPU core. Each runs until it reaches a
//! barrier or an instruction of a whole warp, or has used up its quantum (so that a
//! thread that spins on what another one writes does not hang), and then the next one
//! runs. Blocks that cannot see each other's progress run in parallel.

use super::decode::{Frame, Program, Special};
use super::warp::{self, WarpOp};
use rayon::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

/// A decoded instruction: what to do, and operands whose meaning depends on that. Most
/// are slots of the thread's register window; constants have slots too (negative ones),
/// so that no instruction has to ask what kind of operand it has.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ins {
    pub run: Step,
    pub d: i32,
    pub a: i32,
    pub b: i32,
    pub c: i32,
    pub imm: u64,
    /// The number of this memory instruction's cached range, or an index into one of the
    /// program's side tables.
    pub x: u32,
}

/// Does one instruction and returns the next, or null to stop the thread with a reason
/// in `Cpu::stop`.
pub type Step = fn(&mut Cpu, *const Ins) -> *const Ins;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    IllegalAddress,
    Misaligned,
    Assert,
    IllegalInstruction,
    LaunchFailed,
}

#[derive(Clone, Debug)]
pub struct Failure {
    pub kind: FailureKind,
    pub text: String,
}

/// Why a thread stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    Ready,
    Exit,
    /// Waiting for the lanes of this mask at an instruction of the whole warp.
    Warp(u32),
    /// Waiting at barrier `id` for `count` threads (0: all of the block).
    Barrier(u32, u32),
    /// Arrived at the barrier without waiting.
    Arrive(u32, u32),
    ClusterArrive,
    ClusterWait,
    Fail,
}

/// A span of memory that the device may touch.
pub type Range = (u64, u64);

pub struct ReturnTo {
    ip: *const Ins,
    regs: *mut u64,
    frame: u32,
    frame_size: u32,
}

/// What an instruction sees while one thread runs on a core.
pub struct Cpu<'a> {
    pub regs: *mut u64,
    pub local: *mut u8,
    pub local_len: u64,
    /// Where the running function's frame lies in the thread's local memory.
    pub frame: u32,
    pub shared: *mut u8,
    pub shared_len: u64,
    pub params: &'a [u8],
    pub cache: Vec<Range>,
    pub ranges: &'a [Range],
    pub program: &'a Program,
    pub carry: bool,
    pub stop: Stop,
    pub failure: Option<(FailureKind, String)>,
    pub steps: u64,
    pub calls: Vec<ReturnTo>,
    pub regs_end: *mut u64,
    /// The kernel's own window, which holds the special registers.
    pub entry: *mut u64,
    /// The shared memory of each block of the cluster.
    pub cluster: Vec<(*mut u8, u64)>,
    pub rank: u32,
    pub linear_ctaid: u32,
}

impl Cpu<'_> {
    #[inline(always)]
    pub fn r(&self, slot: i32) -> u64 {
        // Slots come from the decoder, which also sizes the window.
        unsafe { *self.regs.offset(slot as isize) }
    }

    #[inline(always)]
    pub fn set(&mut self, slot: i32, value: u64) {
        unsafe { *self.regs.offset(slot as isize) = value }
    }

    #[cold]
    pub fn fail(&mut self, kind: FailureKind, text: impl Into<String>) -> *const Ins {
        self.failure = Some((kind, text.into()));
        self.stop = Stop::Fail;
        std::ptr::null()
    }

    /// Finds the allocation of a global address that the instruction's cache missed.
    #[cold]
    pub fn find_global(&mut self, cached: u32, address: u64, bytes: u64) -> bool {
        let at = self.ranges.partition_point(|r| r.0 <= address);
        if at > 0 && address + bytes <= self.ranges[at - 1].1 {
            self.cache[cached as usize] = self.ranges[at - 1];
            return true;
        }
        false
    }

    /// Whether a generic address lies in memory of this block or thread.
    pub fn find_own(&self, address: u64, bytes: u64) -> bool {
        let within = |base: *const u8, len: u64| {
            address >= base as u64 && address + bytes <= base as u64 + len
        };
        within(self.shared, self.shared_len)
            || within(self.local, self.local_len)
            || within(self.params.as_ptr(), self.params.len() as u64)
            || self.cluster.iter().any(|&(base, len)| within(base, len))
    }

    pub fn describe_miss(&self, address: u64, bytes: u64) -> String {
        let at = self.ranges.partition_point(|r| r.0 <= address);
        let near = |r: Option<&Range>| match r {
            Some(&(lo, hi)) if address >= hi => {
                format!(
                    "{} bytes past the end of an allocation of {}",
                    address - hi,
                    hi - lo
                )
            }
            Some(&(lo, hi)) if address >= lo => {
                format!(
                    "across the end of an allocation of {} at {}",
                    hi - lo,
                    address - lo
                )
            }
            Some(&(lo, hi)) => {
                format!("{} bytes before an allocation of {}", lo - address, hi - lo)
            }
            None => "no allocation near".to_string(),
        };
        let below = at.checked_sub(1).and_then(|i| self.ranges.get(i));
        let place = match (below, self.ranges.get(at)) {
            (Some(b), Some(a)) if address >= b.1 && a.0 - address < address - b.1 => near(Some(a)),
            (Some(b), _) => near(Some(b)),
            (None, a) => near(a),
        };
        format!("{bytes} bytes at {address:#x}: {place}")
    }

    /// Enters a function: a fresh window above the current one and a fresh frame.
    pub fn call(&mut self, from: &Frame, to: &Frame, back: *const Ins) -> bool {
        let regs = unsafe { self.regs.add(from.slots as usize + to.constants.len()) };
        let frame = self.frame + from.local_size;
        let room = unsafe { regs.add(to.slots as usize) } <= self.regs_end
            && (frame + to.local_size) as u64 <= self.local_len;
        if !room {
            return false;
        }
        self.calls.push(ReturnTo {
            ip: back,
            regs: self.regs,
            frame: self.frame,
            frame_size: from.local_size,
        });
        self.regs = regs;
        self.frame = frame;
        unsafe { to.fill(regs) };
        true
    }

    pub fn ret(&mut self) -> *const Ins {
        match self.calls.pop() {
            Some(back) => {
                debug_assert!(back.frame + back.frame_size == self.frame);
                self.regs = back.regs;
                self.frame = back.frame;
                back.ip
            }
            None => {
                self.stop = Stop::Exit;
                std::ptr::null()
            }
        }
    }
}

struct Thread {
    ip: *const Ins,
    regs: *mut u64,
    base: *mut u64,
    local: *mut u8,
    frame: u32,
    carry: bool,
    stop: Stop,
    calls: Vec<ReturnTo>,
    /// The phase of the cluster barrier at this thread's last arrival.
    phase: u64,
    arrived: bool,
    lane: u32,
}

/// One launch of a kernel.
pub struct Launch<'a> {
    pub program: &'a Program,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub cluster: [u32; 3],
    pub dynamic_shared: u32,
    /// All blocks take turns, so that they can wait for one another.
    pub cooperative: bool,
    /// The address of 8 zeroed bytes for a cooperative launch, else 0.
    pub workspace: u64,
    pub params: &'a [u8],
    pub ranges: &'a [Range],
}

/// Instructions run since the library was loaded.
pub static STEPS: AtomicU64 = AtomicU64::new(0);

/// Instructions of a thread's turn. Blocks of a cooperative launch are likely to spin while
/// others must run.
const QUANTUM: u32 = 1 << 20;
const COOPERATIVE_QUANTUM: u32 = 1 << 12;
const WARP: usize = 32;

pub fn launch(l: &Launch) -> Result<(), Failure> {
    let cluster_size: u32 = l.cluster.iter().product();
    let clusters: [u32; 3] = std::array::from_fn(|i| l.grid[i] / l.cluster[i]);
    let count = clusters.iter().map(|&n| n as u64).product::<u64>();
    let stopped = AtomicBool::new(false);
    let failure = Mutex::new(None);
    let one = |group: &mut Group, range: std::ops::Range<u64>| {
        for index in range {
            if stopped.load(Ordering::Relaxed) {
                return;
            }
            let n = clusters.map(|n| n as u64);
            let at = [index % n[0], index / n[0] % n[1], index / n[0] / n[1]];
            let first = std::array::from_fn(|i| at[i] as u32 * l.cluster[i]);
            if let Err(e) = group.run(&[(first, l.cluster)]) {
                stopped.store(true, Ordering::Relaxed);
                failure.lock().unwrap().get_or_insert(e);
            }
        }
    };
    if l.cooperative {
        let mut group = Group::new(l, (count * cluster_size as u64) as usize);
        group.run(&[([0; 3], l.grid)])?;
    } else if count <= 1 {
        one(&mut Group::new(l, cluster_size as usize), 0..count);
    } else {
        // A few pieces a core keep the cores busy without making a group for each block.
        let pieces = (rayon::current_num_threads() as u64 * 4).min(count);
        (0..pieces).into_par_iter().for_each(|p| {
            let range = count * p / pieces..count * (p + 1) / pieces;
            one(&mut Group::new(l, cluster_size as usize), range);
        });
    }
    match failure.into_inner().unwrap() {
        Some(e) => Err(e),
        None => Ok(()),
    }
}

/// Shared memory starts at a multiple of this, as swizzles expect.
const SHARED_ALIGN: usize = 1024;

/// Numbers up to a count, or down from it with `STAND_IN_ORDER=backwards`: the order in which blocks, warps and
/// threads take turns. Results that depend on it tell of a race.
fn in_order(count: usize) -> impl Iterator<Item = usize> {
    static BACKWARDS: OnceLock<bool> = OnceLock::new();
    let backwards = *BACKWARDS
        .get_or_init(|| std::env::var("STAND_IN_ORDER").is_ok_and(|order| order == "backwards"));
    (0..count).map(move |at| if backwards { count - 1 - at } else { at })
}

/// The blocks that take turns on one core, and the memory that they and their threads
/// use; it is kept from one such set of blocks to the next.
struct Group<'a> {
    launch: &'a Launch<'a>,
    cpu: Cpu<'a>,
    threads: Vec<Thread>,
    per_block: usize,
    /// Where each block's shared memory starts.
    shared: Vec<*mut u8>,
    shared_len: usize,
    ctaids: Vec<[u32; 3]>,
    barriers: Vec<[u32; 16]>,
    phase: u64,
    arrived: usize,
    _memory: (Vec<u64>, Vec<u8>, Vec<u8>),
}

impl<'a> Group<'a> {
    fn new(l: &'a Launch<'a>, blocks: usize) -> Group<'a> {
        let p = l.program;
        let per_block = l.block.iter().product::<u32>() as usize;
        let total = per_block * blocks;
        // Without waiting each thread runs to its end, and all can use the same memory.
        let distinct = if p.waits { total } else { 1 };
        let (window, local_len) = (p.window, p.local.next_multiple_of(16));
        let mut regs = vec![0u64; window * distinct];
        let mut local = vec![0xFFu8; local_len * distinct + 16];
        let local_start = local.as_mut_ptr();
        let local_start = unsafe { local_start.add(local_start.align_offset(16)) };
        let shared_len = p.shared as usize + l.dynamic_shared as usize;
        let stride = shared_len.next_multiple_of(SHARED_ALIGN);
        let mut shared = vec![0u8; stride * blocks + SHARED_ALIGN];
        let start = shared.as_mut_ptr();
        let start = unsafe { start.add(start.align_offset(SHARED_ALIGN)) };
        let shared_starts: Vec<_> = (0..blocks)
            .map(|b| unsafe { start.add(b * stride) })
            .collect();
        let threads = (0..total)
            .map(|i| {
                let i = if p.waits { i } else { 0 };
                let base = unsafe { regs.as_mut_ptr().add(i * window) };
                Thread {
                    ip: std::ptr::null(),
                    regs: base,
                    base,
                    local: unsafe { local_start.add(i * local_len) },
                    frame: 0,
                    carry: false,
                    stop: Stop::Ready,
                    calls: Vec::new(),
                    phase: 0,
                    arrived: false,
                    lane: 0,
                }
            })
            .collect();
        let cpu = Cpu {
            regs: std::ptr::null_mut(),
            local: std::ptr::null_mut(),
            local_len: local_len as u64,
            frame: 0,
            shared: std::ptr::null_mut(),
            shared_len: shared_len as u64,
            params: l.params,
            cache: vec![(1, 0); p.cached],
            ranges: l.ranges,
            program: p,
            carry: false,
            stop: Stop::Ready,
            failure: None,
            steps: 0,
            calls: Vec::new(),
            regs_end: std::ptr::null_mut(),
            entry: std::ptr::null_mut(),
            cluster: Vec::new(),
            rank: 0,
            linear_ctaid: 0,
        };
        Group {
            launch: l,
            cpu,
            threads,
            per_block,
            shared: shared_starts,
            shared_len,
            ctaids: vec![[0; 3]; blocks],
            barriers: vec![[0; 16]; blocks],
            phase: 0,
            arrived: 0,
            _memory: (regs, local, shared),
        }
    }

    /// Runs the blocks of the given boxes of the grid (first block and extent).
    fn run(&mut self, boxes: &[([u32; 3], [u32; 3])]) -> Result<(), Failure> {
        let mut n = 0;
        for (first, extent) in boxes {
            for z in 0..extent[2] {
                for y in 0..extent[1] {
                    for x in 0..extent[0] {
                        self.ctaids[n] = [first[0] + x, first[1] + y, first[2] + z];
                        n += 1;
                    }
                }
            }
        }
        for &start in &self.shared {
            // Shared memory starts undefined; NaN bits make a forgotten store show.
            unsafe { std::ptr::write_bytes(start, 0xFF, self.shared_len) };
        }
        let cooperative = self.launch.cooperative;
        self.cpu.cluster = if cooperative && self.launch.cluster == [1; 3] {
            Vec::new()
        } else {
            self.shared
                .iter()
                .map(|&s| (s, self.shared_len as u64))
                .collect()
        };
        let result = if self.launch.program.waits {
            self.run_waiting()
        } else {
            self.run_straight()
        };
        STEPS.fetch_add(std::mem::take(&mut self.cpu.steps), Ordering::Relaxed);
        result
    }

    fn run_straight(&mut self) -> Result<(), Failure> {
        for index in 0..self.threads.len() {
            self.start(index);
            while self.threads[index].stop == Stop::Ready {
                self.turn(index);
            }
            if self.threads[index].stop == Stop::Fail {
                return Err(self.failure(index));
            }
        }
        Ok(())
    }

    fn run_waiting(&mut self) -> Result<(), Failure> {
        self.phase = 0;
        self.arrived = 0;
        for b in &mut self.barriers {
            *b = [0; 16];
        }
        for index in 0..self.threads.len() {
            self.start(index);
        }
        let mut running = self.threads.len();
        while running > 0 {
            let mut progress = false;
            for block in in_order(self.ctaids.len()) {
                let first = block * self.per_block;
                for warp in in_order(self.per_block.div_ceil(WARP)) {
                    let start = first + warp * WARP;
                    let end = (start + WARP).min(first + self.per_block);
                    progress |= self.run_warp(start, end, &mut running)?;
                }
                progress |= self.release_barriers(block);
            }
            progress |= self.release_cluster();
            if !progress {
                return Err(self.deadlock());
            }
        }
        Ok(())
    }

    /// Runs a warp's threads until all of them wait for others or have ended.
    fn run_warp(&mut self, first: usize, end: usize, running: &mut usize) -> Result<bool, Failure> {
        let mut progress = false;
        loop {
            let mut turned = false;
            let mut spinning = false;
            for index in in_order(end - first).map(|lane| first + lane) {
                if self.threads[index].stop != Stop::Ready {
                    continue;
                }
                turned = true;
                self.turn(index);
                match self.threads[index].stop {
                    Stop::Fail => return Err(self.failure(index)),
                    Stop::Exit => *running -= 1,
                    Stop::Ready => spinning = true,
                    Stop::Arrive(id, _) => {
                        let block = index / self.per_block;
                        self.barriers[block][id as usize] += 1;
                        self.resume(index);
                    }
                    Stop::ClusterArrive => {
                        let t = &mut self.threads[index];
                        t.phase = self.phase;
                        t.arrived = true;
                        self.resume(index);
                    }
                    Stop::ClusterWait if self.threads[index].phase < self.phase => {
                        self.resume(index);
                    }
                    _ => {}
                }
            }
            progress |= turned;
            let met = self.meet(first, end)?;
            progress |= met;
            let ready = (first..end).any(|i| self.threads[i].stop == Stop::Ready);
            // A spinning thread may wait for another warp: let that one run.
            if !ready || spinning && !met {
                return Ok(progress);
            }
        }
    }

    /// Lets lanes that wait for one another at a warp instruction do it, if all are there.
    fn meet(&mut self, first: usize, end: usize) -> Result<bool, Failure> {
        let mut met = false;
        'again: loop {
            let mut alive = 0u32;
            let mut unsettled = false;
            for index in first..end {
                let t = &self.threads[index];
                alive |= ((t.stop != Stop::Exit) as u32) << t.lane;
                unsettled |= t.stop == Stop::Ready;
            }
            for index in first..end {
                let Stop::Warp(mask) = self.threads[index].stop else {
                    continue;
                };
                let op = self.warp_op(index);
                // `activemask` names those who happen to be together: it waits until the
                // others can go no further and takes those at the very same place.
                let together = if op.kind.is_convergence() {
                    if unsettled {
                        continue;
                    }
                    let ip = self.threads[index].ip;
                    (first..end)
                        .filter(|&i| {
                            matches!(self.threads[i].stop, Stop::Warp(_))
                                && self.threads[i].ip == ip
                        })
                        .fold(0, |m, i| m | 1 << self.threads[i].lane)
                } else {
                    let wanted = mask & alive;
                    let here = (first..end)
                        .filter(|&i| {
                            self.threads[i].stop == Stop::Warp(mask)
                                && self.warp_op(i).kind == op.kind
                        })
                        .fold(0, |m, i| m | 1 << self.threads[i].lane);
                    if here & wanted != wanted || wanted >> self.threads[index].lane & 1 == 0 {
                        continue;
                    }
                    wanted
                };
                let lanes: Vec<(u32, *mut u64, &WarpOp)> = (first..end)
                    .filter(|&i| together >> self.threads[i].lane & 1 == 1)
                    .map(|i| (self.threads[i].lane, self.threads[i].regs, self.warp_op(i)))
                    .collect();
                let block = first / self.per_block;
                let shared = (self.shared[block], self.shared_len as u64);
                if let Err((kind, text)) = warp::perform(&lanes, together, shared) {
                    self.cpu.failure = Some((kind, text));
                    return Err(self.failure(index));
                }
                for i in first..end {
                    if together >> self.threads[i].lane & 1 == 1 {
                        self.resume(i);
                    }
                }
                met = true;
                continue 'again;
            }
            return Ok(met);
        }
    }

    fn warp_op(&self, index: usize) -> &'a WarpOp {
        let x = unsafe { (*self.threads[index].ip).x };
        &self.launch.program.warp_ops[x as usize]
    }

    fn release_barriers(&mut self, block: usize) -> bool {
        let all = block * self.per_block..(block + 1) * self.per_block;
        let mut waiting = [0u32; 16];
        let mut wanted = [0u32; 16];
        let mut exited = 0;
        for t in &self.threads[all.clone()] {
            match t.stop {
                Stop::Barrier(id, count) => {
                    waiting[id as usize] += 1;
                    wanted[id as usize] = count;
                }
                Stop::Exit => exited += 1,
                _ => {}
            }
        }
        let mut released = false;
        for id in 0..16 {
            if waiting[id] == 0 {
                continue;
            }
            let per_block = self.per_block as u32;
            let whole = wanted[id] == 0 || wanted[id] >= per_block;
            let there = waiting[id] + self.barriers[block][id] + if whole { exited } else { 0 };
            if there
                < if wanted[id] == 0 {
                    per_block
                } else {
                    wanted[id].min(per_block)
                }
            {
                continue;
            }
            released = true;
            self.barriers[block][id] = 0;
            let at = |t: &Thread| matches!(t.stop, Stop::Barrier(i, _) if i == id as u32);
            // `bar.red` counts predicates; a plain barrier has none (c is 0).
            let mut counts = (0, 0);
            for t in self.threads[all.clone()].iter().filter(|t| at(t)) {
                let ins = unsafe { &*t.ip };
                if ins.c != 0 {
                    let set = unsafe { *t.regs.offset(ins.x as i32 as isize) } ^ ins.imm;
                    counts.0 += set & 1;
                    counts.1 += 1;
                }
            }
            for i in all.clone() {
                let t = &self.threads[i];
                if !at(t) {
                    continue;
                }
                let ins = unsafe { &*t.ip };
                let value = match ins.c {
                    1 => counts.0,
                    2 => (counts.0 == counts.1) as u64,
                    3 => (counts.0 > 0) as u64,
                    _ => 0,
                };
                if ins.c != 0 {
                    unsafe { *t.regs.offset(ins.d as isize) = value };
                }
                self.resume(i);
            }
        }
        released
    }

    fn release_cluster(&mut self) -> bool {
        let mut someone = false;
        let complete = self.threads.iter().all(|t| {
            someone |= t.arrived;
            t.arrived || t.stop == Stop::Exit
        });
        if !someone || !complete {
            return false;
        }
        self.phase += 1;
        for i in 0..self.threads.len() {
            self.threads[i].arrived = false;
            if self.threads[i].stop == Stop::ClusterWait {
                self.resume(i);
            }
        }
        true
    }

    /// Puts a thread at the start of the kernel.
    fn start(&mut self, index: usize) {
        let l = self.launch;
        let entry = &l.program.frames[0];
        let in_block = (index % self.per_block) as u32;
        let block = index / self.per_block;
        let t = &mut self.threads[index];
        t.ip = l.program.code.as_ptr();
        t.regs = unsafe { t.base.add(entry.constants.len()) };
        t.frame = 0;
        t.stop = Stop::Ready;
        t.phase = 0;
        t.arrived = false;
        t.lane = in_block % WARP as u32;
        t.calls.clear();
        unsafe { entry.fill(t.regs) };
        let tid = [
            in_block % l.block[0],
            in_block / l.block[0] % l.block[1],
            in_block / l.block[0] / l.block[1],
        ];
        let ctaid = self.ctaids[block];
        let clusters: [u32; 3] = std::array::from_fn(|i| l.grid[i] / l.cluster[i]);
        let in_cluster: [u32; 3] = std::array::from_fn(|i| ctaid[i] % l.cluster[i]);
        let rank = in_cluster[0] + l.cluster[0] * (in_cluster[1] + l.cluster[1] * in_cluster[2]);
        for &(slot, special) in &entry.specials {
            let value = match special {
                Special::Tid(i) => tid[i] as u64,
                Special::Ntid(i) => l.block[i] as u64,
                Special::Ctaid(i) => ctaid[i] as u64,
                Special::Nctaid(i) => l.grid[i] as u64,
                Special::Lane => t.lane as u64,
                Special::Warp => in_block as u64 / WARP as u64,
                Special::Warps => self.per_block.div_ceil(WARP) as u64,
                Special::Sm => (ctaid[0] % 4) as u64,
                Special::Sms => 4,
                Special::LaneMask(which) => {
                    let bit = 1u64 << t.lane;
                    (match which {
                        "eq" => bit,
                        "lt" => bit - 1,
                        "le" => bit | (bit - 1),
                        "gt" => !(bit | (bit - 1)),
                        _ => !(bit - 1),
                    }) as u32 as u64
                }
                Special::DynamicShared => l.dynamic_shared as u64,
                Special::TotalShared => self.shared_len as u64,
                Special::ClusterId(i) => (ctaid[i] / l.cluster[i]) as u64,
                Special::Nclusters(i) => clusters[i] as u64,
                Special::ClusterCtaid(i) => in_cluster[i] as u64,
                Special::ClusterNctaid(i) => l.cluster[i] as u64,
                Special::ClusterRank => rank as u64,
                Special::ClusterSize => l.cluster.iter().product::<u32>() as u64,
                Special::Workspace(lower) => {
                    if lower {
                        l.workspace as u32 as u64
                    } else {
                        l.workspace >> 32
                    }
                }
                Special::Zero => 0,
            };
            unsafe { *t.regs.offset(slot as isize) = value };
        }
    }

    /// Moves a waiting thread past the instruction at which it waits.
    fn resume(&mut self, index: usize) {
        let t = &mut self.threads[index];
        t.ip = unsafe { t.ip.add(1) };
        t.stop = Stop::Ready;
    }

    /// Runs a thread until it stops or its quantum is over.
    fn turn(&mut self, index: usize) {
        let block = index / self.per_block;
        let t = &mut self.threads[index];
        let cpu = &mut self.cpu;
        cpu.regs = t.regs;
        cpu.regs_end = unsafe { t.base.add(self.launch.program.window) };
        cpu.entry = unsafe { t.base.add(self.launch.program.frames[0].constants.len()) };
        cpu.local = t.local;
        cpu.frame = t.frame;
        cpu.carry = t.carry;
        cpu.shared = self.shared[block];
        cpu.rank = block as u32;
        cpu.linear_ctaid = self.ctaids[block][0];
        std::mem::swap(&mut cpu.calls, &mut t.calls);
        let mut ip = t.ip;
        let mut last = ip;
        let quantum = if self.launch.cooperative {
            COOPERATIVE_QUANTUM
        } else {
            QUANTUM
        };
        let mut left = quantum;
        while left > 0 {
            last = ip;
            // The code ends in an instruction that stops, so that ip stays inside it.
            ip = unsafe { ((*ip).run)(cpu, ip) };
            left -= 1;
            if ip.is_null() {
                break;
            }
        }
        cpu.steps += (quantum - left) as u64;
        std::mem::swap(&mut cpu.calls, &mut t.calls);
        t.regs = cpu.regs;
        t.frame = cpu.frame;
        t.carry = cpu.carry;
        if ip.is_null() {
            t.ip = last;
            t.stop = cpu.stop;
        } else {
            t.ip = ip;
        }
    }

    fn place(&self, index: usize) -> String {
        let l = self.launch;
        let in_block = (index % self.per_block) as u32;
        let tid = [
            in_block % l.block[0],
            in_block / l.block[0] % l.block[1],
            in_block / l.block[0] / l.block[1],
        ];
        format!(
            "block {:?} thread {:?}",
            self.ctaids[index / self.per_block],
            tid
        )
    }

    fn failure(&mut self, index: usize) -> Failure {
        let (kind, text) = self
            .cpu
            .failure
            .take()
            .unwrap_or((FailureKind::LaunchFailed, String::new()));
        let p = self.launch.program;
        let at = p.describe(self.threads[index].ip);
        Failure {
            kind,
            text: format!("{}: {}: {at}: {text}", p.name, self.place(index)),
        }
    }

    fn deadlock(&self) -> Failure {
        use std::fmt::Write;
        let p = self.launch.program;
        let mut text = format!("{}: deadlock, no thread can go on:", p.name);
        let mut shown: Vec<(Stop, *const Ins)> = Vec::new();
        for (i, t) in self.threads.iter().enumerate() {
            if t.stop == Stop::Exit || shown.contains(&(t.stop, t.ip)) || shown.len() >= 8 {
                continue;
            }
            shown.push((t.stop, t.ip));
            let same = self
                .threads
                .iter()
                .filter(|o| o.stop == t.stop && o.ip == t.ip)
                .count();
            let _ = write!(
                text,
                "\n  {same} threads, the first of them {}: {:?} at {}",
                self.place(i),
                t.stop,
                p.describe(t.ip)
            );
        }
        let exited = self.threads.iter().filter(|t| t.stop == Stop::Exit).count();
        let _ = write!(text, "\n  {exited} threads have ended");
        Failure {
            kind: FailureKind::LaunchFailed,
            text,
        }
    }
}

//! A kernel's statements to instructions that run without looking anything up.
//!
//! A kernel is decoded with the functions that it calls into one piece of code. What
//! cannot be decoded becomes an instruction that fails when a thread reaches it, so that
//! a module with exotic kernels can still be used for its plain ones.

use super::memory::{self, Atomic};
use super::ops;
use super::parse::{Arg, Function, Instruction, Module, Space, Statement, Variable, type_size};
use super::run::{Cpu, FailureKind, Ins, Step, Stop};
use super::warp::{Element, Kind, Reduce, Shuffle, Vote, WarpOp};
use std::collections::HashMap;
use std::sync::Arc;

/// The addresses of a module's variables in global and constant memory.
pub type Globals = HashMap<String, u64>;

/// Special registers, whose values are put into constant slots when a thread starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    Tid(usize),
    Ntid(usize),
    Ctaid(usize),
    Nctaid(usize),
    Lane,
    Warp,
    Warps,
    Sm,
    Sms,
    LaneMask(&'static str),
    DynamicShared,
    TotalShared,
    ClusterId(usize),
    Nclusters(usize),
    ClusterCtaid(usize),
    ClusterNctaid(usize),
    ClusterRank,
    ClusterSize,
    /// The lower (true) or upper half of the address of a cooperative launch's workspace.
    Workspace(bool),
    Zero,
}

fn special(name: &str) -> Option<Special> {
    let dim = |s: &str| {
        Some(["x", "y", "z"].iter().position(|d| *d == s).unwrap_or(3)).filter(|&d| d < 3)
    };
    if let Some((family, d)) = name.split_once('.') {
        let d = dim(d)?;
        return Some(match family {
            "%tid" => Special::Tid(d),
            "%ntid" => Special::Ntid(d),
            "%ctaid" => Special::Ctaid(d),
            "%nctaid" => Special::Nctaid(d),
            "%clusterid" => Special::ClusterId(d),
            "%nclusterid" => Special::Nclusters(d),
            "%cluster_ctaid" => Special::ClusterCtaid(d),
            "%cluster_nctaid" => Special::ClusterNctaid(d),
            _ => return None,
        });
    }
    Some(match name {
        "%laneid" => Special::Lane,
        "%warpid" => Special::Warp,
        "%nwarpid" => Special::Warps,
        "%smid" => Special::Sm,
        "%nsmid" => Special::Sms,
        "%lanemask_eq" => Special::LaneMask("eq"),
        "%lanemask_lt" => Special::LaneMask("lt"),
        "%lanemask_le" => Special::LaneMask("le"),
        "%lanemask_gt" => Special::LaneMask("gt"),
        "%lanemask_ge" => Special::LaneMask("ge"),
        "%dynamic_smem_size" => Special::DynamicShared,
        "%total_smem_size" => Special::TotalShared,
        "%cluster_ctarank" => Special::ClusterRank,
        "%cluster_nctarank" => Special::ClusterSize,
        // Where cooperative groups look for what `grid.sync()` counts in.
        "%envreg1" => Special::Workspace(false),
        "%envreg2" => Special::Workspace(true),
        "%gridid" | "%is_explicit_cluster" => Special::Zero,
        _ => return None,
    })
}

/// What a call of a function needs: its registers, constants and local memory.
#[derive(Debug, Default)]
pub struct Frame {
    pub slots: u32,
    /// In the order of memory below the window: slot -1 is the last.
    pub constants: Vec<u64>,
    pub specials: Vec<(i32, Special)>,
    pub local_size: u32,
}

impl Frame {
    /// Writes the constants below a window.
    ///
    /// # Safety
    /// There must be that much memory below `regs`.
    pub unsafe fn fill(&self, regs: *mut u64) {
        let n = self.constants.len();
        unsafe { std::ptr::copy_nonoverlapping(self.constants.as_ptr(), regs.sub(n), n) };
    }
}

/// A call of a device function: where its arguments and results are copied from and to,
/// as offsets into the two frames, and sizes.
struct Call {
    from: usize,
    to: usize,
    entry: usize,
    args: Vec<(u32, u32, u32)>,
    results: Vec<(u32, u32, u32)>,
}

/// A kernel ready to run.
pub struct Program {
    pub name: String,
    pub code: Vec<Ins>,
    pub frames: Vec<Frame>,
    /// Lists of slots for vectors, and of branch targets.
    pub extra: Vec<i32>,
    pub warp_ops: Vec<WarpOp>,
    pub atomics: Vec<Atomic>,
    calls: Vec<Call>,
    messages: Vec<String>,
    /// Whether threads can wait for one another.
    pub waits: bool,
    /// Slots of all of a thread's windows.
    pub window: usize,
    /// Bytes of all of a thread's frames.
    pub local: usize,
    /// Bytes of static shared memory.
    pub shared: u32,
    /// Memory instructions, each with a cached range.
    pub cached: usize,
    /// Offset and size of each parameter.
    pub params: Vec<(usize, usize)>,
    pub param_size: usize,
    pub cluster: Option<[u32; 3]>,
    pub max_threads: Option<u32>,
    lines: Vec<u32>,
    module: Arc<Module>,
}

impl Program {
    pub fn describe(&self, ip: *const Ins) -> String {
        let at = (ip as usize).wrapping_sub(self.code.as_ptr() as usize) / size_of::<Ins>();
        match self.lines.get(at) {
            Some(&line) => format!("line {line}: `{}`", self.module.line(line)),
            None => "outside the code".to_string(),
        }
    }

    /// The instructions that could not be decoded.
    pub fn unsupported(&self) -> &[String] {
        &self.messages
    }

    pub fn decode(module: &Arc<Module>, name: &str, globals: &Globals) -> Result<Program, String> {
        let entry = module
            .functions
            .get(name)
            .filter(|f| f.entry && !f.body.is_empty());
        let entry = entry.ok_or(format!("no kernel {name}"))?;
        let reached = reach(module, entry)?;
        let mut d = Decoder {
            module,
            globals,
            shared: HashMap::new(),
            reached: &reached,
            program: Program {
                name: name.to_string(),
                code: Vec::new(),
                frames: Vec::new(),
                extra: Vec::new(),
                warp_ops: Vec::new(),
                atomics: Vec::new(),
                calls: Vec::new(),
                messages: Vec::new(),
                waits: false,
                window: 0,
                local: 0,
                shared: 0,
                cached: 1,
                params: Vec::new(),
                param_size: 0,
                cluster: entry.cluster,
                max_threads: entry.max_threads,
                lines: Vec::new(),
                module: module.clone(),
            },
            function: 0,
            line: 0,
            scopes: Vec::new(),
            labels: HashMap::new(),
            fixups: Vec::new(),
            constants: Vec::new(),
            entry_specials: Vec::new(),
            slots: 0,
            local_size: 0,
            formals: Vec::new(),
        };
        d.layout_shared(&reached)?;
        let mut starts = Vec::new();
        for (n, f) in reached.iter().enumerate() {
            starts.push(d.program.code.len());
            d.function(n, f)?;
        }
        d.finish(&starts);
        Ok(d.program)
    }
}

/// The kernel and the functions that it can call, the kernel first.
fn reach<'a>(module: &'a Module, entry: &'a Function) -> Result<Vec<&'a Function>, String> {
    let mut found = vec![entry];
    let mut at = 0;
    while at < found.len() {
        for s in module.body(found[at])? {
            let Statement::Instruction(i) = s else {
                continue;
            };
            if !i.opcode.starts_with("call") {
                continue;
            }
            for a in &i.args {
                let Arg::Name(name) = a else { continue };
                let Some(f) = module.functions.get(*name) else {
                    continue;
                };
                if !f.body.is_empty() && !found.iter().any(|k| k.name == f.name) {
                    found.push(f);
                }
            }
        }
        at += 1;
    }
    Ok(found)
}

#[derive(Clone, Debug)]
enum Symbol<'a> {
    Register {
        slot: i32,
        width: u32,
    },
    Family {
        slot: i32,
        count: u32,
        width: u32,
    },
    /// A variable at an address of its space; FRAME is relative to the function's frame.
    Memory {
        space: u8,
        address: u64,
    },
    Targets(Vec<&'a str>),
}

#[derive(Default)]
struct Scope<'a> {
    parent: usize,
    symbols: HashMap<&'a str, Symbol<'a>>,
}

enum Fixup {
    Branch(usize),
    Table(usize, usize),
}

struct Decoder<'a> {
    module: &'a Arc<Module>,
    globals: &'a Globals,
    /// Offsets of shared variables, those of functions with the function's name before.
    shared: HashMap<String, u64>,
    reached: &'a [&'a Function],
    program: Program,
    function: usize,
    line: u32,
    scopes: Vec<Scope<'a>>,
    labels: HashMap<(usize, &'a str), usize>,
    fixups: Vec<(Fixup, &'a str, usize)>,
    /// Of the function at hand; constant n has slot -(n + 1).
    constants: Vec<u64>,
    entry_specials: Vec<(usize, Special)>,
    slots: i32,
    local_size: u32,
    /// For each function the frame offsets and sizes of its parameters and results.
    formals: Vec<(Places, Places)>,
}

type Decoded<T> = Result<T, String>;
/// Offsets and sizes of variables in a frame.
type Places = Vec<(u32, u32)>;

fn align_up(at: u32, align: usize) -> u32 {
    at.next_multiple_of(align.max(1) as u32)
}

impl<'a> Decoder<'a> {
    fn layout_shared(&mut self, reached: &[&'a Function]) -> Decoded<()> {
        let mut fixed: Vec<(String, Variable)> = Vec::new();
        let mut names = std::collections::HashSet::new();
        for f in reached {
            for s in self.module.body(f)? {
                match s {
                    Statement::Variable(v) if v.space == Space::Shared => {
                        fixed.push((format!("{}::{}", f.name, v.name), v));
                    }
                    Statement::Instruction(i) => i.args.iter().for_each(|a| collect(a, &mut names)),
                    _ => {}
                }
            }
        }
        for v in &self.module.variables {
            if v.space == Space::Shared && names.contains(v.name.as_str()) {
                fixed.push((v.name.clone(), v.clone()));
            }
        }
        let mut at = 0;
        let mut dynamic_align = 16;
        for (name, v) in fixed.iter().filter(|(_, v)| v.size > 0) {
            at = align_up(at, v.align);
            self.shared.insert(name.clone(), at as u64);
            at += v.size as u32;
        }
        for (_, v) in fixed.iter().filter(|(_, v)| v.size == 0) {
            dynamic_align = dynamic_align.max(v.align);
        }
        let start = if fixed.iter().any(|(_, v)| v.size == 0) {
            align_up(at, dynamic_align)
        } else {
            at
        };
        for (name, _) in fixed.iter().filter(|(_, v)| v.size == 0) {
            self.shared.insert(name.clone(), start as u64);
        }
        self.program.shared = start;
        Ok(())
    }

    fn function(&mut self, n: usize, f: &'a Function) -> Decoded<()> {
        self.function = n;
        self.constants = Vec::new();
        self.slots = 0;
        self.local_size = 0;
        self.labels.clear();
        self.fixups.clear();
        self.scopes = vec![Scope::default()];
        if n == 0 {
            let mut at = 0usize;
            for p in &f.params {
                at = at.next_multiple_of(p.align.max(1));
                self.program.params.push((at, p.size));
                let symbol = Symbol::Memory {
                    space: memory::PARAM,
                    address: at as u64,
                };
                self.scopes[0].symbols.insert(&p.name, symbol);
                at += p.size;
            }
            self.program.param_size = at;
            self.formals.push(Default::default());
            for g in self.reached.iter().skip(1) {
                // Offsets follow from the declarations alone, and calls need them early.
                let mut at = 0;
                let mut place = |vars: &[Variable]| -> Places {
                    vars.iter()
                        .map(|v| {
                            let start = align_up(at, v.align);
                            at = start + v.size as u32;
                            (start, v.size as u32)
                        })
                        .collect()
                };
                let params = place(&g.params);
                let results = place(&g.returns);
                self.formals.push((params, results));
            }
        } else {
            let (params, results) = self.formals[n].clone();
            let named = f
                .params
                .iter()
                .zip(&params)
                .chain(f.returns.iter().zip(&results));
            for (v, &(offset, size)) in named {
                let symbol = Symbol::Memory {
                    space: memory::FRAME,
                    address: offset as u64,
                };
                self.scopes[0].symbols.insert(&v.name, symbol);
                self.local_size = self.local_size.max(offset + size);
            }
        }
        let mut scope = 0;
        let module: &'a Module = self.module;
        for s in module.body(f)? {
            self.statement(s, &mut scope, f)?;
        }
        // Running off the end returns.
        self.emit(Ins { ..plain(step_ret) });
        for (fixup, label, scope) in std::mem::take(&mut self.fixups) {
            let target = self
                .label(label, scope)
                .ok_or(format!("no label {label}"))? as i64;
            match fixup {
                Fixup::Branch(at) => {
                    self.program.code[at].imm = (target - at as i64) as u64;
                }
                Fixup::Table(at, entry) => {
                    self.program.extra[entry] = (target - at as i64) as i32;
                }
            }
        }
        self.program.frames.push(Frame {
            slots: self.slots as u32,
            constants: std::mem::take(&mut self.constants),
            specials: Vec::new(),
            local_size: self.local_size.next_multiple_of(16),
        });
        Ok(())
    }

    fn finish(&mut self, starts: &[usize]) {
        let p = &mut self.program;
        for c in &mut p.calls {
            c.entry = starts[c.to];
        }
        for &(k, special) in &self.entry_specials {
            // Specials that only called functions use have no constant yet.
            let entry = &mut p.frames[0];
            while entry.constants.len() <= k {
                entry.constants.push(0);
            }
            entry.specials.push((-(k as i32) - 1, special));
        }
        for f in &mut p.frames {
            f.constants.reverse();
        }
        // Without recursion no function is active twice. With it there is some room.
        let depth = if p.calls.iter().any(|c| c.to <= c.from) {
            32
        } else {
            1
        };
        let size = |f: &Frame| f.slots as usize + f.constants.len();
        p.window = size(&p.frames[0]) + p.frames[1..].iter().map(size).sum::<usize>() * depth;
        p.local = p.frames[0].local_size as usize
            + p.frames[1..]
                .iter()
                .map(|f| f.local_size as usize)
                .sum::<usize>()
                * depth;
    }

    fn label(&self, name: &str, scope: usize) -> Option<usize> {
        let mut scope = scope;
        loop {
            if let Some(&at) = self.labels.get(&(scope, name)) {
                return Some(at);
            }
            if scope == 0 {
                return None;
            }
            scope = self.scopes[scope].parent;
        }
    }

    fn statement(&mut self, s: Statement<'a>, scope: &mut usize, f: &Function) -> Decoded<()> {
        match s {
            Statement::Open => {
                self.scopes.push(Scope {
                    parent: *scope,
                    symbols: HashMap::new(),
                });
                *scope = self.scopes.len() - 1;
            }
            Statement::Close => *scope = self.scopes[*scope].parent,
            Statement::Label(name) => {
                self.labels.insert((*scope, name), self.program.code.len());
            }
            Statement::Register(name, count, width) => {
                let slot = self.slots;
                self.slots += count.unwrap_or(1) as i32;
                let symbol = match count {
                    Some(count) => Symbol::Family { slot, count, width },
                    None => Symbol::Register { slot, width },
                };
                self.scopes[*scope].symbols.insert(name, symbol);
            }
            Statement::Targets(name, labels) => {
                self.scopes[*scope]
                    .symbols
                    .insert(name, Symbol::Targets(labels));
            }
            Statement::Variable(v) => {
                let symbol = match v.space {
                    Space::Shared => Symbol::Memory {
                        space: memory::SHARED,
                        address: self.shared[&format!("{}::{}", f.name, v.name)],
                    },
                    Space::Local | Space::Param => {
                        let start = align_up(self.local_size, v.align);
                        self.local_size = start + v.size as u32;
                        Symbol::Memory {
                            space: memory::FRAME,
                            address: start as u64,
                        }
                    }
                    _ => return Err(format!("variable {} in {}", v.name, f.name)),
                };
                // The name lives as long as the module, but not in this statement.
                let name: &'a str = Box::leak(v.name.into_boxed_str());
                self.scopes[*scope].symbols.insert(name, symbol);
            }
            Statement::Instruction(i) => {
                self.line = i.line;
                let start = self.program.code.len();
                if let Err(why) = self.instruction(&i, *scope) {
                    self.program.code.truncate(start);
                    self.program.lines.truncate(start);
                    self.fixups.retain(|(f, ..)| match f {
                        Fixup::Branch(at) | Fixup::Table(at, _) => *at < start,
                    });
                    let text = format!(
                        "line {}: unsupported: {} ({why})",
                        i.line,
                        self.module.line(i.line)
                    );
                    let x = self.program.messages.len() as u32;
                    self.program.messages.push(text);
                    self.emit(Ins {
                        x,
                        ..plain(step_unsupported)
                    });
                }
            }
        }
        Ok(())
    }

    fn emit(&mut self, ins: Ins) -> usize {
        self.program.code.push(ins);
        self.program.lines.push(self.line);
        self.program.code.len() - 1
    }

    fn constant(&mut self, value: u64) -> i32 {
        // Special registers of the kernel have constants too, which must stay theirs.
        let specials = if self.function == 0 {
            &self.entry_specials[..]
        } else {
            &[]
        };
        let known = (0..self.constants.len())
            .find(|&k| self.constants[k] == value && !specials.iter().any(|s| s.0 == k));
        let k = known.unwrap_or_else(|| {
            self.constants.push(value);
            self.constants.len() - 1
        });
        -(k as i32) - 1
    }

    fn temporary(&mut self) -> i32 {
        self.slots += 1;
        self.slots - 1
    }

    fn symbol(&self, name: &str, scope: usize) -> Option<Symbol<'a>> {
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number: Option<u32> = name[stem.len()..].parse().ok();
        let mut scope = scope;
        loop {
            let symbols = &self.scopes[scope].symbols;
            if let Some(s) = symbols.get(name)
                && !matches!(s, Symbol::Family { .. })
            {
                return Some(s.clone());
            }
            if let (Some(n), Some(&Symbol::Family { slot, count, width })) =
                (number, symbols.get(stem))
                && n < count
            {
                return Some(Symbol::Register {
                    slot: slot + n as i32,
                    width,
                });
            }
            if scope == 0 {
                break;
            }
            scope = self.scopes[scope].parent;
        }
        if let Some(&address) = self.globals.get(name) {
            return Some(Symbol::Memory {
                space: memory::GLOBAL,
                address,
            });
        }
        let &address = self.shared.get(name)?;
        Some(Symbol::Memory {
            space: memory::SHARED,
            address,
        })
    }

    fn special(&mut self, name: &str) -> Option<i32> {
        let which = special(name)?;
        let k = match self.entry_specials.iter().find(|s| s.1 == which) {
            Some(s) => s.0,
            None => {
                let k = if self.function == 0 {
                    self.constants.push(0);
                    self.constants.len() - 1
                } else {
                    let known = self
                        .entry_specials
                        .iter()
                        .map(|s| s.0 + 1)
                        .max()
                        .unwrap_or(0);
                    self.program.frames[0].constants.len().max(known)
                };
                self.entry_specials.push((k, which));
                k
            }
        };
        let slot = -(k as i32) - 1;
        if self.function == 0 {
            return Some(slot);
        }
        let d = self.temporary();
        self.emit(Ins {
            d,
            a: slot,
            ..plain(step_entry_special)
        });
        Some(d)
    }

    /// The slot of a source operand of a type.
    fn source(&mut self, arg: &Arg<'a>, ty: &str, scope: usize) -> Decoded<i32> {
        let mask = match type_size(ty) {
            Some(8) | None => u64::MAX,
            Some(n) => (1 << (n * 8)) - 1,
        };
        match arg {
            Arg::Int(v) if ty == "pred" => Ok(self.constant((*v != 0) as u64)),
            Arg::Int(v) => Ok(self.constant(*v as u64 & mask)),
            Arg::F32(bits) if ty == "f64" => {
                Ok(self.constant((f32::from_bits(*bits) as f64).to_bits()))
            }
            Arg::F32(bits) => Ok(self.constant(*bits as u64)),
            Arg::F64(v) if type_size(ty) == Some(4) => {
                Ok(self.constant((*v as f32).to_bits() as u64))
            }
            Arg::F64(v) => Ok(self.constant(v.to_bits())),
            Arg::Name("WARP_SZ") => Ok(self.constant(32)),
            Arg::Name(name) => match self.symbol(name, scope) {
                Some(Symbol::Register { slot, .. }) => Ok(slot),
                Some(Symbol::Memory { space, address }) => Ok(self.address_of(space, address, 0)),
                _ => self.special(name).ok_or(format!("unknown operand {name}")),
            },
            Arg::NameOffset(name, offset) => match self.symbol(name, scope) {
                Some(Symbol::Memory { space, address }) => {
                    Ok(self.address_of(space, address, *offset))
                }
                _ => Err(format!("unknown operand {name}")),
            },
            Arg::Not(name) => {
                let a = self.source(&Arg::Name(name), "pred", scope)?;
                let d = self.temporary();
                self.emit(Ins {
                    d,
                    a,
                    ..plain(step_not)
                });
                Ok(d)
            }
            other => Err(format!("operand {other:?}")),
        }
    }

    fn address_of(&mut self, space: u8, address: u64, offset: i64) -> i32 {
        let address = address.wrapping_add(offset as u64);
        if space != memory::FRAME || self.function == 0 {
            return self.constant(address);
        }
        let d = self.temporary();
        self.emit(Ins {
            d,
            imm: address,
            ..plain(step_frame_address)
        });
        d
    }

    /// The slot and width of a destination.
    fn destination(&mut self, arg: &Arg<'a>, scope: usize) -> Decoded<(i32, u32)> {
        match arg {
            Arg::Name("_") => Ok((self.temporary(), 64)),
            Arg::Name(name) => match self.symbol(name, scope) {
                Some(Symbol::Register { slot, width }) => Ok((slot, width)),
                _ => Err(format!("{name} is no register")),
            },
            other => Err(format!("destination {other:?}")),
        }
    }

    /// The base slot, offset and space of an address operand.
    fn address(&mut self, arg: &Arg<'a>, space: u8, scope: usize) -> Decoded<(i32, u64, u8)> {
        let Arg::Address(base, offset) = arg else {
            return Err(format!("{arg:?} is no address"));
        };
        let Some(base) = base else {
            return Ok((self.constant(0), *offset as u64, space));
        };
        match self.symbol(base, scope) {
            Some(Symbol::Register { slot, .. }) => {
                // A parameter's address taken into a register.
                let space = match space {
                    memory::FRAME if self.function == 0 => memory::PARAM,
                    memory::FRAME => memory::LOCAL,
                    s => s,
                };
                Ok((slot, *offset as u64, space))
            }
            Some(Symbol::Memory { space: at, address }) => {
                let imm = address.wrapping_add(*offset as u64);
                let space = if at == memory::SHARED && space == memory::CLUSTER {
                    space
                } else {
                    at
                };
                Ok((self.constant(0), imm, space))
            }
            _ => Err(format!("unknown address {base}")),
        }
    }

    fn cached(&mut self) -> u32 {
        self.program.cached += 1;
        self.program.cached as u32 - 1
    }

    /// The slots of a vector or of a single operand.
    fn sources(&mut self, arg: &Arg<'a>, ty: &str, scope: usize) -> Decoded<Vec<i32>> {
        match arg {
            Arg::Vector(parts) => parts.iter().map(|p| self.source(p, ty, scope)).collect(),
            other => Ok(vec![self.source(other, ty, scope)?]),
        }
    }

    fn destinations(&mut self, arg: &Arg<'a>, scope: usize) -> Decoded<Vec<i32>> {
        match arg {
            Arg::Vector(parts) => parts
                .iter()
                .map(|p| Ok(self.destination(p, scope)?.0))
                .collect(),
            Arg::Pair(a, b) => {
                let a = self.destination(&Arg::Name(a), scope)?.0;
                Ok(vec![a, self.destination(&Arg::Name(b), scope)?.0])
            }
            other => Ok(vec![self.destination(other, scope)?.0]),
        }
    }

    fn list(&mut self, slots: &[i32]) -> i32 {
        let at = self.program.extra.len() as i32;
        self.program.extra.extend_from_slice(slots);
        at
    }

    fn instruction(&mut self, i: &Instruction<'a>, scope: usize) -> Decoded<()> {
        let parts: Vec<&str> = i.opcode.split('.').collect();
        let guard = match i.guard {
            None => None,
            Some((name, negated)) => Some((self.source(&Arg::Name(name), "pred", scope)?, negated)),
        };
        if parts[0] == "bra" {
            let Some(Arg::Name(label)) = i.args.first() else {
                return Err("a branch without a label".to_string());
            };
            let run = match guard {
                None => step_branch as Step,
                Some((_, false)) => step_branch_if,
                Some((_, true)) => step_branch_unless,
            };
            let at = self.emit(Ins {
                a: guard.map_or(0, |g| g.0),
                ..plain(run)
            });
            self.fixups.push((Fixup::Branch(at), label, scope));
            return Ok(());
        }
        // A guarded instruction is jumped over.
        let jump = guard.map(|(a, negated)| {
            let run = if negated {
                step_branch_if as Step
            } else {
                step_branch_unless
            };
            self.emit(Ins { a, ..plain(run) })
        });
        self.unguarded(i, &parts, scope)?;
        if let Some(at) = jump {
            self.program.code[at].imm = (self.program.code.len() - at) as u64;
        }
        Ok(())
    }

    fn unguarded(&mut self, i: &Instruction<'a>, parts: &[&str], scope: usize) -> Decoded<()> {
        let args = &i.args[..];
        let has = |p: &str| parts.contains(&p);
        let ty = parts[parts.len() - 1];
        let arg = |n: usize| args.get(n).ok_or(format!("operand {n} is missing"));
        let unknown = || "unknown instruction".to_string();
        match parts[0] {
            "ld" | "ldu" => {
                let (lanes, space) = (lanes(parts), space_of(parts));
                let (a, imm, space) = self.address(arg(1)?, space, scope)?;
                let x = self.cached();
                if lanes == 1 {
                    let (d, width) = match arg(0)? {
                        Arg::Vector(v) if v.len() == 1 => self.destination(&v[0], scope)?,
                        other => self.destination(other, scope)?,
                    };
                    let run = memory::load_step(ty, space, 1, width).ok_or_else(unknown)?;
                    self.emit(Ins {
                        d,
                        a,
                        imm,
                        x,
                        c: width as i32,
                        ..plain(run)
                    });
                } else {
                    let run = memory::load_step(ty, space, lanes, 0).ok_or_else(unknown)?;
                    let slots = self.destinations(arg(0)?, scope)?;
                    if slots.len() != lanes {
                        return Err(format!("{} registers for {lanes} values", slots.len()));
                    }
                    let d = self.list(&slots);
                    self.emit(Ins {
                        d,
                        a,
                        imm,
                        x,
                        ..plain(run)
                    });
                }
            }
            "st" if !has("async") && !has("bulk") => {
                let (lanes, space) = (lanes(parts), space_of(parts));
                let (a, imm, space) = self.address(arg(0)?, space, scope)?;
                let x = self.cached();
                let run = memory::store_step(ty, space, lanes).ok_or_else(unknown)?;
                let slots = self.sources(arg(1)?, ty, scope)?;
                if slots.len() != lanes {
                    return Err(format!("{} registers for {lanes} values", slots.len()));
                }
                let b = if lanes == 1 {
                    slots[0]
                } else {
                    self.list(&slots)
                };
                self.emit(Ins {
                    a,
                    b,
                    imm,
                    x,
                    ..plain(run)
                });
            }
            "atom" | "red" if !has("async") => self.atomic(args, parts, scope)?,
            "mov" => match (arg(0)?, arg(1)?) {
                (Arg::Vector(to), from) => {
                    let bits = type_size(ty).ok_or_else(unknown)? * 8 / to.len();
                    let slots = self.destinations(arg(0)?, scope)?;
                    let a = self.source(from, ty, scope)?;
                    let d = self.list(&slots);
                    let c = slots.len() as i32;
                    self.emit(Ins {
                        d,
                        a,
                        c,
                        imm: bits as u64,
                        ..plain(step_unpack)
                    });
                }
                (to, Arg::Vector(from)) => {
                    let bits = type_size(ty).ok_or_else(unknown)? * 8 / from.len();
                    let part = ["b8", "b16", "b32", "b64"][(bits / 8).ilog2() as usize];
                    let slots = self.sources(arg(1)?, part, scope)?;
                    let d = self.destination(to, scope)?.0;
                    let a = self.list(&slots);
                    let c = slots.len() as i32;
                    self.emit(Ins {
                        d,
                        a,
                        c,
                        imm: bits as u64,
                        ..plain(step_pack)
                    });
                }
                (to, Arg::Name("%clock" | "%clock_hi" | "%clock64" | "%globaltimer")) => {
                    let (d, width) = self.destination(to, scope)?;
                    self.emit(Ins {
                        d,
                        c: width as i32,
                        ..plain(step_clock)
                    });
                }
                _ => self.compute(args, parts, scope)?,
            },
            "cvta" => {
                let d = self.destination(arg(0)?, scope)?.0;
                let a = self.source(arg(1)?, ty, scope)?;
                let to = has("to");
                let run: Step = match parts.iter().find(|p| is_space(p)) {
                    Some(&("shared" | "shared::cta")) if to => step_to_shared,
                    Some(&("shared" | "shared::cta")) => step_from_shared,
                    Some(&"shared::cluster") if !to => step_from_cluster,
                    Some(&"local") if to => step_to_local,
                    Some(&"local") => step_from_local,
                    Some(&"param") if self.function > 0 && to => step_to_local,
                    Some(&"param") if self.function > 0 => step_from_local,
                    Some(&"param") if to => step_to_param,
                    Some(&"param") => step_from_param,
                    Some(&("global" | "const")) => step_move,
                    _ => return Err(unknown()),
                };
                self.emit(Ins { d, a, ..plain(run) });
            }
            "isspacep" => {
                let d = self.destination(arg(0)?, scope)?.0;
                let a = self.source(arg(1)?, "u64", scope)?;
                let run: Step = match parts[1] {
                    "shared" | "shared::cta" | "shared::cluster" => step_is_shared,
                    "local" => step_is_local,
                    "global" => step_is_global,
                    _ => return Err(unknown()),
                };
                self.emit(Ins { d, a, ..plain(run) });
            }
            "mapa" => {
                let d = self.destination(arg(0)?, scope)?.0;
                let a = self.source(arg(1)?, ty, scope)?;
                let b = self.source(arg(2)?, "u32", scope)?;
                let run = if has("shared::cluster") {
                    step_map_shared
                } else {
                    step_map as Step
                };
                self.emit(Ins {
                    d,
                    a,
                    b,
                    ..plain(run)
                });
            }
            "getctarank" => {
                let d = self.destination(arg(0)?, scope)?.0;
                let a = self.source(arg(1)?, ty, scope)?;
                let run = if has("shared::cluster") {
                    step_rank_shared
                } else {
                    step_rank as Step
                };
                self.emit(Ins { d, a, ..plain(run) });
            }
            "setp" => self.set_predicate(args, parts, scope)?,
            "set" => {
                let (to, from) = (parts[parts.len() - 2], ty);
                let d = self.destination(arg(0)?, scope)?.0;
                let a = self.source(arg(1)?, from, scope)?;
                let b = self.source(arg(2)?, from, scope)?;
                if let Some(run) = ops::set_pair(to, from) {
                    let imm = ops::comparison_number(parts[1]).ok_or_else(unknown)?;
                    self.emit(Ins {
                        d,
                        a,
                        b,
                        imm,
                        ..plain(run)
                    });
                    return Ok(());
                }
                let p = self.temporary();
                let run = ops::comparison(parts[1], from).ok_or_else(unknown)?;
                self.emit(Ins {
                    d: p,
                    a,
                    b,
                    ..plain(run)
                });
                if let Some(c) = args.get(3) {
                    let c = self.source(c, "pred", scope)?;
                    self.combine_predicates(parts[2], p, p, c)?;
                }
                let run = ops::set_value(to).ok_or_else(unknown)?;
                self.emit(Ins {
                    d,
                    a: p,
                    ..plain(run)
                });
            }
            "cvt" => {
                let (d, width) = self.destination(arg(0)?, scope)?;
                let from = if ty.ends_with("x2") && ty.starts_with('e') {
                    "b16"
                } else {
                    ty
                };
                let a = self.source(arg(1)?, from, scope)?;
                if args.len() > 2 || ty.ends_with("x2") || parts[parts.len() - 2].ends_with("x2") {
                    let run = ops::convert_pair(parts).ok_or_else(unknown)?;
                    let b = if args.len() > 2 {
                        self.source(&args[2], from, scope)?
                    } else {
                        a
                    };
                    self.emit(Ins {
                        d,
                        a,
                        b,
                        ..plain(run)
                    });
                } else {
                    let (run, imm) = ops::convert(parts, width).ok_or_else(unknown)?;
                    self.emit(Ins {
                        d,
                        a,
                        imm,
                        ..plain(run)
                    });
                }
            }
            "bfi" => {
                let d = self.destination(arg(0)?, scope)?.0;
                let a = self.source(arg(1)?, ty, scope)?;
                let b = self.source(arg(2)?, ty, scope)?;
                let c = self.source(arg(3)?, "u32", scope)?;
                let x = self.source(arg(4)?, "u32", scope)? as u32;
                let run = ops::bit_insert(ty).ok_or_else(unknown)?;
                self.emit(Ins {
                    d,
                    a,
                    b,
                    c,
                    x,
                    ..plain(run)
                });
            }
            "bar" | "barrier" => self.barrier(args, parts, scope)?,
            "shfl" if has("sync") => {
                let how = match parts[2] {
                    "up" => Shuffle::Up,
                    "down" => Shuffle::Down,
                    "bfly" => Shuffle::Butterfly,
                    _ => Shuffle::Index,
                };
                let d = self.destinations(arg(0)?, scope)?;
                let a = vec![self.source(arg(1)?, "b32", scope)?];
                let b = vec![self.source(arg(2)?, "b32", scope)?];
                let c = vec![self.source(arg(3)?, "b32", scope)?];
                let mask = self.source(arg(4)?, "b32", scope)?;
                let kind = Kind::Shuffle(how);
                self.warp(
                    WarpOp {
                        kind,
                        d,
                        a,
                        b,
                        c,
                        imm: 0,
                    },
                    mask,
                );
            }
            "vote" if has("sync") => {
                let how = match parts[2] {
                    "all" => Vote::All,
                    "any" => Vote::Any,
                    "uni" => Vote::Uniform,
                    _ => Vote::Ballot,
                };
                let d = self.destinations(arg(0)?, scope)?;
                let (operand, negated) = match arg(1)? {
                    Arg::Not(name) => (Arg::Name(name), 1),
                    other => (other.clone(), 0),
                };
                let a = vec![self.source(&operand, "pred", scope)?];
                let mask = self.source(arg(2)?, "b32", scope)?;
                let kind = Kind::Vote(how);
                self.warp(
                    WarpOp {
                        kind,
                        d,
                        a,
                        b: vec![],
                        c: vec![],
                        imm: negated,
                    },
                    mask,
                );
            }
            "match" => {
                let d = self.destinations(arg(0)?, scope)?;
                let a = vec![self.source(arg(1)?, ty, scope)?];
                let mask = self.source(arg(2)?, "b32", scope)?;
                let kind = Kind::Match {
                    all: parts[1] == "all",
                    wide: ty == "b64",
                };
                self.warp(
                    WarpOp {
                        kind,
                        d,
                        a,
                        b: vec![],
                        c: vec![],
                        imm: 0,
                    },
                    mask,
                );
            }
            "redux" => {
                let how = match (parts[2], ty) {
                    ("add", _) => Reduce::Add,
                    ("min", "u32") => Reduce::MinU,
                    ("min", "s32") => Reduce::MinS,
                    ("max", "u32") => Reduce::MaxU,
                    ("max", "s32") => Reduce::MaxS,
                    ("and", _) => Reduce::And,
                    ("or", _) => Reduce::Or,
                    ("xor", _) => Reduce::Xor,
                    _ => return Err(unknown()),
                };
                let d = self.destinations(arg(0)?, scope)?;
                let a = vec![self.source(arg(1)?, ty, scope)?];
                let mask = self.source(arg(2)?, "b32", scope)?;
                let kind = Kind::Reduce(how);
                self.warp(
                    WarpOp {
                        kind,
                        d,
                        a,
                        b: vec![],
                        c: vec![],
                        imm: 0,
                    },
                    mask,
                );
            }
            "elect" => {
                // The lane comes first and the predicate second; a lone one is the lane.
                let mut d = self.destinations(arg(0)?, scope)?;
                if d.len() == 1 {
                    d.push(self.temporary());
                }
                d.reverse();
                let mask = self.source(arg(1)?, "b32", scope)?;
                let kind = Kind::Elect;
                self.warp(
                    WarpOp {
                        kind,
                        d,
                        a: vec![],
                        b: vec![],
                        c: vec![],
                        imm: 0,
                    },
                    mask,
                );
            }
            "activemask" => {
                let d = self.destinations(arg(0)?, scope)?;
                let mask = self.constant(u32::MAX as u64);
                let kind = Kind::ActiveMask;
                self.warp(
                    WarpOp {
                        kind,
                        d,
                        a: vec![],
                        b: vec![],
                        c: vec![],
                        imm: 0,
                    },
                    mask,
                );
            }
            "mma" => self.multiply(args, parts, scope)?,
            "ldmatrix" | "stmatrix" if has("m8n8") => {
                let load = parts[0] == "ldmatrix";
                let count = if has("x4") {
                    4
                } else if has("x2") {
                    2
                } else {
                    1
                };
                let transposed = has("trans");
                let (vector, address) = if load {
                    (arg(0)?, arg(1)?)
                } else {
                    (arg(1)?, arg(0)?)
                };
                let (a, imm, _) = self.address(address, memory::SHARED, scope)?;
                let (d, b, kind) = if load {
                    let d = self.destinations(vector, scope)?;
                    (d, vec![], Kind::LoadMatrix { count, transposed })
                } else {
                    let b = self.sources(vector, "b32", scope)?;
                    (vec![], b, Kind::StoreMatrix { count, transposed })
                };
                if d.len().max(b.len()) != count as usize {
                    return Err("registers do not match the number of matrices".to_string());
                }
                let mask = self.constant(u32::MAX as u64);
                self.warp(
                    WarpOp {
                        kind,
                        d,
                        a: vec![a],
                        b,
                        c: vec![],
                        imm: imm as i64,
                    },
                    mask,
                );
            }
            "cp" if has("commit_group") || has("wait_group") || has("wait_all") => {
                self.emit(plain(step_nothing));
            }
            "cp" if parts.get(2).is_some_and(|p| *p == "ca" || *p == "cg") => {
                let (d, to, _) = self.address(arg(0)?, memory::SHARED, scope)?;
                let (a, from, _) = self.address(arg(1)?, memory::GLOBAL, scope)?;
                let Arg::Int(bytes @ (4 | 8 | 16)) = *arg(2)? else {
                    return Err("the size of the copy".to_string());
                };
                let b = match args.get(3) {
                    Some(size) => self.source(size, "u32", scope)?,
                    None => self.constant(bytes as u64),
                };
                let x = self.cached();
                let imm = to as u32 as u64 | from << 32;
                let c = bytes as i32;
                self.emit(Ins {
                    d,
                    a,
                    b,
                    c,
                    imm,
                    x,
                    ..plain(memory::copy_async)
                });
            }
            "call" => self.call(args, scope)?,
            "ret" => {
                self.emit(plain(step_ret));
            }
            "exit" => {
                self.emit(plain(step_exit));
            }
            "trap" => {
                self.emit(plain(step_trap));
            }
            "brx" => {
                let a = self.source(arg(0)?, "u32", scope)?;
                let Arg::Name(table) = arg(1)? else {
                    return Err(unknown());
                };
                let Some(Symbol::Targets(labels)) = self.symbol(table, scope) else {
                    return Err(format!("no table {table}"));
                };
                let x = self.list(&vec![0; labels.len()]) as u32;
                let at = self.emit(Ins {
                    a,
                    x,
                    c: labels.len() as i32,
                    ..plain(step_table)
                });
                for (n, label) in labels.into_iter().enumerate() {
                    self.fixups
                        .push((Fixup::Table(at, x as usize + n), label, scope));
                }
            }
            "membar" | "fence" | "prefetch" | "prefetchu" | "nanosleep" | "brkpt" | "discard"
            | "applypriority" | "griddepcontrol" | "pmevent" | "setmaxnreg" => {
                self.emit(plain(step_nothing));
            }
            "createpolicy" => {
                let d = self.destination(arg(0)?, scope)?.0;
                let a = self.constant(0);
                self.emit(Ins {
                    d,
                    a,
                    ..plain(step_move)
                });
            }
            _ => self.compute(args, parts, scope)?,
        }
        Ok(())
    }

    /// Instructions from `ops`: up to three sources to a register.
    fn compute(&mut self, args: &[Arg<'a>], parts: &[&str], scope: usize) -> Decoded<()> {
        let alu = ops::alu(parts).ok_or("unknown instruction")?;
        let mut destination = args.first().ok_or("no operands")?;
        if let Arg::Pair(..) = destination {
            return Err("a second result".to_string());
        }
        if let Arg::Vector(v) = destination
            && v.len() == 1
        {
            destination = &v[0];
        }
        let d = self.destination(destination, scope)?.0;
        let mut slots = [0; 3];
        let mut imm = 0;
        for (n, a) in args[1..].iter().enumerate() {
            match (n, a) {
                (0..3, a) => slots[n] = self.source(a, alu.types[n], scope)?,
                (3, Arg::Int(v)) => imm = *v as u64,
                _ => return Err("too many operands".to_string()),
            }
        }
        let [a, b, c] = slots;
        self.emit(Ins {
            d,
            a,
            b,
            c,
            imm,
            ..plain(alu.step)
        });
        Ok(())
    }

    fn combine_predicates(&mut self, op: &str, d: i32, a: i32, b: i32) -> Decoded<()> {
        let alu = ops::alu(&[op, "pred"]).ok_or("unknown combination")?;
        self.emit(Ins {
            d,
            a,
            b,
            ..plain(alu.step)
        });
        Ok(())
    }

    fn set_predicate(&mut self, args: &[Arg<'a>], parts: &[&str], scope: usize) -> Decoded<()> {
        let ty = parts[parts.len() - 1];
        let [to, x, y, rest @ ..] = args else {
            return Err("operands are missing".to_string());
        };
        let (a, b) = (self.source(x, ty, scope)?, self.source(y, ty, scope)?);
        if let (Arg::Pair(p, q), "f16x2" | "bf16x2") = (to, ty) {
            // One predicate for each half.
            let p = self.destination(&Arg::Name(p), scope)?.0;
            let q = self.destination(&Arg::Name(q), scope)?.0;
            let imm = ops::comparison_number(parts[1]).ok_or("unknown comparison")?;
            let run = ops::set_pair("b32", ty).ok_or("unknown comparison")?;
            let both = self.temporary();
            self.emit(Ins {
                d: both,
                a,
                b,
                imm,
                ..plain(run)
            });
            self.emit(Ins {
                d: p,
                a: both,
                imm: 0,
                ..plain(step_bit)
            });
            self.emit(Ins {
                d: q,
                a: both,
                imm: 16,
                ..plain(step_bit)
            });
            return Ok(());
        }
        let run = ops::comparison(parts[1], ty).ok_or("unknown comparison")?;
        let (p, q) = match to {
            Arg::Pair(p, q) => (*p, Some(*q)),
            Arg::Name(p) => (*p, None),
            _ => return Err("the destination".to_string()),
        };
        let p = self.destination(&Arg::Name(p), scope)?.0;
        if rest.is_empty() && q.is_none() {
            self.emit(Ins {
                d: p,
                a,
                b,
                ..plain(run)
            });
            return Ok(());
        }
        let (yes, no) = (self.temporary(), self.temporary());
        // The third source may be the very predicate that is written.
        let c = match rest.first() {
            Some(c) => Some(self.source(c, "pred", scope)?),
            None => None,
        };
        self.emit(Ins {
            d: yes,
            a,
            b,
            ..plain(run)
        });
        self.emit(Ins {
            d: no,
            a: yes,
            ..plain(step_not)
        });
        if let Some(c) = c {
            self.combine_predicates(parts[2], yes, yes, c)?;
            self.combine_predicates(parts[2], no, no, c)?;
        }
        self.emit(Ins {
            d: p,
            a: yes,
            ..plain(step_move)
        });
        if let Some(q) = q {
            let q = self.destination(&Arg::Name(q), scope)?.0;
            self.emit(Ins {
                d: q,
                a: no,
                ..plain(step_move)
            });
        }
        Ok(())
    }

    fn atomic(&mut self, args: &[Arg<'a>], parts: &[&str], scope: usize) -> Decoded<()> {
        const OPS: [&str; 10] = [
            "add", "exch", "cas", "min", "max", "and", "or", "xor", "inc", "dec",
        ];
        let ty = parts[parts.len() - 1];
        let op = parts
            .iter()
            .find(|p| OPS.contains(p))
            .ok_or("unknown operation")?;
        let returns = parts[0] == "atom";
        let at = returns as usize;
        let operand = |n: usize| args.get(at + n).ok_or("operands are missing");
        let (a, imm, space) = self.address(operand(0)?, space_of(parts), scope)?;
        let operands = self.sources(operand(1)?, ty, scope)?;
        let c = match *op {
            "cas" => self.source(operand(2)?, ty, scope)?,
            _ => operands[0],
        };
        let results = if returns {
            self.destinations(&args[0], scope)?
        } else {
            Vec::new()
        };
        let combine = memory::combine(op, ty).ok_or("unknown operation")?;
        let bytes = type_size(ty).filter(|b| *b <= 8).ok_or("unknown type")? as u32;
        let cached = self.cached();
        let x = self.program.atomics.len() as u32;
        self.program.atomics.push(Atomic {
            combine,
            bytes,
            cached,
            results,
            operands,
        });
        self.emit(Ins {
            a,
            c,
            imm,
            x,
            ..plain(memory::atomic_step(space))
        });
        Ok(())
    }

    fn barrier(&mut self, args: &[Arg<'a>], parts: &[&str], scope: usize) -> Decoded<()> {
        let has = |p: &str| parts.contains(&p);
        if has("cluster") {
            self.program.waits = true;
            let run = if has("arrive") {
                step_cluster_arrive
            } else {
                step_cluster_wait as Step
            };
            self.emit(plain(run));
            return Ok(());
        }
        if has("warp") {
            let mask = self.source(args.first().ok_or("no mask")?, "b32", scope)?;
            let kind = Kind::Barrier;
            self.warp(
                WarpOp {
                    kind,
                    d: vec![],
                    a: vec![],
                    b: vec![],
                    c: vec![],
                    imm: 0,
                },
                mask,
            );
            return Ok(());
        }
        self.program.waits = true;
        let mut ins = plain(if has("arrive") {
            step_arrive as Step
        } else {
            step_barrier
        });
        let mut args = args;
        if has("red") {
            ins.d = self
                .destination(args.first().ok_or("no destination")?, scope)?
                .0;
            ins.c = if has("popc") {
                1
            } else if has("and") {
                2
            } else {
                3
            };
            let predicate = args.last().ok_or("no predicate")?;
            let (name, negated) = match predicate {
                Arg::Not(name) => (Arg::Name(name), 1),
                other => (other.clone(), 0),
            };
            ins.x = self.source(&name, "pred", scope)? as u32;
            ins.imm = negated;
            args = &args[1..args.len() - 1];
        }
        ins.a = match args.first() {
            Some(id) => self.source(id, "u32", scope)?,
            None => self.constant(0),
        };
        ins.b = match args.get(1) {
            Some(count) => self.source(count, "u32", scope)?,
            None => self.constant(0),
        };
        self.emit(ins);
        Ok(())
    }

    fn warp(&mut self, op: WarpOp, mask: i32) {
        self.program.waits = true;
        let x = self.program.warp_ops.len() as u32;
        self.program.warp_ops.push(op);
        self.emit(Ins {
            a: mask,
            x,
            ..plain(step_warp)
        });
    }

    fn multiply(&mut self, args: &[Arg<'a>], parts: &[&str], scope: usize) -> Decoded<()> {
        let unknown = "unknown matrix shape or type";
        let [.., to, a_type, b_type, _] = parts else {
            return Err(unknown.to_string());
        };
        let shape = parts
            .iter()
            .find(|p| p.starts_with('m') && p.contains('k'))
            .ok_or(unknown)?;
        let mut numbers = shape[1..].split(['n', 'k']).map(|n| n.parse::<u8>());
        let mut number = || numbers.next().and_then(|n| n.ok()).ok_or(unknown);
        let (m, n, k) = (number()?, number()?, number()?);
        let element = match *a_type {
            "f16" => Element::F16,
            "bf16" => Element::Bf16,
            "tf32" => Element::Tf32,
            "f64" => Element::F64,
            "s8" => Element::S8,
            "u8" => Element::U8,
            _ => return Err(unknown.to_string()),
        };
        let half = *to == "f16";
        let (d, a) = (
            self.destinations(&args[0], scope)?,
            self.sources(&args[1], "b32", scope)?,
        );
        let b = self.sources(&args[2], "b32", scope)?;
        let c = self.sources(&args[3], if *to == "f64" { "f64" } else { "f32" }, scope)?;
        let packed: usize = match element {
            Element::F16 | Element::Bf16 => 2,
            Element::S8 | Element::U8 => 4,
            _ => 1,
        };
        let (mm, nn, kk) = (m as usize, n as usize, k as usize);
        let fits = nn == 8
            && a_type == b_type
            && mm.is_multiple_of(8)
            && a.len() * 32 * packed == mm * kk
            && b.len() * 32 * packed == kk * nn
            && d.len() == mm / 4 / (1 + half as usize)
            && c.len() == d.len()
            && parts.contains(&"row")
            && parts.contains(&"col");
        if !fits {
            return Err(unknown.to_string());
        }
        let mask = self.constant(u32::MAX as u64);
        let kind = Kind::Multiply {
            m,
            n,
            k,
            element,
            half,
        };
        self.warp(
            WarpOp {
                kind,
                d,
                a,
                b,
                c,
                imm: 0,
            },
            mask,
        );
        Ok(())
    }

    fn call(&mut self, args: &[Arg<'a>], scope: usize) -> Decoded<()> {
        let (results, name, params) = match args {
            [Arg::List(r), Arg::Name(n), Arg::List(p)] => (&r[..], *n, &p[..]),
            [Arg::List(r), Arg::Name(n)] => (&r[..], *n, &[][..]),
            [Arg::Name(n), Arg::List(p)] => (&[][..], *n, &p[..]),
            [Arg::Name(n)] => (&[][..], *n, &[][..]),
            _ => return Err("an indirect call".to_string()),
        };
        let offsets = |list: &[Arg<'a>]| -> Decoded<Vec<u32>> {
            list.iter()
                .map(|a| match a {
                    Arg::Name(n) => match self.symbol(n, scope) {
                        Some(Symbol::Memory {
                            space: memory::FRAME,
                            address,
                        }) => Ok(address as u32),
                        _ => Err(format!("argument {n}")),
                    },
                    other => Err(format!("argument {other:?}")),
                })
                .collect()
        };
        let (results, params) = (offsets(results)?, offsets(params)?);
        match name {
            "vprintf" => {
                let (a, b) = (params[0] as i32, params[1] as i32);
                self.emit(Ins {
                    a,
                    b,
                    ..plain(step_print)
                });
                return Ok(());
            }
            "__assertfail" => {
                let (a, b, c) = (params[0] as i32, params[1] as i32, params[2] as i32);
                self.emit(Ins {
                    a,
                    b,
                    c,
                    ..plain(step_assert)
                });
                return Ok(());
            }
            _ => {}
        }
        let to = self.reached.iter().position(|f| f.name == name);
        let to = to.ok_or(format!("no function {name}"))?;
        let (formal_params, formal_results) = &self.formals[to];
        let pair = |mine: &[u32], formal: &[(u32, u32)]| {
            mine.iter()
                .zip(formal)
                .map(|(&m, &(o, s))| (m, o, s))
                .collect::<Vec<_>>()
        };
        let x = self.program.calls.len() as u32;
        self.program.calls.push(Call {
            from: self.function,
            to,
            entry: 0,
            args: pair(&params, formal_params),
            results: pair(&results, formal_results),
        });
        self.emit(Ins {
            x,
            ..plain(step_call)
        });
        self.emit(Ins {
            x,
            ..plain(step_returned)
        });
        Ok(())
    }
}

fn collect<'a>(arg: &Arg<'a>, names: &mut std::collections::HashSet<&'a str>) {
    match arg {
        Arg::Name(n) | Arg::NameOffset(n, _) | Arg::Address(Some(n), _) => {
            names.insert(n);
        }
        Arg::Vector(v) | Arg::List(v) => v.iter().for_each(|a| collect(a, names)),
        _ => {}
    }
}

fn plain(run: Step) -> Ins {
    Ins {
        run,
        d: 0,
        a: 0,
        b: 0,
        c: 0,
        imm: 0,
        x: 0,
    }
}

fn lanes(parts: &[&str]) -> usize {
    if parts.contains(&"v2") {
        2
    } else if parts.contains(&"v4") {
        4
    } else if parts.contains(&"v8") {
        8
    } else {
        1
    }
}

fn is_space(part: &str) -> bool {
    matches!(
        part,
        "global" | "const" | "shared" | "shared::cta" | "shared::cluster" | "local" | "param"
    ) || part.starts_with("param::")
}

fn space_of(parts: &[&str]) -> u8 {
    match parts.iter().find(|p| is_space(p)) {
        Some(&("global" | "const")) => memory::GLOBAL,
        Some(&("shared" | "shared::cta")) => memory::SHARED,
        Some(&"shared::cluster") => memory::CLUSTER,
        Some(&"local") => memory::LOCAL,
        Some(_) => memory::FRAME,
        None => memory::GENERIC,
    }
}

fn jump(i: *const Ins) -> *const Ins {
    unsafe { i.offset((*i).imm as i64 as isize) }
}

fn step_branch(_: &mut Cpu, i: *const Ins) -> *const Ins {
    jump(i)
}

fn step_branch_if(t: &mut Cpu, i: *const Ins) -> *const Ins {
    if t.r(unsafe { (*i).a }) != 0 {
        jump(i)
    } else {
        unsafe { i.add(1) }
    }
}

fn step_branch_unless(t: &mut Cpu, i: *const Ins) -> *const Ins {
    if t.r(unsafe { (*i).a }) == 0 {
        jump(i)
    } else {
        unsafe { i.add(1) }
    }
}

fn step_table(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let n = t.r(q.a) as u32;
    if n >= q.c as u32 {
        return t.fail(
            FailureKind::LaunchFailed,
            "an index outside the branch table",
        );
    }
    unsafe { i.offset(t.program.extra[(q.x + n) as usize] as isize) }
}

fn step_nothing(_: &mut Cpu, i: *const Ins) -> *const Ins {
    unsafe { i.add(1) }
}

fn step_ret(t: &mut Cpu, _: *const Ins) -> *const Ins {
    t.ret()
}

fn stop(t: &mut Cpu, why: Stop) -> *const Ins {
    t.stop = why;
    std::ptr::null()
}

fn step_exit(t: &mut Cpu, _: *const Ins) -> *const Ins {
    stop(t, Stop::Exit)
}

fn step_trap(t: &mut Cpu, _: *const Ins) -> *const Ins {
    t.fail(FailureKind::LaunchFailed, "trap")
}

fn step_unsupported(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let text = t.program.messages[unsafe { (*i).x } as usize].clone();
    t.fail(FailureKind::IllegalInstruction, text)
}

fn step_warp(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let mask = t.r(unsafe { (*i).a }) as u32;
    stop(t, Stop::Warp(mask))
}

fn step_barrier(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let (id, count) = (t.r(q.a) as u32 & 15, t.r(q.b) as u32);
    stop(t, Stop::Barrier(id, count))
}

fn step_arrive(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let (id, count) = (t.r(q.a) as u32 & 15, t.r(q.b) as u32);
    stop(t, Stop::Arrive(id, count))
}

fn step_cluster_arrive(t: &mut Cpu, _: *const Ins) -> *const Ins {
    stop(t, Stop::ClusterArrive)
}

fn step_cluster_wait(t: &mut Cpu, _: *const Ins) -> *const Ins {
    stop(t, Stop::ClusterWait)
}

macro_rules! unary_step {
    ($name:ident, |$t:ident, $a:ident| $e:expr) => {
        fn $name($t: &mut Cpu, i: *const Ins) -> *const Ins {
            let q = unsafe { &*i };
            let $a = $t.r(q.a);
            let v: u64 = $e;
            $t.set(q.d, v);
            unsafe { i.add(1) }
        }
    };
}

unary_step!(step_move, |t, a| a);
unary_step!(step_not, |t, a| a ^ 1);
unary_step!(step_to_shared, |t, a| a.wrapping_sub(t.shared as u64));
unary_step!(step_from_shared, |t, a| a.wrapping_add(t.shared as u64));
unary_step!(step_to_local, |t, a| a.wrapping_sub(t.local as u64));
unary_step!(step_from_local, |t, a| a.wrapping_add(t.local as u64));
unary_step!(step_to_param, |t, a| a
    .wrapping_sub(t.params.as_ptr() as u64));
unary_step!(step_from_param, |t, a| a
    .wrapping_add(t.params.as_ptr() as u64));
unary_step!(step_from_cluster, |t, a| {
    let offset = a & ((1 << memory::RANK_SHIFT) - 1);
    match (a >> memory::RANK_SHIFT) as usize {
        0 => a.wrapping_add(t.shared as u64),
        rank => t.cluster.get(rank - 1).map_or(0, |c| c.0 as u64 + offset),
    }
});
unary_step!(step_is_shared, |t, a| {
    let inside = |&(base, len): &(*mut u8, u64)| a.wrapping_sub(base as u64) < len;
    (inside(&(t.shared, t.shared_len)) || t.cluster.iter().any(inside)) as u64
});
unary_step!(
    step_is_local,
    |t, a| (a.wrapping_sub(t.local as u64) < t.local_len) as u64
);
unary_step!(step_is_global, |t, a| !t.find_own(a, 1) as u64);
unary_step!(step_rank_shared, |t, a| match a >> memory::RANK_SHIFT {
    0 => t.rank as u64,
    n => n - 1,
});
unary_step!(step_rank, |t, a| {
    let inside = |&(base, len): &(*mut u8, u64)| a.wrapping_sub(base as u64) < len;
    t.cluster.iter().position(inside).unwrap_or(t.rank as usize) as u64
});

fn step_bit(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let v = t.r(q.a) >> q.imm & 1;
    t.set(q.d, v);
    unsafe { i.add(1) }
}

fn step_map_shared(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let offset = t.r(q.a) & ((1 << memory::RANK_SHIFT) - 1);
    let v = offset | (t.r(q.b) + 1) << memory::RANK_SHIFT;
    t.set(q.d, v);
    unsafe { i.add(1) }
}

fn step_map(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let offset = t.r(q.a).wrapping_sub(t.shared as u64);
    let rank = t.r(q.b) as usize;
    let Some(&(base, _)) = t.cluster.get(rank) else {
        return t.fail(
            FailureKind::IllegalAddress,
            format!("no block {rank} in the cluster"),
        );
    };
    t.set(q.d, (base as u64).wrapping_add(offset));
    unsafe { i.add(1) }
}

fn step_frame_address(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    t.set(q.d, t.frame as u64 + q.imm);
    unsafe { i.add(1) }
}

fn step_entry_special(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let v = unsafe { *t.entry.offset(q.a as isize) };
    t.set(q.d, v);
    unsafe { i.add(1) }
}

fn step_clock(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_nanos() as u64);
    t.set(q.d, if q.c == 32 { now as u32 as u64 } else { now });
    unsafe { i.add(1) }
}

fn step_pack(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let mut v = 0;
    let mask = u64::MAX >> (64 - q.imm);
    for n in 0..q.c as usize {
        let slot = t.program.extra[q.a as usize + n];
        v |= (t.r(slot) & mask) << (n as u64 * q.imm);
    }
    t.set(q.d, v);
    unsafe { i.add(1) }
}

fn step_unpack(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let v = t.r(q.a);
    let mask = u64::MAX >> (64 - q.imm);
    for n in 0..q.c as usize {
        let slot = t.program.extra[q.d as usize + n];
        t.set(slot, v >> (n as u64 * q.imm) & mask);
    }
    unsafe { i.add(1) }
}

fn step_call(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let program = t.program;
    let call = &program.calls[unsafe { (*i).x } as usize];
    let (from, to) = (&program.frames[call.from], &program.frames[call.to]);
    let mine = t.frame;
    if !t.call(from, to, unsafe { i.add(1) }) {
        return t.fail(FailureKind::LaunchFailed, "the stack is full");
    }
    for &(source, target, size) in &call.args {
        copy_frame(t, mine + source, t.frame + target, size);
    }
    &program.code[call.entry]
}

fn step_returned(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let program = t.program;
    let call = &program.calls[unsafe { (*i).x } as usize];
    let theirs = t.frame + program.frames[call.from].local_size;
    for &(target, source, size) in &call.results {
        copy_frame(t, theirs + source, t.frame + target, size);
    }
    unsafe { i.add(1) }
}

fn copy_frame(t: &mut Cpu, from: u32, to: u32, size: u32) {
    // Both frames were checked to lie inside the thread's local memory.
    unsafe {
        std::ptr::copy(
            t.local.add(from as usize),
            t.local.add(to as usize),
            size as usize,
        );
    }
}

/// A C string in device memory, as far as it may be read.
fn text(t: &Cpu, address: u64) -> String {
    let mut bytes = Vec::new();
    for at in address.. {
        let known = t.ranges.partition_point(|r| r.0 <= at);
        let inside = known > 0 && at < t.ranges[known - 1].1 || t.find_own(at, 1);
        let byte = if inside {
            unsafe { *(at as *const u8) }
        } else {
            0
        };
        if byte == 0 {
            break;
        }
        bytes.push(byte);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn frame_value(t: &Cpu, offset: i32) -> u64 {
    unsafe { (t.local.add(t.frame as usize + offset as usize) as *const u64).read_unaligned() }
}

fn step_print(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let format = text(t, frame_value(t, q.a));
    let mut arguments = frame_value(t, q.b);
    let mut out = String::new();
    let mut rest = format.chars().peekable();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut long = false;
        let kind = loop {
            match rest.next() {
                Some('l' | 'z' | 'j') => long = true,
                Some(c) if c.is_ascii_alphabetic() || c == '%' => break c,
                Some(_) => {}
                None => break '%',
            }
        };
        if kind == '%' {
            out.push('%');
            continue;
        }
        let wide = long || "eEfFgGsp".contains(kind);
        let size = if wide { 8 } else { 4 };
        arguments = arguments.next_multiple_of(size);
        let bits = if !t.find_own(arguments, size) {
            0
        } else if wide {
            unsafe { *(arguments as *const u64) }
        } else {
            unsafe { *(arguments as *const u32) as u64 }
        };
        arguments += size;
        out += &match kind {
            'd' | 'i' if wide => (bits as i64).to_string(),
            'd' | 'i' => (bits as u32 as i32).to_string(),
            'x' | 'X' => format!("{bits:x}"),
            'p' => format!("{bits:#x}"),
            'c' => (bits as u8 as char).to_string(),
            's' => text(t, bits),
            'u' => bits.to_string(),
            _ => f64::from_bits(bits).to_string(),
        };
    }
    print!("{out}");
    unsafe { i.add(1) }
}

fn step_assert(t: &mut Cpu, i: *const Ins) -> *const Ins {
    let q = unsafe { &*i };
    let (what, file) = (text(t, frame_value(t, q.a)), text(t, frame_value(t, q.b)));
    let line = frame_value(t, q.c) as u32;
    t.fail(
        FailureKind::Assert,
        format!("{file}:{line}: assertion `{what}` failed"),
    )
}

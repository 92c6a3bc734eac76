//! The part of Python's pickle that `torch.save` writes, read without running anything.
//!
//! A pickle is a program for a stack machine, and in Python that program may call any function.
//! Here a call is one of the few that tensors need, listed in [`global`]; any other name is refused.
//! Values live in an arena and refer to each other by number, so that deeply nested or cyclic ones
//! cost no stack. Opcodes: Python's `pickletools`, protocols 2 to 5; names and arguments:
//! `torch/_utils.py` and `torch/serialization.py` of PyTorch.

use std::collections::HashMap;
use std::sync::Arc;

use super::file::{Element, View};

/// Values of one pickle at most; optimisers of large networks have some 100 000.
const MAX_VALUES: usize = 2_000_000;
/// Bytes that the values of one pickle may take.
const MAX_BYTES: usize = 128 << 20;
/// Arguments of a call or a persistent id; those that are known have seven.
const MAX_ARGUMENTS: usize = 8;
/// Dimensions of a tensor.
const MAX_RANK: usize = 32;
/// Bytes in the name of a storage.
const MAX_KEY: usize = 256;
/// Bytes of a name on a line.
const MAX_LINE: usize = 1 << 12;

pub(super) type Id = usize;

/// What a pickle can hold here.
#[derive(Debug, Clone)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Arc<Storage>),
    Tensor(Arc<View>),
    /// Anything that tensors have no use for: floats, bytes, very long numbers.
    Other,
}

/// Functions and classes that are known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    Size,
    RebuildTensor,
    RebuildTensorV2,
    RebuildParameter,
    Storage(Element),
}

/// A storage that the pickle refers to and that lies elsewhere in the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Storage {
    pub(super) key: Arc<str>,
    pub(super) element: Element,
    pub(super) count: u64,
}

/// What a pickle told.
#[derive(Debug)]
pub(super) struct Pickle {
    values: Vec<Value>,
    root: Id,
    /// Bytes read.
    pub(super) length: usize,
    /// Every storage by key.
    pub(super) storages: HashMap<Arc<str>, Arc<Storage>>,
}

impl Pickle {
    pub(super) fn root(&self) -> &Value {
        self.get(self.root)
    }

    pub(super) fn get(&self, id: Id) -> &Value {
        self.values.get(id).unwrap_or(&Value::None)
    }

    /// The value under a text key of a dictionary.
    pub(super) fn entry<'a>(&'a self, dict: &'a Value, key: &str) -> Option<&'a Value> {
        self.entries(dict)
            .find_map(|(k, value)| (k == key).then_some(value))
    }

    /// Entries of a dictionary with text for keys, in order; none of anything else.
    pub(super) fn entries<'a>(
        &'a self,
        dict: &'a Value,
    ) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let pairs = match dict {
            Value::Dict(pairs) => &pairs[..],
            _ => &[],
        };
        pairs
            .iter()
            .filter_map(|&(key, value)| match self.get(key) {
                Value::Text(key) => Some((key.as_str(), self.get(value))),
                _ => None,
            })
    }
}

/// The global of a module, if it is one that tensors need.
fn global(module: &str, name: &str) -> Option<Global> {
    let element = match name {
        "DoubleStorage" => Some(Element::F64),
        "FloatStorage" => Some(Element::F32),
        "HalfStorage" => Some(Element::F16),
        "BFloat16Storage" => Some(Element::BF16),
        "LongStorage" => Some(Element::I64),
        "IntStorage" => Some(Element::I32),
        "ShortStorage" => Some(Element::I16),
        "CharStorage" => Some(Element::I8),
        "ByteStorage" => Some(Element::U8),
        "BoolStorage" => Some(Element::Bool),
        _ => None,
    };
    match (module, name) {
        ("collections", "OrderedDict") => Some(Global::OrderedDict),
        ("torch", "Size") => Some(Global::Size),
        ("torch._utils", "_rebuild_tensor") => Some(Global::RebuildTensor),
        ("torch._utils", "_rebuild_tensor_v2") => Some(Global::RebuildTensorV2),
        ("torch._utils", "_rebuild_parameter") => Some(Global::RebuildParameter),
        ("torch" | "torch.cuda", _) => element.map(Global::Storage),
        _ => None,
    }
}

/// Reads the first pickle of `bytes`.
pub(super) fn read(bytes: &[u8]) -> Result<Pickle, String> {
    let mut machine = Machine {
        bytes,
        at: 0,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        storages: HashMap::new(),
        spent: 0,
    };
    let root = machine.run()?;
    Ok(Pickle {
        values: machine.values,
        root,
        length: machine.at,
        storages: machine.storages,
    })
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
    storages: HashMap<Arc<str>, Arc<Storage>>,
    /// Bytes that the values take.
    spent: usize,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Id, String> {
        loop {
            let at = self.at;
            let opcode = self.take(1)?[0];
            match opcode {
                b'.' => return self.pop(),
                // PROTO, FRAME
                0x80 => drop(self.take(1)?),
                0x95 => drop(self.take(8)?),

                b'N' => self.push(Value::None)?,
                0x88 => self.push(Value::Bool(true))?,
                0x89 => self.push(Value::Bool(false))?,
                b'K' => self.number::<1>()?,
                b'M' => self.number::<2>()?,
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?);
                    self.push(Value::Int(i64::from(value)))?;
                }
                0x8A => {
                    let length = usize::from(self.take(1)?[0]);
                    let bytes = self.take(length)?;
                    let value = long(bytes);
                    self.push(value)?;
                }
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Other)?;
                }

                // Text and bytes, by the size of their length.
                b'X' | b'T' => self.text::<4>()?,
                0x8C | b'U' => self.text::<1>()?,
                0x8D => self.text::<8>()?,
                b'C' => self.skip_bytes::<1>()?,
                b'B' => self.skip_bytes::<4>()?,
                0x8E | 0x96 => self.skip_bytes::<8>()?,

                b'(' => self.marks.push(self.stack.len()),
                b')' => self.push(Value::Tuple(Vec::new()))?,
                0x85..=0x87 => {
                    let count = usize::from(opcode - 0x84);
                    let start = self.stack.len().checked_sub(count).ok_or(EMPTY)?;
                    let items = self.split(start)?;
                    self.push(Value::Tuple(items))?;
                }
                b't' => {
                    let items = self.since_mark()?;
                    self.push(Value::Tuple(items))?;
                }
                b']' | 0x8F => self.push(Value::List(Vec::new()))?,
                b'}' => self.push(Value::Dict(Vec::new()))?,
                b'l' => {
                    let items = self.since_mark()?;
                    self.push(Value::List(items))?;
                }
                b'a' => {
                    let item = self.pop()?;
                    self.append(&[item])?;
                }
                b'e' | 0x90 => {
                    let items = self.since_mark()?;
                    self.append(&items)?;
                }
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(&[key, value])?;
                }
                b'u' => {
                    let items = self.since_mark()?;
                    self.set(&items)?;
                }

                // The memo.
                b'q' => self.remember::<1>()?,
                b'r' => self.remember::<4>()?,
                0x94 => {
                    let top = self.top()?;
                    self.keep(self.memo.len() as u64, top)?;
                }
                b'h' => self.recall::<1>()?,
                b'j' => self.recall::<4>()?,
                b'0' => drop(self.pop()?),
                b'1' => drop(self.since_mark()?),
                b'2' => {
                    let top = self.top()?;
                    self.stack_push(top)?;
                }

                // Calls.
                b'c' => {
                    let module = self.line()?;
                    let name = self.line()?;
                    self.global(&module, &name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Value::Text(module), Value::Text(name)) =
                        (self.value(module).clone(), self.value(name).clone())
                    else {
                        return Err("a global whose name is not text".to_owned());
                    };
                    self.global(&module, &name)?;
                }
                b'R' => {
                    let (arguments, function) = (self.pop()?, self.pop()?);
                    let value = self.call(function, arguments)?;
                    self.push(value)?;
                }
                b'Q' => {
                    let id = self.pop()?;
                    let storage = self.storage(id)?;
                    self.push(Value::Storage(storage))?;
                }
                // The attributes of an ordered dictionary (`_metadata`), which tensors do not need.
                b'b' => drop(self.pop()?),
                other => {
                    return Err(format!(
                        "opcode 0x{other:02x} at byte {at} is none that torch.save writes"
                    ));
                }
            }
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(count).ok_or(ENDS)?;
        let bytes = self.bytes.get(self.at..end).ok_or(ENDS)?;
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// An unsigned number of so many bytes.
    fn unsigned<const N: usize>(&mut self) -> Result<u64, String> {
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(self.take(N)?);
        Ok(u64::from_le_bytes(wide))
    }

    fn number<const N: usize>(&mut self) -> Result<(), String> {
        let value = self.unsigned::<N>()?;
        self.push(Value::Int(value as i64))
    }

    /// Bytes after their length.
    fn counted<const N: usize>(&mut self) -> Result<&'a [u8], String> {
        let length = usize::try_from(self.unsigned::<N>()?).map_err(|_| ENDS)?;
        self.take(length)
    }

    fn text<const N: usize>(&mut self) -> Result<(), String> {
        let bytes = self.counted::<N>()?;
        let text = String::from_utf8_lossy(bytes).into_owned();
        self.push(Value::Text(text))
    }

    fn skip_bytes<const N: usize>(&mut self) -> Result<(), String> {
        self.counted::<N>()?;
        self.push(Value::Other)
    }

    fn line(&mut self) -> Result<String, String> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().take(MAX_LINE).position(|&b| b == b'\n');
        let bytes = self.take(end.ok_or(ENDS)? + 1)?;
        Ok(String::from_utf8_lossy(&bytes[..bytes.len() - 1]).into_owned())
    }

    fn push(&mut self, value: Value) -> Result<(), String> {
        if self.values.len() >= MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} values"));
        }
        self.spend(
            size_of::<Value>()
                + match &value {
                    Value::Text(text) => text.len(),
                    Value::Tuple(items) | Value::List(items) => items.len() * size_of::<Id>(),
                    Value::Dict(pairs) => pairs.len() * size_of::<(Id, Id)>(),
                    Value::Tensor(view) => {
                        size_of::<View>() + 2 * view.shape.len() * size_of::<usize>()
                    }
                    _ => 0,
                },
        )?;
        self.values.push(value);
        self.stack_push(self.values.len() - 1)
    }

    fn stack_push(&mut self, id: Id) -> Result<(), String> {
        if self.stack.len() >= MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} values"));
        }
        self.stack.push(id);
        Ok(())
    }

    fn value(&self, id: Id) -> &Value {
        self.values.get(id).unwrap_or(&Value::None)
    }

    fn top(&self) -> Result<Id, String> {
        self.stack.last().copied().ok_or_else(|| EMPTY.to_owned())
    }

    fn pop(&mut self) -> Result<Id, String> {
        self.stack.pop().ok_or_else(|| EMPTY.to_owned())
    }

    /// Takes what lies above `start` off the stack.
    fn split(&mut self, start: usize) -> Result<Vec<Id>, String> {
        if start > self.stack.len() {
            return Err(EMPTY.to_owned());
        }
        Ok(self.stack.split_off(start))
    }

    fn since_mark(&mut self) -> Result<Vec<Id>, String> {
        let start = self.marks.pop().ok_or("an end without its mark")?;
        self.split(start)
    }

    fn append(&mut self, items: &[Id]) -> Result<(), String> {
        self.spend(size_of_val(items))?;
        let list = self.top()?;
        match self.values.get_mut(list) {
            Some(Value::List(list)) => list.extend_from_slice(items),
            _ => return Err("items for what is no list".to_owned()),
        }
        Ok(())
    }

    fn set(&mut self, items: &[Id]) -> Result<(), String> {
        self.spend(size_of_val(items))?;
        let dict = self.top()?;
        match self.values.get_mut(dict) {
            Some(Value::Dict(dict)) => {
                dict.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            _ => return Err("entries for what is no dictionary".to_owned()),
        }
        Ok(())
    }

    fn remember<const N: usize>(&mut self) -> Result<(), String> {
        let key = self.unsigned::<N>()?;
        let top = self.top()?;
        self.keep(key, top)
    }

    fn keep(&mut self, key: u64, id: Id) -> Result<(), String> {
        if self.memo.insert(key, id).is_none() {
            self.spend(2 * size_of::<(u64, Id)>())?;
        }
        Ok(())
    }

    /// Counts bytes towards the limit.
    fn spend(&mut self, bytes: usize) -> Result<(), String> {
        self.spent = self.spent.saturating_add(bytes);
        match self.spent <= MAX_BYTES {
            true => Ok(()),
            false => Err(format!("values of more than {} MiB", MAX_BYTES >> 20)),
        }
    }

    fn recall<const N: usize>(&mut self) -> Result<(), String> {
        let key = self.unsigned::<N>()?;
        let id = *self.memo.get(&key).ok_or("a memo that was never made")?;
        self.stack_push(id)
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), String> {
        let global = global(module, name).ok_or_else(|| {
            let hint = match (module, name) {
                ("torch._utils", "_rebuild_tensor_v3") => {
                    "tensors of this element type are not read here"
                }
                _ => {
                    "only tensors in dictionaries are read; if you trust the file, save them alone in \
                     Python: torch.save(torch.load(FILE, weights_only=False)[\"state_dict\"], NEW)"
                }
            };
            format!("refused: the pickle asks for {module}.{name} ({hint})")
        })?;
        self.push(Value::Global(global))
    }

    fn call(&self, function: Id, arguments: Id) -> Result<Value, String> {
        let &Value::Global(function) = self.value(function) else {
            return Err("a call of what is no function".to_owned());
        };
        let Value::Tuple(ids) = self.value(arguments) else {
            return Err("a call without a tuple of arguments".to_owned());
        };
        if ids.len() > MAX_ARGUMENTS {
            return Err(format!("a call with {} arguments", ids.len()));
        }
        let arguments: Vec<&Value> = ids.iter().map(|&id| self.value(id)).collect();
        match (function, &arguments[..]) {
            (Global::OrderedDict, []) => Ok(Value::Dict(Vec::new())),
            // As Python 2 writes it.
            (Global::OrderedDict, [Value::List(pairs)]) => {
                let pair = |&id: &Id| match self.value(id) {
                    Value::Tuple(pair) | Value::List(pair) if pair.len() == 2 => {
                        Ok((pair[0], pair[1]))
                    }
                    _ => Err("a dictionary of what are no pairs".to_owned()),
                };
                let pairs: Result<Vec<_>, String> = pairs.iter().map(pair).collect();
                Ok(Value::Dict(pairs?))
            }
            (Global::Size, [Value::Tuple(sizes)]) if sizes.len() <= MAX_RANK => {
                Ok(Value::Tuple(sizes.clone()))
            }
            (
                Global::RebuildTensor | Global::RebuildTensorV2,
                [storage, offset, shape, strides, ..],
            ) => {
                let Value::Storage(storage) = storage else {
                    return Err("a tensor without a storage".to_owned());
                };
                // Views that stand for other values than their storage's (`neg`, `conj`).
                if let [.., Value::Dict(flags)] = &arguments[4..]
                    && flags
                        .iter()
                        .any(|&(_, flag)| matches!(self.value(flag), Value::Bool(true)))
                {
                    return Err(
                        "a negated or conjugated view: save a copy (`x.clone()`)".to_owned()
                    );
                }
                let view = View {
                    storage: Arc::clone(&storage.key),
                    element: storage.element,
                    count: storage.count,
                    offset: size(offset)?,
                    shape: self.sizes(shape)?,
                    strides: self.sizes(strides)?,
                };
                Ok(Value::Tensor(Arc::new(view)))
            }
            (Global::RebuildParameter, [Value::Tensor(view), ..]) => {
                Ok(Value::Tensor(Arc::clone(view)))
            }
            _ => Err(format!("arguments that {function:?} does not take")),
        }
    }

    fn sizes(&self, value: &Value) -> Result<Vec<usize>, String> {
        let (Value::Tuple(ids) | Value::List(ids)) = value else {
            return Err("a tensor whose shape is no tuple".to_owned());
        };
        if ids.len() > MAX_RANK {
            return Err(format!("a tensor of {} dimensions", ids.len()));
        }
        ids.iter().map(|&id| size(self.value(id))).collect()
    }

    /// The storage of a persistent id: `("storage", type, key, location, count)` and, in old files,
    /// what part of another storage it is.
    fn storage(&mut self, id: Id) -> Result<Arc<Storage>, String> {
        let Value::Tuple(ids) = self.value(id) else {
            return Err("a persistent id that is no tuple".to_owned());
        };
        if ids.len() > MAX_ARGUMENTS {
            return Err(format!("a persistent id of {} parts", ids.len()));
        }
        let parts: Vec<&Value> = ids.iter().map(|&id| self.value(id)).collect();
        match &parts[..] {
            [Value::Text(kind), ..] if kind == "module" => {
                Err("the file holds a whole module and not its state_dict".to_owned())
            }
            [
                _,
                Value::Global(Global::Storage(element)),
                Value::Text(key),
                _,
                count,
            ]
            | [
                _,
                Value::Global(Global::Storage(element)),
                Value::Text(key),
                _,
                count,
                Value::None,
            ] if key.len() <= MAX_KEY => {
                let (element, count) = (*element, size(count)? as u64);
                if let Some(known) = self.storages.get(key.as_str()) {
                    return match (known.element, known.count) == (element, count) {
                        true => Ok(Arc::clone(known)),
                        false => Err(format!("storage {key:?} is described in two ways")),
                    };
                }
                let key: Arc<str> = key.as_str().into();
                let storage = Arc::new(Storage {
                    key: Arc::clone(&key),
                    element,
                    count,
                });
                self.storages.insert(key, Arc::clone(&storage));
                Ok(storage)
            }
            _ => Err("a storage that is described in an unknown way".to_owned()),
        }
    }
}

const ENDS: &str = "the pickle ends too early";
const EMPTY: &str = "a value is taken from an empty stack";

fn size(value: &Value) -> Result<usize, String> {
    match value {
        Value::Int(value) => usize::try_from(*value).map_err(|_| "a negative size".to_owned()),
        _ => Err("a size that is no number".to_owned()),
    }
}

/// A number in two's complement, least byte first.
fn long(bytes: &[u8]) -> Value {
    if bytes.len() > 8 {
        return Value::Other;
    }
    let negative = bytes.last().is_some_and(|&b| b >= 0x80);
    let mut wide = [if negative { 0xFF } else { 0 }; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(wide))
}

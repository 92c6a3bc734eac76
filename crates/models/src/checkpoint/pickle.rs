//! The part of Python's pickle that `torch.save` writes, read without running anything.
//!
//! A pickle is a program for a stack machine, and in Python that program may call any function.
//! Here a call is one of the few that tensors need, listed in [`global`]; any other name is refused.
//! Values live in an arena and refer to each other by number, so that deeply nested or cyclic ones
//! cost no stack. Opcodes: Python's `pickletools`, protocols 2 to 5; names and arguments:
//! `torch/_utils.py` and `torch/serialization.py` of PyTorch.

use std::collections::HashMap;

use super::file::{Element, View};

/// Values of one pickle at most; optimisers of large networks have some 100 000.
const MAX_VALUES: usize = 2_000_000;
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
    Storage(Storage),
    Tensor(View),
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
    pub(super) key: String,
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
    pub(super) storages: HashMap<String, Storage>,
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
    storages: HashMap<String, Storage>,
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
                    self.memo.insert(self.memo.len() as u64, top);
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
        let list = self.top()?;
        match self.values.get_mut(list) {
            Some(Value::List(list)) => list.extend_from_slice(items),
            _ => return Err("items for what is no list".to_owned()),
        }
        Ok(())
    }

    fn set(&mut self, items: &[Id]) -> Result<(), String> {
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
        self.memo.insert(key, top);
        Ok(())
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
                    "only tensors in dictionaries are read; in Python, save the state_dict alone: \
                     torch.save({k: v for k, v in model.state_dict().items()}, FILE)"
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
        let arguments: Vec<&Value> = ids.iter().map(|&id| self.value(id)).collect();
        match (function, &arguments[..]) {
            (Global::OrderedDict, []) => Ok(Value::Dict(Vec::new())),
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
                let view = View {
                    storage: storage.key.clone(),
                    element: storage.element,
                    offset: size(offset)?,
                    shape: self.sizes(shape)?,
                    strides: self.sizes(strides)?,
                };
                view.check(storage.count)?;
                Ok(Value::Tensor(view))
            }
            (Global::RebuildParameter, [Value::Tensor(view), ..]) => {
                Ok(Value::Tensor(view.clone()))
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
    fn storage(&mut self, id: Id) -> Result<Storage, String> {
        let Value::Tuple(ids) = self.value(id) else {
            return Err("a persistent id that is no tuple".to_owned());
        };
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
                let storage = Storage {
                    key: key.clone(),
                    element: *element,
                    count: size(count)? as u64,
                };
                match self.storages.get(key) {
                    Some(known) if *known != storage => {
                        return Err(format!("storage {key:?} is described in two ways"));
                    }
                    Some(_) => {}
                    None => drop(self.storages.insert(key.clone(), storage.clone())),
                }
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

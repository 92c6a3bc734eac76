//! PTX text to statements.
//!
//! Only the outer structure of a module is parsed when it is loaded: variables and the
//! headings of functions. A body is kept as a range of tokens and turned into statements
//! when a kernel that reaches it is decoded, since a program uses few of the kernels of
//! its larger modules.

use std::collections::HashMap;
use std::ops::Range;

/// A word, number or sign of the text, and the line that it is on.
#[derive(Clone, Copy, Debug)]
pub struct Token {
    start: u32,
    end: u32,
    pub line: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    Global,
    Const,
    Shared,
    Local,
    Param,
}

/// One part of a variable's initial value.
#[derive(Clone, Debug)]
pub enum Init {
    Bits(u64),
    Symbol(String, i64),
}

#[derive(Clone, Debug)]
pub struct Variable {
    pub name: String,
    pub space: Space,
    pub align: usize,
    /// Bytes of one element.
    pub element: usize,
    /// Bytes in all; 0 for an unsized `extern` array.
    pub size: usize,
    pub init: Vec<Init>,
}

#[derive(Clone, Debug)]
pub struct Function {
    pub name: String,
    pub entry: bool,
    pub returns: Vec<Variable>,
    pub params: Vec<Variable>,
    /// Empty for a declaration without a body.
    pub body: Range<usize>,
    pub max_threads: Option<u32>,
    pub cluster: Option<[u32; 3]>,
}

#[derive(Debug)]
pub struct Module {
    text: String,
    tokens: Vec<Token>,
    pub functions: HashMap<String, Function>,
    pub variables: Vec<Variable>,
}

/// An operand of an instruction.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg<'a> {
    /// A register, special register, label, variable or function.
    Name(&'a str),
    NameOffset(&'a str, i64),
    Not(&'a str),
    Int(i64),
    F32(u32),
    F64(f64),
    /// `[base+offset]`; the base is absent for an absolute address.
    Address(Option<&'a str>, i64),
    Vector(Vec<Arg<'a>>),
    /// `a|b`
    Pair(&'a str, &'a str),
    /// `(a, b)`, as in calls.
    List(Vec<Arg<'a>>),
}

#[derive(Debug)]
pub enum Statement<'a> {
    Open,
    Close,
    Label(&'a str),
    /// A register, or with a count a numbered family of them, and its width in bits.
    Register(&'a str, Option<u32>, u32),
    Variable(Variable),
    Targets(&'a str, Vec<&'a str>),
    Instruction(Instruction<'a>),
}

#[derive(Debug)]
pub struct Instruction<'a> {
    pub guard: Option<(&'a str, bool)>,
    pub opcode: &'a str,
    pub args: Vec<Arg<'a>>,
    pub line: u32,
}

pub type Result<T> = std::result::Result<T, String>;

/// The size in bytes of a fundamental type written without its dot; predicates count as 1.
pub fn type_size(name: &str) -> Option<usize> {
    Some(match name {
        "b8" | "u8" | "s8" | "pred" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" | "tf32" => 4,
        "b64" | "u64" | "s64" | "f64" | "f32x2" => 8,
        "b128" => 16,
        _ => return None,
    })
}

fn tokenise(text: &str) -> Result<Vec<Token>> {
    let bytes = text.as_bytes();
    let mut tokens = Vec::with_capacity(bytes.len() / 5);
    let mut line = 1;
    let mut at = 0;
    let word = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'.');
    while at < bytes.len() {
        let start = at;
        match bytes[at] {
            b'\n' => {
                line += 1;
                at += 1;
                continue;
            }
            b' ' | b'\t' | b'\r' => {
                at += 1;
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'/') => {
                while at < bytes.len() && bytes[at] != b'\n' {
                    at += 1;
                }
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                let end = text[at..]
                    .find("*/")
                    .ok_or(format!("line {line}: open comment"))?;
                line += text[at..at + end].matches('\n').count() as u32;
                at += end + 2;
                continue;
            }
            b'"' => {
                let end = text[at + 1..]
                    .find('"')
                    .ok_or(format!("line {line}: open string"))?;
                at += end + 2;
            }
            c if word(c) || c == b'%' => {
                at += 1;
                // Directives may be written together, as in `.reg.b32`.
                let directive = c == b'.';
                loop {
                    match bytes.get(at) {
                        Some(b'.') if directive => break,
                        Some(&c) if word(c) => at += 1,
                        // The `::` of `.L2::128B` and `.shared::cluster`.
                        Some(b':') if bytes.get(at + 1) == Some(&b':') => at += 2,
                        _ => break,
                    }
                }
            }
            0 => break,
            _ => at += 1,
        }
        tokens.push(Token {
            start: start as u32,
            end: at as u32,
            line,
        });
    }
    Ok(tokens)
}

impl Module {
    pub fn parse(text: String) -> Result<Module> {
        let tokens = tokenise(&text)?;
        let mut module = Module {
            text,
            tokens,
            functions: HashMap::new(),
            variables: Vec::new(),
        };
        let (functions, variables) = {
            let mut p = Parser {
                module: &module,
                at: 0,
                end: module.tokens.len(),
            };
            p.top_level()?
        };
        module.functions = functions;
        module.variables = variables;
        Ok(module)
    }

    fn word(&self, at: usize) -> &str {
        let t = self.tokens[at];
        &self.text[t.start as usize..t.end as usize]
    }

    /// The text of a source line, for messages.
    pub fn line(&self, line: u32) -> &str {
        self.text
            .lines()
            .nth(line.max(1) as usize - 1)
            .unwrap_or("")
            .trim()
    }

    /// The statements of a function's body.
    pub fn body(&self, function: &Function) -> Result<Vec<Statement<'_>>> {
        let mut p = Parser {
            module: self,
            at: function.body.start,
            end: function.body.end,
        };
        let mut out = Vec::new();
        while p.at < p.end {
            p.statement(&mut out)?;
        }
        Ok(out)
    }
}

struct Parser<'a> {
    module: &'a Module,
    at: usize,
    end: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> &'a str {
        if self.at < self.end {
            self.module.word(self.at)
        } else {
            ""
        }
    }

    fn next(&mut self) -> &'a str {
        let word = self.peek();
        self.at += 1;
        word
    }

    fn line(&self) -> u32 {
        self.module
            .tokens
            .get(self.at.min(self.end.saturating_sub(1)))
            .map_or(0, |t| t.line)
    }

    fn take(&mut self, word: &str) -> bool {
        let found = self.peek() == word;
        self.at += found as usize;
        found
    }

    fn expect(&mut self, word: &str) -> Result<()> {
        if self.take(word) {
            return Ok(());
        }
        Err(format!(
            "line {}: expected '{word}', found '{}'",
            self.line(),
            self.peek()
        ))
    }

    fn skip_past(&mut self, word: &str) {
        while self.at < self.end && self.next() != word {}
    }

    fn int(&mut self) -> Result<i64> {
        let negative = self.take("-");
        let line = self.line();
        let word = self.next();
        match number(word) {
            Some(Arg::Int(v)) => Ok(if negative { v.wrapping_neg() } else { v }),
            _ => Err(format!(
                "line {line}: expected a whole number, found '{word}'"
            )),
        }
    }

    fn top_level(&mut self) -> Result<(HashMap<String, Function>, Vec<Variable>)> {
        let mut functions: HashMap<String, Function> = HashMap::new();
        let mut variables = Vec::new();
        while self.at < self.end {
            let line = self.line();
            match self.peek() {
                ".version" | ".address_size" => self.at += 2,
                ".target" => {
                    self.at += 2;
                    while self.take(",") {
                        self.at += 1;
                    }
                }
                ".file" => {
                    let line = self.line();
                    while self.at < self.end && self.line() == line {
                        self.at += 1;
                    }
                }
                ".section" => self.skip_past("}"),
                ".visible" | ".extern" | ".weak" | ".common" => self.at += 1,
                ".entry" | ".func" => {
                    let f = self.function()?;
                    let known = functions.get(&f.name).is_some_and(|k| !k.body.is_empty());
                    if !known {
                        functions.insert(f.name.clone(), f);
                    }
                }
                ".global" | ".const" | ".shared" | ".local" => {
                    variables.extend(self.variables()?);
                }
                ".alias" | ".pragma" => self.skip_past(";"),
                ";" => self.at += 1,
                other => return Err(format!("line {line}: unexpected '{other}'")),
            }
        }
        Ok((functions, variables))
    }

    fn function(&mut self) -> Result<Function> {
        let entry = self.next() == ".entry";
        let mut returns = Vec::new();
        while matches!(self.peek(), ".noreturn" | ".attribute") {
            if self.next() == ".attribute" {
                self.skip_past(")");
            }
        }
        if self.peek() == "(" {
            returns = self.params()?;
        }
        let name = self.next().to_string();
        let params = if self.peek() == "(" {
            self.params()?
        } else {
            Vec::new()
        };
        let mut f = Function {
            name,
            entry,
            returns,
            params,
            body: 0..0,
            max_threads: None,
            cluster: None,
        };
        loop {
            match self.peek() {
                ";" => {
                    self.at += 1;
                    return Ok(f);
                }
                "{" => break,
                "" => return Err(format!("line {}: a function without a body", self.line())),
                directive => {
                    self.at += 1;
                    let mut values = Vec::new();
                    while self
                        .peek()
                        .as_bytes()
                        .first()
                        .is_some_and(u8::is_ascii_digit)
                    {
                        values.push(self.int()? as u32);
                        self.take(",");
                    }
                    let mut dims = [1; 3];
                    for (d, v) in dims.iter_mut().zip(&values) {
                        *d = *v;
                    }
                    match directive {
                        ".maxntid" | ".reqntid" => f.max_threads = Some(dims.iter().product()),
                        ".reqnctapercluster" => f.cluster = Some(dims),
                        _ => {}
                    }
                }
            }
        }
        self.at += 1;
        let start = self.at;
        let mut depth = 1;
        while depth > 0 {
            match self.next() {
                "{" => depth += 1,
                "}" => depth -= 1,
                "" if self.at > self.end => {
                    return Err(format!("the body of {} has no end", f.name));
                }
                _ => {}
            }
        }
        f.body = start..self.at - 1;
        Ok(f)
    }

    fn params(&mut self) -> Result<Vec<Variable>> {
        self.expect("(")?;
        let mut out = Vec::new();
        while !self.take(")") {
            if self.peek() == ".reg" {
                return Err(format!("line {}: register parameters", self.line()));
            }
            out.push(self.variable()?);
            self.take(",");
        }
        Ok(out)
    }

    /// One or more variables of a declaration up to its semicolon.
    fn variables(&mut self) -> Result<Vec<Variable>> {
        let first = self.variable()?;
        let mut out = vec![first];
        while self.take(",") {
            let (mut v, name) = (out[0].clone(), self.next());
            v.name = name.to_string();
            v.size = v.element;
            self.dimensions_and_init(&mut v)?;
            out.push(v);
        }
        self.expect(";")?;
        Ok(out)
    }

    fn variable(&mut self) -> Result<Variable> {
        let line = self.line();
        let space = match self.next() {
            ".global" => Space::Global,
            ".const" => Space::Const,
            ".shared" => Space::Shared,
            ".local" => Space::Local,
            ".param" => Space::Param,
            other => return Err(format!("line {line}: '{other}' is not a state space")),
        };
        let mut v = Variable {
            name: String::new(),
            space,
            align: 0,
            element: 0,
            size: 0,
            init: vec![],
        };
        let mut lanes = 1;
        loop {
            let word = self.next();
            match word {
                ".align" => v.align = self.int()? as usize,
                ".v2" => lanes = 2,
                ".v4" => lanes = 4,
                // `.ptr .global .align 16` says where a pointer parameter points.
                ".ptr" => {
                    while matches!(
                        self.peek(),
                        ".global" | ".shared" | ".local" | ".const" | ".param"
                    ) {
                        self.at += 1;
                    }
                    if self.take(".align") {
                        self.int()?;
                    }
                }
                ".attribute" => self.skip_past(")"),
                _ if word.starts_with('.') => {
                    v.element = type_size(&word[1..])
                        .ok_or(format!("line {line}: '{word}' is not a type"))?
                        * lanes;
                }
                _ => {
                    v.name = word.to_string();
                    break;
                }
            }
        }
        if v.align == 0 {
            v.align = v.element.max(1);
        }
        v.size = v.element;
        self.dimensions_and_init(&mut v)?;
        Ok(v)
    }

    fn dimensions_and_init(&mut self, v: &mut Variable) -> Result<()> {
        while self.take("[") {
            if self.take("]") {
                v.size = 0;
            } else {
                v.size *= self.int()? as usize;
                self.expect("]")?;
            }
        }
        if self.take("=") {
            self.init(v)?;
            if v.size == 0 {
                v.size = v.init.len() * v.element;
            }
        }
        Ok(())
    }

    fn init(&mut self, v: &mut Variable) -> Result<()> {
        if self.take("{") {
            while !self.take("}") {
                self.init(v)?;
                self.take(",");
            }
            return Ok(());
        }
        let line = self.line();
        let negative = self.take("-");
        let word = self.next();
        let init = match number(word) {
            Some(Arg::Int(i)) => Init::Bits(if negative { i.wrapping_neg() } else { i } as u64),
            Some(Arg::F32(b)) => Init::Bits(b as u64),
            Some(Arg::F64(f)) if v.element == 4 => Init::Bits((f as f32).to_bits() as u64),
            Some(Arg::F64(f)) => Init::Bits(f.to_bits()),
            _ if word == "generic" => {
                self.expect("(")?;
                let name = self.next().to_string();
                self.expect(")")?;
                let offset = if self.take("+") { self.int()? } else { 0 };
                Init::Symbol(name, offset)
            }
            _ if word.starts_with(|c: char| c.is_alphabetic() || "_$%".contains(c)) => {
                let offset = if self.take("+") { self.int()? } else { 0 };
                Init::Symbol(word.to_string(), offset)
            }
            _ => return Err(format!("line {line}: '{word}' as an initial value")),
        };
        v.init.push(init);
        Ok(())
    }

    fn statement(&mut self, out: &mut Vec<Statement<'a>>) -> Result<()> {
        let line = self.line();
        let word = self.peek();
        match word {
            "{" => {
                self.at += 1;
                out.push(Statement::Open);
            }
            "}" => {
                self.at += 1;
                out.push(Statement::Close);
            }
            ";" => self.at += 1,
            ".reg" => {
                self.at += 1;
                let mut bits = 0;
                loop {
                    let word = self.next();
                    if matches!(word, ".v2" | ".v4") {
                        return Err(format!("line {line}: vector registers"));
                    }
                    if let Some(ty) = word.strip_prefix('.') {
                        let size =
                            type_size(ty).ok_or(format!("line {line}: '{word}' is not a type"))?;
                        bits = if ty == "pred" { 1 } else { size as u32 * 8 };
                        continue;
                    }
                    let count = if self.take("<") {
                        let n = self.int()? as u32;
                        self.expect(">")?;
                        Some(n)
                    } else {
                        None
                    };
                    out.push(Statement::Register(word, count, bits));
                    if self.take(";") {
                        break;
                    }
                    self.expect(",")?;
                }
            }
            ".param" | ".local" | ".shared" | ".global" | ".const" => {
                out.extend(self.variables()?.into_iter().map(Statement::Variable));
            }
            ".loc" | ".file" => {
                while self.at < self.end && self.line() == line {
                    self.at += 1;
                }
            }
            ".pragma" => self.skip_past(";"),
            _ if self.at + 1 < self.end && self.module.word(self.at + 1) == ":" => {
                self.at += 2;
                match self.peek() {
                    ".branchtargets" => {
                        self.at += 1;
                        let mut labels = Vec::new();
                        loop {
                            labels.push(self.next());
                            if !self.take(",") {
                                break;
                            }
                        }
                        self.expect(";")?;
                        out.push(Statement::Targets(word, labels));
                    }
                    ".callprototype" => self.skip_past(";"),
                    _ => out.push(Statement::Label(word)),
                }
            }
            _ => {
                let mut guard = None;
                if self.take("@") {
                    let negated = self.take("!");
                    guard = Some((self.next(), negated));
                }
                let opcode = self.next();
                let mut args = Vec::new();
                while !self.take(";") {
                    if self.at >= self.end {
                        return Err(format!("line {line}: an instruction without a semicolon"));
                    }
                    args.push(self.arg()?);
                    self.take(",");
                }
                out.push(Statement::Instruction(Instruction {
                    guard,
                    opcode,
                    args,
                    line,
                }));
            }
        }
        Ok(())
    }

    fn arg(&mut self) -> Result<Arg<'a>> {
        let line = self.line();
        match self.peek() {
            "{" | "(" => {
                let vector = self.next() == "{";
                let close = if vector { "}" } else { ")" };
                let mut parts = Vec::new();
                while !self.take(close) {
                    if self.at >= self.end {
                        return Err(format!("line {line}: '{close}' is missing"));
                    }
                    parts.push(self.arg()?);
                    self.take(",");
                }
                Ok(if vector {
                    Arg::Vector(parts)
                } else {
                    Arg::List(parts)
                })
            }
            "[" => {
                self.at += 1;
                let mut base = None;
                let mut offset = 0;
                if self
                    .peek()
                    .starts_with(|c: char| c.is_ascii_digit() || c == '-')
                {
                    offset = self.int()?;
                } else {
                    base = Some(self.next());
                    if self.take("+") || self.peek() == "-" {
                        offset = self.int()?;
                    }
                }
                self.expect("]")?;
                Ok(Arg::Address(base, offset))
            }
            "!" => {
                self.at += 1;
                Ok(Arg::Not(self.next()))
            }
            "-" => {
                self.at += 1;
                match number(self.next()) {
                    Some(Arg::Int(v)) => Ok(Arg::Int(v.wrapping_neg())),
                    Some(Arg::F64(v)) => Ok(Arg::F64(-v)),
                    Some(Arg::F32(v)) => Ok(Arg::F32(v ^ 0x8000_0000)),
                    _ => Err(format!(
                        "line {line}: '-' before something that is no number"
                    )),
                }
            }
            word if word.as_bytes().first().is_some_and(u8::is_ascii_digit) => {
                self.at += 1;
                number(word).ok_or(format!("line {line}: '{word}' is no number"))
            }
            word => {
                self.at += 1;
                if self.take("|") {
                    return Ok(Arg::Pair(word, self.next()));
                }
                if self.peek() == "+" {
                    self.at += 1;
                    return Ok(Arg::NameOffset(word, self.int()?));
                }
                Ok(Arg::Name(word))
            }
        }
    }
}

fn number(word: &str) -> Option<Arg<'static>> {
    let digits = word.strip_suffix('U').unwrap_or(word);
    if let Some(hex) = word.strip_prefix("0f").or(word.strip_prefix("0F")) {
        return Some(Arg::F32(u32::from_str_radix(hex, 16).ok()?));
    }
    if let Some(hex) = word.strip_prefix("0d").or(word.strip_prefix("0D")) {
        return Some(Arg::F64(f64::from_bits(u64::from_str_radix(hex, 16).ok()?)));
    }
    if let Some(hex) = digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        return Some(Arg::Int(u64::from_str_radix(hex, 16).ok()? as i64));
    }
    if !digits.as_bytes().first()?.is_ascii_digit() {
        return None;
    }
    if let Ok(v) = digits.parse::<u64>() {
        return Some(Arg::Int(v as i64));
    }
    digits.parse::<f64>().ok().map(Arg::F64)
}

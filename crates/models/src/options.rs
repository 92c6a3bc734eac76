//! Options of a backbone or a representation as a spec gives them.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::names::{hint, in_words, nearest};
use crate::{Error, Result};

/// Options as they were written, not yet checked.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Options(serde_json::Map<String, serde_json::Value>);

impl Options {
    /// The options as a struct of their owner (`#[serde(deny_unknown_fields, default)]`), whose
    /// `name` an error gives.
    ///
    /// # Errors
    /// [`Error::Options`] that names the key and what is known or expected.
    pub fn read<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        serde_json::from_value(serde_json::Value::Object(self.0.clone())).map_err(|error| {
            let mut message = in_words(&error.to_string());
            if message.starts_with("unknown field") {
                let mut quoted = message.split('`').skip(1).step_by(2);
                let unknown = quoted.next().unwrap_or_default();
                message += &hint(nearest(unknown, quoted).as_deref());
            }
            Error::Options {
                name: name.to_owned(),
                message,
            }
        })
    }

    /// Sets or replaces one.
    pub fn set(&mut self, key: &str, value: impl Into<serde_json::Value>) {
        self.0.insert(key.to_owned(), value.into());
    }

    /// Takes one away, if it is there.
    pub fn remove(&mut self, key: &str) {
        self.0.remove(key);
    }

    /// Keys and values, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &serde_json::Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The name of their owner, and the options behind it: `resnet50 (last_stride = 1)`.
    pub(crate) fn write_behind(&self, name: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name)?;
        if self.is_empty() {
            return Ok(());
        }
        let options: Vec<String> = self.iter().map(|(k, v)| format!("{k} = {v}")).collect();
        write!(f, " ({})", options.join(", "))
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// For those that have none.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NoOptions {}

/// A part of a network in a spec: its name alone, or a table with `name` and options.
#[derive(Serialize)]
pub(crate) struct Part {
    pub(crate) name: String,
    #[serde(flatten)]
    pub(crate) options: Options,
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Table {
            name: String,
            #[serde(flatten)]
            options: Options,
        }

        struct NameOrTable;
        impl<'de> Visitor<'de> for NameOrTable {
            type Value = Part;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name, or a table with a name and options")
            }

            fn visit_str<E>(self, name: &str) -> std::result::Result<Part, E> {
                Ok(Part {
                    name: name.to_owned(),
                    options: Options::default(),
                })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<Part, A::Error> {
                let Table { name, options } = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Part { name, options })
            }
        }
        deserializer.deserialize_any(NameOrTable)
    }
}

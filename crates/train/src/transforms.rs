//! Transforms as experiment files name them.

use isqrt_datasets::{Pipeline, Step};
use serde::{Deserialize, Serialize};

/// What becomes of images: a pipeline with a name, or one that is spelled out.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Transforms {
    /// One of `isqrt_datasets::PRESETS`.
    Preset(String),
    /// Its steps.
    Steps(Vec<Step>),
}

impl Transforms {
    /// The pipeline, checked.
    ///
    /// # Errors
    /// Of `isqrt-datasets`: an unknown name with the nearest one, a step that cannot be.
    pub fn pipeline(&self) -> isqrt_datasets::Result<Pipeline> {
        let pipeline = match self {
            Self::Preset(name) => Pipeline::preset(name)?,
            Self::Steps(steps) => Pipeline {
                steps: steps.clone(),
                ..Pipeline::identity()
            },
        };
        pipeline.check()?;
        Ok(pipeline)
    }
}

impl std::fmt::Display for Transforms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Preset(name) => f.write_str(name),
            // As in an experiment file, on one line.
            Self::Steps(steps) => f.write_str(&serde_json::to_string(steps).unwrap_or_default()),
        }
    }
}

impl<'de> Deserialize<'de> for Transforms {
    /// Not derived, so that a wrong step is told as such and not as "no variant".
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct Either;
        impl<'de> serde::de::Visitor<'de> for Either {
            type Value = Transforms;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("the name of a preset, or a list of steps")
            }

            fn visit_str<E>(self, name: &str) -> std::result::Result<Transforms, E> {
                Ok(Transforms::Preset(name.to_owned()))
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(
                self,
                steps: A,
            ) -> std::result::Result<Transforms, A::Error> {
                let steps = serde::de::value::SeqAccessDeserializer::new(steps);
                Deserialize::deserialize(steps).map(Transforms::Steps)
            }
        }
        d.deserialize_any(Either)
    }
}

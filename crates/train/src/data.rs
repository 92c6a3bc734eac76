//! The images of a run, as its spec asks for them.

use std::path::Path;
use std::sync::Arc;

use isqrt_datasets::e10::{self, Part};
use isqrt_datasets::{
    Broken, ImageSet, Images, Listing, Pipeline, Sample, Skipped, decode_all, list_with, split,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::spec::{MadeSet, Normalise, Validation};
use crate::{Error, Feed, Result, SpecFile};

/// Seed of the sets that the program makes, so that they are those of the experiments.
const MADE_SEED: u64 = 1;

/// What is recorded about the images of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataInfo {
    /// Short name.
    pub name: String,
    /// How the parts came about.
    pub note: String,
    /// SHA-256: of images in memory with their pixels, of stored ones of names and labels alone.
    pub fingerprint: String,
    /// Number of classes.
    pub classes: usize,
    /// Images to train on.
    pub train: usize,
    /// Images on which epochs are evaluated and the best is chosen.
    pub eval: usize,
    /// Images of the part that is looked at once, at the end; 0 where that is the part above.
    pub test: usize,
    /// Rows and columns of the network's input.
    pub input: (usize, usize),
}

/// The images of a run.
#[derive(Debug, Clone)]
pub struct RunData {
    /// For records.
    pub info: DataInfo,
    /// Names in label order.
    pub classes: Vec<String>,
    /// To train on.
    pub train: Feed,
    /// To evaluate epochs on and choose the best.
    pub eval: Feed,
    /// To report on at the end, where that is another part.
    pub test: Option<Feed>,
    /// Training images, seen as in evaluation.
    pub train_as_eval: Feed,
    /// What evaluation makes of an image, from its file to the network.
    pub seen: Pipeline,
    /// What becomes of images that cannot be read.
    pub broken: Broken,
    /// Images that were left out when they were decoded into memory.
    pub skipped: Vec<Skipped>,
}

/// Three parts before transforms; no test part where epochs are evaluated on it.
struct Parts {
    classes: Vec<String>,
    train: Vec<Sample>,
    eval: Vec<Sample>,
    test: Vec<Sample>,
    note: String,
}

impl RunData {
    /// The part that is reported on: `test`, or `eval` where that is it.
    #[must_use]
    pub fn reported(&self) -> &Feed {
        self.test.as_ref().unwrap_or(&self.eval)
    }

    /// Takes other means and deviations than those of these images.
    pub fn normalise_as(&mut self, other: &Pipeline) {
        let feeds = [&mut self.train, &mut self.eval, &mut self.train_as_eval];
        let pipelines = feeds
            .into_iter()
            .chain(&mut self.test)
            .map(|feed| &mut feed.pipeline);
        for pipeline in pipelines.chain([&mut self.seen]) {
            (pipeline.mean, pipeline.std) = (other.mean, other.std);
        }
    }

    /// Lists the images, splits them, and decodes them where they are to be in memory. With `few`, only so
    /// many of the training part and of each other.
    ///
    /// # Errors
    /// [`Error::Spec`] where the spec does not say which images or cannot have these, [`Error::Data`]
    /// with the path.
    pub fn open(file: &SpecFile, few: Option<[usize; 2]>) -> Result<Self> {
        Self::open_as(file, few, false)
    }

    /// The same to evaluate on images that the network was not trained on: all of them, where they come in
    /// no parts, instead of a share that training would leave out.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_unseen(file: &SpecFile) -> Result<Self> {
        Self::open_as(file, None, true)
    }

    /// How many images [`open`](Self::open) gives of each part, without opening them: to train on, to evaluate
    /// epochs on, to report on.
    ///
    /// # Errors
    /// As there.
    pub fn sizes(file: &SpecFile) -> Result<(usize, usize, usize)> {
        let data = &file.spec.data;
        let Some(root) = &data.root else {
            return Ok((0, 0, 0));
        };
        let listing = list_with(root, &file.spec.list_options())?;
        let parts = parts(listing, data.validation, file.spec.seed)?;
        Ok((parts.train.len(), parts.eval.len(), parts.test.len()))
    }

    fn open_as(file: &SpecFile, few: Option<[usize; 2]>, unseen: bool) -> Result<Self> {
        let data = &file.spec.data;
        let pipelines = [
            ("data.train_transforms", &data.train_transforms),
            ("data.eval_transforms", &data.eval_transforms),
        ]
        .map(|(key, transforms)| {
            transforms
                .pipeline()
                .map_err(|error| file.problem(key, &error.to_string()))
        });
        let [train, eval] = pipelines;
        let pipelines = (train?, eval?);
        let broken = match data.skip_broken_percent {
            None => Broken::Fail,
            Some(percent) => Broken::Skip {
                most: percent / 100.0,
            },
        };
        match (&data.set, &data.root) {
            (Some(MadeSet::E10), _) => made(file, pipelines, broken, few),
            (None, Some(root)) => stored(file, root, pipelines, broken, (few, unseen)),
            (None, None) => Err(file.problem(
                "data.root",
                "is missing: say where the images are with --data ROOT, or `set = \"e10\"` for those that \
                 the program makes",
            )),
        }
    }
}

/// The embedded textures, in memory.
fn made(
    file: &SpecFile,
    (train, eval): (Pipeline, Pipeline),
    broken: Broken,
    few: Option<[usize; 2]>,
) -> Result<RunData> {
    let sizes = e10::Sizes::default();
    let [few_train, few_eval] = few.unwrap_or([usize::MAX; 2]);
    let set = |part, count: usize, few: usize| -> Result<Arc<ImageSet>> {
        let count = count.min(few.div_ceil(e10::CLASSES)).max(1);
        Ok(Arc::new(e10::image_set(MADE_SEED, part, count)?))
    };
    let train_set = set(Part::Train, sizes.train, few_train)?;
    let (eval_part, eval_count) = match file.spec.data.validation {
        Validation::Carve => (Part::Val, sizes.val),
        Validation::Test => (Part::Test, sizes.test),
    };
    let eval_set = set(eval_part, eval_count, few_eval)?;
    let test_set = match file.spec.data.validation {
        Validation::Carve => Some(set(Part::Test, sizes.test, few_eval)?),
        Validation::Test => None,
    };
    let sets = [Some(&train_set), Some(&eval_set), test_set.as_ref()];
    let info = DataInfo {
        name: format!("E10, embedded textures (seed {MADE_SEED})"),
        note: "parts as the set is made".to_owned(),
        fingerprint: hash(sets.iter().flatten().map(|set| set.fingerprint())),
        classes: e10::CLASSES,
        train: train_set.len(),
        eval: eval_set.len(),
        test: test_set.as_ref().map_or(0, |set| set.len()),
        input: eval.output_size().unwrap_or_default(),
    };
    let normalise = normaliser(file, &train_set);
    let feed = |set: Arc<ImageSet>, pipeline: &Pipeline| Feed {
        images: set.into(),
        pipeline: normalise(pipeline),
    };
    Ok(RunData {
        info,
        classes: e10::class_names(),
        train_as_eval: feed(Arc::clone(&train_set), &eval),
        seen: normalise(&eval),
        train: feed(train_set, &train),
        test: test_set.map(|set| feed(set, &eval)),
        eval: feed(eval_set, &eval),
        broken,
        skipped: Vec::new(),
    })
}

/// Gives a pipeline mean and deviation, as the spec says.
fn normaliser(file: &SpecFile, train: &ImageSet) -> impl Fn(&Pipeline) -> Pipeline + use<> {
    let stats = match file.spec.data.normalise {
        Normalise::ImageNet => None,
        Normalise::Train => Some(train.channel_stats()),
    };
    move |pipeline| match stats {
        None => pipeline.clone(),
        Some(stats) => pipeline.clone().normalising(stats.mean, stats.std),
    }
}

/// Images of a folder, an archive or a list.
fn stored(
    file: &SpecFile,
    root: &Path,
    (train, eval): (Pipeline, Pipeline),
    broken: Broken,
    (few, unseen): (Option<[usize; 2]>, bool),
) -> Result<RunData> {
    let spec = &file.spec;
    let listing = list_with(root, &spec.list_options())?;
    let mut parts = match unseen && listing.val.is_none() && listing.test.is_none() {
        true => all(listing),
        false => parts(listing, spec.data.validation, spec.seed)?,
    };
    if let Some([most_train, most_eval]) = few {
        keep_few(&mut parts.train, most_train);
        keep_few(&mut parts.eval, most_eval);
        keep_few(&mut parts.test, most_eval);
        parts.note.push_str("; a few images of each");
    }
    let Parts {
        classes,
        train: train_samples,
        eval: eval_samples,
        test: test_samples,
        note,
    } = parts;
    let name = root.canonicalize().unwrap_or_else(|_| root.to_owned());
    let name = name.file_name();
    let mut info = DataInfo {
        name: name.map_or_else(|| "data".to_owned(), |n| n.to_string_lossy().into_owned()),
        note,
        fingerprint: String::new(),
        classes: classes.len(),
        train: train_samples.len(),
        eval: eval_samples.len(),
        test: test_samples.len(),
        input: eval.output_size().unwrap_or_default(),
    };
    if !spec.data.in_memory {
        info.fingerprint = hash(
            classes.iter().cloned().chain(
                [&train_samples, &eval_samples, &test_samples]
                    .into_iter()
                    .flatten()
                    .map(|sample| format!("{} {}", sample.label, sample.name)),
            ),
        );
        let feed = |images: &Images, pipeline: &Pipeline| Feed {
            images: images.clone(),
            pipeline: pipeline.clone(),
        };
        let train_images = Images::from(train_samples);
        let test = (!test_samples.is_empty()).then(|| feed(&test_samples.into(), &eval));
        return Ok(RunData {
            info,
            classes,
            train: feed(&train_images, &train),
            train_as_eval: feed(&train_images, &eval),
            seen: eval.clone(),
            eval: feed(&eval_samples.into(), &eval),
            test,
            broken,
            skipped: Vec::new(),
        });
    }
    // What is not random is done once; the rest each time.
    let (once, random) = train.split_random();
    if once.output_size().is_none() {
        return Err(file.problem(
            "data.in_memory",
            "keeps images as they are before the first random step of `train_transforms`, which must all \
             have one size there",
        ));
    }
    if eval.views() != 1 {
        return Err(file.problem(
            "data.in_memory",
            "keeps one picture of each image, and `eval_transforms` makes several",
        ));
    }
    let mut skipped: Vec<Skipped> = Vec::new();
    let mut decode = |samples: &[Sample], pipeline: &Pipeline| -> Result<Arc<ImageSet>> {
        let (set, left_out) = decode_all(samples, &classes, pipeline, broken)?;
        // Training images are decoded twice.
        let new = left_out
            .into_iter()
            .filter(|image| !skipped.contains(image));
        skipped.extend(new.collect::<Vec<_>>());
        Ok(Arc::new(set))
    };
    let train_set = decode(&train_samples, &once)?;
    let train_seen = decode(&train_samples, &eval)?;
    let eval_set = decode(&eval_samples, &eval)?;
    let test_set = match test_samples.is_empty() {
        true => None,
        false => Some(decode(&test_samples, &eval)?),
    };
    let sets = [Some(&train_set), Some(&eval_set), test_set.as_ref()];
    info.fingerprint = hash(sets.iter().flatten().map(|set| set.fingerprint()));
    let normalise = normaliser(file, &train_set);
    let feed = |set: Arc<ImageSet>, pipeline: &Pipeline| Feed {
        images: set.into(),
        pipeline: normalise(pipeline),
    };
    let as_is = Pipeline::identity();
    Ok(RunData {
        info,
        train: feed(train_set, &random),
        train_as_eval: feed(train_seen, &as_is),
        seen: normalise(&eval),
        eval: feed(eval_set, &as_is),
        test: test_set.map(|set| feed(set, &as_is)),
        classes,
        broken,
        skipped,
    })
}

/// All images in each part.
fn all(listing: Listing) -> Parts {
    Parts {
        classes: listing.classes,
        note: format!("all {} images", listing.train.len()),
        eval: listing.train.clone(),
        train: listing.train,
        test: Vec::new(),
    }
}

fn parts(listing: Listing, validation: Validation, seed: u64) -> Result<Parts> {
    if validation == Validation::Carve {
        let split = split(listing, seed)?;
        return Ok(Parts {
            classes: split.classes,
            train: split.train,
            eval: split.val,
            test: split.test,
            note: split.note,
        });
    }
    let Listing {
        root,
        classes,
        train,
        val,
        test,
    } = listing;
    // The authors train on trainval: a validation part has no other use here.
    let (eval, val) = match test {
        Some(test) => (Some(test), val),
        None => (val, None),
    };
    let mut train = train;
    train.extend(val.into_iter().flatten());
    let Some(eval) = eval else {
        return Err(Error::Run {
            path: root,
            message:
                "has no test or validation part, and `data.validation = \"test\"` evaluates on it: \
                      leave the setting out to carve one from train"
                    .to_owned(),
        });
    };
    Ok(Parts {
        note: format!(
            "all {} training and validation images; the best epoch is chosen on the {} images that are reported on",
            train.len(),
            eval.len()
        ),
        classes,
        train,
        eval,
        test: Vec::new(),
    })
}

/// Keeps at most so many, spread over all.
fn keep_few(samples: &mut Vec<Sample>, most: usize) {
    let (total, mut index) = (samples.len(), 0);
    if total <= most {
        return;
    }
    samples.retain(|_| {
        let (before, after) = (index * most / total, (index + 1) * most / total);
        index += 1;
        after > before
    });
}

/// SHA-256 of texts, each with its length.
fn hash(texts: impl IntoIterator<Item = String>) -> String {
    let mut hash = Sha256::new();
    for text in texts {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    }
    let bytes = hash.finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

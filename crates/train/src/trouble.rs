//! Where numbers went wrong: the first layer whose output is not finite, or the parameter nearest to the loss
//! whose gradient is not, and whether the covariance that enters the head has degenerated.

use std::fmt;

use candle_core::Tensor;
use candle_core::backprop::GradStore;
use isqrt_models::Network;
use isqrt_nn::{LayerValues, Mode, largest_magnitude, record_values};
use serde::Serialize;

use crate::diagnostics::{Eigenvalues, Features};
use crate::{Error, Result, without_backtrace};

/// What [`first_non_finite`] or [`first_bad_gradient`] found; in one line where it is printed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Trouble {
    /// Where.
    pub place: Place,
    /// Largest magnitude of what ran just before the place: of the layer's output, of the images before
    /// the first layer, of the logits where nothing was found; none of images and gradients.
    pub reached: Option<f64>,
    /// Of the features that enter the head: of the first image whose features are finite.
    pub covariance: Option<Covariance>,
}

/// Where numbers went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Place {
    /// The images are not finite.
    Images,
    /// The first layer, of backbone or classifier, whose output is not finite.
    Layer {
        /// Its name in the network.
        name: String,
        /// What it is, see [`LayerRecord::op`](isqrt_nn::LayerRecord::op).
        op: String,
        /// The first of its own parameters and buffers that is not finite.
        spoilt: Option<String>,
    },
    /// The pooling head: it refuses its features or its output is not finite.
    Head {
        /// Its name.
        name: String,
        /// What it says.
        problem: Option<String>,
        /// The first of its own parameters and buffers that is not finite.
        spoilt: Option<String>,
    },
    /// A gradient.
    Gradient {
        /// The parameter, the nearest to the loss.
        parameter: String,
        /// How many have a gradient that is not finite.
        bad: usize,
        /// How many have one.
        of: usize,
    },
    /// All is finite.
    Nowhere,
}

/// The covariance of one image's features.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Covariance {
    /// Place of the image in its batch.
    pub image: usize,
    /// Rows.
    pub channels: usize,
    /// The largest eigenvalue.
    pub largest: f64,
    /// The smallest one that is more than rounding (`channels ε` of the largest); none of a covariance
    /// that vanishes.
    pub smallest_positive: Option<f64>,
    /// Eigenvalues above 1e-6 of the largest.
    pub rank: usize,
    /// Sum of all.
    pub trace: f64,
}

/// Runs the forward pass of `images` again, and names the first layer, in the order in which they run, whose
/// output is not finite.
///
/// `mode` is that of the pass that went wrong: batch norm takes the statistics of the batch where that
/// did, and dropout draws the same masks (of the step that [`Vars::set_step`](isqrt_nn::Vars::set_step) told
/// last). Buffers stay as they are. What comes after the logits, the loss, is not looked at.
///
/// # Errors
/// Where the images do not fit the network; not where numbers ran away.
pub fn first_non_finite(network: &Network, images: &Tensor, mode: Mode) -> Result<Trouble> {
    let pass = Pass::run(network, images, mode)?;
    let covariance = pass.covariance()?;
    let mut reached = largest_magnitude(images)?;
    let trouble = |place, reached| {
        Ok(Trouble {
            place,
            reached: Some(reached).filter(|r: &f64| r.is_finite()),
            covariance,
        })
    };
    if !reached.is_finite() {
        return trouble(Place::Images, reached);
    }
    if let Some(bad) = advance(&pass.backbone, &mut reached) {
        return trouble(layer(network, bad, "backbone")?, reached);
    }
    let head = |problem| -> Result<Place> {
        Ok(Place::Head {
            name: network.spec().representation.name.clone(),
            problem,
            spoilt: spoilt(network, |name| name.starts_with("representation."))?,
        })
    };
    let values = match &pass.representation {
        Ok(values) => largest_magnitude(values)?,
        Err(problem) => return trouble(head(Some(problem.clone()))?, reached),
    };
    if !values.is_finite() {
        return trouble(head(None)?, reached);
    }
    reached = values;
    match advance(&pass.classifier, &mut reached) {
        Some(bad) => trouble(layer(network, bad, "classifier")?, reached),
        None => trouble(Place::Nowhere, reached),
    }
}

/// Of the parameters whose gradient is not finite, names the one nearest to the loss: that of the layer that
/// runs last in a forward pass of `images`, which runs again for this, as in [`first_non_finite`].
///
/// # Errors
/// As there.
pub fn first_bad_gradient(
    network: &Network,
    images: &Tensor,
    mode: Mode,
    gradients: &GradStore,
) -> Result<Trouble> {
    let pass = Pass::run(network, images, mode)?;
    let (mut bad, mut of) = (Vec::new(), 0);
    for (name, parameter) in network.vars().parameters() {
        let Some(gradient) = gradients.get(parameter.as_tensor()) else {
            continue;
        };
        of += 1;
        if !largest_magnitude(gradient)?.is_finite() {
            bad.push(name);
        }
    }
    let nearest = bad.iter().max_by_key(|name| pass.when(name));
    let place = nearest.map_or(Place::Nowhere, |name| Place::Gradient {
        parameter: (*name).to_owned(),
        bad: bad.len(),
        of,
    });
    let logits = pass.classifier.last().map(|l| l.largest);
    let reached = logits.filter(|r| r.is_finite() && place == Place::Nowhere);
    Ok(Trouble {
        place,
        reached,
        covariance: pass.covariance()?,
    })
}

/// A forward pass, part by part.
struct Pass {
    backbone: Vec<LayerValues>,
    features: Tensor,
    /// Or what the head says of features that it refuses.
    representation: std::result::Result<Tensor, String>,
    /// Empty where there is no representation.
    classifier: Vec<LayerValues>,
}

impl Pass {
    fn run(network: &Network, images: &Tensor, mode: Mode) -> Result<Self> {
        // Running statistics have been updated by the pass that this one repeats.
        let mode = mode.replayed();
        let (features, backbone) = record_values(|| network.features(images, mode));
        let features = features?.detach();
        let mut classifier = vec![];
        let representation = match network.pool(&features, mode).map_err(Error::from) {
            Ok(values) => {
                let values = values.detach();
                let (logits, records) = record_values(|| network.classify(&values, mode));
                logits?;
                classifier = records;
                Ok(values)
            }
            // candle adds lines of backtrace where the environment asks for them.
            Err(error) if error.is_divergence() => Err(without_backtrace(&error.to_string())),
            Err(error) => return Err(error),
        };
        Ok(Self {
            backbone,
            features,
            representation,
            classifier,
        })
    }

    /// Of the first image whose features are finite.
    fn covariance(&self) -> Result<Option<Covariance>> {
        let Features { images, channels } = Features::new(&self.features)?;
        let finite = |image: &Vec<f64>| image.iter().all(|x| x.is_finite());
        let Some(image) = images.iter().position(finite) else {
            return Ok(None);
        };
        let eigenvalues = Eigenvalues::new(&images[image], channels, image)?;
        let values: Vec<f64> = eigenvalues.values().collect();
        let largest = values.first().copied().unwrap_or(0.0);
        let above = |share: f64| values.iter().filter(move |&&v| v > share * largest);
        Ok(Some(Covariance {
            image,
            channels,
            largest,
            smallest_positive: above(channels as f64 * f64::EPSILON).next_back().copied(),
            rank: above(1e-6).count(),
            trace: values.iter().sum(),
        }))
    }

    /// When the layer of a parameter runs last, in an order of all parameters.
    fn when(&self, parameter: &str) -> (usize, usize) {
        let layer = parameter.rsplit_once('.').map_or("", |(layer, _)| layer);
        let (part, records) = match parameter.split('.').next() {
            Some("backbone") => (0, &self.backbone[..]),
            Some("representation") => (1, &[][..]),
            _ => (2, &self.classifier[..]),
        };
        let last = records.iter().rposition(|r| &*r.layer.path == layer);
        (part, last.map_or(0, |at| at + 1))
    }
}

/// The first layer that is not finite; `reached` becomes the largest magnitude before it.
fn advance<'a>(layers: &'a [LayerValues], reached: &mut f64) -> Option<&'a LayerValues> {
    for layer in layers {
        if !layer.largest.is_finite() {
            return Some(layer);
        }
        *reached = layer.largest;
    }
    None
}

/// `part` stands for the name of an op before the first layer.
fn layer(network: &Network, values: &LayerValues, part: &str) -> Result<Place> {
    let name = match &*values.layer.path {
        "" => part,
        path => path,
    };
    let own = |parameter: &str| {
        let layer = parameter.rsplit_once('.').map(|(layer, _)| layer);
        layer == Some(name)
    };
    Ok(Place::Layer {
        name: name.to_owned(),
        op: values.layer.op.to_owned(),
        spoilt: spoilt(network, own)?,
    })
}

/// The first of these parameters and buffers that is not finite.
fn spoilt(network: &Network, own: impl Fn(&str) -> bool) -> Result<Option<String>> {
    let vars = network.vars();
    let parameters = vars.parameters().map(|(n, p)| (n, p.as_tensor().clone()));
    let buffers = vars.buffers().map(|(n, b)| (n, b.get()));
    for (name, value) in parameters.chain(buffers).filter(|(name, _)| own(name)) {
        if !largest_magnitude(&value)?.is_finite() {
            return Ok(Some(name.to_owned()));
        }
    }
    Ok(None)
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let its = |f: &mut fmt::Formatter<'_>, spoilt: &Option<String>| match spoilt {
            Some(name) => write!(f, "; {name} is not finite itself"),
            None => Ok(()),
        };
        let before = match &self.place {
            Place::Images => {
                f.write_str("the images have a value that is not finite")?;
                ""
            }
            Place::Layer { name, op, spoilt } => {
                write!(
                    f,
                    "{name} ({op}) is the first layer with a value that is not finite"
                )?;
                its(f, spoilt)?;
                "what ran before it"
            }
            Place::Head {
                name,
                problem,
                spoilt,
            } => {
                write!(
                    f,
                    "the pooling head ({name}) is the first part with a value that is not finite"
                )?;
                if let Some(problem) = problem {
                    write!(f, ": {problem}")?;
                }
                its(f, spoilt)?;
                "the features"
            }
            Place::Gradient { parameter, bad, of } => {
                write!(
                    f,
                    "{parameter} is the parameter nearest to the loss whose gradient is not finite ({bad} \
                     of {of} are not)"
                )?;
                ""
            }
            Place::Nowhere => {
                f.write_str("the values of every layer are finite")?;
                "the logits"
            }
        };
        if let (false, Some(reached)) = (before.is_empty(), self.reached) {
            write!(f, "; {before} reached {reached:.1e}")?;
        }
        let Some(covariance) = self.covariance else {
            return f.write_str("; no image has finite features at the head");
        };
        write!(
            f,
            "; covariance of the features that enter the head: {covariance}"
        )
    }
}

impl fmt::Display for Covariance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            image,
            channels,
            largest,
            rank,
            trace,
            ..
        } = self;
        match self.smallest_positive {
            Some(smallest) => write!(
                f,
                "eigenvalues {largest:.1e} to {smallest:.1e}, rank {rank} of {channels}, trace \
                 {trace:.1e} (image {image} of the batch)"
            ),
            None => write!(f, "zero (image {image} of the batch)"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::{DType, Device};
    use isqrt_models::{ModelSpec, RepresentationSpec};
    use isqrt_nn::ops::cross_entropy;
    use isqrt_testkit::randn;

    use super::*;

    fn network(spec: &ModelSpec) -> Network {
        let network = Network::new(spec, 1, DType::F32, &Device::Cpu).unwrap();
        network.vars().set_step(1);
        network
    }

    fn tinyresnet(head: &str) -> Network {
        let head = RepresentationSpec::new(head);
        network(&ModelSpec::new("tinyresnet", head, 3))
    }

    fn images() -> Tensor {
        randn((4, 3, 32, 32), 7, DType::F32).unwrap()
    }

    /// The same values with another in one place.
    fn planted(of: &Tensor, place: usize, value: f32) -> Tensor {
        let mut values = of.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        values[place] = value;
        Tensor::from_vec(values, of.shape(), &Device::Cpu).unwrap()
    }

    fn buffers(network: &Network) -> Vec<Vec<f32>> {
        let buffers = network.vars().buffers();
        buffers.map(|(_, b)| b.get().to_vec1().unwrap()).collect()
    }

    #[test]
    fn a_planted_value_is_found_in_its_layer_whichever_it_is() {
        let mut spec = ModelSpec::new("tinyresnet", RepresentationSpec::new("isqrt"), 3);
        spec.classifier.hidden = vec![8];
        let network = network(&spec);
        let images = images();
        let mut found = 0;
        for mode in [Mode::Train, Mode::Frozen, Mode::Eval] {
            for (name, parameter) in network.vars().parameters() {
                let before = parameter.as_detached_tensor().copy().unwrap();
                for value in [f32::NAN, f32::INFINITY] {
                    let last = before.elem_count() - 1;
                    parameter.set(&planted(&before, last, value)).unwrap();
                    let trouble = first_non_finite(&network, &images, mode).unwrap();
                    let Place::Layer {
                        name: layer,
                        spoilt,
                        ..
                    } = &trouble.place
                    else {
                        panic!("{name}: {trouble}");
                    };
                    assert_eq!(spoilt.as_deref(), Some(name), "{trouble}");
                    assert_eq!(name.rsplit_once('.').unwrap().0, layer, "{trouble}");
                    assert!(trouble.reached.is_some_and(|r| r > 0.0 && r < 100.0));
                    // The classifier's layers see finite features. So may images whose value became minus
                    // infinity before a ReLU.
                    let covariance = trouble.covariance.is_some();
                    let in_classifier = name.starts_with("classifier");
                    assert!(covariance || !in_classifier);
                    assert!(!covariance || in_classifier || value.is_infinite());
                    found += 1;
                }
                parameter.set(&before).unwrap();
            }
        }
        assert!(found > 100, "{found}");
        let whole = first_non_finite(&network, &images, Mode::Train).unwrap();
        assert_eq!(whole.place, Place::Nowhere);
        assert!(whole.to_string().contains("the logits reached"), "{whole}");
    }

    #[test]
    fn a_spoilt_running_statistic_is_found_and_none_moves() {
        let network = tinyresnet("gap");
        let before = buffers(&network);
        first_non_finite(&network, &images(), Mode::Train).unwrap();
        assert_eq!(buffers(&network), before);
        let (name, buffer) = network.vars().buffers().nth(4).unwrap();
        buffer.set(planted(&buffer.get(), 0, f32::NAN));
        let trouble = first_non_finite(&network, &images(), Mode::Eval).unwrap();
        let layer = name.rsplit_once('.').unwrap().0;
        let line = trouble.to_string();
        assert!(
            line.starts_with(&format!(
                "{layer} (batch_norm) is the first layer with a value that is not finite; {name} is \
                 not finite itself; what ran before it reached "
            )),
            "{line}"
        );
    }

    #[test]
    fn weights_that_grew_too_large_show_in_the_layer_before() {
        let network = network(&ModelSpec::new(
            "e10net",
            RepresentationSpec::new("isqrt"),
            3,
        ));
        for (_, weight) in network.vars().parameters().filter(|(_, w)| w.rank() == 4) {
            weight
                .set(&(weight.ones_like().unwrap() * 1e30).unwrap())
                .unwrap();
        }
        let trouble = first_non_finite(&network, &images(), Mode::Eval).unwrap();
        let Place::Layer { name, op, spoilt } = &trouble.place else {
            panic!("{trouble}");
        };
        let convolutions: Vec<&str> = network
            .vars()
            .parameters()
            .filter(|(_, w)| w.rank() == 4)
            .map(|(name, _)| name)
            .collect();
        assert_eq!(&format!("{name}.weight"), convolutions[1]);
        assert_eq!((op.as_str(), spoilt), ("conv2d", &None));
        let reached = trouble.reached.unwrap();
        assert!(reached > 1e30 && reached < 1e33, "{reached}");
        assert!(trouble.to_string().contains("no image has finite features"));
    }

    #[test]
    fn images_and_heads_are_named_too() {
        let network = tinyresnet("cov");
        let bad = planted(&images(), 5, f32::NAN);
        let trouble = first_non_finite(&network, &bad, Mode::Eval).unwrap();
        assert_eq!((&trouble.place, trouble.reached), (&Place::Images, None));
        // The others of the batch have finite features in evaluation.
        assert_eq!(trouble.covariance.unwrap().image, 1);

        // Features of 1e25 are finite, their squares are not.
        let named = |name: &str| {
            let mut parameters = network.vars().parameters();
            parameters.find(|(n, _)| *n == name).unwrap().1
        };
        let scale = named("backbone.bn2.weight");
        scale
            .set(&(scale.ones_like().unwrap() * 1e25).unwrap())
            .unwrap();
        let trouble = first_non_finite(&network, &images(), Mode::Train).unwrap();
        let line = trouble.to_string();
        assert!(
            line.starts_with("the pooling head (cov) is the first part") && !line.contains('\n'),
            "{line}"
        );
        let covariance = trouble.covariance.unwrap();
        assert!(covariance.trace > 1e45 && covariance.trace.is_finite());
        assert!(
            line.contains(&format!("rank {} of 32", covariance.rank)),
            "{line}"
        );
        let json = serde_json::to_value(&trouble).unwrap();
        assert_eq!(json["place"]["kind"], "head");
    }

    #[test]
    fn a_degenerate_covariance_has_its_rank() {
        // Maps of 3 positions leave at most 2 dimensions, of which one is small.
        let mut values = vec![0.0_f32; 32 * 3];
        values[..6].copy_from_slice(&[2.0, -1.0, -1.0, 0.0, 0.001, -0.001]);
        let pass = Pass {
            backbone: vec![],
            features: Tensor::from_vec(values, (1, 32, 1, 3), &Device::Cpu).unwrap(),
            representation: Err(String::new()),
            classifier: vec![],
        };
        let found = pass.covariance().unwrap().unwrap();
        isqrt_testkit::assert_close!(found.largest, 2.0, rtol = 1e-6);
        isqrt_testkit::assert_close!(found.smallest_positive.unwrap(), 2e-6 / 3.0, rtol = 1e-6);
        isqrt_testkit::assert_close!(found.trace, 2.0 + 2e-6 / 3.0, rtol = 1e-9);
        assert_eq!((found.rank, found.channels), (1, 32));
        let features = pass.features.zeros_like().unwrap();
        let pass = Pass { features, ..pass };
        let found = pass.covariance().unwrap().unwrap();
        assert_eq!((found.rank, found.smallest_positive), (0, None));
        assert!(found.to_string().starts_with("zero"));
    }

    #[test]
    fn of_bad_gradients_the_one_nearest_to_the_loss_is_named() {
        let network = tinyresnet("dropcov");
        let images = images();
        let logits = network.forward(&images, Mode::Train).unwrap();
        let loss = cross_entropy(&logits, &[0, 1, 2, 0], 0.0).unwrap();
        let mut gradients = network.vars().backward(&loss).unwrap();
        let before = buffers(&network);
        let mut look = |spoil: &[&str]| {
            for name in spoil {
                let mut parameters = network.vars().parameters();
                let parameter = parameters.find(|(n, _)| n == name).unwrap().1;
                let gradient = gradients.get(parameter.as_tensor()).unwrap();
                let bad = planted(gradient, 0, f32::NAN);
                gradients.insert(parameter.as_tensor(), bad);
            }
            first_bad_gradient(&network, &images, Mode::Train, &gradients).unwrap()
        };
        assert_eq!(look(&[]).place, Place::Nowhere);
        // Each comes nearer; names alone would have another order.
        for (k, name) in [
            "backbone.conv1.weight",
            "backbone.bn1.weight",
            "backbone.layer1.conv2.weight",
            "backbone.layer3.conv1.weight",
            "backbone.conv2.weight",
            "backbone.bn2.bias",
            "representation.attention.weight",
            "classifier.weight",
        ]
        .iter()
        .enumerate()
        {
            let trouble = look(&[name]);
            let Place::Gradient { parameter, bad, of } = &trouble.place else {
                panic!("{trouble}");
            };
            assert_eq!((parameter.as_str(), *bad), (*name, k + 1), "{trouble}");
            assert!(*of >= 20 && trouble.covariance.is_some());
        }
        assert_eq!(buffers(&network), before);
    }
}

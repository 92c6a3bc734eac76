//! What a run measures. Errors are in percent.

use serde::{Deserialize, Serialize};

/// One epoch with its evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EpochMetrics {
    /// From 1.
    pub epoch: usize,
    /// Updates so far.
    pub step: u64,
    /// Mean loss of its steps.
    pub train_loss: f64,
    /// Top-1 error on the batches as they were trained on (each before its update), in percent.
    pub train_error: f64,
    /// Cross-entropy on the evaluation set after the epoch; none where there was no evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Top-1 error there, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_error: Option<f64>,
    /// Top-5 error there, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_error5: Option<f64>,
    /// Wall time of training and evaluation together.
    pub seconds: f64,
    /// Wall time of the run so far, without the time in which it was stopped.
    pub run_seconds: f64,
    /// Processor time of the run so far, all threads.
    pub cpu_seconds: f64,
    /// Training images of all ranks a second, without the evaluation.
    pub images_per_second: f64,
    /// Share of the training time in which the network waited for data, 0 to 1.
    pub wait_share: f64,
}

/// Result of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Images whose largest logit is that of their label.
    pub correct: u64,
    /// Images whose label is among the five largest logits.
    pub correct5: u64,
    /// Images.
    pub total: u64,
    /// Mean cross-entropy, in nats.
    pub loss: f64,
    /// Expected calibration error: 15 bins of equal width over the largest probability (Guo et al.
    /// 2017, equation 3), 0 to 1.
    pub calibration_error: f64,
    /// Right answers and images of each class, in label order.
    pub per_class: Vec<[u64; 2]>,
}

impl Evaluation {
    /// Top-1 error in percent.
    #[must_use]
    pub fn error(&self) -> f64 {
        percent_wrong(self.correct, self.total)
    }

    /// Top-5 error in percent.
    #[must_use]
    pub fn error5(&self) -> f64 {
        percent_wrong(self.correct5, self.total)
    }
}

/// Result of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainResult {
    /// Epoch by epoch.
    pub epochs: Vec<EpochMetrics>,
    /// Error on the evaluation set at the end, in percent.
    pub top1_error: f64,
    /// The last evaluation; none where the run was stopped before it.
    pub evaluation: Option<Evaluation>,
    /// Best epoch on the evaluation set, and its error in percent.
    pub best: Option<(usize, f64)>,
    /// Updates, those that were left out included.
    pub steps: u64,
    /// Updates that were left out.
    pub skipped_steps: u64,
    /// Number of learnt values.
    pub parameters: usize,
    /// Wall time of the run.
    pub seconds: f64,
    /// Its processor time, all threads.
    pub cpu_seconds: f64,
    /// Whether the observer stopped it before its last epoch.
    pub stopped: bool,
}

fn percent_wrong(correct: u64, total: u64) -> f64 {
    100.0 * (total - correct) as f64 / total.max(1) as f64
}

/// Bins of the calibration error.
const BINS: usize = 15;
/// Sums and counts that are no class's: loss, right among five, and three a bin.
const SHARED: usize = 2 + 3 * BINS;

/// Counts answers. All of it is sums, so that ranks can add theirs up.
#[derive(Debug, Clone, PartialEq)]
pub struct Tally {
    classes: usize,
    /// Loss, right among five, then of each bin images, sum of confidences, right answers.
    shared: [f64; SHARED],
    /// Row: label, column: answer.
    confusion: Vec<f64>,
}

impl Tally {
    /// No answers yet.
    #[must_use]
    pub fn new(classes: usize) -> Self {
        Self {
            classes,
            shared: [0.0; SHARED],
            confusion: vec![0.0; classes * classes],
        }
    }

    /// Counts the answer to one image: a logit a class. False, and nothing is counted, where they are
    /// not finite or not as many as classes.
    #[must_use]
    pub fn add(&mut self, logits: &[f32], label: u32) -> bool {
        let label = label as usize;
        if logits.len() != self.classes
            || label >= self.classes
            || logits.iter().any(|x| !x.is_finite())
        {
            return false;
        }
        let own = logits[label];
        let best = first_largest(logits);
        // Of equal logits the smaller class comes first, as in top-1.
        let before = |&(k, &x): &(usize, &f32)| x > own || (x == own && k < label);
        let place = logits.iter().enumerate().filter(before).count();
        let top = f64::from(logits[best]);
        let sum: f64 = logits.iter().map(|&x| (f64::from(x) - top).exp()).sum();
        let confidence = 1.0 / sum;
        let bin = ((confidence * BINS as f64).ceil() as usize).clamp(1, BINS) - 1;
        self.shared[0] += sum.ln() + top - f64::from(own);
        self.shared[1] += f64::from(u8::from(place < 5));
        let bin = &mut self.shared[2 + 3 * bin..][..3];
        bin[0] += 1.0;
        bin[1] += confidence;
        bin[2] += f64::from(u8::from(best == label));
        self.confusion[label * self.classes + best] += 1.0;
        true
    }

    /// All sums, for ranks to add up in place.
    pub fn sums(&mut self) -> [&mut [f64]; 2] {
        [&mut self.shared, &mut self.confusion]
    }

    /// Images of each label (row) that got each answer (column).
    pub fn confusion(&self) -> impl Iterator<Item = impl Iterator<Item = u64>> {
        let rows = self.confusion.chunks(self.classes.max(1));
        rows.map(|row| row.iter().map(|&n| n as u64))
    }

    /// What was counted.
    #[must_use]
    pub fn evaluation(&self) -> Evaluation {
        let per_class: Vec<[u64; 2]> = self
            .confusion()
            .enumerate()
            .map(|(label, row)| {
                let row: Vec<u64> = row.collect();
                [row[label], row.iter().sum()]
            })
            .collect();
        let total: u64 = per_class.iter().map(|c| c[1]).sum();
        let images = total.max(1) as f64;
        let bins = self.shared[2..].chunks(3);
        let gap: f64 = bins.map(|b| (b[2] - b[1]).abs()).sum();
        Evaluation {
            correct: per_class.iter().map(|c| c[0]).sum(),
            correct5: self.shared[1] as u64,
            total,
            loss: self.shared[0] / images,
            calibration_error: gap / images,
            per_class,
        }
    }
}

/// Place of the largest value, the first of equals.
pub(crate) fn first_largest(values: &[f32]) -> usize {
    let better = |best: usize, (k, x): (usize, &f32)| if *x > values[best] { k } else { best };
    values.iter().enumerate().fold(0, better)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_a_few_answers() {
        let mut tally = Tally::new(7);
        // Right; second; sixth (so not among five); a tie that the smaller class wins.
        for (logits, label) in [
            ([0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0], 1),
            ([2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0], 0),
            ([6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0], 5),
            ([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], 0),
        ] {
            assert!(tally.add(&logits, label));
        }
        let e = tally.evaluation();
        assert_eq!((e.correct, e.correct5, e.total), (2, 3, 4));
        assert_eq!((e.error(), e.error5()), (50.0, 25.0));
        assert_eq!(e.per_class[0], [1, 2]);
        assert_eq!(e.per_class[5], [0, 1]);
        let confusion: Vec<Vec<u64>> = tally.confusion().map(Iterator::collect).collect();
        assert_eq!(confusion[0][1], 1);
        assert_eq!(confusion[5][0], 1);
    }

    #[test]
    fn loss_and_calibration_are_those_of_their_formulas() {
        let mut tally = Tally::new(2);
        // Probabilities 0.75 (right) and 0.9 (wrong), in bins of their own.
        let logit = |p: f64| (p / (1.0 - p)).ln() as f32;
        assert!(tally.add(&[logit(0.75), 0.0], 0));
        assert!(tally.add(&[logit(0.9), 0.0], 1));
        let e = tally.evaluation();
        let loss = -(0.75_f64.ln() + 0.1_f64.ln()) / 2.0;
        assert!((e.loss - loss).abs() < 1e-6, "{}", e.loss);
        assert!((e.calibration_error - (0.25 + 0.9) / 2.0).abs() < 1e-6);
    }

    #[test]
    fn what_is_not_a_number_is_no_answer() {
        let mut tally = Tally::new(2);
        assert!(!tally.add(&[f32::NAN, 0.0], 0));
        assert!(!tally.add(&[0.0, 0.0], 2));
        assert!(!tally.add(&[0.0], 0));
        assert_eq!(tally, Tally::new(2));
    }

    #[test]
    fn parts_add_up_to_the_whole() {
        let answers = [
            ([1.0, 2.0, 0.5], 1),
            ([0.1, 0.2, 0.3], 0),
            ([9.0, 2.0, 3.0], 0),
        ];
        let mut whole = Tally::new(3);
        let mut parts = [Tally::new(3), Tally::new(3)];
        for (i, (logits, label)) in answers.iter().enumerate() {
            assert!(whole.add(logits, *label) && parts[i % 2].add(logits, *label));
        }
        let [first, second] = &mut parts;
        for (sum, other) in first.sums().into_iter().zip(second.sums()) {
            sum.iter_mut().zip(other).for_each(|(a, b)| *a += *b);
        }
        assert_eq!(first.confusion, whole.confusion);
        let (a, b) = (first.evaluation(), whole.evaluation());
        assert!((a.loss - b.loss).abs() < 1e-12 && a.correct5 == b.correct5);
    }
}

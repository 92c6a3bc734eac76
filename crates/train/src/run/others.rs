//! One device leads, the others follow.

use candle_core::Device;

use crate::ranks::gone;
use crate::{Error, Rank, Result};

/// Trains on the first device here and on the others in threads of their own; what both came to, or the
/// error that ended the run.
pub(super) fn with_others<'a, T, S: Send>(
    first: Option<&Rank>,
    others: impl Iterator<Item = (Rank, &'a Device)>,
    follow: &(impl Fn(&Rank, &Device) -> Result<Vec<S>> + Sync),
    lead: impl FnOnce() -> Result<T>,
) -> Result<(T, Vec<S>)> {
    /// The scope waits for the others, who wait for this rank.
    struct Panic<'a>(Option<&'a Rank>);
    impl Drop for Panic<'_> {
        fn drop(&mut self) {
            if let (Some(rank), true) = (self.0, std::thread::panicking()) {
                rank.fail("it panicked");
            }
        }
    }
    std::thread::scope(|scope| {
        let _tell = Panic(first);
        let others: Vec<_> = others
            .map(|(rank, device)| {
                let work = move || rank.at_work(device, follow);
                (device, scope.spawn(work))
            })
            .collect();
        let mut problems = Vec::new();
        let led = match lead() {
            Ok(led) => Some(led),
            Err(error) => {
                if let Some(rank) = first {
                    rank.fail(&error.to_string());
                }
                problems.push(error);
                None
            }
        };
        let mut all = Vec::new();
        for (device, thread) in others {
            match thread.join().unwrap_or_else(|_| Err(gone())) {
                Ok(followed) => all.extend(followed),
                Err(source) => problems.push(Error::Rank {
                    device: isqrt_device::name(device),
                    source: Box::new(source),
                }),
            }
        }
        // What ended the run, not that the others heard of it.
        let first = problems.into_iter().min_by_key(Error::is_of_the_ranks);
        match (led, first) {
            (Some(led), None) => Ok((led, all)),
            (_, Some(problem)) => Err(problem),
            (None, None) => Err(Error::Collective("the first rank is gone".to_owned())),
        }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::collective::Collective;

    /// Ranks that meet once more each time, until `last`.
    fn meet(rank: &Rank, last: usize) -> Result<()> {
        (0..last).try_for_each(|_| rank.barrier())
    }

    fn together(
        follow: impl Fn(&Rank, &Device) -> Result<Vec<u8>> + Sync,
        lead: impl FnOnce(&Rank) -> Result<u8>,
    ) -> Result<(u8, Vec<u8>)> {
        let devices = [Device::Cpu, Device::Cpu, Device::Cpu];
        let mut ranks = Rank::all(&devices).unwrap();
        let others = ranks.split_off(1);
        let first = ranks.first();
        let others = others.into_iter().zip(&devices[1..]);
        with_others(first, others, &follow, || lead(first.unwrap()))
    }

    #[test]
    fn all_ranks_come_to_something_or_the_run_ends_with_what_ended_it() {
        let follow = |rank: &Rank, _: &Device| {
            meet(rank, 5)?;
            Ok(vec![rank.rank() as u8])
        };
        let all = together(follow, |rank| meet(rank, 5).map(|()| 7)).unwrap();
        assert_eq!(all, (7, vec![1, 2]));

        let fails = |rank: &Rank, _: &Device| match rank.rank() {
            2 => Err(Error::Loss(f64::NAN)),
            _ => meet(rank, 5).map(|()| vec![]),
        };
        let told = together(fails, |rank| meet(rank, 5).map(|()| 7)).unwrap_err();
        assert_eq!(told.to_string(), "cpu: the loss is NaN");
        assert!(told.is_divergence());

        let told = together(follow, |_| Err(Error::Output)).unwrap_err();
        assert!(matches!(told, Error::Output), "{told}");
    }

    #[test]
    fn a_rank_that_panics_leaves_nobody_waiting() {
        let follow = |rank: &Rank, _: &Device| meet(rank, 5).map(|()| vec![]);
        let panics = || together(follow, |_| panic!("on purpose"));
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics));
        assert!(caught.is_err());
        let panics = |rank: &Rank, _: &Device| match rank.rank() {
            1 => panic!("on purpose"),
            _ => meet(rank, 5).map(|()| vec![]),
        };
        let told = together(panics, |rank| meet(rank, 5).map(|()| 7)).unwrap_err();
        assert!(told.to_string().contains("panicked"), "{told}");
    }
}

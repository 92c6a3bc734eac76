//! How large a batch may be that is timed or measured.
//!
//! Sizes come from a TOML file or the command line, and what they ask for is allocated: a product
//! that overflows, or more memory than any machine of this kind has, is refused before.

/// Most feature values, and most entries of covariance matrices, in one batch: 8 GiB in single
/// precision.
const MOST_VALUES: usize = 1 << 31;

/// Checks that a batch of feature maps, and their covariance matrices, can be held in memory.
///
/// # Errors
/// One line that names the sizes.
pub fn check_size(batch: usize, dim: usize, positions: usize) -> Result<(), String> {
    if batch == 0 || dim == 0 || positions == 0 {
        return Err(format!(
            "batch {batch}, dim {dim}, positions {positions}: each must be at least 1"
        ));
    }
    let values = |side: usize| batch.checked_mul(dim).and_then(|n| n.checked_mul(side));
    for side in [positions, dim] {
        if values(side).is_none_or(|n| n > MOST_VALUES) {
            return Err(format!(
                "batch {batch}, dim {dim}, positions {positions}: more than 2^31 values \
                 ({batch} x {dim} x {side}); choose smaller sizes"
            ));
        }
    }
    Ok(())
}

/// As [`check_size`], for decompositions: their matrices come from a quarter more positions than
/// channels.
///
/// # Errors
/// One line that names the sizes.
pub fn check_decomposition_size(batch: usize, dim: usize) -> Result<(), String> {
    check_size(batch, dim, dim.saturating_add(dim / 4))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sizes_of_the_paper_are_fine() {
        assert_eq!(check_size(32, 256, 196), Ok(()));
        assert_eq!(check_decomposition_size(16, 256), Ok(()));
        assert_eq!(check_size(1, 1, MOST_VALUES), Ok(()));
    }

    #[test]
    fn nothing_too_much_and_overflow_are_refused() {
        for (batch, dim, positions) in [
            (0, 1, 1),
            (1, 0, 1),
            (1, 1, 0),
            (1, 1, MOST_VALUES + 1),
            (1, 1 << 16, 1),
            (8, 3_000_000_000, 3_000_000_000),
            (usize::MAX, usize::MAX, usize::MAX),
        ] {
            assert!(check_size(batch, dim, positions).is_err());
        }
        assert!(check_decomposition_size(1, usize::MAX).is_err());
        assert!(check_decomposition_size(0, 8).is_err());
    }
}

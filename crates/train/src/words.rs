//! Numbers in sentences.

use std::fmt::Display;

/// `1 epoch`, `2 epochs`.
pub fn counted<T: Display + PartialEq + From<u8>>(count: T, of: &str) -> String {
    let s = if count == T::from(1) { "" } else { "s" };
    format!("{count} {of}{s}")
}

#[cfg(test)]
mod tests {
    use super::counted;

    #[test]
    fn one_is_singular() {
        assert_eq!(counted(0_u64, "epoch"), "0 epochs");
        assert_eq!(counted(1_usize, "epoch"), "1 epoch");
        assert_eq!(counted(2_usize, "epoch"), "2 epochs");
    }
}

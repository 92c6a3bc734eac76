//! Random bits by counter: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
//! 1, 2, 3"), the generator of PyTorch's and cuRAND's masks.
//!
//! The bits of a place depend on its number alone, so they can be made again at any time, in any
//! order and on any thread. Sixteen counters at once, so that the compiler vectorises.

/// Counters that are worked on together.
const LANES: usize = 16;
/// Values that one call makes: four words a counter.
pub(crate) const BLOCK: usize = 4 * LANES;

/// A key that depends on both numbers in all its bits.
pub(crate) fn key(seed: u64, layer: u64) -> u64 {
    mix(seed ^ mix(layer.wrapping_add(0x9e37_79b9_7f4a_7c15)))
}

/// The finaliser of SplitMix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Words of the counters `(16·block + lane, step)`: word `w` of lane `l` is value `16·w + l`.
#[inline(always)]
pub(crate) fn block(key: u64, step: u64, block: u64) -> [[u32; LANES]; 4] {
    let first = block.wrapping_mul(LANES as u64);
    let number = |lane: usize| first.wrapping_add(lane as u64);
    let counter = [
        std::array::from_fn(|lane| number(lane) as u32),
        std::array::from_fn(|lane| (number(lane) >> 32) as u32),
        [step as u32; LANES],
        [(step >> 32) as u32; LANES],
    ];
    rounds(counter, [key as u32, (key >> 32) as u32])
}

#[inline(always)]
fn rounds(counter: [[u32; LANES]; 4], mut key: [u32; 2]) -> [[u32; LANES]; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    for _ in 0..10 {
        for lane in 0..LANES {
            let a = 0xd251_1f53 * u64::from(c0[lane]);
            let b = 0xcd9e_8d57 * u64::from(c2[lane]);
            c0[lane] = (b >> 32) as u32 ^ c1[lane] ^ key[0];
            c1[lane] = b as u32;
            c2[lane] = (a >> 32) as u32 ^ c3[lane] ^ key[1];
            c3[lane] = a as u32;
        }
        key[0] = key[0].wrapping_add(0x9e37_79b9);
        key[1] = key[1].wrapping_add(0xbb67_ae85);
    }
    [c0, c1, c2, c3]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that come with the authors' Random123.
    #[test]
    fn known_answers() {
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let cases = [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                pi,
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            let found = rounds(counter.map(|word| [word; LANES]), key);
            assert_eq!(found, expected.map(|word: u32| [word; LANES]));
        }
    }

    #[test]
    fn keys_and_counters_all_matter() {
        let base = block(key(1, 2), 3, 4);
        assert_eq!(base, block(key(1, 2), 3, 4));
        for other in [
            block(key(2, 1), 3, 4),
            block(key(1, 3), 3, 4),
            block(key(1, 2), 4, 4),
            block(key(1, 2), 3, 5),
            block(key(1, 2), 3 + (1 << 32), 4),
        ] {
            assert_ne!(base, other);
        }
    }
}

//! When connections that were many have ended, so that what they held can be given back to the system.
//!
//! Must not know what a connection holds, nor who takes it back.

/// So few hold little.
const FEW: usize = 4;

/// The most connections since the last lull.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lull {
    most: usize,
}

impl Lull {
    /// Looks at how many are under way, which is to be done every now and then. True: at least half of what were many have ended,
    /// for the first time since they came.
    pub fn look(&mut self, now: usize) -> bool {
        self.most = self.most.max(now);
        let is_lull = self.most >= FEW && now <= self.most / 2;
        if is_lull {
            self.most = now;
        }
        is_lull
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_burst_ends_once() {
        let mut lull = Lull::default();
        let looks = [0, 64, 60, 64, 33, 32, 31, 17, 16, 0, 0, 2, 0, 4, 1];
        let seen = looks.map(|now| lull.look(now));
        let expected = [5, 8, 9, 14];
        assert_eq!((0..looks.len()).filter(|at| seen[*at]).collect::<Vec<_>>(), expected);
    }

    proptest! {
        #[test]
        fn what_stays_is_left_alone(steady in 0_usize..1000, looks in 1_usize..50) {
            let mut lull = Lull::default();
            prop_assert!((0..looks).all(|_| !lull.look(steady)));
        }

        #[test]
        fn bursts_end_however_large_they_were(most in FEW..10_000, left in 0_usize..5_000) {
            let mut lull = Lull::default();
            lull.look(most);
            prop_assert_eq!(lull.look(left.min(most / 2)), true);
        }
    }
}

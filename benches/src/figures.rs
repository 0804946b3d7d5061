//! Statistics of repeated measurements: medians, spreads, and ratios of what was measured in the same round.
//!
//! Pure. The machine drifts between minutes, so a ratio is the median of the ratios of each round, never the ratio of
//! two medians. It must not know what was measured.

/// The middle of the values; of an even number, the mean of the two in the middle. `None` when there are none.
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// How far apart the values are, as a share of their median. `None` for fewer than two.
#[must_use]
pub fn spread(values: &[f64]) -> Option<f64> {
    let (least, most) = values.iter().fold((f64::INFINITY, 0.0_f64), |(low, high), &v| (low.min(v), high.max(v)));
    let middle = median(values).filter(|middle| *middle > 0.0)?;
    (values.len() > 1).then(|| (most - least) / middle)
}

/// The median of `ours / theirs`, round by round; a round that lacks one of them counts for neither.
#[must_use]
pub fn ratio(ours: &[Option<f64>], theirs: &[Option<f64>]) -> Option<f64> {
    let rounds = ours.iter().zip(theirs).filter_map(|(ours, theirs)| Some((*ours)? / (*theirs).filter(|v| *v > 0.0)?));
    median(&rounds.collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_whatever_the_order() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median(&[1.0, 2.0, 4.0, 100.0]), Some(3.0));
    }

    #[test]
    fn the_spread_is_relative() {
        assert_eq!(spread(&[5.0]), None);
        assert_eq!(spread(&[90.0, 100.0, 110.0]), Some(0.2));
        assert_eq!(spread(&[0.0, 0.0]), None);
    }

    #[test]
    fn a_machine_that_halves_its_speed_changes_no_ratio() {
        let ours = [Some(130.0), Some(65.0), Some(26.0)];
        let theirs = [Some(100.0), Some(50.0), Some(20.0)];
        assert_eq!(ratio(&ours, &theirs), Some(1.3));
    }

    #[test]
    fn rounds_that_lack_one_side_do_not_count() {
        assert_eq!(ratio(&[Some(2.0), None, Some(6.0)], &[Some(1.0), Some(1.0), None]), Some(2.0));
        assert_eq!(ratio(&[Some(1.0)], &[Some(0.0)]), None);
        assert_eq!(ratio(&[None], &[Some(1.0)]), None);
    }
}

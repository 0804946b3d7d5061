//! Aligned columns.
//!
//! Must not know what is in them.

/// Rows under a heading, columns two spaces apart, no space at the end of a line. Empty cells show as `-`.
pub(super) fn table<const N: usize>(heading: [&str; N], rows: Vec<[String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(heading.map(str::to_owned))
        .chain(rows)
        .map(|row| row.map(|cell| if cell.is_empty() { "-".to_owned() } else { cell }))
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells: String = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}  ")).collect();
        cells.trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = vec![["wörld".into(), "1".into(), String::new()], ["a".into(), "22".into(), "x y".into()]];
        assert_eq!(table(["NAME", "N", "LAST"], rows), "NAME   N   LAST\nwörld  1   -\na      22  x y");
    }
}

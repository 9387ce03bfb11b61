//! What the benchmarks share: the record of a run (`record`) with its machine (`machine`), iperf3, and the table and the plot made
//! of a record (`render`, `plot`). It measures nothing by itself.
#![allow(dead_code, reason = "each benchmark includes this folder by its path and uses a part of it")]

pub(crate) mod iperf3;
pub(crate) mod machine;
pub(crate) mod plot;
pub(crate) mod record;
pub(crate) mod render;
pub(crate) mod today;

/// Bytes of a GiB.
pub(crate) const GIB: f64 = 1_073_741_824.0;

/// The middle one; of an even number the mean of the two in the middle. Nothing where there is nothing.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get((values.len() - 1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

/// Median, lowest and highest, with so many decimals. Nothing where there is nothing.
pub(crate) fn spread(samples: &[f64], decimals: usize) -> Option<String> {
    let lowest = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = samples.iter().copied().fold(0.0, f64::max);
    let middle = median(samples.iter().copied())?;
    Some(format!("{middle:.decimals$} ({lowest:.decimals$} to {highest:.decimals$})"))
}

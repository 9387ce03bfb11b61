//! The plot of a record, as SVG: rates by lanes with the ceilings as horizontal lines, or whole migrations as bars. It draws medians
//! and nothing else.

use super::record::{Case, Kind, Run, Sample};
use super::render::{Unit, is_point};
use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::Path;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const SIZE: (u32, u32) = (900, 480);
/// Colours that can be told apart, also by those who see fewer (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(90, 90, 90),
];

fn colour(index: usize) -> RGBColor {
    COLOURS.get(index % COLOURS.len()).copied().unwrap_or(BLACK)
}

/// Draws `run` into the file `path`.
///
/// # Errors
/// The file cannot be written.
pub(crate) fn draw(run: &Run, path: &Path) -> Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    let failed = |error: String| anyhow!("{}: {error}", path.display());
    area.fill(&WHITE).map_err(|error| failed(error.to_string()))?;
    let drawn = if run.cases.iter().any(is_point) { by_lanes(run, &area) } else { bars(run, &area) };
    drawn.map_err(failed)?;
    area.present().map_err(|error| failed(error.to_string()))
}

/// The mix that is drawn: random pages are what a link has to carry; the others are in the table.
fn drawn_mix(run: &Run) -> Option<&str> {
    let mixes = || run.cases.iter().filter(|case| is_point(case)).filter_map(|case| case.mix.as_deref());
    mixes().find(|mix| *mix == "random").or_else(|| mixes().next())
}

fn position(lanes: &[u16], of: u16) -> f64 {
    lanes.iter().position(|lanes| *lanes == of).map_or(0.0, |at| u32::try_from(at).map_or(0.0, f64::from))
}

fn by_lanes(run: &Run, area: &Area<'_>) -> Result<(), String> {
    let (unit, mix) = (Unit::of(run), drawn_mix(run));
    let points: Vec<&Case> = run.cases.iter().filter(|case| is_point(case) && case.mix.as_deref() == mix).collect();
    let levels: Vec<&Case> = run.cases.iter().filter(|case| matches!(case.kind, Kind::Ceiling | Kind::Peer)).collect();
    let mut lanes: Vec<u16> = points.iter().filter_map(|case| case.lanes).collect();
    lanes.sort_unstable();
    lanes.dedup();
    let rate = |case: &Case| case.median(Sample::rate).map(|rate| rate / unit.bytes_per_s);
    let top = points.iter().chain(&levels).filter_map(|case| rate(case)).fold(0.0, f64::max) * 1.1;
    let right = u32::try_from(lanes.len()).map_or(1.0, f64::from) - 0.6;
    // Room for the legend beside the lines, whatever they do.
    let width = (right.max(0.6) + 0.4) * 1.5 - 0.4;
    let mut chart = ChartBuilder::on(area)
        .caption(&run.title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(55)
        .build_cartesian_2d(-0.4..width, 0.0..top.max(f64::MIN_POSITIVE))
        .map_err(|error| error.to_string())?;
    let label =
        |at: &f64| lanes.iter().find(|of| (position(&lanes, **of) - at).abs() < 0.01).map_or(String::new(), u16::to_string);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .max_light_lines(0)
        .x_labels(lanes.len() * 8 + 1)
        .x_label_formatter(&label)
        .x_desc(format!("lanes ({} pages)", mix.unwrap_or("all")))
        .y_desc(unit.name)
        .draw()
        .map_err(|error| error.to_string())?;
    let mut series: Vec<&str> = points.iter().map(|case| case.series.as_str()).collect();
    series.dedup();
    for (index, name) in series.iter().enumerate() {
        let line: Vec<(f64, f64)> = points
            .iter()
            .filter(|case| case.series == *name)
            .filter_map(|case| Some((position(&lanes, case.lanes?), rate(case)?)))
            .collect();
        let style = colour(index).stroke_width(2);
        let drawn = LineSeries::new(line, style).point_size(4);
        chart.draw_series(drawn).map_err(|error| error.to_string())?.label(*name).legend(move |(x, y)| legend(x, y, style));
    }
    for (index, case) in levels.iter().enumerate() {
        let Some(level) = rate(case) else { continue };
        let style = colour(series.len() + index).stroke_width(2);
        let ends = [(-0.4, level), (right, level)];
        let drawn = DashedLineSeries::new(ends, 6, 4, style);
        chart.draw_series(drawn).map_err(|error| error.to_string())?.label(&case.name).legend(move |(x, y)| legend(x, y, style));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.2))
        .position(SeriesLabelPosition::UpperRight)
        .draw()
        .map_err(|error| error.to_string())
}

fn legend(x: i32, y: i32, style: ShapeStyle) -> PathElement<(i32, i32)> {
    PathElement::new(vec![(x, y), (x + 18, y)], style)
}

/// Whole migrations: total time as bars, the downtime in words.
fn bars(run: &Run, area: &Area<'_>) -> Result<(), String> {
    let rows: Vec<(&Case, f64)> =
        run.cases.iter().filter_map(|case| Some((case, case.median(|sample| sample.total_ms)?))).collect();
    let top = rows.iter().map(|row| row.1).fold(0.0, f64::max) * 1.35;
    let count = u32::try_from(rows.len()).map_or(1.0, f64::from).max(1.0);
    let mut chart = ChartBuilder::on(area)
        .caption(&run.title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(10)
        .build_cartesian_2d(0.0..top.max(1.0), 0.0..count)
        .map_err(|error| error.to_string())?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .max_light_lines(0)
        .y_labels(0)
        .x_desc("total ms, once the destination has its memory")
        .draw()
        .map_err(|error| error.to_string())?;
    let mut bottom = count;
    for (index, (case, total)) in rows.iter().enumerate() {
        bottom -= 1.0;
        let bar = Rectangle::new([(0.0, bottom + 0.15), (*total, bottom + 0.85)], colour(index).mix(0.75).filled());
        chart.draw_series([bar]).map_err(|error| error.to_string())?;
        let downtime = case.median(|sample| sample.downtime_ms).map(|ms| format!(", downtime {ms:.1} ms")).unwrap_or_default();
        let lanes = match case.lanes {
            Some(1) | None => String::new(),
            Some(lanes) => format!(", {lanes} lanes"),
        };
        let words = format!("{}{lanes}: {total:.0} ms{downtime}", case.name);
        chart
            .draw_series([Text::new(words, (top * 0.01, bottom + 0.6), ("sans-serif", 14))])
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

//! The plot: how much of streaming's throughput the cluster reaches.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// One workload.
pub struct Bar {
    pub name: String,
    /// Our throughput by streaming's.
    pub ratio: f64,
}

/// Pixels.
const WIDTH: u32 = 860;
const BAR_HEIGHT: u32 = 34;
const MARGIN: u32 = 90;
const OURS: RGBColor = RGBColor(0x2b, 0x6c, 0xb0);

/// Writes an SVG file with a horizontal bar for each workload.
///
/// # Errors
/// When the file cannot be written.
pub fn draw(file: &Path, bars: &[Bar]) -> Result<()> {
    if bars.is_empty() {
        return Ok(());
    }
    let count = i32::try_from(bars.len())?;
    let height = MARGIN + BAR_HEIGHT * u32::try_from(bars.len())?;
    let longest = bars.iter().map(|bar| bar.ratio).fold(1.0, f64::max);
    let area = SVGBackend::new(file, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE).map_err(failed)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("throughput, streaming = 1", ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(130)
        .build_cartesian_2d(0.0..longest * 1.1, (0..count - 1).into_segmented())
        .map_err(failed)?;
    // The first workload on top.
    let name_at = |place: &SegmentValue<i32>| match place {
        SegmentValue::CenterOf(row) => usize::try_from(count - 1 - row)
            .ok()
            .and_then(|place| bars.get(place))
            .map_or(String::new(), |bar| bar.name.clone()),
        _ => String::new(),
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(bars.len())
        .y_label_formatter(&name_at)
        .label_style(("sans-serif", 14))
        .draw()
        .map_err(failed)?;
    let rows = bars.iter().zip((0..count).rev());
    chart
        .draw_series(rows.clone().map(|(bar, row)| {
            let corners = [
                (0.0, SegmentValue::Exact(row)),
                (bar.ratio, SegmentValue::Exact(row + 1)),
            ];
            let mut rectangle = Rectangle::new(corners, OURS.filled());
            rectangle.set_margin(5, 5, 0, 0);
            rectangle
        }))
        .map_err(failed)?;
    chart
        .draw_series(rows.map(|(bar, row)| {
            Text::new(
                format!("{:.2}", bar.ratio),
                (bar.ratio + longest * 0.01, SegmentValue::CenterOf(row)),
                ("sans-serif", 14).into_font(),
            )
        }))
        .map_err(failed)?;
    area.present().map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw the plot: {error}")
}

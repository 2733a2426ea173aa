//! Plots of figures as SVG, for any browser.

use std::fmt::Write;

use crate::stats::{KIB, MIB, MILLISECOND, Row, scale, to_f64};

/// Sizes in pixels: the whole picture fits a slide.
const WIDTH: f64 = 960.0;
const MARGIN: f64 = 120.0;
const BAR: f64 = 26.0;
const GAP: f64 = 10.0;
const CURVE: f64 = 220.0;

/// One colour for each bar, distinct without colour vision too (Okabe and Ito).
const COLOURS: [&str; 6] = ["#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7"];

/// Draws the phases one after the other and, below them, the distribution of one phase.
///
/// The rows are moments in nanoseconds since the start; `values` are those of one phase over all
/// runs.
pub fn draw_phases(title: &str, rows: &[Row], values: Vec<u64>) -> String {
    let end = scale(rows.iter().map(|row| row.median).max().unwrap_or(1).max(1), MILLISECOND);
    let x = |ms: f64| MARGIN + ms / end * (WIDTH - 2.0 * MARGIN);
    let mut body = String::new();
    let mut y = 60.0;
    let mut before = 0.0;
    for (row, colour) in rows.iter().zip(COLOURS.iter().cycle()) {
        let at = scale(row.median, MILLISECOND);
        draw_label(&mut body, MARGIN - 8.0, y + 18.0, "end", row.name);
        draw_bar(&mut body, x(before), y, x(at) - x(before), colour);
        draw_label(&mut body, x(at) + 6.0, y + 18.0, "start", &format!("{at:.2} ms"));
        y += BAR + GAP;
        before = at;
    }
    let bottom = draw_distribution(&mut body, y + 40.0, values);
    wrap_document(title, bottom + 20.0, &body)
}

/// Draws the share of values below each value, from `top` down; returns the end of the picture.
fn draw_distribution(body: &mut String, top: f64, mut values: Vec<u64>) -> f64 {
    values.sort_unstable();
    let (Some(first), Some(last)) = (values.first(), values.last()) else { return top - 40.0 };
    let (low, high) = (scale(*first, MILLISECOND), scale(*last, MILLISECOND));
    let width = (high - low).max(f64::EPSILON);
    let bottom = top + CURVE;
    let x = |ms: f64| MARGIN + (ms - low) / width * (WIDTH - 2.0 * MARGIN);
    let mut points = String::new();
    for (done, value) in values.iter().enumerate() {
        let share =
            |count: usize| bottom - CURVE * scale(count as u64, to_f64(values.len() as u64));
        let at = x(scale(*value, MILLISECOND));
        let _ = write!(points, "{at:.1},{:.1} {at:.1},{:.1} ", share(done), share(done + 1));
    }
    for percent in [0_u32, 50, 99] {
        let level = bottom - CURVE * f64::from(percent) / 100.0;
        let (left, right) = (MARGIN, WIDTH - MARGIN);
        let _ = write!(
            body,
            r##"<line x1="{left}" y1="{level:.1}" x2="{right}" y2="{level:.1}" stroke="#ccc"/>"##
        );
        draw_label(body, MARGIN - 8.0, level + 5.0, "end", &format!("{percent} %"));
    }
    let _ = write!(
        body,
        r#"<polyline points="{points}" fill="none" stroke="{}" stroke-width="2"/>"#,
        COLOURS[0]
    );
    draw_label(body, MARGIN, bottom + 22.0, "start", &format!("{low:.2} ms"));
    draw_label(body, WIDTH - MARGIN, bottom + 22.0, "end", &format!("{high:.2} ms"));
    draw_label(body, MARGIN, top - 14.0, "start", "share of runs that were done after");
    bottom + 30.0
}

/// Draws one bar for each row, in MiB per second.
pub fn draw_rates(title: &str, rows: &[Row]) -> String {
    draw_bars(title, &[("", rows)], to_f64(MIB), "MiB/s")
}

/// Draws the memory of booted and of copied sandboxes.
pub fn draw_memory(booted: &[Row], copied: &[Row]) -> String {
    let groups = [("booted ", booted), ("copied ", copied)];
    draw_bars("Memory of one sandbox", &groups, to_f64(KIB), "KiB")
}

fn draw_bars(title: &str, groups: &[(&str, &[Row])], unit: f64, name: &str) -> String {
    let all = || groups.iter().flat_map(|(_, rows)| rows.iter());
    let most = scale(all().map(|row| row.median).max().unwrap_or(1).max(1), unit);
    let (mut body, mut y) = (String::new(), 60.0);
    for (group, rows) in groups {
        for (row, colour) in rows.iter().zip(COLOURS.iter().cycle()) {
            let value = scale(row.median, unit);
            let width = value / most * (WIDTH - 2.0 * MARGIN);
            draw_label(&mut body, MARGIN - 8.0, y + 18.0, "end", &format!("{group}{}", row.name));
            draw_bar(&mut body, MARGIN, y, width, colour);
            draw_label(
                &mut body,
                MARGIN + width + 6.0,
                y + 18.0,
                "start",
                &format!("{value:.0} {name}"),
            );
            y += BAR + GAP;
        }
        y += GAP;
    }
    wrap_document(title, y + 10.0, &body)
}

fn draw_bar(body: &mut String, x: f64, y: f64, width: f64, colour: &str) {
    // The shortest bar is still visible.
    let width = width.max(1.0);
    let _ = write!(
        body,
        r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{BAR}" fill="{colour}"/>"#
    );
}

fn draw_label(body: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _ = write!(
        body,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#,
        escape_xml(text)
    );
}

fn wrap_document(title: &str, height: f64, body: &str) -> String {
    let title = escape_xml(title);
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"
 font-family="sans-serif" font-size="14">
<title>{title}</title>
<rect width="{WIDTH}" height="{height}" fill="#fff"/>
<text x="20" y="34" font-size="20">{title}</text>
{body}
</svg>
"##
    )
}

fn escape_xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_continue_where_the_previous_one_ends() {
        let row = |name, median| Row { name, min: 0, median, p99: 0, max: 0 };
        let svg = draw_phases(
            "a & b",
            &[row("entered", 4_000_000), row("agent", 10_000_000)],
            vec![1, 2, 3],
        );
        let span = WIDTH - 2.0 * MARGIN;
        assert!(
            svg.contains(&format!(r#"<rect x="{MARGIN:.1}" y="60.0" width="{:.1}""#, span * 0.4)),
            "{svg}"
        );
        assert!(svg.contains(&format!(
            r#"<rect x="{:.1}" y="96.0" width="{:.1}""#,
            MARGIN + span * 0.4,
            span * 0.6
        )));
        assert!(svg.contains("a &amp; b") && svg.contains("10.00 ms"));
        assert_eq!(svg.matches("<svg").count(), svg.matches("</svg>").count());
    }
}

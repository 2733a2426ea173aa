//! Figures as pictures: SVG that needs nothing but a browser.

use std::fmt::Write;

use super::stats::{Row, scaled};

/// Pixels. A slide shows it whole.
const WIDTH: f64 = 960.0;
const MARGIN: f64 = 120.0;
const BAR: f64 = 26.0;
const GAP: f64 = 10.0;
const CURVE: f64 = 220.0;

/// One colour per bar, told apart also without colour vision (Okabe and Ito).
const COLOURS: [&str; 6] = ["#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7"];

/// Phases one after the other, and below them which share of the runs was done after how long.
///
/// The rows are moments, in nanoseconds since the start; the values are those of one phase over all runs.
pub fn phases(title: &str, rows: &[Row], mut values: Vec<u64>) -> String {
    let end = scaled(rows.iter().map(|row| row.median).max().unwrap_or(1).max(1), 1e6);
    let x = |ms: f64| MARGIN + ms / end * (WIDTH - 2.0 * MARGIN);
    let mut body = String::new();
    let mut y = 60.0;
    let mut before = 0.0;
    for (row, colour) in rows.iter().zip(COLOURS.iter().cycle()) {
        let at = scaled(row.median, 1e6);
        label(&mut body, MARGIN - 8.0, y + 18.0, "end", row.name);
        bar(&mut body, x(before), y, x(at) - x(before), colour);
        label(&mut body, x(at) + 6.0, y + 18.0, "start", &format!("{at:.2} ms"));
        y += BAR + GAP;
        before = at;
    }
    values.sort_unstable();
    if let (Some(first), Some(last)) = (values.first(), values.last()) {
        let (low, high) = (scaled(*first, 1e6), scaled(*last, 1e6));
        let width = (high - low).max(f64::EPSILON);
        let (top, bottom) = (y + 40.0, y + 40.0 + CURVE);
        let x = |ms: f64| MARGIN + (ms - low) / width * (WIDTH - 2.0 * MARGIN);
        let mut points = String::new();
        for (done, value) in values.iter().enumerate() {
            let share = |count: usize| {
                bottom - CURVE * scaled(count as u64, scaled(values.len() as u64, 1.0))
            };
            let at = x(scaled(*value, 1e6));
            let _ = write!(points, "{at:.1},{:.1} {at:.1},{:.1} ", share(done), share(done + 1));
        }
        for percent in [0_u32, 50, 99] {
            let level = bottom - CURVE * f64::from(percent) / 100.0;
            let (left, right) = (MARGIN, WIDTH - MARGIN);
            let _ = write!(
                body,
                r##"<line x1="{left}" y1="{level:.1}" x2="{right}" y2="{level:.1}" stroke="#ccc"/>"##
            );
            label(&mut body, MARGIN - 8.0, level + 5.0, "end", &format!("{percent} %"));
        }
        let _ = write!(
            body,
            r#"<polyline points="{points}" fill="none" stroke="{}" stroke-width="2"/>"#,
            COLOURS[0]
        );
        label(&mut body, MARGIN, bottom + 22.0, "start", &format!("{low:.2} ms"));
        label(&mut body, WIDTH - MARGIN, bottom + 22.0, "end", &format!("{high:.2} ms"));
        label(&mut body, MARGIN, top - 14.0, "start", "share of runs that were done after");
        y = bottom + 30.0;
    }
    document(title, y + 20.0, &body)
}

/// One bar for each direction, in MiB per second.
pub fn rates(title: &str, rows: &[Row]) -> String {
    bars(title, &[("", rows)], f64::from(1 << 20), "MiB/s")
}

/// What sandboxes that were booted and those that were copied take.
pub fn memory(booted: &[Row], copied: &[Row]) -> String {
    bars("Memory of one sandbox", &[("booted ", booted), ("copied ", copied)], 1024.0, "KiB")
}

fn bars(title: &str, groups: &[(&str, &[Row])], unit: f64, name: &str) -> String {
    let all = || groups.iter().flat_map(|(_, rows)| rows.iter());
    let most = scaled(all().map(|row| row.median).max().unwrap_or(1).max(1), unit);
    let (mut body, mut y) = (String::new(), 60.0);
    for (group, rows) in groups {
        for (row, colour) in rows.iter().zip(COLOURS.iter().cycle()) {
            let value = scaled(row.median, unit);
            let width = value / most * (WIDTH - 2.0 * MARGIN);
            label(&mut body, MARGIN - 8.0, y + 18.0, "end", &format!("{group}{}", row.name));
            bar(&mut body, MARGIN, y, width, colour);
            label(
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
    document(title, y + 10.0, &body)
}

fn bar(body: &mut String, x: f64, y: f64, width: f64, colour: &str) {
    // One that is too short to be seen is drawn all the same.
    let width = width.max(1.0);
    let _ = write!(
        body,
        r#"<rect x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{BAR}" fill="{colour}"/>"#
    );
}

fn label(body: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _ = write!(
        body,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#,
        escaped(text)
    );
}

fn document(title: &str, height: f64, body: &str) -> String {
    let title = escaped(title);
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="14">
<title>{title}</title>
<rect width="{WIDTH}" height="{height}" fill="#fff"/>
<text x="20" y="34" font-size="20">{title}</text>
{body}
</svg>
"##
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_starts_where_the_one_before_it_ends() {
        let row = |name, median| Row { name, min: 0, median, p99: 0, max: 0 };
        let svg =
            phases("a & b", &[row("entered", 4_000_000), row("agent", 10_000_000)], vec![1, 2, 3]);
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

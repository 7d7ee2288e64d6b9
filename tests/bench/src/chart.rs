//! The chart: for each measurement and family the ways' rates as shares of the straight one, with p10 to p90. Written by
//! hand, so that it needs nothing.

use std::fmt::Write as _;

use crate::report::{Report, family_name, wanted};
use crate::ways::Way;

const BAR: u32 = 22;
const GAP: u32 = 34;
const LEFT: u32 = 48;
const TOP: u32 = 44;
const HEIGHT: u32 = 240;
/// The highest ratio shown.
const MOST: f64 = 1.2;

fn colour(way: Way) -> &'static str {
    match way {
        Way::Straight => "#9aa0a6",
        Way::Culvert => "#1a73e8",
        Way::Iptables => "#e8710a",
        Way::Nftables => "#b06000",
    }
}

/// Draws the traffic part; a chart with axes alone if that was not measured.
pub(crate) fn draw(report: &Report) -> String {
    let group = 4 * BAR + GAP;
    let groups = u32::try_from(report.traffic.len().max(1)).unwrap_or(1);
    let width = LEFT + groups * group + 16;
    let bottom = TOP + HEIGHT;
    let y = |ratio: f64| f64::from(bottom) - ratio.clamp(0.0, MOST) / MOST * f64::from(HEIGHT);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        bottom + 44
    );
    let mut put = |text: std::fmt::Arguments<'_>| {
        // Writing to a string cannot fail.
        let _never = svg.write_fmt(text);
    };
    for (i, way) in Way::ALL.into_iter().enumerate() {
        let x = LEFT + u32::try_from(i).unwrap_or(0) * 90;
        put(format_args!(
            "<rect x=\"{x}\" y=\"12\" width=\"10\" height=\"10\" fill=\"{}\"/><text x=\"{}\" y=\"21\">{}</text>\n",
            colour(way),
            x + 14,
            way.name()
        ));
    }
    for tick in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let at = y(tick);
        put(format_args!(
            "<line x1=\"{LEFT}\" x2=\"{width}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/><text x=\"{}\" \
             y=\"{:.1}\" text-anchor=\"end\">{tick:.2}</text>\n",
            LEFT - 6,
            at + 4.0
        ));
    }
    for (g, row) in report.traffic.iter().enumerate() {
        let start = LEFT + GAP / 2 + u32::try_from(g).unwrap_or(0) * group;
        for (b, way) in row.ways.iter().enumerate() {
            let x = start + u32::try_from(b).unwrap_or(0) * BAR;
            let (top, middle) = (
                y(way.ratio.median),
                f64::from(x) + f64::from(BAR) / 2.0 - 1.0,
            );
            put(format_args!(
                "<rect x=\"{x}\" y=\"{top:.1}\" width=\"{}\" height=\"{:.1}\" fill=\"{}\"><title>{} {:.3}</title></rect>\n\
                 <line x1=\"{middle:.1}\" x2=\"{middle:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"#333\"/>\n\
                 <text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"8\">{:.2}</text>\n",
                BAR - 2,
                f64::from(bottom) - top,
                colour(way.way),
                way.way.name(),
                way.ratio.median,
                y(way.ratio.p10),
                y(way.ratio.p90),
                y(way.ratio.p90.max(way.ratio.median)) - 3.0,
                way.ratio.median
            ));
        }
        let target = y(wanted(row.measure));
        put(format_args!(
            "<line x1=\"{}\" x2=\"{}\" y1=\"{target:.1}\" y2=\"{target:.1}\" stroke=\"#188038\" stroke-dasharray=\"3 2\">\
             <title>target {}</title></line>\n<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n\
             <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\n",
            start - 3,
            start + 4 * BAR + 1,
            wanted(row.measure),
            start + 2 * BAR,
            bottom + 16,
            row.measure.name(),
            start + 2 * BAR,
            bottom + 30,
            family_name(row.family)
        ));
    }
    put(format_args!(
        "<text x=\"{LEFT}\" y=\"36\" fill=\"#555\">rate as a share of straight loopback (bars: median, lines: p10-p90, dashed: \
         target)</text>\n</svg>\n"
    ));
    svg
}

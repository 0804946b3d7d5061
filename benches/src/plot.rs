//! The bars of the report as an SVG: for each kind of work, every subject's rate as a share of no mesh at all.
//!
//! Pure. It must not know where the figures come from.

use std::fmt::Write as _;

/// A bar.
#[derive(Clone, Debug)]
pub struct Bar {
    pub label: String,
    /// 1.0 is the whole width.
    pub share: f64,
    pub colour: Colour,
    /// Written behind the bar.
    pub note: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    Ours,
    L4,
    L7,
    NoMesh,
}

/// A heading and its bars.
#[derive(Clone, Debug)]
pub struct Panel {
    pub title: String,
    pub bars: Vec<Bar>,
}

const WIDTH: usize = 860;
const LABELS: usize = 170;
const BARS: usize = 440;
const LINE: usize = 20;
const TITLE: usize = 34;

/// Draws the panels below each other.
#[must_use]
pub fn draw(heading: &str, panels: &[Panel]) -> String {
    let height = 64 + panels.iter().map(|panel| TITLE + panel.bars.len() * LINE + 10).sum::<usize>();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"16\" font-weight=\"bold\" fill=\"#222222\">{}</text>\n",
        escape(heading)
    );
    let mut at = 16;
    for (colour, name) in
        [(Colour::Ours, "ecs-mesh"), (Colour::L4, "peers, L4"), (Colour::L7, "peers, L7"), (Colour::NoMesh, "no mesh")]
    {
        writeln!(
            svg,
            "<rect x=\"{at}\" y=\"38\" width=\"12\" height=\"12\" fill=\"{}\"/>\
             <text x=\"{}\" y=\"48\" fill=\"#222222\">{name}</text>",
            colour.code(),
            at + 18
        )
        .ok();
        at += 110;
    }
    let mut y = 64;
    for panel in panels {
        writeln!(
            svg,
            "<text x=\"16\" y=\"{}\" font-weight=\"bold\" fill=\"#222222\">{}</text>",
            y + 20,
            escape(&panel.title)
        )
        .ok();
        y += TITLE;
        for bar in &panel.bars {
            let length = (bar.share.clamp(0.0, 1.15) * BARS as f64).max(1.0);
            writeln!(
                svg,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#222222\">{}</text>\
                 <rect x=\"{LABELS}\" y=\"{}\" width=\"{length:.1}\" height=\"14\" fill=\"{}\"/>\
                 <text x=\"{:.1}\" y=\"{}\" fill=\"#555555\">{}</text>",
                LABELS - 8,
                y + 12,
                escape(&bar.label),
                y,
                bar.colour.code(),
                LABELS as f64 + length + 6.0,
                y + 12,
                escape(&bar.note),
            )
            .ok();
            y += LINE;
        }
        y += 10;
    }
    svg.push_str("</svg>\n");
    svg
}

impl Colour {
    fn code(self) -> &'static str {
        match self {
            Self::Ours => "#d1495b",
            Self::L4 => "#30638e",
            Self::L7 => "#8fb8de",
            Self::NoMesh => "#b8b8b8",
        }
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bar_is_drawn_within_the_picture() {
        let bar = |share| Bar { label: "a<b".to_owned(), share, colour: Colour::Ours, note: String::new() };
        let panels = [Panel { title: "work".to_owned(), bars: vec![bar(0.0), bar(0.5), bar(7.0)] }];
        let svg = draw("heading", &panels);
        assert_eq!(svg.matches("height=\"14\"").count(), 3);
        assert!(svg.contains("a&lt;b") && !svg.contains("a<b"));
        assert!(svg.contains("width=\"220.0\"") && svg.contains("width=\"506.0\""));
    }
}

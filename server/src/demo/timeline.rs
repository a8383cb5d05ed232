//! What a person sees: sections, steps with their milliseconds, a strip of the writes, the verdict.
//!
//! Owns layout and colours, and knows nothing of the story. Lines are at most [`COLUMNS`] wide and
//! plain ASCII; colours are for terminals, and not where `NO_COLOR` is set.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// The width of a line.
const COLUMNS: usize = 80;
/// The width of the times at the left.
const TIME_COLUMNS: usize = 12;
/// How many marks a strip has.
const STRIP_MARKS: usize = COLUMNS - TIME_COLUMNS - 1;

const BOLD: &str = "1";
const TIME: &str = "36";
const FAINT: &str = "2";
const GOOD: &str = "1;32";
const BAD: &str = "1;31";

/// Tells the story on standard output, line by line as it happens.
#[derive(Debug)]
pub(super) struct Timeline {
    colours: bool,
    verbose: bool,
}

impl Timeline {
    /// Writes to standard output; `verbose` shows details too.
    pub(super) fn new(verbose: bool) -> Self {
        let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self {
            colours: std::io::stdout().is_terminal() && !set("NO_COLOR") && !dumb,
            verbose,
        }
    }

    /// The first line.
    pub(super) fn title(&self, text: &str) {
        self.put(&self.paint(BOLD, text));
    }

    /// Begins a section; `note` says what the times at the left count.
    pub(super) fn section(&self, heading: &str, note: &str) {
        let gap = COLUMNS.saturating_sub(heading.len() + note.len());
        let note = self.paint(FAINT, note);
        self.put("");
        self.put(&format!("{}{:gap$}{note}", self.paint(BOLD, heading), ""));
    }

    /// An empty line.
    pub(super) fn gap(&self) {
        self.put("");
    }

    /// One thing that happened, and how long it took or when it was.
    pub(super) fn step(&self, time: impl Into<Option<Duration>>, text: &str) {
        let time = time.into().map(milliseconds).unwrap_or_default();
        let time = format!("{time:>width$}  ", width = TIME_COLUMNS - 2);
        for (at, line) in wrap(text, COLUMNS - TIME_COLUMNS).iter().enumerate() {
            if at == 0 {
                self.put(&format!("{}{line}", self.paint(TIME, &time)));
            } else {
                self.put(&format!("{:TIME_COLUMNS$}{line}", ""));
            }
        }
    }

    /// What only the curious want to know.
    pub(super) fn detail(&self, text: &str) {
        if !self.verbose {
            return;
        }
        for line in wrap(text, COLUMNS - TIME_COLUMNS) {
            self.put(&self.paint(FAINT, &format!("{:TIME_COLUMNS$}{line}", "")));
        }
    }

    /// How many writes were answered in each part of the time from `from` to `to`, as a row of
    /// marks, with words under the moments in `notes`.
    pub(super) fn strip(
        &self,
        answers: &[Instant],
        from: Instant,
        to: Instant,
        notes: &[(Instant, &str)],
    ) {
        let whole_us = to.saturating_duration_since(from).as_micros().max(1);
        let place = |at: Instant| {
            let part_us = at.saturating_duration_since(from).as_micros();
            ((part_us * STRIP_MARKS as u128 / whole_us) as usize).min(STRIP_MARKS - 1)
        };
        let mut counts = [0_usize; STRIP_MARKS];
        for at in answers.iter().filter(|at| (from..=to).contains(at)) {
            if let Some(count) = counts.get_mut(place(*at)) {
                *count += 1;
            }
        }
        let most = counts.iter().copied().max().unwrap_or(0);
        let marks: String = counts.iter().map(|count| mark(*count, most)).collect();
        self.put(&format!("{:TIME_COLUMNS$}{}", "", self.paint(TIME, &marks)));
        if notes.is_empty() {
            return;
        }
        let mut under = String::new();
        for (at, words) in notes {
            let words = format!("^ {words}");
            let room = STRIP_MARKS.saturating_sub(words.len());
            let column = place(*at).min(room);
            if column < under.len() {
                self.put(&format!("{:TIME_COLUMNS$}{under}", ""));
                under.clear();
            }
            under = format!("{under:column$}{words}  ");
        }
        self.put(&format!("{:TIME_COLUMNS$}{}", "", under.trim_end()));
    }

    /// The last line.
    pub(super) fn verdict(&self, good: bool, text: &str) {
        let colour = if good { GOOD } else { BAD };
        self.put("");
        self.put(&self.paint(colour, text));
    }

    fn paint(&self, colour: &str, text: &str) -> String {
        if self.colours && !text.is_empty() {
            format!("\x1b[{colour}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    #[expect(
        clippy::unused_self,
        reason = "all that is printed goes through the timeline"
    )]
    fn put(&self, line: &str) {
        let mut out = std::io::stdout().lock();
        // Whoever read it may be gone; the verdict is in the exit status as well.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

/// The height of a mark, as far as ASCII has any.
const fn mark(count: usize, most: usize) -> char {
    if count == 0 {
        '.'
    } else if count * 3 <= most {
        '-'
    } else if count * 3 <= most * 2 {
        '+'
    } else {
        '#'
    }
}

/// A time for reading: tenths only where they matter.
pub(super) fn milliseconds(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1000.0;
    if ms < 9.95 {
        format!("{ms:.1} ms")
    } else {
        format!("{ms:.0} ms")
    }
}

/// Breaks a text between words; a longer word stays whole.
fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let full = lines
            .last()
            .is_some_and(|line| !line.is_empty() && line.len() + 1 + word.len() > columns);
        if full {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_between_words() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("a-very-long-word b", 4), ["a-very-long-word", "b"]);
        assert_eq!(wrap("", 4), [""]);
    }

    #[test]
    fn times_have_tenths_only_while_they_are_short() {
        let text = |us| milliseconds(Duration::from_micros(us));
        assert_eq!(text(1_840), "1.8 ms");
        assert_eq!(text(9_960), "10 ms");
        assert_eq!(text(812_400), "812 ms");
    }

    #[test]
    fn marks_grow_with_the_writes() {
        let marks: String = [0, 1, 3, 5, 6, 9]
            .map(|count| mark(count, 9))
            .iter()
            .collect();
        assert_eq!(marks, ".--++#");
    }
}

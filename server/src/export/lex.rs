//! Words of an export list: white space, comments, continued lines, quotes and octal escapes.
//!
//! Knows nothing of exports. Follows what exportfs(8) does: `#` begins a comment only where a word
//! could begin (so `/srv/a#b` is a path), a backslash before a line end acts as a space, `\ooo` is
//! one byte anywhere, any other backslash stands for itself. Each byte of a word remembers where it
//! stood, so that an option in the middle of a continued line is reported at its own place.

/// A place in the text: line and column in bytes, both from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) line: u32,
    pub(super) column: u32,
}

/// One word after quotes and escapes were resolved.
#[derive(Debug, Clone)]
pub(super) struct Word {
    pub(super) bytes: Vec<u8>,
    /// Quotes were used: the author meant this text as it stands.
    pub(super) quoted: bool,
    start: Place,
    places: Vec<Place>,
}

impl Word {
    /// Returns where byte `index` stood; past the end, where the last one did.
    pub(super) fn place(&self, index: usize) -> Place {
        self.places
            .get(index)
            .or(self.places.last())
            .copied()
            .unwrap_or(self.start)
    }
}

/// A quote that nothing closed before its line ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OpenQuote(pub(super) Place);

/// Cuts a text into logical lines of words.
pub(super) struct Lexer<'a> {
    rest: &'a [u8],
    here: Place,
}

impl<'a> Lexer<'a> {
    /// Starts at the first byte of a text.
    pub(super) fn new(text: &'a [u8]) -> Self {
        Self::starting_at(text, Place { line: 1, column: 1 })
    }

    /// Starts at a part of a text that stands at `here` in the whole.
    pub(super) fn starting_at(text: &'a [u8], here: Place) -> Self {
        Self { rest: text, here }
    }

    /// Returns the words of the next line that has any, or nothing at the end of the text.
    pub(super) fn next_line(&mut self) -> Option<Result<Vec<Word>, OpenQuote>> {
        let mut words = Vec::new();
        let mut broken = None;
        loop {
            match self.rest.first() {
                None if words.is_empty() && broken.is_none() => return None,
                None => break,
                Some(b'\n') => {
                    self.bump(1);
                    if !words.is_empty() || broken.is_some() {
                        break;
                    }
                }
                Some(b'#') => {
                    while self.rest.first().is_some_and(|&byte| byte != b'\n') {
                        self.bump(1);
                    }
                }
                Some(byte) if is_blank(*byte) => self.bump(1),
                Some(_) if self.continuation() > 0 => self.bump(self.continuation()),
                Some(_) => match self.word() {
                    Ok(word) => words.push(word),
                    Err(open) => broken = broken.or(Some(open)),
                },
            }
        }
        Some(broken.map_or(Ok(words), Err))
    }

    fn word(&mut self) -> Result<Word, OpenQuote> {
        let start = self.here;
        let mut word = Word {
            bytes: Vec::new(),
            quoted: false,
            start,
            places: Vec::new(),
        };
        let mut quote: Option<Place> = None;
        while let Some(&byte) = self.rest.first() {
            let continuation = self.continuation();
            if byte == b'\n' || (quote.is_none() && (is_blank(byte) || continuation > 0)) {
                break;
            }
            let place = self.here;
            if byte == b'"' {
                self.bump(1);
                quote = if quote.is_some() { None } else { Some(place) };
                word.quoted = true;
                continue;
            }
            let (value, length) = match octal_escape(self.rest) {
                Some(value) => (value, 4),
                _ if continuation > 0 => (b' ', continuation),
                _ => (byte, 1),
            };
            self.bump(length);
            word.bytes.push(value);
            word.places.push(place);
        }
        match quote {
            Some(place) => Err(OpenQuote(place)),
            None => Ok(word),
        }
    }

    /// Returns the length of the backslash and line end that stand here, or 0.
    fn continuation(&self) -> usize {
        match self.rest {
            [b'\\', b'\n', ..] => 2,
            [b'\\', b'\r', b'\n', ..] => 3,
            _ => 0,
        }
    }

    fn bump(&mut self, count: usize) {
        let (passed, rest) = self.rest.split_at(count.min(self.rest.len()));
        for &byte in passed {
            if byte == b'\n' {
                self.here = Place {
                    line: self.here.line + 1,
                    column: 1,
                };
            } else {
                self.here.column += 1;
            }
        }
        self.rest = rest;
    }
}

/// Writes bytes so that the lexer reads them back as one word.
pub(super) fn escape(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\' | b'#') {
            out.push(char::from(byte));
        } else {
            out.push('\\');
            for shift in [6, 3, 0] {
                out.push(char::from(b'0' + ((byte >> shift) & 7)));
            }
        }
    }
    out
}

/// Resolves the `\ooo` escapes of a text; every other backslash stays.
pub(super) fn unescape(mut bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    while let Some((&first, rest)) = bytes.split_first() {
        if let Some(value) = octal_escape(bytes) {
            out.push(value);
            bytes = bytes.get(4..).unwrap_or_default();
        } else {
            out.push(first);
            bytes = rest;
        }
    }
    out
}

/// Returns the byte that an escape of three octal digits stands for.
fn octal_escape(bytes: &[u8]) -> Option<u8> {
    match bytes {
        [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] => {
            Some(((a - b'0') << 6) | ((b - b'0') << 3) | (c - b'0'))
        }
        _ => None,
    }
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | 0x0b | 0x0c)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<Vec<String>> {
        let mut lexer = Lexer::new(text.as_bytes());
        let mut out = Vec::new();
        while let Some(line) = lexer.next_line() {
            let words = line.expect("no open quote");
            out.push(
                words
                    .iter()
                    .map(|w| String::from_utf8_lossy(&w.bytes).into())
                    .collect(),
            );
        }
        out
    }

    #[test]
    fn comments_begin_where_words_begin() {
        assert_eq!(lines("# all\n\n /a#b x # rest\n"), [vec!["/a#b", "x"]]);
    }

    #[test]
    fn continued_lines_are_one_and_keep_their_places() {
        assert_eq!(
            lines("/a \\\n\t x\\\r\ny\nz"),
            [vec!["/a", "x", "y"], vec!["z"]]
        );
        let mut lexer = Lexer::new(b"/a \\\n  xy");
        let words = lexer.next_line().expect("a line").expect("no open quote");
        assert_eq!(words[1].place(1), Place { line: 2, column: 4 });
    }

    #[test]
    fn quotes_and_escapes_make_one_word() {
        assert_eq!(
            lines(r#""/a b"c /d\040e "\134" \x \8"#),
            [["/a bc", "/d e", "\\", "\\x", "\\8"]]
        );
    }

    #[test]
    fn an_open_quote_is_told_and_the_next_line_is_read() {
        let mut lexer = Lexer::new(b"/a \"b\nc");
        let place = Place { line: 1, column: 4 };
        assert_eq!(
            lexer.next_line().expect("a line").err(),
            Some(OpenQuote(place))
        );
        assert_eq!(
            lexer.next_line().expect("a line").expect("words")[0].bytes,
            b"c"
        );
    }

    #[test]
    fn escaped_text_is_read_back() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(unescape(escape(&all).as_bytes()), all);
        let mut lexer = Lexer::new(b"\\000\\377");
        assert_eq!(
            lexer.next_line().expect("a line").expect("words")[0].bytes,
            [0, 255]
        );
    }
}

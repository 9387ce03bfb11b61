//! TOML read with every problem kept: file, line, what is wrong and what it should be; unknown keys name the
//! nearest known one. It knows no key by itself: `config` and `vm_config` do. It never stops at the first problem.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Largest configuration file that is read, in bytes.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// One thing that is wrong in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line, from 1.
    pub line: usize,
    /// What is wrong.
    pub words: String,
    /// What it should be.
    pub wants: String,
}

/// A configuration that cannot be used; every problem of it, in the order of its lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            let Problem { line, words, wants } = problem;
            write!(f, "{}:{line}: {words}; {wants}", self.file.display())?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// Reads a whole file of bounded size as text.
///
/// # Errors
/// The file is missing, unreadable, too large or no UTF-8: one problem at line 1.
pub fn read_text(file: &Path) -> Result<String, ConfigError> {
    let problem = |words: String, wants: &str| ConfigError {
        file: file.to_path_buf(),
        problems: vec![Problem { line: 1, words, wants: wants.into() }],
    };
    let size = std::fs::metadata(file).map(|m| m.len());
    let size = size.map_err(|e| problem(format!("cannot be read: {e}"), "give the path of a readable TOML file"))?;
    if size > FILE_BYTES_MAX {
        return Err(problem(format!("is {size} bytes long"), "at most 1 MiB is read"));
    }
    std::fs::read_to_string(file).map_err(|e| problem(format!("cannot be read: {e}"), "it should be UTF-8 text"))
}

/// Collects the problems of one file while it is read.
pub struct Problems<'t> {
    file: &'t Path,
    text: &'t str,
    list: RefCell<Vec<Problem>>,
}

impl<'t> Problems<'t> {
    /// For the text of `file`.
    #[must_use]
    pub fn new(file: &'t Path, text: &'t str) -> Problems<'t> {
        Problems { file, text, list: RefCell::new(Vec::new()) }
    }

    /// Keeps a problem at the place `span` (byte offsets) of the text.
    pub fn add(&self, span: &Range<usize>, words: impl Into<String>, wants: impl Into<String>) {
        let before = self.text.as_bytes().get(..span.start).unwrap_or(self.text.as_bytes());
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        self.list.borrow_mut().push(Problem { line, words: words.into(), wants: wants.into() });
    }

    /// The parsed root table; none if the text is no TOML (the problems are kept).
    pub fn root(&self) -> Option<Spanned<DeTable<'t>>> {
        let (table, errors) = DeTable::parse_recoverable(self.text);
        let broken = !errors.is_empty();
        for error in errors {
            let at = error.span().unwrap_or(0..0);
            self.add(&at, error.message().replace('\n', ", "), "it should be TOML (https://toml.io)");
        }
        (!broken).then_some(table)
    }

    /// Ends the reading: `value` if there was no problem.
    ///
    /// # Errors
    /// All problems, by line.
    pub fn finish<T>(self, value: Option<T>) -> Result<T, ConfigError> {
        let mut problems = self.list.into_inner();
        problems.sort_by_key(|problem| problem.line);
        match value {
            Some(value) if problems.is_empty() => Ok(value),
            _ => Err(ConfigError { file: self.file.to_path_buf(), problems }),
        }
    }
}

/// One table of the file; remembers which keys were asked for, so that [`Section::close`] can name the others.
pub struct Section<'a, 't> {
    name: String,
    table: &'a DeTable<'t>,
    span: Range<usize>,
    known: BTreeSet<&'static str>,
    problems: &'a Problems<'t>,
}

impl<'a, 't> Section<'a, 't> {
    /// The whole file as a section.
    pub fn root(table: &'a Spanned<DeTable<'t>>, problems: &'a Problems<'t>) -> Section<'a, 't> {
        Section { name: String::new(), table: table.get_ref(), span: 0..0, known: BTreeSet::new(), problems }
    }

    fn path(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_string() } else { format!("{}.{key}", self.name) }
    }

    fn value(&mut self, key: &'static str) -> Option<&'a Spanned<DeValue<'t>>> {
        self.known.insert(key);
        self.table.get(key)
    }

    /// Keeps a problem with the value of `key`, or with the section where the key is absent.
    pub fn problem(&self, key: &str, words: impl fmt::Display, wants: impl Into<String>) {
        let span = self.table.get(key).map_or(self.span.clone(), Spanned::span);
        self.problems.add(&span, format!("{} {words}", self.path(key)), wants);
    }

    fn typed<T>(&mut self, key: &'static str, wants: &str, read: impl FnOnce(&DeValue<'t>) -> Option<T>) -> Option<T> {
        let value = self.value(key)?.get_ref();
        let found = read(value);
        if found.is_none() {
            self.problem(key, format_args!("is {}", shown(value)), format!("it should be {wants}"));
        }
        found
    }

    /// A string, if the key is there.
    pub fn string(&mut self, key: &'static str) -> Option<String> {
        self.typed(key, "a string in quotes", |value| value.as_str().map(str::to_string))
    }

    /// True or false, if the key is there.
    pub fn boolean(&mut self, key: &'static str) -> Option<bool> {
        self.typed(key, "true or false", DeValue::as_bool)
    }

    /// A whole number inside `range`, if the key is there.
    pub fn integer(&mut self, key: &'static str, range: RangeInclusive<u64>) -> Option<u64> {
        let wants = format!("a whole number from {} to {}", range.start(), range.end());
        self.typed(key, &wants, |value| integer_of(value).filter(|number| range.contains(number)))
    }

    /// A list of whole numbers, each inside `range`, if the key is there.
    pub fn integers(&mut self, key: &'static str, range: RangeInclusive<u64>) -> Option<Vec<u64>> {
        let wants = format!("a list of whole numbers from {} to {}", range.start(), range.end());
        self.typed(key, &wants, |value| {
            let list = value.as_array()?;
            list.iter().map(|item| integer_of(item.get_ref()).filter(|number| range.contains(number))).collect()
        })
    }

    /// A size in bytes: a number, or text such as "2G", if the key is there.
    pub fn size(&mut self, key: &'static str) -> Option<u64> {
        self.typed(key, "a size such as \"512M\" or \"2G\"", |value| {
            integer_of(value).or_else(|| value.as_str().and_then(parse_size))
        })
    }

    /// One of a few words, if the key is there: its index in `words`.
    pub fn one_of(&mut self, key: &'static str, words: &[&str]) -> Option<usize> {
        let wants = words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(" or ");
        self.typed(key, &wants, |value| {
            let text = value.as_str()?;
            words.iter().position(|word| *word == text)
        })
    }

    /// A string that parses as `T`, if the key is there.
    pub fn parsed<T: FromStr>(&mut self, key: &'static str, wants: &str) -> Option<T> {
        self.typed(key, wants, |value| value.as_str()?.parse().ok())
    }

    /// A list of strings, if the key is there.
    pub fn strings(&mut self, key: &'static str) -> Option<Vec<String>> {
        self.parsed_list(key, "a string in quotes")
    }

    /// A list of strings that each parse as `T`, if the key is there; each bad one is a problem of its own.
    pub fn parsed_list<T: FromStr>(&mut self, key: &'static str, wants: &str) -> Option<Vec<T>> {
        let value = self.value(key)?;
        let Some(list) = value.get_ref().as_array() else {
            self.problem(key, format_args!("is {}", shown(value.get_ref())), format!("it should be a list, each {wants}"));
            return None;
        };
        let (mut all, mut good) = (Vec::new(), true);
        for item in list.iter() {
            match item.get_ref().as_str().and_then(|text| text.parse().ok()) {
                Some(parsed) => all.push(parsed),
                None => {
                    let words = format!("{} has {}", self.path(key), shown(item.get_ref()));
                    self.problems.add(&item.span(), words, format!("it should be {wants}"));
                    good = false;
                }
            }
        }
        good.then_some(all)
    }

    /// The table under `key`; an empty one if it is absent.
    pub fn section(&mut self, key: &'static str) -> Option<Section<'a, 't>> {
        let value = self.value(key)?;
        let name = self.path(key);
        let Some(table) = value.get_ref().as_table() else {
            self.problem(key, format_args!("is {}", shown(value.get_ref())), format!("it should be a table: [{name}]"));
            return None;
        };
        Some(Section { name, table, span: value.span(), known: BTreeSet::new(), problems: self.problems })
    }

    /// Whether there is anything under `key`.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.table.get(key).is_some()
    }

    /// Whether there is a table under `key`: some settings are a word or a table.
    #[must_use]
    pub fn is_table(&self, key: &str) -> bool {
        self.table.get(key).is_some_and(|value| value.get_ref().as_table().is_some())
    }

    /// The tables of the array under `key`.
    pub fn sections(&mut self, key: &'static str) -> Vec<Section<'a, 't>> {
        let Some(value) = self.value(key) else { return Vec::new() };
        let name = self.path(key);
        let tables = value.get_ref().as_array().map(|list| {
            list.iter().filter_map(|item| item.get_ref().as_table().map(|table| (table, item.span()))).collect::<Vec<_>>()
        });
        let Some(tables) = tables else {
            self.problem(key, format_args!("is {}", shown(value.get_ref())), format!("it should be tables: [[{name}]]"));
            return Vec::new();
        };
        let section =
            |(table, span)| Section { name: name.clone(), table, span, known: BTreeSet::new(), problems: self.problems };
        tables.into_iter().map(section).collect()
    }

    /// Names every key that nobody asked for.
    pub fn close(self) {
        for (key, _) in self.table {
            let text = key.get_ref().as_ref();
            if self.known.contains(text) {
                continue;
            }
            let nearest = self.known.iter().map(|known| (distance(text, known), *known)).min();
            let all = self.known.iter().copied().collect::<Vec<_>>().join(", ");
            let wants = match nearest {
                Some((steps, known)) if steps <= 3 && steps < known.len() => format!("did you mean \"{known}\"?"),
                _ => format!("known here: {all}"),
            };
            self.problems.add(&key.span(), format!("unknown key \"{}\"", self.path(text)), wants);
        }
    }
}

fn integer_of(value: &DeValue<'_>) -> Option<u64> {
    let integer = value.as_integer()?;
    u64::from_str_radix(integer.as_str(), integer.radix()).ok()
}

fn shown(value: &DeValue<'_>) -> String {
    let text = match value {
        DeValue::String(text) => format!("\"{text}\""),
        DeValue::Integer(number) => number.as_str().to_string(),
        DeValue::Float(number) => number.as_str().to_string(),
        DeValue::Boolean(truth) => truth.to_string(),
        other => format!("a {}", other.type_str()),
    };
    text.chars().take(80).collect()
}

/// Bytes from text such as `4096`, `512M`, `2G`, `50MB/s`: K, M, G, T are powers of 1024, with or without `iB` or
/// `B`, with or without `/s`.
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let text = text.strip_suffix("/s").unwrap_or(text);
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits)?;
    let number: u64 = number.parse().ok()?;
    let power = match unit.trim().trim_end_matches('B').trim_end_matches('i') {
        "" => 0,
        "K" | "k" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    number.checked_mul(1 << power)
}

/// Edit distance of two short words.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().take(64).enumerate() {
        let mut next = vec![i + 1];
        for (j, to) in b.iter().enumerate() {
            let at = |list: &[usize], index: usize| list.get(index).copied().unwrap_or(usize::MAX / 2);
            let change = at(&row, j) + usize::from(from != *to);
            next.push(change.min(at(&row, j + 1) + 1).min(at(&next, j) + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or(usize::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [("4096", 4096), ("512M", 512 << 20), ("2GiB", 2 << 30), ("50MB/s", 50 << 20), ("1T", 1 << 40)] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for text in ["", "G", "-1", "2X", "99999999999999T", "1.5G", "é"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn distance_counts_edits() {
        assert_eq!((distance("lanes", "lanes"), distance("lane", "lanes"), distance("", "abc")), (0, 1, 3));
    }
}

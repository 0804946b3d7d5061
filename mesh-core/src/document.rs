//! Reading a TOML document that a person wrote: every fault is collected with its path, none stops the reading.
//!
//! A [`Section`] is asked for its keys one by one; what nobody asked for is an unknown key. Must not know what any
//! key means.
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "a value of any other kind, also of a future one, is the same fault"
)]

use std::{collections::BTreeSet, fmt::Display, path::PathBuf, str::FromStr, time::Duration};

use toml::{
    Spanned,
    de::{DeTable as Table, DeValue as Value},
};

use crate::config::Fault;

/// Reads a whole document. `read` asks for what it knows.
///
/// # Errors
/// All faults together; a text that is not TOML has one, with line and column.
pub(crate) fn read<T>(text: &str, read: impl FnOnce(&mut Section<'_>) -> Option<T>) -> Result<T, Vec<Fault>> {
    // Borrows its words from the text: a file of services can be long.
    let table = Table::parse(text).map_err(|error| vec![syntax(text, &error)])?.into_inner();
    let mut root =
        Section { path: String::new(), table, asked: BTreeSet::new(), faults: Vec::new(), spent: Vec::new() };
    let value = read(&mut root);
    let (faults, _spent) = root.finish();
    match value {
        Some(value) if faults.is_empty() => Ok(value),
        Some(_) | None => Err(faults),
    }
}

fn syntax(text: &str, error: &toml::de::Error) -> Fault {
    let before = &text.as_bytes()[..error.span().map_or(0, |span| span.start.min(text.len()))];
    let line = before.iter().filter(|b| **b == b'\n').count() + 1;
    let column = before.iter().rev().take_while(|b| **b != b'\n').count() + 1;
    let problem = error.message().lines().collect::<Vec<_>>().join(", ");
    Fault { path: format!("line {line}, column {column}"), problem, remedy: "correct the TOML syntax".into() }
}

/// One table of the document.
pub(crate) struct Section<'a> {
    path: String,
    table: Table<'a>,
    asked: BTreeSet<&'static str>,
    faults: Vec<Fault>,
    /// What has been read, kept until all is. Of a long document the tree is many times as large as what is made of it:
    /// were the one freed piece by piece, the other would be scattered over its room, and none of that could be given
    /// back to the system.
    spent: Vec<Value<'a>>,
}

impl<'a> Section<'a> {
    /// Adds a fault about `key` of this section.
    pub(crate) fn fault(&mut self, key: &str, problem: impl Display, remedy: impl Display) {
        let path = match (self.path.as_str(), key) {
            ("", key) => key.to_owned(),
            (path, "") => path.to_owned(),
            (path, key) => format!("{path}.{key}"),
        };
        self.faults.push(Fault { path, problem: problem.to_string(), remedy: remedy.to_string() });
    }

    /// Whether the document has this key. To be asked before the key is read.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// Adds a fault when the key is missing. To be called before the key is read.
    pub(crate) fn require(&mut self, key: &str, remedy: &str) {
        if !self.has(key) {
            self.fault(key, "is missing", remedy);
        }
    }

    /// How many items the list `key` has.
    pub(crate) fn count(&self, key: &str) -> usize {
        self.table.get(key).and_then(|value| value.get_ref().as_array()).map_or(0, |items| items.len())
    }

    pub(crate) fn text(&mut self, key: &'static str) -> Option<String> {
        match self.take(key)? {
            Value::String(text) => Some(text.into_owned()),
            other => self.wrong_type(key, &other, "a string in quotes"),
        }
    }

    /// A string with a meaning of its own, such as an address.
    pub(crate) fn parsed<T: FromStr<Err: Display>>(&mut self, key: &'static str, example: &str) -> Option<T> {
        let text = self.text(key)?;
        match text.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                let (given, error) = (format!("`{}`", text.escape_debug()), error.to_string());
                let problem = if error.contains(&given) { error } else { format!("{given}: {error}") };
                self.fault(key, problem, format!("write it like `{example}`"));
                None
            }
        }
    }

    /// An absolute path.
    pub(crate) fn path(&mut self, key: &'static str) -> Option<PathBuf> {
        let path = PathBuf::from(self.text(key)?);
        if !path.is_absolute() {
            self.fault(key, format!("`{}` is not an absolute path", path.display()), "start it with `/`");
            return None;
        }
        Some(path)
    }

    pub(crate) fn boolean(&mut self, key: &'static str) -> Option<bool> {
        match self.take(key)? {
            Value::Boolean(value) => Some(value),
            other => self.wrong_type(key, &other, "true or false"),
        }
    }

    /// A whole number between `min` and `max`.
    pub(crate) fn number(&mut self, key: &'static str, min: u32, max: u32) -> Option<u32> {
        match self.take(key)? {
            Value::Integer(number) => match u32::from_str_radix(number.as_str(), number.radix()) {
                Ok(number) if (min..=max).contains(&number) => Some(number),
                Ok(_) | Err(_) => {
                    self.fault(key, format!("{number} is out of range"), format!("use {min} to {max}"));
                    None
                }
            },
            other => self.wrong_type(key, &other, "a whole number"),
        }
    }

    pub(crate) fn port(&mut self, key: &'static str) -> Option<u16> {
        self.number(key, 1, 65_535).and_then(|port| u16::try_from(port).ok())
    }

    /// A duration such as `500ms`, `5s`, `1m30s` or `24h`, between `min` and `max`.
    pub(crate) fn duration(&mut self, key: &'static str, min: Duration, max: Duration) -> Option<Duration> {
        let text = match self.take(key)? {
            Value::String(text) => text,
            other => return self.wrong_type(key, &other, "a duration in quotes, such as \"5s\""),
        };
        match duration(&text) {
            Some(value) if (min..=max).contains(&value) => Some(value),
            Some(_) => {
                self.fault(key, format!("{text} is out of range"), format!("use {min:?} to {max:?}"));
                None
            }
            None => {
                let problem = format!("`{}` is not a duration", text.escape_debug());
                self.fault(key, problem, "write a whole number and one of ms, s, m, h, such as `500ms` or `1m30s`");
                None
            }
        }
    }

    /// One of a few words.
    pub(crate) fn choice<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)]) -> Option<T> {
        let text = self.text(key)?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let all: Vec<_> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
            self.fault(key, format!("`{}` is not known", text.escape_debug()), format!("use {}", all.join(" or ")));
        }
        found
    }

    /// A list of strings, each of which `check` turns into a value or a problem and its remedy. `None` when one failed.
    pub(crate) fn list<T>(
        &mut self,
        key: &'static str,
        check: impl Fn(&str) -> Result<T, (String, String)>,
    ) -> Option<Vec<T>> {
        let items = match self.take(key)? {
            Value::Array(items) => items,
            other => return self.wrong_type(key, &other, "a list of strings, such as [\"a\", \"b\"]"),
        };
        let before = self.faults.len();
        let mut values = Vec::with_capacity(items.len());
        for (n, item) in items.iter().enumerate() {
            let place = format!("{key}[{n}]");
            match item.get_ref() {
                Value::String(text) => match check(text) {
                    Ok(value) => values.push(value),
                    Err((problem, remedy)) => self.fault(&place, problem, remedy),
                },
                other => {
                    let problem = format!("is {} and not a string", kind(other));
                    self.fault(&place, problem, "put it in quotes");
                }
            }
        }
        (self.faults.len() == before).then_some(values)
    }

    /// A table below this one. An absent one is read as an empty one.
    pub(crate) fn section<T>(&mut self, key: &'static str, read: impl FnOnce(&mut Self) -> T) -> T {
        let table = match self.take(key) {
            Some(Value::Table(table)) => table,
            Some(other) => {
                let _nothing: Option<()> = self.wrong_type(key, &other, &format!("a table: write it as `[{key}]`"));
                Table::new()
            }
            None => Table::new(),
        };
        self.child(key.to_owned(), table, read)
    }

    /// A list of tables. Each is called by its `name`, where it has one, otherwise by its position.
    pub(crate) fn sections<T>(&mut self, key: &'static str, mut read: impl FnMut(&mut Self) -> Option<T>) -> Vec<T> {
        let mut items = match self.take(key) {
            Some(Value::Array(items)) => items,
            Some(other) => {
                return self
                    .wrong_type(key, &other, &format!("a list of tables: write each as `[[{key}]]`"))
                    .unwrap_or_default();
            }
            None => return Vec::new(),
        };
        let mut values = Vec::with_capacity(items.len());
        for (n, item) in items.iter_mut().enumerate() {
            match std::mem::replace(item.get_mut(), Value::Boolean(false)) {
                Value::Table(table) => {
                    let place = match table.get("name").and_then(|name| name.get_ref().as_str()) {
                        Some(name) => format!("{key}[{}]", name.escape_debug()),
                        None => format!("{key}[{n}]"),
                    };
                    values.extend(self.child(place, table, &mut read));
                }
                other => {
                    let problem = format!("is {} and not a table", kind(&other));
                    self.fault(&format!("{key}[{n}]"), problem, format!("write each as `[[{key}]]`"));
                }
            }
        }
        self.spent.push(Value::Array(items));
        values
    }

    fn child<T>(&mut self, key: String, table: Table<'a>, read: impl FnOnce(&mut Self) -> T) -> T {
        let path = if self.path.is_empty() { key } else { format!("{}.{key}", self.path) };
        let spent = std::mem::take(&mut self.spent);
        let mut child = Self { path, table, asked: BTreeSet::new(), faults: Vec::new(), spent };
        let value = read(&mut child);
        let (faults, spent) = child.finish();
        self.faults.extend(faults);
        self.spent = spent;
        value
    }

    fn take(&mut self, key: &'static str) -> Option<Value<'a>> {
        self.asked.insert(key);
        self.table.remove(key).map(Spanned::into_inner)
    }

    fn wrong_type<T>(&mut self, key: &str, found: &Value<'_>, wanted: &str) -> Option<T> {
        self.fault(key, format!("is {}", kind(found)), format!("write {wanted}"));
        None
    }

    /// Whatever is left in the table was not asked for.
    fn finish(mut self) -> (Vec<Fault>, Vec<Value<'a>>) {
        let table = std::mem::take(&mut self.table);
        for key in table.keys() {
            let key = key.get_ref();
            let remedy = match nearest(key, &self.asked) {
                Some(known) => format!("did you mean `{known}`?"),
                None => {
                    let all: Vec<_> = self.asked.iter().copied().collect();
                    format!("remove it; known here: {}", all.join(", "))
                }
            };
            self.fault(&key.escape_debug().to_string(), "is not known", remedy);
        }
        self.spent.push(Value::Table(table));
        (self.faults, self.spent)
    }
}

fn kind(value: &Value<'_>) -> &'static str {
    match value {
        Value::String(_) => "a string",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a fraction",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}

/// `500ms`, `5s`, `1m30s`, `24h`; each number is whole, units descend.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("ms", 1), ("m", 60_000), ("s", 1000)];
    let (mut rest, mut total, mut last) = (text, 0_u64, u64::MAX);
    while !rest.is_empty() {
        let (digits, tail) = rest.split_at(rest.bytes().take_while(u8::is_ascii_digit).count());
        let (unit, factor) = *UNITS.iter().find(|(unit, _)| tail.starts_with(unit))?;
        if factor >= last {
            return None;
        }
        total = total.checked_add(digits.parse::<u64>().ok()?.checked_mul(factor)?)?;
        (rest, last) = (&tail[unit.len()..], factor);
    }
    (!text.is_empty()).then_some(Duration::from_millis(total))
}

/// The known key that was probably meant: a spelling at most two steps away, or another common word for it.
fn nearest(key: &str, known: &BTreeSet<&'static str>) -> Option<&'static str> {
    const OTHER_WORDS: &[(&str, &str)] = &[
        ("enroll", "enrol"),
        ("enrollment", "enrol"),
        ("access_log", "access"),
        ("listen", "tunnel_listen"),
        ("inbound_listen", "tunnel_listen"),
        ("metrics_address", "metrics"),
        ("domains", "suffixes"),
        ("domain", "trust_domain"),
        ("ca", "ca_bundle"),
        ("join_token", "join_token_file"),
        ("token", "token_file"),
        ("ttl", "leaf_ttl"),
        ("path", "file"),
        ("addr", "address"),
        ("container_port", "target"),
        ("target_port", "target"),
        ("action", "effect"),
        ("sources", "from"),
        ("services", "to"),
        ("endpoints", "endpoint"),
        ("services", "service"),
        ("rules", "rule"),
        ("family", "families"),
    ];
    let lower = key.to_ascii_lowercase().replace('-', "_");
    let word = OTHER_WORDS.iter().find(|(other, own)| *other == lower && known.contains(own)).map(|(_, own)| *own);
    let close = || known.iter().map(|own| (distance(&lower, own), *own)).min().filter(|(d, _)| *d <= 2);
    word.or_else(|| close().filter(|(d, own)| *d < own.len().min(lower.len())).map(|(_, own)| own))
}

/// Levenshtein distance, of keys cut to 40 octets.
fn distance(a: &str, b: &str) -> usize {
    let (a, b) = (&a.as_bytes()[..a.len().min(40)], &b.as_bytes()[..b.len().min(40)]);
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, millis) in
            [("500ms", 500), ("5s", 5000), ("24h", 86_400_000), ("1m30s", 90_000), ("1h1ms", 3_600_001), ("0s", 0)]
        {
            assert_eq!(duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in
            ["", "5", "s", "5 s", "-5s", "1.5s", "5s1h", "5s5s", "5d", "99999999999999999999h", "9999999999999999h"]
        {
            assert_eq!(duration(text), None, "{text}");
        }
    }

    #[test]
    fn distances() {
        for (a, b, expected) in [("", "", 0), ("a", "", 1), ("sufixes", "suffixes", 1), ("kitten", "sitting", 3)] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
            assert_eq!(distance(b, a), expected, "{b} {a}");
        }
    }

    #[test]
    fn all_faults_are_collected() {
        let text = "a = 1\nzeros = true\n[inner]\nlist = [\"x\", 3]\nextra = 2\n[[many]]\nname = 5\n";
        let faults = read(text, |root| {
            root.text("a");
            root.boolean("zeroes");
            root.section("inner", |inner| inner.list("list", |item| Ok(item.to_owned())));
            root.sections("many", |one| one.text("name"));
            Some(())
        })
        .expect_err("faulty");
        let shown: Vec<_> = faults.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "a: is a whole number; write a string in quotes",
                "inner.list[1]: is a whole number and not a string; put it in quotes",
                "inner.extra: is not known; remove it; known here: list",
                "many[0].name: is a whole number; write a string in quotes",
                "zeros: is not known; did you mean `zeroes`?",
            ]
        );
    }
}

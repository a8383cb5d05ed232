//! Where in the configuration file something is said, so that a mistake that is found after reading
//! is told with its line.
//!
//! Owns the text. What is looked for is named as errors name it, `service.names`, and by the value
//! that is wrong; what can't be found has no line, and the error is told without one.

use std::path::PathBuf;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::ConfigError;

/// The text of a configuration file; empty if there is none.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// The file.
    pub(super) path: PathBuf,
    /// What it says.
    pub(super) text: String,
}

impl Places {
    /// Adds the line of what an error is about, if the file says it.
    pub(super) fn placed(&self, error: ConfigError) -> ConfigError {
        let ConfigError::Value {
            name,
            value,
            within,
            ..
        } = &error
        else {
            return error;
        };
        let Some(line) = self.line(name, value, *within) else {
            return error;
        };
        ConfigError::Placed {
            path: self.path.clone(),
            line,
            error: Box::new(error),
        }
    }

    /// The line, from 1, on which this key has this value. `within`: of a table, the key that is
    /// meant.
    fn line(&self, name: &str, value: &str, within: Option<&str>) -> Option<usize> {
        if self.text.is_empty() {
            return None;
        }
        let root = DeTable::parse(&self.text).ok()?;
        let keys: Vec<&str> = name.split('.').collect();
        let place = find(root.get_ref(), &keys, value, within);
        // A key that is missing outside of all tables belongs before the first one.
        place.map_or(Some(1), |start| Some(line_of(&self.text, start)))
    }
}

/// The line of a byte, from 1.
pub(super) fn line_of(text: &str, start: usize) -> usize {
    text.get(..start).unwrap_or_default().matches('\n').count() + 1
}

/// Where the value begins that is looked for.
fn find(table: &DeTable<'_>, keys: &[&str], value: &str, within: Option<&str>) -> Option<usize> {
    let (first, rest) = keys.split_first()?;
    let (key, found) = entry(table, first)?;
    let tables = tables(found);
    if tables.is_empty() {
        return rest.is_empty().then(|| scalar(found, value).unwrap_or(key));
    }
    if !rest.is_empty() {
        // The last one, since of two that are alike that is the one too many.
        let mut inside = tables.iter().rev();
        return inside.find_map(|table| {
            let place = find(table.get_ref(), rest, value, within)?;
            let is_it = match rest {
                [key] => entry(table.get_ref(), key)
                    .is_some_and(|(_, found)| scalar(found, value).is_some()),
                _ => true,
            };
            is_it.then_some(place)
        });
    }
    let is_named = |table: &&Spanned<DeTable<'_>>| {
        entry(table.get_ref(), "name").is_some_and(|(_, name)| scalar(name, value).is_some())
    };
    let table = tables.iter().rev().find(is_named).or(tables.first())?;
    let inside = within.and_then(|key| entry(table.get_ref(), key));
    Some(inside.map_or(table.span().start, |(key, _)| key))
}

/// A key's place and its value.
fn entry<'t, 'i>(table: &'t DeTable<'i>, key: &str) -> Option<(usize, &'t Spanned<DeValue<'i>>)> {
    let mut entries = table.iter();
    let found = entries.find(|(one, _)| one.get_ref() == key);
    found.map(|(key, value)| (key.span().start, value))
}

/// The tables that a value is, or is a list of.
fn tables<'i>(value: &Spanned<DeValue<'i>>) -> Vec<Spanned<DeTable<'i>>> {
    let table = |value: &Spanned<DeValue<'i>>| match value.get_ref() {
        DeValue::Table(table) => Some(Spanned::new(value.span(), table.clone())),
        _ => None,
    };
    match value.get_ref() {
        DeValue::Array(values) => values.iter().filter_map(table).collect(),
        _ => table(value).into_iter().collect(),
    }
}

/// Where a value, or an element of it, is written that is this one.
fn scalar(found: &Spanned<DeValue<'_>>, value: &str) -> Option<usize> {
    let is_it = match found.get_ref() {
        DeValue::String(text) => text.as_ref() == value,
        DeValue::Integer(number) => number.as_str() == value,
        DeValue::Array(values) => return values.iter().find_map(|one| scalar(one, value)),
        _ => false,
    };
    is_it.then(|| found.span().start)
}

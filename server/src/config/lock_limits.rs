//! The table `[lock_limits]` of the configuration file: a line for each bound of the lock table
//! that is not to have its default.

use std::fmt;

use havenfs_nlm::limits::{Limit, Limits};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, Visitor};

/// The bounds as the file says them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LockLimits(pub Limits);

impl<'de> Deserialize<'de> for LockLimits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Lines)
    }
}

struct Lines;

impl<'de> Visitor<'de> for Lines {
    type Value = LockLimits;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of limits and their values")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LockLimits, A::Error> {
        let mut limits = Limits::default();
        while let Some(Name(limit)) = map.next_key()? {
            let value = map.next_value_seed(Value(limit))?;
            limits.set(limit, value);
        }
        Ok(LockLimits(limits))
    }
}

/// The name of a limit. Judged where it is read, so that an error has its line.
struct Name(Limit);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let mut all = Limit::ALL.into_iter();
        let limit = all.find(|limit| limit.name() == name);
        limit
            .map(Self)
            .ok_or_else(|| D::Error::unknown_field(&name, &NAMES))
    }
}

/// The value of a limit, judged likewise.
struct Value(Limit);

impl<'de> DeserializeSeed<'de> for Value {
    type Value = u32;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<u32, D::Error> {
        let value = u32::deserialize(deserializer)?;
        let (name, value_max) = (self.0.name(), self.0.value_max());
        if value == 0 || value > value_max {
            let problem = format_args!("{name} must be from 1 to {value_max}");
            return Err(D::Error::custom(problem));
        }
        Ok(value)
    }
}

const NAMES: [&str; Limit::ALL.len()] = {
    let mut names = [""; Limit::ALL.len()];
    let mut at = 0;
    while at < names.len() {
        names[at] = Limit::ALL[at].name();
        at += 1;
    }
    names
};

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Limits, String> {
        let limits: Result<LockLimits, _> = toml::from_str(text);
        limits
            .map(|limits| limits.0)
            .map_err(|error| error.message().to_owned())
    }

    #[test]
    fn what_is_not_said_has_its_default() {
        let mut wanted = Limits::default();
        wanted.set(Limit::Hosts, 50);
        wanted.set(Limit::NameBytes, 1_000_000);
        assert_eq!(parse("hosts = 50\nname_bytes = 1000000\n"), Ok(wanted));
        assert_eq!(parse(""), Ok(Limits::default()));
    }

    #[test]
    fn mistakes_are_refused() {
        for (text, problem) in [
            ("host = 50", "unknown field `host`, expected one of `hosts`"),
            ("hosts = 0", "hosts must be from 1 to 1000000"),
            ("hosts = 1000001", "hosts must be from 1 to 1000000"),
            ("hosts = -1", "invalid value"),
            ("hosts = 'all'", "invalid type"),
        ] {
            let error = parse(text).err();
            let told = error.is_some_and(|error| error.contains(problem));
            assert!(told, "{text}: {problem}");
        }
    }
}

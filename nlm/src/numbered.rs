//! Keys that are long and used often get a number: files, hosts and lock owners.

use std::sync::Arc;

use imbl::{OrdMap, OrdSet, Vector};

/// Keys with their numbers, and a value for each.
///
/// A new key gets the lowest number that is free, so that numbers stay dense, and an entry costs
/// hardly more than what it holds. Which number that is follows from the entries alone: it is the
/// same after a snapshot was read. Numbers come again, so nothing may keep one whose entry is gone.
#[derive(Debug, Clone)]
pub(crate) struct Numbered<K: Ord, V> {
    numbers: OrdMap<Arc<K>, u32>,
    /// At the place of each number its key and value, or nothing where the number is free.
    entries: Vector<Option<(Arc<K>, V)>>,
    /// The numbers that are free there.
    free: OrdSet<u32>,
}

impl<K: Ord, V> Default for Numbered<K, V> {
    fn default() -> Self {
        Self {
            numbers: OrdMap::default(),
            entries: Vector::default(),
            free: OrdSet::default(),
        }
    }
}

impl<K: Ord + Clone, V: Clone + PartialEq> PartialEq for Numbered<K, V> {
    /// Free numbers above all others don't count.
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl<K: Ord + Clone, V: Clone> Numbered<K, V> {
    /// The number of a key.
    pub(crate) fn number(&self, key: &K) -> Option<u32> {
        self.numbers.get(key).copied()
    }

    /// The key with a number.
    pub(crate) fn key(&self, number: u32) -> Option<&K> {
        let entry = self.entries.get(number as usize)?.as_ref();
        entry.map(|(key, _)| &**key)
    }

    /// The value of a number.
    pub(crate) fn value(&self, number: u32) -> Option<&V> {
        let entry = self.entries.get(number as usize)?.as_ref();
        entry.map(|(_, value)| value)
    }

    /// The value of a number, to be changed.
    pub(crate) fn value_mut(&mut self, number: u32) -> Option<&mut V> {
        let entry = self.entries.get_mut(number as usize)?.as_mut();
        entry.map(|(_, value)| value)
    }

    /// The number of a key, which is given one with the value of `new` if it has none.
    pub(crate) fn enter(&mut self, key: &K, new: impl FnOnce() -> V) -> u32 {
        if let Some(number) = self.number(key) {
            return number;
        }
        let lowest = self.free.get_min().copied();
        // What is numbered is bounded far below the largest number.
        let number = lowest.unwrap_or(self.entries.len() as u32);
        let key = Arc::new(key.clone());
        self.numbers.insert(Arc::clone(&key), number);
        self.put(number, key, new());
        number
    }

    /// Forgets a number and its key.
    pub(crate) fn remove(&mut self, number: u32) {
        let entry = self.entries.get_mut(number as usize);
        if let Some((key, _)) = entry.and_then(Option::take) {
            self.numbers.remove(&key);
            self.free.insert(number);
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.numbers.len()
    }

    /// All numbers with keys and values, by number.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &K, &V)> {
        (0..).zip(&self.entries).filter_map(|(number, entry)| {
            let (key, value) = entry.as_ref()?;
            Some((number, &**key, value))
        })
    }

    /// All numbers whose keys are in a range, by key.
    pub(crate) fn numbers_in(
        &self,
        range: impl std::ops::RangeBounds<K>,
    ) -> impl Iterator<Item = u32> {
        self.numbers.range(range).map(|(_, number)| *number)
    }

    /// Enters a key with its number, from a snapshot. It is found by its key only after
    /// [`Numbered::index`]. False if the number is taken.
    pub(crate) fn restore(&mut self, number: u32, key: K, value: V) -> bool {
        let is_free = self.key(number).is_none();
        if is_free {
            self.put(number, Arc::new(key), value);
        }
        is_free
    }

    /// Makes all keys that were restored known, in their order: a million of them in the order of
    /// their numbers take twice the time. False if a key has two numbers.
    pub(crate) fn index(&mut self) -> bool {
        let entries = (0..).zip(&self.entries);
        let keys =
            entries.filter_map(|(number, entry)| Some((Arc::clone(&entry.as_ref()?.0), number)));
        let mut keys: Vec<(Arc<K>, u32)> = keys.collect();
        keys.sort_unstable();
        let is_new = |pair: &[(Arc<K>, u32)]| !matches!(pair, [one, other] if one.0 == other.0);
        let unique = keys.windows(2).all(is_new);
        self.numbers = keys.into_iter().collect();
        unique
    }

    fn put(&mut self, number: u32, key: Arc<K>, value: V) {
        let (place, entry) = (number as usize, Some((key, value)));
        while self.entries.len() < place {
            self.free.insert(self.entries.len() as u32);
            self.entries.push_back(None);
        }
        if self.entries.len() == place {
            self.entries.push_back(entry);
        } else {
            self.free.remove(&number);
            self.entries.set(place, entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_number_is_given() {
        let mut numbered = Numbered::default();
        for (key, number) in [('a', 0), ('b', 1), ('c', 2), ('b', 1)] {
            assert_eq!(numbered.enter(&key, || ()), number);
        }
        for key in ['c', 'a'] {
            let number = numbered.number(&key);
            numbered.remove(number.unwrap_or(u32::MAX));
        }
        let mut read = Numbered::default();
        for (number, key, ()) in numbered.iter() {
            assert!(read.restore(number, *key, ()));
        }
        assert!(read.index());
        assert!(read == numbered);
        for numbered in [&mut numbered, &mut read] {
            assert_eq!(numbered.len(), 1);
            for (key, number) in [('d', 0), ('e', 2), ('f', 3)] {
                assert_eq!(numbered.enter(&key, || ()), number);
                assert_eq!(numbered.key(number), Some(&key));
            }
        }
        assert!(!read.restore(0, 'x', ()), "it is taken");
        assert!(read.restore(7, 'd', ()));
        assert!(!read.index(), "it has two numbers");
    }
}

//! An index of the ranges of one file: does anything of another owner overlap this range?
//!
//! An AVL tree ordered by first byte, each node of which knows how far the ranges below it reach,
//! of all ranges and of the exclusive ones (an interval tree: Cormen et al., Introduction to
//! Algorithms, "Augmenting data structures"), and how far those reach that are not of the owner
//! that reaches farthest. So the question takes logarithmic time however many shared ranges lie on
//! top of each other, and however many the asker has itself.
//!
//! Nodes are shared between clones and copied when they change, so that cloning is free. The index
//! holds nothing that [`RangeSet`](crate::range_set::RangeSet) does not hold, which makes it when
//! a file gets crowded and drops it afterwards; answers never depend on whether it is there.

use std::cmp::Ordering;
use std::num::NonZeroU64;
use std::sync::Arc;

use crate::keys::OwnerNo;
use crate::range::ByteRange;

/// A range of an owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    /// The bytes.
    pub(crate) range: ByteRange,
    /// Whose they are.
    pub(crate) owner: OwnerNo,
    /// Whether nobody else may have any of them.
    pub(crate) exclusive: bool,
}

impl Span {
    /// Unique, since the ranges of one owner don't overlap.
    const fn key(&self) -> (u64, OwnerNo) {
        (self.range.start(), self.owner)
    }
}

/// The ranges of one file.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spans {
    root: Link,
}

type Link = Option<Arc<Node>>;

#[derive(Debug, Clone)]
struct Node {
    span: Span,
    height: u8,
    /// How far the ranges of this tree reach.
    reach: Reach,
    /// The same of exclusive ranges.
    exclusive_reach: Reach,
    left: Link,
    right: Link,
}

/// How far some ranges reach: where those of one owner end that end last, and where all others do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Reach {
    first: Option<(End, OwnerNo)>,
    other: Option<End>,
}

/// The byte behind a range: never 0, so that it takes no more room if there may be none. Ranges
/// end at `OFFSET_MAX` at the latest, far below the largest number.
type End = NonZeroU64;

impl Reach {
    const fn of(span: &Span) -> Self {
        let end = End::MIN.saturating_add(span.range.last());
        Self {
            first: Some((end, span.owner)),
            other: None,
        }
    }

    /// The reach of both.
    fn join(self, with: Self) -> Self {
        let (far, near) = if self.first >= with.first {
            (self, with)
        } else {
            (with, self)
        };
        let owner = |reach: Self| reach.first.map(|(_, owner)| owner);
        let next = if owner(near) == owner(far) {
            near.other
        } else {
            near.first.map(|(end, _)| end)
        };
        Self {
            first: far.first,
            other: far.other.max(next),
        }
    }

    /// Where the ranges of all but `owner` end.
    fn without(self, owner: Option<OwnerNo>) -> Option<End> {
        match self.first {
            Some((end, of)) if Some(of) != owner => Some(end),
            _ => self.other,
        }
    }
}

impl Spans {
    /// Enters a range, in place of one with the same owner and first byte.
    pub(crate) fn insert(&mut self, span: Span) {
        insert(&mut self.root, span);
    }

    /// Removes the range of `owner` that begins at `start`.
    pub(crate) fn remove(&mut self, start: u64, owner: OwnerNo) {
        remove(&mut self.root, (start, owner));
    }

    /// The first range, by first byte and then owner, that overlaps `range`, is not `owner`'s and
    /// conflicts: any if `exclusive`, else exclusive ones.
    pub(crate) fn first_conflict(
        &self,
        range: ByteRange,
        owner: Option<OwnerNo>,
        exclusive: bool,
    ) -> Option<Span> {
        first_conflict(&self.root, range, owner, exclusive)
    }
}

impl Node {
    fn new(span: Span) -> Arc<Self> {
        Arc::new(Self {
            span,
            height: 1,
            reach: Self::own_reach(&span, false),
            exclusive_reach: Self::own_reach(&span, true),
            left: None,
            right: None,
        })
    }

    /// How far a range reaches, among the exclusive ones or among all.
    fn own_reach(span: &Span, exclusive: bool) -> Reach {
        if span.exclusive || !exclusive {
            Reach::of(span)
        } else {
            Reach::default()
        }
    }

    /// Works out what depends on the children.
    fn update(&mut self) {
        self.height = 1 + height(&self.left).max(height(&self.right));
        self.reach = Self::own_reach(&self.span, false);
        self.exclusive_reach = Self::own_reach(&self.span, true);
        for child in [&self.left, &self.right].into_iter().flatten() {
            self.reach = self.reach.join(child.reach);
            self.exclusive_reach = self.exclusive_reach.join(child.exclusive_reach);
        }
    }
}

fn height(link: &Link) -> u8 {
    link.as_ref().map_or(0, |node| node.height)
}

fn first_conflict(
    link: &Link,
    range: ByteRange,
    owner: Option<OwnerNo>,
    exclusive: bool,
) -> Option<Span> {
    let node = link.as_deref()?;
    let reach = if exclusive {
        node.reach
    } else {
        node.exclusive_reach
    };
    let reach = reach.without(owner);
    if reach.is_none_or(|end| end.get() <= range.start()) {
        return None;
    }
    let before = first_conflict(&node.left, range, owner, exclusive);
    if before.is_some() || node.span.range.start() > range.last() {
        return before;
    }
    let span = node.span;
    let conflicts =
        span.range.overlaps(range) && Some(span.owner) != owner && (exclusive || span.exclusive);
    if conflicts {
        Some(span)
    } else {
        first_conflict(&node.right, range, owner, exclusive)
    }
}

fn insert(link: &mut Link, span: Span) {
    let Some(node) = link else {
        *link = Some(Node::new(span));
        return;
    };
    let node = Arc::make_mut(node);
    match span.key().cmp(&node.span.key()) {
        Ordering::Less => insert(&mut node.left, span),
        Ordering::Greater => insert(&mut node.right, span),
        Ordering::Equal => node.span = span,
    }
    balance(link);
}

fn remove(link: &mut Link, key: (u64, OwnerNo)) {
    let Some(node) = link else { return };
    match key.cmp(&node.span.key()) {
        Ordering::Less => remove(&mut Arc::make_mut(node).left, key),
        Ordering::Greater => remove(&mut Arc::make_mut(node).right, key),
        Ordering::Equal => {
            let node = Arc::make_mut(node);
            match take_first(&mut node.right) {
                Some(next) => node.span = next,
                None => *link = node.left.take(),
            }
        }
    }
    balance(link);
}

/// Takes the first span out of a tree.
fn take_first(link: &mut Link) -> Option<Span> {
    let node = Arc::make_mut(link.as_mut()?);
    let first = if let Some(first) = take_first(&mut node.left) {
        first
    } else {
        let span = node.span;
        *link = node.right.take();
        span
    };
    balance(link);
    Some(first)
}

/// Brings a tree whose children differ in height by two at most into balance.
fn balance(link: &mut Link) {
    let Some(node) = link else { return };
    let node = Arc::make_mut(node);
    let (left, right) = (height(&node.left), height(&node.right));
    if left > right + 1 {
        if let Some(child) = &mut node.left
            && height(&child.left) < height(&child.right)
        {
            rotate_left(&mut node.left);
        }
        rotate_right(link);
    } else if right > left + 1 {
        if let Some(child) = &mut node.right
            && height(&child.right) < height(&child.left)
        {
            rotate_right(&mut node.right);
        }
        rotate_left(link);
    } else {
        node.update();
    }
}

/// The right child becomes the root.
fn rotate_left(link: &mut Link) {
    let Some(mut old) = link.take() else { return };
    let node = Arc::make_mut(&mut old);
    *link = node.right.take();
    if let Some(root) = link {
        let root = Arc::make_mut(root);
        node.right = root.left.take();
        node.update();
        root.left = Some(old);
        root.update();
    }
}

/// The left child becomes the root.
fn rotate_right(link: &mut Link) {
    let Some(mut old) = link.take() else { return };
    let node = Arc::make_mut(&mut old);
    *link = node.left.take();
    if let Some(root) = link {
        let root = Arc::make_mut(root);
        node.left = root.right.take();
        node.update();
        root.right = Some(old);
        root.update();
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::range::OFFSET_MAX;

    /// Checks order, balance and what nodes know of what is below them; returns the spans.
    fn check(link: &Link) -> Vec<Span> {
        let Some(node) = link else { return Vec::new() };
        let mut spans = check(&node.left);
        spans.push(node.span);
        spans.extend(check(&node.right));
        assert!(height(&node.left).abs_diff(height(&node.right)) <= 1);
        let mut again = (**node).clone();
        again.update();
        assert_eq!(
            (again.height, again.reach, again.exclusive_reach),
            (node.height, node.reach, node.exclusive_reach)
        );
        assert!(spans.is_sorted_by_key(Span::key));
        spans
    }

    proptest! {
        #[test]
        fn answers_as_a_list_does(
            steps in prop::collection::vec(
                (any::<bool>(), 0u64..40, 0u64..20, 0u32..6, any::<bool>()), 1..200),
        ) {
            let mut spans = Spans::default();
            let mut list: Vec<Span> = Vec::new();
            for (add, start, len, owner, exclusive) in steps {
                let owner = OwnerNo(owner);
                let range = ByteRange::new(start, start + len).unwrap();
                let before = spans.clone();
                let old = list.clone();
                list.retain(|span| span.key() != (start, owner));
                if add {
                    spans.insert(Span { range, owner, exclusive });
                    list.push(Span { range, owner, exclusive });
                } else {
                    spans.remove(start, owner);
                }
                list.sort_by_key(Span::key);
                prop_assert_eq!(check(&spans.root), list.clone());
                prop_assert_eq!(check(&before.root), old, "a clone does not change");
                let expected = list.iter().copied().find(|span| {
                    span.owner != owner
                        && span.range.overlaps(range)
                        && (exclusive || span.exclusive)
                });
                prop_assert_eq!(spans.first_conflict(range, Some(owner), exclusive), expected);
            }
        }
    }

    #[test]
    fn many_shared_ranges_are_passed_over() {
        let mut spans = Spans::default();
        for owner in 0..10_000 {
            let range = ByteRange::new(u64::from(owner), u64::from(owner) + 5000).unwrap();
            spans.insert(Span {
                range,
                owner: OwnerNo(owner),
                exclusive: false,
            });
        }
        check(&spans.root);
        assert!(height(&spans.root) < 20);
        assert_eq!(spans.first_conflict(ByteRange::ALL, None, false), None);
        let behind = ByteRange::new(15_001, 20_000).unwrap();
        assert_eq!(spans.first_conflict(behind, None, true), None);
    }

    #[test]
    fn the_last_byte_of_all_is_found() {
        let last = ByteRange::new(OFFSET_MAX, OFFSET_MAX).unwrap();
        for range in [ByteRange::ALL, last] {
            let mut spans = Spans::default();
            let (owner, exclusive) = (OwnerNo(1), true);
            let span = Span {
                range,
                owner,
                exclusive,
            };
            spans.insert(span);
            let found = |owner| spans.first_conflict(last, Some(OwnerNo(owner)), false);
            assert_eq!((found(1), found(2)), (None, Some(span)));
        }
    }
}

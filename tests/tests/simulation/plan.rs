//! What a run is about: the cluster, its hosts, and which kinds of trouble come more often. All of
//! it follows from the seed.

use havenfs_tests::lab::random::Random;

use crate::clock::MS;
use crate::members::{Change, Set};

/// Nodes that there may ever be.
pub(crate) const NODES: usize = 5;
/// Those that faults are drawn for.
pub(crate) const FIRST: usize = 3;

/// What there is plenty of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Theme {
    Mixed,
    Moves,
    Crashes,
    Pauses,
    Partitions,
    Disks,
    Hosts,
    /// Nodes fall behind and are sent snapshots.
    Behind,
    /// Nodes are added and removed.
    Members,
}

const THEMES: [Theme; 9] = [
    Theme::Mixed,
    Theme::Moves,
    Theme::Crashes,
    Theme::Pauses,
    Theme::Partitions,
    Theme::Disks,
    Theme::Hosts,
    Theme::Behind,
    Theme::Members,
];

/// What does not come right in the end; at most one of these happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Calamity {
    /// The exported storage does not answer a node any more.
    StorageHangs,
    /// A node loses its disk, with its log.
    DiskLost,
    /// A node does not come back.
    StaysDead,
}

/// One run.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) theme: Theme,
    pub(crate) services: usize,
    /// Which nodes have the data; the others only vote.
    pub(crate) data: [bool; NODES],
    pub(crate) lease_ms: [u32; NODES],
    pub(crate) drift_ppm: [i64; NODES],
    /// Whether the storage refuses who was fenced. Without it nothing stops a node between its look
    /// at the gate and the effect, so no pause falls there.
    pub(crate) fence: bool,
    /// After so many entries a snapshot is made, and so many stay in the log.
    pub(crate) snapshot_every: u64,
    pub(crate) entries_kept: u64,
    pub(crate) hosts: usize,
    pub(crate) owners: usize,
    pub(crate) faults: u64,
    /// When faults stop.
    pub(crate) faults_until: u64,
    /// Of a hundred messages between nodes so many are lost.
    pub(crate) loss_percent: u64,
    pub(crate) calamity: Option<Calamity>,
    /// Who votes at first, and what an operator makes of that.
    pub(crate) voters: Set,
    pub(crate) changes: Vec<Change>,
    /// Whether a node that has lost its disk is removed, and a new one added in its place.
    pub(crate) is_replaced: bool,
    /// Before this moment nothing goes wrong.
    pub(crate) quiet_until: u64,
}

impl Plan {
    pub(crate) fn of(random: &mut Random, focus: Option<Theme>) -> Self {
        let theme = focus.unwrap_or_else(|| THEMES[random.below(THEMES.len() as u64) as usize]);
        let all_data = random.below(3) == 0;
        let data = [true, true, all_data, true, true];
        let mut lease_ms = [1200; NODES];
        if random.below(4) == 0 {
            lease_ms = lease_ms.map(|_| 600 + 300 * random.below(6) as u32);
        }
        // The extremes are what the margin is for.
        let drift_max = crate::clock::DRIFT_PPM_MAX as i64;
        let drift_ppm = [(); NODES].map(|()| match random.below(4) {
            0 => -drift_max,
            1 => drift_max,
            _ => random.below(2 * drift_max as u64) as i64 - drift_max,
        });
        // With a longer lease and the margin's least value the clocks must agree better.
        let is_long = lease_ms.iter().any(|lease_ms| *lease_ms > 1200);
        let drift_ppm = drift_ppm.map(|drift| if is_long { drift / 3 } else { drift });
        let calamity = match random.below(10) {
            0 => Some(Calamity::StorageHangs),
            1 => Some(Calamity::DiskLost),
            2..5 => Some(Calamity::StaysDead),
            _ => None,
        };
        let behind = theme == Theme::Behind;
        let (mut voters, mut changes) = (Set(0b111), Vec::new());
        let mut calamity = calamity;
        if theme == Theme::Members {
            (voters, changes) = draw_changes(random, data);
            // Who is left must be able to go on.
            calamity = None;
        }
        Self {
            theme,
            services: 1 + random.below(2) as usize,
            data,
            lease_ms,
            drift_ppm,
            fence: random.below(2) == 0,
            snapshot_every: if behind { 20 } else { 40 + random.below(200) },
            entries_kept: if behind { 2 } else { random.below(40) },
            hosts: 2 + random.below(2) as usize,
            owners: 1 + random.below(2) as usize,
            faults: 3 + random.below(7),
            faults_until: (4000 + random.below(3000)) * MS,
            loss_percent: [0, 0, 1, 4][random.below(4) as usize],
            calamity,
            voters,
            changes,
            is_replaced: random.below(2) == 0,
            quiet_until: 300 * MS,
        }
    }
}

/// Nodes are added and removed, one by one; mostly from one voter to three, and back to one.
fn draw_changes(random: &mut Random, data: [bool; NODES]) -> (Set, Vec<Change>) {
    let first = [1, 1, 1, 3][random.below(4) as usize];
    let mut voters = (0..first).fold(Set(0), Set::with);
    let (begun, mut changes, mut next) = (voters, Vec::new(), first);
    let mut grows = first == 1;
    for _ in 0..2 + random.below(6) {
        grows = match voters.len() {
            1 => true,
            3 => false,
            _ => grows ^ (random.below(4) == 0),
        };
        if grows && next < NODES {
            changes.push(Change::Add(next));
            voters = voters.with(next);
            next += 1;
            continue;
        }
        let serves_without = |n: &usize| voters.without(*n).iter().any(|left| data[left]);
        let may_go: Vec<usize> = voters.iter().filter(serves_without).collect();
        if voters.len() > 1 && !may_go.is_empty() {
            let n = may_go[random.below(may_go.len() as u64) as usize];
            changes.push(Change::Remove(n));
            voters = voters.without(n);
        }
    }
    (begun, changes)
}

//! What a run is about: the cluster, its hosts, and which kinds of trouble come more often. All of
//! it follows from the seed.

use havenfs_tests::lab::random::Random;

use crate::clock::MS;

/// Nodes of the cluster.
pub(crate) const NODES: usize = 3;

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
}

const THEMES: [Theme; 8] = [
    Theme::Mixed,
    Theme::Moves,
    Theme::Crashes,
    Theme::Pauses,
    Theme::Partitions,
    Theme::Disks,
    Theme::Hosts,
    Theme::Behind,
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
    /// Before this moment nothing goes wrong.
    pub(crate) quiet_until: u64,
}

impl Plan {
    pub(crate) fn of(random: &mut Random, focus: Option<Theme>) -> Self {
        let theme = focus.unwrap_or_else(|| THEMES[random.below(THEMES.len() as u64) as usize]);
        let all_data = random.below(3) == 0;
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
        Self {
            theme,
            services: 1 + random.below(2) as usize,
            data: [true, true, all_data],
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
            quiet_until: 300 * MS,
        }
    }
}

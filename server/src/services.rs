//! The services of this node, for whoever looks at them from outside: the control socket, the
//! metrics page. Owns nothing but the list; what a service does is `serve`'s.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::Duration;

use tokio::sync::watch;

use crate::address::Floating;
use crate::backend::probe::{Expected, Form};
use crate::cluster::definition::Definition;
use crate::cluster::renewal_times::RenewalTimes;
use crate::cluster::{ClusterState, NodeId, ServiceId, Wish};
use crate::config::cluster::NodeConfig;
use crate::config::service::ServiceConfig;
use crate::definitions;
use crate::export::ExportSpec;
use crate::looks::Looks;
use crate::node::Node;
use crate::raft::{Cluster, Proposer};
use crate::volumes::overlap::Shown;

/// All of them, and the cluster that they belong to.
#[derive(Debug)]
pub struct Services {
    /// What was configured.
    pub config: NodeConfig,
    /// The replicated state.
    pub state: Arc<RwLock<ClusterState>>,
    /// The way to change it.
    pub proposer: Proposer,
    /// Who is in the cluster.
    pub cluster: Cluster,
    /// Changes of the state are told here.
    pub changes: watch::Receiver<u64>,
    /// How long renewals of this node's lease take.
    pub renewal_times: Arc<Mutex<RenewalTimes>>,
    /// How often a server was started on the state directory, this time included.
    pub starts: u64,
    /// The services, in the order of the configuration.
    pub slots: Vec<Arc<Slot>>,
}

/// A service on this node.
#[derive(Debug)]
pub struct Slot {
    /// What was configured; names and addresses as the cluster had them when the process started.
    pub config: ServiceConfig,
    /// Its id, once the log has given it one.
    pub id: OnceLock<ServiceId>,
    /// Its addresses, if they move along.
    pub floating: Option<Arc<Floating>>,
    /// What is known of its storage on this node.
    pub health: watch::Sender<Health>,
    /// The exported directories whose file systems this process has seen take a write.
    pub writable: Writable,
    serving: Mutex<Option<Arc<Node>>>,
    takeover: Mutex<Option<Takeover>>,
    departure: Mutex<Option<Departure>>,
    files: Mutex<Option<Arc<Definition>>>,
    shown: Mutex<Weak<Vec<Shown>>>,
    /// The turns of people who have its files read again.
    pub looks: Looks,
    /// The version of the definition that this node has a copy of; held while it is written.
    pub copied: Mutex<u64>,
}

/// The exported directories whose file systems have taken a write in this life of the process.
#[derive(Debug, Default)]
pub struct Writable(Mutex<HashSet<PathBuf>>);

impl Writable {
    /// What is expected of the file system of an exported directory.
    pub fn expected_of(&self, spec: &ExportSpec) -> Expected {
        if spec.is_read_only() {
            return Expected::Readable;
        }
        let writable = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if writable.contains(&spec.path) {
            Expected::Writable
        } else {
            Expected::MaybeWritable
        }
    }

    /// That of a directory has taken a write.
    pub fn note(&self, path: PathBuf) {
        let mut writable = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        writable.insert(path);
    }
}

/// Whether the storage of a service works on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It is not known here: it was not tried.
    Untried,
    /// It does; how that was found out.
    Works(Form),
    /// It does not; why, for people.
    Fails(String),
    /// It does not answer, and says nothing of it; for people.
    Hangs(String),
}

impl Health {
    /// Whether it is known not to work.
    pub const fn fails(&self) -> bool {
        matches!(self, Self::Fails(_) | Self::Hangs(_))
    }
}

/// How a service came to this node.
#[derive(Debug, Clone)]
pub struct Takeover {
    /// Why: `start`, `takeover` or `move`.
    pub kind: &'static str,
    /// Who had it before.
    pub from: Option<NodeId>,
    /// The epoch that began.
    pub epoch: u32,
    /// What was done, in order, and how long it took.
    pub phases: Vec<(&'static str, Duration)>,
}

/// How a service left this node.
#[derive(Debug, Clone)]
pub struct Departure {
    /// Why: `move`, `stop` or `failed`.
    pub kind: &'static str,
    /// The epoch that ended.
    pub epoch: u32,
    /// As in [`Takeover::phases`].
    pub phases: Vec<(&'static str, Duration)>,
}

/// How long all phases took.
pub fn total(phases: &[(&str, Duration)]) -> Duration {
    phases.iter().map(|(_, took)| *took).sum()
}

/// The phases in a line, in milliseconds.
pub fn in_milliseconds(phases: &[(&str, Duration)]) -> String {
    let phases = phases
        .iter()
        .map(|(phase, took)| format!("{phase} {:.1}", took.as_secs_f64() * 1000.0));
    phases.collect::<Vec<_>>().join(", ")
}

impl Slot {
    /// A service that is not served. `lease`: how long a node serves after a renewal; none if it is
    /// alone.
    pub fn new(config: ServiceConfig, lease: Option<Duration>) -> Self {
        let floating = config.settings.floating.clone();
        let floating = floating.map(|floating| Arc::new(Floating::new(floating, lease)));
        Self {
            floating,
            config,
            id: OnceLock::new(),
            health: watch::Sender::new(Health::Untried),
            writable: Writable::default(),
            serving: Mutex::default(),
            takeover: Mutex::default(),
            departure: Mutex::default(),
            files: Mutex::default(),
            shown: Mutex::default(),
            looks: Looks::default(),
            copied: Mutex::default(),
        }
    }

    /// The service, if this node has it open.
    pub fn serving(&self) -> Option<Arc<Node>> {
        let serving = self.serving.lock();
        serving.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// This node has opened the service, or closed it.
    pub fn set_serving(&self, node: Option<Arc<Node>>) {
        *self.serving.lock().unwrap_or_else(PoisonError::into_inner) = node;
    }

    /// What the files of this node say that it is, as they were read last; none if they could not
    /// be.
    pub fn files(&self) -> Option<Arc<Definition>> {
        let files = self.files.lock();
        files.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The files of this node were read.
    pub fn set_files(&self, files: Option<Definition>) {
        let mut place = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        *place = files.map(Arc::new);
    }

    /// What it shows on this node, while it is open here or is being opened.
    pub fn shown(&self) -> Option<Arc<Vec<Shown>>> {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        shown.upgrade()
    }

    /// Notes what it shows here, for as long as somebody holds it.
    pub fn set_shown(&self, shown: &Arc<Vec<Shown>>) {
        let mut place = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        *place = Arc::downgrade(shown);
    }

    /// Whether this process runs with other addresses than these: it gets them by a restart.
    pub fn runs_other_addresses(&self, definition: &Definition) -> bool {
        definitions::addresses_of(&self.config.settings) != definition.addresses
    }

    /// How it came to this node the last time.
    pub fn takeover(&self) -> Option<Takeover> {
        let takeover = self.takeover.lock();
        takeover.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes how it came here.
    pub fn set_takeover(&self, takeover: Takeover) {
        *self.takeover.lock().unwrap_or_else(PoisonError::into_inner) = Some(takeover);
    }

    /// How it left this node the last time.
    pub fn departure(&self) -> Option<Departure> {
        let departure = self.departure.lock();
        departure.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes how it left.
    pub fn set_departure(&self, departure: Departure) {
        let mut place = self
            .departure
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *place = Some(departure);
    }
}

impl Services {
    /// The replicated state, for a moment.
    pub fn state(&self) -> RwLockReadGuard<'_, ClusterState> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// A service by its name; without a name the only one.
    ///
    /// # Errors
    /// What to tell whoever asked.
    pub fn slot(&self, name: Option<&str>) -> Result<&Arc<Slot>, String> {
        let names = || {
            let names: Vec<&str> = self.slots.iter().map(|slot| &*slot.config.name).collect();
            names.join(", ")
        };
        match (name, &self.slots[..]) {
            (Some(name), slots) => slots
                .iter()
                .find(|slot| slot.config.name == name)
                .ok_or_else(|| format!("there is no service `{name}`; there are: {}", names())),
            (None, [slot]) => Ok(slot),
            (None, _) => Err(format!(
                "there are several services; say --service with one of: {}",
                names()
            )),
        }
    }

    /// A service that is open on this node.
    ///
    /// # Errors
    /// What to tell whoever asked: mostly, who has it.
    pub fn open(&self, name: Option<&str>) -> Result<Arc<Node>, String> {
        let slot = self.slot(name)?;
        slot.serving().ok_or_else(|| {
            let name = &slot.config.name;
            match self.active(slot) {
                Some(node) => format!("service `{name}` is served by node {node}: ask there"),
                None if self.is_released(slot) => format!(
                    "service `{name}` is released, and no node serves it\nhint: `havenfs service take \
                     {name}`, on the node that is to have it, ends that"
                ),
                None => format!("service `{name}` is served by no node now"),
            }
        })
    }

    /// The name of the node that a service is assigned to.
    pub fn active(&self, slot: &Slot) -> Option<String> {
        let state = self.state();
        let active = state.service(*slot.id.get()?)?.active()?;
        Some(self.cluster.name_of(active.node))
    }

    /// Whether an operator wants nobody to serve it.
    fn is_released(&self, slot: &Slot) -> bool {
        let state = self.state();
        let service = slot.id.get().and_then(|id| state.service(*id));
        service.is_some_and(|service| service.wish() == Wish::Nobody)
    }
}

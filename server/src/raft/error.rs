//! Why the store can't be opened, or has failed.

use std::io;
use std::path::{Path, PathBuf};

/// Why the replicated store can't be opened, or why it can't go on.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// A step on a file failed.
    #[error("cannot {step} `{}`: {problem}\nhint: look at the kernel log for errors of the disk, \
             and at the owner and the mode of the folder", .path.display())]
    Io {
        /// What was tried.
        step: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        problem: String,
    },
    /// There is no room for the log.
    #[error("cannot {step} `{}`: {problem}\nhint: free space on that file system and start again; \
             nothing that was acknowledged is lost", .path.display())]
    Full {
        /// What was tried.
        step: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        problem: String,
    },
    /// A file is not what was written.
    #[error("`{}` is damaged at byte {offset}: {problem}\nhint: in a cluster of several nodes move \
             the state directory away, start this node, and follow what `havenfs cluster status` of \
             another node says; alone move the folder away and start once with --recover, so that \
             clients can reclaim their locks before others take them", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is wrong.
        problem: String,
    },
    /// A file that must be there is not.
    #[error("`{}` is missing: {problem}\nhint: in a cluster of several nodes move \
             the state directory away, start this node, and follow what `havenfs cluster status` of \
             another node says; alone move the folder away and start once with --recover, so that \
             clients can reclaim their locks before others take them", .path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// How that is known.
        problem: &'static str,
    },
    /// A file comes from a newer program.
    #[error("`{}` was written by a newer havenfs: {problem}\nhint: run the newer havenfs that \
             wrote it; the file is left as it is", .path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// What is newer.
        problem: String,
    },
    /// A file comes from an older program, in a form that is not read any more.
    #[error("`{}` was written by an older havenfs: {problem}\nhint: run the older havenfs that \
             wrote it; the file is left as it is", .path.display())]
    Older {
        /// The file.
        path: PathBuf,
        /// What is older.
        problem: String,
    },
    /// A repair of an operator was begun, and is not known to be done.
    #[error(
        "`havenfs cluster {command}` was begun on this node, and is not known to be done\nhint: say \
         it again, with the same words; then start the server"
    )]
    HalfDone {
        /// Which one.
        command: &'static str,
    },
    /// This node can't be a member of its cluster.
    #[error("cannot join the cluster: {0}")]
    Cluster(String),
    /// This node is a member of its cluster no more.
    #[error("this node is not in its cluster any more: {0}")]
    Removed(String),
    /// The consensus engine ended.
    #[error(
        "the replicated store has stopped: cannot {step}: {problem}\nhint: start the server \
             again; what was acknowledged is in the log"
    )]
    Stopped {
        /// What was under way.
        step: &'static str,
        /// What the engine said.
        problem: String,
    },
}

impl StoreError {
    /// For `map_err`: `step` on `path` failed.
    pub(super) fn io(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_path_buf();
        move |error| {
            let problem = error.to_string();
            match error.kind() {
                io::ErrorKind::StorageFull
                | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::FileTooLarge => Self::Full {
                    step,
                    path,
                    problem,
                },
                _ => Self::Io {
                    step,
                    path,
                    problem,
                },
            }
        }
    }

    pub(super) fn damaged(path: &Path, offset: u64, problem: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_path_buf(),
            offset,
            problem: problem.into(),
        }
    }

    /// As openraft's storage interface wants it.
    pub(super) fn into_io(self) -> io::Error {
        io::Error::other(self)
    }
}

impl From<StoreError> for io::Error {
    fn from(error: StoreError) -> Self {
        error.into_io()
    }
}

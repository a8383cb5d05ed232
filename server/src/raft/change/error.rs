//! Why a change of the members is not made, and waiting for one.

use std::time::Duration;

use tokio::time::timeout;

/// Why a change is not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// There is nobody else.
    #[error(
        "this node has no cluster\nhint: name its members in the configuration; `havenfs cluster \
         init` makes it the first one of them"
    )]
    Alone,
    /// Nobody can do it now.
    #[error(
        "nobody leads the cluster, so nothing can be changed\nhint: a majority of the members must \
         run and reach each other; see `havenfs cluster status`"
    )]
    NoLeader,
    /// This node can't do it.
    #[error("this node does not lead")]
    NotLeader,
    /// The leader says why.
    #[error("{0}")]
    Refused(String),
    /// The leader can't be asked.
    #[error("the leader, `{leader}`, can't be asked: {problem}")]
    Unreachable {
        /// Who leads.
        leader: String,
        /// Why.
        problem: String,
        /// Whether it had been asked, and may have done it.
        was_asked: bool,
    },
    /// It took too long.
    #[error(
        "{what} was begun, and is not known to be done within {seconds} s\nhint: see `havenfs \
         cluster status`; the same command goes on where it was"
    )]
    TooLong {
        /// What.
        what: &'static str,
        /// How long it was waited for.
        seconds: u64,
    },
}

pub(super) fn refused(text: impl Into<String>) -> ChangeError {
    ChangeError::Refused(text.into())
}

pub(super) const fn too_long(what: &'static str) -> ChangeError {
    ChangeError::TooLong {
        what,
        seconds: CHANGE_MAX.as_secs(),
    }
}

/// Waits for a change that the engine makes.
pub(super) async fn changed<T, E: std::fmt::Display>(
    what: &'static str,
    change: impl Future<Output = Result<T, E>>,
) -> Result<(), ChangeError> {
    match timeout(CHANGE_MAX, change).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(refused(format!(
            "{what} failed: {error}\nhint: see `havenfs cluster status`; the same command goes on \
             where it was"
        ))),
        Err(_) => Err(too_long(what)),
    }
}

/// How long a step may take.
pub(super) const CHANGE_MAX: Duration = Duration::from_secs(10);

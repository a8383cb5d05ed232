//! How a node ends: all its services are closed and released, or left to others.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::ServeError;

/// Waits until all services are closed and released. If one could not be (`has_failed`, or an error
/// here), others take it when the lease of this node is over: so `renewing`, which renews it, is
/// dropped when the other services have had `time_max`, which they are likely not to need. They are
/// closed and released all the same; if that takes longer, their clients wait as well.
///
/// # Errors
/// The first one.
pub(super) async fn close_all<R>(
    keepers: &mut JoinSet<Result<(), ServeError>>,
    has_failed: bool,
    mut renewing: Option<R>,
    time_max: Duration,
) -> Result<(), ServeError> {
    let mut result = Ok(());
    let mut until = has_failed.then(|| Instant::now() + time_max);
    loop {
        let at = until.filter(|_| renewing.is_some());
        tokio::select! {
            ended = keepers.join_next() => {
                let Some(ended) = ended else {
                    return result;
                };
                // A panic has ended the process already.
                result = result.and(ended.unwrap_or(Ok(())));
                if result.is_err() {
                    until.get_or_insert_with(|| Instant::now() + time_max);
                }
            }
            () = sleep_until(at.unwrap_or_else(Instant::now)), if at.is_some() => {
                tracing::warn!(
                    "a service could not be released, and others take long to close: the lease is \
                     renewed no more, so that other nodes take all of them"
                );
                renewing = None;
            }
        }
    }
}

/// How long a node renews its lease for services that are being closed, after one has failed.
pub(super) const CLOSE_TIME_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use std::sync::Arc;

    use tokio::time::sleep;

    use super::*;

    /// Runs keepers that end after so many steps, and well or not; returns whether the lease was
    /// renewed to the end, where the others have five steps.
    async fn is_renewed(ends: &[(u32, bool)], has_failed: bool) -> bool {
        let mut keepers = JoinSet::new();
        for (steps, is_well) in ends.iter().copied() {
            keepers.spawn(async move {
                sleep(STEP * steps).await;
                is_well.then_some(()).ok_or(ServeError::TooSlow)
            });
        }
        let renewing = Arc::new(());
        let renewed = Arc::downgrade(&renewing);
        // Told at the end of the last one, before the other end of it is dropped with the call.
        let last = ends
            .iter()
            .map(|(steps, _)| *steps)
            .max()
            .unwrap_or_default();
        let at_end = tokio::spawn(async move {
            sleep(STEP * (last - 1)).await;
            renewed.strong_count() > 0
        });
        let closed = close_all(&mut keepers, has_failed, Some(renewing), STEP * 5).await;
        assert_eq!(closed.is_ok(), ends.iter().all(|(_, is_well)| *is_well));
        at_end.await.unwrap()
    }

    const STEP: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn who_can_not_release_a_service_renews_no_more_while_others_hang() {
        assert!(!is_renewed(&[(50, true)], true).await);
        assert!(!is_renewed(&[(2, false), (50, true)], false).await);
        assert!(is_renewed(&[(1, false), (3, true)], false).await);
        assert!(is_renewed(&[(50, true), (9, true)], false).await);
    }
}

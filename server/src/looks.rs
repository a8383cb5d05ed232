//! Looks at files for people: on threads that may wait for a disk, and only a few at a time.
//!
//! A disk may hang for hours, and whoever watches the service asks again and again. The threads are
//! those with which services are made ready and let go as well, and there is an end to them: so
//! those that wait for the disks of a service are counted, and who comes after is told so, in place
//! of a thread. Each service has turns of its own: one that hangs is in nobody else's way.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::timeout;

/// The turns of those who look at one service's files.
#[derive(Debug)]
pub struct Looks(Arc<Semaphore>);

impl Default for Looks {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(LOOKS_MAX)))
    }
}

impl Looks {
    /// Does what may wait for a disk.
    ///
    /// # Errors
    /// What to tell people: what `work` says, or that too many wait already.
    pub async fn look<T: Send + 'static, E: ToString + Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, String> {
        self.look_within(TURN_TIME_MAX, work).await
    }

    async fn look_within<T: Send + 'static, E: ToString + Send + 'static>(
        &self,
        time_max: Duration,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, String> {
        let turn = timeout(time_max, Arc::clone(&self.0).acquire_owned()).await;
        let turn = turn.ok().and_then(Result::ok).ok_or_else(|| {
            format!(
                "{LOOKS_MAX} requests that were made before wait for the disks of exported files\n\
                 hint: a disk may hang: see the kernel's log (`dmesg`)"
            )
        })?;
        let done = tokio::task::spawn_blocking(move || {
            let done = work();
            drop(turn);
            done
        });
        let done = done.await.map_err(|error| error.to_string())?;
        done.map_err(|error| error.to_string())
    }
}

/// So many at a time.
const LOOKS_MAX: usize = 4;
/// How long the next one waits for its turn.
const TURN_TIME_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_disk_that_hangs_keeps_a_few_threads_and_the_rest_is_told() {
        let looks = Arc::new(Looks::default());
        let (begun, mut started) = tokio::sync::mpsc::unbounded_channel();
        let hanging: Vec<_> = (0..LOOKS_MAX)
            .map(|_| {
                let (go_on, hangs) = mpsc::channel::<()>();
                let begun = begun.clone();
                let work = move || -> Result<(), String> {
                    begun.send(()).unwrap();
                    hangs.recv().unwrap();
                    Ok(())
                };
                let looks = Arc::clone(&looks);
                (tokio::spawn(async move { looks.look(work).await }), go_on)
            })
            .collect();
        for _ in 0..LOOKS_MAX {
            started.recv().await.unwrap();
        }
        let late = looks
            .look_within(Duration::ZERO, || Ok::<_, String>(()))
            .await;
        assert!(late.unwrap_err().contains("hint: a disk may hang"));
        for (look, go_on) in hanging {
            go_on.send(()).unwrap();
            assert_eq!(look.await.unwrap(), Ok(()));
        }
        assert_eq!(looks.look(|| Ok::<_, String>(7)).await, Ok(7));
    }
}

//! Looks at files for people: on threads that may wait for a disk, and only a few at a time.
//!
//! A disk may hang for hours, and whoever watches the service asks again and again. The threads are
//! those with which services are made ready and let go as well, and there is an end to them: so
//! those that wait for a disk are counted, and who comes after is told so, in place of a thread.

use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Who may look.
static TURNS: Semaphore = Semaphore::const_new(LOOKS_MAX);

/// Does what may wait for a disk.
///
/// # Errors
/// What to tell people: what `work` says, or that too many wait already.
pub(super) async fn look<T: Send + 'static, E: ToString + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, String> {
    look_in_turn(&TURNS, TURN_TIME_MAX, work).await
}

async fn look_in_turn<T: Send + 'static, E: ToString + Send + 'static>(
    turns: &'static Semaphore,
    time_max: Duration,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, String> {
    let turn = timeout(time_max, turns.acquire()).await;
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
        static TURNS: Semaphore = Semaphore::const_new(LOOKS_MAX);
        const LONG: Duration = Duration::from_mins(1);
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
                (tokio::spawn(look_in_turn(&TURNS, LONG, work)), go_on)
            })
            .collect();
        for _ in 0..LOOKS_MAX {
            started.recv().await.unwrap();
        }
        let late = look_in_turn(&TURNS, Duration::ZERO, || Ok::<_, String>(())).await;
        assert!(late.unwrap_err().contains("hint: a disk may hang"));
        for (look, go_on) in hanging {
            go_on.send(()).unwrap();
            assert_eq!(look.await.unwrap(), Ok(()));
        }
        assert_eq!(
            look_in_turn(&TURNS, LONG, || Ok::<_, String>(7)).await,
            Ok(7)
        );
    }
}

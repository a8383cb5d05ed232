//! What a round makes of disks that don't answer.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use super::*;

/// Two file systems of two volumes each, none of which answers.
fn round(dir: &Path) -> (Round, Vec<Arc<Volume>>) {
    let open = |id| Arc::new(Volume::open(dir, id, 0, 1, true).unwrap());
    let volumes: Vec<_> = (0..4).map(open).collect();
    let disks = volumes.chunks(2).map(|volumes| {
        let weak = volumes.iter().map(Arc::downgrade);
        (dir.to_path_buf(), weak.collect())
    });
    (Round::new(disks), volumes)
}

fn hanging(volumes: &[Arc<Volume>]) -> Vec<bool> {
    volumes.iter().map(|volume| volume.hangs()).collect()
}

async fn until_late(round: &mut Round) -> Health {
    loop {
        if let Progress::Late(health) = round.go_on(TIME_MAX).await {
            return health;
        }
    }
}

const TIME_MAX: Duration = Duration::from_millis(40);

#[tokio::test]
async fn all_that_is_on_disks_that_do_not_answer_is_put_off_and_no_error_is_made_of_that() {
    let dir = tempfile::tempdir().unwrap();
    let (mut round, volumes) = round(dir.path());
    assert!(matches!(until_late(&mut round).await, Health::Hangs(_)));
    while hanging(&volumes) != [true; 4] {
        until_late(&mut round).await;
    }
    round.tell.try_send((1, Ok(Form::Write))).unwrap();
    until_late(&mut round).await;
    assert_eq!(hanging(&volumes), [true, true, false, false]);
    let failed = Err((dir.path().to_path_buf(), Errno::IO));
    round.tell.try_send((0, failed)).unwrap();
    let done = round.go_on(TIME_MAX).await;
    assert!(matches!(done, Progress::Done(Health::Fails(_))));
    assert_eq!(hanging(&volumes), [false; 4]);
}

#[tokio::test]
async fn a_sync_of_any_of_its_volumes_shows_that_a_disk_lives() {
    let dir = tempfile::tempdir().unwrap();
    let (mut round, volumes) = round(dir.path());
    let begun = Instant::now();
    while begun.elapsed() < TIME_MAX * 4 {
        volumes[1].note_synced();
        volumes[2].note_synced();
        assert!(matches!(round.go_on(TIME_MAX).await, Progress::Waits));
    }
    // Jobs that end count as long as the try has no thread.
    let pool = Pool::start(1).unwrap();
    let before = round.waiting[0].signs(Some(&pool));
    let work = || None;
    let job = Job {
        kind: 0,
        group: 0,
        work: Box::new(work),
    };
    pool.submit(1, &mut vec![job]);
    assert_eq!(pool.finish(Duration::from_mins(1)), 0);
    assert_eq!(round.waiting[0].signs(Some(&pool)), before + 1);
    round.waiting[0].begun.store(true, Ordering::Release);
    assert_eq!(round.waiting[0].signs(Some(&pool)), before);
}

#[tokio::test]
async fn a_disk_that_a_reload_opened_anew_is_waited_for_as_before() {
    let dir = tempfile::tempdir().unwrap();
    let (mut round, volumes) = round(dir.path());
    let superblock = volumes[0].superblock;
    round.waiting[0].superblock = Some(superblock);
    round.waiting[1].superblock = Some(superblock + 1);
    volumes[0].note_synced();
    while hanging(&volumes) != [true; 4] {
        until_late(&mut round).await;
    }
    let fresh = Arc::new(Volume::open(dir.path(), 9, 0, 1, true).unwrap());
    round.forget_gone(std::slice::from_ref(&fresh));
    assert_eq!(
        round.waiting.len(),
        1,
        "what is not exported any more is forgotten"
    );
    until_late(&mut round).await;
    assert!(fresh.hangs());
    fresh.note_synced();
    assert!(matches!(round.go_on(TIME_MAX).await, Progress::Waits));
    round.tell.try_send((0, Ok(Form::Write))).unwrap();
    assert!(matches!(
        round.go_on(TIME_MAX).await,
        Progress::Done(Health::Works(_))
    ));
    assert!(!fresh.hangs());
}

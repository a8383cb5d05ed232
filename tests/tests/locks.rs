//! Real Linux clients lock files on our export: what excludes what, who waits and is woken, and
//! what a restart of the server or a reboot of a client does to locks.
//!
//! Two clients are Linux kernels in virtual machines that mount with locks, and the server is the
//! real binary on a host of the lab; it is killed with `kill -9`, never stopped. Only system calls
//! of processes on the clients are judged, and what their kernels complain of. Needs root.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use havenfs_tests::lab::held::{Traffic, violations};
use havenfs_tests::lab::locks::{Actor, Kind, Lock, Locker};
use havenfs_tests::lab::random::Random;
use havenfs_tests::lab::site::{EXPORT, in_lab};
use havenfs_tests::lab::traffic::Workers;
use havenfs_tests::lab::{Host, Lab, Machine, Vm, havenfs_binary};

#[test]
fn conflicts() -> Result<()> {
    in_lab("conflicts", |lab| {
        let _server = lab.host("s1").serve()?;
        let (c1, c2) = (locking_client(lab, "c1")?, locking_client(lab, "c2")?);
        let (here, there) = (c1.locker()?, c2.locker()?);
        ranges_conflict_where_they_overlap(&here, &there)?;
        shared_locks_conflict_with_exclusive_ones(&here, &there)?;
        a_part_of_a_lock_can_change(&here, &there)?;
        whole_files_conflict(&here, &there)
    })
}

fn ranges_conflict_where_they_overlap(here: &Locker<'_>, there: &Locker<'_>) -> Result<()> {
    let path = "/mnt/ranges";
    let (one, two) = (here.actor(path)?, there.actor(path)?);
    must(&one, Lock::exclusive(100, 100))?;
    must_not(&two, Lock::exclusive(150, 10))?;
    must_not(&two, Lock::shared(150, 10))?;
    must_not(&two, Lock::exclusive(199, 1))?;
    must_not(&two, Lock::exclusive(0, 101))?;
    must_not(&two, Lock::exclusive(0, 0))?;
    // Ranges that touch do not overlap.
    must(&two, Lock::exclusive(0, 100))?;
    must(&two, Lock::exclusive(200, 10))?;
    // Another process of the same machine is another lock owner.
    let near = here.actor(path)?;
    must_not(&near, Lock::exclusive(150, 10))?;
    must_not(&near, Lock::exclusive(50, 10))?;
    near.close()?;

    one.unlock(Lock::exclusive(100, 100))?;
    must(&two, Lock::exclusive(150, 10))?;
    must_not(&one, Lock::exclusive(0, 0))?;
    two.close()?;

    // To the end of the file, wherever that may come to be.
    must(&one, Lock::exclusive(1000, 0))?;
    let two = there.actor(path)?;
    must_not(&two, Lock::exclusive(1 << 40, 1))?;
    must_not(&two, Lock::exclusive(OFFSET_MAX, 1))?;
    must_not(&two, Lock::exclusive(999, 2))?;
    must(&two, Lock::exclusive(0, 1000))?;
    one.unlock(Lock::exclusive(2000, 0))?;
    must(&two, Lock::exclusive(OFFSET_MAX, 1))?;
    must_not(&two, Lock::exclusive(1999, 1))?;
    must(&two, Lock::exclusive(2000, 0))?;
    one.close()?;
    two.close()?;
    Ok(())
}

fn shared_locks_conflict_with_exclusive_ones(here: &Locker<'_>, there: &Locker<'_>) -> Result<()> {
    let path = "/mnt/shared";
    let (one, two) = (here.actor(path)?, there.actor(path)?);
    must(&one, Lock::shared(0, 10))?;
    must(&two, Lock::shared(5, 10))?;
    must_not(&two, Lock::exclusive(0, 1))?;
    // An upgrade must not pass by somebody else's lock, and leaves what was there if it fails.
    must_not(&one, Lock::exclusive(0, 10))?;
    must_not(&two, Lock::exclusive(0, 10))?;
    two.unlock(Lock::shared(5, 10))?;
    must(&one, Lock::exclusive(0, 10))?;
    must_not(&two, Lock::shared(0, 1))?;
    // Down again.
    must(&one, Lock::shared(0, 10))?;
    must(&two, Lock::shared(0, 10))?;
    must_not(&two, Lock::exclusive(0, 10))?;
    one.close()?;
    must(&two, Lock::exclusive(0, 10))?;
    two.close()?;
    Ok(())
}

fn a_part_of_a_lock_can_change(here: &Locker<'_>, there: &Locker<'_>) -> Result<()> {
    let path = "/mnt/parts";
    let (one, two) = (here.actor(path)?, there.actor(path)?);
    must(&one, Lock::exclusive(0, 100))?;
    one.unlock(Lock::exclusive(40, 20))?;
    must(&two, Lock::exclusive(40, 20))?;
    must_not(&two, Lock::exclusive(39, 1))?;
    must_not(&two, Lock::exclusive(60, 1))?;
    // F_GETLK names one that is in the way, and says nothing of one's own.
    let below = two.conflict(Lock::exclusive(10, 5))?;
    assert_eq!(below, Some((Kind::Exclusive, 0, 40)));
    let above = two.conflict(Lock::shared(60, 0))?;
    assert_eq!(above, Some((Kind::Exclusive, 60, 40)));
    assert_eq!(two.conflict(Lock::exclusive(40, 20))?, None);
    assert_eq!(one.conflict(Lock::exclusive(0, 40))?, None);

    must(&one, Lock::shared(20, 10))?;
    must(&two, Lock::shared(20, 10))?;
    must_not(&two, Lock::shared(19, 1))?;
    must_not(&two, Lock::shared(30, 1))?;
    assert_eq!(two.conflict(Lock::shared(20, 10))?, None);
    assert_eq!(
        two.conflict(Lock::exclusive(20, 10))?,
        Some((Kind::Shared, 20, 10))
    );
    one.close()?;
    must(&two, Lock::exclusive(0, 0))?;
    two.close()?;
    Ok(())
}

fn whole_files_conflict(here: &Locker<'_>, there: &Locker<'_>) -> Result<()> {
    let path = "/mnt/whole";
    let (shared, exclusive) = (Lock::flock(Kind::Shared), Lock::flock(Kind::Exclusive));
    let (one, two) = (here.actor(path)?, there.actor(path)?);
    must(&one, exclusive)?;
    must_not(&two, exclusive)?;
    must_not(&two, shared)?;
    // On NFS they are locks of all bytes, which fcntl sees from another machine.
    must_not(&two, Lock::shared(5, 1))?;
    must(&one, shared)?;
    must(&two, shared)?;
    must_not(&two, exclusive)?;
    one.unlock(shared)?;
    must(&two, exclusive)?;
    must_not(&one, shared)?;
    two.close()?;
    must(&one, exclusive)?;
    one.close()?;
    Ok(())
}

#[test]
fn restart_keeps_locks() -> Result<()> {
    in_lab("restart", |lab| {
        let s1 = lab.host("s1");
        let mut server = s1.serve()?;
        let (c1, c2) = (locking_client(lab, "c1")?, locking_client(lab, "c2")?);
        let (here, there) = (c1.locker()?, c2.locker()?);
        let (one, two) = (here.actor("/mnt/f")?, there.actor("/mnt/f")?);
        let fresh = [there.actor("/mnt/fresh")?, there.actor("/mnt/fresher")?];
        let (whole_one, whole_two) = (here.actor("/mnt/whole")?, there.actor("/mnt/whole")?);
        must(&one, Lock::exclusive(0, 100))?;
        must(&one, Lock::shared(200, 10))?;
        must(&whole_one, Lock::flock(Kind::Exclusive))?;
        must_not(&two, Lock::exclusive(50, 1))?;

        let notices = c1.notices()?;
        server.kill()?;
        server = s1.serve()?;
        gets_a_new_lock(&fresh, Lock::exclusive(5000, 1))?;
        must_not(&two, Lock::exclusive(50, 1))?;
        must_not(&two, Lock::exclusive(200, 1))?;
        must(&two, Lock::shared(200, 1))?;
        must_not(&whole_two, Lock::flock(Kind::Shared))?;

        wait_for_notice(&c1, notices)?;
        // The client answers for a new lock only once its old ones are reclaimed.
        must(&one, Lock::exclusive(6000, 1))?;
        must_not(&two, Lock::exclusive(50, 1))?;
        one.unlock(Lock::exclusive(0, 100))?;
        must(&two, Lock::exclusive(0, 100))?;
        must_not(&two, Lock::exclusive(200, 1))?;
        whole_one.close()?;
        must(&whole_two, Lock::flock(Kind::Exclusive))?;
        must_not_complain(&[&c1, &c2])?;
        server.kill()?;
        Ok(())
    })
}

#[test]
fn waiters() -> Result<()> {
    in_lab("waiters", |lab| {
        let _server = lab.host("s1").serve()?;
        let (c1, c2) = (locking_client(lab, "c1")?, locking_client(lab, "c2")?);
        let (here, there) = (c1.locker()?, c2.locker()?);
        a_waiter_is_woken(&here, &there)?;
        who_came_first_is_served_first(&here, &there)?;
        who_gives_up_leaves_nothing(&here, &there)?;
        grants_are_fast(&here, &there)?;
        must_not_complain(&[&c1, &c2])
    })
}

fn a_waiter_is_woken(here: &Locker<'_>, there: &Locker<'_>) -> Result<()> {
    let range = Lock::exclusive(0, 100);
    for lock in [range, Lock::flock(Kind::Exclusive)] {
        let path = "/mnt/woken";
        let waiter = there.actor(path)?;
        let holder = here.actor(path)?;
        must(&holder, lock)?;
        waiter.ask_blocked(lock)?;
        holder.unlock(lock)?;
        waiter.acquired(GRANT_TIME_MAX).context("by an unlock")?;
        waiter.unlock(lock)?;

        must(&holder, lock)?;
        waiter.ask_blocked(lock)?;
        holder.close()?;
        waiter.acquired(GRANT_TIME_MAX).context("by a close")?;
        waiter.unlock(lock)?;

        let holder = here.actor(path)?;
        must(&holder, lock)?;
        waiter.ask_blocked(lock)?;
        holder.kill()?;
        waiter.acquired(GRANT_TIME_MAX).context("by the end")?;
        waiter.close()?;
    }

    // Both shared waiters are woken at once, and by a part of the range they wait for.
    let holder = here.actor("/mnt/woken")?;
    let waiters = [there.actor("/mnt/woken")?, there.actor("/mnt/woken")?];
    must(&holder, range)?;
    for waiter in &waiters {
        waiter.ask_blocked(Lock::shared(50, 10))?;
    }
    holder.unlock(Lock::exclusive(0, 50))?;
    for waiter in &waiters {
        waiter.still_blocked()?;
    }
    holder.unlock(Lock::exclusive(50, 10))?;
    for waiter in &waiters {
        waiter.acquired(GRANT_TIME_MAX).context("shared")?;
        waiter.close()?;
    }
    holder.close()?;
    Ok(())
}

fn who_came_first_is_served_first(here: &Locker<'_>, there: &Locker<'_>) -> Result<()> {
    let (path, lock) = ("/mnt/order", Lock::exclusive(0, 100));
    // A kernel lets its own processes wait for each other before it asks the server, but not if
    // one has a lock of the file and the other wants a range of it.
    let first = here.actor(path)?;
    must(&first, Lock::flock(Kind::Exclusive))?;
    let mut line = Vec::new();
    for locker in [there, here, there, here] {
        let waiter = locker.actor(path)?;
        waiter.ask_blocked(lock)?;
        line.push(waiter);
    }
    let mut holder = first;
    while !line.is_empty() {
        holder.close()?;
        let next = line.remove(0);
        next.acquired(GRANT_TIME_MAX)?;
        for waiter in &line {
            waiter.still_blocked()?;
        }
        holder = next;
    }
    holder.close()?;
    Ok(())
}

fn who_gives_up_leaves_nothing(here: &Locker<'_>, there: &Locker<'_>) -> Result<()> {
    let (path, lock) = ("/mnt/given-up", Lock::exclusive(0, 100));
    let (holder, third) = (here.actor(path)?, here.actor(path)?);
    let waiter = there.actor(path)?;
    for _ in 0..3 {
        must(&holder, lock)?;
        waiter.ask_blocked(lock)?;
        waiter.interrupt()?;
        holder.unlock(lock)?;
        at_once(&third, lock).context("after a SIGINT")?;
        third.unlock(lock)?;
        // Nor is it spoilt for who gave up.
        must(&waiter, lock)?;
        waiter.unlock(lock)?;
    }
    must(&holder, lock)?;
    waiter.ask_blocked(lock)?;
    waiter.kill()?;
    holder.unlock(lock)?;
    at_once(&third, lock).context("after a SIGKILL")?;
    third.unlock(lock)?;
    at_once(&there.actor(path)?, lock)
}

fn grants_are_fast(here: &Locker<'_>, there: &Locker<'_>) -> Result<()> {
    const ROUNDS: usize = 20;
    let (path, lock) = ("/mnt/fast", Lock::exclusive(0, 100));
    let (holder, waiter) = (here.actor(path)?, there.actor(path)?);
    let mut rounds = Vec::new();
    here.read_clock()?;
    there.read_clock()?;
    for _ in 0..ROUNDS {
        must(&holder, lock)?;
        waiter.ask_blocked(lock)?;
        let released = holder.unlock(lock)?;
        rounds.push((released, waiter.acquired(GRANT_TIME_MAX)?));
        waiter.unlock(lock)?;
    }
    here.read_clock()?;
    there.read_clock()?;
    let (mut latencies, mut error_max) = (Vec::new(), 0);
    for (released, acquired) in &rounds {
        let (from, from_error) = here.ours(released)?;
        let (to, to_error) = there.ours(acquired)?;
        latencies.push(to - from);
        error_max = error_max.max(from_error + to_error);
    }
    latencies.sort_unstable();
    eprintln!(
        "from unlock to grant: median {} us, worst {} us, each +-{error_max} us",
        latencies[ROUNDS / 2],
        latencies[ROUNDS - 1]
    );
    Ok(())
}

#[test]
fn client_reboot() -> Result<()> {
    in_lab("reboot", |lab| {
        let _server = lab.host("s1").serve()?;
        let (c1, c2) = (locking_client(lab, "c1")?, locking_client(lab, "c2")?);
        let there = c2.locker()?;
        let (waiter, other) = (there.actor("/mnt/f")?, there.actor("/mnt/f")?);
        let here = c1.locker()?;
        must(&here.actor("/mnt/f")?, Lock::exclusive(0, 100))?;
        must(&here.actor("/mnt/f")?, Lock::shared(200, 100))?;
        waiter.ask_blocked(Lock::exclusive(0, 10))?;

        c1.kill()?;
        drop(here);
        waiter.still_blocked()?;
        must_not(&other, Lock::exclusive(200, 1))?;
        let power_back = Instant::now();
        c1.reset()?;
        waiter.acquired(NOTIFY_TIME_MAX)?;
        let waited = power_back.elapsed();
        eprintln!("granted {waited:?} at most after the power was back");
        must(&other, Lock::exclusive(200, 100))?;

        // In its new life it is a client like any other.
        c1.mount_with_locks("s1", EXPORT)?;
        let here = c1.locker()?;
        let one = here.actor("/mnt/f")?;
        must_not(&one, Lock::exclusive(0, 1))?;
        must(&one, Lock::exclusive(50, 1))?;
        one.ask_blocked(Lock::exclusive(0, 10))?;
        waiter.close()?;
        one.acquired(GRANT_TIME_MAX)?;
        must_not_complain(&[&c1, &c2])
    })
}

/// A status monitor that is started anew on a living client says that the client has rebooted: its
/// locks stay. And the client is asked what it knows of its locks.
#[test]
fn living_client() -> Result<()> {
    in_lab("living", |lab| {
        let s1 = lab.host("s1");
        let mut server = s1.serve()?;
        let (c1, c2) = (locking_client(lab, "c1")?, locking_client(lab, "c2")?);
        let (here, there) = (c1.locker()?, c2.locker()?);
        let (one, two, other) = (
            here.actor("/mnt/f")?,
            here.actor("/mnt/f")?,
            there.actor("/mnt/f")?,
        );
        must(&one, Lock::exclusive(0, 10))?;
        must(&two, Lock::shared(100, 10))?;
        c1.sh("sm-notify -f")?;
        server.wait_for_line("a notice of a reboot is not believed", NOTIFY_TIME_MAX)?;
        must_not(&other, Lock::exclusive(0, 1))?;
        must_not(&other, Lock::exclusive(100, 1))?;
        let havenfs = havenfs_binary()?.display().to_string();
        let listed = s1.sh(&format!("{havenfs} locks list"))?;
        ensure!(
            listed
                .matches("a notice of a reboot was not believed")
                .count()
                == 2,
            "{listed}"
        );

        // Twice: a client passes over a number that it has seen.
        for _ in 0..2 {
            let verified = s1.sh(&format!("{havenfs} locks verify 10.77.0.11"))?;
            let all = "holds 2 locks and has reclaimed 2";
            ensure!(verified.contains(all), "{verified}");
        }
        let listed = s1.sh(&format!("{havenfs} locks list"))?;
        ensure!(!listed.contains("suspect"), "{listed}");
        two.unlock(Lock::shared(100, 10))?;
        must(&other, Lock::exclusive(100, 10))?;
        must_not_complain(&[&c1, &c2])
    })
}

#[test]
fn restart_under_traffic() -> Result<()> {
    const ROUNDS: usize = 10;
    in_lab("lock-traffic", |lab| {
        let s1 = lab.host("s1");
        let mut server = s1.serve()?;
        let clients = [locking_client(lab, "c1")?, locking_client(lab, "c2")?];
        // A client that gets no answer connects anew after 3 s at the earliest. So a third one,
        // which asks nothing while the server is down, shows when the server gives new locks.
        let quiet = locking_client(lab, "c3")?;
        let quiet_locker = quiet.locker()?;
        let fresh = [
            quiet_locker.actor("/mnt/fresh")?,
            quiet_locker.actor("/mnt/fresher")?,
        ];
        let other = quiet_locker.actor(LONG)?;

        let lockers = [clients[0].locker()?, clients[1].locker()?];
        let (mut holder, mut waiter) = (lockers[0].actor(LONG)?, lockers[1].actor(LONG)?);
        let mut random = Random::seeded();
        let seed = random.below(1 << 32);
        let mut workers = Workers::start(&clients, WORKERS, seed)?;
        must(&holder, ALL)?;
        for round in 0..ROUNDS {
            eprintln!("round {round}");
            waiter.ask_blocked(ALL)?;
            workers.wait_for_locks(LOCKS_MIN + random.below(LOCKS_MIN as u64 * 5) as usize)?;
            server.kill()?;
            server = s1.serve()?;
            gets_a_new_lock(&fresh, Lock::exclusive(round as u64, 1))?;
            must_not(&other, ALL)?;

            holder.unlock(ALL)?;
            waiter.acquired(RECONNECT_TIME_MAX)?;
            std::mem::swap(&mut holder, &mut waiter);
            workers.read_clocks()?;
        }
        workers.wait_for_locks(LOCKS_MIN * 3)?;
        let traffic = workers.end()?;
        let found = judge(&traffic, &s1)?;
        ensure!(found.is_empty(), "{found:#?}");
        let mut held = traffic.iter().flat_map(|part| &part.held);
        let forgotten = held.find(|held| held.waited > RECONNECT_TIME_MAX.as_micros() as i64);
        ensure!(forgotten.is_none(), "waited too long: {forgotten:?}");
        must_not_complain(&[&clients[0], &clients[1], &quiet])
    })
}

#[test]
fn locks_that_do_not_reach_the_server_are_found_out() -> Result<()> {
    in_lab("no-locks", |lab| {
        let s1 = lab.host("s1");
        let _server = s1.serve()?;
        let clients = [lab.client("c1")?, lab.client("c2")?];
        for client in &clients {
            client.mount("s1", EXPORT)?;
        }
        let workers = Workers::start(&clients, WORKERS, 1)?;
        workers.wait_for_locks(LOCKS_MIN * 10)?;
        let found = judge(&workers.end()?, &s1)?;
        for sign in [OVERLAP, "counter", "torn"] {
            let count = found.iter().filter(|line| line.contains(sign)).count();
            eprintln!("{count} lines with `{sign}`");
            ensure!(count > 0, "locks are not shared, but: {found:#?}");
        }
        Ok(())
    })
}

#[test]
fn locks_that_the_server_forgets_are_found_out() -> Result<()> {
    in_lab("forgotten", |lab| {
        let s1 = lab.host("s1");
        let _server = s1.serve_with_fault("forget-grant")?;
        let clients = [locking_client(lab, "c1")?, locking_client(lab, "c2")?];
        let seed = Random::seeded().below(1 << 32);
        // One in each: a kernel that is told that two of its processes have a lock makes one wait
        // for the other, and a signal that ends the wait may leave a lock that nobody has.
        let workers = Workers::start(&clients, 1, seed)?;
        workers.wait_for_locks(LOCKS_MIN * 20)?;
        let found = judge(&workers.end()?, &s1)?;
        let overlaps = found.iter().filter(|line| line.contains(OVERLAP)).count();
        eprintln!("{} violations, {overlaps} of them overlaps", found.len());
        ensure!(overlaps > 0, "locks were forgotten, but: {found:#?}");
        Ok(())
    })
}

/// What went wrong in the traffic of all clients on the file that a server exports.
fn judge(traffic: &[Traffic], server: &Host<'_>) -> Result<Vec<String>> {
    violations(traffic, &server.sh(&format!("cat {EXPORT}/traffic"))?)
}

/// Boots a client that mounts with locks.
fn locking_client<'lab>(lab: &'lab Lab, name: &str) -> Result<Vm<'lab>> {
    let machine = Machine {
        locks: true,
        ..Machine::default()
    };
    let client = lab.boot(name, &machine)?;
    client.mount_with_locks("s1", EXPORT)?;
    Ok(client)
}

#[track_caller]
fn must(actor: &Actor<'_>, lock: Lock) -> Result<()> {
    let caller = std::panic::Location::caller();
    if !actor.try_lock(lock)? {
        let conflict = actor.conflict(lock)?;
        bail!("{caller}: {actor} must get {lock:?}, but there is {conflict:?}");
    }
    Ok(())
}

#[track_caller]
fn must_not(actor: &Actor<'_>, lock: Lock) -> Result<()> {
    let caller = std::panic::Location::caller();
    ensure!(!actor.try_lock(lock)?, "{caller}: {actor} got {lock:?}");
    Ok(())
}

/// Gets a lock that nobody has; a call that drops it may still be under way.
fn at_once(actor: &Actor<'_>, lock: Lock) -> Result<()> {
    let deadline = Instant::now() + NEW_LOCK_TIME_MAX;
    while !actor.try_lock(lock)? {
        ensure!(Instant::now() < deadline, "{actor} does not get {lock:?}");
    }
    Ok(())
}

/// Gets a lock that nobody has, right after the server has started, on two files of one client.
///
/// A Linux client that is told of the restart meanwhile makes its own processes wait, for 5 s or
/// until a request that comes later is answered; the second process makes such a request.
fn gets_a_new_lock(actors: &[Actor<'_>; 2], lock: Lock) -> Result<()> {
    let ready = Instant::now();
    actors[0].ask(lock)?;
    let is_held_up = actors[0].acquired(NEW_LOCK_TIME_MAX / 2).is_err();
    if is_held_up {
        must(&actors[1], lock)?;
    }
    let waited = ready.elapsed();
    eprintln!("new lock {waited:?} after the restart");
    ensure!(waited < NEW_LOCK_TIME_MAX, "no new lock for {waited:?}");
    if is_held_up {
        actors[0].acquired(GRANT_TIME_MAX)?;
    }
    Ok(())
}

/// Waits until a client that had heard so many notices of a server's restart hears another.
fn wait_for_notice(client: &Vm<'_>, before: usize) -> Result<()> {
    let deadline = Instant::now() + NOTIFY_TIME_MAX;
    while client.notices()? == before {
        ensure!(
            Instant::now() < deadline,
            "no SM_NOTIFY reached {}",
            client.name()
        );
        std::thread::sleep(POLL);
    }
    Ok(())
}

fn must_not_complain(clients: &[&Vm<'_>]) -> Result<()> {
    for client in clients {
        let complaints = client.lock_complaints()?;
        ensure!(complaints.is_empty(), "{}: {complaints:#?}", client.name());
    }
    Ok(())
}

/// A file whose one lock is handed over in each round.
const LONG: &str = "/mnt/long";
/// What tells that two processes held locks at once.
const OVERLAP: &str = " us from ";
const ALL: Lock = Lock::exclusive(0, 0);
/// The last byte that a lock can name.
const OFFSET_MAX: u64 = i64::MAX as u64;
/// In each client.
const WORKERS: usize = 3;
/// How many locks each client gets before a kill, at least.
const LOCKS_MIN: usize = 20;
/// A lock that nobody else has, right after a restart.
const NEW_LOCK_TIME_MAX: Duration = Duration::from_secs(1);
/// Much shorter than the half minute after which a Linux client asks again by itself.
const GRANT_TIME_MAX: Duration = Duration::from_secs(5);
/// From a reboot to the last of its notices.
const NOTIFY_TIME_MAX: Duration = Duration::from_secs(20);
/// A client that was refused a connection waits longer each time; shorter than half a minute too.
const RECONNECT_TIME_MAX: Duration = Duration::from_secs(25);
const POLL: Duration = Duration::from_millis(20);

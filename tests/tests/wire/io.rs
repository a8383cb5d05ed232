//! READ, WRITE and COMMIT.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use anyhow::{Result, ensure};
use havenfs_tests::client::nfs::{
    DATA_SYNC, FILE_SYNC, How, UNSTABLE, procedure, unpack, write_args,
};
use havenfs_tests::client::{Cred, Outcome, Sattr};
use nfs3_types::nfs3::{WRITE3res, nfsstat3, stable_how};

use super::scene::{OPEN, Scene, is_root, made, ok, status};

const MIB: u32 = 1 << 20;

/// Bytes that differ at every place.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8)
        .collect()
}

#[test]
fn read_returns_what_is_there_and_says_when_it_ends() -> Result<()> {
    let mut s = Scene::new()?;
    let data = pattern(10_001);
    let fh = s.file("f", &data)?;
    for (at, count) in [
        (0, 10_001),
        (0, 10_002),
        (0, MIB),
        (1, 4096),
        (4095, 3),
        (9_999, 1),
        (9_999, 2),
        (10_000, 1),
        (10_001, 1),
        (10_001, 0),
        (0, 0),
        (20_000, 5),
        (i64::MAX as u64 - 1, 5),
        (1 << 63, 5),
        (u64::MAX, MIB),
    ] {
        let got = ok(s.nfs.read(&fh, at, count)?)?;
        let start = usize::try_from(at).unwrap_or(usize::MAX).min(data.len());
        let end = start.saturating_add(count as usize).min(data.len());
        let expected = data.get(start..end).unwrap_or_default();
        ensure!(
            got.data.as_ref() == expected,
            "{at}+{count}: {} bytes",
            got.data.len()
        );
        ensure!(
            got.count as usize == expected.len(),
            "{at}+{count}: count {}",
            got.count
        );
        let eof = at.saturating_add(u64::from(count)) >= 10_001;
        ensure!(got.eof == eof, "{at}+{count}: eof {}", got.eof);
    }
    Ok(())
}

#[test]
fn a_read_above_rtmax_is_short() -> Result<()> {
    let mut s = Scene::new()?;
    let data = pattern(3 * MIB as usize);
    let fh = s.file("f", &data)?;
    let rtmax = ok(s.nfs.fsinfo(&s.root)?)?.rtmax;
    for count in [rtmax, rtmax + 1, 2 * rtmax, u32::MAX] {
        let got = ok(s.nfs.read(&fh, 5, count)?)?;
        ensure!(
            got.count == rtmax && !got.eof,
            "{count}: {} {}",
            got.count,
            got.eof
        );
        ensure!(got.data.as_ref() == &data[5..5 + rtmax as usize]);
    }
    Ok(())
}

#[test]
fn writes_of_any_alignment_land_where_they_belong() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.create("f")?;
    let mut model = Vec::new();
    let data = pattern(70_000);
    for (at, len) in [
        (0, 1),
        (1, 3),
        (4095, 2),
        (3, 4096),
        (10_000, 1),
        (5, 65_537),
        (0, 70_000),
    ] {
        let part = &data[..len];
        let done = ok(s.nfs.write(&fh, at as u64, UNSTABLE, part)?)?;
        ensure!(done.count as usize == len);
        model.resize(model.len().max(at + len), 0);
        model[at..at + len].copy_from_slice(part);
        ensure!(fs::read(s.path("f"))? == model, "after {at}+{len}");
    }
    Ok(())
}

#[test]
fn stable_levels_and_verifiers() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.create("f")?;
    let other = s.create("g")?;
    let mut verifiers = Vec::new();
    for (asked, least) in [
        (UNSTABLE, stable_how::UNSTABLE),
        (DATA_SYNC, stable_how::DATA_SYNC),
        (FILE_SYNC, stable_how::FILE_SYNC),
    ] {
        let done = ok(s.nfs.write(&fh, 0, asked, b"data")?)?;
        ensure!(
            done.committed as u32 >= least as u32,
            "{asked}: {}",
            done.committed
        );
        verifiers.push(done.verf.0);
    }
    verifiers.push(ok(s.nfs.write(&other, 0, UNSTABLE, b"data")?)?.verf.0);
    for (at, count) in [(0, 0), (0, 4), (2, 0), (100, 100), (i64::MAX as u64 - 1, 1)] {
        verifiers.push(ok(s.nfs.commit(&fh, at, count)?)?.verf.0);
    }
    let first = verifiers[0];
    ensure!(
        verifiers.iter().all(|verifier| *verifier == first),
        "{verifiers:x?}"
    );
    // After a restart the client must learn that unstable data may be gone.
    let Scene { site, server, .. } = s;
    server.kill()?;
    let server = site.serve(OPEN)?;
    let mut nfs = server.nfs(Cred::user(super::scene::plain_user().0, 0))?;
    let after = ok(nfs.commit(&fh, 0, 0)?)?.verf.0;
    ensure!(after != first, "the verifier is the same after a restart");
    ensure!(ok(nfs.write(&fh, 0, UNSTABLE, b"data")?)?.verf.0 == after);
    Ok(())
}

/// A count below the data writes as much as it says, above it contradicts itself.
#[test]
fn count_and_data_of_a_write_may_differ() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.create("f")?;
    let less = write_args(&fh, 0, 3, FILE_SYNC, b"012345");
    let done: WRITE3res = unpack(&s.nfs.outcome(procedure::WRITE, &less)?.results()?)?;
    ensure!(ok(done)?.count == 3);
    ensure!(fs::read(s.path("f"))? == b"012");
    let more = write_args(&fh, 0, 7, FILE_SYNC, b"345678".as_slice());
    match s.nfs.outcome(procedure::WRITE, &more)? {
        Outcome::GarbageArgs => {}
        Outcome::Success(results) => {
            let done: WRITE3res = unpack(&results)?;
            ensure!(status(&done) == nfsstat3::NFS3ERR_INVAL);
        }
        other => anyhow::bail!("{other:?}"),
    }
    ensure!(fs::read(s.path("f"))? == b"012");
    let stable = write_args(&fh, 0, 1, 3, b"x");
    ensure!(s.nfs.outcome(procedure::WRITE, &stable)? == Outcome::GarbageArgs);
    let nothing = ok(s.nfs.write(&fh, 1 << 40, FILE_SYNC, b"")?)?;
    ensure!(nothing.count == 0);
    ensure!(
        fs::metadata(s.path("f"))?.len() == 3,
        "a write of nothing made the file longer"
    );
    Ok(())
}

#[test]
fn a_write_above_wtmax_is_short_or_closed() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.create("f")?;
    let wtmax = ok(s.nfs.fsinfo(&s.root)?)?.wtmax;
    let data = pattern(wtmax as usize + 1000);
    let done = ok(s.nfs.write(&fh, 0, UNSTABLE, &data)?)?;
    ensure!(done.count == wtmax, "{}", done.count);
    ensure!(fs::read(s.path("f"))? == data[..wtmax as usize]);
    Ok(())
}

#[test]
fn offsets_near_and_beyond_the_largest() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.create("f")?;
    let most = i64::MAX as u64;
    for (at, data) in [
        (most, &b"x"[..]),
        (most - 1, b"xy"),
        (1 << 63, b"x"),
        (u64::MAX, b"x"),
        (u64::MAX - 1, b"xyz"),
    ] {
        let got = status(&s.nfs.write(&fh, at, UNSTABLE, data)?);
        let refused = [nfsstat3::NFS3ERR_FBIG, nfsstat3::NFS3ERR_INVAL];
        ensure!(refused.contains(&got), "{at:#x}: {got}");
    }
    for (at, count) in [(u64::MAX, 1), (u64::MAX - 1, 2), (1 << 63, 1)] {
        let got = status(&s.nfs.commit(&fh, at, count)?);
        ensure!(
            got == nfsstat3::NFS3ERR_INVAL,
            "COMMIT {at:#x}+{count}: {got}"
        );
    }
    // The file system's own bound is a clean refusal too.
    let size = fs::metadata(s.path("f"))?.len();
    ensure!(size == 0, "{size}");
    let got = status(&s.nfs.setattr(&fh, &Sattr::size(most), None)?);
    ensure!(
        matches!(got, nfsstat3::NFS3_OK | nfsstat3::NFS3ERR_FBIG),
        "{got}"
    );
    Ok(())
}

#[test]
fn files_beyond_4_gib_and_sparse() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.create("f")?;
    let at = (5 << 30) + 123;
    ok(s.nfs.write(&fh, at, FILE_SYNC, b"far away")?)?;
    let attributes = s.nfs.attributes(&fh)?;
    ensure!(attributes.size == at + 8);
    ensure!(attributes.used < 1 << 20, "used {}", attributes.used);
    ensure!(ok(s.nfs.read(&fh, at, 100)?)?.data.as_ref() == b"far away");
    let hole = ok(s.nfs.read(&fh, (1 << 32) - 5, 10)?)?;
    ensure!(hole.data.as_ref() == [0; 10] && !hole.eof);
    let mut last = [0; 8];
    File::open(s.path("f"))?.read_exact_at(&mut last, at)?;
    ensure!(&last == b"far away");
    ok(s.nfs.setattr(&fh, &Sattr::size(6 << 30), None)?)?;
    ensure!(s.nfs.attributes(&fh)?.size == 6 << 30);
    ensure!(ok(s.nfs.read(&fh, (6 << 30) - 1, 10)?)?.eof);
    Ok(())
}

/// Opening a FIFO would wait for its other end, and a device may act.
#[test]
fn what_is_no_file_is_never_opened() -> Result<()> {
    let mut s = Scene::new()?;
    let fifo = s.fifo("p")?;
    let link = s.link("l", "p")?;
    let dir = s.dir("d")?;
    for (fh, expected) in [
        (&fifo, nfsstat3::NFS3ERR_INVAL),
        (&link, nfsstat3::NFS3ERR_INVAL),
        (&dir, nfsstat3::NFS3ERR_ISDIR),
    ] {
        ensure!(status(&s.nfs.read(fh, 0, 10)?) == expected);
        ensure!(status(&s.nfs.write(fh, 0, UNSTABLE, b"x")?) == expected);
        ensure!(status(&s.nfs.commit(fh, 0, 0)?) == expected);
        ensure!(status(&s.nfs.setattr(fh, &Sattr::size(0), None)?) == expected);
    }
    // It is refused where the name is found again, too.
    let taken = s
        .nfs
        .create(&s.root, b"p", How::Unchecked(Sattr::size(0)))?;
    ensure!(status(&taken) == nfsstat3::NFS3ERR_EXIST);
    // Nobody waits for the other end: attributes are still there.
    s.nfs.attributes(&fifo)?;
    Ok(())
}

#[test]
fn what_one_client_writes_another_reads_at_once() -> Result<()> {
    let mut s = Scene::new()?;
    let fh = s.create("f")?;
    let mut other = s.client(s.cred())?;
    for round in 0..50u32 {
        let data = round.to_be_bytes().repeat(1000);
        ok(s.nfs.write(&fh, 0, UNSTABLE, &data)?)?;
        ensure!(ok(other.read(&fh, 0, 4000)?)?.data.as_ref() == data);
    }
    Ok(())
}

#[test]
fn a_write_to_a_file_whose_name_moved_still_lands() -> Result<()> {
    let mut s = Scene::new()?;
    let dir = s.dir("d")?;
    let fh = made(
        s.nfs
            .create(&s.root, b"a", How::Guarded(Sattr::mode(0o644)))?,
        |ok| &ok.obj,
    )?;
    ok(s.nfs.write(&fh, 0, UNSTABLE, b"one")?)?;
    ok(s.nfs.rename((&s.root, b"a"), (&dir, b"b"))?)?;
    ok(s.nfs.write(&fh, 3, UNSTABLE, b"two")?)?;
    ok(s.nfs.commit(&fh, 0, 0)?)?;
    ensure!(fs::read(s.path("d/b"))? == b"onetwo");
    Ok(())
}

#[test]
fn fsinfo_fsstat_and_pathconf_tell_real_values() -> Result<()> {
    let mut s = Scene::new()?;
    let info = ok(s.nfs.fsinfo(&s.root)?)?;
    ensure!(info.rtmax == MIB && info.rtpref == MIB && info.wtmax == MIB && info.wtpref == MIB);
    ensure!(info.rtmult == 4096 && info.wtmult == 4096);
    ensure!(
        (4096..=MIB).contains(&info.dtpref),
        "dtpref {}",
        info.dtpref
    );
    ensure!(info.maxfilesize >= 1 << 40 && i64::try_from(info.maxfilesize).is_ok());
    ensure!(info.properties == 0x1b, "properties {:#x}", info.properties);
    ensure!((info.time_delta.seconds, info.time_delta.nseconds) == (0, 1));
    let stat = ok(s.nfs.fsstat(&s.root)?)?;
    let real = rustix::fs::statvfs(s.path(""))?;
    ensure!(stat.tbytes == real.f_blocks * real.f_frsize);
    ensure!(stat.fbytes <= stat.tbytes && stat.abytes <= stat.fbytes);
    ensure!(stat.tfiles == real.f_files && stat.ffiles <= stat.tfiles);
    ensure!(stat.afiles <= stat.ffiles && stat.invarsec == 0);
    let conf = ok(s.nfs.pathconf(&s.root)?)?;
    ensure!(conf.name_max == 255 && conf.linkmax >= 127);
    ensure!(conf.no_trunc && conf.chown_restricted);
    ensure!(!conf.case_insensitive && conf.case_preserving);
    ensure!(is_root() || conf.linkmax > 0);
    Ok(())
}

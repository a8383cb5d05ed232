//! READDIR and READDIRPLUS: pages of any size, cookies, and what each entry tells.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;

use anyhow::{Result, bail, ensure};
use havenfs_tests::client::nfs::{args, procedure, unpack};
use havenfs_tests::client::{Nfs, Outcome};
use nfs3_types::nfs3::{Nfs3Option, Nfs3Result, READDIR3res, READDIRPLUS3res, nfsstat3};

use super::scene::{Scene, ok, status};

/// An entry as both procedures have it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    name: String,
    fileid: u64,
    cookie: u64,
}

/// One page: its entries, eof, and how long the results were.
type Page = (Vec<Entry>, bool, usize);

fn readdir(nfs: &mut Nfs, dir: &[u8], cookie: u64, count: u32) -> Result<Result<Page, nfsstat3>> {
    let args = args(|w| {
        w.opaque(dir);
        w.u64(cookie);
        w.u64(0);
        w.u32(count);
    });
    let results = nfs.outcome(procedure::READDIR, &args)?.results()?;
    Ok(match unpack::<READDIR3res<'static>>(&results)? {
        Nfs3Result::Err((status, _)) => Err(status),
        Nfs3Result::Ok(ok) => {
            let entries = ok.reply.entries.0.iter().map(|entry| Entry {
                name: String::from_utf8_lossy(entry.name.as_ref()).into_owned(),
                fileid: entry.fileid,
                cookie: entry.cookie,
            });
            Ok((entries.collect(), ok.reply.eof, results.len()))
        }
    })
}

fn readdirplus(
    nfs: &mut Nfs,
    dir: &[u8],
    cookie: u64,
    dircount: u32,
    maxcount: u32,
) -> Result<Result<Page, nfsstat3>> {
    let args = args(|w| {
        w.opaque(dir);
        w.u64(cookie);
        w.u64(0);
        w.u32(dircount);
        w.u32(maxcount);
    });
    let results = nfs.outcome(procedure::READDIRPLUS, &args)?.results()?;
    Ok(match unpack::<READDIRPLUS3res<'static>>(&results)? {
        Nfs3Result::Err((status, _)) => Err(status),
        Nfs3Result::Ok(ok) => {
            let entries = ok.reply.entries.0.iter().map(|entry| Entry {
                name: String::from_utf8_lossy(entry.name.as_ref()).into_owned(),
                fileid: entry.fileid,
                cookie: entry.cookie,
            });
            Ok((entries.collect(), ok.reply.eof, results.len()))
        }
    })
}

/// Reads a whole directory page by page.
fn list(
    mut page: impl FnMut(u64) -> Result<Result<Page, nfsstat3>>,
    most: u32,
) -> Result<Vec<Entry>> {
    let mut all: Vec<Entry> = Vec::new();
    let mut cookie = 0;
    loop {
        let (entries, eof, len) = match page(cookie)? {
            Ok(page) => page,
            Err(status) => bail!("{status}"),
        };
        // Without the status, which is not part of the RFC's "resok".
        ensure!(len - 4 <= most as usize, "a page of {len} bytes for {most}");
        ensure!(
            eof || !entries.is_empty(),
            "an empty page that is not the last"
        );
        if let Some(last) = entries.last() {
            cookie = last.cookie;
        }
        all.extend(entries);
        if eof {
            return Ok(all);
        }
    }
}

fn names(entries: &[Entry]) -> Result<BTreeSet<String>> {
    let names: BTreeSet<String> = entries.iter().map(|entry| entry.name.clone()).collect();
    ensure!(names.len() == entries.len(), "a name twice");
    let cookies: BTreeSet<u64> = entries.iter().map(|entry| entry.cookie).collect();
    ensure!(cookies.len() == entries.len(), "a cookie twice");
    ensure!(!cookies.contains(&0), "the cookie of the start");
    ensure!(
        cookies.iter().all(|cookie| i64::try_from(*cookie).is_ok()),
        "a negative cookie"
    );
    Ok(names)
}

/// A directory with files of names of many lengths; returns its handle and all names.
fn filled(s: &mut Scene, count: usize) -> Result<(Vec<u8>, BTreeSet<String>)> {
    let dir = s.dir("d")?;
    let mut names = BTreeSet::from([".".to_owned(), "..".to_owned()]);
    for number in 0..count {
        let name = format!("{number}{}", "n".repeat(number % 60));
        fs::write(s.path("d").join(&name), "")?;
        names.insert(name);
    }
    Ok((dir, names))
}

#[test]
fn pages_of_any_size_make_the_same_list() -> Result<()> {
    let mut s = Scene::new()?;
    let (dir, expected) = filled(&mut s, 300)?;
    let whole = list(|at| readdir(&mut s.nfs, &dir, at, 1 << 20), 1 << 20)?;
    ensure!(names(&whole)? == expected);
    for count in [232, 300, 512, 777, 1024, 4096, 8192, 65_536] {
        let paged = list(|at| readdir(&mut s.nfs, &dir, at, count), count)?;
        ensure!(paged == whole, "READDIR in pages of {count}");
    }
    for (dircount, maxcount) in [
        (100, 512),
        (512, 1024),
        (512, 4096),
        (0, 8192),
        (8192, 32_768),
        (1 << 20, 1 << 20),
    ] {
        let paged = list(
            |at| readdirplus(&mut s.nfs, &dir, at, dircount, maxcount),
            maxcount,
        )?;
        ensure!(
            paged == whole,
            "READDIRPLUS in pages of {dircount} and {maxcount}"
        );
    }
    Ok(())
}

#[test]
fn every_cookie_continues_behind_its_entry() -> Result<()> {
    let mut s = Scene::new()?;
    let (dir, _) = filled(&mut s, 100)?;
    let whole = list(|at| readdir(&mut s.nfs, &dir, at, 8192), 8192)?;
    for (index, entry) in whole.iter().enumerate() {
        match readdir(&mut s.nfs, &dir, entry.cookie, 1 << 16)? {
            Ok((rest, true, _)) => ensure!(rest == whole[index + 1..], "behind {}", entry.name),
            other => bail!("behind {}: {other:?}", entry.name),
        }
    }
    Ok(())
}

#[test]
fn dircount_bounds_names_and_maxcount_the_whole() -> Result<()> {
    let mut s = Scene::new()?;
    let (dir, _) = filled(&mut s, 200)?;
    for dircount in [64, 200, 1000] {
        let page = readdirplus(&mut s.nfs, &dir, 0, dircount, 1 << 18)?;
        let Ok((entries, false, _)) = page else {
            bail!("{page:?}")
        };
        let bytes: usize = entries
            .iter()
            .map(|entry| 4 + 8 + 4 + entry.name.len().next_multiple_of(4) + 8)
            .sum();
        // One entry is always there, whatever it is bounded to.
        ensure!(
            entries.len() == 1 || bytes <= dircount as usize,
            "{bytes} for {dircount}"
        );
    }
    Ok(())
}

#[test]
fn a_page_without_room_for_an_entry_is_too_small() -> Result<()> {
    let mut s = Scene::new()?;
    let (dir, _) = filled(&mut s, 10)?;
    for count in [0, 1, 4, 100, 120] {
        let got = readdir(&mut s.nfs, &dir, 0, count)?;
        ensure!(got == Err(nfsstat3::NFS3ERR_TOOSMALL), "{count}: {got:?}");
        let got = readdirplus(&mut s.nfs, &dir, 0, count, count)?;
        ensure!(
            got == Err(nfsstat3::NFS3ERR_TOOSMALL),
            "plus {count}: {got:?}"
        );
    }
    // A long name in the middle is no end of the directory either.
    fs::write(s.path("d").join("n".repeat(255)), "")?;
    let mut cookie = 0;
    loop {
        match readdir(&mut s.nfs, &dir, cookie, 240)? {
            Ok((entries, eof, _)) => {
                ensure!(!eof, "the long name was left out");
                ensure!(!entries.is_empty(), "an empty page");
                cookie = entries.last().map_or(0, |entry| entry.cookie);
            }
            Err(status) => {
                ensure!(status == nfsstat3::NFS3ERR_TOOSMALL, "{status}");
                return Ok(());
            }
        }
    }
}

#[test]
fn a_cookie_outlives_its_entry() -> Result<()> {
    let mut s = Scene::new()?;
    let (dir, expected) = filled(&mut s, 400)?;
    let mut seen = BTreeSet::new();
    let mut cookie = 0;
    // Remove everything that a page has shown before asking for the next one, as `rm -r` does.
    loop {
        let (entries, eof, _) = match readdir(&mut s.nfs, &dir, cookie, 1024)? {
            Ok(page) => page,
            Err(status) => bail!("{status}"),
        };
        for entry in &entries {
            ensure!(seen.insert(entry.name.clone()), "{} twice", entry.name);
            if !entry.name.starts_with('.') {
                ok(s.nfs.remove(&dir, entry.name.as_bytes())?)?;
            }
        }
        cookie = entries.last().map_or(cookie, |entry| entry.cookie);
        if eof {
            break;
        }
    }
    ensure!(
        seen == expected,
        "{} of {} seen",
        seen.len(),
        expected.len()
    );
    let rest = list(|at| readdir(&mut s.nfs, &dir, at, 1024), 1024)?;
    ensure!(names(&rest)?.len() == 2, "{rest:?}");
    Ok(())
}

#[test]
fn cookies_survive_a_restart() -> Result<()> {
    let mut s = Scene::new()?;
    let (dir, _) = filled(&mut s, 100)?;
    let whole = list(|at| readdir(&mut s.nfs, &dir, at, 8192), 8192)?;
    let (cred, middle) = (s.cred(), whole[50].cookie);
    let Scene { site, server, .. } = s;
    server.kill()?;
    let server = site.serve(super::scene::OPEN)?;
    let mut nfs = server.nfs(cred)?;
    let Ok((rest, true, _)) = readdir(&mut nfs, &dir, middle, 1 << 16)? else {
        bail!("no last page")
    };
    ensure!(rest == whole[51..]);
    Ok(())
}

#[test]
fn a_large_directory_is_complete() -> Result<()> {
    const COUNT: usize = 20_000;
    let mut s = Scene::new()?;
    let dir = s.dir("d")?;
    for number in 0..COUNT {
        fs::File::create(s.path("d").join(format!("file-{number}")))?;
    }
    let plain = list(|at| readdir(&mut s.nfs, &dir, at, 32_768), 32_768)?;
    ensure!(names(&plain)?.len() == COUNT + 2);
    let plus = list(|at| readdirplus(&mut s.nfs, &dir, at, 8192, 65_536), 65_536)?;
    ensure!(plus == plain);
    Ok(())
}

#[test]
fn entries_tell_what_lookup_tells() -> Result<()> {
    let mut s = Scene::new()?;
    let dir = s.dir("d")?;
    for (name, make) in [
        (
            "f",
            (|p| fs::write(p, "text")) as fn(&std::path::Path) -> std::io::Result<()>,
        ),
        ("e", |p| fs::create_dir(p)),
        ("l", |p| std::os::unix::fs::symlink("text", p)),
    ] {
        make(&s.path("d").join(name))?;
    }
    let page = ok(s.nfs.readdirplus(&dir, 0, 8192, 32_768)?)?;
    ensure!(page.reply.eof && page.reply.entries.0.len() == 5);
    for entry in &page.reply.entries.0 {
        let name = entry.name.as_ref();
        let found = ok(s.nfs.lookup(&dir, name)?)?;
        let Nfs3Option::Some(attributes) = found.obj_attributes else {
            bail!("no attributes in LOOKUP")
        };
        ensure!(entry.fileid == attributes.fileid, "{}", name.escape_ascii());
        if let Nfs3Option::Some(fh) = &entry.name_handle {
            ensure!(fh.data == found.object.data, "{}", name.escape_ascii());
        }
        if let Nfs3Option::Some(shown) = &entry.name_attributes {
            ensure!(shown.ctime == attributes.ctime && shown.fsid == attributes.fsid);
            ensure!(shown.type_ == attributes.type_ && shown.size == attributes.size);
        }
    }
    Ok(())
}

/// ".." of the export's root would tell of a directory outside.
#[test]
fn the_root_has_no_parent() -> Result<()> {
    let mut s = Scene::new()?;
    let own = fs::metadata(s.path(""))?.ino();
    let above = fs::metadata(s.site.path())?.ino();
    let Ok((entries, true, _)) = readdir(&mut s.nfs, &s.root, 0, 4096)? else {
        bail!("no page")
    };
    for entry in entries {
        ensure!(entry.fileid == own && entry.fileid != above, "{entry:?}");
    }
    Ok(())
}

/// Without the right to search, a list has names but no handles.
#[test]
fn handles_need_the_right_to_search() -> Result<()> {
    let mut s = Scene::new()?;
    let (dir, expected) = filled(&mut s, 5)?;
    s.own("d", 0o444)?;
    let page = ok(s.nfs.readdirplus(&dir, 0, 8192, 32_768)?)?;
    ensure!(page.reply.entries.0.len() == expected.len());
    for entry in &page.reply.entries.0 {
        ensure!(entry.name_handle.is_none() && entry.name_attributes.is_none());
    }
    s.own("d", 0o755)?;
    Ok(())
}

#[test]
fn odd_cookies_and_verifiers_do_no_harm() -> Result<()> {
    let mut s = Scene::new()?;
    let (dir, expected) = filled(&mut s, 10)?;
    for cookie in [1, 2, 12_345, i64::MAX as u64, 1 << 63, u64::MAX] {
        match readdir(&mut s.nfs, &dir, cookie, 4096)? {
            Ok((entries, _, _)) => ensure!(entries.len() <= expected.len()),
            Err(status) => ensure!(status == nfsstat3::NFS3ERR_BAD_COOKIE, "{cookie}: {status}"),
        }
    }
    // A verifier of any value: cookies don't depend on it.
    let with_verifier = args(|w| {
        w.opaque(&dir);
        w.u64(0);
        w.u64(0x1234_5678_9abc_def0);
        w.u32(4096);
    });
    let Outcome::Success(results) = s.nfs.outcome(procedure::READDIR, &with_verifier)? else {
        bail!("refused")
    };
    ensure!(status(&unpack::<READDIR3res<'static>>(&results)?) == nfsstat3::NFS3_OK);
    Ok(())
}

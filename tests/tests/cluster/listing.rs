//! A directory that is read page by page while its service goes from node to node: cookies and
//! verifier of one node go on at the next, and no entry is there twice or lost.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result, bail, ensure};
use havenfs_rpc::program;
use havenfs_tests::client::nfs::{args, procedure, unpack};
use havenfs_tests::cluster::client::Client;
use havenfs_tests::cluster::{Cluster, NODES};
use nfs3_types::nfs3::{self, Nfs3Result};

use crate::scene::{ALPHA, ONE};

const ENTRIES: usize = 2000;
/// The bytes of a page: so that there are some between two moves.
const PAGE_BYTES: u32 = 4096;
/// How many pages are read at each node.
const PAGES: usize = 4;
const NFS: (u32, u32) = (program::NFS, program::NFS_VERSION);

/// A listing as a client goes on with it, whoever answers.
struct Listing<'a> {
    client: &'a mut Client,
    dir: &'a [u8],
    plus: bool,
    /// Where it is, and the verifier that came along.
    dir_cookie: u64,
    cookie_verifier: [u8; 8],
    /// How often each name came, and with which file id.
    names: BTreeMap<String, Vec<u64>>,
    is_at_end: bool,
}

impl Listing<'_> {
    /// Reads one page.
    fn page(&mut self) -> Result<()> {
        let args = args(|w| {
            w.opaque(self.dir);
            w.u64(self.dir_cookie);
            w.u64(u64::from_be_bytes(self.cookie_verifier));
            if self.plus {
                w.u32(PAGE_BYTES / 4);
            }
            w.u32(PAGE_BYTES);
        });
        let mut entries = Vec::new();
        if self.plus {
            let results = self.client.nfs.call(NFS, procedure::READDIRPLUS, &args)?;
            match unpack::<nfs3::READDIRPLUS3res<'_>>(&results)? {
                Nfs3Result::Ok(ok) => {
                    self.cookie_verifier = ok.cookieverf.0;
                    self.is_at_end = ok.reply.eof;
                    for entry in ok.reply.entries.0 {
                        entries.push((entry.name.0.to_vec(), entry.fileid, entry.cookie));
                    }
                }
                Nfs3Result::Err((status, _)) => bail!("READDIRPLUS: {status}"),
            }
        } else {
            let results = self.client.nfs.call(NFS, procedure::READDIR, &args)?;
            match unpack::<nfs3::READDIR3res<'_>>(&results)? {
                Nfs3Result::Ok(ok) => {
                    self.cookie_verifier = ok.cookieverf.0;
                    self.is_at_end = ok.reply.eof;
                    for entry in ok.reply.entries.0 {
                        entries.push((entry.name.0.to_vec(), entry.fileid, entry.cookie));
                    }
                }
                Nfs3Result::Err((status, _)) => bail!("READDIR: {status}"),
            }
        }
        for (name, fileid, dir_cookie) in entries {
            let name = String::from_utf8(name)?;
            self.names.entry(name).or_default().push(fileid);
            self.dir_cookie = dir_cookie;
        }
        Ok(())
    }
}

#[test]
fn a_listing_goes_on_over_takeovers_and_moves() -> Result<()> {
    Cluster::run(&ONE, |cluster| {
        let dir = cluster.site.export(ALPHA).join("large");
        fs::create_dir(&dir)?;
        for number in 0..ENTRIES {
            fs::write(dir.join(format!("entry-{number}")), "")?;
        }
        let mut client = Client::new(&cluster.site, "a", 1, ALPHA);
        let fh = client.find(&cluster.site, ALPHA, "large")?;
        for plus in [false, true] {
            let mut listing = Listing {
                client: &mut client,
                dir: &fh,
                plus,
                dir_cookie: 0,
                cookie_verifier: [0; 8],
                names: BTreeMap::new(),
                is_at_end: false,
            };
            let mut at = Vec::new();
            for is_killed in [true, false, true] {
                for _ in 0..PAGES {
                    listing.page()?;
                }
                ensure!(!listing.is_at_end, "the directory is too small");
                let serving = cluster.wait_serving(ALPHA, |_| true)?;
                at.push((serving.node, listing.names.len()));
                if is_killed {
                    cluster.kill(serving.node)?;
                    cluster.wait_serving(ALPHA, |now| now.epoch > serving.epoch)?;
                    cluster.restart(serving.node)?;
                } else {
                    let to = NODES.into_iter().find(|node| *node != serving.node);
                    cluster.move_to(ALPHA, to.context("another node")?)?;
                }
            }
            while !listing.is_at_end {
                listing.page()?;
            }
            println!("plus: {plus}; node, and how many entries were read when it left: {at:?}");
            let [dot, dots] = [".", ".."].map(|name| listing.names.remove(name));
            ensure!(dot.is_some_and(|ids| ids.len() == 1));
            ensure!(dots.is_some_and(|ids| ids.len() == 1));
            let twice = listing.names.iter().find(|(_, ids)| ids.len() != 1);
            ensure!(twice.is_none(), "{twice:?} came twice");
            for number in 0..ENTRIES {
                let name = format!("entry-{number}");
                let found = listing.names.remove(&name);
                ensure!(found.is_some(), "{name} is lost");
            }
            ensure!(listing.names.is_empty(), "{:?}", listing.names);
        }
        Ok(())
    })
}

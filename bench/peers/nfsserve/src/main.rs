//! Serves a directory with nfsserve: `nfsserve-peer DIR PORT`, NFS and MOUNT on one port.
//!
//! A pass-through as plain as the crate's interface allows: files are known by inode number, a
//! map tells the path, and every call opens what it needs. What the benchmark does not call is
//! answered NOTSUPP.

use std::collections::HashMap;
use std::fs::{self, File, Metadata, OpenOptions};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use nfsserve::fs_util::{metadata_to_fattr3, path_setattr};
use nfsserve::nfs::{fattr3, fileid3, filename3, nfspath3, nfsstat3, sattr3};
use nfsserve::tcp::{NFSTcp as _, NFSTcpListener};
use nfsserve::vfs::{DirEntry, NFSFileSystem, ReadDirResult, VFSCapabilities};

type Answer<T> = Result<T, nfsstat3>;

/// A directory's entries in order, and the place of each in it.
struct Listing {
    mtime: (i64, i64),
    entries: Vec<(fileid3, PathBuf)>,
    places: HashMap<fileid3, usize>,
}

struct Mirror {
    root: fileid3,
    paths: Mutex<HashMap<fileid3, PathBuf>>,
    listings: Mutex<HashMap<fileid3, Arc<Listing>>>,
}

fn status(error: std::io::Error) -> nfsstat3 {
    match error.kind() {
        std::io::ErrorKind::NotFound => nfsstat3::NFS3ERR_NOENT,
        std::io::ErrorKind::AlreadyExists => nfsstat3::NFS3ERR_EXIST,
        std::io::ErrorKind::PermissionDenied => nfsstat3::NFS3ERR_ACCES,
        _ => nfsstat3::NFS3ERR_IO,
    }
}

impl Mirror {
    fn path(&self, id: fileid3) -> Answer<PathBuf> {
        let paths = self.paths.lock().map_err(|_| nfsstat3::NFS3ERR_IO)?;
        paths.get(&id).cloned().ok_or(nfsstat3::NFS3ERR_STALE)
    }

    fn child(&self, directory: fileid3, name: &filename3) -> Answer<PathBuf> {
        Ok(self.path(directory)?.join(std::ffi::OsStr::from_bytes(name)))
    }

    fn learn(&self, path: &Path) -> Answer<Metadata> {
        let metadata = fs::symlink_metadata(path).map_err(status)?;
        let mut paths = self.paths.lock().map_err(|_| nfsstat3::NFS3ERR_IO)?;
        paths.entry(metadata.ino()).or_insert_with(|| path.into());
        Ok(metadata)
    }

    fn listing(&self, id: fileid3) -> Answer<Arc<Listing>> {
        let path = self.path(id)?;
        let metadata = fs::metadata(&path).map_err(status)?;
        let mtime = (metadata.mtime(), metadata.mtime_nsec());
        let mut listings = self.listings.lock().map_err(|_| nfsstat3::NFS3ERR_IO)?;
        if let Some(listing) = listings.get(&id).filter(|listing| listing.mtime == mtime) {
            return Ok(Arc::clone(listing));
        }
        let mut entries = Vec::new();
        let mut paths = self.paths.lock().map_err(|_| nfsstat3::NFS3ERR_IO)?;
        for entry in fs::read_dir(&path).map_err(status)?.flatten() {
            use std::os::unix::fs::DirEntryExt as _;
            entries.push((entry.ino(), entry.path()));
            paths.entry(entry.ino()).or_insert_with(|| entry.path());
        }
        let places = entries.iter().enumerate();
        let listing = Arc::new(Listing {
            mtime,
            places: places.map(|(place, (id, _))| (*id, place)).collect(),
            entries,
        });
        listings.insert(id, Arc::clone(&listing));
        Ok(listing)
    }
}

#[async_trait]
impl NFSFileSystem for Mirror {
    fn capabilities(&self) -> VFSCapabilities {
        VFSCapabilities::ReadWrite
    }

    fn root_dir(&self) -> fileid3 {
        self.root
    }

    async fn lookup(&self, directory: fileid3, name: &filename3) -> Answer<fileid3> {
        Ok(self.learn(&self.child(directory, name)?)?.ino())
    }

    async fn getattr(&self, id: fileid3) -> Answer<fattr3> {
        let metadata = fs::symlink_metadata(self.path(id)?).map_err(status)?;
        Ok(metadata_to_fattr3(id, &metadata))
    }

    async fn setattr(&self, id: fileid3, attributes: sattr3) -> Answer<fattr3> {
        path_setattr(&self.path(id)?, &attributes).await?;
        self.getattr(id).await
    }

    async fn read(&self, id: fileid3, offset: u64, count: u32) -> Answer<(Vec<u8>, bool)> {
        let file = File::open(self.path(id)?).map_err(status)?;
        let mut data = vec![0; count as usize];
        let len = file.read_at(&mut data, offset).map_err(status)?;
        data.truncate(len);
        let end = offset + len as u64 >= file.metadata().map_err(status)?.len();
        Ok((data, end))
    }

    async fn write(&self, id: fileid3, offset: u64, data: &[u8]) -> Answer<fattr3> {
        let file = OpenOptions::new().write(true).open(self.path(id)?);
        let file = file.map_err(status)?;
        file.write_all_at(data, offset).map_err(status)?;
        Ok(metadata_to_fattr3(id, &file.metadata().map_err(status)?))
    }

    async fn create(
        &self,
        directory: fileid3,
        name: &filename3,
        attributes: sattr3,
    ) -> Answer<(fileid3, fattr3)> {
        let path = self.child(directory, name)?;
        File::create(&path).map_err(status)?;
        path_setattr(&path, &attributes).await?;
        let metadata = self.learn(&path)?;
        Ok((metadata.ino(), metadata_to_fattr3(metadata.ino(), &metadata)))
    }

    async fn create_exclusive(&self, directory: fileid3, name: &filename3) -> Answer<fileid3> {
        let path = self.child(directory, name)?;
        File::create_new(&path).map_err(status)?;
        Ok(self.learn(&path)?.ino())
    }

    async fn remove(&self, directory: fileid3, name: &filename3) -> Answer<()> {
        let path = self.child(directory, name)?;
        let id = self.learn(&path)?.ino();
        fs::remove_file(&path).map_err(status)?;
        let mut paths = self.paths.lock().map_err(|_| nfsstat3::NFS3ERR_IO)?;
        paths.remove(&id);
        Ok(())
    }

    async fn readdir(
        &self,
        directory: fileid3,
        start_after: fileid3,
        max_entries: usize,
    ) -> Answer<ReadDirResult> {
        let listing = self.listing(directory)?;
        let start = match start_after {
            0 => 0,
            id => listing.places.get(&id).ok_or(nfsstat3::NFS3ERR_BAD_COOKIE)? + 1,
        };
        let mut entries = Vec::new();
        for (id, path) in listing.entries[start..].iter().take(max_entries) {
            let metadata = fs::symlink_metadata(path).map_err(status)?;
            entries.push(DirEntry {
                fileid: *id,
                name: path.file_name().unwrap_or_default().as_bytes().into(),
                attr: metadata_to_fattr3(*id, &metadata),
            });
        }
        let end = start + entries.len() == listing.entries.len();
        Ok(ReadDirResult { entries, end })
    }

    async fn mkdir(&self, _: fileid3, _: &filename3) -> Answer<(fileid3, fattr3)> {
        Err(nfsstat3::NFS3ERR_NOTSUPP)
    }

    async fn rename(&self, _: fileid3, _: &filename3, _: fileid3, _: &filename3) -> Answer<()> {
        Err(nfsstat3::NFS3ERR_NOTSUPP)
    }

    async fn symlink(
        &self,
        _: fileid3,
        _: &filename3,
        _: &nfspath3,
        _: &sattr3,
    ) -> Answer<(fileid3, fattr3)> {
        Err(nfsstat3::NFS3ERR_NOTSUPP)
    }

    async fn readlink(&self, _: fileid3) -> Answer<nfspath3> {
        Err(nfsstat3::NFS3ERR_NOTSUPP)
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(directory), Some(port)) = (arguments.next(), arguments.next()) else {
        return Err("usage: nfsserve-peer DIR PORT".into());
    };
    let root = fs::metadata(&directory)?.ino();
    let mirror = Mirror {
        root,
        paths: Mutex::new(HashMap::from([(root, PathBuf::from(directory))])),
        listings: Mutex::new(HashMap::new()),
    };
    let listener = NFSTcpListener::bind(&format!("127.0.0.1:{port}"), mirror).await?;
    listener.handle_forever().await?;
    Ok(())
}

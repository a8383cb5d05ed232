//! The numbers of the programs, with the versions and ports that this project serves.
//!
//! Source: RFC 1813 5 and 3, RFC 1833, XNFS appendix; the port numbers of MOUNT, NLM and NSM are
//! those that Linux distributions use by custom.

/// Portmapper and rpcbind.
pub const PORTMAP: u32 = 100_000;
/// NFS.
pub const NFS: u32 = 100_003;
/// MOUNT.
pub const MOUNT: u32 = 100_005;
/// Network Lock Manager.
pub const NLM: u32 = 100_021;
/// Network Status Monitor.
pub const NSM: u32 = 100_024;
/// NFSACL, a side protocol on the NFS port.
pub const NFSACL: u32 = 100_227;

/// The version of NFS that is served.
pub const NFS_VERSION: u32 = 3;

/// The portmapper's port, fixed by RFC 1833.
pub const PORTMAP_PORT: u16 = 111;
/// The default port of NFS.
pub const NFS_PORT: u16 = 2049;
/// The default port of MOUNT.
pub const MOUNT_PORT: u16 = 20_048;
/// The default port of NLM.
pub const NLM_PORT: u16 = 32_803;
/// The default port of NSM.
pub const NSM_PORT: u16 = 662;

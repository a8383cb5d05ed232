//! MOUNT, versions 1 and 3: arguments and results as they stand in messages.
//!
//! Owns the encoding in both directions and its limits; knows no export and no file. Names are
//! those of RFC 1813 5, so that a search from the RFC lands here; version 1 differs only in the
//! result of MNT ([`Fhstatus`]), and version 2 adds nothing that is served.
//!
//! Lists are decoded into vectors that grow with what has arrived, so the message bounds them.
//!
//! Source: RFC 1813 5 (version 3), RFC 1094 A (version 1).

use havenfs_rpc::xdr::{Decode, Encode, Reader, Writer, XdrError};

/// The longest path, in bytes.
pub const MNTPATHLEN: usize = 1024;
/// The longest name of a host or group, in bytes.
pub const MNTNAMLEN: usize = 255;
/// The longest file handle of version 3, in bytes.
pub const FHSIZE3: usize = 64;
/// The length of a file handle of version 1, in bytes.
pub const FHSIZE: usize = 32;
/// The most flavors that are read from a peer's answer to MNT.
pub const AUTH_FLAVORS_MAX: usize = 64;

/// The numbers of the procedures, the same in versions 1 and 3.
pub mod procedure {
    /// Gives the file handle of a directory.
    pub const MNT: u32 = 1;
    /// Lists who mounted what.
    pub const DUMP: u32 = 2;
    /// Removes one entry of that list.
    pub const UMNT: u32 = 3;
    /// Removes all entries of the caller.
    pub const UMNTALL: u32 = 4;
    /// Lists what is exported to whom.
    pub const EXPORT: u32 = 5;
}

/// `mountstat3`: the status of MNT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Mountstat3 {
    /// No error.
    Ok = 0,
    /// Not owner.
    Perm = 1,
    /// No such file or directory.
    Noent = 2,
    /// I/O error.
    Io = 5,
    /// Permission denied.
    Acces = 13,
    /// Not a directory.
    Notdir = 20,
    /// Invalid argument.
    Inval = 22,
    /// The path is too long.
    Nametoolong = 63,
    /// The operation is not supported.
    Notsupp = 10004,
    /// A failure on the server.
    Serverfault = 10006,
}

impl Mountstat3 {
    /// All statuses.
    pub const ALL: [Self; 10] = [
        Self::Ok,
        Self::Perm,
        Self::Noent,
        Self::Io,
        Self::Acces,
        Self::Notdir,
        Self::Inval,
        Self::Nametoolong,
        Self::Notsupp,
        Self::Serverfault,
    ];
}

impl Decode<'_> for Mountstat3 {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        let number = reader.u32()?;
        Self::ALL
            .into_iter()
            .find(|status| *status as u32 == number)
            .ok_or(XdrError::BadValue)
    }
}

impl Encode for Mountstat3 {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.u32(*self as u32);
    }
}

/// `dirpath`: argument of MNT and UMNT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dirpath<'a>(pub &'a [u8]);

impl<'a> Decode<'a> for Dirpath<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        reader.opaque(MNTPATHLEN).map(Self)
    }
}

impl Encode for Dirpath<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.0);
    }
}

/// `mountres3`: result of MNT in version 3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mountres3<'a> {
    /// `MNT3_OK`.
    Ok(Mountres3Ok<'a>),
    /// Any other status, never [`Mountstat3::Ok`].
    Err(Mountstat3),
}

/// `mountres3_ok`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mountres3Ok<'a> {
    /// `fhandle3`: the directory's file handle, at most [`FHSIZE3`] bytes.
    pub fhandle: &'a [u8],
    /// The flavors that the export accepts, the preferred first.
    pub auth_flavors: Vec<u32>,
}

impl<'a> Decode<'a> for Mountres3<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        match Mountstat3::decode(reader)? {
            Mountstat3::Ok => {}
            status => return Ok(Self::Err(status)),
        }
        let fhandle = reader.opaque(FHSIZE3)?;
        let count = reader.u32()? as usize;
        if count > AUTH_FLAVORS_MAX {
            return Err(XdrError::TooLong);
        }
        let auth_flavors = (0..count).map(|_| reader.u32()).collect::<Result<_, _>>()?;
        Ok(Self::Ok(Mountres3Ok {
            fhandle,
            auth_flavors,
        }))
    }
}

impl Encode for Mountres3<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        match self {
            Self::Err(status) => status.encode(writer),
            Self::Ok(mountinfo) => {
                Mountstat3::Ok.encode(writer);
                writer.opaque(mountinfo.fhandle);
                writer.u32(mountinfo.auth_flavors.len() as u32);
                for flavor in &mountinfo.auth_flavors {
                    writer.u32(*flavor);
                }
            }
        }
    }
}

/// `fhstatus`: result of MNT in version 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fhstatus {
    /// Status 0: the directory's file handle.
    Ok([u8; FHSIZE]),
    /// Any other status, an error number of UNIX as in [`Mountstat3`]; never 0.
    Err(u32),
}

impl Decode<'_> for Fhstatus {
    fn decode(reader: &mut Reader<'_>) -> Result<Self, XdrError> {
        Ok(match reader.u32()? {
            0 => Self::Ok(reader.fixed()?),
            status => Self::Err(status),
        })
    }
}

impl Encode for Fhstatus {
    fn encode(&self, writer: &mut Writer<'_>) {
        match self {
            Self::Ok(fhandle) => {
                writer.u32(0);
                writer.fixed(fhandle);
            }
            Self::Err(status) => writer.u32(*status),
        }
    }
}

/// `mountbody`: an entry of [`Mountlist`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mountbody<'a> {
    /// The host that mounted.
    pub ml_hostname: &'a [u8],
    /// What it mounted.
    pub ml_directory: &'a [u8],
}

impl<'a> Decode<'a> for Mountbody<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            ml_hostname: reader.opaque(MNTNAMLEN)?,
            ml_directory: reader.opaque(MNTPATHLEN)?,
        })
    }
}

impl Encode for Mountbody<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.ml_hostname);
        writer.opaque(self.ml_directory);
    }
}

/// `groupnode`: a name that an export is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groupnode<'a> {
    /// A host, network, wildcard or group.
    pub gr_name: &'a [u8],
}

impl<'a> Decode<'a> for Groupnode<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            gr_name: reader.opaque(MNTNAMLEN)?,
        })
    }
}

impl Encode for Groupnode<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.gr_name);
    }
}

/// `exportnode`: an entry of [`Exports`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exportnode<'a> {
    /// The path to mount.
    pub ex_dir: &'a [u8],
    /// For whom; an empty list stands for everyone.
    pub ex_groups: Vec<Groupnode<'a>>,
}

impl<'a> Decode<'a> for Exportnode<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        Ok(Self {
            ex_dir: reader.opaque(MNTPATHLEN)?,
            ex_groups: decode_list(reader)?,
        })
    }
}

impl Encode for Exportnode<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        writer.opaque(self.ex_dir);
        encode_list(&self.ex_groups, writer);
    }
}

/// `mountlist`: result of DUMP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mountlist<'a>(pub Vec<Mountbody<'a>>);

impl<'a> Decode<'a> for Mountlist<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        decode_list(reader).map(Self)
    }
}

impl Encode for Mountlist<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        encode_list(&self.0, writer);
    }
}

/// `exports`: result of EXPORT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exports<'a>(pub Vec<Exportnode<'a>>);

impl<'a> Decode<'a> for Exports<'a> {
    fn decode(reader: &mut Reader<'a>) -> Result<Self, XdrError> {
        decode_list(reader).map(Self)
    }
}

impl Encode for Exports<'_> {
    fn encode(&self, writer: &mut Writer<'_>) {
        encode_list(&self.0, writer);
    }
}

/// Reads a linked list: each element behind a true, then a false.
fn decode_list<'a, T: Decode<'a>>(reader: &mut Reader<'a>) -> Result<Vec<T>, XdrError> {
    let mut items = Vec::new();
    while let Some(item) = reader.optional()? {
        items.push(item);
    }
    Ok(items)
}

fn encode_list<T: Encode>(items: &[T], writer: &mut Writer<'_>) {
    for item in items {
        writer.optional(Some(item));
    }
    writer.bool(false);
}

#[cfg(test)]
mod tests {
    use havenfs_rpc::xdr::decode_all;
    use proptest::prelude::*;

    use super::*;

    fn encoded(value: &impl Encode) -> Vec<u8> {
        let mut out = Vec::new();
        value.encode(&mut Writer::new(&mut out));
        out
    }

    /// Asserts that a value is read back as it was written.
    macro_rules! round_trips {
        ($value:ident) => {
            let message = encoded(&$value);
            prop_assert_eq!(decode_all(&message), Ok($value));
        };
    }

    fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..=max)
    }

    /// Reads `bytes` as every type; the results do not matter, that they come does.
    fn decode_everything(bytes: &[u8]) {
        let _ = decode_all::<Dirpath<'_>>(bytes);
        let _ = decode_all::<Mountres3<'_>>(bytes);
        let _ = decode_all::<Fhstatus>(bytes);
        if let Ok(list) = decode_all::<Mountlist<'_>>(bytes) {
            assert!(list.0.len() <= bytes.len() / 12);
        }
        if let Ok(exports) = decode_all::<Exports<'_>>(bytes) {
            let groups: usize = exports.0.iter().map(|node| node.ex_groups.len()).sum();
            assert!(exports.0.len() + groups <= bytes.len() / 8);
        }
    }

    #[test]
    fn mnt_answers_as_rfc_1813_lays_them_out() {
        let ok = Mountres3::Ok(Mountres3Ok {
            fhandle: b"abcde",
            auth_flavors: vec![1],
        });
        let ok_bytes = *b"\0\0\0\0\0\0\0\x05abcde\0\0\0\0\0\0\x01\0\0\0\x01";
        assert_eq!(encoded(&ok), ok_bytes);
        assert_eq!(decode_all(&ok_bytes), Ok(ok));
        let denied = Mountres3::Err(Mountstat3::Acces);
        assert_eq!(encoded(&denied), [0, 0, 0, 13]);
        assert_eq!(encoded(&Mountstat3::Serverfault), 10_006u32.to_be_bytes());
        assert_eq!(
            decode_all::<Mountres3<'_>>(&[0, 0, 0, 3]),
            Err(XdrError::BadValue)
        );
    }

    #[test]
    fn exports_are_a_list_of_lists() {
        let exports = Exports(vec![
            Exportnode {
                ex_dir: b"/a",
                ex_groups: vec![Groupnode { gr_name: b"*" }],
            },
            Exportnode {
                ex_dir: b"/b",
                ex_groups: vec![],
            },
        ]);
        let expected = b"\0\0\0\x01\0\0\0\x02/a\0\0\0\0\0\x01\0\0\0\x01*\0\0\0\0\0\0\0\
            \0\0\0\x01\0\0\0\x02/b\0\0\0\0\0\0\0\0\0\0";
        assert_eq!(encoded(&exports), expected);
        assert_eq!(decode_all(expected), Ok(exports));
    }

    #[test]
    fn limits_of_the_rfc_are_the_limits() {
        let path = vec![b'p'; MNTPATHLEN + 1];
        let longest = encoded(&Dirpath(&path[..MNTPATHLEN]));
        assert_eq!(decode_all(&longest), Ok(Dirpath(&path[..MNTPATHLEN])));
        let too_long = encoded(&Dirpath(&path));
        assert_eq!(decode_all::<Dirpath<'_>>(&too_long), Err(XdrError::TooLong));
        let name = Mountbody {
            ml_hostname: &path[..=MNTNAMLEN],
            ml_directory: b"/",
        };
        let bytes = encoded(&Mountlist(vec![name]));
        assert_eq!(decode_all::<Mountlist<'_>>(&bytes), Err(XdrError::TooLong));
        let handle = Mountres3Ok {
            fhandle: &path[..=FHSIZE3],
            auth_flavors: vec![],
        };
        let bytes = encoded(&Mountres3::Ok(handle));
        assert_eq!(decode_all::<Mountres3<'_>>(&bytes), Err(XdrError::TooLong));
        let flavors = vec![1; AUTH_FLAVORS_MAX + 1];
        let bytes = encoded(&Mountres3::Ok(Mountres3Ok {
            fhandle: b"",
            auth_flavors: flavors,
        }));
        assert_eq!(decode_all::<Mountres3<'_>>(&bytes), Err(XdrError::TooLong));
    }

    proptest! {
        #[test]
        fn results_round_trip(
            fhandle in bytes(FHSIZE3),
            auth_flavors in prop::collection::vec(any::<u32>(), 0..=AUTH_FLAVORS_MAX),
            status in prop::sample::select(&Mountstat3::ALL[1..]),
            old: [u8; FHSIZE],
        ) {
            let ok = Mountres3::Ok(Mountres3Ok { fhandle: &fhandle, auth_flavors });
            round_trips!(ok);
            let failed = Mountres3::Err(status);
            round_trips!(failed);
            for fhstatus in [Fhstatus::Ok(old), Fhstatus::Err(status as u32)] {
                round_trips!(fhstatus);
            }
        }

        #[test]
        fn lists_round_trip(
            texts in prop::collection::vec((bytes(MNTPATHLEN), bytes(MNTNAMLEN)), 0..8),
        ) {
            let mounts = Mountlist(texts.iter().map(|(path, name)| {
                Mountbody { ml_hostname: name, ml_directory: path }
            }).collect());
            round_trips!(mounts);
            let exports = Exports(texts.iter().map(|(path, _)| Exportnode {
                ex_dir: path,
                ex_groups: texts.iter().map(|(_, gr_name)| Groupnode { gr_name }).collect(),
            }).collect());
            round_trips!(exports);
        }

        #[test]
        fn random_bytes_never_panic(bytes in bytes(300)) {
            decode_everything(&bytes);
        }

        #[test]
        fn mutated_messages_never_panic(
            path in bytes(40), at: prop::sample::Index, byte: u8, cut: prop::sample::Index,
        ) {
            let node = Exportnode { ex_dir: &path, ex_groups: vec![Groupnode { gr_name: &path }] };
            let mut message = encoded(&Exports(vec![node.clone(), node]));
            *at.get_mut(&mut message) = byte;
            message.truncate(cut.index(message.len() + 1));
            decode_everything(&message);
        }
    }
}

//! The export lists of exports(5), the mistakes people make, and properties of all texts.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use proptest::{collection::vec, option, prelude::*};

use super::*;

fn file(text: &str) -> Result<Loaded, ExportErrors> {
    parse_exports(Source::file("exports"), text.as_bytes())
}

fn lines(loaded: &Loaded) -> Vec<String> {
    loaded.specs.iter().map(ToString::to_string).collect()
}

#[test]
fn the_examples_of_the_manual_are_understood() {
    let text = r"# sample /etc/exports file
/               master(rw) trusty(rw,no_root_squash)
/projects       proj*.local.domain(rw)
/usr            *.local.domain(ro)
/home/joe       pc001(rw,all_squash,anonuid=150,anongid=100)
/pub            *(ro,insecure,all_squash)
/srv/www        -sync,rw server external(ro)
/foo            2001:db8:9:e54::/64(rw) 192.0.2.0/24(rw)
/build          buildhost[0-9].local.domain(rw)
";
    let loaded = file(text).expect("valid");
    assert_eq!(loaded.warnings, []);
    assert_eq!(
        lines(&loaded),
        [
            "/ master(rw,sync,secure,root_squash) trusty(rw,sync,secure,no_root_squash)",
            "/projects proj*.local.domain(rw,sync,secure,root_squash)",
            "/usr *.local.domain(ro,sync,secure,root_squash)",
            "/home/joe pc001(rw,sync,secure,all_squash,anonuid=150,anongid=100)",
            "/pub *(ro,sync,insecure,all_squash)",
            "/srv/www server(rw,sync,secure,root_squash) external(ro,sync,secure,root_squash)",
            "/foo 2001:db8:9:e54::/64(rw,sync,secure,root_squash) \
         192.0.2.0/24(rw,sync,secure,root_squash)",
            "/build buildhost[0-9].local.domain(rw,sync,secure,root_squash)",
        ]
    );
}

#[test]
fn each_form_of_a_line_means_what_exportfs_makes_of_it() {
    let end = ",sync,secure,root_squash";
    for (text, expected) in [
        ("/a", format!("/a *(ro{end})")),
        ("/a *", format!("/a *(ro{end})")),
        ("/a -rw", format!("/a *(rw{end})")),
        ("/a h()", format!("/a h(ro{end})")),
        ("/a h(rw,)", format!("/a h(rw{end})")),
        ("/a -rw h g(ro)", format!("/a h(rw{end}) g(ro{end})")),
        (
            "/a h -rw g -insecure f",
            format!("/a h(ro{end}) g(rw{end}) f(rw,sync,insecure,root_squash)"),
        ),
        ("/a \\\n  h(rw) \\\n g", format!("/a h(rw{end}) g(ro{end})")),
        ("\"/a b\" h", format!("/a\\040b h(ro{end})")),
        ("/a\\040b h", format!("/a\\040b h(ro{end})")),
        ("//a/./b/ h", format!("/a/b h(ro{end})")),
        ("/a h\n/a g", format!("/a h(ro{end}) g(ro{end})")),
        ("/a h(fsid=0)", format!("/a h(ro{end},fsid=root)")),
        ("/a h(mp) g", format!("/a h(ro{end},mountpoint) g(ro{end})")),
        ("/a h(mp=/)", format!("/a h(ro{end},mountpoint=/)")),
        (
            "/a h(insecure_locks,crossmnt,nohide,manage-gids)",
            format!("/a h(ro{end},crossmnt,nohide,manage_gids,no_auth_nlm)"),
        ),
        (
            "/a h(no_subtree_check,no_all_squash,nocrossmnt,secure_locks,mapping=identity)",
            format!("/a h(ro{end})"),
        ),
        ("/a h(sec=krb5:sys,rw)", format!("/a h(rw{end})")),
        ("/a h(xprtsec=none:tls)", format!("/a h(ro{end})")),
    ] {
        let loaded = file(text).unwrap_or_else(|errors| panic!("{text}: {errors}"));
        assert_eq!(lines(&loaded), [expected], "{text}");
    }
}

#[test]
fn mistakes_are_refused_with_place_and_remedy() {
    for (text, message) in [
        (
            "/a h(rw,no_root_sqaush)",
            "exports:1:9: unknown option `no_root_sqaush`\nhint: did you mean `no_root_squash`?",
        ),
        (
            "/a h(RO)",
            "exports:1:6: unknown option `RO`\nhint: did you mean `ro`?",
        ),
        ("/a h(zzzzzzzz)", "exports:1:6: unknown option `zzzzzzzz`"),
        (
            "\n/a \\\n h(rw,asink)",
            "exports:3:7: unknown option `asink`\nhint: did you mean `async`?",
        ),
        (
            "/a h(rw, sync)",
            "exports:1:5: option list is not closed\n\
             hint: separate options by commas, without spaces, and close with `)`\n\
             exports:1:14: `)` without `(`\n\
             hint: write options as CLIENT(rw,sync), without spaces",
        ),
        (
            "/a h(rw)g(ro)",
            "exports:1:9: `g(ro)` follows the option list\nhint: put a space between clients",
        ),
        (
            "/a h(rw)# all",
            "exports:1:9: `#` follows the option list\nhint: put a space before a comment",
        ),
        (
            "/a h(rw,,sync)",
            "exports:1:9: empty option\nhint: remove the extra comma",
        ),
        (
            "/a h(rw=1)",
            "exports:1:6: option `rw` takes no value\nhint: write rw",
        ),
        (
            "/a h(anonuid)",
            "exports:1:6: option `anonuid` needs a value\nhint: write anonuid=VALUE",
        ),
        (
            "/a h(anonuid=joe)",
            "exports:1:6: `joe` is not a user or group number\n\
             hint: write anonuid=NUMBER, from 0 to 4294967294",
        ),
        (
            "/a h(fsid=x)",
            "exports:1:6: `x` is not an fsid\n\
             hint: write fsid=NUMBER, fsid=root, or fsid= and the 32 digits of a UUID",
        ),
        (
            "/a @trusted(rw)",
            "exports:1:4: netgroup `@trusted` is not supported\n\
             hint: list its hosts by name, address, network or wildcard",
        ),
        (
            "/a gss/krb5(rw)",
            "exports:1:4: client `gss/krb5` asks for Kerberos, not supported\n\
             hint: name the clients that may use sec=sys",
        ),
        (
            "/a h(sec=krb5p)",
            "exports:1:4: no flavour of this client's sec= list can be served\n\
             hint: add sys to sec= if that is safe here; sec=sys is served",
        ),
        (
            "/a h(xprtsec=mtls)",
            "exports:1:4: no flavour of this client's xprtsec= list can be served\n\
             hint: add none to xprtsec= if that is safe here; xprtsec=none is served",
        ),
        (
            "/a h(sec=krb6)",
            "exports:1:6: unknown sec= flavour `krb6`\nhint: did you mean `krb5`?",
        ),
        (
            "/a h(refer=/b@c)",
            "exports:1:6: `refer=` sends clients to other servers, which NFSv3 cannot\n\
             hint: export the directory on the server that has it",
        ),
        (
            "data *(rw)",
            "exports:1:1: `data` is not an absolute path\n\
             hint: each line begins with the full path of a directory; \
             put quotes around a name with spaces",
        ),
        (
            "/a/../b *",
            "exports:1:1: the path `/a/../b` contains `..`\n\
             hint: each line begins with the full path of a directory; \
             put quotes around a name with spaces",
        ),
        (
            "/a \"b",
            "exports:1:4: quote is not closed on this line\n\
             hint: write \\042 for a quote that belongs to the name",
        ),
        (
            "/a 192.168.1.300(rw)",
            "exports:1:4: `192.168.1.300` is not an IPv4 address\n\
             hint: write four numbers from 0 to 255, or a network such as 192.0.2.0/24",
        ),
        (
            "/a 192.0.2.0/33",
            "exports:1:4: `192.0.2.0/33` is not a network\n\
             hint: the prefix is 0 to 32 (IPv6: 128) or, for IPv4, a mask such as 255.255.255.0",
        ),
        (
            "/a h,g(rw)",
            "exports:1:4: `h,g` is not a client\n\
             hint: separate clients by spaces; options stand in (...) right after a client",
        ),
        (
            "/a fsid=0",
            "exports:1:4: `fsid=0` is not a client\n\
             hint: options stand in (...) right after a client, without a space",
        ),
        (
            "/a [2001:db8::1](rw)",
            "exports:1:4: IPv6 address `[2001:db8::1]` stands in brackets\nhint: write 2001:db8::1",
        ),
        (
            "/a h(rw)\n/a h(ro)",
            "exports:2:4: `h` has a rule for `/a` already (exports:1:4)\n\
             hint: the two differ; keep the one that is meant",
        ),
        (
            "/a h(fsid=1) g(fsid=2)",
            "exports:1:14: fsid=2 of `/a` is fsid=1 elsewhere\n\
             hint: an export has one, whichever client asks",
        ),
        (
            "/a h(fsid=1)\n/b h(fsid=1)",
            "exports:2:1: fsid=1 of `/b` belongs to `/a` already (exports:1:1)\n\
             hint: give each exported directory its own fsid",
        ),
    ] {
        let errors = file(text).expect_err(text);
        assert_eq!(errors.to_string(), message, "{text}");
    }
}

#[test]
fn doubts_are_told_and_the_list_is_used() {
    for (text, message) in [
        (
            "/a h (rw)",
            "exports:1:6: warning: the space after `h` gives `(rw)` to everybody, not to `h`\n\
             hint: write h(rw), or *(rw) if everybody is meant",
        ),
        (
            "/a (rw)",
            "exports:1:4: warning: `(rw)` without a client applies to everybody\nhint: write *(rw)",
        ),
        (
            "/a h(async)",
            "exports:1:6: warning: `async` answers writes before they are on stable storage: \
             a crash or a takeover loses acknowledged data\n\
             hint: use sync unless the data can be made again",
        ),
        (
            "/a h(subtree_check)",
            "exports:1:6: warning: option `subtree_check` has no effect here",
        ),
        (
            "/a h(sec=krb5:sys)",
            "exports:1:6: warning: sec=krb5 is not served; callers must use sys",
        ),
        (
            "/a h(anonuid=0)",
            "exports:1:6: warning: `anonuid=0` makes squashed callers root\n\
             hint: use the number of an account without rights",
        ),
        (
            "/a 192.168.1.*(rw)",
            "exports:1:4: warning: wildcard `192.168.1.*` matches host names, not addresses\n\
             hint: write a network, for example 192.0.2.0/24",
        ),
        (
            "/a 192.0.2.7/24",
            "exports:1:4: warning: `192.0.2.7/24` has bits set beyond its prefix; \
             they are ignored\n\
             hint: write 192.0.2.0/24",
        ),
        (
            "/a h rw",
            "exports:1:6: warning: option `rw` is taken as the name of a host\n\
             hint: write CLIENT(rw), without a space before `(`",
        ),
        (
            "/a:h(rw)",
            "exports:1:1: warning: `/a:h(rw)` is taken as the directory's name\n\
             hint: put a space between directory and client, or quotes around the name",
        ),
        (
            "/a h(rw)\n/a h(rw)",
            "exports:2:4: warning: `h` has a rule for `/a` already (exports:1:4)\n\
             hint: remove one of the two",
        ),
    ] {
        let loaded = file(text).unwrap_or_else(|errors| panic!("{text}: {errors}"));
        let told: Vec<String> = loaded.warnings.iter().map(ToString::to_string).collect();
        assert_eq!(told, [message], "{text}");
    }
    for word in [
        "wdelay",
        "no_wdelay",
        "hide",
        "acl",
        "no_acl",
        "pnfs",
        "no_pnfs",
        "security_label",
        "auth_nlm",
        "nordirplus",
    ] {
        let loaded = file(&format!("/a h({word})")).expect(word);
        let expected = format!("option `{word}` has no effect here");
        assert_eq!(loaded.warnings[0].message, expected);
    }
}

#[test]
fn all_problems_are_told_at_once() {
    let errors = file("/a h(rww)\nb\n/c @g i(rx) j(hide)\n").expect_err("four errors");
    assert_eq!(errors.errors().count(), 4);
    assert_eq!(errors.0.len(), 5);
}

#[test]
fn arguments_are_split_where_the_clients_begin() {
    let end = ",sync,secure,root_squash";
    for (text, expected) in [
        ("/a", format!("/a *(ro{end})")),
        ("/a:*(rw)", format!("/a *(rw{end})")),
        ("/a:h(rw) g", format!("/a h(rw{end}) g(ro{end})")),
        ("/a:2001:db8::1(rw)", format!("/a 2001:db8::1(rw{end})")),
        ("/a:-rw ::1 h", format!("/a ::1(rw{end}) h(rw{end})")),
        ("/a:b:*(rw)", format!("/a:b *(rw{end})")),
        ("/a:b", format!("/a b(ro{end})")),
        ("/a\\072b", format!("/a:b *(ro{end})")),
        ("\"/a:b\"", format!("/a:b *(ro{end})")),
        ("\"/a:b\":h(rw)", format!("/a:b h(rw{end})")),
        ("/a b:*(rw)", format!("/a\\040b *(rw{end})")),
    ] {
        let loaded = parse_argument(1, text.as_bytes()).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(lines(&loaded), [expected], "{text}");
    }
    for (text, message) in [
        (
            "data:*(rw)",
            "--export #2:1: `data` is not an absolute path\n\
             hint: write the full path of a directory, such as /srv/data:*(rw)",
        ),
        (
            "/a:",
            "--export #2:1: no client follows the colon\n\
             hint: write DIR:*(rw) for everybody, or DIR alone for everybody read-only",
        ),
        (
            "/a:*(rww)",
            "--export #2:6: unknown option `rww`\nhint: did you mean `rw`?",
        ),
        (
            "/a:h;g(rw)",
            "--export #2:4: `h;g` is not a client\n\
             hint: write a host name, an address, ADDRESS/PREFIX, \
             a wildcard such as *.example.org, or *",
        ),
    ] {
        let errors = parse_argument(2, text.as_bytes()).expect_err(text);
        assert_eq!(errors.to_string(), message, "{text}");
    }
}

#[test]
fn files_of_the_folder_are_read_by_name_and_merged() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    fs::write(at("exports"), "/a h(rw)\n").expect("written");
    fs::create_dir(at("d")).expect("made");
    for (name, text) in [
        ("d/2.exports", "/a f(rw)\n"),
        ("d/1.exports", "/b *\n/a g(ro)\n"),
        ("d/.hidden.exports", "broken"),
        ("d/old.exports~", "broken"),
        ("d/readme", "broken"),
    ] {
        fs::write(at(name), text).expect("written");
    }
    let sources = Sources {
        file: Some(at("exports")),
        directory: Some(at("d")),
        arguments: vec![b"/c".to_vec(), b"/a:e".to_vec()],
    };
    let loaded = load(&sources).expect("valid");
    let clients: Vec<String> = loaded.specs[0]
        .rules
        .iter()
        .map(|rule| rule.client.to_string())
        .collect();
    assert_eq!(clients, ["h", "g", "f", "e"]);
    assert_eq!(loaded.specs.len(), 3);
    assert_eq!(
        loaded.specs[0].rules[1].origin.source,
        Source::file(at("d/1.exports"))
    );

    let missing = Sources {
        file: Some(at("none")),
        directory: Some(at("none")),
        arguments: vec![],
    };
    assert_eq!(load(&missing).expect("nothing to read").specs, []);
    let error = load_file(&at("none"))
        .expect_err("it must exist")
        .to_string();
    assert!(
        error.contains("none: cannot read the export list: No such file"),
        "{error}"
    );
}

#[test]
fn directories_are_checked_as_they_are() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("real")).expect("made");
    fs::write(at("plain"), "").expect("written");
    std::os::unix::fs::symlink(at("real"), at("alias")).expect("linked");
    let text = format!(
        "{0}/real\n{0}/plain\n{0}/gone\n{0}/alias\n{0}/real/x *(mp)\n/proc *(mp)\n/ *(mp=/proc)\n",
        folder.path().display()
    );
    let found = check_directories(&file(&text).expect("valid").specs);
    let faults: Vec<(PathBuf, DirectoryFault)> = found
        .iter()
        .map(|found| (found.path.clone(), found.fault))
        .collect();
    assert_eq!(
        faults,
        [
            (at("plain"), DirectoryFault::NotADirectory),
            (at("gone"), DirectoryFault::Missing),
            (at("alias"), DirectoryFault::SameDirectory),
            (at("real/x"), DirectoryFault::NotMounted),
        ]
    );
    let gone = at("gone").display().to_string();
    assert_eq!(
        found[1].problem.to_string(),
        format!(
            "exports:3:1: directory `{gone}` does not exist\n\
             hint: create it (mkdir -p {gone}) or correct the path"
        )
    );
}

#[test]
fn people_are_told_what_was_understood() {
    let text = "/srv *(ro,insecure) 192.0.2.0/24(rw) h(rw,no_root_squash,fsid=3)\n\
                /srv/x *.example(rw,all_squash,anonuid=5,crossmnt,mp)\n";
    assert_eq!(
        file(text).expect("valid").describe(),
        "/srv  (from exports:1:1)\n  \
           file system id 3\n  \
           1. host h: read and write, root stays root, source port below 1024 required\n  \
           2. network 192.0.2.0/24: read and write, root becomes 65534:65534, \
              source port below 1024 required\n  \
           3. everybody: read-only, root becomes 65534:65534, any source port\n\
         \n\
         /srv/x  (from exports:2:1)\n  \
           lies inside the export /srv; its own rules apply\n  \
           offered only while /srv/x is a mount point\n  \
           1. hosts named *.example: read and write, every user becomes 5:65534, \
              source port below 1024 required, crosses mounts\n  \
           all others: refused\n"
    );
    assert_eq!(file("").expect("empty").describe(), "nothing is exported\n");
}

#[test]
fn lists_beyond_the_limits_are_refused() {
    let errors = file(&"#".repeat((1 << 20) + 1)).expect_err("too long");
    assert_eq!(
        errors.to_string(),
        "exports: the list is longer than 1048576 bytes"
    );
    let many = (0..17_000)
        .map(|n| format!("/a h{n}\n"))
        .collect::<Vec<_>>()
        .concat();
    let errors = file(&many).expect_err("too many");
    assert_eq!(
        errors.to_string(),
        "exports:16385:4: more than 16384 clients"
    );
    let errors = file(&"/a h(x1)\n".repeat(5000)).expect_err("all wrong");
    assert_eq!(errors.0.len(), 1000);
    let path = format!("/{}", "x".repeat(1024));
    assert!(file(&path).is_err());
}

fn any_client() -> impl Strategy<Value = ClientPattern> {
    let host = "[a-z][a-z0-9]{0,8}(\\.[a-z][a-z0-9-]{0,4}[a-z]){0,3}";
    prop_oneof![
        Just(ClientPattern::Any),
        any::<std::net::IpAddr>().prop_map(|ip| ClientPattern::Address(ip.to_canonical())),
        (any::<std::net::Ipv4Addr>(), 0..32_u8).prop_map(|(ip, prefix)| {
            ClientPattern::Network(Network::new(ip.into(), prefix).expect("a valid prefix"))
        }),
        (any::<std::net::Ipv6Addr>(), 0..96_u8).prop_map(|(ip, prefix)| {
            ClientPattern::Network(Network::new(ip.into(), prefix).expect("a valid prefix"))
        }),
        host.prop_map(|name| ClientPattern::Name(name.into())),
        host.prop_map(|name| ClientPattern::Wildcard(format!("*{name}?[a-z_]").into())),
    ]
}

prop_compose! {
    fn any_options()(
        flags in any::<[bool; 7]>(),
        squash in prop_oneof![Just(Squash::None), Just(Squash::Root), Just(Squash::All)],
        anon_uid in 0..u32::MAX,
        anon_gid in 0..u32::MAX,
    ) -> Options {
        let [read_only, sync, secure, crossmnt, nohide, manage_gids, no_auth_nlm] = flags;
        Options {
            read_only, sync, squash, anon_uid, anon_gid, secure, crossmnt, nohide, manage_gids,
            no_auth_nlm,
        }
    }
}

fn any_path() -> impl Strategy<Value = PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    vec(vec(1..=255_u8, 1..12), 0..4).prop_map(|parts| {
        let mut path = PathBuf::from("/");
        for mut part in parts {
            part.iter_mut()
                .filter(|byte| matches!(byte, b'/' | b'.'))
                .for_each(|byte| *byte = b'-');
            path.push(std::ffi::OsString::from_vec(part));
        }
        path
    })
}

fn any_fsid() -> impl Strategy<Value = Fsid> {
    prop_oneof![
        Just(Fsid::Root),
        (1..=u32::MAX).prop_map(Fsid::Number),
        any::<[u8; 16]>().prop_map(Fsid::Uuid),
    ]
}

/// What a list says, without where it says so.
type Meaning = (
    PathBuf,
    Option<Fsid>,
    Option<PathBuf>,
    Vec<(ClientPattern, Options)>,
);

fn meaning(spec: &ExportSpec) -> Meaning {
    let rules = spec
        .rules
        .iter()
        .map(|rule| (rule.client.clone(), rule.options))
        .collect();
    (spec.path.clone(), spec.fsid, spec.mountpoint.clone(), rules)
}

/// Text made of what has a meaning here finds more than random text does.
fn any_text() -> impl Strategy<Value = String> {
    const PIECES: &[&str] = &[
        "/",
        "/a",
        "*",
        "?",
        "[",
        "]",
        "h",
        "(",
        ")",
        ",",
        "-",
        ":",
        "=",
        "\"",
        "\\",
        "\\040",
        "\\\n",
        "\n",
        " ",
        "#",
        "@",
        "rw",
        "ro",
        "fsid=",
        "sec=",
        "krb5",
        "sys",
        "10.0.0.0",
        "/8",
        "::1",
        "anonuid=",
        "mp",
        "mountpoint=",
        "\u{e4}",
        "\0",
        "99999999999",
        "-1",
    ];
    vec(proptest::sample::select(PIECES), 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn what_is_written_reads_back_the_same(
        path in any_path(),
        fsid in option::of(any_fsid()),
        mountpoint in option::of(any_path().prop_filter("a comma ends an option", |path| {
            !path.to_string_lossy().contains([',', '(', ')'])
        })),
        rules in vec((any_client(), any_options()), 1..5),
    ) {
        let origin = Origin { source: Source::Argument(0), line: 0, column: 0 };
        let mut spec = ExportSpec { path, fsid, mountpoint, rules: vec![], origin: origin.clone() };
        for (client, options) in rules {
            if !spec.rules.iter().any(|rule| rule.client == client) {
                spec.rules.push(ClientRule { client, options, origin: origin.clone() });
            }
        }
        let line = spec.to_string();
        let loaded = file(&line).map_err(|errors| TestCaseError::fail(errors.to_string()))?;
        prop_assert_eq!(loaded.specs.iter().map(meaning).collect::<Vec<_>>(), [meaning(&spec)]);
    }

    #[test]
    fn no_text_panics(text in vec(any::<u8>(), 0..200)) {
        let _ = parse_exports(Source::file("exports"), &text);
        let _ = parse_argument(1, &text);
    }

    #[test]
    fn no_likely_text_panics_and_what_is_accepted_reads_back(text in any_text()) {
        let _ = parse_argument(1, text.as_bytes());
        if let Ok(loaded) = file(&text) {
            prop_assert!(loaded.specs.iter().all(|spec| !spec.rules.is_empty()));
            let again = file(&lines(&loaded).join("\n")).expect("reads back");
            prop_assert_eq!(
                loaded.specs.iter().map(meaning).collect::<Vec<_>>(),
                again.specs.iter().map(meaning).collect::<Vec<_>>()
            );
            let _ = loaded.describe();
        }
    }
}

#[test]
fn a_table_is_made_of_what_was_loaded() {
    let loaded = file("/a h(manage_gids) *.b\n/c\n").expect("valid");
    let table = ExportTable::new(
        loaded.specs,
        |path| if path == Path::new("/a") { 4 } else { 9 },
    );
    assert_eq!(
        table.by_id(9).map(|export| export.spec.path.as_path()),
        Some(Path::new("/c"))
    );
    assert!(table.has_wildcards() && table.manages_gids());
    assert_eq!(table.host_names().collect::<Vec<_>>(), ["h"]);
}

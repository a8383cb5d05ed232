//! The calls and the checks of their answers.

use super::*;

/// A workload with one prepared call, and what an answer must say.
fn work(workload: Workload) -> Work {
    let prepared = Prepared {
        call: Vec::new(),
        file_id: 7,
        handle: b"handle".to_vec(),
    };
    Work {
        workload,
        calls: vec![prepared],
        pattern: Pattern::new(),
        next: 0,
        answers: 0,
        noise: 1,
        blocks: 16,
        write_verf: None,
    }
}

fn reply(results: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
    let mut out = vec![0; 4];
    out.extend_from_slice(&ACCEPTED);
    results(&mut Writer::new(&mut out));
    out
}

fn verdict(workload: Workload, message: &[u8]) -> Result<u64, Fault> {
    work(workload).check(&mut Slot::default(), message)
}

#[test]
fn a_refused_call_is_a_fault() {
    let mut refused = reply(|_| {});
    refused[11] = 1;
    assert!(matches!(
        verdict(Workload::Null, &refused),
        Err(Fault::Header)
    ));
    assert!(matches!(verdict(Workload::Null, &reply(|_| {})), Ok(1)));
}

#[test]
fn an_error_status_is_a_fault() {
    let stale = reply(|out| out.u32(70));
    assert!(matches!(
        verdict(Workload::Getattr, &stale),
        Err(Fault::Status(70))
    ));
}

#[test]
fn an_answer_to_a_lock_is_checked() {
    let answer = |cookie: &[u8], status| {
        reply(|out| {
            out.opaque(cookie);
            out.u32(status);
        })
    };
    let verdict = |message: &[u8]| verdict(Workload::LockUnlock, message);
    assert!(matches!(verdict(&answer(locks::COOKIE, 0)), Ok(1)));
    assert!(matches!(
        verdict(&answer(locks::COOKIE, 1)),
        Err(Fault::Status(1))
    ));
    assert!(matches!(
        verdict(&answer(b"another", 0)),
        Err(Fault::Wrong("cookie"))
    ));
}

#[test]
fn another_handle_is_a_fault() {
    let answer = |handle: &[u8]| {
        reply(|out| {
            out.u32(0);
            out.opaque(handle);
            out.u64(0);
        })
    };
    assert!(matches!(
        verdict(Workload::Lookup, &answer(b"handle")),
        Ok(1)
    ));
    assert!(matches!(
        verdict(Workload::Lookup, &answer(b"hangle")),
        Err(Fault::Wrong("handle"))
    ));
}

#[test]
fn data_of_another_block_is_a_fault() {
    let pattern = Pattern::new();
    let answer = |offset| {
        reply(|out| {
            for word in [0, 0, 4096, 0] {
                out.u32(word);
            }
            out.opaque(pattern.expected(0, offset, 4096));
        })
    };
    assert!(matches!(verdict(Workload::Read4k, &answer(0)), Ok(1)));
    assert!(matches!(
        verdict(Workload::Read4k, &answer(4096)),
        Err(Fault::Wrong("data"))
    ));
}

#[test]
fn a_changed_write_verifier_is_a_fault() {
    let answer = |verf: u64| {
        reply(|out| {
            for word in [0, 0, 0, 4096, 0] {
                out.u32(word);
            }
            out.u64(verf);
        })
    };
    let mut work = work(Workload::Write4k);
    let mut slot = Slot::default();
    assert!(matches!(work.check(&mut slot, &answer(1)), Ok(1)));
    assert!(matches!(
        work.check(&mut slot, &answer(2)),
        Err(Fault::Wrong("write verifier"))
    ));
}

#[test]
fn a_missing_name_is_a_fault() {
    let page = reply(|out| {
        for word in [0, 0, 0, 0, 1, 0, 9] {
            out.u32(word);
        }
        out.opaque(b"file-0000000");
        out.u64(1);
        out.u32(0);
        out.u32(1);
        out.opaque(b"handle");
        // No further entry, and the end of the directory.
        out.u32(0);
        out.u32(1);
    });
    assert!(matches!(
        verdict(Workload::List1k, &page),
        Err(Fault::Wrong("number of names"))
    ));
}

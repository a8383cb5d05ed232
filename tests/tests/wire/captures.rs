//! What real clients sent, byte for byte: our decoders read it, our encoders write the same, and
//! the server repeats what it must repeat.

use anyhow::{Context as _, Result, anyhow, ensure};
use havenfs_nlm::wire::{
    Nlm4CancArgs, Nlm4Lock, Nlm4LockArgs, Nlm4Res, Nlm4Stats, Nlm4TestArgs, Nlm4UnlockArgs,
    procedure,
};
use havenfs_nsm::wire::StatChge;
use havenfs_rpc::message::Call;
use havenfs_rpc::program;
use havenfs_rpc::xdr::{Decode, Encode, Writer, decode_all};
use havenfs_tests::client::nlm::{read_res, stat};

use crate::locking::{A, Scene};
use crate::scene::OPEN;

const LINUX: &str = include_str!("../../captures/linux-6.1.txt");
const SM_NOTIFY: u32 = 6;

/// The message under a name.
fn captured(name: &str) -> Result<Vec<u8>> {
    let mut lines = LINUX.lines().filter_map(|line| line.split_once('\t'));
    let found = lines.find(|(of, _)| *of == name);
    let (_, digits) = found.with_context(|| format!("no capture `{name}`"))?;
    let byte = |at: usize| Ok(u8::from_str_radix(&digits[at..at + 2], 16)?);
    (0..digits.len()).step_by(2).map(byte).collect()
}

/// A captured call, whose header is as it should be.
fn call(message: &[u8], wanted: (u32, u32, u32)) -> Result<Call<'_>> {
    let call = Call::decode(message).map_err(|error| anyhow!("{error:?}"))?;
    ensure!((call.program, call.version, call.procedure) == wanted);
    Ok(call)
}

/// Reads arguments, which our encoder must write as they came.
fn read<'a, T: Decode<'a> + Encode>(args: &'a [u8]) -> Result<T> {
    let value: T = decode_all(args).map_err(|error| anyhow!("{error:?}"))?;
    let mut written = Vec::new();
    value.encode(&mut Writer::new(&mut written));
    ensure!(written == args, "written otherwise than it came");
    Ok(value)
}

const fn nlm(procedure: u32) -> (u32, u32, u32) {
    (program::NLM, 4, procedure)
}

fn is(lock: &Nlm4Lock<'_>, host: &str, owner: (i32, &str), range: (u64, u64)) -> bool {
    (lock.caller_name, lock.svid, lock.oh) == (host.as_bytes(), owner.0, owner.1.as_bytes())
        && (lock.l_offset, lock.l_len) == range
        && lock.fh.len() == 32
}

#[test]
fn linux_locks_tests_cancels_and_unlocks() -> Result<()> {
    let message = captured("LOCK exclusive 100-149")?;
    let asked: Nlm4LockArgs<'_> = read(call(&message, nlm(procedure::LOCK))?.args)?;
    ensure!(is(&asked.alock, "c1", (0, "0@c1"), (100, 50)), "{asked:?}");
    ensure!(
        asked.exclusive && !asked.block && !asked.reclaim && asked.state == 3,
        "{asked:?}"
    );

    let message = captured("TEST shared 140 to the end")?;
    let asked: Nlm4TestArgs<'_> = read(call(&message, nlm(procedure::TEST))?.args)?;
    ensure!(is(&asked.alock, "c2", (1, "1@c2"), (140, 0)), "{asked:?}");
    ensure!(!asked.exclusive, "{asked:?}");

    let message = captured("LOCK exclusive 120-129, waiting")?;
    let asked: Nlm4LockArgs<'_> = read(call(&message, nlm(procedure::LOCK))?.args)?;
    ensure!(asked.block && asked.exclusive, "{asked:?}");
    let message = captured("CANCEL of it")?;
    let cancel: Nlm4CancArgs<'_> = read(call(&message, nlm(procedure::CANCEL))?.args)?;
    ensure!(
        cancel.block && cancel.exclusive && cancel.alock == asked.alock,
        "{cancel:?}"
    );

    let message = captured("UNLOCK 100-149")?;
    let unlock: Nlm4UnlockArgs<'_> = read(call(&message, nlm(procedure::UNLOCK))?.args)?;
    ensure!(
        is(&unlock.alock, "c1", (0, "0@c1"), (100, 50)),
        "{unlock:?}"
    );
    Ok(())
}

/// The answer names the grant by our cookie; what we repeat is what the client sent.
#[test]
fn linux_takes_a_grant_that_repeats_its_lock() -> Result<()> {
    let asked = captured("LOCK shared 140 to the end, waiting")?;
    let asked: Nlm4LockArgs<'_> = read(call(&asked, nlm(procedure::LOCK))?.args)?;
    let told = captured("GRANTED_MSG of ours")?;
    let told: Nlm4TestArgs<'_> = read(call(&told, nlm(procedure::GRANTED_MSG))?.args)?;
    ensure!(
        told.alock == asked.alock && told.exclusive == asked.exclusive,
        "{told:?}"
    );
    let answered = captured("GRANTED_RES")?;
    let answered: Nlm4Res<'_> = read(call(&answered, nlm(procedure::GRANTED_RES))?.args)?;
    ensure!(answered.stat == Nlm4Stats::Granted && answered.cookie == told.cookie);
    Ok(())
}

#[test]
fn linux_tells_of_its_reboot() -> Result<()> {
    let message = captured("SM_NOTIFY")?;
    let told: StatChge<'_> = read(call(&message, (program::NSM, 1, SM_NOTIFY))?.args)?;
    ensure!((told.mon_name, told.state) == (&b"c1"[..], 5), "{told:?}");
    Ok(())
}

/// Its handle is of another server, so the answers are known.
#[test]
fn the_server_answers_what_linux_sent() -> Result<()> {
    let scene = Scene::new(OPEN)?;
    let mut client = scene.server.nlm(A)?;
    for (name, number) in [
        ("LOCK exclusive 120-129, not waiting", procedure::LOCK),
        ("UNLOCK 100-149", procedure::UNLOCK),
        ("CANCEL of it", procedure::CANCEL),
    ] {
        let message = captured(name)?;
        let call = call(&message, nlm(number))?;
        let sent: [u8; 4] = *call.args[4..].first_chunk().context("a cookie")?;
        let outcome = client.outcome_as(call.xid, number, call.args)?;
        let (cookie, stat) = read_res(&outcome.results()?)?;
        ensure!(
            cookie == sent && stat == stat::STALE_FH,
            "{name}: {cookie:?} {stat}"
        );
    }
    Ok(())
}

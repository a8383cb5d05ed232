//! The service is moved as an operator orders it, and by the end of a node that is told to stop.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::scene::{ALPHA, Expected, Scene, Setting, in_scene};

#[test]
fn planned_moves() -> Result<()> {
    in_scene("moves", &Setting::usual(true), |scene| {
        // Whoever is refused pauses for seconds, also if nobody else sees a gap.
        let knocks = scene.c2.spawn(
            "knocks",
            KNOCKS_TIME_MAX,
            &format!("python3 -c \"{KNOCK}\""),
        )?;
        moves(scene)?;
        let answers = knocks.output()?;
        let connected = answers.matches("connected").count();
        eprintln!("failover: {connected} new connections while the service moved");
        ensure!(connected > 100, "{answers}");
        ensure!(!answers.contains("refused"), "a client was refused");
        Ok(())
    })
}

/// Connects again and again to the portmapper and the MOUNT port, and says what came of it.
const KNOCK: &str = r"
import errno, select, socket, time
ports = (111, 20048)
poll, open = select.poll(), {}
while True:
    for port in ports:
        s = socket.socket()
        s.setblocking(False)
        s.connect_ex(('nfs-service', port))
        poll.register(s, select.POLLOUT)
        open[s.fileno()] = (s, port, time.time())
    time.sleep(0.01)
    for fd, _ in poll.poll(0):
        error = open[fd][0].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        said = {0: 'connected', errno.ECONNREFUSED: 'refused'}.get(error, error)
        print(said, open[fd][1], flush=True)
        poll.unregister(fd)
        open.pop(fd)[0].close()
";

#[test]
fn planned_moves_without_notices() -> Result<()> {
    in_scene("moves-quiet", &Setting::usual(false), moves)
}

fn moves(scene: &mut Scene<'_>) -> Result<()> {
    scene.case(
        "moved",
        Expected::Move,
        |cluster, before| {
            let to = cluster.others(&[before.node])[0];
            cluster.order_move(ALPHA.name, to)
        },
        |_, _| Ok(()),
    )?;
    scene.case(
        "moved back at once",
        Expected::Again,
        |cluster, before| {
            let to = cluster.others(&[before.node])[0];
            cluster.move_to(ALPHA.name, to)?;
            cluster.order_move(ALPHA.name, before.node)
        },
        |_, _| Ok(()),
    )?;
    scene.case(
        "the active node is told to end",
        Expected::Move,
        |cluster, before| cluster.stop(before.node),
        |cluster, before| cluster.restart(before.node),
    )
}

#[test]
fn twenty_takeovers() -> Result<()> {
    in_scene("twenty", &Setting::usual(true), twenty)
}

#[test]
fn twenty_takeovers_without_notices() -> Result<()> {
    in_scene("twenty-quiet", &Setting::usual(false), twenty)
}

fn twenty(scene: &mut Scene<'_>) -> Result<()> {
    const TAKEOVERS: usize = 20;
    for round in 0..TAKEOVERS {
        if round % 2 == 0 {
            scene.case(
                &format!("{round}: moved"),
                Expected::Move,
                |cluster, before| {
                    let to = cluster.others(&[before.node])[round / 2 % 2];
                    cluster.order_move(ALPHA.name, to)
                },
                |_, _| Ok(()),
            )?;
        } else {
            scene.case(
                &format!("{round}: killed"),
                Expected::Takeover,
                |cluster, before| cluster.kill(before.node),
                |cluster, before| cluster.restart(before.node),
            )?;
        }
    }
    Ok(())
}

/// The test is over before.
const KNOCKS_TIME_MAX: Duration = Duration::from_mins(2);

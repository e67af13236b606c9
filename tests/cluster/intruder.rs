//! Strangers at the arbiter's port: garbage, half a frame, a frame that never ends. Nobody else notices.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use multimaster_tests::{OwnCase, Session, cases, with_cluster};
use xtask::checks;
use xtask::cluster::Cluster;
use xtask::installation::Installation;
use xtask::server::Server;

pub fn cases() -> Vec<OwnCase> {
    cases![
        strangers_at_the_arbiter_port_change_nothing,
        silent_strangers_are_sent_away
    ]
}

/// What strangers send, by what it pretends to be.
fn hostile_bytes() -> Vec<(&'static str, Vec<u8>)> {
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut noise = |length: usize| -> Vec<u8> {
        (0..length)
            .map(|_| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random.to_le_bytes()[0]
            })
            .collect()
    };
    vec![
        ("nothing", Vec::new()),
        ("one byte", vec![0]),
        ("zeros", vec![0; 4096]),
        ("ones", vec![0xff; 4096]),
        (
            "a length of four gigabytes",
            [&[0xff; 8][..], &[0; 100]].concat(),
        ),
        (
            "a big-endian length and little else",
            [&[0x7f, 0xff, 0xff, 0xff][..], b"x"].concat(),
        ),
        (
            "another protocol",
            b"GET / HTTP/1.1\r\nHost: example\r\n\r\n".to_vec(),
        ),
        (
            "a PostgreSQL client",
            [&8_u32.to_be_bytes()[..], &80_877_103_u32.to_be_bytes()].concat(),
        ),
        ("noise", noise(512)),
        ("a megabyte of noise", noise(1 << 20)),
    ]
}

fn strangers_at_the_arbiter_port_change_nothing(installation: &Installation) -> Result<()> {
    with_cluster(installation, 3, |cluster| {
        let cluster: &Cluster = cluster;
        let mut session = Session::new(cluster.connect(0)?);
        session.run("CREATE TABLE t (id serial PRIMARY KEY, node int)")?;
        let done = AtomicBool::new(false);
        let written = thread::scope(|scope| {
            let writers: Vec<_> = (0..cluster.nodes.len())
                .map(|node| {
                    scope.spawn({
                        let done = &done;
                        move || write_until(cluster, node, done)
                    })
                })
                .collect();
            let attack = attack(cluster);
            done.store(true, Ordering::Relaxed);
            let mut written = 0;
            for writer in writers {
                written += writer
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            attack.map(|()| written)
        })?;
        ensure!(
            session.text("SELECT count(*) FROM t")? == written.to_string(),
            "rows are missing"
        );
        for node in 0..cluster.nodes.len() {
            let status =
                Session::new(cluster.connect(node)?).text("SELECT status FROM mtm.status()")?;
            ensure!(status == "online", "node {} is {status}", node + 1);
            ensure!(
                !cluster.nodes[node].log_text().contains("PANIC"),
                "node {} panicked",
                node + 1
            );
        }
        checks::whole(cluster, Duration::from_secs(20))
    })
}

/// Inserts one row after the other; every one must be committed.
fn write_until(cluster: &Cluster, node: usize, done: &AtomicBool) -> Result<usize> {
    let mut session = Session::new(cluster.connect(node)?);
    let mut written = 0;
    while !done.load(Ordering::Relaxed) {
        session.run(&format!("INSERT INTO t (node) VALUES ({node})"))?;
        written += 1;
    }
    Ok(written)
}

fn attack(cluster: &Cluster) -> Result<()> {
    for _ in 0..3 {
        for (what, bytes) in hostile_bytes() {
            for node in &cluster.nodes {
                send(node, &bytes).with_context(|| format!("{what} to {}", node.name))?;
            }
        }
    }
    // Many at once, which then break off in the middle.
    let mut crowd = Vec::new();
    for node in &cluster.nodes {
        for _ in 0..100 {
            let mut stream = connect(node)?;
            // The arbiter may have closed it already.
            let _ = stream.write_all(&[1, 2, 3]);
            crowd.push(stream);
        }
    }
    Ok(())
}

fn connect(node: &Server) -> Result<TcpStream> {
    let stream = TcpStream::connect((node.address, node.arbiter_port))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.set_write_timeout(Some(Duration::from_secs(30)))?;
    Ok(stream)
}

fn send(node: &Server, bytes: &[u8]) -> Result<()> {
    let mut stream = connect(node)?;
    // Being cut off while still talking is exactly what should happen.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = [0; 4096];
    let _ = stream.read(&mut answer);
    Ok(())
}

fn silent_strangers_are_sent_away(installation: &Installation) -> Result<()> {
    with_cluster(installation, 2, |cluster| {
        let mut stream = connect(&cluster.nodes[0])?;
        let started = Instant::now();
        let mut answer = Vec::new();
        // Ends when the arbiter closes the connection; the read timeout would be an error.
        let end = stream.read_to_end(&mut answer);
        let closed = end.is_ok()
            || end.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset);
        ensure!(closed, "still connected after {:?}", started.elapsed());
        Ok(())
    })
}

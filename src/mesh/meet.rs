//! The handshake over a socket: reads and writes the records that `wire::handshake` asks for.

use std::time::Duration;

use protocol::NodeId;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use wire::handshake::{HandshakeError, Session, answer, dial};
use wire::hello::{RECORD_BYTES, Record};

use crate::event::MeetError;
use crate::shared::Shared;

/// Time to hand a refusal to the kernel; a stranger that does not read does not get it.
const REFUSAL_TIMEOUT: Duration = Duration::from_millis(100);

/// The dialer's side. The caller limits the time.
pub(crate) async fn meet_acceptor(
    shared: &Shared,
    stream: &mut TcpStream,
    peer: NodeId,
) -> Result<Session, MeetError> {
    let result = prove_to_acceptor(shared, stream, peer).await;
    tell_refusal(shared, stream, &result).await;
    result
}

/// The acceptor's side. The caller limits the time.
pub(crate) async fn meet_dialer(
    shared: &Shared,
    stream: &mut TcpStream,
) -> Result<Session, MeetError> {
    let result = prove_to_dialer(shared, stream).await;
    tell_refusal(shared, stream, &result).await;
    result
}

async fn prove_to_acceptor(
    shared: &Shared,
    stream: &mut TcpStream,
    peer: NodeId,
) -> Result<Session, MeetError> {
    let (state, hello) = dial(&shared.identity, peer)?;
    stream.write_all(&hello).await?;
    let (state, key) = state.on_hello(&read_record(stream).await?)?;
    stream.write_all(&key).await?;
    let (session, confirm) = state.on_key(&read_record(stream).await?)?;
    stream.write_all(&confirm).await?;
    Ok(session)
}

async fn prove_to_dialer(shared: &Shared, stream: &mut TcpStream) -> Result<Session, MeetError> {
    let record = read_record(stream).await?;
    let (state, hello) = answer(&shared.identity, shared.peers, &record)?;
    check_epoch(shared, state.peer(), state.epoch())?;
    stream.write_all(&hello).await?;
    let (state, key) = state.on_key(&read_record(stream).await?)?;
    stream.write_all(&key).await?;
    let session = state.on_confirm(&read_record(stream).await?)?;
    Ok(session)
}

/// A forgotten earlier incarnation must not push out the one that took its place.
fn check_epoch(shared: &Shared, from: NodeId, epoch: u32) -> Result<(), HandshakeError> {
    match shared.connected_epoch(from) {
        Some(connected) if epoch < connected => Err(HandshakeError::StaleEpoch {
            from,
            epoch,
            connected,
        }),
        _ => Ok(()),
    }
}

async fn read_record(stream: &mut TcpStream) -> Result<Record, MeetError> {
    let mut record = [0; RECORD_BYTES];
    stream.read_exact(&mut record).await?;
    Ok(record)
}

async fn tell_refusal(
    shared: &Shared,
    stream: &mut TcpStream,
    result: &Result<Session, MeetError>,
) {
    let Err(MeetError::Handshake(error)) = result else {
        return;
    };
    if let Some(record) = error.refusal(shared.identity.versions) {
        // The handshake has failed already; whether the other side hears why changes nothing.
        let _ = timeout(REFUSAL_TIMEOUT, async {
            stream.write_all(&record).await?;
            stream.shutdown().await
        })
        .await;
    }
}

/// Sets what every connection of the mesh needs: small frames leave at once, dead connections are found by the kernel too.
pub(crate) fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_keepalive(true)
}

//! The handshake: two arbiters meet, negotiate a version, and prove to each other that they hold the cluster's secret.
//!
//! ```text
//! dialer                                            acceptor
//!   hello: versions, cluster, from, to, epoch, nonce   ─▶
//!   ◀─   hello: the same, with a nonce of its own
//!   dialer key: Noise NNpsk0, first message            ─▶   proves the secret
//!   ◀─   acceptor key: second message                       proves the secret
//!   confirm: sealed with the session's key             ─▶   proves that the dialer is there now
//! ```
//!
//! The pattern is `Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s`; `snow` does the cryptography. The secret is mixed into the very first
//! key, so an acceptor spends no key agreement on strangers; fresh ephemeral keys on both sides give forward
//! secrecy. Both hellos and the chosen version are the prologue: whoever changes a byte of them breaks the proofs, and
//! since both hold a fresh nonce, a recorded handshake fails at its first key.
//!
//! Each step consumes the state of the one before, so no step can be taken twice or left out. A step that fails may leave a
//! [`HandshakeError::refusal`] to be sent before the connection is closed.
//!
//! The secret is one for the whole cluster: it keeps strangers out, not one member from posing as another.

use protocol::{NodeId, NodeSet};
use snow::{Builder, HandshakeState};
use thiserror::Error;
use zeroize::Zeroize;

use crate::channel::{Opener, Sealer, channel};
use crate::hello::{
    BODY_BYTES, Hello, Kind, NONCE_BYTES, Record, RecordError, Refusal, RefusalCode, Versions,
    open_record, seal_record,
};

const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"multimaster arbiter handshake";
/// Length of the cluster's secret.
pub const SECRET_BYTES: usize = 32;
/// Noise's first two messages are a 32-byte key, a payload and a 16-byte tag; the payload fills the record.
const KEY_PAYLOAD: [u8; BODY_BYTES - 32 - 16] = [0; BODY_BYTES - 32 - 16];
const CONFIRM_PAYLOAD: [u8; BODY_BYTES - 16] = [0; BODY_BYTES - 16];

/// The secret all nodes of a cluster share. Never printed, wiped when dropped.
#[derive(Clone)]
pub struct ClusterSecret([u8; SECRET_BYTES]);

impl ClusterSecret {
    pub const fn new(bytes: [u8; SECRET_BYTES]) -> Self {
        Self(bytes)
    }

    /// Draws a new secret from the operating system.
    pub fn generate() -> Result<Self, HandshakeError> {
        random().map(Self)
    }

    /// The secret itself, to be stored where the cluster keeps it.
    pub const fn expose(&self) -> &[u8; SECRET_BYTES] {
        &self.0
    }
}

impl Drop for ClusterSecret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl std::fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterSecret(..)")
    }
}

/// Who this node is.
#[derive(Clone, Debug)]
pub struct Identity {
    pub node: NodeId,
    pub epoch: u32,
    pub cluster_id: u128,
    pub secret: ClusterSecret,
    /// [`Versions::OURS`], except in tests.
    pub versions: Versions,
}

/// Why a handshake ended without a session.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HandshakeError {
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("a record of the handshake came out of turn")]
    OutOfTurn,
    #[error("the peer speaks wire version {theirs}, this node {ours}")]
    Version { ours: Versions, theirs: Versions },
    #[error("node {from} belongs to another cluster")]
    Cluster { from: NodeId },
    #[error("node {from} is not one of this node's peers")]
    UnknownNode { from: NodeId },
    #[error("node {from} was reached instead of node {wanted}")]
    ReachedWrongNode { from: NodeId, wanted: NodeId },
    #[error("node {from} wanted to reach node {wanted}, not this node")]
    WrongNodeWanted { from: NodeId, wanted: NodeId },
    #[error("node {from} connected, but the node with the higher id has to")]
    Direction { from: NodeId },
    #[error("epoch {epoch} of node {from} is over: epoch {connected} is connected")]
    StaleEpoch {
        from: NodeId,
        epoch: u32,
        connected: u32,
    },
    #[error("the peer does not hold the secret of this cluster")]
    Secret,
    #[error("the peer (wire version {versions}) refused this node: {code}")]
    RefusedByPeer {
        code: RefusalCode,
        versions: Versions,
    },
    #[error("the operating system gave no random bytes")]
    Random,
    #[error("the cryptographic library failed: {0}")]
    Library(String),
}

impl HandshakeError {
    /// What to tell the other side before closing; `None` when there is nothing to tell, or nobody who would understand.
    pub fn refusal(&self, versions: Versions) -> Option<Record> {
        let code = match self {
            Self::Version { .. } => RefusalCode::Version,
            Self::Cluster { .. } => RefusalCode::Cluster,
            Self::UnknownNode { .. } => RefusalCode::UnknownNode,
            Self::ReachedWrongNode { .. } | Self::WrongNodeWanted { .. } => RefusalCode::WrongNode,
            Self::Direction { .. } => RefusalCode::Direction,
            Self::StaleEpoch { .. } => RefusalCode::StaleEpoch,
            Self::Secret => RefusalCode::Secret,
            Self::OutOfTurn
            | Self::Record(RecordError::NodeId(_) | RecordError::VersionRange { .. }) => {
                RefusalCode::Record
            }
            Self::Record(RecordError::NotAnArbiter)
            | Self::RefusedByPeer { .. }
            | Self::Random
            | Self::Library(_) => return None,
        };
        Some(Refusal { code, versions }.encode())
    }
}

/// A proven peer and the means to talk to it.
pub struct Session {
    pub peer: NodeId,
    /// Incarnation of the peer's arbiter.
    pub epoch: u32,
    /// The wire version of all frames that follow.
    pub version: u16,
    pub sealer: Sealer,
    pub opener: Opener,
}

/// The dialer's side, waiting for the acceptor's hello.
pub struct HelloSent<'a> {
    identity: &'a Identity,
    peer: NodeId,
    sent: Record,
}

/// Starts a handshake with `peer`; the record goes out first.
pub fn dial(identity: &Identity, peer: NodeId) -> Result<(HelloSent<'_>, Record), HandshakeError> {
    let sent = hello(identity, peer)?.encode();
    let state = HelloSent {
        identity,
        peer,
        sent,
    };
    Ok((state, sent))
}

impl HelloSent<'_> {
    /// Takes the acceptor's hello; the record to send proves the secret.
    pub fn on_hello(self, record: &Record) -> Result<(DialerKeySent, Record), HandshakeError> {
        let theirs = Hello::decode(expect(record, Kind::Hello)?)?;
        let version = negotiate(self.identity, &theirs)?;
        if theirs.from != self.peer {
            return Err(HandshakeError::ReachedWrongNode {
                from: theirs.from,
                wanted: self.peer,
            });
        }
        if theirs.to != self.identity.node {
            return Err(HandshakeError::WrongNodeWanted {
                from: theirs.from,
                wanted: theirs.to,
            });
        }
        let prologue = prologue(version, &self.sent, record);
        let mut noise = builder(&self.identity.secret, &prologue)?
            .build_initiator()
            .map_err(library)?;
        let key = write_key(&mut noise, Kind::DialerKey)?;
        let state = DialerKeySent {
            noise,
            peer: self.peer,
            epoch: theirs.epoch,
            version,
        };
        Ok((state, key))
    }
}

/// The dialer's side, waiting for the acceptor's key.
pub struct DialerKeySent {
    noise: HandshakeState,
    peer: NodeId,
    epoch: u32,
    version: u16,
}

impl DialerKeySent {
    /// Takes the acceptor's proof; the record to send confirms, and the session may be used after it.
    pub fn on_key(mut self, record: &Record) -> Result<(Session, Record), HandshakeError> {
        read_key(&mut self.noise, expect(record, Kind::AcceptorKey)?)?;
        let mut session = session(self.noise, self.peer, self.epoch, self.version)?;
        let mut body = [0; BODY_BYTES];
        session
            .sealer
            .seal_into(&CONFIRM_PAYLOAD, &mut body)
            .map_err(|error| HandshakeError::Library(error.to_string()))?;
        Ok((session, seal_record(Kind::Confirm, &body)))
    }
}

/// The acceptor's side, waiting for the dialer's key.
pub struct HelloAnswered {
    noise: HandshakeState,
    peer: NodeId,
    epoch: u32,
    version: u16,
}

/// Answers a dialer's hello, if it comes from one of `peers`; the record is the acceptor's hello.
pub fn answer(
    identity: &Identity,
    peers: NodeSet,
    record: &Record,
) -> Result<(HelloAnswered, Record), HandshakeError> {
    let theirs = Hello::decode(expect(record, Kind::Hello)?)?;
    let version = negotiate(identity, &theirs)?;
    check_dialer(identity, peers, &theirs)?;
    let sent = hello(identity, theirs.from)?.encode();
    let prologue = prologue(version, record, &sent);
    let noise = builder(&identity.secret, &prologue)?
        .build_responder()
        .map_err(library)?;
    let state = HelloAnswered {
        noise,
        peer: theirs.from,
        epoch: theirs.epoch,
        version,
    };
    Ok((state, sent))
}

impl HelloAnswered {
    /// Who the dialer says it is; not proven yet.
    pub const fn peer(&self) -> NodeId {
        self.peer
    }

    /// Which incarnation the dialer says it is; not proven yet.
    pub const fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Takes the dialer's proof; the record to send is the acceptor's.
    pub fn on_key(mut self, record: &Record) -> Result<(AcceptorKeySent, Record), HandshakeError> {
        read_key(&mut self.noise, expect(record, Kind::DialerKey)?)?;
        let key = write_key(&mut self.noise, Kind::AcceptorKey)?;
        let session = session(self.noise, self.peer, self.epoch, self.version)?;
        Ok((AcceptorKeySent { session }, key))
    }
}

/// The acceptor's side, waiting for the confirmation.
pub struct AcceptorKeySent {
    session: Session,
}

impl AcceptorKeySent {
    /// Takes the confirmation. Only now is the peer proven to be there.
    pub fn on_confirm(mut self, record: &Record) -> Result<Session, HandshakeError> {
        let body = expect(record, Kind::Confirm)?;
        let mut payload = [0; BODY_BYTES];
        self.session
            .opener
            .open_into(body, &mut payload)
            .map_err(|_| HandshakeError::Secret)?;
        Ok(self.session)
    }
}

fn check_dialer(identity: &Identity, peers: NodeSet, theirs: &Hello) -> Result<(), HandshakeError> {
    let from = theirs.from;
    if theirs.to != identity.node {
        let wanted = theirs.to;
        return Err(HandshakeError::WrongNodeWanted { from, wanted });
    }
    if !peers.contains(from) {
        return Err(HandshakeError::UnknownNode { from });
    }
    if from <= identity.node {
        return Err(HandshakeError::Direction { from });
    }
    Ok(())
}

/// Looks at what comes first: without a common version nothing else in the hello may mean what it seems to.
fn negotiate(identity: &Identity, theirs: &Hello) -> Result<u16, HandshakeError> {
    let version = identity
        .versions
        .common(theirs.versions)
        .ok_or(HandshakeError::Version {
            ours: identity.versions,
            theirs: theirs.versions,
        })?;
    if theirs.cluster_id != identity.cluster_id {
        return Err(HandshakeError::Cluster { from: theirs.from });
    }
    Ok(version)
}

/// The body of a record of the wanted kind. A refusal in its place is the peer's reason.
fn expect(record: &Record, wanted: Kind) -> Result<&[u8; BODY_BYTES], HandshakeError> {
    match open_record(record)? {
        (kind, body) if kind == wanted => Ok(body),
        (Kind::Refusal, body) => {
            let Refusal { code, versions } = Refusal::decode(body)?;
            Err(HandshakeError::RefusedByPeer { code, versions })
        }
        _ => Err(HandshakeError::OutOfTurn),
    }
}

fn hello(identity: &Identity, to: NodeId) -> Result<Hello, HandshakeError> {
    Ok(Hello {
        versions: identity.versions,
        from: identity.node,
        to,
        epoch: identity.epoch,
        cluster_id: identity.cluster_id,
        nonce: random::<NONCE_BYTES>()?,
    })
}

fn prologue(version: u16, dialer: &Record, acceptor: &Record) -> Vec<u8> {
    [PROLOGUE, &version.to_le_bytes(), dialer, acceptor].concat()
}

fn builder<'a>(
    secret: &'a ClusterSecret,
    prologue: &'a [u8],
) -> Result<Builder<'a>, HandshakeError> {
    let params = PATTERN.parse().map_err(library)?;
    Builder::new(params)
        .psk(0, secret.expose())
        .and_then(|builder| builder.prologue(prologue))
        .map_err(library)
}

fn write_key(noise: &mut HandshakeState, kind: Kind) -> Result<Record, HandshakeError> {
    let mut body = [0; BODY_BYTES];
    noise
        .write_message(&KEY_PAYLOAD, &mut body)
        .map_err(library)?;
    Ok(seal_record(kind, &body))
}

/// Whatever fails here, a wrong secret, a changed hello or a recorded key, the other side has not proven the secret.
fn read_key(noise: &mut HandshakeState, body: &[u8; BODY_BYTES]) -> Result<(), HandshakeError> {
    let mut payload = [0; BODY_BYTES];
    noise
        .read_message(body, &mut payload)
        .map(|_| ())
        .map_err(|_| HandshakeError::Secret)
}

fn session(
    noise: HandshakeState,
    peer: NodeId,
    epoch: u32,
    version: u16,
) -> Result<Session, HandshakeError> {
    let keys = noise.into_stateless_transport_mode().map_err(library)?;
    let (sealer, opener) = channel(keys);
    Ok(Session {
        peer,
        epoch,
        version,
        sealer,
        opener,
    })
}

fn random<const N: usize>() -> Result<[u8; N], HandshakeError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|_| HandshakeError::Random)?;
    Ok(bytes)
}

fn library(error: snow::Error) -> HandshakeError {
    HandshakeError::Library(error.to_string())
}

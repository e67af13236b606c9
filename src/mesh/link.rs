//! A link while it stands: one task that reads, writes, keeps the pulse and watches the queue.
//!
//! All four are futures of the peer's task, so that the end of one ends all, and no message crosses a task of its own.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use protocol::{Message, NodeId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until};
use wire::channel::{ChannelError, Opener, SEALED_BYTES_MAX, Sealer, split_frame};
use wire::frame::{Batch, Content, decode, encode_heartbeat};
use wire::handshake::Session;

use crate::event::{DownReason, MeshEvent};
use crate::outbox::Outbox;
use crate::shared::Shared;

/// Bytes read at once; holds a whole frame and more.
const READ_BYTES: usize = 2 * SEALED_BYTES_MAX;
/// Reading gives way to the rest of the link after so many bytes, or so many reads.
const TURN_BYTES: usize = READ_BYTES;
const TURN_READS: usize = 16;
/// Sealed bytes gathered before they are written.
const WRITE_BYTES: usize = 4 * SEALED_BYTES_MAX;

/// A connection whose two ends have proven themselves.
pub(crate) struct Link {
    pub stream: TcpStream,
    pub session: Session,
    pub addr: SocketAddr,
}

/// Runs the link to its end.
pub(crate) async fn run(shared: &Shared, mut link: Link) -> DownReason {
    let (read, write) = link.stream.split();
    let Session {
        peer,
        version,
        sealer,
        opener,
        ..
    } = link.session;
    let outbox = shared.outbox(peer);
    let heard = Heard::now(shared);
    let reader = Reader {
        shared,
        peer,
        version,
        opener,
        heard: &heard,
        content: Vec::new(),
        messages: Vec::new(),
    };
    let writer = Writer {
        shared,
        outbox,
        sealer,
        content: Vec::new(),
        sealed: Vec::new(),
    };
    // Reading comes first: after a standstill of this process, what has arrived is heard before the peer is called silent. The
    // pulse comes before writing, so that a heartbeat leaves with what is written next.
    let end = tokio::select! {
        biased;
        end = reader.run(read) => end,
        end = keep_pulse(shared, outbox, &heard) => end,
        () = outbox.overflowed() => Err(DownReason::TooSlow),
        end = writer.run(write) => end,
    };
    match end {
        Err(reason) => reason,
        Ok(never) => match never {},
    }
}

/// What a loop without an end returns when it ends well.
enum Never {}

/// When the peer was last heard.
struct Heard {
    at_ms: AtomicU64,
    /// The reader waits for the caller to take an event, and cannot hear.
    delivering: AtomicBool,
}

impl Heard {
    fn now(shared: &Shared) -> Self {
        Self {
            at_ms: AtomicU64::new(shared.now_ms()),
            delivering: AtomicBool::new(false),
        }
    }

    fn touch(&self, shared: &Shared) {
        self.at_ms.store(shared.now_ms(), Ordering::Relaxed);
    }

    /// When the peer was last heard, as far as this node listened.
    fn last(&self, shared: &Shared) -> Instant {
        if self.delivering.load(Ordering::Relaxed) {
            self.touch(shared);
        }
        shared.instant(self.at_ms.load(Ordering::Relaxed))
    }
}

/// Sends heartbeats, and ends the link when the peer sends nothing.
async fn keep_pulse(shared: &Shared, outbox: &Outbox, heard: &Heard) -> Result<Never, DownReason> {
    let mut timing = shared.timing.subscribe();
    let mut last_sent = None;
    loop {
        let times = *timing.borrow_and_update();
        let now = Instant::now();
        let silent_at = heard.last(shared) + times.recv;
        if now >= silent_at {
            let ms = u64::try_from(times.recv.as_millis()).unwrap_or(u64::MAX);
            return Err(DownReason::Silent(ms));
        }
        let mut due = last_sent.map_or(now, |sent| sent + times.send);
        if now >= due {
            outbox.request_heartbeat();
            last_sent = Some(now);
            due = now + times.send;
        }
        tokio::select! {
            () = sleep_until(due.min(silent_at)) => {}
            changed = timing.changed() => changed.map_err(|_| DownReason::Stopping)?,
        }
    }
}

struct Reader<'a> {
    shared: &'a Shared,
    peer: NodeId,
    version: u16,
    opener: Opener,
    heard: &'a Heard,
    /// The frame that is looked at; reused.
    content: Vec<u8>,
    /// Messages that wait to be delivered together.
    messages: Vec<Message>,
}

impl Reader<'_> {
    async fn run(mut self, mut stream: ReadHalf<'_>) -> Result<Never, DownReason> {
        let mut buffer = vec![0; READ_BYTES];
        let mut filled = 0;
        let mut turn = 0;
        loop {
            let read = stream.read(&mut buffer[filled..]).await?;
            if read == 0 {
                return Err(DownReason::Closed);
            }
            filled += read;
            let consumed = self.take_frames(&buffer[..filled]).await?;
            buffer.copy_within(consumed..filled, 0);
            filled -= consumed;
            // A peer that sends faster than this node reads must not keep it from writing and from its heartbeats.
            turn += read.max(TURN_BYTES / TURN_READS);
            if turn >= TURN_BYTES {
                turn = 0;
                yield_now().await;
            }
        }
    }

    /// Delivers what whole frames say; returns how many bytes they were. Less than one frame is left.
    async fn take_frames(&mut self, bytes: &[u8]) -> Result<usize, DownReason> {
        let mut consumed = 0;
        while let Some(sealed) = split_frame(&bytes[consumed..])? {
            consumed += wire::channel::PREFIX_BYTES + sealed.len();
            self.opener.open(sealed, &mut self.content)?;
            // Only what the peer has sealed is a sign of life.
            self.heard.touch(self.shared);
            if let Content::Heartbeat(heartbeat) =
                decode(self.version, &self.content, &mut self.messages)?
            {
                self.deliver_messages().await?;
                let from = self.peer;
                self.deliver(MeshEvent::Heartbeat { from, heartbeat })
                    .await?;
            }
        }
        self.deliver_messages().await?;
        Ok(consumed)
    }

    async fn deliver_messages(&mut self) -> Result<(), DownReason> {
        if self.messages.is_empty() {
            return Ok(());
        }
        let batch = std::mem::take(&mut self.messages);
        let from = self.peer;
        self.deliver(MeshEvent::Messages { from, batch }).await
    }

    async fn deliver(&self, event: MeshEvent) -> Result<(), DownReason> {
        self.heard.delivering.store(true, Ordering::Relaxed);
        let delivered = self.shared.events.send(event).await;
        self.heard.touch(self.shared);
        self.heard.delivering.store(false, Ordering::Relaxed);
        delivered.map_err(|_| DownReason::Stopping)
    }
}

struct Writer<'a> {
    shared: &'a Shared,
    outbox: &'a Outbox,
    sealer: Sealer,
    /// A heartbeat's content; reused.
    content: Vec<u8>,
    /// Sealed frames that wait to be written together.
    sealed: Vec<u8>,
}

impl Writer<'_> {
    async fn run(mut self, mut stream: WriteHalf<'_>) -> Result<Never, DownReason> {
        let mut batch = Batch::default();
        loop {
            self.outbox.ready().await;
            // Not allowed to claim that this node lives, it keeps everything back and looks dead to its peers.
            if !self.shared.may_speak() {
                continue;
            }
            if self.outbox.take(&mut batch) {
                self.seal_heartbeat()?;
            }
            for frame in batch.frames() {
                seal(&mut self.sealer, frame, &mut self.sealed)?;
                if self.sealed.len() >= WRITE_BYTES {
                    self.flush(&mut stream).await?;
                }
            }
            self.flush(&mut stream).await?;
        }
    }

    fn seal_heartbeat(&mut self) -> Result<(), DownReason> {
        encode_heartbeat(&self.shared.heartbeat(), &mut self.content)
            .map_err(|error| DownReason::Io(error.to_string()))?;
        seal(&mut self.sealer, &self.content, &mut self.sealed)
    }

    async fn flush(&mut self, stream: &mut WriteHalf<'_>) -> Result<(), DownReason> {
        stream.write_all(&self.sealed).await?;
        self.sealed.clear();
        Ok(())
    }
}

/// Fails only when the link's keys are used up; a new link has new ones.
fn seal(sealer: &mut Sealer, content: &[u8], out: &mut Vec<u8>) -> Result<(), DownReason> {
    sealer
        .seal(content, out)
        .map_err(|error: ChannelError| DownReason::Io(error.to_string()))
}

//! Sealed frames: two bytes of length, little-endian, then that many bytes of ciphertext.
//!
//! The n-th frame of a direction is sealed with nonce n. A frame that is missing, repeated, changed or out of place does not
//! open, and the link ends with it.

use std::sync::Arc;

use snow::StatelessTransportState;
use thiserror::Error;

/// Most bytes of one frame's content.
pub const FRAME_BYTES_MAX: usize = 32 * 1024;
/// What sealing adds to a frame's content.
pub const TAG_BYTES: usize = 16;
/// Length of the length.
pub const PREFIX_BYTES: usize = 2;
/// Most bytes of one sealed frame, its length included.
pub const SEALED_BYTES_MAX: usize = PREFIX_BYTES + FRAME_BYTES_MAX + TAG_BYTES;

/// A sealed frame that cannot be right, or content that cannot be sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ChannelError {
    #[error("a frame of {0} bytes is not within {TAG_BYTES}..={max}", max = FRAME_BYTES_MAX + TAG_BYTES)]
    Length(usize),
    #[error("a frame's content of {0} bytes is longer than {FRAME_BYTES_MAX}")]
    Content(usize),
    #[error("a frame is not what the peer sealed, or not in its place")]
    Forged,
    #[error("the link has sealed as many frames as its keys allow")]
    Exhausted,
}

/// Seals what this node sends.
pub struct Sealer {
    keys: Arc<StatelessTransportState>,
    nonce: u64,
}

/// Opens what the peer has sealed.
pub struct Opener {
    keys: Arc<StatelessTransportState>,
    nonce: u64,
}

/// The two directions of a link.
pub(crate) fn channel(keys: StatelessTransportState) -> (Sealer, Opener) {
    let keys = Arc::new(keys);
    let sealer = Sealer {
        keys: Arc::clone(&keys),
        nonce: 0,
    };
    (sealer, Opener { keys, nonce: 0 })
}

impl Sealer {
    /// Appends the sealed frame, its length first, to `out`.
    pub fn seal(&mut self, content: &[u8], out: &mut Vec<u8>) -> Result<(), ChannelError> {
        let sealed = content.len() + TAG_BYTES;
        let prefix = match u16::try_from(sealed) {
            Ok(prefix) if content.len() <= FRAME_BYTES_MAX => prefix,
            _ => return Err(ChannelError::Content(content.len())),
        };
        out.extend_from_slice(&prefix.to_le_bytes());
        let start = out.len();
        out.resize(start + sealed, 0);
        self.seal_into(content, &mut out[start..])
    }

    /// Seals without a length; `out` is [`TAG_BYTES`] longer than `content`.
    pub(crate) fn seal_into(&mut self, content: &[u8], out: &mut [u8]) -> Result<(), ChannelError> {
        let nonce = next(&mut self.nonce)?;
        self.keys
            .write_message(nonce, content, out)
            .map(|_| ())
            .map_err(|_| ChannelError::Content(content.len()))
    }
}

impl Opener {
    /// Replaces `content` by that of a sealed frame, given without its length.
    pub fn open(&mut self, sealed: &[u8], content: &mut Vec<u8>) -> Result<(), ChannelError> {
        content.clear();
        content.resize(sealed.len(), 0);
        let length = self.open_into(sealed, content)?;
        content.truncate(length);
        Ok(())
    }

    /// Opens into `content`, which is as long as `sealed`; returns the length of the content.
    pub(crate) fn open_into(
        &mut self,
        sealed: &[u8],
        content: &mut [u8],
    ) -> Result<usize, ChannelError> {
        let nonce = next(&mut self.nonce)?;
        self.keys
            .read_message(nonce, sealed, content)
            .map_err(|_| ChannelError::Forged)
    }
}

/// Looks for a whole frame at the start of `bytes`: the sealed frame without its length, or `None` while some is missing.
pub fn split_frame(bytes: &[u8]) -> Result<Option<&[u8]>, ChannelError> {
    let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX_BYTES>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_le_bytes(*prefix));
    if !(TAG_BYTES..=FRAME_BYTES_MAX + TAG_BYTES).contains(&length) {
        return Err(ChannelError::Length(length));
    }
    Ok(rest.get(..length))
}

/// The last nonce is Noise's own.
fn next(nonce: &mut u64) -> Result<u64, ChannelError> {
    let current = *nonce;
    if current == u64::MAX {
        return Err(ChannelError::Exhausted);
    }
    *nonce += 1;
    Ok(current)
}

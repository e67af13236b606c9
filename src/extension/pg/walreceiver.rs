//! A replication connection to a peer, through `libpqwalreceiver`.

use pgrx::pg_sys;
use protocol::Lsn;
use std::ffi::{CStr, CString, c_char};

/// A walsender on the other side.
pub struct Stream {
    connection: *mut pg_sys::WalReceiverConn,
    functions: &'static pg_sys::WalReceiverFunctionsType,
}

/// What came from the walsender.
pub enum Received<'a> {
    /// Nothing now; the socket becomes readable when there is more.
    Nothing { socket: i32 },
    /// A CopyData message.
    Message(&'a [u8]),
    /// The walsender ended the stream.
    End,
}

/// Why a stream could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("could not connect: {0}")]
    Connect(String),
    #[error("the peer could not copy slot \"{0}\"")]
    Copy(String),
    #[error("the peer did not start replication from slot \"{0}\"")]
    Start(String),
}

fn functions() -> &'static pg_sys::WalReceiverFunctionsType {
    // SAFETY: loading the library sets the pointer to its static table.
    unsafe {
        if pg_sys::WalReceiverFunctions.is_null() {
            pg_sys::load_file(c"libpqwalreceiver".as_ptr(), false);
        }
        &*pg_sys::WalReceiverFunctions
    }
}

/// Calls through libpqwalreceiver's table raise C errors, which the guard turns into unwinding.
fn guarded<T>(call: impl FnOnce() -> T) -> T {
    // SAFETY: the closure only calls C functions and owns nothing that a longjmp inside them would skip.
    unsafe { pg_sys::ffi::pg_guard_ffi_boundary(call) }
}

impl Stream {
    /// Opens a logical replication connection. Blocks up to the conninfo's `connect_timeout`, serving interrupts.
    pub fn connect(conninfo: &str, name: &str) -> Result<Stream, StreamError> {
        let functions = functions();
        let conninfo =
            CString::new(conninfo).map_err(|error| StreamError::Connect(error.to_string()))?;
        let name = CString::new(name).map_err(|error| StreamError::Connect(error.to_string()))?;
        let mut message: *mut c_char = std::ptr::null_mut();
        let connect = functions
            .walrcv_connect
            .expect("libpqwalreceiver fills its table");
        // SAFETY: zero-terminated strings that outlive the call.
        let connection =
            guarded(|| unsafe { connect(conninfo.as_ptr(), true, name.as_ptr(), &mut message) });
        if connection.is_null() {
            // SAFETY: on failure the message is a palloc'd string.
            let text = unsafe { CStr::from_ptr(message) }
                .to_string_lossy()
                .trim()
                .to_owned();
            return Err(StreamError::Connect(text));
        }
        Ok(Stream {
            connection,
            functions,
        })
    }

    /// Makes a copy of a slot that lasts as long as this connection.
    pub fn copy_slot(&mut self, slot: &str, copy: &str) -> Result<(), StreamError> {
        let call = self
            .functions
            .walrcv_exec
            .expect("libpqwalreceiver fills its table");
        // Names of slots are made of digits, letters and underscores.
        let sql = format!(
            "DO $$ BEGIN PERFORM pg_catalog.pg_copy_logical_replication_slot('{slot}', '{copy}', true); END $$"
        );
        let sql = CString::new(sql).map_err(|error| StreamError::Connect(error.to_string()))?;
        // SAFETY: a live connection and a zero-terminated command without result columns; the result is the library's.
        let done = guarded(|| unsafe {
            let result = call(self.connection, sql.as_ptr(), 0, std::ptr::null());
            (*result).status == pg_sys::WalRcvExecStatus::WALRCV_OK_COMMAND
        });
        if done {
            Ok(())
        } else {
            Err(StreamError::Copy(slot.to_owned()))
        }
    }

    /// Starts logical replication at `start` (or the slot's confirmed position, if that is later).
    pub fn start(&mut self, slot: &str, start: Lsn) -> Result<(), StreamError> {
        self.start_for(slot, start, "multimaster")
    }

    /// The same, naming a publication: what the other side's plugin is to do.
    pub fn start_for(
        &mut self,
        slot: &str,
        start: Lsn,
        publication: &str,
    ) -> Result<(), StreamError> {
        let name = CString::new(slot).map_err(|error| StreamError::Connect(error.to_string()))?;
        let publication =
            CString::new(publication).map_err(|error| StreamError::Connect(error.to_string()))?;
        let call = self
            .functions
            .walrcv_startstreaming
            .expect("libpqwalreceiver fills its table");
        // SAFETY: an all-zero options struct is valid; the list and its string live in the current memory context for the call.
        let started = unsafe {
            let mut options: pg_sys::WalRcvStreamOptions = std::mem::zeroed();
            options.logical = true;
            options.slotname = name.as_ptr().cast_mut();
            options.startpoint = start.0;
            options.proto.logical.proto_version = 3;
            options.proto.logical.twophase = true;
            let publication = pg_sys::makeString(pg_sys::pstrdup(publication.as_ptr()));
            options.proto.logical.publication_names =
                pg_sys::lappend(std::ptr::null_mut(), publication.cast());
            guarded(|| call(self.connection, &options))
        };
        if started {
            Ok(())
        } else {
            Err(StreamError::Start(slot.to_owned()))
        }
    }

    /// Takes the next message, if one is there.
    pub fn receive(&mut self) -> Received<'_> {
        let call = self
            .functions
            .walrcv_receive
            .expect("libpqwalreceiver fills its table");
        let mut buffer: *mut c_char = std::ptr::null_mut();
        let mut socket: pg_sys::pgsocket = -1;
        // SAFETY: a live connection; the buffer belongs to it until the next call.
        let length = guarded(|| unsafe { call(self.connection, &mut buffer, &mut socket) });
        match length {
            0 => Received::Nothing { socket },
            // SAFETY: the library returned that many bytes.
            1.. => Received::Message(unsafe {
                std::slice::from_raw_parts(buffer.cast(), length as usize)
            }),
            _ => Received::End,
        }
    }

    /// Sends a CopyData message.
    pub fn send(&mut self, message: &[u8]) {
        let call = self
            .functions
            .walrcv_send
            .expect("libpqwalreceiver fills its table");
        // SAFETY: a live connection and a buffer of that length.
        guarded(|| unsafe {
            call(
                self.connection,
                message.as_ptr().cast(),
                message.len() as i32,
            )
        });
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(disconnect) = self.functions.walrcv_disconnect {
            // SAFETY: disconnecting frees the connection and does not raise.
            unsafe { disconnect(self.connection) };
        }
    }
}

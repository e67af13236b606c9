//! Names of the transactions that this node has recovered, in `mtm.recovered`, until it is online.

use crate::decode;
use pgrx::prelude::*;
use std::collections::BTreeSet;

mod guarded {
    use pgrx::pg_sys;
    use std::ffi::c_char;
    unsafe extern "C-unwind" {
        pub fn LogLogicalMessage(
            prefix: *const c_char,
            message: *const c_char,
            size: usize,
            transactional: bool,
        ) -> pg_sys::XLogRecPtr;
    }
}

/// All of them. Runs in a transaction.
pub fn names() -> BTreeSet<String> {
    let found = Spi::connect(|client| {
        let rows = client.select("SELECT gid FROM mtm.recovered", None, &[])?;
        rows.map(|row| row.get::<String>(1))
            .filter_map(Result::transpose)
            .collect::<Result<_, _>>()
    });
    found.unwrap_or_else(|error| pgrx::error!("multimaster cannot read mtm.recovered: {error}"))
}

/// Names the running transaction, here and to whoever recovers from this node later.
pub fn add(name: &str) {
    log_message(decode::RECOVERED_PREFIX, name.as_bytes(), true);
    note(name);
}

/// Names a transaction here only. Runs in a transaction.
pub fn note(name: &str) {
    // SAFETY: in a transaction; the snapshot is taken off again right below, or by the abort.
    unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot()) };
    let added = Spi::run_with_args("INSERT INTO mtm.recovered VALUES ($1)", &[name.into()]);
    if let Err(error) = added {
        pgrx::error!("multimaster cannot write mtm.recovered: {error}");
    }
    // SAFETY: pushed above.
    unsafe { pg_sys::PopActiveSnapshot() };
}

/// Forgets them. Runs in a transaction.
pub fn clear() {
    if let Err(error) = Spi::run("DELETE FROM mtm.recovered") {
        pgrx::error!("multimaster cannot empty mtm.recovered: {error}");
    }
}

/// Writes the marker of a generation to WAL and flushes it.
pub fn write_marker(generation: protocol::GenerationNum) {
    let end = log_message(decode::MARKER_PREFIX, &generation.0.to_le_bytes(), false);
    super::records::flush(protocol::Lsn(end));
}

/// Writes a logical message; returns its end in WAL.
fn log_message(prefix: &std::ffi::CStr, content: &[u8], transactional: bool) -> u64 {
    // SAFETY: guarded; pointers and length describe live bytes.
    unsafe {
        pg_sys::ffi::pg_guard_ffi_boundary(|| {
            guarded::LogLogicalMessage(
                prefix.as_ptr(),
                content.as_ptr().cast(),
                content.len(),
                transactional,
            )
        })
    }
}

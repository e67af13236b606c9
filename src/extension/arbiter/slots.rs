//! Replication slots for the peers, made again where they are missing.
//!
//! Base backups and, in PostgreSQL 15, standbys do not carry logical slots. A standby that was promoted to take its node's place therefore makes
//! them anew. Nothing is skipped by that: what this node had committed every peer had prepared before; what it had only prepared is
//! resolved at the start, and a peer that has not heard of it bars it. A copy that is *older* than its node is found out by the receivers.

use crate::cluster::{Identity, slot_name};
use crate::pg::process;
use crate::pg::shared::shared;
use pgrx::Spi;
use std::sync::atomic::Ordering;

/// Names of the slots that the peers need and this server does not have. Runs in a transaction.
pub fn missing(identity: &Identity) -> Vec<String> {
    let there: Vec<String> = Spi::connect(|client| {
        let rows = client.select(
            "SELECT slot_name::pg_catalog.text FROM pg_catalog.pg_replication_slots",
            None,
            &[],
        )?;
        rows.map(|row| row.get::<String>(1))
            .filter_map(Result::transpose)
            .collect::<Result<_, _>>()
    })
    .unwrap_or_else(|error| pgrx::error!("multimaster cannot list the replication slots: {error}"));
    let given_up = shared().needs_copy();
    identity
        .peers()
        .filter(|peer| !given_up.contains(peer.id))
        .map(|peer| slot_name(identity.tag, peer.id))
        .filter(|name| !there.contains(name))
        .collect()
}

/// Body of the background worker `multimaster slot maker`. It waits for transactions that were running when it began, as every slot does.
pub fn main() {
    process::attach_signals();
    process::stay_local();
    process::connect_to_cluster();
    shared().slot_maker.set_self();
    process::at_exit(|| shared().slot_maker.clear());
    let names = process::in_transaction(|| match Identity::load() {
        Ok(Some(identity)) => missing(&identity),
        _ => Vec::new(),
    });
    for name in names {
        process::in_transaction(|| {
            make(&name);
            remember(&name);
        });
        pgrx::log!("multimaster has made the replication slot \"{name}\" again");
    }
    shared().slots_missing.store(false, Ordering::Release);
}

/// Before the transaction writes anything: a slot cannot be made later.
fn make(name: &str) {
    // Slot names are made of digits, letters and underscores.
    let sql = format!(
        "SELECT pg_catalog.pg_create_logical_replication_slot('{name}', 'multimaster', false, true)"
    );
    let made = Spi::connect(|client| client.select(&sql, None, &[]).map(|rows| rows.len()));
    if let Err(error) = made {
        pgrx::error!("multimaster cannot make the replication slot \"{name}\": {error}");
    }
}

/// Notes where the new slot stands, so that the peer does not take it for one that it has confirmed itself.
fn remember(name: &str) {
    let sql = format!(
        "INSERT INTO mtm.slots_made SELECT slot_name, confirmed_flush_lsn FROM pg_catalog.pg_replication_slots \
          WHERE slot_name = '{name}' ON CONFLICT (slot_name) DO UPDATE SET made_at = excluded.made_at"
    );
    if let Err(error) = Spi::run(&sql) {
        pgrx::error!("multimaster cannot note the replication slot \"{name}\": {error}");
    }
}

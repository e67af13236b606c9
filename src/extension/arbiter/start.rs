//! How the arbiter starts: finding the database, the identity, and what an earlier life left.

use super::RESTART_PAUSE;
use super::durable::{RECORDS_MAX, Tuples};
use super::event::{self, LocalEvent};
use super::net_config::{NetSettings, millis, start_mesh};
use super::thread::{Arbiter, FromMain, MainLink};
use super::{referee, retention, slots};
use crate::apply::progress::{held_in, mark_in};
use crate::cluster::Identity;
use crate::cluster::copy::{self, Copied};
use crate::cluster::identity::ClusterState;
use crate::failpoint::{Failpoint, hit};
use crate::guc;
use crate::pg::outcome::next_xid;
use crate::pg::process::{self, Wait};
use crate::pg::records::{self, DurableTable, Places};
use crate::pg::shared::{self, outcome, shared};
use crate::pg::{catalog_scan, ddl, in_flight, locks, sequences};
use mesh::MeshHandle;
use protocol::membership::{Generation, MembershipRecord};
use protocol::{
    Config, Core, Effects, FAST_NODES_MAX, GenerationNum, Gid, Lsn, NodeId, NodeSet, Record,
    Recovered,
};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Row of `mtm.marks` that holds this server's epoch; rows 1 to 16 are the marks of the nodes.
const EPOCH_ROW: u32 = 0;
/// A finder that has not answered by then is started again.
const FINDER_PATIENCE: Duration = Duration::from_secs(5);
/// Row with the membership's record.
const MEMBERS_ROW: u32 = 17;
/// Rows of `mtm.marks`.
pub const MARK_ROWS: u32 = 18;
/// Waits until it is known which database is a cluster's.
///
/// A process can attach to one database only, once, and the marker can only be read by one that is attached to some database. So two helpers
/// that live for a moment look: the first finds a database to attach to, the second reads the marker there.
pub fn find_database() {
    let shared = shared();
    if !shared.identity_known.load(Ordering::Acquire) {
        run_finder(0);
        run_finder(shared.finder_database.load(Ordering::Acquire));
        shared.identity_known.store(
            shared.database.load(Ordering::Acquire) == 0,
            Ordering::Release,
        );
    }
    // From here on mtm.init_cluster says where the cluster is.
    while shared.database.load(Ordering::Acquire) == 0 {
        process::wait_latch(Duration::from_secs(10), Wait::Work);
        process::check_interrupts();
    }
}

/// Starts a finder and waits for its answer, for as long as it takes.
fn run_finder(database: u32) {
    let shared = shared();
    shared.finder_done.store(false, Ordering::Release);
    let mut asked = None::<Instant>;
    while !shared.finder_done.load(Ordering::Acquire) {
        if asked.is_none_or(|asked| asked.elapsed() > FINDER_PATIENCE) {
            asked = Some(Instant::now());
            process::start_worker(
                "multimaster finder",
                "multimaster_finder_main",
                database as i32,
            );
        }
        process::wait_latch(Duration::from_millis(20), Wait::Work);
        process::check_interrupts();
    }
}

/// Body of the background worker `multimaster finder`: with database 0 it finds a database to attach to, else it reads the marker there.
pub fn find(database: u32) {
    process::attach_signals();
    process::stay_local();
    let shared = shared();
    if database == 0 {
        process::connect_shared_catalogs();
        let found = process::in_transaction(catalog_scan::any_database);
        shared
            .finder_database
            .store(found.unwrap_or(0), Ordering::Release);
    } else {
        process::connect(database);
        if let Some(found) = process::in_transaction(catalog_scan::cluster_database) {
            shared.database.store(found, Ordering::Release);
        }
    }
    shared.finder_done.store(true, Ordering::Release);
    shared.arbiter.wake();
}

/// Waits until the cluster is active; none when the process is to start again.
pub fn await_identity() -> Option<Identity> {
    shared().arbiter.set_self();
    loop {
        shared().identity_changed.store(false, Ordering::Release);
        let identity = process::in_transaction(Identity::load);
        match identity {
            Ok(Some(identity)) if identity.state == ClusterState::Active => return Some(identity),
            Ok(_) => {}
            Err(error) => pgrx::warning!("multimaster cannot read its catalog: {error}"),
        }
        // Being formed, or what was being formed has been undone: nothing is replicated yet.
        shared().identity_known.store(true, Ordering::Release);
        if !process::in_transaction(catalog_scan::has_cluster_marker) {
            shared().database.store(0, Ordering::Release);
            return None;
        }
        while !shared().identity_changed.load(Ordering::Acquire) {
            process::wait_latch(Duration::from_secs(1), Wait::Work);
            process::check_interrupts();
        }
    }
}

/// What an earlier life left, as the core wants it.
pub struct RecoveredState {
    pub decider: Decider,
    pub records: DurableTable,
}

/// The core with what belongs to it.
pub struct Decider {
    pub core: Core,
    pub tuples: Tuples,
    /// Where the durable records lie.
    pub places: Places,
    /// What the membership remembers; none in a new cluster.
    pub membership: Option<MembershipRecord>,
    /// The node that this server is a copy of.
    pub copied_from: Option<NodeId>,
    /// Number of this start.
    pub epoch: u32,
    /// What the core wants done first.
    pub effects: Effects,
}

/// Reads the durable records and the prepared transactions, starts a new epoch and publishes the identity.
pub fn recover(identity: &Identity) -> RecoveredState {
    event::await_finishes();
    await_committing_backends();
    let first_xid = next_xid();
    // Prepared transactions first: a finish writes its record before, so what is not prepared has its record by then.
    let prepared: Vec<Gid> = locks::prepared_names()
        .iter()
        .filter_map(|(xid, name)| {
            let (_, gid) = Gid::parse(name)?;
            in_flight::enter(gid, *xid);
            Some(gid)
        })
        .collect();
    let (records, bodies) = process::in_transaction(|| {
        let table = DurableTable::open(c"records", RECORDS_MAX);
        let bodies = table.read_all();
        (table, bodies)
    });
    records.pin();
    let found: BTreeMap<Gid, (u32, Record)> = (0..)
        .zip(&bodies)
        .filter_map(|(tuple, body)| {
            Record::from_bytes(body)
                .ok()
                .map(|record| (record.gid, (tuple, record)))
        })
        .collect();
    hit(Failpoint::StartBeforeEpoch);
    let epoch = next_epoch(identity.node_id);
    hit(Failpoint::StartAfterEpoch);
    process::in_transaction(retention::load);
    shared().slots_missing.store(
        process::in_transaction(|| !slots::missing(identity).is_empty()),
        Ordering::Release,
    );
    let (membership, copied) = process::in_transaction(|| (read_membership(), copy::load()));
    publish(identity, membership);
    load_marks(identity, epoch);
    repeat_marks(identity.node_id);
    let config = config(identity, membership, copied, epoch, first_xid);
    let tuples = Tuples::new(found.iter().map(|(gid, (tuple, _))| (*gid, *tuple)));
    let mut effects = Effects::new();
    let core = Core::new(config, recovered(&found, &prepared), 0, &mut effects);
    RecoveredState {
        decider: Decider {
            core,
            tuples,
            places: records.places(),
            membership,
            copied_from: copied.map(|copied| copied.donor),
            epoch,
            effects,
        },
        records,
    }
}

/// Backends that an earlier life told to commit. With rule D2 their COMMIT PREPARED is the decision: nobody may resolve what they are about to
/// decide. They wait for nobody on other nodes, so this takes no longer than a flush; with synchronous standbys, until those have it.
fn await_committing_backends() {
    let committing = |slot: &shared::BackendSlot| {
        !slot.is_user_prepare()
            && slot
                .gid
                .get()
                .is_some_and(|gid| slot.outcome(gid.xid) == outcome::COMMIT)
    };
    while shared::backends().iter().any(committing) {
        process::wait_latch(Duration::from_millis(5), Wait::Work);
        process::check_interrupts();
    }
}

/// The first heartbeats say what this node holds already: its marks and its WAL. What replaced nodes are known by comes from there, too.
fn load_marks(identity: &Identity, epoch: u32) {
    let (marks, copies) = process::in_transaction(|| {
        let marks = DurableTable::open(c"marks", MARK_ROWS).read_all();
        (marks, copy::last_numbers())
    });
    for peer in identity.peers() {
        let (node, stored) = (shared().node(peer.id), &marks[usize::from(peer.id.get())]);
        if epoch == 1 {
            // What is there is of another cluster, which this server has belonged to before.
            node.mark.store(0, Ordering::Release);
            node.held.store(0, Ordering::Release);
            node.newest_epoch.store(0, Ordering::Release);
        }
        let number = copies.get(&peer.id).copied().unwrap_or_default();
        node.newest_epoch.fetch_max(number, Ordering::AcqRel);
        node.mark.fetch_max(mark_in(stored).0.0, Ordering::AcqRel);
        node.held.fetch_max(held_in(stored).0, Ordering::AcqRel);
    }
    let own = &shared().node(identity.node_id).flushed;
    own.store(records::flushed().0, Ordering::Relaxed);
}

/// Receivers that outlived the last arbiter tell their marks when they move; this one has to know them now.
fn repeat_marks(node: NodeId) {
    for peer in shared().configured_nodes().without(node).iter() {
        let lsn = Lsn(shared().node(peer).mark.load(Ordering::Acquire));
        event::submit(&LocalEvent::MarkStored { node: peer, lsn });
    }
}

fn recovered(found: &BTreeMap<Gid, (u32, Record)>, prepared: &[Gid]) -> Vec<Recovered> {
    let mut all: BTreeMap<Gid, Recovered> = found
        .iter()
        .map(|(gid, (_, record))| {
            (
                *gid,
                Recovered {
                    gid: *gid,
                    record: Some(*record),
                    prepared: false,
                },
            )
        })
        .collect();
    for gid in prepared {
        all.entry(*gid)
            .or_insert(Recovered {
                gid: *gid,
                record: None,
                prepared: true,
            })
            .prepared = true;
    }
    all.into_values().collect()
}

fn config(
    identity: &Identity,
    membership: Option<MembershipRecord>,
    copied: Option<Copied>,
    epoch: u32,
    first_xid: u64,
) -> Config {
    let configured = identity.nodes.iter().map(|node| node.id).collect();
    let current = current(configured, membership);
    Config {
        node: identity.node_id,
        configured,
        members: current.members,
        generation: current.num,
        epoch,
        first_xid,
        copied_in: copied.map_or(GenerationNum(0), |copied| copied.generation),
        votes_to_all: configured.len() > FAST_NODES_MAX,
        resolve_after_ms: millis(guc::heartbeat_recv_timeout()),
        resolve_step_ms: 200,
        resend_after_ms: 500,
        give_up_after_ms: 5000,
        fault: None,
    }
}

/// The membership's record; none in a new cluster. One that cannot be right stops the node. Runs in a transaction.
pub fn read_membership() -> Option<MembershipRecord> {
    let body = DurableTable::open(c"marks", MARK_ROWS).read_all()[MEMBERS_ROW as usize];
    if body == [0; records::BODY_BYTES] {
        return None;
    }
    match MembershipRecord::from_bytes(&body) {
        Ok(record) => Some(record),
        Err(error) => pgrx::error!("multimaster cannot read its record of members: {error}"),
    }
}

/// The generation that this node knows.
fn current(configured: NodeSet, membership: Option<MembershipRecord>) -> Generation {
    let record = membership.unwrap_or(MembershipRecord::first(configured));
    record.current.generation
}

/// Writes and flushes the membership's record.
pub fn write_membership(record: records::Body) {
    let end = process::in_transaction(|| {
        DurableTable::open(c"marks", MARK_ROWS).write(&mut [(MEMBERS_ROW, record)])
    });
    records::flush(end);
}

/// Whether a transaction of an older generation is prepared here. Users' own do not count: nobody knows when they end.
pub fn holds_older(num: GenerationNum) -> bool {
    locks::prepared_names()
        .values()
        .filter_map(|name| Gid::parse(name))
        .any(|(_, gid)| gid.generation < num)
}

/// At the first start of this node in its cluster, or of a copy as this node: tables get a replica identity, sequences their share. Again after a crash in between.
fn prepare_database(node: NodeId) {
    ddl::prepare_existing_tables();
    sequences::prepare_existing_sequences(node);
}

/// Counts this start, durably: csns of different epochs never meet.
fn next_epoch(node: NodeId) -> u32 {
    let end = process::in_transaction(|| {
        let marks = DurableTable::open(c"marks", MARK_ROWS);
        let epoch = number_in(&marks.read_all()[EPOCH_ROW as usize]) + 1;
        let fresh_copy = copy::load().is_some_and(|copied| copied.is_fresh);
        if epoch == 1 || fresh_copy {
            prepare_database(node);
            copy::settle();
        }
        shared().epoch.store(epoch as u32, Ordering::Release);
        marks.write(&mut [(EPOCH_ROW, body_of(epoch))])
    });
    hit(Failpoint::StartBeforeEpochFlush);
    records::flush(end);
    shared().epoch.load(Ordering::Acquire)
}

/// First eight bytes of a body as a number.
pub fn number_in(body: &records::Body) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&body[..8]);
    u64::from_le_bytes(bytes)
}

/// A body that holds one number.
pub fn body_of(number: u64) -> records::Body {
    let mut body = [0; records::BODY_BYTES];
    body[..8].copy_from_slice(&number.to_le_bytes());
    body
}

fn publish(identity: &Identity, membership: Option<MembershipRecord>) {
    let shared = shared();
    for node in &identity.nodes {
        shared
            .node(node.id)
            .configured
            .store(true, Ordering::Release);
    }
    shared.cluster_id[0].store((identity.cluster_id >> 64) as u64, Ordering::Release);
    shared.cluster_id[1].store(identity.cluster_id as u64, Ordering::Release);
    shared.tag.store(identity.tag.0, Ordering::Release);
    let configured = identity.nodes.iter().map(|node| node.id).collect();
    let current = current(configured, membership);
    shared.set_generation(current.num, current.members);
    shared
        .node
        .store(u32::from(identity.node_id.get()), Ordering::Release);
    shared.identity_known.store(true, Ordering::Release);
}

/// Body of the tokio thread.
pub fn run_thread(
    identity: Identity,
    settings: NetSettings,
    decider: Decider,
    main: MainLink,
    from_main: mpsc::UnboundedReceiver<FromMain>,
) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("could not start the network runtime: {error}"))?;
    let node = identity.node_id;
    let configured = identity.nodes.iter().map(|peer| peer.id).collect();
    runtime.block_on(async move {
        let (mesh, events) = start_mesh(&identity, &settings).await?;
        let silence = SilentInPanic(mesh.clone());
        let arbiter = Arbiter::new(node, configured, decider, main, mesh, &settings);
        // A task like those of the links: what they wake runs next, where the runtime looks at all sockets before it goes on with its outermost future.
        let running = tokio::spawn(async move {
            let _silence = silence;
            arbiter.run(events, from_main).await
        });
        match running.await {
            Ok(result) => result.map_err(|error| format!("network thread failed: {error}")),
            Err(ended) => std::panic::resume_unwind(ended.into_panic()),
        }
    })
}

/// Keeps the links from saying anything more once the arbiter's task has panicked: a node whose core is wrong must not act.
struct SilentInPanic(MeshHandle);

impl Drop for SilentInPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.speak_for(Some(Duration::ZERO));
        }
    }
}

/// Workers that must always be there.
#[derive(Default)]
pub struct Children {
    tried: BTreeMap<String, Instant>,
}

impl Children {
    /// Starts what is missing, not more often than every half second.
    pub fn look_after(&mut self, peers: &[NodeId]) {
        if process::terminate_pending() {
            return;
        }
        let shared = shared();
        if shared.slots_missing.load(Ordering::Acquire) {
            let running = shared.slot_maker.is_set();
            self.keep(
                "multimaster slot maker",
                "multimaster_slot_maker_main",
                0,
                running,
            );
        }
        self.keep(
            "multimaster monitor",
            "multimaster_monitor_main",
            0,
            shared.monitor.is_set(),
        );
        self.keep(
            "multimaster finisher",
            "multimaster_finisher_main",
            0,
            shared.finisher.is_set(),
        );
        let needs_copy = shared
            .node_id()
            .is_some_and(|node| shared.needs_copy().contains(node));
        if needs_copy {
            return;
        }
        if referee::is_wanted() {
            self.keep(
                "multimaster referee",
                "multimaster_referee_main",
                0,
                shared.referee.is_set(),
            );
        }
        if let Some(order) = shared.recovery_order() {
            self.keep(
                "multimaster recovery",
                "multimaster_recovery_main",
                i32::from(order.from().get()),
                shared.recovery.is_set(),
            );
        }
        for peer in peers {
            let name = format!("multimaster receiver {}", peer.get());
            let running = shared.node(*peer).receiver.is_set();
            self.keep(
                &name,
                "multimaster_receiver_main",
                i32::from(peer.get()),
                running,
            );
        }
    }

    fn keep(&mut self, name: &str, function: &str, argument: i32, running: bool) {
        let waits = self
            .tried
            .get(name)
            .is_some_and(|tried| tried.elapsed() < RESTART_PAUSE);
        if running || waits {
            return;
        }
        self.tried.insert(name.to_owned(), Instant::now());
        if !process::start_worker(name, function, argument) {
            pgrx::warning!("multimaster could not start \"{name}\": raise max_worker_processes");
        }
    }
}

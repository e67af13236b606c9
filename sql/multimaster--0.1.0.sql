-- complain if the script is sourced in psql rather than through CREATE EXTENSION
\echo Use "CREATE EXTENSION multimaster" to load this file. \quit

-- Every function written in Rust makes PostgreSQL load the library, which refuses with a hint unless the server has loaded it at its start:
-- so CREATE EXTENSION fails in a server that is not prepared.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'mtm_monitor') THEN
        CREATE ROLE mtm_monitor NOLOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'mtm_admin') THEN
        CREATE ROLE mtm_admin NOLOGIN;
    END IF;
    GRANT mtm_monitor TO mtm_admin;
END
$$;

-- Tables. None is marked with pg_extension_config_dump: a dump restored elsewhere must not carry this node's identity.

CREATE TABLE mtm.cluster (
    singleton   boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    cluster_id  uuid NOT NULL,
    tag         text NOT NULL CHECK (tag ~ '^[0-9a-f]{8}$'),
    node_id     integer NOT NULL CHECK (node_id BETWEEN 1 AND 16),
    state       text NOT NULL CHECK (state IN ('forming', 'active')),
    secret      bytea NOT NULL CHECK (pg_catalog.octet_length(secret) = 32),
    formed_at   timestamptz NOT NULL DEFAULT pg_catalog.now()
);
COMMENT ON TABLE mtm.cluster IS 'the cluster that this node belongs to; at most one row';
COMMENT ON COLUMN mtm.cluster.tag IS 'short name of the cluster in transaction identifiers and slot names';
COMMENT ON COLUMN mtm.cluster.state IS 'forming while mtm.init_cluster runs, then active';
COMMENT ON COLUMN mtm.cluster.secret IS 'what the arbiters of the cluster prove to each other';

CREATE TABLE mtm.cluster_nodes (
    node_id       integer PRIMARY KEY CHECK (node_id BETWEEN 1 AND 16),
    name          text NOT NULL UNIQUE,
    conninfo      text NOT NULL,
    arbiter_host  text NOT NULL,
    arbiter_port  integer NOT NULL CHECK (arbiter_port BETWEEN 1 AND 65535)
);
COMMENT ON TABLE mtm.cluster_nodes IS 'the configured nodes of the cluster, the same on every node';
COMMENT ON COLUMN mtm.cluster_nodes.conninfo IS 'may hold a password; mtm.nodes() shows it without';

-- Rows of the next two are written once and then overwritten in place through WAL, outside MVCC: fixed width, no nulls, no compression.
CREATE TABLE mtm.records (
    id   integer NOT NULL,
    pad  integer NOT NULL,
    b0   bigint NOT NULL, b1 bigint NOT NULL, b2 bigint NOT NULL, b3 bigint NOT NULL,
    b4   bigint NOT NULL, b5 bigint NOT NULL, b6 bigint NOT NULL, b7 bigint NOT NULL
);
COMMENT ON TABLE mtm.records IS 'durable promises and decisions of the commit protocol; never to be changed by hand';

CREATE TABLE mtm.marks (
    id   integer NOT NULL,
    pad  integer NOT NULL,
    b0   bigint NOT NULL, b1 bigint NOT NULL, b2 bigint NOT NULL, b3 bigint NOT NULL,
    b4   bigint NOT NULL, b5 bigint NOT NULL, b6 bigint NOT NULL, b7 bigint NOT NULL
);
COMMENT ON TABLE mtm.marks IS 'how far each peer''s changes are safe here; never to be changed by hand';

CREATE TABLE mtm.slots_made (
    slot_name  name PRIMARY KEY,
    made_at    pg_lsn NOT NULL
);
COMMENT ON TABLE mtm.slots_made IS 'replication slots that this server has made for its peers, and where they began';

CREATE TABLE mtm.recovered (gid text NOT NULL);
COMMENT ON TABLE mtm.recovered IS 'transactions that this node has applied while it recovers; empty when it is online';

CREATE TABLE mtm.needs_copy (
    node_id    integer PRIMARY KEY,
    noted_at   timestamptz NOT NULL,
    reason     text NOT NULL
);
COMMENT ON TABLE mtm.needs_copy IS 'nodes that were away for too long: the WAL they would need is no longer kept here, or, in the row about this node, elsewhere';

CREATE TABLE mtm.copies (
    node_id    integer PRIMARY KEY,
    number     bigint NOT NULL
);
COMMENT ON TABLE mtm.copies IS 'nodes that were replaced by a copy of another one, and the number of the last copy';

CREATE TABLE mtm.copied (
    singleton   boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    donor       integer NOT NULL,
    generation  bigint NOT NULL,
    is_fresh    boolean NOT NULL
);
COMMENT ON TABLE mtm.copied IS 'the node that this server was copied from, and the generation of that moment; at most one row';

REVOKE ALL ON
    mtm.cluster, mtm.cluster_nodes, mtm.records, mtm.marks, mtm.slots_made, mtm.recovered, mtm.needs_copy, mtm.copies, mtm.copied
    FROM PUBLIC;

-- Forming a cluster.

CREATE FUNCTION mtm.init_cluster(my_conninfo text, peers_conninfo text[]) RETURNS void
    LANGUAGE c VOLATILE CALLED ON NULL INPUT PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'init_cluster_wrapper';
COMMENT ON FUNCTION mtm.init_cluster(text, text[]) IS
    'make this server and its peers a cluster; returns when all nodes are online';

CREATE FUNCTION mtm.node_identify(conninfo text) RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'node_identify_wrapper';
COMMENT ON FUNCTION mtm.node_identify(text) IS
    'internal: which server and database a connection string leads to, seen from here';

CREATE FUNCTION mtm.wake_arbiter() RETURNS void
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'wake_arbiter_wrapper';
COMMENT ON FUNCTION mtm.wake_arbiter() IS
    'internal: make the arbiter read mtm.cluster again';

CREATE FUNCTION mtm.copy_state(
    node_id integer,
    OUT generation bigint,
    OUT record bytea,
    OUT mark bigint,
    OUT obstacle text
) RETURNS SETOF record
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE ROWS 1
    AS 'MODULE_PATHNAME', 'copy_state_wrapper';
COMMENT ON FUNCTION mtm.copy_state(integer) IS 'internal: whether a lost node may be replaced by a copy now, and what the copy needs; see mtm clone';

CREATE FUNCTION mtm.begin_copy(node_id integer) RETURNS bigint
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'begin_copy_wrapper';
COMMENT ON FUNCTION mtm.begin_copy(integer) IS 'internal: a lost node is going to be replaced by a copy; returns the number of the copy';

CREATE FUNCTION mtm.rejoin() RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'rejoin_wrapper';
COMMENT ON FUNCTION mtm.rejoin() IS 'make a node that has stopped as failed try again, once the cause is mended; on one that needs a copy, say how';

REVOKE ALL ON FUNCTION
    mtm.init_cluster(text, text[]), mtm.node_identify(text), mtm.wake_arbiter(), mtm.copy_state(integer), mtm.begin_copy(integer), mtm.rejoin()
    FROM PUBLIC;

-- Watching it.

CREATE FUNCTION mtm.without_secrets(conninfo text) RETURNS text
    LANGUAGE c IMMUTABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'without_secrets_wrapper';
COMMENT ON FUNCTION mtm.without_secrets(text) IS 'internal: a connection string without its passwords';

CREATE FUNCTION mtm.status(
    OUT my_node_id integer,
    OUT name text,
    OUT status text,
    OUT connected integer[],
    OUT gen_num bigint,
    OUT gen_members integer[],
    OUT gen_members_online integer[],
    OUT gen_configured integer[],
    OUT cluster_id uuid
) RETURNS SETOF record
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE ROWS 1
    AS 'MODULE_PATHNAME', 'status_wrapper';
COMMENT ON FUNCTION mtm.status() IS 'state of this node and of its generation, as this node sees it';

CREATE FUNCTION mtm.peer_states(
    OUT id integer,
    OUT enabled boolean,
    OUT connected boolean,
    OUT stopped boolean,
    OUT catch_up boolean,
    OUT avg_trans_delay bigint,
    OUT last_status_change timestamptz,
    OUT receiver_pid integer,
    OUT connectivity_mask bigint,
    OUT n_heartbeats bigint,
    OUT recovery_lag bigint,
    OUT confirmed bigint
) RETURNS SETOF record
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE ROWS 4
    AS 'MODULE_PATHNAME', 'peer_states_wrapper';
COMMENT ON FUNCTION mtm.peer_states() IS 'internal: what shared memory knows of each node; see mtm.get_nodes_state() and mtm.nodes()';

CREATE FUNCTION mtm.in_flight(
    OUT gid text,
    OUT coordinator integer,
    OUT role text,
    OUT state text,
    OUT ballot text,
    OUT started_at timestamptz,
    OUT missing integer[]
) RETURNS SETOF record
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'in_flight_wrapper';
COMMENT ON FUNCTION mtm.in_flight() IS 'internal: see the view mtm.transactions';

CREATE FUNCTION mtm.recent_conflicts(
    OUT happened_at timestamptz,
    OUT kind text,
    OUT node_id integer,
    OUT relation text,
    OUT key text,
    OUT loser text,
    OUT winner text
) RETURNS SETOF record
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'recent_conflicts_wrapper';
COMMENT ON FUNCTION mtm.recent_conflicts() IS 'internal: see the view mtm.conflicts';

CREATE FUNCTION mtm.recent_events(
    OUT happened_at timestamptz,
    OUT node_id integer,
    OUT event text,
    OUT reason text,
    OUT generation bigint,
    OUT lasted_ms bigint
) RETURNS SETOF record
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'recent_events_wrapper';
COMMENT ON FUNCTION mtm.recent_events() IS 'internal: see the view mtm.events';

CREATE FUNCTION mtm.counters(
    OUT outcome text,
    OUT reason text,
    OUT transactions bigint
) RETURNS SETOF record
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'counters_wrapper';
COMMENT ON FUNCTION mtm.counters() IS 'internal: see the view mtm.stat_commits';

CREATE FUNCTION mtm.latencies(
    OUT phase text,
    OUT peer integer,
    OUT count bigint,
    OUT p50 double precision,
    OUT p95 double precision,
    OUT p99 double precision,
    OUT max double precision
) RETURNS SETOF record
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'latencies_wrapper';
COMMENT ON FUNCTION mtm.latencies() IS 'internal: see the view mtm.commit_latency';

CREATE FUNCTION mtm.recovery_progress(
    OUT donor integer,
    OUT began_at timestamptz,
    OUT bytes_done bigint,
    OUT bytes_left bigint,
    OUT transactions bigint,
    OUT rate bigint,
    OUT retries bigint,
    OUT error text
) RETURNS SETOF record
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE ROWS 1
    AS 'MODULE_PATHNAME', 'recovery_progress_wrapper';
COMMENT ON FUNCTION mtm.recovery_progress() IS 'internal: see the view mtm.recovery';

CREATE FUNCTION mtm.reset_commit_latency() RETURNS void
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'reset_commit_latency_wrapper';
COMMENT ON FUNCTION mtm.reset_commit_latency() IS 'makes mtm.commit_latency of this node start again from nothing';

-- Reads how to reach the other nodes, hence SECURITY DEFINER.
CREATE FUNCTION mtm.transaction_status(gid text) RETURNS text
    LANGUAGE c VOLATILE STRICT SECURITY DEFINER PARALLEL UNSAFE
    SET search_path = pg_catalog, pg_temp
    AS 'MODULE_PATHNAME', 'transaction_status_wrapper';
COMMENT ON FUNCTION mtm.transaction_status(text) IS
    'outcome of a transaction named by mtm.current_gid(): committed, aborted, in progress or unknown';

CREATE FUNCTION mtm.local_transaction_status(gid text) RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'local_transaction_status_wrapper';
COMMENT ON FUNCTION mtm.local_transaction_status(text) IS
    'internal: what this node alone knows of a transaction; see mtm.transaction_status()';

CREATE FUNCTION mtm.current_gid() RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'current_gid_wrapper';
COMMENT ON FUNCTION mtm.current_gid() IS
    'name of the running transaction in the cluster; keep it to ask mtm.transaction_status later';

-- They read mtm.cluster_nodes and statistics of other users on behalf of mtm_monitor, hence SECURITY DEFINER with a fixed search_path.
CREATE FUNCTION mtm.get_nodes_state(
    OUT id integer,
    OUT name text,
    OUT enabled boolean,
    OUT connected boolean,
    OUT slot_active boolean,
    OUT stopped boolean,
    OUT catch_up boolean,
    OUT slot_lag bigint,
    OUT avg_trans_delay bigint,
    OUT last_status_change timestamptz,
    OUT oldest_snapshot bigint,
    OUT sender_pid integer,
    OUT sender_start_time timestamptz,
    OUT receiver_pid integer,
    OUT receiver_start_time timestamptz,
    OUT conn_str text,
    OUT connectivity_mask bigint,
    OUT n_heartbeats bigint
) RETURNS SETOF record
    LANGUAGE sql VOLATILE SECURITY DEFINER PARALLEL UNSAFE ROWS 4
    SET search_path = pg_catalog, pg_temp
AS $$
    SELECT n.node_id,
           n.name,
           p.enabled,
           p.connected,
           s.active,
           p.stopped,
           p.catch_up,
           -- What the slot keeps: multimaster.max_recovery_lag limits that.
           pg_wal_lsn_diff(w.lsn, s.restart_lsn)::bigint,
           p.avg_trans_delay,
           p.last_status_change,
           CASE WHEN n.node_id = c.node_id THEN o.xmin ELSE s.catalog_xmin::text::bigint END,
           s.active_pid,
           sender.backend_start,
           p.receiver_pid,
           receiver.backend_start,
           mtm.without_secrets(n.conninfo),
           p.connectivity_mask,
           p.n_heartbeats
      FROM mtm.cluster c
     CROSS JOIN mtm.cluster_nodes n
     CROSS JOIN (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END) AS w (lsn)
     CROSS JOIN (SELECT min(backend_xmin::text::bigint) FROM pg_stat_activity) AS o (xmin)
      LEFT JOIN mtm.peer_states() p ON p.id = n.node_id
      LEFT JOIN pg_replication_slots s
        ON s.slot_name = format('mtm_%s_n%s', c.tag, n.node_id) AND n.node_id <> c.node_id
      LEFT JOIN pg_stat_activity sender ON sender.pid = s.active_pid
      LEFT JOIN pg_stat_activity receiver ON receiver.pid = p.receiver_pid
     ORDER BY n.node_id
$$;
COMMENT ON FUNCTION mtm.get_nodes_state() IS 'one row per configured node: links, replication and lag, as this node sees them';

CREATE FUNCTION mtm.nodes(
    OUT id integer,
    OUT name text,
    OUT is_self boolean,
    OUT is_member boolean,
    OUT is_online boolean,
    OUT connected boolean,
    OUT conn_str text,
    OUT arbiter_host text,
    OUT arbiter_port integer,
    OUT recovery_lag bigint,
    OUT confirmed_lsn pg_lsn
) RETURNS SETOF record
    LANGUAGE sql VOLATILE SECURITY DEFINER PARALLEL UNSAFE ROWS 4
    SET search_path = pg_catalog, pg_temp
AS $$
    SELECT n.node_id,
           n.name,
           n.node_id = c.node_id,
           n.node_id = ANY (s.gen_members),
           n.node_id = ANY (s.gen_members_online),
           n.node_id = c.node_id OR n.node_id = ANY (s.connected),
           mtm.without_secrets(n.conninfo),
           n.arbiter_host,
           n.arbiter_port,
           p.recovery_lag,
           '0/0'::pg_lsn + p.confirmed
      FROM mtm.cluster c
     CROSS JOIN mtm.cluster_nodes n
      LEFT JOIN mtm.status() s ON true
      LEFT JOIN mtm.peer_states() p ON p.id = n.node_id
     ORDER BY n.node_id
$$;
COMMENT ON FUNCTION mtm.nodes() IS 'the configured nodes, who of them is a member of the generation, how to reach them, and how far each is, as it says itself';

CREATE VIEW mtm.transactions AS
    SELECT gid, coordinator, role, state, ballot, started_at, pg_catalog.clock_timestamp() - started_at AS age, missing
      FROM mtm.in_flight();
COMMENT ON VIEW mtm.transactions IS 'transactions in flight between the nodes, and whom each still waits for';

CREATE VIEW mtm.conflicts AS
    SELECT happened_at, kind, node_id, relation, key, loser, winner FROM mtm.recent_conflicts();
COMMENT ON VIEW mtm.conflicts IS 'the last conflicts that this node has settled';

CREATE VIEW mtm.events AS
    SELECT happened_at, node_id, event, reason, generation, lasted_ms * interval '1 millisecond' AS lasted
      FROM mtm.recent_events();
COMMENT ON VIEW mtm.events IS 'who was lost or came back, when, why, and after how long, as this node saw it';

CREATE VIEW mtm.recovery AS
    SELECT s.status, p.donor, p.began_at, p.bytes_done, p.bytes_left, p.transactions, p.rate,
           CASE WHEN p.donor IS NOT NULL AND p.rate > 0 THEN p.bytes_left / p.rate::double precision * interval '1 second' END AS estimate,
           p.retries, p.error
      FROM mtm.status() s
      LEFT JOIN mtm.recovery_progress() p ON true
     WHERE p.donor IS NOT NULL OR s.status = 'failed';
COMMENT ON VIEW mtm.recovery IS 'while this node fetches what it has missed: from whom, how much is left (bytes of WAL), how fast, and what stopped it';

CREATE VIEW mtm.stat_commits AS
    SELECT outcome, reason, transactions FROM mtm.counters();
COMMENT ON VIEW mtm.stat_commits IS 'transactions of this node since its start, by outcome and reason';

CREATE VIEW mtm.commit_latency AS
    SELECT phase, peer, count, p50, p95, p99, max FROM mtm.latencies();
COMMENT ON VIEW mtm.commit_latency IS 'how long the commits of this node took since its start, by phase and peer, in milliseconds';

-- Who may do what: everybody may learn the fate of a transaction whose name they know and the state of this node.

GRANT USAGE ON SCHEMA mtm TO PUBLIC;

REVOKE ALL ON FUNCTION
    mtm.without_secrets(text), mtm.peer_states(), mtm.in_flight(), mtm.recent_conflicts(), mtm.recent_events(), mtm.counters(),
    mtm.latencies(), mtm.reset_commit_latency(), mtm.recovery_progress(), mtm.get_nodes_state(), mtm.nodes()
    FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
    mtm.peer_states(), mtm.in_flight(), mtm.recent_conflicts(), mtm.recent_events(), mtm.counters(), mtm.latencies(), mtm.recovery_progress(),
    mtm.get_nodes_state(), mtm.nodes()
    TO mtm_monitor, pg_monitor;
GRANT SELECT ON mtm.transactions, mtm.conflicts, mtm.events, mtm.recovery, mtm.stat_commits, mtm.commit_latency, mtm.needs_copy
    TO mtm_monitor, pg_monitor;

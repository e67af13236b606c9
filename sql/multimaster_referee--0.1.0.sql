-- The referee of clusters with two nodes: plain SQL for any PostgreSQL from 12 on, without the library of multimaster.
-- Without the extension's files run this script by hand after CREATE SCHEMA mtm_referee.

CREATE TABLE mtm_referee.grants (
    cluster text PRIMARY KEY,
    num bigint NOT NULL CHECK (num > 0),
    node integer NOT NULL CHECK (node > 0),
    granted_at timestamptz NOT NULL
);
COMMENT ON TABLE mtm_referee.grants IS
    'the last generation of one node that was granted, by cluster; never restore an older copy of it';

-- The rule is that of protocol::membership::Referee: what was granted last is granted again; a higher number if the last one was granted to the
-- same node, or lies below the generation in which the asking node was online since.
CREATE FUNCTION mtm_referee.ask(cluster text, node integer, num bigint, online_in bigint, OUT granted boolean, OUT latest bigint)
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path = pg_catalog, pg_temp
    AS $$
BEGIN
    -- An answer that a crash takes back would let both nodes go on alone.
    PERFORM set_config('synchronous_commit', 'on', true);
    INSERT INTO mtm_referee.grants AS known (cluster, num, node, granted_at)
        VALUES (ask.cluster, ask.num, ask.node, now())
        ON CONFLICT ON CONSTRAINT grants_pkey DO UPDATE
            SET num = excluded.num, node = excluded.node, granted_at = excluded.granted_at
            WHERE known.num < excluded.num AND (known.node = excluded.node OR known.num < ask.online_in);
    SELECT known.num = ask.num AND known.node = ask.node, known.num
        INTO STRICT granted, latest
        FROM mtm_referee.grants AS known WHERE known.cluster = ask.cluster;
END
$$;
COMMENT ON FUNCTION mtm_referee.ask(text, integer, bigint, bigint) IS
    'whether a node of a cluster may go on alone in the generation of this number';
REVOKE ALL ON FUNCTION mtm_referee.ask(text, integer, bigint, bigint) FROM PUBLIC;
